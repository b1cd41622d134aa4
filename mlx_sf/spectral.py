"""Spectral Forcing: a parameter-free, time-conditional 2D-DCT low-pass on a network's noisy input.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[i, j] = sigmoid( sharpness * (c(t) - r[i, j]) )

per channel, on the whole image or on non-overlapping windows. The cutoff c opens from `min_keep` at t = 0 (noise) to
`max_keep` at t = 1 (data). At t = 1 the operator is close to the identity but not equal to it: the mask is 1/2 at the
highest frequency, and checkpoints were trained with that.

`SpectralForcing` is an ordinary `nn.Module` without parameters: put it in front of any patch embedder.
"""

import math
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import MlxSfError


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


class SpectralForcing(nn.Module):
    """The operator SF_t on images of side `img_size`. No parameters; differentiable; runs under `mx.compile`.

    Args:
        img_size: side of the (square) images in pixels.
        window_size: side of the windows that are filtered on their own; None or `img_size` for the whole image.
        scale_schedule: "linear" opens the cutoff with t; "fixed" keeps it at `fixed_scale` (0 to 1) at all times.
        mask_sharpness: slope of the soft mask. min_keep, max_keep: cutoff radius at schedule values 0 and 1.
        channels_last: images are (B, H, W, C), as is usual in MLX; the default is the reference's (B, C, H, W).

    Call with images of any float type and t, a scalar or (B,), in [0, 1]. The arithmetic is float32; the result has
    the type of the images. Works on any number of channels.
    """

    def __init__(
        self,
        img_size: int,
        window_size: int | None = None,
        scale_schedule: Literal["linear", "fixed"] = "linear",
        fixed_scale: float = 1.0,
        mask_sharpness: float = 30.0,
        min_keep: float = 0.05,
        max_keep: float = 1.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        n = window_size or img_size
        if n < 2 or img_size % n:
            raise MlxSfError(f"SpectralForcing: window_size is {n}, want a divisor of img_size {img_size}, at least 2")
        if scale_schedule not in ("linear", "fixed"):
            raise MlxSfError(f"SpectralForcing: scale_schedule is {scale_schedule!r}, want 'linear' or 'fixed'")
        self.img_size, self.window_size, self.channels_last = img_size, n, channels_last
        self.fixed_scale = fixed_scale if scale_schedule == "fixed" else None
        self.mask_sharpness, self.min_keep, self.max_keep = mask_sharpness, min_keep, max_keep
        # underscores: MLX would count public arrays as parameters
        self._dct = mx.array(dct_matrix(n).astype(np.float32))
        self._radius = mx.array(radial_frequency(n).astype(np.float32))

    def mask(self, t: mx.array) -> mx.array:
        """Masks (B, n, n) for times t (B,), or (1, n, n) for one t or a fixed schedule."""
        scale = mx.reshape(t, (-1,)) if self.fixed_scale is None else mx.array([self.fixed_scale])
        return radial_mask(scale, self._radius, self.mask_sharpness, self.min_keep, self.max_keep)

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
