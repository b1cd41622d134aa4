"""Quantised linear layers for inference: 8 or 4 bits a weight, a scale and a bias per group of neighbours in a row.

A weight is scale * code + bias. In a file, "NAME.weight" holds the codes packed into uint32 (MLX's layout),
"NAME.scales" and "NAME.biases" one bfloat16 each per group. Rows whose length is no multiple of the group (the
feed-forward's 2730 and 3413 in L and H, which no group size divides) are filled up with zeros, and so are their
inputs: the products stay exact.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from ..common.fields import check_types, require
from ..formats.tensor_file import Entry
from . import Architecture
from .layers import Linear


@dataclass(frozen=True)
class QuantizationConfig:
    """Linear layers whose weights are held in few `bits` (8 or 4), for inference only.

    Along a row, `group_size` neighbours share a scale and a bias. `layers` are the kinds of layers this applies to; by
    default the blocks' products, 96 % of JiT-B/32. The rest is small and costs more precision than it saves memory.
    """

    bits: int
    group_size: int = 64
    layers: tuple[str, ...] = ("attention", "feed_forward", "modulation")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.bits in (4, 8), "quantization bits", self.bits, "8 or 4")
        require(self.group_size in (32, 64, 128), "quantization group_size", self.group_size, "32, 64 or 128")
        ok = isinstance(self.layers, (list, tuple)) and all(isinstance(k, str) for k in self.layers)
        require(ok, "quantization layers", self.layers, "a list of kinds of layers")
        object.__setattr__(self, "layers", tuple(self.layers))
        ok = len(self.layers) >= 1 and len(set(self.layers)) == len(self.layers)
        require(ok, "quantization layers", self.layers, "different kinds of layers, at least one")

    def of(self, kind: Architecture) -> "QuantizationConfig":
        """The same for a network of this architecture: the default leaves out layers that it does not have."""
        if self.layers != QuantizationConfig(8).layers:
            return self
        return dataclasses.replace(self, layers=tuple(k for k in self.layers if k in kind.layer_kinds))

    def check(self, kind: Architecture) -> None:
        """Refuse layers that a network of this architecture does not have."""
        for layer in self.layers:
            require(layer in kind.layer_kinds, "quantization layers", layer, "one of " + ", ".join(kind.layer_kinds))


FLOATS = ("float32", "float16", "bfloat16")
_Shape = tuple[int, ...]


def is_quantized(name: str, q: QuantizationConfig | None, kind: Architecture) -> bool:
    """Whether parameter `name` of a network is held quantised: the weights of the layers that `q` names.

    The default of `QuantizationConfig.layers` is the policy, found by measuring (`mlx-sf bench quantize`): patch
    embedder, time embedder and head are 3 % of a network and would cost as much precision as all blocks together.
    """
    return q is not None and name.endswith(".weight") and kind.layer_kind(name) in q.layers


def padded(width: int, q: QuantizationConfig) -> int:
    """Row length in the file: the next multiple of the group size."""
    return -(-width // q.group_size) * q.group_size


def stored(
    name: str, shape: _Shape, q: QuantizationConfig | None, kind: Architecture
) -> dict[str, tuple[tuple[str, ...], _Shape]]:
    """The tensors that stand for a parameter in a file: name -> (possible types, shape)."""
    if q is None or not is_quantized(name, q, kind):
        return {name: (FLOATS, shape)}
    rows, width = shape[0], padded(shape[1], q)
    base, groups = name.removesuffix("weight"), (rows, width // q.group_size)
    return {
        name: (("uint32",), (rows, width * q.bits // 32)),
        base + "scales": (FLOATS, groups),
        base + "biases": (FLOATS, groups),
    }


def quantize(weight: mx.array, q: QuantizationConfig) -> tuple[mx.array, mx.array, mx.array]:
    """Codes (rows, words) uint32, scales and biases (rows, groups) bfloat16 of a weight (rows, width).

    The codes are chosen for the scales and biases as bfloat16 keeps them, so that these are the same in every compute
    type; rounding them afterwards would double the error at 8 bits.
    """
    rows, width = weight.shape
    weight = mx.pad(weight.astype(mx.float32), [(0, 0), (0, padded(width, q) - width)])
    _, scales, biases = mx.quantize(weight, group_size=q.group_size, bits=q.bits)
    scales, biases = scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)
    step, low = (v.astype(mx.float32)[..., None] for v in (scales, biases))
    codes = (weight.reshape(rows, -1, q.group_size) - low) / mx.where(step == 0, 1, step)
    codes = mx.clip(mx.round(codes), 0, 2**q.bits - 1).astype(mx.uint32)
    # a word holds 32 / bits neighbours, the first in its lowest bits
    places = mx.arange(0, 32, q.bits, dtype=mx.uint32)
    words = mx.left_shift(codes.reshape(rows, -1, 32 // q.bits), places).sum(axis=-1).astype(mx.uint32)
    return words, scales, biases


def quantized_entries(entries: Iterable[Entry], q: QuantizationConfig, kind: Architecture) -> list[Entry]:
    """Entries of a network's float tensors, the quantisable ones replaced by three each; read one at a time."""
    result = []
    for e in entries:
        result += _quantized(e, q, kind) if is_quantized(e.name, q, kind) else [e]
    return result


def _quantized(e: Entry, q: QuantizationConfig, kind: Architecture) -> list[Entry]:
    parts = stored(e.name, e.shape, q, kind)
    held: dict[str, mx.array] = {}

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if name not in held:  # the parts are written one after another: computed with the first, dropped as read
                held.update(zip(parts, quantize(e.array(), q), strict=True))
            value = held.pop(name)
            return np.asarray(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)

        return read

    return [
        Entry(name, "uint32" if "uint32" in types else "bfloat16", shape, reader(name))
        for name, (types, shape) in parts.items()
    ]


def dequantize(codes: mx.array, scales: mx.array, biases: mx.array, width: int, q: QuantizationConfig) -> mx.array:
    """The float32 weight (rows, width) that its quantised parts stand for."""
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, group_size=q.group_size, bits=q.bits)[:, :width]


def dequantized(
    tensors: Iterable[tuple[str, mx.array]], shapes: Mapping[str, _Shape], q: QuantizationConfig, kind: Architecture
) -> Iterator[tuple[str, mx.array]]:
    """The float tensors, named and shaped as in `shapes`, that stored ones stand for; those come in `stored` order."""
    tensors = iter(tensors)
    for name, value in tensors:
        if is_quantized(name, q, kind):
            (_, scales), (_, biases) = next(tensors), next(tensors)
            value = dequantize(value, scales, biases, shapes[name][1], q)
        yield name, value


class QuantizedLinear(nn.Module):
    """`x W^T + b` with quantised W, in place of `layers.Linear`; computed in the scales' float type."""

    def __init__(self, dims_in: int, dims_out: int, bias: bool, q: QuantizationConfig) -> None:
        super().__init__()
        self.bits, self.group_size = q.bits, q.group_size
        self.padding = padded(dims_in, q) - dims_in
        width = dims_in + self.padding
        self.weight = mx.zeros((dims_out, width * q.bits // 32), mx.uint32)
        self.scales = mx.zeros((dims_out, width // q.group_size))
        self.biases = mx.zeros((dims_out, width // q.group_size))
        if bias:
            self.bias = mx.zeros((dims_out,))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.scales.dtype)
        if self.padding:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.padding)])
        x = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )
        return x + self.bias if "bias" in self else x


def quantize_layers(model: Any, q: QuantizationConfig, kind: Architecture) -> None:
    """Replace the network's quantisable linear layers by empty quantised ones, to be loaded."""

    def replacement(path: str, layer: Any) -> Any:
        if not isinstance(layer, Linear) or not is_quantized(f"{path}.weight", q, kind):
            return layer
        dims_out, dims_in = layer.weight.shape
        return QuantizedLinear(dims_in, dims_out, "bias" in layer, q)

    model.update_modules(tree_map_with_path(replacement, model.leaf_modules(), is_leaf=nn.Module.is_module))


def describe(q: QuantizationConfig) -> str:
    """In words: what is held in how many bits."""
    return f"{q.bits} bits in groups of {q.group_size}: {', '.join(q.layers).replace('_', ' ')}"
