"""How much power pictures have at each spatial frequency: streamed, in bounded memory, with what a bootstrap needs.

Units. Pictures are in [-1, 1] as the network sees them; the transform is the orthonormal 2-D DCT that the forcing
uses, so white noise of standard deviation s has power s^2 on every coefficient, whatever the size. The frequency of
coefficient (i, j) is its radial index k = sqrt(i^2 + j^2): k half-waves across the picture, 2 n / k pixels a period.
k = n - 1 is the finest horizontal or vertical detail; above it lies only the corner, up to k = sqrt(2) (n - 1). The
forcing's radius is r = k / (sqrt(2) (n - 1)).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import mlx.core as mx
import numpy as np

from ..common.pixels import ROUNDING_POWER, from_uint8
from ..common.progress import Progress
from ..data.loader import Loader
from ..data.sources import Source
from ..dct import Transform
from ..errors import MlxSfError, option

Channel = Literal["mean", "luminance", "red", "green", "blue"]
CHANNELS: tuple[Channel, ...] = ("mean", "luminance", "red", "green", "blue")
_WEIGHTS = {"luminance": (0.299, 0.587, 0.114), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}  # BT.601
_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # of channels: the colour covariance of a ring

MIN_IMAGES = 8  # below, an interval from the spread between images says nothing
MAX_GROUPS = 1024  # images are pooled into at most so many groups for the bootstrap
_CHECKED = 200  # pictures whose own size is looked at
_FEW = 0.05  # share of them that may be smaller than asked


class Rings:
    """The coefficients of an n x n transform, grouped by their radial index rounded to a whole number.

    `k` (K,) are those numbers (0 is the mean brightness alone), `counts` (K,) the coefficients in each, `radius` (n, n)
    the unrounded index of each coefficient.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        i = np.arange(n, dtype=np.float64)
        self.radius = np.hypot(i[:, None], i[None, :])
        whole = np.floor(self.radius + 0.5).astype(np.int64).reshape(-1)
        self.k, self.counts = np.unique(whole, return_counts=True)
        self._order = np.argsort(whole, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Means over each ring: (..., n, n) -> (..., K) float64."""
        flat = values.reshape(*values.shape[:-2], -1)[..., self._order].astype(np.float64)
        return np.asarray(np.add.reduceat(flat, self._starts, axis=-1) / self.counts)

    def fraction(self, k: np.ndarray | float) -> np.ndarray:
        """The forcing's radius, 0 to 1, of a radial index."""
        return np.asarray(k, dtype=np.float64) / (math.sqrt(2) * (self.n - 1))


@dataclass(frozen=True)
class Spectrum:
    """Mean power per ring of `count` images, and per group of images for the bootstrap.

    img_size: side of the images; n: side of what was transformed (the image, or windows of it). `groups` (G, K, 6) are
    ring means of the products of channels RR, GG, BB, RG, RB, GB, `sizes` (G,) the images in each group. `floor`: the
    power that rounding to 8 bits adds. `flat`: images without any variation; `replaced`: unreadable ones.
    """

    img_size: int
    n: int
    groups: np.ndarray
    sizes: np.ndarray
    floor: float = 0.0
    flat: int = 0
    replaced: int = 0
    source: str = ""

    @cached_property
    def rings(self) -> Rings:
        return Rings(self.n)

    @property
    def count(self) -> int:
        return int(self.sizes.sum())

    @property
    def k(self) -> np.ndarray:
        """Radial index of each ring (K,), from 0."""
        return self.rings.k.astype(np.float64)

    def group_power(self, channel: Channel = "mean") -> np.ndarray:
        """Power of one channel per group and ring, (G, K); "mean" is the mean over red, green and blue."""
        if channel == "mean":
            return np.asarray(self.groups[..., :3].mean(axis=-1))
        w = _WEIGHTS[channel]
        factors = [w[a] * w[b] * (1 if a == b else 2) for a, b in _PAIRS]
        return np.asarray(self.groups @ np.array(factors, dtype=np.float64))

    def power(self, channel: Channel = "mean") -> np.ndarray:
        """Mean power of a coefficient in each ring, (K,), in squared units of images in [-1, 1]."""
        return np.asarray(self.sizes @ self.group_power(channel) / self.count)

    def colours(self) -> np.ndarray:
        """Covariance of the channels in each ring, (K, 3, 3)."""
        pairs = np.tensordot(self.sizes, self.groups, 1) / self.count
        out = np.empty((len(pairs), 3, 3))
        for i, (a, b) in enumerate(_PAIRS):
            out[:, a, b] = out[:, b, a] = pairs[:, i]
        return out


class Meter:
    """Takes in images and gives their `Spectrum`. Memory does not grow beyond about a thousand images' rings."""

    def __init__(self, img_size: int, window_size: int | None = None, floor: float = 0.0) -> None:
        self.img_size, self.n, self.floor = img_size, window_size or img_size, floor
        if self.n < 2 or img_size % self.n:
            raise MlxSfError(f"spectrum: window size is {self.n}, want a divisor of the image size {img_size}")
        self.rings, self.flat = Rings(self.n), 0
        self._transform = Transform(self.n, self.n)
        self._groups: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._per_group = 1

    def add(self, images: np.ndarray) -> None:
        """Add images (B, 3, H, W) in [-1, 1]."""
        coefficients = self.coefficients(images)
        for f in coefficients:  # one by one: the products of a batch would be large
            products = np.stack([f[:, a] * f[:, b] for a, b in _PAIRS])
            means = self.rings.mean(products.mean(axis=1))  # over the windows, then over the rings
            variance = float((means[:3, 1:] @ self.rings.counts[1:]).mean()) / self.n**2
            self.flat += variance < ROUNDING_POWER
            self._put(means.T)

    def coefficients(self, images: np.ndarray) -> np.ndarray:
        """(B, windows, 3, n, n) float32 transforms of images (B, 3, H, W)."""
        x = mx.array(np.ascontiguousarray(images, dtype=np.float32))
        if x.shape[1:] != (3, self.img_size, self.img_size):
            want = f"(N, 3, {self.img_size}, {self.img_size})"
            raise MlxSfError(f"spectrum: images are {tuple(x.shape)}, want {want}")
        B, S, n = x.shape[0], self.img_size // self.n, self.n
        x = x.reshape(B, 3, S, n, S, n).transpose(0, 2, 4, 1, 3, 5).reshape(B, S * S, 3, n, n)
        # on the CPU: a GPU's reduced precision (TF32) would spill the mean brightness over every band
        with mx.stream(mx.cpu):
            return np.array(self._transform(x))

    def _put(self, means: np.ndarray) -> None:
        if self._sizes and self._sizes[-1] < self._per_group:
            self._groups[-1] += means
            self._sizes[-1] += 1
            return
        if len(self._groups) == MAX_GROUPS:  # pool neighbours
            self._groups = [a + b for a, b in zip(self._groups[::2], self._groups[1::2], strict=True)]
            self._sizes = [a + b for a, b in zip(self._sizes[::2], self._sizes[1::2], strict=True)]
            self._per_group *= 2
        self._groups.append(means)
        self._sizes.append(1)

    def finish(self, source: str = "", replaced: int = 0) -> Spectrum:
        """The spectrum so far. Raises `MlxSfError` where there are too few images, or none that varies."""
        sizes = np.array(self._sizes, dtype=np.float64)
        where = source or "spectrum"
        if sizes.sum() < MIN_IMAGES:
            raise MlxSfError(
                f"{where}: {int(sizes.sum())} image(s), want at least {MIN_IMAGES} for a spectrum with intervals: "
                f"add pictures, or raise {option('num_images')}"
            )
        if self.flat == sizes.sum():
            raise MlxSfError(
                f"{where}: all {self.flat} images are constant (no variation above 8-bit rounding): "
                "there is no spectrum to measure, check the data"
            )
        return self.so_far(source, replaced)

    def so_far(self, source: str = "", replaced: int = 0) -> Spectrum:
        """The spectrum of what came so far, be it one picture: too few for intervals, or without any variation."""
        sizes = np.array(self._sizes, dtype=np.float64)
        groups = np.stack(self._groups) / sizes[:, None, None]
        return Spectrum(self.img_size, self.n, groups, sizes, self.floor, self.flat, replaced, source)


def measure(source: Source, count: int, window_size: int | None = None, seed: int = 0) -> Spectrum:
    """The spectrum of `count` pictures of a source (all, if it has fewer), picked at random from `seed`.

    The pictures come through the training's own loader: the same crop, unreadable ones replaced, no mirroring.
    """
    if not source.endless:
        count = min(count, len(source))
        count -= count % _batch_size(count) if count == len(source) else 0  # the loader drops a last partial batch
    if count < MIN_IMAGES:
        raise MlxSfError(
            f"{source.describe()}: {count} picture(s) to measure, want at least {MIN_IMAGES}: "
            f"add pictures, or raise {option('num_images')}"
        )
    meter, batches = Meter(square_side(source), window_size, ROUNDING_POWER), loader(source, count, seed)
    with Progress(count, "spectrum", "pictures") as bar:
        for images, _ in pictures(batches, count):
            meter.add(images)
            bar.update(len(images))
    return meter.finish(source.describe(), len(batches.bad))


def square_side(source: Source) -> int:
    """The side of a source's square pictures in pixels."""
    height, width = source.size
    if height != width:
        raise MlxSfError(f"{source.describe()}: its pictures are {height}x{width}, want squares for a spectrum")
    return height


def _batch_size(count: int) -> int:
    return 16 if count >= 160 else 1


def loader(source: Source, count: int, seed: int) -> Loader:
    """The training's loader for `count` pictures in random order, none of them mirrored."""
    return Loader(source, _batch_size(count), seed, flip=False)


def pictures(batches: Loader, count: int) -> Iterator[tuple[np.ndarray, tuple[int | str, ...]]]:
    """The first `count` images (b, 3, H, W) in [-1, 1] with their b labels."""
    left = count
    for batch in batches.batches():
        take = min(left, len(batch.images))
        yield np.array(from_uint8(mx.array(batch.images[:take]))), batch.labels[:take]
        left -= take
        if not left:
            return


def check_sizes(source: Source, seed: int = 0) -> str | None:
    """Refuse a source whose pictures are mostly smaller than asked: enlarged, they have no fine detail of their own.

    Looks at no more than 200 of them. A few small ones are allowed; the sentence returned says how many.
    """
    sides, wanted = list(source.short_sides(seed, _CHECKED)), min(source.size)
    small = [s for s in sides if s < wanted]
    if not small:
        return None
    said = f"{len(small)} of {len(sides)} pictures looked at are smaller than {wanted} pixels (down to {min(small)})"
    if len(small) > _FEW * len(sides):
        fits = int(np.quantile(sides, _FEW))
        raise MlxSfError(
            f"{source.describe()}: {said}: enlarged, they hold no fine detail: pass {option('img_size')} {fits} "
            f"or less, or {option('enlarged')} to measure them all the same"
        )
    return said
