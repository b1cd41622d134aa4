"""The scene detector: right on true pictures at every size, on worse ones, and silent where there is nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mlx_sf.data.captioned_scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    CaptionedSceneSource,
    Description,
    SceneObject,
    coverage,
    draw,
    half_box,
)
from mlx_sf.data.scenes import Canvas, SceneOptions
from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.geneval import Detection, judge
from mlx_sf.metrics.scene_detector import detect
from mlx_sf.metrics.scene_prompts import prompts


def share_right(size: int, split: str, per_category: int, blur: float = 0, noise: float = 0) -> float:
    """Share of pictures right on their own prompt, and of another's prompt judged as the true objects are."""
    source, asked = CaptionedSceneSource((size, size), seed=11, split=split), prompts(split, per_category, 11)
    rng, turns, right = np.random.default_rng(0), len(asked) // per_category, []
    for i, m in enumerate(asked):
        picture, true = source.draw(i)
        worse = ndimage.gaussian_filter(picture.astype(float), (blur, blur, 0)) + rng.normal(0, noise, picture.shape)
        found, truth = detect(np.clip(np.round(worse), 0, 255).astype(np.uint8)), [
            Detection(t.shape, t.box, 1.0, t.colour) for t in true
        ]  # fmt: skip
        other = asked[(i + turns) % len(asked)]
        right += [judge(m, found).correct, judge(other, found).correct == judge(other, truth).correct]
    return float(np.mean(right))


@pytest.mark.parametrize("size, split", [(32, "seen"), (48, "unseen"), (64, "seen"), (96, "unseen"), (128, "seen")])
def test_true_pictures_are_right_at_every_size(size: int, split: str) -> None:
    assert share_right(size, split, 12 if size < 96 else 6) >= 0.99


def test_worse_pictures() -> None:
    assert share_right(64, "seen", 6, blur=1) >= 0.98
    assert share_right(64, "seen", 6, noise=10) >= 0.98
    assert share_right(64, "seen", 6, blur=2) >= 0.9
    assert share_right(64, "seen", 6, noise=20) >= 0.9


@pytest.mark.parametrize("size", [32, 64])
def test_every_shape_in_every_colour(size: int) -> None:
    for i, shape in enumerate(SHAPES):
        for colour in list(COLOURS)[i % 2 :: 2]:
            background = "mist" if colour not in ("white", "pink", "yellow") else "night"
            scene = Description((SceneObject(shape, colour),), "", background, "colors")
            picture, (true,) = draw(scene, size, i)
            (found,) = detect(picture)
            assert (found.name, found.colour) == (shape, colour)
            assert found.score > 0.9
            assert np.abs(np.subtract(found.box, true.box)).max() < 1


def test_rectangles_and_large_pictures() -> None:
    scene = Description((SceneObject("star", "red"), SceneObject("moon", "blue")), "left of", "mist", "color_attr")
    for size in ((48, 96), (120, 40), 300):
        picture, true = draw(scene, size, 3)
        found = sorted(detect(picture), key=lambda d: d.name, reverse=True)
        assert [(d.name, d.colour) for d in found] == [("star", "red"), ("moon", "blue")]
        for d, t in zip(found, true, strict=True):
            assert np.abs(np.subtract(d.box, t.box)).max() < 0.02 * min(picture.shape[:2]) + 1


def test_objects_of_two_colours_may_touch() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        canvas, shapes = Canvas(64), rng.choice(SHAPES, 2, replace=False)
        colours = rng.choice(["red", "blue", "green", "purple", "black"], 2, replace=False)
        canvas.backdrop(*np.array(BACKGROUNDS["mist"], np.float32))
        for side, shape, colour in zip((-1, 1), shapes, colours, strict=True):
            filled = coverage(shape, canvas, side * (half_box(shape)[0] * 0.36), 0, 0.36)
            canvas.rgb += filled * (np.array(COLOURS[colour], np.float32)[:, None, None] - canvas.rgb)
        found = sorted(detect(canvas.picture(rng, SceneOptions())), key=lambda d: d.box[0])
        assert [(d.name, d.colour) for d in found] == list(zip(shapes, colours, strict=True))


def test_noise_is_no_scene() -> None:
    rng, asked, yes = np.random.default_rng(2), prompts("seen", 5), 0
    for blur in (0, 1, 2, 4, 8):
        for _ in range(2):
            field = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (blur, blur, 0))
            found = detect(np.clip(128 + 50 * field / field.std(), 0, 255).astype(np.uint8))
            assert blur > 1 or not found
            yes += sum(judge(m, found).correct for m in asked)
    assert yes <= 0.03 * 10 * len(asked)
    assert detect(np.full((40, 50, 3), 200, np.uint8)) == []


@settings(max_examples=15, deadline=None)
@given(st.integers(32, 70), st.integers(32, 70), st.integers(0, 2**32), st.sampled_from([1, 2, 5, 255]))
def test_any_picture_is_answered(height: int, width: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random((height, width, 3)), (rng.integers(0, 4), rng.integers(0, 4), 0))
    picture = (np.round(field * levels) * (255 // levels)).astype(np.uint8)
    for d in detect(picture):
        assert 0 < d.score <= 1
        assert d.name in SHAPES
        assert d.colour in COLOURS
        assert np.isfinite(d.box).all()


def test_what_is_no_picture() -> None:
    with pytest.raises(MlxSfError, match=r"got 31 x 40 pixels, want sides of 32 or more"):
        detect(np.zeros((40, 31, 3), np.uint8))
    for wrong in (np.zeros((40, 40), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3))):
        with pytest.raises(MlxSfError, match=r"want \(H, W, 3\) uint8"):
            detect(wrong)
