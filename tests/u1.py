"""Golden data of SenseNova-U1: tiny networks in the authors' layout, arrays, tolerances; two sets of them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sf.checkpoints.checkpoint import Checkpoint
from mlx_sf.checkpoints.load import load_model
from mlx_sf.models.sensenova_u1 import U1
from mlx_sf.models.u1_text import END, IMAGE, MARKUP, START, Prefix, encode, rendered, text_shapes
from tests.helpers import GOLDEN, SHARES

FIRST = GOLDEN / "u1"
OFFICIAL = FIRST / "official"
NETWORKS = ("mlp", "conv")
PROMPTS = json.loads((FIRST / "prompts.json").read_text())
CASES = json.loads((FIRST / "cases.json").read_text())
OFFICIAL_CASES = json.loads((OFFICIAL / "configs.json").read_text())["sampling"]


@cache
def arrays(file: str) -> dict[str, np.ndarray]:
    """The arrays of a file: "mlp_parts", "official/model"."""
    with np.load(FIRST / f"{file}.npz") as z:
        return {k: z[k] for k in z.files}


@cache
def tolerance(file: str, name: str) -> float:
    """Largest error of an array."""
    if file.startswith("official/"):
        told = json.loads((OFFICIAL / "tolerances.json").read_text())
        return float(told[file.removeprefix("official/")][name][2])
    told = json.loads((FIRST / "tolerances.json").read_text())
    return float(told[file.split("_")[0]][name][2])


def close(file: str, name: str, got: Any) -> None:
    """Assert that `got` equals a golden array within its stated tolerance."""
    want = arrays(file)[name]
    got = np.asarray(got)
    assert got.size == want.size, f"{file} {name}: shape {got.shape}, want {want.shape}"
    error, most = float(np.abs(got.astype(np.float64).reshape(want.shape) - want).max()), tolerance(file, name)
    SHARES.setdefault("u1 official code" if file.startswith("official/") else "u1", []).append(error / most)
    assert error <= most, f"{file} {name}: off by {error:.2e}, tolerance {most:.2e}"


def checkpoint(place: str) -> Checkpoint:
    """A golden checkpoint: "mlp", "official/conv"."""
    return Checkpoint(FIRST / place / "model.safetensors.index.json")


@cache
def network(place: str, size: tuple[int, int], forced: bool = False) -> U1:
    """A golden network for pictures of (height, width)."""
    opened = checkpoint(place)
    opened.config = opened.config.at(*size)
    opened.config = opened.config.forced() if forced else opened.config
    model = load_model(opened)[0]
    mx.eval(model.parameters())
    return model


@cache
def prefixes(place: str) -> dict[str, Prefix]:
    """The prefixes of a golden network's two branches, from the ids that are stored."""
    name = place.removeprefix("official/")
    if place == name:
        ids = [arrays(f"{name}_parts")[f"in/{branch}_ids"] for branch in ("cond", "uncond")]
    else:
        ids = [arrays("official/model")[f"{name}/{branch}_ids"] for branch in ("cond", "uncond")]
    opened = checkpoint(place)
    shapes = text_shapes(opened.config.model)
    found = encode(
        opened.config.model,
        lambda key: opened.tensor("text/" + key, ("float32", "bfloat16"), shapes[key]),
        lambda rows: opened.file.entries["text/embed_tokens.weight"].rows(rows),
        [[int(i) for i in s] for s in ids],
    )
    return dict(zip(("cond", "uncond"), found, strict=True))


def condition(place: str, model: U1, branch: str = "cond", batch: int = 1) -> Any:
    return model.condition_of([prefixes(place)[branch]] * batch)


def given(place: str) -> Any:
    """`features` of a golden network whose prompts are ids: "" is the stored one, None the unconditional branch."""
    return lambda prompts: [prefixes(place)["uncond" if p is None else "cond"] for p in prompts]


def tokens(x: Any, side: int) -> np.ndarray:
    """Pictures (B, 3, H, W) packed as the reference packs its state: (B, L, 3 side^2), (row, column, channel)."""
    B, c, H, W = x.shape
    x = np.asarray(x).reshape(B, c, H // side, side, W // side, side)
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(B, -1, c * side**2)


def official_folder(folder: Path, name: str) -> str:
    """Put an official network into a folder with a tokenizer that makes its ids; returns the prompt that they are of.

    Its pieces are whole stretches of the markup and single letters of the prompt.
    """
    for file in (OFFICIAL / name).iterdir():
        (folder / file.name).symlink_to(file)
    a = arrays("official/model")
    cond, uncond = ([int(i) for i in a[f"{name}/{branch}_ids"]] for branch in ("cond", "uncond"))
    letters = "ABCDEFGHIJ"[: len(cond) - 1]
    end = rendered("", "").removeprefix(f"{START}user\n")
    pieces = [f"{START}user\n{letters[0]}", *letters[1:], end]
    empty = [f"{START}user\n{END}", f"\n{START}", "assistant", "\n", IMAGE]
    if len(uncond) == 4:
        empty[3:] = [f"\n{IMAGE}"]
    added = dict(zip([*pieces, *empty], [*cond, *uncond], strict=True))
    added |= {piece: 10**6 + i for i, piece in enumerate(MARKUP) if piece not in added}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "vocab.json").write_text(json.dumps({"a": 10**7}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return letters
