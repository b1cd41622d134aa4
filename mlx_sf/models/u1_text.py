"""The understanding side of SenseNova-U1: a prompt as the keys and values that the picture's tokens attend to.

A prompt is one string of chat markup. Its tokens run through the understanding layers once; of each layer the keys
(normalised and rotated) and values are kept, all else is dropped. The last layer gives those alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import Shapes
from .u1_config import U1Config
from .u1_layers import Layer, Places, layer_shapes, time_angles

START, END, THINK, NO_THINK, IMAGE = "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<img>"
MARKUP = (START, END, THINK, NO_THINK, IMAGE)

# queries that attend at a time: their scores are all that grows with the square of a prompt's length
_ROWS = 256


def _block(role: str, text: str) -> str:
    return f"{START}{role}\n{text}{END}\n"


def rendered(prompt: str | None, system_message: str) -> str:
    """A prompt with its markup; None is the unconditional branch, which has no system message and no thinking part."""
    if prompt is None:
        return f"{_block('user', '')}{START}assistant\n{IMAGE}"
    system = _block("system", system_message) if system_message else ""
    return f"{system}{_block('user', prompt)}{START}assistant\n{THINK}\n\n{NO_THINK}\n\n{IMAGE}"


@dataclass(frozen=True)
class Prefix:
    """Keys and values (g, T, d) of each layer, for a prompt of T tokens."""

    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]

    @property
    def length(self) -> int:
        return int(self.keys[0].shape[1])


def text_shapes(c: U1Config) -> Shapes:
    """Name and shape of every tensor of the understanding side that a picture depends on."""
    shapes: Shapes = {"embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for i in range(c.depth):
        last = i == c.depth - 1
        shapes |= {f"layers.{i}.{k}": s for k, s in layer_shapes(c).items() if not last or k in LAST_LAYER}
    return shapes


# what of the last layer keys and values come from
LAST_LAYER = tuple(
    f"{name}.weight"
    for name in (
        "input_layernorm",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.k_norm",
        "self_attn.k_norm_hw",
    )
)


def encode(
    c: U1Config,
    tensor: Callable[[str], mx.array],
    rows: Callable[[np.ndarray], mx.array],
    ids: Sequence[Sequence[int]],
    dtype: mx.Dtype = mx.float32,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[Prefix]:
    """Prefixes of token sequences, all in one sweep over the layers: each is read, used and dropped before the next.

    Args:
        tensor: the tensor of a name of `text_shapes`. rows: rows of the table of embeddings.
        ids: token ids of each sequence. dtype: of the products, and of what is kept.
        on_layer: called as on_layer(done, total).
    """
    wanted = np.unique(np.concatenate([np.asarray(s, np.int64) for s in ids]))
    table = rows(wanted).astype(mx.float32)
    states = [table[mx.array(np.searchsorted(wanted, s))][None] for s in ids]  # (1, T, C)
    places = [Places(_turned(c, len(s))) for s in ids]
    mx.eval(states, places)
    del table
    kept: list[tuple[list[mx.array], list[mx.array]]] = [([], []) for _ in ids]
    for i in range(c.depth):
        last = i == c.depth - 1
        layer = Layer(c)
        names = LAST_LAYER if last else tuple(layer_shapes(c))
        for name in names:  # one by one: a tensor's file form is gone before the next is read
            value = tensor(f"layers.{i}.{name}")
            value = value.astype(dtype if "proj" in name else mx.float32)
            mx.eval(value)
            layer.load_weights([(name, value)], strict=False)
            del value
        for j, (x, where) in enumerate(zip(states, places, strict=True)):
            h = layer.input_layernorm(x)
            keys, values = layer.self_attn.keys_values(h, where)
            kept[j][0].append(keys[0].astype(dtype))
            kept[j][1].append(values[0].astype(dtype))
            if not last:
                x = x + layer.self_attn.attend(h, where, _causal, keys, values)
                states[j] = x + layer.mlp(layer.post_attention_layernorm(x))
            mx.eval(states[j], kept[j][0][-1], kept[j][1][-1])
        del layer
        mx.clear_cache()
        on_layer(i + 1, c.depth)
    return [Prefix(tuple(k), tuple(v)) for k, v in kept]


def _turned(c: U1Config, length: int) -> tuple[mx.array, mx.array]:
    angles = time_angles(c, np.arange(length))[:, None]
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def _causal(q: mx.array, k: mx.array, v: mx.array, attention: Callable[..., mx.array]) -> Any:
    T = q.shape[2]
    parts = []
    for i in range(0, T, _ROWS):
        end = min(i + _ROWS, T)
        mask = mx.arange(end)[None, :] <= mx.arange(i, end)[:, None]
        parts.append(attention(q[:, :, i:end], k[:, :, :end], v[:, :, :end], mask=mask[None, None]))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=2)
