"""Golden data and helpers shared by the tests."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX starts: tolerances are for true float32 products

import numpy as np
import pytest

import mlx_sf  # noqa: F401  the BLAS before mlx.core
from mlx_sf.checkpoint import load_model
from mlx_sf.config import Config
from mlx_sf.convert import convert
from mlx_sf.model import JiT

PARITY = Path(__file__).parent / "golden" / "parity"
MODELS = ("forced", "vanilla", "hybrid", "noctx", "head64")


SHARES: dict[str, list[float]] = {}  # group -> errors as shares of their tolerances


def group_of(file: str, name: str) -> str:
    what = {"forward": "outputs and velocities", "loss": "losses and states", "train": "trajectories"}.get(file, "")
    what = "gradients" if "/grad/" in name else "states" if file == "sample" else what
    return f"{file}.npz {what}".strip()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near the golden numbers this run was: the figures of the README's parity table."""
    if SHARES:
        terminalreporter.section("parity: largest error as a share of its tolerance")
    for group, shares in sorted(SHARES.items()):
        terminalreporter.write_line(f"{group:<36} {len(shares):4d} comparisons, at most {max(shares):6.1%}")


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


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every golden .pth converted, all weight sets in one file: NAME.npz."""
    folder = tmp_path_factory.mktemp("converted")
    for name in MODELS:
        bare = name == "head64"
        sets = None if bare else ["model", "ema1", "ema2"]
        flags = {"noise_scale": 1.0} if bare else {} if name in ("noctx",) else {"in_context_start": 1}
        convert(PARITY / f"{name}.pth", folder / f"{name}.npz", sets, flags=flags)
    return folder


@pytest.fixture(scope="session")
def load(converted: Path, golden: Golden):
    """load(model, weights, overrides) -> (network, config), through the converted file."""

    def load_golden(name: str, weights: str = "model", overrides: dict[str, Any] | None = None) -> tuple[JiT, Config]:
        model, config = load_model(converted / f"{name}.npz", weights)
        if overrides:
            config = config.replace(**overrides)
            changed = JiT(config.model)
            changed.update(model.parameters())
            model = changed
        return model, config

    return load_golden


def run_cli(*arguments: Any, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`mlx-sf ARGUMENTS` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "mlx_sf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    """cli(*arguments) -> (exit status, stdout, stderr) of `mlx-sf`, in this process."""
    from mlx_sf.cli import main

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(a) for a in arguments])
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def refused(cli):
    """refused("words", *arguments): `mlx-sf` fails with exactly one line of error that holds the words."""

    def check(words: str, *arguments: Any) -> str:
        status, _, err = cli(*arguments)
        assert status in (1, 2), f"status {status}, stderr {err!r}"
        lines = [line for line in err.strip().splitlines() if "error:" in line.lower()]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert words.lower() in lines[0].lower(), f"{words!r} not in {lines[0]!r}"
        return lines[0]

    return check
