"""Band powers and their distance: right on pictures whose spectrum is known."""

import numpy as np
import pytest

from mlx_sf.dct import dct_matrix, radial_frequency
from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.bands import BandPowers, spectral_distance
from mlx_sf.metrics.moments import Gaussian, gaussian_of


def noise(n: int, side: int, amplitude: float = 40.0, seed: int = 0) -> np.ndarray:
    x = 128 + amplitude * np.random.default_rng(seed).standard_normal((n, side, side, 3))
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def test_white_noise_has_its_variance_in_every_band() -> None:
    powers = np.exp(BandPowers(64, 64)(noise(30, 64))).mean(axis=0)
    assert powers == pytest.approx(np.full(16, (40 / 127.5) ** 2), rel=0.1)


def test_one_cosine_lies_in_its_band() -> None:
    side, k, l = 32, 9, 4
    a = dct_matrix(side)
    wave = np.outer(a[k], a[l])
    image = np.round(127.5 + 100 * wave / np.abs(wave).max()).astype(np.uint8)[..., None].repeat(3, 2)
    powers = BandPowers(side, side)
    band = np.searchsorted(powers.edges, radial_frequency(side)[k, l]) - 1
    got = powers(image[None])[0]
    assert got.argmax() == band
    assert got[band] - np.sort(got)[-2] > np.log(100)


def test_mean_brightness_is_no_frequency_and_flat_pictures_are_finite() -> None:
    flat = np.stack([np.full((16, 16, 3), v, np.uint8) for v in (0, 200)])
    got = BandPowers(16, 16)(flat)
    assert np.isfinite(got).all()
    assert np.allclose(got[0], got[1], atol=1e-3)


def test_distance_per_band_and_in_all() -> None:
    a = Gaussian(np.array([0.0, 1.0]), np.diag([1.0, 4.0]))
    b = Gaussian(np.array([0.0, 0.5]), np.diag([1.0, 1.0]))
    d = spectral_distance(a, b)
    assert [x.distance for x in d.bands] == pytest.approx([0.0, 0.25 + 1.0])
    assert d.total == pytest.approx(1.25)
    assert d.bands[1].decibels == pytest.approx(0.5 * 10 / np.log(10))
    assert (d.bands[0].low, d.bands[1].high) == (0.0, 1.0)


def test_shows_a_missing_high_band_and_nothing_for_equal_sets() -> None:
    powers = BandPowers(32, 32)
    sharp = noise(200, 32)
    f = dct_matrix(32)
    keep = radial_frequency(32) < 0.5
    z = np.moveaxis(sharp.astype(float) - 128, 3, 1)
    soft = np.moveaxis(f.T @ ((f @ z @ f.T) * keep) @ f, 1, 3)
    soft = np.clip(np.round(soft + 128), 0, 255).astype(np.uint8)
    g = [gaussian_of(powers(x)) for x in (sharp, noise(200, 32, seed=1), soft)]
    same, blurred = spectral_distance(g[1], g[0]), spectral_distance(g[2], g[0])
    assert same.total < 0.05
    assert all(abs(b.decibels) < 0.5 for b in same.bands)
    assert all(b.decibels < -20 for b in blurred.bands if b.low > 0.55)
    assert all(abs(b.decibels) < 0.5 for b in blurred.bands if b.high < 0.45)


@pytest.mark.parametrize("size", [(2, 2), (3, 40), (17, 16), (33, 64)])
def test_every_size_has_pictures_in_every_band(size: tuple[int, int]) -> None:
    got = BandPowers(*size)(np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8))
    assert np.isfinite(got).all()
    assert got.shape[1] == min(16, min(size) - 1)


def test_too_small() -> None:
    with pytest.raises(MlxSfError, match="want at least 2x2"):
        BandPowers(1, 5)
