"""Spectral Forcing: a parameter-free, time-conditional 2D-DCT low-pass on a network's noisy input.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[i, j] = sigmoid( sharpness * (c(t) - r[i, j]) )

per channel, on the whole image or on non-overlapping windows. The cutoff c opens with t, from `min_keep` at t = 0
(noise) to `max_keep` at t = 1 (data) where the schedule is the published one. At t = 1 the published operator is close
to the identity but not equal to it: the mask is 1/2 at the highest frequency, and checkpoints were trained with that.

`SpectralForcing` is an ordinary `nn.Module` without parameters: put it in front of any patch embedder.
`cutoffs` and `masks` evaluate the same schedules and masks in float64 NumPy, for plots and measurements.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import FORCING_FIELDS, ModelConfig, ScaleSchedule
from .errors import MlxSfError

_LARGEST_EXPONENT = 80.0  # e^80 and its inverse fit a float32


def dct_matrix(n: int) -> np.ndarray:
    """Orthonormal DCT-II matrix A (n, n), float64: `A[k, m] = s_k cos(pi (m + 1/2) k / n)`.

    `A @ x` is the transform of a column and `A.T @ f` its inverse. Evaluated in float64: float32 angles of up to pi n
    would cost three digits at n = 256.
    """
    k, m = np.arange(n)[:, None], np.arange(n)[None, :]
    # cos has period 4n in the integer (2m + 1) k: reducing it first keeps the angles small and the entries exact
    a = np.cos(np.pi * ((2 * m + 1) * k % (4 * n)) / (2 * n)) * math.sqrt(2 / n)
    a[0] = math.sqrt(1 / n)
    return a


def radial_frequency(n: int) -> np.ndarray:
    """Radius r (n, n), float64, of each DCT coefficient: 0 at the mean, 1 at the highest frequency."""
    i = np.arange(n, dtype=np.float64)
    return np.hypot(i[:, None], i[None, :]) / (math.sqrt(2) * (n - 1))


def cutoff(scale: mx.array, min_keep: float = 0.05, max_keep: float = 1.0) -> mx.array:
    """Cutoff radius for schedule values `scale`, which are clamped to [0, 1]."""
    return min_keep + (max_keep - min_keep) * mx.clip(scale.astype(mx.float32), 0.0, 1.0)


def radial_mask(
    scale: mx.array, radius: mx.array, sharpness: float = 30.0, min_keep: float = 0.05, max_keep: float = 1.0
) -> mx.array:
    """Soft low-pass masks (B, n, n), float32, for schedule values `scale` (B,) and radii (n, n)."""
    c = cutoff(scale, min_keep, max_keep).reshape(-1, 1, 1)
    return mx.sigmoid(sharpness * (c - radius))


def dct2(x: mx.array, a: mx.array) -> mx.array:
    """Orthonormal 2D DCT-II over the last two axes of `x` (..., n, n), with `a` = `dct_matrix(n)`."""
    return (a @ x) @ a.T


def idct2(f: mx.array, a: mx.array) -> mx.array:
    """Inverse of `dct2`."""
    return (a.T @ f) @ a


def final_cutoff(config: ModelConfig) -> float:
    """c(1), the cutoff radius at which the schedule ends."""
    c = config
    if c.scale_schedule == "data":
        return c.schedule_cutoffs[-1]
    return c.min_keep + (c.max_keep - c.min_keep) * c.fixed_scale if c.scale_schedule == "fixed" else c.max_keep


def still_closed(config: ModelConfig, t: Any, xp: Any) -> Any:
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


def cutoffs(config: ModelConfig, t: np.ndarray | float) -> np.ndarray:
    """Cutoff radii c(t), float64, for times `t` of any shape, clamped to [0, 1]: where the mask is 1/2.

    A radius is a share of the highest frequency (`radial_frequency`). With `exact_end` the renormalised mask is above
    1/2 there, by at most a factor of 2.
    """
    return np.asarray(final_cutoff(config) - still_closed(config, np.asarray(t, np.float64), np))


def masks(config: ModelConfig, t: np.ndarray | float) -> np.ndarray:
    """Masks (len(t), n, n), float64, of the forcing at times `t` (a number or (T,)); n is the side of a window."""
    r, k = radial_frequency(config.window_size), config.mask_sharpness
    closed = still_closed(config, np.atleast_1d(np.asarray(t, np.float64)), np)[:, None, None]
    with np.errstate(over="ignore"):  # e^x = inf gives a mask of 0
        mask = 1 / (1 + np.exp(k * (r - final_cutoff(config) + closed)))
    if config.exact_end:
        mask = mask / masks(dataclasses.replace(config, exact_end=False), 1.0)
    return np.asarray(mask)


def describe_forcing(config: ModelConfig) -> str:
    """The operator of a configuration in words; equal words mean the same operator, up to the image's size."""
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
    if c.window_size != c.img_size:
        text += f", windows of {c.window_size}"
    return text + (", exact end" if c.exact_end else "")


class SpectralForcing(nn.Module):
    """The operator SF_t on images of side `img_size`. No parameters; differentiable; runs under `mx.compile`.

    Args:
        img_size: side of the (square) images in pixels.
        window_size: side of the windows that are filtered on their own; None or `img_size` for the whole image.
        scale_schedule: how the cutoff opens with t, from `min_keep` (t = 0) to `max_keep` (t = 1): "linear" as
            published, "power" as t**`schedule_power`, "cosine" as (1 - cos(pi t)) / 2; "data" takes the radii
            `schedule_cutoffs` instead, at equal steps of t from 0 to 1, linear between; "fixed" keeps it at
            `fixed_scale` (0 to 1) at all times.
        mask_sharpness: slope of the soft mask. min_keep, max_keep: cutoff radius at schedule values 0 and 1.
        exact_end: divide the mask M(t) by M(1), so that the operator ends as the identity: the mask is exactly 1 at
            t = 1 for every coefficient, where the published one falls to 1/2 at the highest frequency. M grows with t,
            so the quotient grows with t too and stays in [0, 1]. M(1) is 1/2 at radius 1 and above 0.99 below radius
            0.84: it changes the highest frequencies, at most by a factor of 2. Needs a schedule that opens to 1.
        channels_last: images are (B, H, W, C), as is usual in MLX; the default is the reference's (B, C, H, W).

    Raises `MlxSfError` where the arguments do not fit together. `SpectralForcing.of(config)` takes them from a model's
    configuration.

    Call with images of any float type and t, a scalar or (B,), in [0, 1]. The arithmetic is float32; the result has
    the type of the images. Works on any number of channels.
    """

    def __init__(
        self,
        img_size: int,
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
        try:  # a configuration checks its own fields; those of the network behind the operator do not matter here
            c = self._config = ModelConfig(
                img_size=img_size,
                patch_size=img_size,
                window_size=window_size or 0,
                scale_schedule=scale_schedule,
                fixed_scale=fixed_scale,
                mask_sharpness=mask_sharpness,
                min_keep=min_keep,
                max_keep=max_keep,
                schedule_power=schedule_power,
                schedule_cutoffs=tuple(schedule_cutoffs),
                exact_end=exact_end,
            )
        except MlxSfError as e:
            raise MlxSfError(str(e).replace("config:", "SpectralForcing:")) from None
        self.img_size, self.window_size, self.channels_last = c.img_size, c.window_size, channels_last
        n, k = c.window_size, c.mask_sharpness
        # underscores: MLX would count public arrays as parameters
        self._dct = mx.array(dct_matrix(n).astype(np.float32))
        rise = k * (radial_frequency(n) - final_cutoff(c))
        largest = 1 + max(map(abs, (c.min_keep, c.max_keep, *c.schedule_cutoffs)))
        self._separable = abs(k) * largest <= _LARGEST_EXPONENT
        self._rise = mx.array((np.exp(rise) if self._separable else rise).astype(np.float32))

    @classmethod
    def of(cls, config: ModelConfig, channels_last: bool = False) -> "SpectralForcing":
        """The operator that a network of this configuration has on its input."""
        options = {name: getattr(config, name) for name in FORCING_FIELDS}
        return cls(config.img_size, channels_last=channels_last, **options)

    def mask(self, t: mx.array) -> mx.array:
        """Masks (B, n, n) for times t (B,), or (1, n, n) for one t or a fixed schedule."""
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
        if (self.img_size, self.img_size) != (H, W):
            raise MlxSfError(f"SpectralForcing: images are {H}x{W}, want {self.img_size}x{self.img_size}")
        n, S = self.window_size, self.img_size // self.window_size
        mask = self.mask(t)
        if S == 1:
            z = idct2(dct2(z, self._dct) * mask[:, None], self._dct)
        else:
            z = z.reshape(B, C, S, n, S, n).swapaxes(3, 4)  # (B, C, S, S, n, n)
            z = idct2(dct2(z, self._dct) * mask[:, None, None, None], self._dct)
            z = z.swapaxes(3, 4).reshape(B, C, H, W)
        if self.channels_last:
            z = mx.moveaxis(z, 1, -1)
        return z.astype(x.dtype)
