"""Golden data of MiniT2I: networks in the authors' layouts, arrays, tolerances."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sf.checkpoints.config import Config
from mlx_sf.checkpoints.conversion import convert
from mlx_sf.checkpoints.load import load_model
from tests.helpers import GOLDEN, SHARES

T2I = GOLDEN / "minit2i"
SECOND = T2I / "second"
PLACES = {
    "small": T2I / "hub" / "minit2i-b-16",
    "hd52": T2I / "hub" / "minit2i-l-16",
    "hd64": T2I / "hd64",
    "nopre": T2I / "nopre",
    "e2e": T2I / "e2e",
    **{name: SECOND / "mmjit" / name for name in "abcd"},
}
SETTINGS = json.loads((T2I / "configs.json").read_text())


@cache
def arrays(file: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file, named from the folder of the first set."""
    with np.load(T2I / file) as z:
        return {k: z[k] for k in z.files}


@cache
def tolerances(file: str) -> dict[str, float]:
    """Largest error of each array of a file."""
    if file.startswith("second/"):
        return json.loads((T2I / file).with_name("golden.json").read_text())["tolerances"]
    return {k: v[2] for k, v in json.loads((T2I / "tolerances.json").read_text())[file].items()}


def close(file: str, name: str, got: Any, factor: float = 1.0) -> None:
    """Assert that `got` equals a golden array within `factor` of its stated tolerance."""
    want = arrays(file)[name]
    got = np.asarray(got)
    got = got.reshape(want.shape) if got.ndim == 0 else got
    assert got.shape == want.shape, f"{file} {name}: shape {got.shape}, want {want.shape}"
    tolerance = factor * tolerances(file)[name]
    error = float(np.abs(got.astype(np.float64) - want).max())
    if factor == 1:
        what = "second set" if file.startswith("second/") else file.removesuffix(".npz")
        SHARES.setdefault(f"minit2i {what}", []).append(error / tolerance if tolerance else error)
    assert error <= tolerance, f"{file} {name}: off by {error:.2e}, tolerance {tolerance:.2e}"


@cache
def network(name: str) -> tuple[Any, Config]:
    """A golden network, converted from its published folder, and its configuration."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        convert(PLACES[name], Path(folder) / "x.safetensors")
        found: tuple[Any, Config] = load_model(Path(folder) / "x.safetensors")
        mx.eval(found[0].parameters())
        return found


def text(context: Any, mask: Any) -> dict[str, mx.array]:
    """A condition of features that are in arrays already."""
    return {"context": mx.array(context), "mask": mx.array(mask)}


def given_prompts(model: Any, context: np.ndarray, mask: np.ndarray, monkeypatch: Any) -> list[str]:
    """Prompts that a network reads as these features, whose places may be masked anywhere."""

    def condition(asked: Any) -> Any:
        rows = [0 if a is None else int(a) for a in asked]
        return text(context[rows], mask[rows] * np.array([[a is not None] for a in asked]))

    monkeypatch.setattr(type(model), "condition", lambda self, asked: condition(asked))
    return [str(i) for i in range(len(context))]
