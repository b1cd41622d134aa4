"""The orthonormal 2D discrete cosine transform as matrix products, and the frequency of each of its coefficients."""

import math

import mlx.core as mx
import numpy as np


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


def radial_frequency(height: int, width: int | None = None) -> np.ndarray:
    """Radius r (height, width), float64, of each DCT coefficient: 0 at the mean, 1 at the highest frequency.

    r[u, v] = sqrt((u / (height - 1))^2 + (v / (width - 1))^2) / sqrt(2); `width` None means a square. Both at least 2.
    """
    width = height if width is None else width
    u, v = np.arange(height) / (height - 1), np.arange(width) / (width - 1)
    return np.hypot(u[:, None], v[None, :]) / math.sqrt(2)


def dct2(x: mx.array, rows: mx.array, columns: mx.array | None = None) -> mx.array:
    """Orthonormal 2D DCT-II over the last two axes of `x` (..., H, W).

    `rows` is `dct_matrix(H)` and `columns` `dct_matrix(W)`, None where they are the same.
    """
    return (rows @ x) @ (rows if columns is None else columns).T


def idct2(f: mx.array, rows: mx.array, columns: mx.array | None = None) -> mx.array:
    """Inverse of `dct2`."""
    return (rows.T @ f) @ (rows if columns is None else columns)


class Transform:
    """Orthonormal 2D DCT-II of images (..., height, width): float32 on MLX's device."""

    def __init__(self, height: int, width: int) -> None:
        self._rows = mx.array(dct_matrix(height).astype(np.float32))
        self._columns = mx.array(dct_matrix(width).astype(np.float32))

    def __call__(self, x: mx.array) -> mx.array:
        return dct2(x, self._rows, self._columns)
