"""The built-in scenes: deterministic, balanced, the same at any size, with the spectrum that was asked for."""

import numpy as np
import pytest

from mlx_sf.data.scenes import SCENE_CLASSES, SceneOptions, power_law_field, scene
from mlx_sf.errors import MlxSfError

PLAIN = SceneOptions(background=0, detail=0)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    image, label = scene(7, 32, seed=3)
    scene(8, 64)
    again, _ = scene(7, 32, seed=3)
    assert np.array_equal(image, again)
    assert label == 7
    assert image.dtype == np.uint8
    assert image.shape == (32, 32, 3)
    assert not np.array_equal(image, scene(7, 32, seed=4)[0])
    assert not np.array_equal(image, scene(17, 32, seed=3)[0])


def test_classes_take_turns_and_look_different() -> None:
    n = len(SCENE_CLASSES)
    assert [scene(i, 16)[1] for i in range(2 * n)] == list(range(n)) * 2
    means = np.stack([np.mean([scene(c + n * k, 32)[0] for k in range(6)], axis=0) for c in range(n)])
    hits = sum(
        int(np.argmin([np.abs(scene(i, 32)[0] - m).mean() for m in means]) == scene(i, 32)[1]) for i in range(100, 200)
    )
    assert hits >= 95  # even the nearest class mean tells them apart


@pytest.mark.parametrize("index", range(len(SCENE_CLASSES)))
def test_the_same_scene_at_another_size(index: int) -> None:
    small = scene(index, 32, options=PLAIN)[0].astype(float)
    large = scene(index, 128, options=PLAIN)[0].astype(float).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 4  # of 255: antialiasing


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, 3.0])
def test_background_has_the_slope_that_was_asked_for(alpha: float) -> None:
    rng = np.random.default_rng(0)
    fields = [power_law_field(64, alpha, rng) for _ in range(64)]
    assert abs(np.var(fields) - 1) < 0.25
    power = np.mean([np.abs(np.fft.fft2(f)) ** 2 for f in fields], axis=0)
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :]) * 64
    inside = (f >= 2) & (f <= 30)
    slope = np.polyfit(np.log(f[inside]), np.log(power[inside]), 1)[0]
    assert abs(slope + alpha) < 0.1


def test_detail_puts_energy_at_its_period_and_nowhere_else() -> None:
    plain = scene(4, 64, options=PLAIN)[0].astype(float).mean(axis=2)
    fine = scene(4, 64, options=SceneOptions(background=0, detail=0.1, detail_period=4))[0].astype(float).mean(axis=2)
    power = np.abs(np.fft.fft2(fine - plain)) ** 2
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :])
    near = np.abs(f - 0.25) < 0.06
    assert power[near].sum() > 0.6 * power.sum()


def test_refusals() -> None:
    with pytest.raises(MlxSfError, match="got size 2"):
        scene(0, 2)
    with pytest.raises(MlxSfError, match="alpha is -1"):
        SceneOptions(alpha=-1)
