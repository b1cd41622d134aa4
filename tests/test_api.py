"""The Python API: the names of `mlx_sf`, imported when they are used, doing what the commands do."""

import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_sf
from mlx_sf import models
from mlx_sf.checkpoints.checkpoint import save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.formats.png import read_metadata
from tests.helpers import PARITY
from tests.models.toy import ToyConfig, ToyNetwork


def test_every_public_name_is_there_with_a_docstring():
    for name in mlx_sf.__all__:
        value = getattr(mlx_sf, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'draw'"):
        _ = mlx_sf.draw


def test_help_does_not_wait_for_mlx():
    """What takes the time is the interpreter: neither MLX nor NumPy is imported."""
    code = "import sys; from mlx_sf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('mlx.core' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False")
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import click"], check=True)
        bare, start = time.perf_counter() - start, time.perf_counter()
        subprocess.run([sys.executable, "-m", "mlx_sf.cli", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start - bare)
    assert best < 0.1


def test_the_demo_model_draws_pictures_with_their_settings_inside(tmp_path):
    demo = mlx_sf.load()
    pictures = demo.sample(["house", "fish"], seed=4, steps=3, cfg=2.0)
    assert [p.size for p in pictures] == [(64, 64)] * 2
    assert isinstance(pictures[0], Image.Image)
    assert pictures[0].settings["class_name"] == "house"
    assert (pictures[1].settings["seed"], pictures[1].settings["steps"]) == (5, 3)
    pictures[1].save(tmp_path / "fish.png")
    assert read_metadata(tmp_path / "fish.png")["class_name"] == "fish"
    again = demo.sample("fish", seed=5, steps=3, cfg=2.0)
    assert np.abs(np.asarray(again[0]).astype(int) - np.asarray(pictures[1]).astype(int)).max() <= 1


def test_states_can_be_watched():
    seen = list(mlx_sf.load().states(["fish"], steps=4, method="euler"))
    assert [s.step for s in seen] == [1, 2, 3, 4]
    assert seen[-1].t == 1
    assert mlx_sf.to_uint8(seen[-1].x).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.sample("unicorn"), "classes: 'unicorn' is no class of this model"),
        (lambda m: m.sample(3, steps=0), "steps is 0, want at least 1"),
        (lambda m: m.sample(3, strength=2), "no setting of sampling is called 'strength'"),
        (lambda m: m.sample([1, 2], num_images=1), "classes names 2 images, but only 1 are asked for"),
        (lambda m: mlx_sf.load("nowhere.npz"), "no such file"),
        (lambda m: mlx_sf.load(dtype="int8"), "dtype 'int8' is unknown"),
    ],
)
def test_refusals_name_python_names(call, words):
    with pytest.raises(mlx_sf.MlxSfError) as e:
        call(mlx_sf.load())
    assert words in str(e.value)
    assert "--" not in str(e.value)


def test_convert_and_quantise(tmp_path):
    report = mlx_sf.convert(PARITY / "forced.pth", tmp_path / "a.safetensors", in_context_start=1)
    assert report.config.model.depth == 4
    small = mlx_sf.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", quantize=8)
    assert small.config.quantization.bits == 8
    a, b = (mlx_sf.load(tmp_path / f"{n}.safetensors").sample(1, steps=2)[0] for n in "ab")
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() < 20
    with pytest.raises(mlx_sf.MlxSfError, match="is converted with quantize only"):
        mlx_sf.convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_the_operator_takes_rectangles():
    noisy = mx.random.normal((2, 3, 32, 48), key=mx.random.key(0))
    assert mlx_sf.SpectralForcing((32, 48))(noisy, mx.array([0.1, 0.9])).shape == noisy.shape


def test_a_network_of_ones_own_goes_through_checkpoint_and_pipeline(tmp_path, monkeypatch):
    """A second network is a file and a line: it is saved, loaded, drawn from by prompts, at its own rectangle."""
    monkeypatch.setitem(models.ARCHITECTURES, "toy", "tests.models.toy")
    config = Config(ToyConfig(height=8, width=24), name="toy")
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(ToyNetwork(config.model, mx.random.key(5)).parameters()))
    path = Path(tmp_path / "toy.safetensors")
    save_checkpoint(path, {"model": weights}, config)
    toy = mlx_sf.load(path)
    pictures = toy.sample(["a cat", "a longer sentence about a dog"], seed=1, steps=3, cfg=3.0)
    assert [p.size for p in pictures] == [(24, 8)] * 2
    assert pictures[0].settings["prompt"] == "a cat"
    with pytest.raises(mlx_sf.MlxSfError, match="draws from prompts"):
        toy.sample(3)
