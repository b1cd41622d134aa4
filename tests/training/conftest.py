"""A checkpoint of a tiny network, and a run from it."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sf.checkpoints.checkpoint import save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.models import build
from mlx_sf.models.jit import JiTConfig
from tests.training.runs import options, run


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint smaller than any size on offer, with random weights: for tests of the bookkeeping."""
    config = Config(JiTConfig(16, 8, 32, 2, 2, 16, 2, 1, num_classes=10))
    file = tmp_path_factory.mktemp("micro") / "micro.safetensors"
    save_checkpoint(file, {"model": dict(tree_flatten(build(config.model, mx.random.key(1)).parameters()))}, config)
    return file


@pytest.fixture(scope="session")
def whole(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run. Not to be written to."""
    return run(options(micro, tmp_path_factory.mktemp("whole"))).run
