"""What the parts of a sampling step and of a training step have in common: blocks, their shapes, inputs of noise."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..models.jit import Block, JiT
from ..models.layers import modulate

Run = Callable[[], Any]
Parts = tuple[Run, list[tuple[str, Run]]]  # the whole step, and its parts by name


def normal(shape: Sequence[int], seed: int = 0) -> mx.array:
    """Standard normal numbers, evaluated."""
    x = mx.random.normal(list(shape), key=mx.random.key(seed))
    mx.eval(x)
    return x


def tokens(model: JiT) -> list[int]:
    """Tokens per image in each block."""
    c = model.config
    late = [bool(c.in_context_len) and i >= c.in_context_start for i in range(c.depth)]
    return [c.grid_size**2 + c.in_context_len * inside for inside in late]


def hidden_states(model: JiT, batch: int) -> dict[int, mx.array]:
    """For each number of tokens T that a block sees, inputs (batch, T, D)."""
    return {T: normal((batch, T, model.config.hidden_size)) for T in sorted(set(tokens(model)))}


def rotary(model: JiT, count: int) -> tuple[mx.array, mx.array]:
    """Rotary tables of a block with `count` tokens an image."""
    return model._cos[-count:], model._sin[-count:]


def norms(block: Block, x: mx.array, m: mx.array) -> mx.array:
    """A block with attention and feed-forward replaced by the identity: norms, modulation and gates."""
    shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(m, 6, axis=-1)
    x = x + gate1[:, None] * modulate(block.norm1(x), shift1, scale1)
    return x + gate2[:, None] * modulate(block.norm2(x), shift2, scale2)
