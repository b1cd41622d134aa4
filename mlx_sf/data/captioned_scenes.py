"""Captioned scenes: pictures drawn from descriptions, so that it is known what each shows and where.

A `Description` says everything about a picture but where things lie: one object one to four times, or two objects in a
relation, each with its colour, and the background. Its category, one of GenEval's six (with GenEval's names), decides
what the caption says of it:

- single_object: "a star"
- two_object: "a star and a circle"
- counting: "three stars"
- colors: "a red star"
- position: "a star left of a circle"
- color_attr: "a red star and a blue circle"

Descriptions, layouts and captions derive from (seed, split, index) alone. Some combinations are held out: each shape
lacks two colours (`HELD_OUT_COLOURS`) and one count (`HELD_OUT_COUNTS`), and about one in eleven of (shape, relation,
shape) is missing (`HELD_OUT_RELATIONS`), a relation and its inverse together. Split "train" never draws them, whether
its captions would say so or not. Split "seen" draws other pictures by the same rule. Split "unseen" draws them only:
each of its pictures holds out exactly what its category asks for, so it has the categories `UNSEEN_CATEGORIES`.

Objects are whole, do not touch each other, and the longer side of each is a fifth of the picture's shorter side or
more. In a relation the distance of the centres along its axis is at least twice that across it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..errors import FieldError, MlxSfError
from .numbered import NumberedSource, Picture
from .scenes import Canvas, Field, SceneOptions, box, disc, polygon

CAPTIONED_SCENES = "captioned-scenes"  # what `DataOptions.data` calls them
SPLITS = ("train", "seen", "unseen")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
UNSEEN_CATEGORIES = ("counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = ("no", "one", "two", "three", "four")

COLOURS: dict[str, tuple[float, float, float]] = {  # sRGB
    "red": (0.85, 0.08, 0.10),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.90, 0.15),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.08, 0.38, 0.95),
    "purple": (0.57, 0.10, 0.60),
    "pink": (1.00, 0.60, 0.78),
    "brown": (0.46, 0.26, 0.10),
    "black": (0.04, 0.04, 0.05),
    "white": (0.98, 0.98, 0.97),
}
# muted colours at the top and at the bottom
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "mist": ((0.80, 0.84, 0.88), (0.70, 0.75, 0.80)),
    "sand": ((0.86, 0.81, 0.72), (0.77, 0.71, 0.62)),
    "sage": ((0.72, 0.77, 0.71), (0.62, 0.68, 0.62)),
    "stone": ((0.64, 0.63, 0.61), (0.54, 0.53, 0.52)),
    "slate": ((0.46, 0.51, 0.56), (0.37, 0.42, 0.47)),
    "dusk": ((0.44, 0.41, 0.52), (0.35, 0.32, 0.43)),
    "night": ((0.18, 0.20, 0.26), (0.11, 0.13, 0.17)),
}
_CONTRAST = 43  # least distance in CIELAB between an object and what lies behind it


def _circle(c: Canvas, x: float, y: float, r: float) -> Field:
    return disc(c, x, y, r)


def _square(c: Canvas, x: float, y: float, r: float) -> Field:
    return box(c, x, y, 0.88 * r, 0.88 * r)


def _triangle(c: Canvas, x: float, y: float, r: float) -> Field:
    return polygon(c, (x - r, y + 0.86 * r), (x, y - 0.86 * r), (x + r, y + 0.86 * r))


def _diamond(c: Canvas, x: float, y: float, r: float) -> Field:
    return polygon(c, (x - 0.66 * r, y), (x, y - r), (x + 0.66 * r, y), (x, y + r))


def _star(c: Canvas, x: float, y: float, r: float) -> Field:
    # a pentagram is what lies inside at least four of its five lines, whose normals point to its tips
    normals = [(np.float32(np.cos(a)), np.float32(np.sin(a))) for a in (np.arange(5) / 5 - 0.25) * 2 * np.pi]
    y += 0.0955 * r  # the box's centre is above the star's
    lines = [(c.x - x) * nx + (c.y - y) * ny for nx, ny in normals]
    return np.sort(np.stack(lines), axis=0)[-2] - np.float32(0.309 * r)


def _ring(c: Canvas, x: float, y: float, r: float) -> Field:
    return np.abs(disc(c, x, y, 0.74 * r)) - np.float32(0.26 * r)


def _cross(c: Canvas, x: float, y: float, r: float) -> Field:
    return np.minimum(box(c, x, y, 0.92 * r, 0.3 * r), box(c, x, y, 0.3 * r, 0.92 * r))


def _heart(c: Canvas, x: float, y: float, r: float) -> Field:
    y -= 0.025 * r  # two discs, and the tangents from the lower tip to them
    lobes = np.minimum(disc(c, x - 0.5 * r, y - 0.35 * r, 0.5 * r), disc(c, x + 0.5 * r, y - 0.35 * r, 0.5 * r))
    corners = [(-0.862, -0.005), (-0.5, -0.35), (0.5, -0.35), (0.862, -0.005), (0.0, 0.9)]
    return np.minimum(lobes, polygon(c, *((x + a * r, y + b * r) for a, b in corners)))


def _moon(c: Canvas, x: float, y: float, r: float) -> Field:
    x += 0.236 * r
    return np.maximum(disc(c, x, y, r), -disc(c, x + 0.5 * r, y, 0.85 * r))


def _arrow(c: Canvas, x: float, y: float, r: float) -> Field:
    head = polygon(c, (x - 0.84 * r, y), (x, y - r), (x + 0.84 * r, y))
    return np.minimum(head, box(c, x, y + 0.45 * r, 0.3 * r, 0.55 * r))


# name -> its signed distance at (x, y) with radius r, and half the sides of its box as shares of r
_SHAPES: dict[str, tuple[Callable[[Canvas, float, float, float], Field], tuple[float, float]]] = {
    "circle": (_circle, (1, 1)),
    "square": (_square, (0.88, 0.88)),
    "triangle": (_triangle, (1, 0.86)),
    "star": (_star, (0.951, 0.9045)),
    "ring": (_ring, (1, 1)),
    "cross": (_cross, (0.92, 0.92)),
    "heart": (_heart, (1, 0.875)),
    "moon": (_moon, (0.764, 1)),
    "diamond": (_diamond, (0.66, 1)),
    "arrow": (_arrow, (0.84, 1)),
}
SHAPES = tuple(_SHAPES)


def coverage(shape: str, canvas: Canvas, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel of a canvas a shape covers: (size, size) float32 from 0 to 1.

    `shape` is one of `SHAPES`; the centre of its box and its radius are in units of half the canvas.
    """
    return np.clip(np.float32(0.5) - _SHAPES[shape][0](canvas, x, y, radius) * canvas.scale, 0, 1)


def half_box(shape: str) -> tuple[float, float]:
    """Half the width and half the height of a shape's box, as shares of its radius."""
    return _SHAPES[shape][1]


def _held_out_relations() -> frozenset[tuple[str, str, str]]:
    ways = [
        (first, relation, second)
        for a, first in enumerate(SHAPES)
        for b, second in enumerate(SHAPES)
        for axis, relation in enumerate(("left of", "above"))
        if a != b and (a + 2 * b + 3 * axis) % 9 == 0
    ]
    return frozenset(ways) | {(second, _INVERSE[relation], first) for first, relation, second in ways}


# patterns that hold each shape, colour and count out about equally often
HELD_OUT_COLOURS = frozenset(
    (shape, colour)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if j in ((3 * i + 1) % 10, (3 * i + 6) % 10)
)
HELD_OUT_COUNTS = frozenset((shape, 2 + i % 3) for i, shape in enumerate(SHAPES))
HELD_OUT_RELATIONS = _held_out_relations()


@dataclass(frozen=True)
class SceneObject:
    """`count` (1 to 4) objects of one of `SHAPES` in one of `COLOURS`. Raises `FieldError`."""

    shape: str
    colour: str
    count: int = 1

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, SHAPES)
        _one_of("colour", self.colour, COLOURS)
        _one_of("count", self.count, range(1, len(COUNTS)))


@dataclass(frozen=True)
class Description:
    """What a picture shows: one `SceneObject`, or two of count 1 with the relation of the first to the second.

    `background` is one of `BACKGROUNDS`. `category`, one of `CATEGORIES`, is what the caption speaks of; it changes
    nothing in the picture. `relation` is "" for one object. Raises `FieldError` for what cannot be.
    """

    objects: tuple[SceneObject, ...]
    relation: str
    background: str
    category: str

    def __post_init__(self) -> None:
        _one_of("category", self.category, CATEGORIES)
        _one_of("background", self.background, BACKGROUNDS)
        pair = self.category in ("two_object", "position", "color_attr")
        if len(self.objects) != 1 + pair or len({o.shape for o in self.objects}) != len(self.objects):
            raise FieldError("objects", self.objects, f"{1 + pair} of different shapes in category {self.category}")
        if self.category != "counting" and any(o.count != 1 for o in self.objects):
            raise FieldError("objects", self.objects, f"counts of 1 in category {self.category}")
        _one_of("relation", self.relation, RELATIONS if pair else ("",))


@dataclass(frozen=True)
class Instance:
    """One object in a picture: its `box` (left, top, right, bottom) in pixels fits it."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]


def _one_of(field: str, got: object, choices: Collection[object]) -> None:
    if got not in choices:
        raise FieldError(field, got, "one of " + ", ".join(repr(c) for c in choices))


def held_out(description: Description) -> frozenset[str]:
    """Which kinds of combinations of the picture no training picture has: of "colour", "count", "relation"."""
    objects = description.objects
    kinds = set()
    if any((o.shape, o.colour) in HELD_OUT_COLOURS for o in objects):
        kinds.add("colour")
    if any((o.shape, o.count) in HELD_OUT_COUNTS for o in objects):
        kinds.add("count")
    if description.relation and (objects[0].shape, description.relation, objects[1].shape) in HELD_OUT_RELATIONS:
        kinds.add("relation")
    return frozenset(kinds)


_HELD_OUT_IN = {"counting": "count", "colors": "colour", "position": "relation", "color_attr": "colour"}


def categories(split: str) -> tuple[str, ...]:
    """The categories of a split, which take turns. Raises `FieldError`."""
    _one_of("split", split, SPLITS)
    return UNSEEN_CATEGORIES if split == "unseen" else CATEGORIES


def describe(index: int, seed: int = 0, split: str = "train") -> Description:
    """Description number `index` (from 0) of a split. Raises `MlxSfError`."""
    turns = categories(split)
    if index < 0:
        raise MlxSfError(f"captioned scenes: got index {index}, want 0 or more")
    category = turns[index % len(turns)]
    wanted = {_HELD_OUT_IN[category]} if split == "unseen" else set()
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    while True:
        description = _draw_description(category, rng)
        if held_out(description) == wanted:
            return description


def _draw_description(category: str, rng: Generator) -> Description:
    pair = category in ("two_object", "position", "color_attr")
    shapes = rng.choice(len(SHAPES), 1 + pair, replace=False)
    colours = rng.choice(len(COLOURS), 1 + pair, replace=False)
    count = int(rng.integers(2, len(COUNTS))) if category == "counting" else 1
    objects = tuple(SceneObject(SHAPES[s], tuple(COLOURS)[c], count) for s, c in zip(shapes, colours, strict=True))
    behind = [b for b in BACKGROUNDS if all(o.colour in _CLEAR[b] for o in objects)]
    relation = RELATIONS[rng.integers(len(RELATIONS))] if pair else ""
    return Description(objects, relation, behind[rng.integers(len(behind))], category)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB colours from 0 to 1, (..., 3) both; the straight part near black is left out."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.moveaxis(np.cbrt(linear @ to_xyz.T / (0.9505, 1.0, 1.089)), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return float(np.linalg.norm(lab(np.array(a)) - lab(np.array(b))))


# background -> the colours that stand out from it
_CLEAR = {
    name: [c for c, rgb in COLOURS.items() if all(_apart(rgb, e) >= _CONTRAST for e in ends)]
    for name, ends in BACKGROUNDS.items()
}

# {a} and {b} are the objects, {one} and {other} without their articles and colours
PHRASINGS: dict[str, tuple[str, ...]] = {
    "single_object": ("{a}", "a picture of {a}", "there is {a}", "one {one}", "a drawing of {a}"),
    "two_object": ("{a} and {b}", "a picture of {a} and {b}", "there is {a} and {b}", "{b} and {a}", "{a} with {b}"),
    "counting": ("{a}", "a picture of {a}", "there are {a}", "exactly {a}", "a drawing of {a}"),
    "colors": ("{a}", "a picture of {a}", "there is {a}", "the {one} is {colour}", "a drawing of {a}"),
    "position": (
        "{a} {relation} {b}",
        "a picture of {a} {relation} {b}",
        "there is {a} {relation} {b}",
        "the {one} is {relation} the {other}",
        "{b} {inverse} {a}",
    ),
    "color_attr": (
        "{a} and {b}",
        "a picture of {a} and {b}",
        "there is {a} and {b}",
        "the {one} is {colour} and the {other} is {second}",
        "{b} and {a}",
    ),
}


def caption(description: Description, phrasing: int = 0) -> str:
    """The description's caption in lower case, without punctuation; `phrasing` counts through the ways to say it."""
    ways = PHRASINGS[description.category]
    first, second = description.objects[0], description.objects[-1]
    coloured = description.category in ("colors", "color_attr")
    return ways[phrasing % len(ways)].format(
        a=_phrase(first, coloured),
        b=_phrase(second, coloured),
        one=first.shape,
        other=second.shape,
        colour=first.colour,
        second=second.colour,
        relation=description.relation,
        inverse=_INVERSE.get(description.relation, ""),
    )


def _phrase(o: SceneObject, coloured: bool) -> str:
    if o.count > 1:
        return f"{COUNTS[o.count]} {_plural(o.shape)}"
    name = f"{o.colour} {o.shape}" if coloured else o.shape
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _vocabulary() -> tuple[str, ...]:
    frames = {word for ways in PHRASINGS.values() for way in ways for word in way.split() if "{" not in word}
    places = {word for relation in RELATIONS for word in relation.split()}
    names = {*SHAPES, *map(_plural, SHAPES), *COLOURS, *COUNTS[2:]}
    return tuple(sorted(frames | places | names | {"a", "an"}))


VOCABULARY: tuple[str, ...] = _vocabulary()  # every word that captions can contain


def draw(
    description: Description,
    size: int | tuple[int, int],
    seed: int | Sequence[int] = 0,
    options: SceneOptions | None = None,
) -> tuple[np.ndarray, tuple[Instance, ...]]:
    """A picture (H, W, 3) uint8 of what is described, and where each object lies in it.

    `size` is a side in pixels or (height, width). The layout depends on the description, the seed and the shape of the
    picture, not on how many pixels it has (the field over it does). Raises `MlxSfError` for a side under 4 pixels.
    """
    h, w = (size, size) if isinstance(size, int) else size
    if min(h, w) < 4:
        raise MlxSfError(f"captioned scenes: got size {h} x {w}, want sides of 4 pixels or more")
    rng = np.random.default_rng(seed)
    objects = [o for o in description.objects for _ in range(o.count)]
    centres, radii = _layout(objects, description.relation, (w / min(h, w), h / min(h, w)), rng)
    tints = {o.shape: rng.uniform(-0.02, 0.02, 3) for o in description.objects}
    long, short = max(h, w), min(h, w)
    c = Canvas(long)
    c.backdrop(*np.array(BACKGROUNDS[description.background], np.float32))
    instances = []
    for o, centre, radius in zip(objects, centres, radii, strict=True):
        distance, half = _SHAPES[o.shape]
        x, y, r = (float(v) * short / long for v in (*centre, radius))
        c.fill(distance(c, x, y, r), (np.array(COLOURS[o.colour]) + tints[o.shape]).astype(np.float32))
        middle, reach = (np.array([w, h]) + centre * short) / 2, radius * np.array(half) * short / 2
        left, top, right, bottom = (float(v) for v in (*(middle - reach), *(middle + reach)))
        instances.append(Instance(o.shape, o.colour, (left, top, right, bottom)))
    top_row, left_column = (long - h) // 2, (long - w) // 2
    picture = c.picture(rng, options or SceneOptions())
    return picture[top_row : top_row + h, left_column : left_column + w], tuple(instances)


_RADII = {1: (0.32, 0.62), 2: (0.25, 0.42), 3: (0.23, 0.38), 4: (0.22, 0.34)}  # number of objects -> range of radii
_MARGIN = 0.06  # to the picture's edge
_GAP = 0.1  # between the boxes of two objects
_LAYOUTS = 64  # tried at once


def _layout(
    objects: Sequence[SceneObject], relation: str, reach: tuple[float, float], rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 2) and radii (n,), in halves of the shorter side; `reach` is half the picture's width and height."""
    low, high = _RADII[len(objects)]
    half = np.array([_SHAPES[o.shape][1] for o in objects])
    while True:
        radii = rng.uniform(low, high, (_LAYOUTS, len(objects)))
        boxes = radii[..., None] * half
        centres = rng.uniform(-1, 1, boxes.shape) * (np.array(reach) - boxes - _MARGIN)
        good = np.ones(_LAYOUTS, bool)
        for i in range(len(objects)):
            for j in range(i):
                good &= (np.abs(centres[:, i] - centres[:, j]) - boxes[:, i] - boxes[:, j]).max(-1) >= _GAP
        if relation:
            axis, sign = int(relation in ("above", "below")), 1 if relation in ("left of", "above") else -1
            offset = (centres[:, 1] - centres[:, 0]) * sign
            good &= offset[:, axis] >= 2 * np.abs(offset[:, 1 - axis])
        if good.any():
            chosen = int(good.argmax())
            return centres[chosen], radii[chosen]
        high = max(low, 0.95 * high)  # smaller objects have more room


class CaptionedSceneSource(NumberedSource):
    """Captioned scenes without end; `length` only sets how many make an epoch. Pictures are never mirrored.

    The phrasings of each category take turns. A rectangle is cut from the middle of a square, and the scene is laid out
    for what stays. Raises `FieldError` for a split that is none of `SPLITS`.
    """

    class_names: tuple[str, ...] = ()
    endless = True
    vocabulary = VOCABULARY
    cacheable = False

    def __init__(
        self,
        size: tuple[int, int],
        length: int = 2560,
        seed: int = 0,
        split: str = "train",
        options: SceneOptions | None = None,
    ) -> None:
        super().__init__()
        self._turns = len(categories(split))
        self.size, self.split, self._length, self._seed, self._options = size, split, length, seed, options

    def __len__(self) -> int:
        return self._length

    def description(self, index: int) -> Description:
        """What picture `index` shows."""
        return describe(index, self._seed, self.split)

    def caption(self, index: int) -> str:
        """The caption of picture `index`."""
        return caption(self.description(index), index // self._turns)

    def draw(self, index: int) -> tuple[np.ndarray, tuple[Instance, ...]]:
        """Picture `index` and where its objects lie, as the function `draw` gives them."""
        seed = (self._seed, SPLITS.index(self.split), index, 1)  # the last number parts it from the description's
        return draw(self.description(index), self.size, seed, self._options)

    def load(self, index: int) -> Picture:
        return self.draw(index)[0], self.caption(index)

    def mirrors(self, label: int | str) -> bool:
        """No: a mirror image may show a relation that is held out."""
        return False

    def name(self, index: int) -> str:
        return f"captioned scene {index} of split {self.split}"

    def listing(self) -> str:
        return f"{CAPTIONED_SCENES} {self.split}"

    def describe(self) -> str:
        return f"captioned scenes, split {self.split}, {self._length} new ones an epoch"
