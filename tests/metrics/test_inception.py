"""The FID Inception equals the reference's float64 run within the stated float32 tolerances, tap by tap."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.inception import SIDE, TAPS, Inception, avg_pool, conv2d, conv2d_patches, preprocess, resize_table
from mlx_sf.metrics.inception_weights import CONVS, content_sha256, inception_shapes
from tests.metrics.fid_recipe import SEED, golden, golden_json, recipe_network, recipe_weights

TOLERANCE = golden_json("expected.json")["tolerances"]


def test_recipe_and_key_table_are_the_references() -> None:
    recipe = golden_json("weights_recipe.json")
    assert {k: tuple(s) for k, s in recipe["keys"]} == inception_shapes()
    assert recipe["seed"] == SEED
    weights = recipe_weights()
    assert sum(w.size for w in weights.values()) == recipe["n_values"]
    for check in recipe["check"]:
        assert hashlib.sha256(weights[check["key"]].tobytes()).hexdigest() == check["sha256"]
    assert content_sha256(weights) == recipe["sha256_of_all"]


@pytest.mark.parametrize("n", [32, 48, 256, 300, 400, 512, 1024])
def test_resize_tables_are_bit_exact(n: int) -> None:
    lo, hi, t = resize_table(n)
    assert np.array_equal(lo, golden("numerics.npz")[f"resize.table.{n}.lo"])
    assert np.array_equal(t, golden("numerics.npz")[f"resize.table.{n}.frac"])
    assert t.dtype == np.float32
    assert np.array_equal(hi, np.minimum(lo + 1, n - 1))


@pytest.mark.parametrize(
    "size", ["1x1", "2x3", "32x32", "64x48", "256x256", "299x299", "300x299", "320x400", "512x512", "1024x768"]
)
def test_resize_and_normalisation(size: str) -> None:
    h, w = map(int, size.split("x"))
    y, x, c = np.ogrid[:h, :w, :3]
    pattern = ((31 * y + 17 * x + 101 * c + (x * y) % 251 + 31415) % 256).astype(np.uint8)
    index = golden("numerics.npz")["resize.sample_index"]
    got = np.array(preprocess(pattern[None]))[0]
    assert got.shape == (SIDE, SIDE, 3)
    want = golden("numerics.npz")[f"resize.{size}"]
    assert np.abs(got[np.ix_(index, index)] - want).max() <= TOLERANCE["numerics"]["resize_max_abs"]


@pytest.mark.parametrize("images", ["img64", "img256", "img299", "img320x400"])
def test_features_of_every_tap(images: str) -> None:
    got = recipe_network().features(golden("inputs.npz")[images], list(TAPS))
    for tap, dims in TAPS.items():
        want = golden("features.npz")[f"{images}.{tap}"]
        assert got[tap].shape == (len(want), dims)
        assert got[tap].dtype == np.float32
        limit = TOLERANCE["logits" if "logits" in tap else f"tap_{tap}"]
        error = np.linalg.norm(got[tap] - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() <= limit["rel_l2_per_image"], tap
        assert np.abs(got[tap] - want).max() <= limit.get("max_abs", np.inf), tap


def test_every_stage() -> None:
    stages = golden_json("stages.json")["stages"]
    x = preprocess(golden("inputs.npz")["img64"][:2])
    seen = {"input_299": x}
    seen |= {name: out for name, out in recipe_network().stages(x) if name != "AvgPool"}
    assert set(stages) - {"AvgPool"} == set(seen)
    for name, out in seen.items():
        want, got = stages[name], np.array(out)
        B, H, W, C = got.shape
        assert want["shape"] == [B, C, H, W]
        assert np.allclose(got.mean(axis=(1, 2, 3)), want["mean"], atol=2e-6), name
        assert np.allclose(got.std(axis=(1, 2, 3)), want["std"], atol=2e-6), name
        n = min(6, C)
        assert np.allclose(got[:, 0, 0, :n], want["corner_c0to5"], atol=1e-4), name
        assert np.allclose(got[:, H // 2, W // 2, :n], want["centre_c0to5"], atol=1e-4), name
        assert np.allclose(got[:, -1, -1, -1], want["last_channel_corner_end"], atol=1e-4), name


def test_batching_and_lanes_change_rounding_only() -> None:
    images = golden("inputs.npz")["setA"][:5]
    alone = Inception(recipe_weights(), count=1)
    one = np.concatenate([alone.features(images[i : i + 1], ["192"])["192"] for i in range(5)])
    together = recipe_network().features(images, ["192"])["192"]
    assert np.abs(one - together).max() < 1e-5


@pytest.mark.parametrize(
    "geometry", sorted({(c.kernel, c.stride, c.pad) for c in CONVS.values() if c.kernel != (1, 1)})
)
@pytest.mark.parametrize("channels", [5, 64])
def test_gpu_and_cpu_convolutions_agree(geometry: tuple, channels: int) -> None:
    kernel, stride, pad = geometry
    x = mx.random.normal((2, 13, 12, channels), key=mx.random.key(0))
    w = mx.random.normal((7, *kernel, channels), key=mx.random.key(1))
    a, b = conv2d(x, w, stride, pad), conv2d_patches(x, w.reshape(7, -1).T, kernel, stride, pad)
    assert a.shape == b.shape
    assert mx.abs(a - b).max().item() < 1e-4


def test_average_pool_does_not_count_padding() -> None:
    got = avg_pool(mx.ones((1, 3, 4, 2)))
    assert mx.allclose(got, mx.ones_like(got)).item()


@pytest.mark.slow
def test_network_with_mlx_convolutions() -> None:
    """The way of a GPU: some 8 s an image on a CPU."""
    network = Inception(recipe_weights(), patches=False)
    got = network.features(golden("inputs.npz")["img64"][:1])["2048"]
    want = golden("features.npz")["img64.2048"][:1]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-5


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_what_is_no_picture_is_refused(images: np.ndarray) -> None:
    with pytest.raises(MlxSfError, match="want uint8 \\(B, H, W, 3\\)"):
        recipe_network().features(images)


def test_unknown_features_are_refused() -> None:
    with pytest.raises(MlxSfError, match="no features called '1024', want one of 64, 192"):
        recipe_network().features(np.zeros((1, 8, 8, 3), np.uint8), ["1024"])
