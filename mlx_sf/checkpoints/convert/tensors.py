"""What all converters do with tensors: read lazily, checked against the network's shapes, rounded, written."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import MlxSfError, option
from ...formats.tensor_file import Entry, bits_of
from ...models import architecture, parameter_count, parameter_shapes
from ...models.quantize import QuantizationConfig, is_quantized, quantized_entries
from ..checkpoint import counted, size_on_disk, write_checkpoint
from ..config import Config
from .report import Report


class Tensor(Protocol):
    """A tensor in a file: float types by name, read when asked for (bfloat16 as float32)."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]


class SafeTensor:
    """A tensor of a `.safetensors`; bfloat16 is widened to float32 when read."""

    def __init__(self, entry: Entry) -> None:
        self._entry, self.dtype, self.shape = entry, entry.dtype, entry.shape

    def read(self) -> np.ndarray:
        bits = self._entry.read()
        return (bits.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else bits


def network_entries(
    tensors: Tensors,
    config: Any,
    dtype: str,
    where: str,
    q: QuantizationConfig | None = None,
    stored_as: Callable[[str, Shape], Sequence[Shape]] = lambda key, shape: [shape],
) -> list[Entry]:
    """The network's tensors as lazy entries in its own layout; every key is accounted for.

    `stored_as` gives the shapes in which a tensor may lie in the file, each with the same order of elements.
    """
    shapes, kind = parameter_shapes(config), architecture(config)
    missing = [k for k in shapes if k not in tensors]
    extra = [k for k in tensors if k not in shapes]
    if missing or extra:
        parts = [f"lacks {missing[0]!r}" + _more(missing)] if missing else []
        parts += [f"has {extra[0]!r}" + _more(extra) + ", which is not part of the network"] if extra else []
        raise MlxSfError(f"{where}: {'; '.join(parts)}: not a {kind.title} this program knows")
    entries = []
    for key, shape in shapes.items():
        ref = tensors[key]
        if not any(ref.shape == s for s in stored_as(key, shape)):
            raise MlxSfError(f"{where}: tensor {key!r} has shape {ref.shape}, want {shape}")
        if not ref.dtype.startswith(("float", "bfloat")):
            raise MlxSfError(f"{where}: tensor {key!r} is {ref.dtype}, want a float type")
        rounded = kind.is_product_operand(key) and not is_quantized(key, q, kind)
        entries.append(_entry(key, shape, ref, dtype if rounded else "float32", where))
    return entries if q is None else quantized_entries(entries, q, kind)


def _entry(key: str, shape: tuple[int, ...], ref: Tensor, dtype: str, where: str) -> Entry:
    def read() -> np.ndarray:
        values = ref.read().reshape(shape)
        if not np.isfinite(values).all():
            raise MlxSfError(f"{where}: tensor {key!r} holds NaN or infinite values: take another checkpoint")
        with np.errstate(over="ignore"):
            bits = bits_of(values, dtype)
        if dtype == "float16" and not np.isfinite(bits).all():
            raise MlxSfError(f"{where}: tensor {key!r} does not fit float16: use {option('dtype')} bfloat16 or float32")
        return bits

    return Entry(key, dtype, shape, read)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def write(
    target: str | os.PathLike[str],
    entries: list[Entry],
    config: Config,
    report: Report,
    on_tensor: Callable[[int, int], None] | None,
) -> Report:
    """Write the converted tensors with their final configuration, and complete the report."""
    report.config, report.parameters = config, parameter_count(config.model)
    write_checkpoint(target, counted(entries, on_tensor), config)
    report.bytes = size_on_disk(target)
    return report
