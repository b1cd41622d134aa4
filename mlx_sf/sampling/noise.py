"""Initial noise: from seeds, or from a file."""

import os
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import MlxSfError


def seeded_noise(seeds: Sequence[int], size: tuple[int, int]) -> mx.array:
    """Standard normal noise (B, 3, H, W), image i from `seeds[i]` alone, the same bits on every device of a machine."""
    with mx.stream(mx.cpu):
        return mx.stack([mx.random.normal((3, *size), key=mx.random.key(seed)) for seed in seeds])


def load_noise(path: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """Initial noise from an .npy file: standard normal, (N, 3, H, W), before the noise scale."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = getattr(e, "strerror", None) or "not a plain .npy array"
        raise MlxSfError(f"{path}: cannot be read as noise ({reason}), want float32 (N, 3, H, W)") from None
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[1:] != (3, *size) or array.dtype.kind != "f":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise MlxSfError(f"{path}: is {got}, want float32 noise of shape (N, 3, {size[0]}, {size[1]})")
    if len(array) == 0 or not np.isfinite(array).all():
        raise MlxSfError(f"{path}: is empty or holds NaN or infinite values, want standard normal noise")
    return array
