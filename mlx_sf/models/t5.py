"""T5's encoder, version 1.1 (FLAN-T5): token ids -> the last hidden state.

Its weights are read layer by layer from the file of the whole encoder-decoder, so that one layer at a time is in
memory. Parameters have the file's names below "encoder.block.I.".

B batch, L tokens, E model width, h heads of size d, F feed-forward width.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020).
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..common.fields import require
from ..device.elementwise import gelu
from ..errors import MlxSfError
from .layers import Linear, RMSNorm, biased_attention
from .quantize import QuantizationConfig, dequantize, quantize

# reads a tensor of the weights' file by its name there, whole or some rows of it
Read = Callable[[str], mx.array]


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder, by the names of the published `config.json`."""

    d_model: int = 1024
    d_kv: int = 64
    d_ff: int = 2816
    num_layers: int = 24
    num_heads: int = 16
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    @classmethod
    def read(cls, path: Path) -> "T5Config":
        """From a `config.json`; `MlxSfError` where it is none of a T5 of version 1.1."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
        except (ValueError, RecursionError):
            raise MlxSfError(f"{path}: not valid JSON: download it again") from None
        if not isinstance(data, dict) or data.get("model_type") not in ("t5", "mt5", "umt5"):
            kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
            raise MlxSfError(f"{path}: describes {kind!r}, want a T5 encoder, such as google/flan-t5-large")
        if data["model_type"] != "t5" or data.get("feed_forward_proj") != "gated-gelu":
            kind = f"{data['model_type']} with {data.get('feed_forward_proj', 'relu')}"
            raise MlxSfError(f"{path}: describes {kind}, want T5 of version 1.1 (gated-gelu), as FLAN-T5 is")
        values = {name: data.get(name, default) for name, default in cls().__dict__.items()}
        for name, value in values.items():
            require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "at least 1")
        return cls(**values)


def position_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Bucket (L, L) of each query's distance to each key: half for keys behind it, exact up to a quarter, then log."""
    r = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half, exact = buckets // 2, buckets // 4
    a = np.abs(r)
    ratio = np.log(np.maximum(a, 1) / exact) / math.log(max_distance / exact)
    log = exact + np.floor(ratio * (half - exact) + 1e-9).astype(np.int64)
    return half * (r > 0) + np.where(a < exact, a, np.minimum(log, half - 1))


class T5Layer(nn.Module):
    """Attention without scale but with a bias by distance, then a gated feed-forward; both on normed input."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self._config = c
        inner = c.num_heads * c.d_kv
        attention: dict[str, Any] = {name: Linear(c.d_model, inner, bias=False) for name in "qkv"}
        attention["o"] = Linear(inner, c.d_model, bias=False)
        feed_forward: dict[str, Any] = {name: Linear(c.d_model, c.d_ff, bias=False) for name in ("wi_0", "wi_1")}
        feed_forward["wo"] = Linear(c.d_ff, c.d_model, bias=False)
        self.layer: list[dict[str, Any]] = [
            {"SelfAttention": attention, "layer_norm": RMSNorm(c.d_model)},
            {"DenseReluDense": feed_forward, "layer_norm": RMSNorm(c.d_model)},
        ]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """x (B, L, E); bias (B or 1, h, keys, queries) float32."""
        c, (first, second) = self._config, self.layer
        a, y = first["SelfAttention"], first["layer_norm"](x)
        q, k, v = (a[name](y).reshape(*y.shape[:2], c.num_heads, c.d_kv).swapaxes(1, 2) for name in "qkv")
        y = biased_attention(q, k, v, bias).swapaxes(1, 2)
        x = x + a["o"](y.reshape(*y.shape[:2], -1))
        f, y = second["DenseReluDense"], second["layer_norm"](x)
        return x + f["wo"](gelu(f["wi_0"](y)) * f["wi_1"](y))


def encode(
    config: T5Config,
    read: Read,
    rows: Callable[[np.ndarray], mx.array],
    ids: Sequence[Sequence[int]],
    dtype: mx.Dtype = mx.float32,
    bits: int | None = None,
    batch: int = 16,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The last hidden states (n, E) float32 of texts given by their ids, of any lengths.

    `read` gives the encoder's tensors by their names in the file, `rows` some rows of its table of embeddings. The
    products run in `dtype`, with `bits` 8 on weights in groups of 64 that share a scale. All texts go through a layer,
    in batches of similar length, before the next one is read; `on_layer(done, total)` is called after each.

    Padding changes nothing: padded keys are masked out, padded queries are cut off.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    vocabulary = np.unique(np.concatenate([np.asarray(i) for i in ids]))
    if vocabulary[-1] >= config.vocab_size:
        raise MlxSfError(
            f"token {vocabulary[-1]} is none of the encoder's {config.vocab_size}: its tokenizer is another one's"
        )
    table = rows(vocabulary).astype(mx.float32)
    states, masks = [], []
    for group in groups:
        longest = len(ids[group[-1]])
        padded = np.array([[*ids[i], *[0] * (longest - len(ids[i]))] for i in group])
        # a padding id need not be among the rows: any will do
        states.append(table[mx.array(np.searchsorted(vocabulary, padded).clip(max=len(vocabulary) - 1))])
        lengths = mx.array([len(ids[i]) for i in group])
        masks.append(mx.where(mx.arange(longest) < lengths[:, None], 0.0, -math.inf)[:, None, :, None])  # of keys
    distances = read("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight").astype(mx.float32)

    @functools.cache
    def by_distance(length: int) -> mx.array:
        """The bias (1, h, keys, queries) of a length, which all layers share."""
        limits = config.relative_attention_num_buckets, config.relative_attention_max_distance
        return distances[mx.array(position_buckets(length, *limits).T)].transpose(2, 0, 1)[None]

    for number in range(config.num_layers):
        layer = _layer(config, read, f"encoder.block.{number}.", dtype, bits)
        for i, (x, mask) in enumerate(zip(states, masks, strict=True)):
            whole = len(x) == 1  # a text alone has no padding
            states[i] = layer(x, by_distance(x.shape[1]) + (0 if whole else mask))
            mx.eval(states[i])
        if on_layer is not None:
            on_layer(number + 1, config.num_layers)
    norm = RMSNorm(config.d_model)
    norm.weight = read("encoder.final_layer_norm.weight").astype(mx.float32)
    found: dict[int, np.ndarray] = {}
    for group, x in zip(groups, states, strict=True):
        values = np.asarray(norm(x))
        found |= {i: values[row, : len(ids[i])].copy() for row, i in enumerate(group)}
    return [found[i] for i in range(len(ids))]


def _layer(config: T5Config, read: Read, prefix: str, dtype: mx.Dtype, bits: int | None) -> T5Layer:
    layer = T5Layer(config)
    tensors: Any = tree_flatten(layer.parameters())
    loaded: list[tuple[str, mx.array]] = []
    for name, like in tensors:
        value = read(prefix + name)
        if value.shape != like.shape:
            raise MlxSfError(f"text encoder: tensor {prefix + name!r} has shape {value.shape}, want {like.shape}")
        value = value.astype(mx.float32 if "norm" in name else dtype)
        if bits is not None and "norm" not in name:
            q = QuantizationConfig(bits)
            value = dequantize(*quantize(value, q), value.shape[1], q)
        loaded.append((name, value))
    layer.load_weights(loaded, strict=True)
    return layer


def encoder_shapes(config: T5Config) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of what an encoder needs of a file, without the layers after the first."""
    inner = config.num_heads * config.d_kv
    return {
        "encoder.final_layer_norm.weight": (config.d_model,),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (inner, config.d_model),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            config.relative_attention_num_buckets,
            config.num_heads,
        ),
        f"encoder.block.{config.num_layers - 1}.layer.1.DenseReluDense.wo.weight": (config.d_model, config.d_ff),
    }
