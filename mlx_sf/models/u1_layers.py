"""The parts of SenseNova-U1: the layer that both of its sides have, rotary tables, the picture embedder's cuts, heads.

B batch, T tokens, L image tokens, C hidden size, E embedder width, h query heads and g key heads of size d.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import Shapes
from .layers import Linear, RMSNorm, attention, rotate_halves, silu
from .u1_config import MERGE, U1Config

Tables = tuple[mx.array, mx.array]  # cosines and sines, to broadcast against (B, T, heads, pairs)


class Places(NamedTuple):
    """Rotary tables of a sequence: by time, and by row and column, None for text, whose space half does not turn."""

    time: Tables
    row: Tables | None = None
    column: Tables | None = None


def _angles(positions: np.ndarray, dims: int, theta: float) -> np.ndarray:
    return positions[:, None] * theta ** (-2 * np.arange(dims // 2) / dims)


def time_angles(c: U1Config, positions: np.ndarray) -> np.ndarray:
    """Rotary angles (T, d/4) of the time half of a head."""
    return _angles(positions, c.head_dim // 2, c.rope_theta)


def _tables(angles: np.ndarray) -> Tables:
    angles = angles[:, None]
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


@lru_cache(maxsize=8)
def grid_tables(dims: int, theta: float, rows: int, columns: int) -> tuple[Tables, Tables]:
    """Tables by row and by column of a grid in row-major order."""
    row = _angles(np.repeat(np.arange(rows), columns), dims, theta)
    column = _angles(np.tile(np.arange(columns), rows), dims, theta)
    found = _tables(row), _tables(column)
    mx.eval(found)
    return found


@lru_cache(maxsize=8)
def patch_tables(width: int, theta: float, rows: int, columns: int) -> Tables:
    """Tables of the embedder: the first half of the entries by column, the second by row."""
    (row_cos, row_sin), (column_cos, column_sin) = grid_tables(width // 2, theta, rows, columns)
    found = mx.concatenate([column_cos, row_cos], axis=-1), mx.concatenate([column_sin, row_sin], axis=-1)
    mx.eval(found)
    return found


class Attention(nn.Module):
    """Attention of one side: each head's first half is turned by time, its second by row and column.

    The halves of queries and keys are normalised apart, each over its whole length.
    """

    def __init__(self, c: U1Config) -> None:
        super().__init__()
        self._config = c
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        for name in ("q_norm", "q_norm_hw", "k_norm", "k_norm_hw"):
            self[name] = RMSNorm(c.head_dim // 2)

    def _heads(self, x: mx.array, name: str, places: Places) -> mx.array:
        """Queries or keys (B, heads, T, d), normalised and turned."""
        d = self._config.head_dim
        x = self[f"{name}_proj"](x)
        x = x.reshape(*x.shape[:2], -1, d)
        time, space = mx.split(x, 2, axis=-1)
        time, space = self[f"{name}_norm"](time), self[f"{name}_norm_hw"](space)
        parts = [rotate_halves(time, *places.time)]
        if places.row is None or places.column is None:
            parts.append(space)
        else:
            row, column = mx.split(space, 2, axis=-1)
            parts += [rotate_halves(row, *places.row), rotate_halves(column, *places.column)]
        return mx.concatenate(parts, axis=-1).swapaxes(1, 2)

    def queries(self, x: mx.array, places: Places) -> mx.array:
        """Queries (B, h, T, d) of normalised tokens (B, T, C)."""
        return self._heads(x, "q", places)

    def keys_values(self, x: mx.array, places: Places) -> tuple[mx.array, mx.array]:
        """Keys and values (B, g, T, d) of normalised tokens (B, T, C)."""
        values = self.v_proj(x)
        values = values.reshape(*x.shape[:2], -1, self._config.head_dim).swapaxes(1, 2)
        return self._heads(x, "k", places), values

    def attend(self, x: mx.array, places: Places, how: Callable[..., mx.array], k: mx.array, v: mx.array) -> mx.array:
        """`how`(q, k, v, attention) between queries of x and what is given, through the output projection."""
        y = how(self.queries(x, places), k, v, attention).swapaxes(1, 2)
        return self.o_proj(y.reshape(*y.shape[:2], -1))


class SwiGLU(nn.Module):
    def __init__(self, c: U1Config) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.mlp_hidden, bias=False)
        self.up_proj = Linear(c.hidden_size, c.mlp_hidden, bias=False)
        self.down_proj = Linear(c.mlp_hidden, c.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


# keys and values (B, g, T, d) of a branch's prompt, and which of its places hold a token (B, T), None for all
Branch = tuple[mx.array, mx.array, mx.array | None]


class Layer(nn.Module):
    """A layer of either side. Called with the branches of guidance stacked along the batch, a prompt for each."""

    def __init__(self, c: U1Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size)
        self.mlp = SwiGLU(c)

    def __call__(self, x: mx.array, places: Places, branches: Sequence[Branch]) -> mx.array:
        def joint(q: mx.array, k: mx.array, v: mx.array, attention: Callable[..., mx.array]) -> mx.array:
            n = len(branches)
            parts = zip(mx.split(q, n), mx.split(k, n), mx.split(v, n), branches, strict=True)
            return mx.concatenate([_beside_prompt(q, k, v, *branch) for q, k, v, branch in parts])

        h = self.input_layernorm(x)
        x = x + self.self_attn.attend(h, places, joint, *self.self_attn.keys_values(h, places))
        return x + self.mlp(self.post_attention_layernorm(x))


def _beside_prompt(
    q: mx.array, k: mx.array, v: mx.array, before: mx.array, values: mx.array, seen: mx.array | None
) -> mx.array:
    """Attention of image tokens to a prompt's keys and values, and to their own."""
    k = mx.concatenate([before.astype(k.dtype), k], axis=2)
    v = mx.concatenate([values.astype(v.dtype), v], axis=2)
    mask = None
    if seen is not None:
        mask = mx.concatenate([seen, mx.ones((len(q), q.shape[2]), mx.bool_)], axis=1)[:, None, None]
    return attention(q, k, v, mask=mask)


def layer_shapes(c: U1Config) -> Shapes:
    """Name and shape of the tensors of one layer."""
    leaves: Any = tree_flatten(Layer(c).parameters())
    return {name: tuple(w.shape) for name, w in leaves}


# ---------------------------------------------------------------------------------------------- embedder and heads


def patches(x: mx.array, p: int) -> mx.array:
    """Images (B, 3, H, W) -> (B, H/p * W/p, 3p^2), a patch read as (channel, row, column)."""
    B, ch, H, W = x.shape
    return x.reshape(B, ch, H // p, p, W // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, ch * p * p)


def merged(x: mx.array, rows: int, columns: int) -> mx.array:
    """Patches (B, rows * columns, E) -> tokens (B, L, 4E), the patches beneath a token read as (entry, row, column)."""
    B, m = len(x), MERGE
    x = x.reshape(B, rows // m, m, columns // m, m, -1).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, rows // m * (columns // m), -1)


def pixel_shuffle(x: mx.array, r: int) -> mx.array:
    """(B, H, W, c r^2) -> (B, rH, rW, c): entry c r^2 + i r + j goes to offset (i, j)."""
    B, H, W, c = x.shape
    return x.reshape(B, H, W, c // r**2, r, r).transpose(0, 1, 4, 2, 5, 3).reshape(B, H * r, W * r, c // r**2)


class Conv3x3(nn.Module):
    """A 3 x 3 convolution, zeros around, of (B, H, W, in); weight (out, 3, 3, in)."""

    def __init__(self, dims_in: int, dims_out: int) -> None:
        super().__init__()
        self.weight, self.bias = mx.zeros((dims_out, 3, 3, dims_in)), mx.zeros((dims_out,))

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.weight.dtype)
        if mx.default_device() != mx.cpu:
            return mx.conv2d(x, self.weight, padding=1) + self.bias
        # MLX's own convolution on a CPU is far slower than nine products
        H, W = x.shape[1:3]
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        out = self.bias
        for i in range(3):
            for j in range(3):
                out = out + x[:, i : i + H, j : j + W] @ self.weight[:, i, j].T
        return out


class ConvHead(nn.Module):
    """U1.5's head: tokens as a map, enlarged 2, 2 and 8 times, with convolutions that see across their borders."""

    def __init__(self, c: U1Config) -> None:
        super().__init__()
        self.conv1 = Conv3x3(c.hidden_size // 4, c.head_width)
        self.conv2 = Conv3x3(c.head_width // 4, 3 * 64)

    def __call__(self, x: mx.array) -> mx.array:
        x = pixel_shuffle(nn.gelu(self.conv1(pixel_shuffle(x, 2))), 2)
        return pixel_shuffle(self.conv2(x), 8)
