"""`convert`: foreign checkpoints become mlx-sf's own, and mlx-sf's own are quantised."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import MlxSfError, option
from ..models.quantize import QuantizationConfig
from .convert.report import Report
from .export import quantize_checkpoint
from .resolve import convert_found, locate


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
    """Convert a foreign checkpoint, or quantise one of mlx-sf, to one self-describing file.

    Args:
        source: a `.pth` of the JiT trainer or a bare state dict, read without PyTorch and without running anything in
            it; a folder or `.safetensors` in a diffusers layout; a short name of `mlx-sf models`, or a place on the
            Hugging Face Hub. With `quantize` also a checkpoint of mlx-sf: a file, a run's folder.
        target: the file to write, `.npz` or `.safetensors`; whatever was there stays until the new file is complete. A
            name without suffix becomes a new folder of shards.
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
    found = locate(source)
    if found.kind != "own":
        return convert_found(found, target, settings, on_tensor, dtype, q, sets)
    if q is None:
        raise MlxSfError(
            f"{source}: is no PyTorch file; a checkpoint of mlx-sf is converted with {option('quantize')} only"
        )
    if settings:
        raise MlxSfError(f"{source}: says its settings itself: leave out {option(next(iter(settings)).lower())}")
    return Report(quantize_checkpoint(found.path, target, q, sets, dtype, on_tensor), "mlx-sf")
