"""uint8 pictures <-> values in [-1, 1]: the one place where either becomes the other."""

import mlx.core as mx
import numpy as np

# rounding to 8 bits puts this power on every coefficient of an image in [-1, 1]: less is no signal
ROUNDING_POWER = (2 / 255) ** 2 / 12


def to_uint8(x: mx.array | np.ndarray) -> np.ndarray:
    """Images (..., 3, H, W) in [-1, 1] -> pictures (..., H, W, 3) uint8: 255 (x + 1) / 2, clipped, ties to even."""
    v = np.asarray(x, dtype=np.float32)
    v = (v + np.float32(1)) / np.float32(2) * np.float32(255)
    return np.moveaxis(np.round(np.clip(v, 0, 255)), -3, -1).astype(np.uint8)


def to_uint8_half_up(x: mx.array | np.ndarray) -> np.ndarray:
    """As `to_uint8`, by MiniT2I's rule: 127.5 x + 128, clipped, cut off, which is 255 (x + 1) / 2 with ties up."""
    v = np.float32(127.5) * np.asarray(x, dtype=np.float32) + np.float32(128)
    return np.moveaxis(np.clip(v, 0, 255), -3, -1).astype(np.uint8)


def from_uint8(pictures: mx.array) -> mx.array:
    """uint8 pictures (B, H, W, 3) -> images (B, 3, H, W) float32 in [-1, 1], rounded as in the reference."""
    return 2 * (pictures.astype(mx.float32) / 255).transpose(0, 3, 1, 2) - 1


def difference(a: np.ndarray, b: np.ndarray, times: int = 1) -> np.ndarray:
    """|a - b| of uint8 pictures of one shape, `times` as bright and cut off at white."""
    apart = np.abs(a.astype(np.int32) - b.astype(np.int32))
    return np.minimum(times * apart, 255).astype(np.uint8)
