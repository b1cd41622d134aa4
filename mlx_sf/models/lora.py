"""Low-rank adapters: a few numbers beside a frozen linear layer, W + alpha / rank * B A, that training moves alone.

An adapter's tensors are named by the layer that they stand beside: "LAYER.lora_A.weight" (rank, in) and
"LAYER.lora_B.weight" (out, rank), LAYER being the layer's path in the network.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); names as in PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..common.fields import check_types, require
from . import Architecture, Shapes
from .layers import Linear
from .quantize import QuantizedLinear

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of an adapter: `rank`, `alpha`, and the paths of the linear layers that it stands beside.

    Raises `FieldError` for a rank below 1, an alpha that is not above 0, and layers that are none or named twice.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")
        ok = isinstance(self.targets, list | tuple) and all(isinstance(t, str) for t in self.targets)
        require(ok and 0 < len(self.targets) == len(set(self.targets)), "targets", self.targets, "different layers")
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def strength(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def shapes(self, network: Shapes) -> Shapes:
        """Name and shape of every tensor of the adapter, from those of the network's parameters."""
        shapes: Shapes = {}
        for layer in self.targets:
            shape = network.get(f"{layer}.weight", ())
            require(len(shape) == 2, "targets", layer, "linear layers of the network")
            dims_out, dims_in = shape
            shapes |= {layer + A: (self.rank, dims_in), layer + B: (dims_out, self.rank)}
        return shapes

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, {len(self.targets)} layers"


def targets_of(network: Shapes, kind: Architecture) -> tuple[str, ...]:
    """The layers that an architecture wants adapters on, among the parameters of one network."""
    layers = (name.removesuffix(".weight") for name in network if is_layer(name, kind))
    return tuple(layer for layer in layers if kind.lora_target(layer))


def is_layer(name: str, kind: Architecture) -> bool:
    """Whether a parameter is the weight of a linear layer."""
    return name.endswith(".weight") and kind.layer_kind(name) is not None


class LoRALinear(nn.Module):
    """A frozen linear layer `base` with an adapter beside it: base(x) + strength * B A x.

    A and B are held in float32 and multiplied in the type that the layer's products run in. The base may have an
    adapter itself.
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, strength: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (Linear(w.shape[1], w.shape[0], bias=False) for w in (a, b))
        self.lora_A.weight, self.lora_B.weight = a.astype(mx.float32), b.astype(mx.float32)
        self._strength = strength

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.base(x)
        a, b = self.lora_A.weight.astype(y.dtype), self.lora_B.weight.astype(y.dtype)
        return y + (self._strength * (x.astype(y.dtype) @ a.T)) @ b.T


_LAYERS = (Linear, QuantizedLinear, LoRALinear)


def initial_adapter(config: LoRAConfig, network: Shapes, key: mx.array) -> dict[str, mx.array]:
    """The tensors of a new adapter, which changes nothing yet: A uniform within 1/sqrt(in), B zero."""
    shapes = config.shapes(network)
    keys = mx.random.split(key, len(shapes))

    def value(name: str, shape: tuple[int, ...], k: mx.array) -> mx.array:
        bound = shape[1] ** -0.5
        return mx.zeros(shape) if name.endswith(B) else mx.random.uniform(-bound, bound, shape, key=k)

    return {name: value(name, shape, k) for (name, shape), k in zip(shapes.items(), keys, strict=True)}


def add_adapter(network: Any, config: LoRAConfig, tensors: Mapping[str, mx.array], scale: float = 1.0) -> None:
    """Put an adapter beside the layers of a network whose weights are loaded; all but this adapter is frozen.

    Adapters add up; `scale` multiplies this one.
    """
    network.freeze()
    layers = dict(network.named_modules())
    adapted = []
    for path in config.targets:
        layer: Any = layers.get(path)
        require(isinstance(layer, _LAYERS), "targets", path, "linear layers of the network")
        adapted.append((path, LoRALinear(layer, tensors[path + A], tensors[path + B], scale * config.strength)))
    network.update_modules(tree_unflatten(adapted))


def adapter_parameters(network: Any) -> dict[str, mx.array]:
    """The tensors of the adapter that was added last, by name."""
    leaves: Any = tree_flatten(network.trainable_parameters())
    return {name: w for name, w in leaves if name.endswith((A, B))}


def merge(
    weights: Mapping[str, mx.array], config: LoRAConfig, tensors: Mapping[str, mx.array], scale: float = 1.0
) -> dict[str, mx.array]:
    """A network's float weights with an adapter worked into them: W + scale * alpha / rank * B A, float32."""
    merged = dict(weights)
    for layer in config.targets:
        update = scale * config.strength * (tensors[layer + B] @ tensors[layer + A])
        merged[f"{layer}.weight"] = weights[f"{layer}.weight"].astype(mx.float32) + update
    return merged
