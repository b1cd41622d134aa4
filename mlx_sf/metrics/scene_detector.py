"""Objects found in a captioned scene by analysis of its pixels: no network, since palette and shapes are known.

1. The background, a vertical gradient, is fitted to the picture's rim. What differs from it by more than the field over
   the scene does is split into regions, each of one colour of the palette. Pixels that are a mixture of a region's
   colour and the background belong to that region's edge.
2. A region's coverage is the share of each pixel that its colour fills. Its sum is the region's area, its centre of
   mass the region's place.
3. Each of `SHAPES` has one size and one position with that area and that centre of mass. The shape whose coverage fits
   best is the region's. Where none fits well, the same is tried with shapes blurred by 1 and 2 pixels.

A fit is 1 - (sum of squared differences) / (sum of squared coverage), 1 where it is perfect. The confidence is the fit
where that is 0.9 or more, and falls to 0 at a fit of 0.75. So GenEval's threshold of 0.3 is a fit of 0.8. Regions that
are too small, off the palette, or not of one colour are no objects: noise is no scene.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data.captioned_scenes import COLOURS, SHAPES, coverage, half_box, lab
from ..data.scenes import Canvas
from ..errors import MlxSfError
from .geneval import Detection

LEAST_SIDE = 32  # pixels of a picture's shorter side
_MOST_SIDE = 128  # of the shorter side; larger pictures are averaged down, as nothing is gained by more
_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()))
_DIFFERENT = 18.0  # least CIELAB distance of a pixel of an object from the background; the palette keeps 43
_CLEARLY = 26.0  # the same for the middle of an object's pixels
_EXPLAINED = 0.16  # largest distance in RGB of a pixel from the mixtures that explain it
_SMALLEST = 0.18  # radius of the smallest object, in halves of the shorter side; captioned scenes have 0.22 and more
_OFF_PALETTE = 30.0  # largest CIELAB distance of an object from its colour in the palette
_PLAIN = 0.75  # least plainness of an object
_MOST_NOISE = 0.08  # more is no noise over a scene
_BLURRED = 0.93  # a fit below it is tried again with blurred shapes
_GREY = 0.9  # share of a difference's grey part that is left out: field and grating are grey
_PAD = 5  # pixels around a region that are looked at


def detect(picture: np.ndarray) -> list[Detection]:
    """What a captioned scene shows, by falling confidence.

    Args:
        picture: (H, W, 3) uint8, sides of `LEAST_SIDE` pixels or more.

    Boxes are in pixels of `picture`, as `captioned_scenes.Instance` has them. Confidences are above 0 and at most 1.
    Raises `MlxSfError` for what is no such picture.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise MlxSfError(f"scene detector: got {picture.dtype} of shape {picture.shape}, want (H, W, 3) uint8")
    if min(picture.shape[:2]) < LEAST_SIDE:
        h, w = picture.shape[:2]
        raise MlxSfError(f"scene detector: got {w} x {h} pixels, want sides of {LEAST_SIDE} or more: draw larger ones")
    factor = -(-min(picture.shape[:2]) // _MOST_SIDE)
    rgb = np.asarray(Image.fromarray(picture).reduce(factor), np.float64) / 255
    noise = _noise(rgb)
    blur = float(np.clip((noise - 0.02) / 0.04, 0, 1))
    smooth = ndimage.gaussian_filter(rgb, (blur, blur, 0))
    behind = _background(smooth)
    found = []
    for window in _windows(rgb, behind, _regions(smooth, behind)):
        fit = _best_fit(window, blur)
        if fit is not None and fit.score > 0.75:
            found.append(fit.detection(window, noise, factor))
    return sorted((d for d in found if d is not None), key=lambda d: -d.score)


def _noise(rgb: np.ndarray) -> float:
    """Standard deviation of white noise, from second differences along both axes, which smooth pictures lack."""
    kernel = np.outer([1, -2, 1], [1, -2, 1]) / 6
    differences = ndimage.convolve(rgb, kernel[:, :, None])[1:-1, 1:-1]
    return float(np.median(np.abs(differences)) / 0.6745)


def _background(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3): the vertical gradient that fits most of the picture's outermost pixels."""
    h, w = rgb.shape[:2]
    y = np.linspace(-1, 1, h)
    rim = np.pad(np.zeros((h - 2, w - 2), bool), 1, constant_values=True)
    values, places = rgb[rim], np.stack([np.ones(rim.sum()), np.repeat(y, rim.sum(axis=1))], axis=1)
    off = np.linalg.norm(values - np.median(values, axis=0), axis=1)
    for least in (0.1, 0.06, 0.06, 0.06):  # an object that a network put across the rim is left out
        kept = off <= max(2.5 * np.median(off), least)
        line = np.linalg.lstsq(places[kept], values[kept], rcond=None)[0]
        off = np.linalg.norm(values - places @ line, axis=1)
    gradient = np.stack([np.ones(h), y], axis=1) @ line
    return np.broadcast_to(gradient[:, None], rgb.shape)


@dataclass(frozen=True)
class _Region:
    """Connected pixels of one object, `mask` (H, W), and their colour in RGB."""

    mask: np.ndarray
    colour: np.ndarray


def _regions(rgb: np.ndarray, behind: np.ndarray) -> list[_Region]:
    labs = lab(np.clip(rgb, 0, 1))
    contrast = np.linalg.norm(labs - lab(np.clip(behind, 0, 1)), axis=-1)
    nearest = np.linalg.norm(labs[..., None, :] - lab(_PALETTE), axis=-1).argmin(axis=-1)
    least = max(6.0, 0.5 * (_SMALLEST * min(rgb.shape[:2]) / 2) ** 2)  # pixels
    parts, n = ndimage.label(contrast > _DIFFERENT, np.ones((3, 3)))
    regions = []
    for part in (parts == k for k in range(1, n + 1)):
        colours, shares, rests, left = [], [], [], part.copy()
        while left.sum() >= least:
            # the colour of those that differ most: the others may be their mixtures with the background
            strongest = left & (contrast >= np.quantile(contrast[left], 0.7))
            chosen = np.bincount(nearest[strongest]).argmax()
            same = left & (nearest == chosen)
            left &= nearest != chosen
            if same.sum() < 0.6 * least:
                continue
            colour = np.median(rgb[same & (contrast >= np.median(contrast[same]))], axis=0)
            way = colour - behind
            share = ((rgb - behind) * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-9)
            rest = np.linalg.norm(rgb - behind - np.clip(share, 0, 1.15)[..., None] * way, axis=-1)
            left &= rest > _EXPLAINED
            colours.append(colour)
            shares.append(share)
            rests.append(rest)
        owner = np.argmin(np.stack(rests), axis=0) if rests else part
        for i, (colour, share) in enumerate(zip(colours, shares, strict=True)):
            # at half coverage objects part that are but a pixel or two from each other
            whole, m = ndimage.label(part & (owner == i) & (share >= 0.5))
            masks = (whole == k for k in range(1, m + 1))
            regions += [
                _Region(mask, colour) for mask in masks if mask.sum() >= least and np.median(contrast[mask]) > _CLEARLY
            ]
    return regions


@dataclass(frozen=True)
class _Window:
    """A square of n x n pixels around a region, its upper left corner at (`left`, `top`) of the picture.

    `inner` is the region, `near` and `far` are what lies within 2 and 5 pixels of it and of no other region. `smallest`
    is the least radius of an object, in pixels.
    """

    rgb: np.ndarray
    behind: np.ndarray
    inner: np.ndarray
    near: np.ndarray
    far: np.ndarray
    colour: np.ndarray
    left: int
    top: int
    smallest: float

    def coverage(self, colour: np.ndarray, within: np.ndarray, least: float) -> np.ndarray:
        """Share of each pixel that `colour` fills, from 0 to 1; below `least` it is taken for the background."""
        way = colour - self.behind
        plain = way - _GREY * way.mean(axis=-1, keepdims=True)
        share = ((self.rgb - self.behind) * plain).sum(-1) / np.maximum((way * plain).sum(-1), 1e-9)
        return np.where(within & (share >= least), np.minimum(share, 1), 0)


def _windows(rgb: np.ndarray, behind: np.ndarray, regions: list[_Region]) -> Iterator[_Window]:
    if not regions:
        return
    numbered = np.zeros(rgb.shape[:2], int)
    for i, region in enumerate(regions, start=1):
        numbered[region.mask] = i
    distance, (rows, columns) = ndimage.distance_transform_edt(numbered == 0, return_indices=True)
    owner = numbered[rows, columns]
    for i, region in enumerate(regions, start=1):
        down, across = ndimage.find_objects(region.mask.astype(int))[0]
        n = max(down.stop - down.start, across.stop - across.start) + 2 * _PAD
        top, left = (down.start + down.stop - n) // 2, (across.start + across.stop - n) // 2

        def cut(a: np.ndarray, n: int = n, top: int = top, left: int = left) -> np.ndarray:
            around = [(n, n), (n, n)] + [(0, 0)] * (a.ndim - 2)
            return np.pad(a, around)[top + n : top + 2 * n, left + n : left + 2 * n]

        mine = owner == i
        around, pixels, gradient = cut(mine & (distance > 2.3) & (distance <= _PAD)), cut(rgb), cut(behind)
        if around.sum() >= 8:  # the field's slow part
            gradient = gradient + np.median((pixels - gradient)[around], axis=0)
        near, far = cut(mine & (distance <= 2.3)), cut(mine & (distance <= _PAD))
        smallest = _SMALLEST * min(rgb.shape[:2]) / 2
        yield _Window(pixels, gradient, cut(region.mask), near, far, region.colour, left, top, smallest)


@dataclass(frozen=True)
class _Fit:
    """A shape at (x, y) of a window with its radius, in pixels, its `filled` coverage, and its colour if known."""

    score: float
    shape: str
    x: float
    y: float
    radius: float
    filled: np.ndarray
    blur: float
    colour: int | None

    def detection(self, window: _Window, noise: float, factor: int) -> Detection | None:
        """What was found; None where the pixels do not bear it out."""
        if self.colour is None:
            full = window.near & (self.filled > 0.95)
            rgb = np.median(window.rgb[full], axis=0) if full.sum() >= 4 else window.colour
            apart = np.linalg.norm(lab(np.clip(rgb, 0, 1)) - lab(_PALETTE), axis=-1)
            colour = int(apart.argmin())
            if apart[colour] > _OFF_PALETTE:
                return None
        else:
            colour, rgb = self.colour, _PALETTE[self.colour]
        if _plainness(window, ndimage.gaussian_filter(self.filled, self.blur), rgb, noise) < _PLAIN:
            return None
        x, y = window.left + self.x, window.top + self.y
        half_width, half_height = (self.radius * half for half in half_box(self.shape))
        left, top, right, bottom = (
            float(v * factor) for v in (x - half_width, y - half_height, x + half_width, y + half_height)
        )
        confidence = min(self.score, 6 * (self.score - 0.75))
        return Detection(self.shape, (left, top, right, bottom), confidence, _NAMES[colour])


def _plainness(window: _Window, filled: np.ndarray, colour: np.ndarray, noise: float) -> float:
    """Share of a region's difference from the background that one colour explains; 1 is all but the noise."""
    difference = (window.rgb - window.behind)[window.near]
    rest = difference - filled[window.near][:, None] * (colour - window.behind)[window.near]
    expected = 3 * min(noise, _MOST_NOISE) ** 2 * len(difference)
    return 1 - max(float((rest**2).sum()) - expected, 0) / max(float((difference**2).sum()) - expected, 1e-9)


def _best_fit(window: _Window, noise_blur: float) -> _Fit | None:
    covered = window.coverage(window.colour, window.near, 0.12)
    fits = list(_fits(covered, window.smallest, noise_blur, 0, None))
    if max((f.score for f in fits), default=1) < _BLURRED:
        # what is blurred need not reach its full colour anywhere: the palette says what that would be
        colour = _unmixed(window, covered)
        spread = window.coverage(_PALETTE[colour], window.far, 0.06)
        fits += [f for blur in (1, 2) for f in _fits(spread, window.smallest, noise_blur, blur, colour)]
    return max(fits, key=lambda f: f.score, default=None)


def _unmixed(window: _Window, covered: np.ndarray) -> int:
    """The colour of the palette that explains a region best, mixed with half of the background at most."""
    full = window.inner & (covered >= np.quantile(covered[window.inner], 0.6))
    seen, behind = np.median(window.rgb[full], axis=0), np.median(window.behind[window.inner], axis=0)
    ways = _PALETTE - behind
    plain = ways - _GREY * ways.mean(axis=-1, keepdims=True)
    share = np.clip((plain @ (seen - behind)) / (plain * ways).sum(-1), 0.5, 1.1)
    rest = np.linalg.norm(seen - behind - share[:, None] * ways, axis=-1)
    return int(np.argmin(rest + 0.15 * np.maximum(1 - share, 0) * np.linalg.norm(ways, axis=-1)))


def _fits(covered: np.ndarray, smallest: float, noise_blur: float, blur: float, colour: int | None) -> Iterator[_Fit]:
    """Each shape where its area and its centre of mass are those of what is covered; none below the radius `smallest`.

    Shapes are blurred by `blur` pixels before they are compared, and both sides by `noise_blur`, against noise.
    """
    n, total = len(covered), covered.sum()
    if total <= 0:
        return
    rows, columns = ndimage.center_of_mass(covered)
    covered = ndimage.gaussian_filter(covered, noise_blur)
    for shape in SHAPES:
        area, dx, dy = _moments(shape)
        radius = float(np.sqrt(total / area))
        if radius < smallest:
            continue
        x, y = columns + 0.5 - dx * radius, rows + 0.5 - dy * radius
        filled = coverage(shape, _canvas(n), *(float(v / (n / 2)) for v in (x - n / 2, y - n / 2, radius)))
        shown = ndimage.gaussian_filter(filled, np.hypot(blur, noise_blur)) if blur or noise_blur else filled
        score = 1 - float(((covered - shown) ** 2).sum() / (covered**2).sum())
        yield _Fit(score, shape, x, y, radius, filled, blur, colour)


@lru_cache(maxsize=256)
def _canvas(size: int) -> Canvas:
    return Canvas(size)


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area over radius squared; the centre of mass, from the centre of the box, over the radius."""
    n, radius = 512, 0.8
    filled = coverage(shape, Canvas(n), 0, 0, radius)
    y, x = ndimage.center_of_mass(filled)
    r = radius * n / 2
    return float(filled.sum(dtype=np.float64)) / r**2, (x + 0.5 - n / 2) / r, (y + 0.5 - n / 2) / r
