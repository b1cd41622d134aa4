"""The built-in data set: procedural scenes of ten classes, drawn afresh from (seed, index) at any size.

It needs no download, so the demo, the tests and the spectral experiments all run on it. Shapes are signed distance
functions on the square [-1, 1] x [-1, 1] (x to the right, y down), antialiased by their distance to the pixel's centre.
Over every scene lies a random field with power spectrum 1/f^alpha, and inside the shapes a fine grating, so that the
slope of the data's spectrum and its content near the Nyquist frequency can each be set (`SceneOptions`).
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from ..errors import MlxSfError

Field = np.ndarray  # (size, size) float32


@dataclass(frozen=True)
class SceneOptions:
    """What the spectrum of the scenes looks like.

    `alpha` is the exponent of the background's power law (0 white, 2 as in photographs) and `background` its standard
    deviation, as a share of the range from black to white; `detail` is the amplitude, on the same scale, of a grating
    of `detail_period` pixels inside the shapes.
    """

    alpha: float = 2.0
    background: float = 0.03
    detail: float = 0.04
    detail_period: float = 4.0

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 0, 8), ("background", 0, 1), ("detail", 0, 1), ("detail_period", 2, 1e6)):
            if not low <= getattr(self, name) <= high:
                raise MlxSfError(f"scenes: {name} is {getattr(self, name)}, want a number from {low} to {high:g}")


class Canvas:
    """A picture being painted: `rgb` (3, size, size) float32 in [0, 1], and where shapes (not backdrop) were put.

    `x` (1, size) and `y` (size, 1) are the pixels' centres on the square [-1, 1] x [-1, 1].
    """

    def __init__(self, size: int) -> None:
        self.x, self.y = _grid(size)
        self.scale = np.float32(size / 2)
        self.rgb = np.zeros((3, size, size), np.float32)
        self.shape = np.zeros((size, size), np.float32)

    def backdrop(self, top: np.ndarray, bottom: np.ndarray) -> None:
        """Fill with a vertical gradient of colour."""
        self.rgb += top[:, None, None] + (bottom - top)[:, None, None] * ((self.y + 1) / 2)

    def fill(self, distance: Field, colour: np.ndarray, opacity: float = 1.0) -> None:
        """Paint where `distance` (signed, in units of half the picture) is negative, antialiased over one pixel."""
        cover = np.clip(np.float32(0.5) - distance * self.scale, 0, np.float32(opacity))
        self.rgb += cover * (colour[:, None, None] - self.rgb)
        np.maximum(self.shape, cover, out=self.shape)

    def picture(self, rng: Generator, options: SceneOptions) -> np.ndarray:
        """What was painted, under the grating and the random field that `options` ask for: (size, size, 3) uint8."""
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        size = len(self.shape)
        if options.detail:
            k = 2 * np.pi / (options.detail_period * 2 / size)  # radians per unit of the grid
            along = self.x * np.float32(k * np.cos(angle)) + self.y * np.float32(k * np.sin(angle)) + np.float32(phase)
            self.rgb += np.float32(options.detail) * np.sin(along) * self.shape
        if options.background:
            self.rgb += np.float32(options.background) * power_law_field(size, options.alpha, rng)
        return (np.clip(self.rgb, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


@lru_cache(maxsize=16)
def _grid(size: int) -> tuple[Field, Field]:
    centres = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return centres[None, :], centres[:, None]  # broadcast to (size, size)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1)), np.float32)


def disc(c: Canvas, x: float, y: float, radius: float, squash: float = 1.0) -> Field:
    """Signed distance to a disc; `squash` above 1 flattens it."""
    return np.sqrt((c.x - np.float32(x)) ** 2 + ((c.y - np.float32(y)) * np.float32(squash)) ** 2) - np.float32(radius)


def box(c: Canvas, x: float, y: float, half_width: float, half_height: float) -> Field:
    """Signed distance to an upright rectangle."""
    return np.maximum(np.abs(c.x - np.float32(x)) - half_width, np.abs(c.y - np.float32(y)) - half_height)


def polygon(c: Canvas, *corners: tuple[float, float]) -> Field:
    """Convex, corners in either sense of rotation: the largest of the distances to the sides' lines."""
    pairs = list(zip(corners, corners[1:] + corners[:1], strict=True))
    sense = np.sign(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs))  # of the enclosed area
    sides = []
    for (x0, y0), (x1, y1) in pairs:
        nx, ny = sense * np.array([y1 - y0, x0 - x1], np.float32) / np.hypot(x1 - x0, y1 - y0)
        sides.append((c.x - np.float32(x0)) * np.float32(nx) + (c.y - np.float32(y0)) * np.float32(ny))
    return np.maximum.reduce(sides)


def radial(c: Canvas, x: float, y: float, radius: float, points: int, depth: float, turn: float) -> Field:
    """A star or flower outline: the radius swings between `radius` and `radius * (1 - depth)` `points` times."""
    angle = np.arctan2(c.y - np.float32(y), c.x - np.float32(x)) + np.float32(turn)
    wave = np.abs((angle * np.float32(points / (2 * np.pi))) % 1 - np.float32(0.5)) * 2  # 1 at the tips, 0 between
    return disc(c, x, y, 0) - np.float32(radius) * (1 - np.float32(depth) * (1 - wave))


def _sunset(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 5)
    horizon = 0.25 + 0.1 * u[0]
    c.backdrop(_rgb(0.06 + 0.02 * u[1], 0.75, 0.95), _rgb(0.13, 0.5, 1.0))
    c.fill(disc(c, 0.4 * u[2], horizon - 0.2 + 0.15 * u[3], 0.34 + 0.05 * u[4]), _rgb(0.15, 0.75, 1.0))
    c.fill(horizon - c.y + 0 * c.x, _rgb(0.58 + 0.02 * u[1], 0.75, 0.55))
    for i in range(4):  # the sun's road on the water
        c.fill(box(c, 0.4 * u[2], horizon + 0.1 + 0.17 * i, 0.28 - 0.05 * i, 0.025), _rgb(0.13, 0.6, 0.95), 0.8)


def _house(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 6)
    c.backdrop(_rgb(0.56, 0.45, 0.95), _rgb(0.55, 0.15, 1.0))
    ground, x, width = 0.55 + 0.05 * u[0], 0.15 * u[1], 0.5 + 0.06 * u[2]
    top = -0.1 + 0.05 * u[3]
    c.fill(ground - c.y + 0 * c.x, _rgb(0.3 + 0.02 * u[4], 0.65, 0.6))
    c.fill(box(c, x, (top + ground + 0.1) / 2, width, (ground + 0.1 - top) / 2), _rgb(0.01 + 0.02 * u[5], 0.75, 0.8))
    c.fill(polygon(c, (x - width - 0.14, top), (x, top - 0.55), (x + width + 0.14, top)), _rgb(0.05, 0.55, 0.35))
    for side in (-1, 1):
        c.fill(box(c, x + side * width * 0.55, top + 0.22, 0.12, 0.11), _rgb(0.15, 0.45, 1.0))
    c.fill(box(c, x, ground - 0.08, 0.11, 0.19), _rgb(0.08, 0.6, 0.3))


def _tree(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 6)
    c.backdrop(_rgb(0.57, 0.35, 1.0), _rgb(0.5, 0.1, 1.0))
    c.fill(0.6 + 0.05 * u[0] - c.y + 0 * c.x, _rgb(0.24, 0.6, 0.75))
    x, y = 0.15 * u[1], -0.2 + 0.06 * u[2]
    c.fill(box(c, x, 0.4, 0.09, 0.35), _rgb(0.08, 0.65, 0.4))
    leaf = _rgb(0.34 + 0.03 * u[3], 0.8, 0.5 + 0.06 * u[4])
    for dx, dy, radius in ((-0.27, 0.1, 0.3), (0.27, 0.1, 0.3), (0.0, -0.15, 0.38)):
        c.fill(disc(c, x + dx, y + dy, radius + 0.03 * u[5]), leaf)


def _flower(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 6)
    c.backdrop(_rgb(0.3, 0.35, 0.75), _rgb(0.33, 0.55, 0.45))
    x, y = 0.12 * u[0], -0.2 + 0.08 * u[1]
    c.fill(box(c, x, y + 0.65, 0.045, 0.65), _rgb(0.33, 0.85, 0.35))
    petal, turn = _rgb(0.9 + 0.05 * u[2], 0.5, 1.0), 0.6 * u[3]
    for i in range(6):
        a = turn + i * np.pi / 3
        c.fill(disc(c, x + 0.36 * np.cos(a), y + 0.36 * np.sin(a), 0.23 + 0.02 * u[4]), petal)
    c.fill(disc(c, x, y, 0.23 + 0.03 * u[5]), _rgb(0.14, 0.9, 1.0))


def _face(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 6)
    wall = 0.78 + 0.03 * u[0]
    c.backdrop(_rgb(wall, 0.45, 0.75), _rgb(wall, 0.6, 0.5))
    x, y, radius = 0.1 * u[1], 0.08 * u[2], 0.66 + 0.05 * u[3]
    c.fill(disc(c, x, y, radius), _rgb(0.14 + 0.015 * u[4], 0.75, 1.0))
    dark = _rgb(0.07, 0.7, 0.25)
    for side in (-1, 1):
        c.fill(disc(c, x + side * 0.24, y - 0.17, 0.09, 0.75), dark)
    mouth = np.abs(disc(c, x, y + 0.02, 0.4)) - 0.055  # an arc: part of a ring below the line of the mouth
    c.fill(np.maximum(mouth, y + 0.16 + 0.05 * u[5] - c.y), dark)


def _night(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 5)
    c.backdrop(_rgb(0.66, 0.9, 0.18), _rgb(0.68, 0.75, 0.42))
    for sx, sy in r.uniform(-0.95, 0.95, (6, 2)):
        c.fill(disc(c, sx, sy, 0.035), _rgb(0.15, 0.15, 1.0), 0.9)
    turn = 0.2 * u[3] + np.pi / 2  # one tip up
    c.fill(
        radial(c, 0.15 * u[0], 0.12 * u[1], 0.66 + 0.06 * u[2], 5, 0.6, turn),
        _rgb(0.14 + 0.01 * u[4], 0.7, 1.0),
    )


def _mountain(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 6)
    c.backdrop(_rgb(0.6, 0.55, 0.85), _rgb(0.58, 0.12, 1.0))
    x, top = 0.2 * u[0], -0.6 + 0.08 * u[1]
    slope = 0.95 + 0.08 * u[2]
    way = 1 if u[3] > 0 else -1
    c.fill(polygon(c, (x + way * 0.2, 1.6), (x + way * 0.7, -0.05), (x + way * 1.8, 1.6)), _rgb(0.62, 0.3, 0.5))
    peak = polygon(c, (x - 1.9 / slope, top + 1.9), (x, top), (x + 1.9 / slope, top + 1.9))
    c.fill(peak, _rgb(0.63, 0.25 + 0.05 * u[4], 0.38))
    jagged = top + 0.42 + 0.05 * u[5] + 0.09 * np.abs(((c.x - np.float32(x)) * 4) % 2 - 1)
    c.fill(np.maximum(peak, c.y - jagged), _rgb(0.6, 0.03, 1.0))
    c.fill(0.72 - c.y + 0 * c.x, _rgb(0.36, 0.6, 0.4))


def _balloon(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 5)
    c.backdrop(_rgb(0.54, 0.5, 0.95), _rgb(0.53, 0.12, 1.0))
    x, y, radius = 0.2 * u[0], -0.22 + 0.1 * u[1], 0.5 + 0.05 * u[2]
    hue = 0.98 + 0.03 * u[3]
    rope = _rgb(0.08, 0.5, 0.35)
    for side in (-1, 1):
        c.fill(
            polygon(
                c,
                (x + side * 0.3 - 0.02, y + 0.35),
                (x + side * 0.3 + 0.02, y + 0.35),
                (x + side * 0.12 + 0.02, y + 0.82),
                (x + side * 0.12 - 0.02, y + 0.82),
            ),
            rope,
        )
    ball = disc(c, x, y, radius)
    c.fill(ball, _rgb(hue, 0.85, 0.9))
    for centre in (-0.55, 0.0, 0.55):  # white gores
        c.fill(np.maximum(ball, np.abs(c.x - np.float32(x + centre * radius)) - 0.13 * radius), _rgb(0.12, 0.12, 1.0))
    c.fill(box(c, x, y + 0.9, 0.15, 0.1), _rgb(0.08, 0.65, 0.5))


def _fish(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 5)
    c.backdrop(_rgb(0.52, 0.65, 0.75), _rgb(0.57, 0.9, 0.4))
    x, y, way = 0.08 * u[0], 0.2 * u[1], 1 if u[2] > 0 else -1
    body = _rgb(0.07 + 0.02 * u[3], 0.9, 1.0)
    tail = [(x - way * 0.3, y), (x - way * 0.78, y - 0.32), (x - way * 0.78, y + 0.32)]
    c.fill(polygon(c, *tail), _rgb(0.03, 0.9, 0.9))
    shape = disc(c, x + way * 0.1, y, 0.5 + 0.04 * u[4], 1.6)
    c.fill(shape, body)
    c.fill(np.maximum(shape, np.abs(c.x - np.float32(x)) - 0.08), _rgb(0.1, 0.05, 1.0))
    c.fill(disc(c, x + way * 0.37, y - 0.07, 0.075), _rgb(0.6, 0.5, 0.1))


def _checker(c: Canvas, r: Generator) -> None:
    u = r.uniform(-1, 1, 4)
    angle, half = 0.35 * u[0], 0.42 + 0.04 * u[1]
    a = (c.x * np.float32(np.cos(angle)) + c.y * np.float32(np.sin(angle))) / np.float32(half) + np.float32(u[2])
    b = (c.y * np.float32(np.cos(angle)) - c.x * np.float32(np.sin(angle))) / np.float32(half) + np.float32(u[3])
    c.backdrop(_rgb(0.12, 0.05, 0.97), _rgb(0.12, 0.05, 0.97))
    # signed distances to the nearest edge on both axes; their product's sign is the colour
    da = (np.abs(a % 2 - 1) - 0.5) * np.float32(half)
    db = (np.abs(b % 2 - 1) - 0.5) * np.float32(half)
    c.fill(np.sign(da) * np.sign(db) * np.minimum(np.abs(da), np.abs(db)), _rgb(0.97, 0.85, 0.65))


_PAINTERS: dict[str, Callable[[Canvas, Generator], None]] = {
    "sunset": _sunset,
    "house": _house,
    "tree": _tree,
    "flower": _flower,
    "face": _face,
    "night star": _night,
    "mountain": _mountain,
    "balloon": _balloon,
    "fish": _fish,
    "checker": _checker,
}
SCENE_CLASSES: tuple[str, ...] = tuple(_PAINTERS)


@lru_cache(maxsize=16)
def _spectral_weight(size: int, alpha: float) -> np.ndarray:
    """Amplitude f^(-alpha/2) on the grid of `rfft2`, no mean, scaled so that white noise keeps unit variance."""
    f = np.hypot(np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None, :] * size)
    f[0, 0] = 1
    weight = f ** (-alpha / 2)
    weight[0, 0] = 0
    full = np.fft.irfft2(weight, (size, size))  # by Parseval its energy is the variance of the filtered noise
    return (weight / max(float(np.sqrt((full**2).sum())), 1e-12)).astype(np.float32)


def power_law_field(size: int, alpha: float, rng: Generator) -> np.ndarray:
    """(size, size) float32 normal field with mean 0, variance about 1 and power spectrum 1/f^alpha (f radial)."""
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    return np.fft.irfft2(spectrum * _spectral_weight(size, alpha), (size, size)).astype(np.float32)


def scene(index: int, size: int, seed: int = 0, options: SceneOptions | None = None) -> tuple[np.ndarray, int]:
    """Picture number `index` of the endless data set `seed`: ((size, size, 3) uint8, label in 0..9).

    Classes take turns, so any run of indices is balanced. The scene depends on (seed, index) alone, not on `size`: the
    same index at another size shows the same shapes (the background field differs).
    """
    if size < 4 or index < 0:
        raise MlxSfError(f"scenes: got size {size}, index {index}, want a size of 4 or more and an index of 0 or more")
    rng = np.random.default_rng((seed, index))
    label = index % len(SCENE_CLASSES)
    c = Canvas(size)
    _PAINTERS[SCENE_CLASSES[label]](c, rng)
    return c.picture(rng, options or SceneOptions()), label
