"""Captioned scenes: drawn as described, true to their captions at every size and shape, held out what is held out."""

from collections import Counter
from itertools import combinations, islice, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sf.data.captioned_scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_COUNTS,
    HELD_OUT_RELATIONS,
    PHRASINGS,
    RELATIONS,
    SHAPES,
    SPLITS,
    UNSEEN_CATEGORIES,
    VOCABULARY,
    CaptionedSceneSource,
    Description,
    SceneObject,
    caption,
    describe,
    draw,
    held_out,
)
from mlx_sf.data.loader import Loader
from mlx_sf.data.scenes import SceneOptions
from mlx_sf.data.sources import DataOptions, open_source
from mlx_sf.errors import FieldError, MlxSfError

PLAIN = SceneOptions(background=0, detail=0)
MANY = {split: [describe(i, 5, split) for i in range(1500)] for split in SPLITS}


def combinations_of(d: Description) -> set[tuple[object, ...]]:
    found: set[tuple[object, ...]] = {(o.shape, o.colour) for o in d.objects} | {(o.shape, o.count) for o in d.objects}
    if d.relation:
        inverse = RELATIONS[RELATIONS.index(d.relation) ^ 1]
        found |= {(d.objects[0].shape, d.relation, d.objects[1].shape)}
        found |= {(d.objects[1].shape, inverse, d.objects[0].shape)}
    return found


HELD_OUT: set[tuple[object, ...]] = {*HELD_OUT_COLOURS, *HELD_OUT_COUNTS, *HELD_OUT_RELATIONS}


# ------------------------------------------------------------------------------------------------- descriptions


def test_training_never_shows_what_is_held_out_and_unseen_always() -> None:
    for split in ("train", "seen"):
        assert not any(combinations_of(d) & HELD_OUT for d in MANY[split])
        assert not any(held_out(d) for d in MANY[split])
    kinds = {"counting": "count", "colors": "colour", "position": "relation", "color_attr": "colour"}
    for d in MANY["unseen"]:
        assert combinations_of(d) & HELD_OUT
        assert held_out(d) == {kinds[d.category]}
    everything = {c for d in MANY["train"] for c in combinations_of(d)}
    assert {(s, c) for s, c in product(SHAPES, COLOURS)} - everything == HELD_OUT_COLOURS
    assert {(s, n) for s, n in product(SHAPES, (2, 3, 4))} - everything == HELD_OUT_COUNTS
    assert {c for d in MANY["unseen"] for c in combinations_of(d)} >= HELD_OUT


def test_what_is_held_out_is_spread_over_shapes() -> None:
    assert Counter(shape for shape, _ in HELD_OUT_COLOURS) == dict.fromkeys(SHAPES, 2)
    assert Counter(colour for _, colour in HELD_OUT_COLOURS) == dict.fromkeys(COLOURS, 2)
    assert Counter(shape for shape, _ in HELD_OUT_COUNTS) == dict.fromkeys(SHAPES, 1)
    assert set(Counter(r for _, r, _ in HELD_OUT_RELATIONS).values()) == {8}
    assert set(Counter(s for s, _, _ in HELD_OUT_RELATIONS)) == set(SHAPES)
    assert all(len(group) >= 8 for group in (SHAPES, COLOURS))


def test_categories_take_turns() -> None:
    for split, turns in (("train", CATEGORIES), ("seen", CATEGORIES), ("unseen", UNSEEN_CATEGORIES)):
        assert tuple(d.category for d in MANY[split][: 2 * len(turns)]) == turns * 2


def test_everything_occurs_about_equally() -> None:
    shapes = Counter(o.shape for d in MANY["train"] for o in d.objects)
    colours = Counter(o.colour for d in MANY["train"] for o in d.objects)
    relations = Counter(d.relation for d in MANY["train"] if d.relation)
    for counts, choices in ((shapes, SHAPES), (colours, COLOURS), (relations, RELATIONS)):
        assert set(counts) == set(choices)
        assert min(counts.values()) > 0.6 * max(counts.values())
    assert {d.background for d in MANY["train"]} == set(BACKGROUNDS)
    assert {o.count for d in MANY["train"] for o in d.objects} == {1, 2, 3, 4}


def test_descriptions_depend_on_index_seed_and_split_alone() -> None:
    assert [describe(i, 5, "seen") for i in range(20)] == MANY["seen"][:20]
    assert [describe(i, 6) for i in range(20)] != MANY["train"][:20]
    assert MANY["train"] != MANY["seen"]
    pair = (SceneObject("star", "yellow"), SceneObject("moon", "orange"))
    assert describe(10, 3) == Description(pair, "right of", "night", "position")  # of this version and every later one


def test_descriptions_that_cannot_be() -> None:
    star, ring = SceneObject("star", "red"), SceneObject("ring", "blue")
    with pytest.raises(FieldError, match="shape is 'cat', want one of 'circle', 'square'"):
        SceneObject("cat", "red")
    with pytest.raises(FieldError, match="count is 5, want one of 1, 2, 3, 4"):
        SceneObject("star", "red", 5)
    with pytest.raises(FieldError, match="want 1 of different shapes in category colors"):
        Description((star, ring), "left of", "mist", "colors")
    with pytest.raises(FieldError, match="want 2 of different shapes in category position"):
        Description((star, star), "left of", "mist", "position")
    with pytest.raises(FieldError, match="want counts of 1 in category two_object"):
        Description((SceneObject("star", "red", 2), ring), "left of", "mist", "two_object")
    with pytest.raises(FieldError, match="relation is '', want one of 'left of'"):
        Description((star, ring), "", "mist", "position")


# ------------------------------------------------------------------------------------------------------ captions


def test_captions_say_what_their_category_asks_for() -> None:
    star, ring = SceneObject("star", "orange"), SceneObject("ring", "blue")
    names = ("two_object", "position", "color_attr")
    pair = {name: Description((star, ring), "left of", "mist", name) for name in names}
    assert caption(Description((star,), "", "mist", "single_object")) == "a star"
    assert caption(Description((star,), "", "mist", "colors")) == "an orange star"
    assert caption(Description((star,), "", "mist", "colors"), 3) == "the star is orange"
    crosses = Description((SceneObject("cross", "red", 3),), "", "mist", "counting")
    assert caption(crosses, 2) == "there are three crosses"
    assert caption(pair["two_object"], 1) == "a picture of a star and a ring"
    assert [caption(pair["position"], i) for i in (0, 4)] == ["a star left of a ring", "a ring right of a star"]
    assert caption(pair["color_attr"], 3) == "the star is orange and the ring is blue"


def test_captions_are_short_and_of_a_closed_vocabulary() -> None:
    words = set()
    for d in (d for split in SPLITS for d in MANY[split][:300]):
        ways = PHRASINGS[d.category]
        said = [caption(d, i) for i in range(len(ways))]
        assert len(set(said)) == len(ways) >= 4
        assert max(len(s.split()) for s in said) <= 16
        assert all(s == s.lower() for s in said)
        words |= {word for s in said for word in s.split()}
    assert words == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(VOCABULARY)


# ------------------------------------------------------------------------------------------------------ pictures


def test_pictures_depend_on_index_seed_and_split_alone() -> None:
    source = CaptionedSceneSource((32, 32), seed=3)
    image, text = source.load(7)
    source.load(8)
    again, same = CaptionedSceneSource((32, 32), seed=3).load(7)
    assert np.array_equal(image, again)
    assert text == same
    assert (image.dtype, image.shape) == (np.uint8, (32, 32, 3))
    for other in (CaptionedSceneSource((32, 32), seed=4), CaptionedSceneSource((32, 32), seed=3, split="seen")):
        assert not np.array_equal(image, other.load(7)[0])


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (120, 40)])
@pytest.mark.parametrize("split", SPLITS)
def test_objects_are_whole_apart_large_and_in_their_relation(split: str, size: tuple[int, int]) -> None:
    source = CaptionedSceneSource(size, split=split, options=PLAIN)
    for i in range(60):
        d, (_, instances) = source.description(i), source.draw(i)
        described = [(o.shape, o.colour) for o in d.objects for _ in range(o.count)]
        assert [(x.shape, x.colour) for x in instances] == described
        boxes = np.array([x.box for x in instances])
        low, high = boxes[:, :2], boxes[:, 2:]
        assert (low > 1).all()
        assert (high < np.array(size)[::-1] - 1).all()
        assert ((high - low).max(1) >= 0.2 * min(size)).all()
        for a, b in combinations(range(len(boxes)), 2):
            assert (np.maximum(low[a], low[b]) - np.minimum(high[a], high[b])).max() >= 0.045 * min(size)
        if d.relation:
            x, y = (low[1] + high[1] - low[0] - high[0]) / 2  # from the first to the second
            along, across = (x, y) if d.relation in ("left of", "right of") else (y, x)
            along *= 1 if d.relation in ("left of", "above") else -1
            assert along >= 2 * abs(across) - 1e-9
            assert along > 0.2 * min(size)


def test_the_picture_shows_each_object_in_its_box() -> None:
    for d, seed in ((d, i) for split in SPLITS for i, d in enumerate(MANY[split][:60])):
        image, instances = draw(d, 96, seed, PLAIN)
        top, bottom = (np.array(c) for c in BACKGROUNDS[d.background])
        behind = top + (bottom - top) * ((np.arange(96) + 0.5) / 96)[:, None, None]
        shown = np.abs(image / 255 - behind).max(-1) > 0.1
        for x in instances:
            left, upper, right, lower = x.box
            inside = np.zeros_like(shown)
            inside[round(upper) - 2 : round(lower) + 2, round(left) - 2 : round(right) + 2] = True
            rows, columns = np.where(shown & inside)
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(found) - x.box).max() < 2  # tips of stars are thin
            colours = image[shown & inside] / 255
            near = np.abs(colours - np.array(COLOURS[x.colour])).max(-1) < 0.05
            assert near.mean() > 0.5
            shown &= ~inside
        assert not shown.any()


def test_the_same_layout_at_every_size() -> None:
    for i in range(12):
        d = MANY["train"][i]
        (small, near), (large, far) = draw(d, 32, i, PLAIN), draw(d, 128, i, PLAIN)
        assert np.allclose([x.box for x in near], np.array([x.box for x in far]) / 4)
        shrunk = large.astype(float).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - shrunk).mean() < 4  # of 255: antialiasing


def test_shapes_and_colours_are_told_apart_in_small_pictures() -> None:
    def cut(shape: str, colour: str, background: str, size: int) -> np.ndarray:
        one = Description((SceneObject(shape, colour),), "", background, "colors")
        image, (x,) = draw(one, size, 0, PLAIN)
        left, upper, right, lower = (round(v) for v in x.box)
        return image[upper:lower, left:right]

    fills = {c: np.median(cut("square", c, "slate", 24), axis=(0, 1)) for c in COLOURS}
    for a, b in combinations(COLOURS, 2):
        assert np.abs(fills[a] - fills[b]).max() > 64, (a, b)
    boxes = {s: Image.fromarray(cut(s, "white", "night", 256)).convert("L").resize((16, 16)) for s in SHAPES}
    silhouettes = {s: np.asarray(box, float) / 255 for s, box in boxes.items()}  # each stretched to the same box
    for a, b in combinations(SHAPES, 2):
        assert np.abs(silhouettes[a] - silhouettes[b]).mean() > 0.1, (a, b)


# -------------------------------------------------------------------------------------------- around the source


def test_the_source_is_opened_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captioned-scenes").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name changes nothing
    source = open_source("captioned-scenes", (16, 24))
    assert (source.class_names, source.endless, len(source)) == ((), True, 2560)
    assert (source.captions(), source.caption_notes()) == ((), [])
    assert len(DataOptions("captioned-scenes", epoch_size=12).open((16, 16))) == 12
    image, text = next(source.epoch(0, 0))()
    assert image.shape == (16, 24, 3)
    assert set(str(text).split()) <= set(VOCABULARY)
    prints = {DataOptions("captioned-scenes", split=s).open((16, 16)).fingerprint() for s in SPLITS}
    assert len(prints) == 3
    with pytest.raises(MlxSfError, match="split is 'test', want one of 'train', 'seen', 'unseen'"):
        open_source("captioned-scenes", 16, split="test")
    with pytest.raises(MlxSfError, match="cache: only"):
        open_source("captioned-scenes", 16, cache=str(tmp_path))
    with pytest.raises(MlxSfError, match="sides of 4 pixels or more"):
        CaptionedSceneSource((2, 2)).load(0)
    with pytest.raises(MlxSfError, match="got index -1"):
        describe(-1)


def test_epochs_are_new_balanced_and_never_mirrored() -> None:
    source = CaptionedSceneSource((16, 16), length=12)
    batches = Loader(source, 12).batches()
    first, second = islice(batches, 2)
    batches.close()
    for batch, start in ((first, 0), (second, 12)):
        pictures = {source.caption(i): source.draw(i)[0] for i in range(start, start + 12)}
        assert set(batch.labels) == set(pictures)
        assert sum(any(np.array_equal(image, p) for p in pictures.values()) for image in batch.images) == 12
    assert not any(np.array_equal(a, b) for a in first.images for b in second.images)
