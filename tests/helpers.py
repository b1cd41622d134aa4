"""Golden data and helpers shared by the tests."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.checkpoints.config import Config
from mlx_sf.flow import FlowConfig
from mlx_sf.models.jit import JiTConfig
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig
from mlx_sf.spectral import ForcingConfig

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
PARITY = GOLDEN / "parity"
MODELS = ("forced", "vanilla", "hybrid", "noctx", "head64")

SHARES: dict[str, list[float]] = {}  # group -> errors as shares of their tolerances


def group_of(file: str, name: str) -> str:
    what = {"forward": "outputs and velocities", "loss": "losses and states", "train": "trajectories"}.get(file, "")
    what = "gradients" if "/grad/" in name else "states" if file == "sample" else what
    return f"{file}.npz {what}".strip()


class Golden:
    """The arrays, settings and tolerances of tests/golden/parity."""

    def __init__(self) -> None:
        self.configs = json.loads((PARITY / "configs.json").read_text())
        self.tolerances = json.loads((PARITY / "tolerances.json").read_text())
        self.manifest = json.loads((PARITY / "key_manifest.json").read_text())

    @cache  # noqa: B019  lives as long as the session
    def arrays(self, file: str) -> dict[str, np.ndarray]:
        with np.load(PARITY / f"{file}.npz") as z:
            return {k: z[k] for k in z.files}

    def close(self, file: str, name: str, got: Any) -> None:
        """Assert that `got` equals a golden array within its stated tolerance."""
        want = self.arrays(file)[name]
        got = np.asarray(got)
        got = got.reshape(1) if got.ndim == 0 else got  # scalars are stored as arrays of one element
        assert got.shape == want.shape, f"{file}/{name}: shape {got.shape}, want {want.shape}"
        if want.dtype.kind in "bui":
            np.testing.assert_array_equal(got, want)
            return
        tolerance = self.tolerances[f"{file}.npz"][name][2]
        error = float(np.abs(got.astype(np.float64) - want).max())
        SHARES.setdefault(group_of(file, name), []).append(error / tolerance)
        assert error <= tolerance, f"{file}/{name}: off by {error:.2e}, tolerance {tolerance:.2e}"


def changed(config: Config, **changes: Any) -> Config:
    """A configuration with fields of its parts changed; fields that two parts share (t_eps) mean the flow's."""
    own: dict[str, Any] = {}
    forcing: dict[str, Any] = {}
    config = replace(config, **{n: changes.pop(n) for n in list(changes) if n in {f.name for f in fields(Config)}})
    for name, value in changes.items():
        if name in {f.name for f in fields(ForcingConfig)}:
            forcing[name] = value
            continue
        part = next(
            p
            for p, kind in (("model", JiTConfig), ("flow", FlowConfig), ("sample", SampleConfig))
            if name in {f.name for f in fields(kind)}
        )
        own.setdefault(part, {})[name] = value
    if "pred_param" in own.get("flow", {}):
        own.setdefault("model", {})["out_channels"] = 6 if own["flow"]["pred_param"] == "hybrid" else 3
    if forcing and config.model.forcing is not None:
        own.setdefault("model", {})["forcing"] = replace(config.model.forcing, **forcing)
    return replace(config, **{part: replace(getattr(config, part), **values) for part, values in own.items()})


def classes(network: Any, labels: Any) -> Any:
    """The condition of a batch of labels; one that equals the number of classes is no class."""
    return network.condition([int(y) for y in np.array(labels)])


def sample_states(network: Any, config: Config, noise: Any, labels: Any, compile: bool = False) -> Any:
    """States of one batch by a configuration; a label equal to the number of classes is no class."""
    asked = [int(y) for y in np.array(labels)]
    return Sampler(network, config.flow, config.sample, compile).states(noise, asked)


def run_cli(
    *arguments: Any, cwd: Path | None = None, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`mlx-sf ARGUMENTS` in a process of its own, with `env` over this one's environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-m", "mlx_sf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)
