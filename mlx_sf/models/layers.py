"""Layers that several networks share."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..device.elementwise import LOG2_E, exp2_below, silu

__all__ = [
    "Linear",
    "PatchEmbed",
    "RMSNorm",
    "TimestepEmbedder",
    "attention",
    "biased_attention",
    "drop",
    "modulate",
    "rotate",
    "rotate_halves",
    "silu",
    "sincos_position_table",
    "unpatchify",
]

RMS_EPS = 1e-6
TIME_FREQUENCIES = 256


@mx.custom_function
def _affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_affine.vjp
def _affine_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # dW comes out row-major; MLX's own rule gives a transposed view, which slows the optimiser's fused kernel
    x, weight, _bias = primals
    return cotangent @ weight, cotangent.T @ x, cotangent.sum(axis=0)


class Linear(nn.Module):
    """`x W^T + b`, computed in the weight's float type whatever the type of x (as under autocast)."""

    def __init__(self, dims_in: int, dims_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((dims_out, dims_in))
        if bias:
            self.bias = mx.zeros((dims_out,))

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.weight.dtype)
        if "bias" not in self:
            return x @ self.weight.T
        out: mx.array = _affine(x.reshape(-1, x.shape[-1]), self.weight, self.bias)  # type: ignore[assignment]
        return out.reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight; statistics in float32, result in the input's type."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), RMS_EPS)


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Adaptive layer norm's affine part: x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each interleaved pair (2j, 2j + 1) of the last axis of x (B, T, h, d) by its angle."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def rotate_halves(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each pair (j, j + d/2) of the last axis of x (B, T, h, d) by its angle; cos and sin (T, 1, d/2)."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sincos_position_table(dims: int, grid_size: int) -> np.ndarray:
    """Fixed table (1, N, D) float32: first half of D encodes the column index, second half the row index.

    Each half is [sin, cos] of index * 10000^(-i / (D/4)), i = 0 ... D/4 - 1.
    """
    omega = 10000.0 ** (-np.arange(dims // 4) / (dims / 4))
    angles = np.arange(grid_size)[:, None] * omega  # (S, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (S, D/2)
    S = grid_size
    column, row = np.tile(axis, (S, 1)), np.repeat(axis, S, axis=0)  # tokens are in row-major order
    return np.concatenate([column, row], axis=1)[None].astype(np.float32)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> patches -> bottleneck -> tokens (B, N, D), without activation between."""

    def __init__(self, patch_size: int, bottleneck_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj1 = Linear(3 * patch_size**2, bottleneck_dim, bias=False)
        self.proj2 = Linear(bottleneck_dim, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        B, C, H, W = x.shape
        p = self.patch_size
        # a patch is read in the order (channel, row, column)
        x = x.reshape(B, C, H // p, p, W // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
        return self.proj2(self.proj1(x))


class TimestepEmbedder(nn.Module):
    """A number s (B,), not scaled by 1000, as [cos(s f), sin(s f)], f_i = 10000^(-i/128), -> (B, D)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.mlp = [Linear(TIME_FREQUENCIES, dims), nn.SiLU(), Linear(dims, dims)]
        half = TIME_FREQUENCIES // 2
        self._freqs = mx.array((10000.0 ** (-np.arange(half) / half)).astype(np.float32))

    def __call__(self, t: mx.array) -> mx.array:
        angles = t.astype(mx.float32)[:, None] * self._freqs
        x = self.mlp[0](mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1))
        return self.mlp[2](nn.silu(x))  # (B, D)


def unpatchify(tokens: mx.array, patch_size: int, grid: tuple[int, int]) -> mx.array:
    """Tokens (B, N, p*p*C) in the order (row, column, channel), `grid` rows and columns -> images (B, C, H, W)."""
    B, p, (rows, columns) = tokens.shape[0], patch_size, grid
    x = tokens.reshape(B, rows, columns, p, p, -1).transpose(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(B, -1, rows * p, columns * p)


# scores of a tile: 1 MB, so that the passes over them find them in a core's cache; and what is not worth tiling
_TILE, _UNTILED = 1 << 18, 1 << 20
_FUSED_HEAD = 64  # a size that the GPU's fused kernel knows


def biased_attention(q: mx.array, k: mx.array, v: mx.array, bias: mx.array) -> mx.array:
    """softmax(q k^T + bias) v over (B, h, T, d), without a scale; bias (B or 1, h, keys, queries) float32."""
    if mx.default_device() != mx.cpu:
        mask = bias.swapaxes(-1, -2).astype(q.dtype)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    q, k, values = (u.astype(mx.float32) for u in (q * LOG2_E, k, v))
    return _attended(q, k, values, bias=bias * LOG2_E).astype(v.dtype)


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dropout: float = 0.0,
    key: mx.array | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """softmax(q k^T / sqrt(d)) v over (B, h, T, d), scores in float32; dropout on the softmax where a key is given.

    Queries may be fewer than keys. Keys and values may have fewer heads, each of which then serves as many neighbouring
    heads of the queries. `mask` (B or 1, 1, Q or 1, T) bool says which keys a query sees, at least one each.
    """
    d = q.shape[-1]
    if key is None and mx.default_device() != mx.cpu:
        if _FUSED_HEAD // 2 < d < _FUSED_HEAD:
            # zeros change no product; without them the scores of all tokens would lie in memory
            q, k, v = (mx.pad(u, [(0, 0), (0, 0), (0, 0), (0, _FUSED_HEAD - d)]) for u in (q, k, v))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)[..., :d]
    (B, h, Q), (g, T) = q.shape[:3], k.shape[1:3]
    if g != h:
        # the heads that share a key head are so many more queries of it
        if mask is not None and mask.shape[2] != 1:
            mask = mx.tile(mask, (1, 1, h // g, 1))
        return attention(q.reshape(B, g, h // g * Q, d), k, v, dropout, key, mask).reshape(B, h, Q, -1)
    # scores in base 2
    q, k, values = (u.astype(mx.float32) for u in (q * (d**-0.5 * LOG2_E), k, v))
    if key is not None or mask is not None or B * h * Q * T <= _UNTILED:
        return _attended(q, k, values, dropout, key, mask).astype(v.dtype)
    q, k, values = (u.reshape(B * h, *u.shape[2:]) for u in (q, k, values))
    heads, rows = max(1, _TILE // (Q * T)), max(1, _TILE // T)
    groups = []
    for i in range(0, B * h, heads):
        group = slice(i, i + heads)
        parts = [_attended(q[group, j : j + rows], k[group], values[group]) for j in range(0, Q, rows)]
        groups.append(mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    return mx.concatenate(groups).reshape(B, h, Q, -1).astype(v.dtype)


def _attended(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dropout: float = 0.0,
    key: mx.array | None = None,
    mask: mx.array | None = None,
    bias: mx.array | None = None,
) -> mx.array:
    # keys by queries: a CPU's maxima and sums down columns are three times as fast as those along rows
    scores = k @ q.swapaxes(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = mx.where(mask.swapaxes(-1, -2), scores, -1e9)
    e = exp2_below(scores, mx.stop_gradient(scores.max(axis=-2, keepdims=True)))
    total = e.sum(axis=-2)[..., None]
    e = e.swapaxes(-1, -2)
    if key is not None:
        e = drop(e, dropout, key)
    # dividing after the product with v touches d columns instead of T
    return (e @ v) / total


def drop(x: mx.array, p: float, key: mx.array | None) -> mx.array:
    """Dropout with an explicit random key; without one (or at p = 0) x itself."""
    if key is None or p == 0:
        return x
    return mx.where(mx.random.bernoulli(1 - p, x.shape, key), x / (1 - p), 0).astype(x.dtype)
