"""Spectral Forcing: a parameter-free, time-conditional 2D-DCT low-pass on a network's noisy input.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[u, v] = sigmoid( sharpness * (c(t) - r[u, v]) )

per channel, on the whole image or on non-overlapping windows; r is the radius of `dct.radial_frequency`. The cutoff c
opens with t, from `min_keep` at t = 0 (noise) to `max_keep` at t = 1 (data) where the schedule is the published one. At
t = 1 the published operator is close to the identity but not equal to it: the mask is 1/2 at the highest frequency, and
checkpoints were trained with that.

`SpectralForcing` is an ordinary `nn.Module` without parameters: put it in front of any patch embedder.
`cutoffs` and `masks` evaluate the same schedules and masks in float64 NumPy, for plots and measurements.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .common.fields import check_types, choice, numbers, require
from .dct import dct2, dct_matrix, idct2, radial_frequency
from .errors import MlxSfError

ScaleSchedule = Literal["linear", "fixed", "power", "cosine", "data"]
_LARGEST_EXPONENT = 80.0  # e^80 and its inverse fit a float32


@dataclass(frozen=True)
class ForcingConfig:
    """How the operator filters; whoever uses it says on which images.

    `window_size`: side of the square windows in pixels that are filtered on their own; 0 is the whole image.

    The mask passes frequencies below a cutoff radius c(t) (0 is the mean, 1 the highest frequency) with a soft edge of
    slope `mask_sharpness`. The published `scale_schedule`s open c from `min_keep` to `max_keep` with f(t) = t,
    "linear", or hold it at f = `fixed_scale`, from 0 to 1, "fixed". Ours beside them: "power", f = t**`schedule_power`;
    "cosine", f = (1 - cos(pi t)) / 2; "data", c(t) itself given as `schedule_cutoffs` at equal steps of t from 0 to 1,
    linear between.

    `exact_end` divides M(t) by M(1), so that the operator ends as the identity: the mask is exactly 1 at t = 1 for
    every coefficient. M grows with t, so the quotient does too and stays in [0, 1]; below radius 0.84 it differs by
    less than 1 %. Needs a schedule that opens to 1.

    Raises `FieldError` where values do not fit together.
    """

    window_size: int = 0
    scale_schedule: ScaleSchedule = "linear"
    fixed_scale: float = 1.0
    mask_sharpness: float = 30.0
    min_keep: float = 0.05
    max_keep: float = 1.0
    schedule_power: float = 1.0
    schedule_cutoffs: tuple[float, ...] = ()
    exact_end: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.window_size == 0 or self.window_size >= 2, "window_size", self.window_size, "0, or at least 2")
        object.__setattr__(self, "schedule_cutoffs", numbers("schedule_cutoffs", self.schedule_cutoffs))
        kind, cutoffs = self.scale_schedule, self.schedule_cutoffs
        choice("scale_schedule", kind, ScaleSchedule)
        require(0.0 <= self.fixed_scale <= 1.0, "fixed_scale", self.fixed_scale, "a scale from 0 to 1")
        require(self.schedule_power > 0, "schedule_power", self.schedule_power, "above 0")
        if kind != "power":
            require(self.schedule_power == 1, "schedule_power", self.schedule_power, f"1 with scale_schedule {kind}")
        if kind != "data":
            require(not cutoffs, "schedule_cutoffs", cutoffs, f"none with scale_schedule {kind}")
        else:
            require(len(cutoffs) >= 2, "schedule_cutoffs", cutoffs, "at least 2 radii with scale_schedule data")
            falls = [(a, b) for a, b in itertools.pairwise(cutoffs) if b < a]
            require(not falls, "schedule_cutoffs", falls[0] if falls else (), "radii that never fall")
            require(cutoffs[0] >= 0, "schedule_cutoffs", cutoffs[0], "a first radius of 0 or more")
            require(cutoffs[-1] >= 1, "schedule_cutoffs", cutoffs[-1], "a last radius of at least 1 (all frequencies)")
        if self.exact_end:
            require(kind != "fixed", "exact_end", True, "false with scale_schedule fixed, whose mask has no end")
            opens = self.min_keep <= self.max_keep and self.mask_sharpness > 0
            ok = kind == "data" or (opens and self.max_keep >= 1)
            want = "false unless max_keep is at least 1, min_keep below it and mask_sharpness above 0"
            require(ok and self.mask_sharpness > 0, "exact_end", True, want)

    def window(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what is filtered on its own in images of `size`, which it must divide."""
        if self.window_size == 0:
            return size
        n = self.window_size
        side = f"img_size {size[0]}" if size[0] == size[1] else f"{size[0]} and {size[1]}"
        require(size[0] % n == 0 and size[1] % n == 0, "window_size", n, f"a divisor of {side}, at least 2")
        return n, n

    def on(self, size: tuple[int, int]) -> "ForcingConfig":
        """The same operator for images of `size`: a window as large as the image is the whole image."""
        return dataclasses.replace(self, window_size=0) if self.window(size) == size else self


def cutoff(scale: mx.array, min_keep: float = 0.05, max_keep: float = 1.0) -> mx.array:
    """Cutoff radius for schedule values `scale`, which are clamped to [0, 1]."""
    return min_keep + (max_keep - min_keep) * mx.clip(scale.astype(mx.float32), 0.0, 1.0)


def radial_mask(
    scale: mx.array, radius: mx.array, sharpness: float = 30.0, min_keep: float = 0.05, max_keep: float = 1.0
) -> mx.array:
    """Soft low-pass masks (B, H, W), float32, for schedule values `scale` (B,) and radii (H, W)."""
    c = cutoff(scale, min_keep, max_keep).reshape(-1, 1, 1)
    return mx.sigmoid(sharpness * (c - radius))


def final_cutoff(config: ForcingConfig) -> float:
    """c(1), the cutoff radius at which the schedule ends."""
    c = config
    if c.scale_schedule == "data":
        return c.schedule_cutoffs[-1]
    return c.min_keep + (c.max_keep - c.min_keep) * c.fixed_scale if c.scale_schedule == "fixed" else c.max_keep


def still_closed(config: ForcingConfig, t: Any, xp: Any) -> Any:
    """c(1) - c(t) for times `t`, a float array of `xp` (`mlx.core` or `numpy`), clamped to [0, 1].

    A schedule is written as what it has left to open because that is exactly 0 at t = 1, on every device.
    """
    c, t = config, xp.clip(t, 0.0, 1.0)
    if c.scale_schedule == "fixed":
        return 0.0 * t
    if c.scale_schedule == "data":
        last = len(c.schedule_cutoffs) - 1
        closed = c.schedule_cutoffs[-1] - np.array(c.schedule_cutoffs)
        closed, step = (
            xp.array(v.astype(t.dtype if xp is np else np.float32)) for v in (closed, np.diff(closed, append=0.0))
        )
        u = t * last
        i = xp.floor(u if xp is np else mx.stop_gradient(u)).astype(xp.int32)
        return xp.take(closed, i) + xp.take(step, i) * (u - i)
    span = c.max_keep - c.min_keep
    if c.scale_schedule == "power":
        return span * (1.0 - t**c.schedule_power)
    if c.scale_schedule == "cosine":
        return span * xp.sin(math.pi / 2 * (1.0 - t)) ** 2  # equals span (1 - (1 - cos(pi t)) / 2)
    return span * (1.0 - t)


def cutoffs(config: ForcingConfig, t: np.ndarray | float) -> np.ndarray:
    """Cutoff radii c(t), float64, for times `t` of any shape, clamped to [0, 1]: where the mask is 1/2.

    A radius is a share of the highest frequency (`dct.radial_frequency`). With `exact_end` the renormalised mask is
    above 1/2 there, by at most a factor of 2.
    """
    return np.asarray(final_cutoff(config) - still_closed(config, np.asarray(t, np.float64), np))


def masks(config: ForcingConfig, size: tuple[int, int], t: np.ndarray | float) -> np.ndarray:
    """Masks (len(t), h, w), float64, at times `t` (a number or (T,)) for images of `size`; h x w is a window's size."""
    r, k = radial_frequency(*config.window(size)), config.mask_sharpness
    closed = still_closed(config, np.atleast_1d(np.asarray(t, np.float64)), np)[:, None, None]
    with np.errstate(over="ignore"):  # e^x = inf gives a mask of 0
        mask = 1 / (1 + np.exp(k * (r - final_cutoff(config) + closed)))
    if config.exact_end:
        mask = mask / masks(dataclasses.replace(config, exact_end=False), size, 1.0)
    return np.asarray(mask)


def describe_forcing(config: ForcingConfig) -> str:
    """The operator in words; equal words mean the same operator."""
    c = config
    text = {
        "linear": "linear",
        "fixed": f"fixed at {c.fixed_scale}",
        "power": f"power {c.schedule_power}",
        "cosine": "cosine",
        "data": "data " + ",".join(f"{v}" for v in c.schedule_cutoffs),
    }[c.scale_schedule]
    if c.scale_schedule != "data" and (c.min_keep, c.max_keep) != (0.05, 1.0):
        text += f" from {c.min_keep} to {c.max_keep}"
    if c.mask_sharpness != 30:
        text += f", sharpness {c.mask_sharpness}"
    if c.window_size:
        text += f", windows of {c.window_size}"
    return text + (", exact end" if c.exact_end else "")


class SpectralForcing(nn.Module):
    """The operator SF_t on images of one size. No parameters; differentiable; runs under `mx.compile`.

    Args:
        img_size: side of square images in pixels, or (height, width); at least 2.
        window_size: side of the windows that are filtered on their own; None for the whole image.
        channels_last: images are (B, H, W, C), as is usual in MLX; the default is the reference's (B, C, H, W).
        The others are the fields of `ForcingConfig`, which explains them.

    Raises `MlxSfError` where the arguments do not fit together. `SpectralForcing.of(config, size)` takes them from a
    `ForcingConfig`.

    Call with images of any float type and t, a scalar or (B,), in [0, 1]. The arithmetic is float32; the result has
    the type and shape of the images. Works on any number of channels.

    Source: Spectral Forcing; as written at the head of this module.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        window_size: int | None = None,
        scale_schedule: ScaleSchedule = "linear",
        fixed_scale: float = 1.0,
        mask_sharpness: float = 30.0,
        min_keep: float = 0.05,
        max_keep: float = 1.0,
        channels_last: bool = False,
        *,
        schedule_power: float = 1.0,
        schedule_cutoffs: Sequence[float] = (),
        exact_end: bool = False,
    ) -> None:
        super().__init__()
        try:
            size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
            for side in size:
                ok = isinstance(side, int) and not isinstance(side, bool) and 2 <= side <= 8192
                require(ok, "img_size", img_size, "2 to 8192 pixels")
            c = self._config = ForcingConfig(
                window_size or 0, scale_schedule, fixed_scale, mask_sharpness, min_keep, max_keep,
                schedule_power, tuple(schedule_cutoffs), exact_end,
            ).on(size)  # fmt: skip
            h, w = c.window(size)
        except MlxSfError as e:
            raise MlxSfError(f"SpectralForcing: {e.message}") from None
        self.size, self.channels_last = size, channels_last
        # underscores: MLX would count public arrays as parameters
        self._rows = mx.array(dct_matrix(h).astype(np.float32))
        self._columns = self._rows if h == w else mx.array(dct_matrix(w).astype(np.float32))
        k = c.mask_sharpness
        rise = k * (radial_frequency(h, w) - final_cutoff(c))
        largest = 1 + max(map(abs, (c.min_keep, c.max_keep, *c.schedule_cutoffs)))
        self._separable = abs(k) * largest <= _LARGEST_EXPONENT
        self._rise = mx.array((np.exp(rise) if self._separable else rise).astype(np.float32))

    @classmethod
    def of(cls, config: ForcingConfig, size: int | tuple[int, int], channels_last: bool = False) -> "SpectralForcing":
        """The operator of a configuration on images of `size`: a side in pixels, or (height, width)."""
        return cls(size, channels_last=channels_last, **{f.name: getattr(config, f.name) for f in _FIELDS})

    @property
    def config(self) -> ForcingConfig:
        return self._config

    def mask(self, t: mx.array) -> mx.array:
        """Masks (B, h, w) for times t (B,), or (1, h, w) for one t or a fixed schedule; h x w is a window's size."""
        t = mx.zeros(1) if self._config.scale_schedule == "fixed" else mx.reshape(t, (-1,)).astype(mx.float32)
        d = self._config.mask_sharpness * still_closed(self._config, t, mx)[:, None, None]
        if not self._separable:
            mask = mx.sigmoid(-self._rise - d)
            return mx.where(d > 0, mx.minimum(mask / mx.sigmoid(-self._rise), 1), 1) if self._config.exact_end else mask
        # sigmoid(k (c(t) - r)) = 1 / (1 + e^(k (r - c(1))) e^(k (c(1) - c(t)))): a table times a number per image
        opened = 1 + self._rise * mx.exp(d)
        return (1 + self._rise) / opened if self._config.exact_end else 1 / opened

    def __call__(self, x: mx.array, t: mx.array) -> mx.array:
        z = x.astype(mx.float32)
        if self.channels_last:
            z = mx.moveaxis(z, -1, 1)
        B, C, H, W = z.shape
        if self.size != (H, W):
            raise MlxSfError(f"SpectralForcing: images are {H}x{W}, want {self.size[0]}x{self.size[1]}")
        h, w = self._config.window(self.size)
        mask = self.mask(t)
        if (h, w) == (H, W):
            z = self._filtered(z, mask[:, None])
        else:
            z = z.reshape(B, C, H // h, h, W // w, w).swapaxes(3, 4)  # (B, C, H/h, W/w, h, w)
            z = self._filtered(z, mask[:, None, None, None])
            z = z.swapaxes(3, 4).reshape(B, C, H, W)
        if self.channels_last:
            z = mx.moveaxis(z, 1, -1)
        return z.astype(x.dtype)

    def _filtered(self, z: mx.array, mask: mx.array) -> mx.array:
        return idct2(dct2(z, self._rows, self._columns) * mask, self._rows, self._columns)


_FIELDS = dataclasses.fields(ForcingConfig)
