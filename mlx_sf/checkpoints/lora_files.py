"""Adapters in one `.safetensors`, as diffusion models publish them: PATH.lora_down.weight, .lora_up.weight, .alpha.

PATH is a parameter's path in the authors' network, sometimes behind "diffusion_model.". A layer adds
alpha / rank * up down to its weight, rank being the rows of down; without alpha it adds up down. Ranks may differ from
layer to layer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxSfError
from ..formats.tensor_file import Entry, TensorFile
from ..models import ModelConfig, architecture, parameter_shapes
from ..models.lora import A, B, LoRAConfig, is_layer
from ..models.quantize import FLOATS
from ..models.u1_config import U1Config
from ..models.u1_text import text_shapes
from . import u1_files

_PART = r"(?P<part>lora_down\.weight|lora_up\.weight|alpha)"
_KEY = re.compile(rf"(?:diffusion_model\.)?(?P<layer>.+?)(?:\.weight)?\.{_PART}")
_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class DownUp:
    """An adapter's tensors by the names of `models.lora`; `beside` are pairs (B, A) for matrices outside the network.

    Strengths are in the tensors: alpha equals the rank.
    """

    lora: LoRAConfig
    tensors: Mapping[str, mx.array]
    beside: Mapping[str, tuple[mx.array, mx.array]] = field(default_factory=dict)


def is_down_up(path: Path) -> bool:
    """Whether a file holds an adapter in this form; one that cannot be read is left to its reader."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return any(key.endswith(_DOWN) for key in TensorFile(path, foreign=True).entries)


def read_down_up(path: Path, model: ModelConfig) -> DownUp:
    """The adapter of a file for the network of a configuration. `MlxSfError` where it is incomplete or of another."""
    file, kind = TensorFile(path, foreign=True), architecture(model)
    file.verify()
    shapes, beside = parameter_shapes(model), dict[str, tuple[int, ...]]()
    ours: Callable[[str], str] = str
    if isinstance(model, U1Config):
        ours = u1_files.our_name
        beside = {u1_files.TEXT + name: shape for name, shape in text_shapes(model).items()}
    layers: dict[str, dict[str, Entry]] = {}
    for key, e in file.entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise MlxSfError(f"{path}: tensor {key!r} is no lora_down, lora_up or alpha, want plain LoRA")
        layers.setdefault(match["layer"], {})[match["part"]] = e
    pairs: dict[str, tuple[mx.array, mx.array]] = {}
    for layer, parts in layers.items():
        if odd := {_DOWN, _UP} - set(parts):
            raise MlxSfError(f"{path}: {layer!r} has no {odd.pop()}: an incomplete adapter, copy it again")
        name = ours(layer + ".weight")
        shape = shapes.get(name, beside.get(name))
        if shape is not None and len(shape) == 2 and (name in beside or is_layer(name, kind)):
            pairs[name.removesuffix(".weight")] = _pair(path, layer, parts, shape)
        elif not isinstance(model, U1Config) or not u1_files.without_effect(layer, model):
            raise MlxSfError(f"{path}: is of another model: {kind.title} has no linear layer {layer!r}")
    own = {layer: pair for layer, pair in pairs.items() if f"{layer}.weight" in shapes}
    if not pairs:
        raise MlxSfError(f"{path}: adapts no layer of {kind.title}")
    rest = {f"{layer}.weight".removeprefix(u1_files.TEXT): pair for layer, pair in pairs.items() if layer not in own}
    if not own:
        raise MlxSfError(f"{path}: adapts the understanding side alone, which is not supported")
    rank = max(down.shape[0] for _, down in own.values())
    tensors: dict[str, mx.array] = {}
    for layer, (up, down) in own.items():
        short = rank - down.shape[0]
        tensors |= {layer + A: mx.pad(down, [(0, short), (0, 0)]), layer + B: mx.pad(up, [(0, 0), (0, short)])}
    return DownUp(LoRAConfig(rank, float(rank), tuple(own)), tensors, rest)


def _pair(path: Path, layer: str, parts: Mapping[str, Entry], shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """(alpha / rank * up, down) of a layer of `shape`, float32."""
    down, up = parts[_DOWN], parts[_UP]
    rank = down.shape[0] if len(down.shape) == 2 else 0
    if rank < 1 or down.shape != (rank, shape[1]) or up.shape != (shape[0], rank):
        raise MlxSfError(f"{path}: {layer!r} has {up.shape} times {down.shape}, want {shape}: of another model")
    if {down.dtype, up.dtype} - set(FLOATS):
        raise MlxSfError(f"{path}: {layer!r} is {down.dtype} and {up.dtype}, want floats")
    strength = 1.0
    if _ALPHA in parts:
        alpha = parts[_ALPHA].array()
        if alpha.size != 1:
            raise MlxSfError(f"{path}: {layer}.alpha has shape {alpha.shape}, want one number")
        strength = float(np.array(alpha).item()) / rank
    pair = up.array().astype(mx.float32) * strength, down.array().astype(mx.float32)
    if not all(mx.all(mx.isfinite(w)).item() for w in pair):
        raise MlxSfError(f"{path}: {layer!r} holds NaN or infinite values: take another copy")
    return pair
