"""`mlx-sf export`: one weight set, in fewer bits, drawing the same picture but for rounding."""

from pathlib import Path

from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint
from mlx_sf.checkpoints.load import load_model  # before mlx.core: mlx_sf chooses the BLAS

import mlx.core as mx  # isort: skip
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_sf.checkpoints.config import Config
from mlx_sf.commands.export import command
from mlx_sf.models.jit import JiT, JiTConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(JiTConfig(16, 8, 16, 2, 2, 8, 2, 1, num_classes=2), class_names=("a", "b"))
    weights = {k: w + 0.05 for k, w in tree_flatten(JiT(config.model).parameters())}
    folder = tmp_path_factory.mktemp("run")
    sets = {"model": weights, "ema1": {k: 1.1 * w for k, w in weights.items()}}
    save_checkpoint(folder / "checkpoint-00000003.safetensors", sets, config, {"optimizer/m/x": mx.zeros((3,))})
    return folder


@pytest.mark.parametrize("weights", ["model", "ema1"])
def test_export(run: Path, weights: str, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    result = CliRunner().invoke(command, [str(run), str(target), "--weights", weights, "--cfg", "2.5"])
    assert result.exit_code == 0, result.output
    small = Checkpoint(target)
    assert small.config.weights == (weights,)
    assert (small.config.class_names, small.config.sample.cfg) == (("a", "b"), 2.5)
    assert small.extra() == {}
    x, t, y = mx.random.normal((2, 3, 16, 16), key=mx.random.key(1)), mx.array([0.2, 0.7]), {"labels": mx.array([0, 1])}
    a, b = load_model(run, weights)[0](x, t, y), load_model(target)[0](x, t, y)
    assert mx.abs(a - b).max().item() < 5e-3 * mx.abs(a).max().item()
    assert target.stat().st_size < 0.4 * next(run.iterdir()).stat().st_size
