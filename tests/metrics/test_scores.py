"""Inception Score, KID and precision/recall equal the reference's, draws and splits included."""

import numpy as np
import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.scores import (
    InceptionScore,
    Kernel,
    MeanStd,
    inception_score,
    kernel_distance,
    precision_recall,
    squared_distances,
)
from tests.metrics.fid_recipe import golden, golden_json

N = golden_json("expected.json")["numerics"]
STORED = golden_json("expected.json")["from_stored_features"]


def near(got: MeanStd, want: dict, **tolerance: float) -> bool:
    return got.mean == pytest.approx(want["mean"], **tolerance) and got.std == pytest.approx(want["std"], **tolerance)


@pytest.mark.parametrize(
    "name, splits, shuffle, seed",
    [
        ("splits10_shuffled_seed2020", 10, True, 2020),
        ("splits10_in_order", 10, False, 2020),
        ("splits1", 1, True, 2020),
        ("splits3_shuffled_seed7", 3, True, 7),
    ],
)
def test_inception_score(name: str, splits: int, shuffle: bool, seed: int) -> None:
    got = inception_score(golden("numerics.npz")["logits"], splits, shuffle, seed)
    assert near(got, N[f"inception_score.{name}"], rel=1e-9, abs=1e-12)


def test_inception_score_of_stored_logits() -> None:
    got = inception_score(golden("features.npz")["setA.logits_unbiased"])
    assert near(got, STORED["inception_score.setA.splits10_shuffled"], rel=1e-9)


def test_inception_score_streams_in_any_order_and_resumes() -> None:
    logits = golden("numerics.npz")["logits"]
    parts = [InceptionScore(257, 100) for _ in range(2)]
    parts[1].add(logits[200:], 200)
    parts[0].add(logits[:50], 0)
    again = InceptionScore(257, 100)
    again.restore(parts[0].state())
    again.add(logits[50:200], 50)
    with pytest.raises(MlxSfError, match="saw 200 of 257 pictures"):
        again.finish()
    again.merge(parts[1])
    assert near(again.finish(), N["inception_score.splits10_shuffled_seed2020"], rel=1e-9)


def test_inception_score_of_certain_predictions_is_finite() -> None:
    logits = np.full((20, 4), -1e4)
    logits[np.arange(20), np.arange(20) % 4] = 1e4
    assert inception_score(logits, splits=1).mean == pytest.approx(4.0)


KERNELS = {
    "poly3_subsets100_size100": (100, 100, Kernel(), 2020),
    "poly3_subsets10_size190": (10, 190, Kernel(), 2020),
    "poly2_gamma0.05_coef0.5_subsets30_size64_seed9": (30, 64, Kernel("poly", 2, 0.05, 0.5), 9),
    "rbf_sigma10_subsets30_size64": (30, 64, Kernel("rbf", sigma=10.0), 2020),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kid(name: str) -> None:
    subsets, size, kernel, seed = KERNELS[name]
    z = golden("numerics.npz")
    got = kernel_distance(z["kid.f1"], z["kid.f2"], subsets, size, kernel, seed)
    assert near(got, N[f"kid.{name}"], abs=1e-9)


@pytest.mark.parametrize("subsets, size", [pytest.param(100, 50, marks=pytest.mark.slow), (20, 64)])
def test_kid_of_stored_features(subsets: int, size: int) -> None:
    z = golden("features.npz")
    got = kernel_distance(z["setA.2048"], z["setB.2048"], subsets, size)
    assert near(got, STORED[f"kid.setA.setB.subsets{subsets}.size{size}"], abs=1e-9)


def test_random_streams_are_the_references() -> None:
    z = golden("numerics.npz")
    assert np.array_equal(np.random.RandomState(2020).permutation(257), z["rng.permutation257_seed2020"])
    rng = np.random.RandomState(2020)
    draws = [rng.choice(n, 100, replace=False) for n in (230, 190)]
    assert np.array_equal(draws, z["rng.kid_choice_230_100_then_190_100_seed2020_first"])


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [37, 2048])
def test_precision_recall(k: int, block: int) -> None:
    z, want = golden("numerics.npz"), N[f"precision_recall.k{k}"]
    got = precision_recall(z["kid.f1"], z["kid.f2"], k, block)  # samples f1, data f2
    assert got.precision == want["fraction_of_f1_inside_f2"]
    assert got.recall == want["fraction_of_f2_inside_f1"]
    z, want = golden("features.npz"), STORED[f"precision_recall.k{k}"]
    got = precision_recall(z["setA.2048"], z["setB.2048"], k, block)
    assert got.precision == want["fraction_of_A_inside_B"]
    assert got.recall == want["fraction_of_B_inside_A"]


def test_identical_sets_have_full_precision_and_recall() -> None:
    x = np.repeat(np.random.default_rng(0).standard_normal((30, 200)).astype(np.float32), 3, axis=0)
    assert (squared_distances(*[x.astype(np.float64)] * 2)[0, :3] == 0).all()
    got = precision_recall(x, x, k=2)
    assert (got.precision, got.recall, got.f_score) == (1.0, 1.0, 1.0)


def test_sets_that_are_too_small_are_refused() -> None:
    x = np.zeros((20, 4), np.float32)
    with pytest.raises(MlxSfError, match="subsets of 1000 from sets of 20 and 20 pictures"):
        kernel_distance(x, x)
    with pytest.raises(MlxSfError, match="neighbour 20 in sets of 20 and 20"):
        precision_recall(x, x, k=20)
    with pytest.raises(MlxSfError, match="9 pictures for 10 splits"):
        inception_score(x[:9])
