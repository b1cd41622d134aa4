"""Foreign checkpoints become mlx-sf's own; one file per network knows its keys. `convert` chooses by what a file is."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...errors import FieldError, MlxSfError, option
from ...formats.tensor_file import SUFFIXES
from ...models.quantize import QuantizationConfig
from ..export import quantize_checkpoint
from . import jit
from .jit import Report

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weights: str | Iterable[str] | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    on_tensor: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Report:
    """Convert a PyTorch checkpoint, or quantise one of mlx-sf, to one self-describing file.

    Args:
        source: a `.pth` of the JiT trainer or a bare state dict, read without PyTorch and without running anything in
            it. With `quantize` also a checkpoint of mlx-sf: a file, a run's folder, a Hugging Face repo id.
        target: the file to write, `.npz` or `.safetensors`; whatever was there stays until the new file is complete.
        weights: "model", "ema1" or "ema2", or several of them; None is ema1, or the only set there is.
        dtype: "float32", "float16" or "bfloat16", of the large matrices; None is float32, or as in the checkpoint.
        quantize: 8 or 4 bits for the blocks' products, for drawing only; None keeps floats.
        group_size: weights that share a scale and a bias, 32, 64 or 128.
        on_tensor: called as on_tensor(done, total) after each tensor.
        settings: what the file does not say, by the names of the configuration (noise_scale=1.0, in_context_start=4,
            ...). One that contradicts the file is an error.

    Returns what was done; its `config` is what the new file says. Peak memory is about one tensor. Raises `MlxSfError`
    where the file is damaged, of another network, or does not say what it must.
    """
    q = None if quantize is None else QuantizationConfig(quantize, group_size)
    sets = [weights] if isinstance(weights, str) else None if weights is None else list(weights)
    if not is_own(source, q):
        return jit.convert(source, target, sets, dtype or "float32", settings, on_tensor, q)
    if settings:
        raise MlxSfError(f"{source}: says its settings itself: leave out {option(next(iter(settings)).lower())}")
    if q is None:
        raise FieldError("quantize", None, "8 or 4 bits for a checkpoint of mlx-sf", str(source))
    return Report(quantize_checkpoint(source, target, q, sets, dtype, on_tensor), "mlx-sf")


def is_own(source: str | os.PathLike[str], q: QuantizationConfig | None) -> bool:
    """Whether `source` is a checkpoint of mlx-sf, which only quantising has use for; `MlxSfError` without."""
    path = Path(source)
    if path.suffix in SUFFIXES or path.is_dir():
        if q is None:
            raise MlxSfError(
                f"{source}: is no PyTorch file; a checkpoint of mlx-sf is converted with {option('quantize')} only"
            )
        return True
    return q is not None and not path.exists() and path.suffix not in _TORCH_SUFFIXES
