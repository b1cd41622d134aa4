"""A checkpoint written again, smaller: one weight set, another type, fewer bits."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import __version__
from ..device.defaults import DTYPES
from ..errors import MlxSfError, option
from ..formats.shards import check_target
from ..formats.tensor_file import Entry, bits_of
from ..models import cast_products, parameter_shapes
from ..models.lora import merge
from ..models.quantize import FLOATS, QuantizationConfig, is_quantized, quantized_entries
from .adapters import read_adapters, whole_weights
from .checkpoint import Checkpoint, counted, save_checkpoint, stored_name, write_checkpoint
from .config import Config
from .resolve import resolve


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    q: QuantizationConfig,
    weights: Iterable[str] | None = None,
    dtype: str | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Config:
    """Write a checkpoint of floats with its linear layers quantised by `q`, holding one tensor at a time.

    `weights` names sets (default: as `Checkpoint.pick`); `dtype` is that of the products' operands that stay floats
    (default: as in `source`). `on_tensor(done, total)` is called after each tensor. Returns the new configuration.
    """
    checkpoint = Checkpoint(resolve(source))
    checkpoint.require_network()
    checkpoint.require_floats()
    checkpoint.file.verify()
    check_target(target)
    if Path(target).exists() and Path(target).samefile(checkpoint.path):
        raise MlxSfError(f"{target}: is the file to convert: choose another name for the result")
    q = q.of(checkpoint.kind)
    chosen = [checkpoint.pick(w) for w in weights] if weights else [checkpoint.pick()]
    shapes, kind = parameter_shapes(checkpoint.config.model), checkpoint.kind
    made = {"quantized_from": checkpoint.path.name, "quantized_by": f"mlx-sf {__version__}"}
    config = dataclasses.replace(
        checkpoint.config, weights=tuple(chosen), quantization=q, provenance={**checkpoint.config.provenance, **made}
    )
    entries: list[Entry] = []
    for name in chosen:
        floats = [_float_entry(checkpoint, name, key, shape, dtype, q) for key, shape in shapes.items()]
        entries += [
            dataclasses.replace(e, name=stored_name(config, name, e.name)) for e in quantized_entries(floats, q, kind)
        ]
    entries += [e for key, e in checkpoint.file.entries.items() if kind.companions and key.startswith(kind.companions)]
    write_checkpoint(target, counted(entries, on_tensor), config)
    return config


def _float_entry(
    checkpoint: Checkpoint, weights: str, key: str, shape: tuple[int, ...], dtype: str | None, q: QuantizationConfig
) -> Entry:
    """A tensor of a checkpoint, read when asked for; as float32 where it is going to be quantised."""
    name = stored_name(checkpoint.config, weights, key)
    entry = checkpoint.file.entries.get(name)
    kept = entry.dtype if entry is not None else "float32"
    kept = dtype if dtype is not None and checkpoint.kind.is_product_operand(key) else kept
    held = "float32" if is_quantized(key, q, checkpoint.kind) else kept

    def read() -> np.ndarray:
        return bits_of(np.asarray(checkpoint.tensor(name, FLOATS, shape).astype(mx.float32)), held)

    return Entry(key, held, shape, read)


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weights: str | None,
    dtype: str,
    cfg: float | None = None,
    lora_paths: Sequence[str | os.PathLike[str]] = (),
    lora_scales: Sequence[float] = (),
) -> int:
    """Write one weight set of `source` to `target`, the large matrices in `dtype`; returns the number of parameters.

    The configuration, class names included, goes along; optimiser state and the other sets stay behind. An adapter is
    worked into the network that it belongs to, and so are those of `lora_paths`, multiplied by `lora_scales`.
    """
    checkpoint = Checkpoint(resolve(source))
    name, config = checkpoint.pick(weights), checkpoint.config
    if checkpoint.kind.companions:
        raise MlxSfError(
            f"{checkpoint.path}: is a {checkpoint.kind.title}, which `mlx-sf convert` writes smaller; its adapters are "
            f"merged when it is loaded, with {option('merge_lora')}"
        )
    floats, made = whole_weights(checkpoint, name), dict(config.provenance)
    if config.adapter is not None:
        made |= {"adapter": str(config.adapter.lora), "base": config.adapter.base_name}
    for adapter in read_adapters(lora_paths, lora_scales, config.model):
        floats = merge(floats, adapter.lora, adapter.tensors, adapter.scale)
        made["adapters"] = [*made.get("adapters", []), str(adapter)]
    config = dataclasses.replace(config, adapter=None, provenance=made)
    tensors = cast_products(floats, DTYPES[dtype], checkpoint.kind)
    for key, w in tensors.items():
        if not mx.all(mx.isfinite(w)).item():
            raise MlxSfError(f"{checkpoint.path}: tensor {key!r} does not fit {dtype}: use bfloat16 or float32")
    if cfg is not None:
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, cfg=cfg))
    save_checkpoint(target, {name: tensors}, config)
    return sum(w.size for w in tensors.values())
