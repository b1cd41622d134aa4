"""Fixtures shared by the tests."""

import os
from pathlib import Path
from typing import Any

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX starts: tolerances are for true float32 products

import pytest

import mlx_sf  # noqa: F401  the BLAS before mlx.core
from mlx_sf.bench.records import new_record, save
from mlx_sf.checkpoints.config import Config
from mlx_sf.checkpoints.convert.jit import convert
from mlx_sf.checkpoints.load import load_model
from mlx_sf.models.jit import JiT
from tests.helpers import MODELS, PARITY, SHARES, Golden, changed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near the golden numbers this run was: the figures of the parity page, which MLX_SF_PARITY_RECORD keeps."""
    if SHARES:
        terminalreporter.section("parity: largest error as a share of its tolerance")
    for group, shares in sorted(SHARES.items()):
        terminalreporter.write_line(f"{group:<36} {len(shares):4d} comparisons, at most {max(shares):6.1%}")
    if SHARES and (record := os.environ.get("MLX_SF_PARITY_RECORD")):
        groups = [{"group": g, "comparisons": len(s), "largest": max(s)} for g, s in sorted(SHARES.items())]
        command = "MLX_SF_PARITY_RECORD=FILE python -m pytest; mlx-sf bench parity FILE"
        save(Path(record), new_record("parity", command, "1", {"groups": groups}, "parity"))


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
            config = changed(config, **overrides)
            other = JiT(config.model)
            other.update(model.parameters())
            model = other
        return model, config

    return load_golden


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
