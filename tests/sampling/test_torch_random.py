"""PyTorch's random streams, equal to golden numbers: to the bit for a CPU generator, to 2e-6 for CUDA's."""

import hashlib
import json
import math

import numpy as np
import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.sampling.torch_random import CpuGenerator, cuda_randn, philox, randn
from tests.helpers import GOLDEN

ARRAYS = dict(np.load(GOLDEN / "rng" / "golden.npz"))
WHOLE = json.loads((GOLDEN / "rng" / "golden.json").read_text())["arrays"]


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def check(name: str, got: np.ndarray) -> None:
    """The whole array by its checksum, and element by element where the golden file holds it."""
    want = WHOLE[name]
    assert list(got.shape) == want["shape"], name
    assert str(got.dtype) == want["dtype"], name
    if name in ARRAYS:
        np.testing.assert_array_equal(got, ARRAYS[name], err_msg=name)
    assert hashlib.sha256(np.ascontiguousarray(got).tobytes()).hexdigest() == want["sha256"], name


def cases(kind: str) -> list[str]:
    found = [n for n in WHOLE if n.split("/")[0] == kind]
    assert found
    return found


@pytest.mark.parametrize("kind", ["randn", "rand", "batch"])
def test_cpu_draws_equal_torch_to_the_bit(kind):
    for name in cases(kind):
        _, seed, what = name.split("/")
        check(name, CpuGenerator(int(seed)).rand(int(what)) if kind == "rand" else randn(shape_of(what), int(seed)))


def test_words_of_the_twister():
    for name in cases("u32"):
        check(name, CpuGenerator(int(name.split("/")[1])).words(16).astype(np.uint32))


def test_draws_on_one_generator_keep_the_second_of_a_pair():
    names = cases("sequence")
    for seed in {n.split("/")[1] for n in names}:
        g = CpuGenerator(int(seed))
        mine = [n for n in names if n.split("/")[1] == seed]
        for name in sorted(mine, key=lambda n: int(n.split("/")[2].split("_")[0])):
            check(name, g.randn(shape_of(name.split("_")[-1])))


def test_skipping_a_draw_is_drawing_it():
    for count in (5, 16, 40):
        drawn, skipped = CpuGenerator(3), CpuGenerator(3)
        drawn.randn((count,))
        skipped.skip(count)
        np.testing.assert_array_equal(drawn.randn((20,)), skipped.randn((20,)))


def test_philox_words_are_exact():
    names = [n for n in ARRAYS if n.startswith("philox_u32/")]
    assert len(names) == 4
    for name in names:
        _, seed, what = name.split("/")
        counter = np.zeros((8, 4), np.uint32)
        counter[:, 0] = int(what.removeprefix("subsequence0to7_offset")) // 4
        counter[:, 2] = np.arange(8)
        np.testing.assert_array_equal(philox(counter, int(seed)), ARRAYS[name], err_msg=name)


@pytest.mark.slow
def test_cuda_draws_equal_the_published_layout():
    names = [n for n in ARRAYS if n.startswith("philox_randn/") and n.endswith("/head")]
    assert len(names) == 18
    for name in names:
        _, seed, gpu, shape, _ = name.split("/")
        threads = math.prod(map(int, gpu.split("x")))
        base = name.removesuffix("head")
        flat = cuda_randn(shape_of(shape), int(seed), threads).reshape(-1)
        again = cuda_randn(shape_of(shape), int(seed), threads, call=1, part=slice(0, 1)).reshape(-1)
        parts = {"head": flat[:16], "tail": flat[-16:], "every_49999th": flat[::49999], "second_call_head": again[:16]}
        for part, got in parts.items():
            np.testing.assert_allclose(got, ARRAYS[base + part], atol=2e-6, err_msg=base + part)


def test_rows_of_a_cuda_draw_are_drawn_alone():
    whole = cuda_randn((5, 3, 8, 8), 9, threads=256, call=2)
    np.testing.assert_array_equal(cuda_randn((5, 3, 8, 8), 9, 256, 2, slice(3, 5)), whole[3:])


def test_printed_numbers_of_real_gpus():
    np.testing.assert_allclose(
        randn((8,), 0, "cuda"), [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284], atol=6e-5
    )
    np.testing.assert_allclose(
        randn((8,), 42, "cuda"), [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175], atol=6e-5
    )


def test_one_image_is_the_same_on_every_gpu():
    shape = (1, 3, 64, 64)
    np.testing.assert_array_equal(randn(shape, 3, "cuda", 108 * 2048), randn(shape, 3, "cuda", 132 * 2048))


def test_wrong_requests_are_refused():
    with pytest.raises(MlxSfError, match="device is 'mps', want cpu or cuda"):
        randn((3,), 0, "mps")
    with pytest.raises(MlxSfError, match="want a multiple of 256"):
        randn((3,), 0, "cuda", 1000)
