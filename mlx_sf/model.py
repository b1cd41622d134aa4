"""JiT, "Just image Transformer": a plain pixel-space diffusion transformer, optionally with Spectral Forcing.

Images are channels first, (B, 3, H, W), as in the reference. Submodules carry the reference's names, so that a
parameter's path here is its key there without the leading "net.".

B batch, H image side, p patch side, S = H/p, N = S*S image tokens, L in-context tokens, T = N or L + N,
D hidden size, h heads, d = D/h.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from .config import ModelConfig
from .elementwise import exp, silu
from .spectral import SpectralForcing

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


def rotary_tables(head_dim: int, grid_size: int, in_context_len: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines (L + N, 1, d/2) float32 of the 2D rotary embedding; the in-context rows do not rotate.

    The first half of a head's pairs turns with the row index, the second with the column index, by frequencies
    10000^(-2j / (d/2)), j = 0 ... d/4 - 1.
    """
    S, L = grid_size, in_context_len
    freqs = 10000.0 ** (-2 * np.arange(head_dim // 4) / (head_dim // 2))
    axis = np.arange(S)[:, None] * freqs  # (S, d/4)
    angles = np.concatenate([np.repeat(axis, S, axis=0), np.tile(axis, (S, 1))], axis=1)  # (N, d/2)
    angles = np.concatenate([np.zeros((L, head_dim // 2)), angles])[:, None]
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each interleaved pair (2j, 2j + 1) of the last axis of x (B, T, h, d) by its angle."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, dropout: float = 0.0, key: mx.array | None = None) -> mx.array:
    """softmax(q k^T / sqrt(d)) v over (B, h, T, d), scores in float32; dropout on the softmax where a key is given."""
    scale = q.shape[-1] ** -0.5
    if key is None and mx.default_device() != mx.cpu:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    scores = (q.astype(mx.float32) * scale) @ k.astype(mx.float32).swapaxes(-1, -2)
    # dividing after the product with v touches d columns instead of T: cheaper on a CPU, where this branch runs
    e = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = e.sum(axis=-1, keepdims=True)
    if key is not None:
        e = drop(e, dropout, key)
    return ((e @ v.astype(mx.float32)) / total).astype(v.dtype)


def drop(x: mx.array, p: float, key: mx.array | None) -> mx.array:
    """Dropout with an explicit random key; without one (or at p = 0) x itself."""
    if key is None or p == 0:
        return x
    return mx.where(mx.random.bernoulli(1 - p, x.shape, key), x / (1 - p), 0).astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, dropout: bool) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.attn_dropout = c.attn_dropout if dropout else 0.0
        self.proj_dropout = c.proj_dropout if dropout else 0.0
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)
        self.proj = Linear(c.hidden_size, c.hidden_size)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, key: mx.array | None) -> mx.array:
        B, T, D = x.shape
        h = self.num_heads
        qkv = self.qkv(x).reshape(B, T, 3, h, D // h)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, T, h, d)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        keys = (None, None) if key is None else mx.random.split(key)
        x = attention(
            q.swapaxes(1, 2),
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            self.attn_dropout,
            keys[0] if self.attn_dropout else None,
        )  # (B, h, T, d)
        return drop(self.proj(x.swapaxes(1, 2).reshape(B, T, D)), self.proj_dropout, keys[1])


class SwiGLU(nn.Module):
    def __init__(self, c: ModelConfig, dropout: bool) -> None:
        super().__init__()
        self.proj_dropout = c.proj_dropout if dropout else 0.0
        self.w12 = Linear(c.hidden_size, 2 * c.mlp_hidden)
        self.w3 = Linear(c.mlp_hidden, c.hidden_size)

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        a, b = mx.split(self.w12(x), 2, axis=-1)
        return self.w3(drop(silu(a) * b, self.proj_dropout, key))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, dropout: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c.hidden_size)
        self.attn = Attention(c, dropout)
        self.norm2 = RMSNorm(c.hidden_size)
        self.mlp = SwiGLU(c, dropout)
        self.adaLN_modulation = [nn.SiLU(), Linear(c.hidden_size, 6 * c.hidden_size)]

    def __call__(
        self,
        x: mx.array,
        silu_c: mx.array | None,
        cos: mx.array,
        sin: mx.array,
        key: mx.array | None = None,
        modulation: mx.array | None = None,
    ) -> mx.array:
        if modulation is None:
            modulation = self.adaLN_modulation[1](silu_c)
        shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(modulation, 6, axis=-1)  # (B, D)
        keys = (None, None) if key is None else mx.random.split(key)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin, keys[0])
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2), keys[1])


class PatchEmbed(nn.Module):
    """Patches -> bottleneck -> D, without activation between."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.patch_size = c.patch_size
        self.proj1 = Linear(3 * c.patch_size**2, c.bottleneck_dim, bias=False)
        self.proj2 = Linear(c.bottleneck_dim, c.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        B, C, H, _ = x.shape
        p = self.patch_size
        S = H // p
        # a patch is read in the order (channel, row, column)
        x = x.reshape(B, C, S, p, S, p).transpose(0, 2, 4, 1, 3, 5).reshape(B, S * S, C * p * p)
        return self.proj2(self.proj1(x))  # (B, N, D)


class TimestepEmbedder(nn.Module):
    """t in [0, 1], not scaled by 1000, -> D."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.mlp = [Linear(TIME_FREQUENCIES, dims), nn.SiLU(), Linear(dims, dims)]
        half = TIME_FREQUENCIES // 2
        self._freqs = mx.array((10000.0 ** (-np.arange(half) / half)).astype(np.float32))

    def __call__(self, t: mx.array) -> mx.array:
        angles = t.astype(mx.float32)[:, None] * self._freqs
        x = self.mlp[0](mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1))
        return self.mlp[2](nn.silu(x))  # (B, D)


class LabelEmbedder(nn.Module):
    """K classes and, in the last row, "no class"."""

    def __init__(self, num_classes: int, dims: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dims)

    def __call__(self, y: mx.array) -> mx.array:
        return self.embedding_table(y)  # (B, D)


class FinalLayer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm_final = RMSNorm(c.hidden_size)
        self.linear = Linear(c.hidden_size, c.patch_size**2 * c.out_channels)
        self.adaLN_modulation = [nn.SiLU(), Linear(c.hidden_size, 2 * c.hidden_size)]

    def __call__(self, x: mx.array, silu_c: mx.array | None, modulation: mx.array | None = None) -> mx.array:
        if modulation is None:
            modulation = self.adaLN_modulation[1](silu_c)
        shift, scale = mx.split(modulation, 2, axis=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class JiT(nn.Module):
    """The network. Weights start as in the reference, drawn from `key` (default: key 0).

    Call with x (B, 3, H, H), t a scalar or (B,) in [0, 1], y (B,) integers where `num_classes` means "no class".
    Returns (B, out_channels, H, H) float32. With `key` dropout acts (in the middle half of the depth); without, not.
    `block_wrapper` turns a block into the callable that runs it (gradient checkpointing). `modulations` are what
    `self.modulations(t, y)` gives, where a caller has them already. With kB labels for B images the result is for the
    images k times over, as guidance wants it: forcing and embedding, which no label enters, run once.
    """

    def __init__(self, config: ModelConfig, key: mx.array | None = None) -> None:
        super().__init__()
        c = self._config = config
        if c.spectral_forcing:
            self._forcing = SpectralForcing.of(c)
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.y_embedder = LabelEmbedder(c.num_classes, c.hidden_size)
        self.x_embedder = PatchEmbed(c)
        self.pos_embed = mx.array(sincos_position_table(c.hidden_size, c.grid_size))
        if c.in_context_len:
            self.in_context_posemb = mx.zeros((1, c.in_context_len, c.hidden_size))
        quarter = c.depth // 4
        self.blocks = [Block(c, dropout=quarter <= i < 3 * quarter) for i in range(c.depth)]
        self.final_layer = FinalLayer(c)
        self._cos, self._sin = rotary_tables(c.head_dim, c.grid_size, c.in_context_len)
        self.freeze(recurse=False, keys="pos_embed")  # stored with the weights, never trained
        self.update(initial_weights(self.parameters(), mx.random.key(0) if key is None else key))

    @property
    def config(self) -> ModelConfig:
        return self._config

    def __call__(
        self,
        x: mx.array,
        t: mx.array,
        y: mx.array,
        key: mx.array | None = None,
        block_wrapper: Callable[[Block], Callable[..., mx.array]] | None = None,
        modulations: Sequence[mx.array] | None = None,
    ) -> mx.array:
        c = self._config
        L, N = c.in_context_len, c.grid_size**2
        t = mx.reshape(t, (-1,))
        z = self._forcing(x, t) if c.spectral_forcing else x
        y_emb = self.y_embedder(y)
        # (B, D); every adaLN starts with this SiLU
        silu_c = nn.silu(self.t_embedder(t) + y_emb) if modulations is None else None
        # the position table stays float32, and with it the residual stream, whatever type the products run in
        h = self.x_embedder(z) + self.pos_embed  # (B, N, D)
        if len(y) > len(x):
            h = mx.concatenate([h] * (len(y) // len(x)))  # (kB, N, D)
        keys = [None] * c.depth if key is None else list(mx.random.split(key, c.depth))
        cos, sin = self._cos[L:], self._sin[L:]
        for i, block in enumerate(self.blocks):
            if L and i == c.in_context_start:
                h = mx.concatenate([y_emb[:, None] + self.in_context_posemb, h], axis=1)  # (B, L + N, D)
                cos, sin = self._cos, self._sin
            run = block if block_wrapper is None else block_wrapper(block)
            if modulations is not None:
                h = run(h, None, cos, sin, keys[i], modulations[i])
            else:
                h = run(h, silu_c, cos, sin, keys[i]) if keys[i] is not None else run(h, silu_c, cos, sin)
        head = self.final_layer(h[:, -N:], silu_c, None if modulations is None else modulations[-1])
        return self.unpatchify(head).astype(mx.float32)

    def modulations(self, t: mx.array, y: mx.array) -> list[mx.array]:
        """The adaLN vectors of each block, (B, 6 D), and of the head, (B, 2 D): they depend on t and y alone.

        A sampler needs them once per time and class, not once per image and evaluation.
        """
        silu_c = nn.silu(self.t_embedder(mx.reshape(t, (-1,))) + self.y_embedder(y))
        return [layer.adaLN_modulation[1](silu_c) for layer in (*self.blocks, self.final_layer)]

    def unpatchify(self, tokens: mx.array) -> mx.array:
        """Tokens (B, N, p*p*C) in the order (row, column, channel) -> images (B, C, H, H)."""
        c = self._config
        B, S, p = tokens.shape[0], c.grid_size, c.patch_size
        x = tokens.reshape(B, S, S, p, p, c.out_channels).transpose(0, 5, 1, 3, 2, 4)  # (B, C, S, p, S, p)
        return x.reshape(B, c.out_channels, c.img_size, c.img_size)


def initial_weights(parameters: Any, key: mx.array) -> Any:
    """The reference's initial values for a tree of JiT parameters.

    Xavier-uniform on linear weights, normal(0.02) on the class table, the time linears and the in-context table;
    zeros for every adaLN linear, the head's linear and all biases; ones for norms; the position table as it is.
    """
    leaves: Any = tree_flatten(parameters)
    keys = mx.random.split(key, len(leaves))

    def value(path: str, w: mx.array, k: mx.array) -> mx.array:
        if path == "pos_embed":
            return w
        if "adaLN_modulation" in path or path.startswith("final_layer.linear") or path.endswith("bias"):
            return mx.zeros_like(w)
        if path == "in_context_posemb" or path.startswith(("t_embedder", "y_embedder")):
            return 0.02 * mx.random.normal(w.shape, key=k)
        if w.ndim == 2:
            bound = math.sqrt(6 / (w.shape[0] + w.shape[1]))
            return mx.random.uniform(-bound, bound, w.shape, key=k)
        return mx.ones_like(w)

    return tree_unflatten([(path, value(path, w, k)) for (path, w), k in zip(leaves, keys, strict=True)])


def is_product_operand(name: str) -> bool:
    """Whether a parameter enters the transformer's large matrix products: linear weights and their biases.

    Norm weights, embedding tables, positions and the time embedder do not.
    """
    return not name.startswith(("t_embedder", "y_embedder", "pos_embed", "in_context")) and "norm" not in name


def cast_products(parameters: Any, dtype: mx.Dtype) -> Any:
    """The compute-type policy: operands of the matrix products become `dtype`, as under autocast; all else float32.

    Takes and returns a tree (or flat mapping) of JiT parameters. With these the residual stream, norm statistics,
    attention scores, DCT and loss stay float32 too.
    """
    return tree_map_with_path(lambda k, w: w.astype(dtype if is_product_operand(k) else mx.float32), parameters)
