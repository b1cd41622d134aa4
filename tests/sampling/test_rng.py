"""Noise of PyTorch's generators, through commands and Python: which draw a picture's noise is, in any order."""

import numpy as np
import pytest

import mlx_sf
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import read_metadata
from mlx_sf.sampling.noise import Rng
from mlx_sf.sampling.request import Request, make_request
from mlx_sf.sampling.torch_random import CpuGenerator, cuda_randn, randn

SIZE = (8, 8)


def noise_of(rng, n=7, seed=5, numbers=None):
    request = make_request(None, [0], n, seed, SIZE, rng=rng)
    return np.array(request.initial_noise(SIZE, numbers))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_alone_each_image_is_the_draw_of_its_seed(device):
    got = noise_of(Rng(f"torch-{device}"))
    for i in range(7):
        np.testing.assert_array_equal(got[i], randn((1, 3, *SIZE), 5 + i, device)[0])


def test_a_batch_is_rows_of_draws_of_one_stream():
    g = CpuGenerator(5)
    draws = np.concatenate([g.randn((3, 3, *SIZE)) for _ in range(3)])
    np.testing.assert_array_equal(noise_of(Rng("torch-cpu", 3)), draws[:7])
    draws = np.concatenate([cuda_randn((3, 3, *SIZE), 5, 256, call) for call in range(3)])
    np.testing.assert_array_equal(noise_of(Rng("torch-cuda", 3, threads=256)), draws[:7])


@pytest.mark.parametrize("name", ["torch-cpu", "torch-cuda"])
def test_processes_of_the_published_script_take_turns(name):
    """Image k of 2 processes with batches of 2: process 0 has 0, 1, 4, 5, process 1 the others, from the next seed."""
    got = noise_of(Rng(name, 2, world=2))
    for process, mine in ((0, [0, 1, 4, 5]), (1, [2, 3, 6])):
        alone = noise_of(Rng(name, 2), len(mine), 5 + process)
        np.testing.assert_array_equal(got[mine], alone)


@pytest.mark.parametrize(
    "rng", [Rng(), Rng("torch-cpu", 4), Rng("torch-cuda", 4, threads=512), Rng("torch-cpu", 2, world=3)]
)
def test_any_images_in_any_order(rng):
    whole = noise_of(rng, 20)
    request = Request((0,) * 20, tuple(range(5, 25)), None, rng)
    for numbers in ([13, 2, 19], [0], [18, 17, 3, 4]):
        np.testing.assert_array_equal(np.array(request.initial_noise(SIZE, numbers)), whole[numbers])


@pytest.fixture(scope="module")
def demo():
    return mlx_sf.load()


def test_pictures_are_drawn_from_that_noise(demo, tmp_path, cli):
    """`--rng torch-cpu` gives what the same noise from a file gives, whatever the batch size; the PNG says so."""
    size = demo.config.model.size
    noise = np.concatenate([randn((1, 3, *size), 3 + i) for i in range(3)])
    np.save(tmp_path / "noise.npy", noise)
    common = ["sample", "--classes", "1,2,3", "--steps", 2]
    pytorch = ["--rng", "torch-cpu", "--seed", 3]
    for name, flags in {
        "file": ["--noise", tmp_path / "noise.npy"],
        "seeds": pytorch,
        "small": [*pytorch, "--batch-size", 2],
    }.items():
        status, _, err = cli(*common, *flags, "-o", tmp_path / f"{name}.npy")
        assert status == 0, err
    want = np.load(tmp_path / "file.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "seeds.npy"), want)
    np.testing.assert_allclose(np.load(tmp_path / "small.npy"), want, atol=1e-4)
    flags = ["--rng", "torch-cuda", "--rng-batch", 64, "--rng-threads", "h100", "--rng-world", 8]
    status, _, err = cli(*common, *flags, "-o", tmp_path / "pictures")
    assert status == 0, err
    settings = read_metadata(tmp_path / "pictures" / "00002.png")
    assert settings["rng"] == "torch-cuda, batch 64, world 8, threads h100, image 2 of the stream"
    assert settings["seed"] == 0


def test_python_takes_a_name_or_an_rng(demo):
    size = demo.config.model.size
    want = randn((2, 3, *size), 4)
    for given in ({"rng": Rng("torch-cpu", 2)}, {"rng": "torch-cpu", "rng_batch": 2}):
        pictures = demo.sample([1, 2], seed=4, steps=1, **given)
        from_array = demo.sample([1, 2], noise=want, steps=1)
        for a, b in zip(pictures, from_array, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    assert pictures[1].settings["rng"] == "torch-cpu, batch 2, image 1 of the stream"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rng-batch", 4], "--rng-batch is about PyTorch's noise: give --rng torch-cpu or torch-cuda"),
        (["--rng-threads", "a100"], "--rng-threads is about PyTorch's noise"),
        (["--rng", "torch-cpu", "--rng-threads", "a100"], "--rng-threads is about a GPU: leave it out"),
        (
            ["--rng", "torch-cuda", "--rng-threads", "v100"],
            "--rng-threads is 'v100', want one of a100, h100, h200, 4090",
        ),
        (["--rng", "torch-cuda", "--rng-threads", 1000], "--rng-threads is 1000, want one of"),
        (["--rng", "torch-cuda", "--rng-batch", 64], "--rng-threads is missing: a draw of 64 x 3 x "),
        (["--rng", "torch-cpu", "--rng-world", 8], "--rng-world is 8, want --rng-batch above 1"),
        (["--rng", "torch-cpu", "--noise", "x.npy"], "--noise holds the noise: leave out --rng"),
        (["--rng", "torch"], "'torch' is not one of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((1, 3, 64, 64), np.float32))
    refused(words, "sample", "--classes", "1", *flags)


def test_settings_are_given_once():
    with pytest.raises(MlxSfError, match="an Rng with settings of its own"):
        mlx_sf.load().sample(1, rng=Rng("torch-cpu"), rng_batch=2)
