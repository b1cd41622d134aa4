"""JiT, "Just image Transformer": a plain pixel-space diffusion transformer, optionally with Spectral Forcing.

Images are channels first, (B, 3, H, H), as in the reference. Submodules carry the reference's names, so that a
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
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..common.fields import require
from ..spectral import SpectralForcing
from . import Architecture, Asked, Condition, Shapes, Step
from .flops import jit_flops
from .jit_sizes import SIZES, JiTConfig, model_config, preset_name
from .layers import (
    Linear,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    attention,
    drop,
    modulate,
    rotate,
    silu,
    sincos_position_table,
    unpatchify,
)


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


class Attention(nn.Module):
    def __init__(self, c: JiTConfig, dropout: bool) -> None:
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
    def __init__(self, c: JiTConfig, dropout: bool) -> None:
        super().__init__()
        self.proj_dropout = c.proj_dropout if dropout else 0.0
        self.w12 = Linear(c.hidden_size, 2 * c.mlp_hidden)
        self.w3 = Linear(c.mlp_hidden, c.hidden_size)

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        a, b = mx.split(self.w12(x), 2, axis=-1)
        return self.w3(drop(silu(a) * b, self.proj_dropout, key))


class Block(nn.Module):
    def __init__(self, c: JiTConfig, dropout: bool) -> None:
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


class LabelEmbedder(nn.Module):
    """K classes and, in the last row, "no class"."""

    def __init__(self, num_classes: int, dims: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dims)

    def __call__(self, y: mx.array) -> mx.array:
        return self.embedding_table(y)  # (B, D)


class FinalLayer(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
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

    Conditions are {"labels": (B,) integers}, `num_classes` meaning "no class"; prepared ones hold "modulations", too.
    Call with x (B, 3, H, H), t a scalar, (1,) or (B,) in [0, 1]; returns (B, out_channels, H, H) float32. With `key`
    dropout acts, without it does not. `block_wrapper` turns a block into the callable that runs it.

    Source: Li and He, "Back to Basics: Let Denoising Generative Models Denoise" (arXiv 2511.13720).
    """

    takes_guidance = False

    def __init__(self, config: JiTConfig, key: mx.array | None = None) -> None:
        super().__init__()
        c = self._config = config
        if c.forcing is not None:
            self._forcing = SpectralForcing.of(c.forcing, c.size)
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.y_embedder = self._condition_embedder(c)
        self.x_embedder = PatchEmbed(c.patch_size, c.bottleneck_dim, c.hidden_size)
        self.pos_embed = mx.array(sincos_position_table(c.hidden_size, c.grid_size))
        if c.in_context_len:
            self.in_context_posemb = mx.zeros((1, c.in_context_len, c.hidden_size))
        quarter = c.depth // 4
        self.blocks = [Block(c, dropout=quarter <= i < 3 * quarter) for i in range(c.depth)]
        self.final_layer = FinalLayer(c)
        self._cos, self._sin = rotary_tables(c.head_dim, c.grid_size, c.in_context_len)
        self.freeze(recurse=False, keys=list(ARCHITECTURE.fixed))
        self.update(initial_weights(self.parameters(), mx.random.key(0) if key is None else key))

    @property
    def config(self) -> JiTConfig:
        return self._config

    def _condition_embedder(self, c: JiTConfig) -> Any:
        return LabelEmbedder(c.num_classes, c.hidden_size)

    def _conditioned(self, condition: Condition) -> tuple[mx.array, mx.array]:
        """The vector (B, D) that enters every adaLN, and the tokens (B, 1 or L, D) that enter in context."""
        y_emb: mx.array = self.y_embedder(condition["labels"])
        return y_emb, y_emb[:, None]

    def condition(self, asked: Sequence[Asked]) -> Condition:
        """Labels (B,) of the classes asked for; None is "no class". `FieldError` for what is no class of this model."""
        c = self._config
        for a in asked:
            ok = a is None or (isinstance(a, int) and not isinstance(a, bool) and 0 <= a <= c.null_class)
            require(ok, "classes", a, f"a class from 0 to {c.num_classes - 1}, or None for no class")
        return {"labels": mx.array([c.null_class if a is None else a for a in asked])}

    def precompute(self, condition: Condition) -> Condition:
        """As it is: labels enter together with the time."""
        return condition

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """Adds the adaLN vectors, computed once for each distinct class and not once per image and evaluation."""
        branches = [np.array(c["labels"]) for c in (condition, null) if c is not None]
        classes, rows = np.unique(np.concatenate(branches), return_inverse=True)
        table = self.modulations(step.t, mx.array(classes))
        pick = mx.array(rows)
        prepared: list[Condition] = []
        for c in (condition, null):
            if c is None:
                prepared.append(None)
                continue
            mine, pick = pick[: len(c["labels"])], pick[len(c["labels"]) :]
            prepared.append({**c, "modulations": [m[mine] for m in table]})
        return prepared[0], prepared[1]

    def __call__(
        self,
        x: mx.array,
        t: mx.array,
        condition: Condition,
        key: mx.array | None = None,
        block_wrapper: Callable[[Block], Callable[..., mx.array]] | None = None,
    ) -> mx.array:
        t = mx.reshape(t, (-1,))
        return self._run(self._embedded(x, t), t, condition, key, block_wrapper)

    def guided(self, x: mx.array, t: mx.array, condition: Condition, null: Condition) -> tuple[mx.array, mx.array]:
        """Both branches in one batch: forcing and embedding, which no label enters, run once."""
        t = mx.reshape(t, (-1,))
        h = self._embedded(x, t)
        both = tree_map(lambda c, n: mx.concatenate([c, n]), condition, null)
        t = mx.concatenate([t, t]) if t.size > 1 else t
        given, without = mx.split(self._run(mx.concatenate([h, h]), t, both), 2)
        return given, without

    def _embedded(self, x: mx.array, t: mx.array) -> mx.array:
        """Tokens (B, N, D) of the filtered images."""
        z = self._forcing(x, t) if self._config.forcing is not None else x
        # the position table stays float32, and with it the residual stream, whatever type the products run in
        return self.x_embedder(z) + self.pos_embed

    def _run(
        self,
        h: mx.array,
        t: mx.array,
        condition: Condition,
        key: mx.array | None = None,
        block_wrapper: Callable[[Block], Callable[..., mx.array]] | None = None,
    ) -> mx.array:
        c = self._config
        L, N = c.in_context_len, c.grid_size**2
        (y_emb, in_context), modulations = self._conditioned(condition), condition.get("modulations")
        # (B, D); every adaLN starts with this SiLU
        silu_c = nn.silu(self.t_embedder(t) + y_emb) if modulations is None else None
        keys = [None] * c.depth if key is None else list(mx.random.split(key, c.depth))
        cos, sin = self._cos[L:], self._sin[L:]
        for i, block in enumerate(self.blocks):
            if L and i == c.in_context_start:
                h = mx.concatenate([in_context + self.in_context_posemb, h], axis=1)  # (B, L + N, D)
                cos, sin = self._cos, self._sin
            run = block if block_wrapper is None else block_wrapper(block)
            if modulations is not None:
                h = run(h, None, cos, sin, keys[i], modulations[i])
            else:
                h = run(h, silu_c, cos, sin, keys[i]) if keys[i] is not None else run(h, silu_c, cos, sin)
        head = self.final_layer(h[:, -N:], silu_c, None if modulations is None else modulations[-1])
        return self.unpatchify(head).astype(mx.float32)

    def modulations(self, t: mx.array, y: mx.array) -> list[mx.array]:
        """The adaLN vectors of each block, (B, 6 D), and of the head, (B, 2 D): they depend on t and y alone."""
        return self._modulations(t, self.y_embedder(y))

    def _modulations(self, t: mx.array, y_emb: mx.array) -> list[mx.array]:
        silu_c = nn.silu(self.t_embedder(mx.reshape(t, (-1,))) + y_emb)
        return [layer.adaLN_modulation[1](silu_c) for layer in (*self.blocks, self.final_layer)]

    def unpatchify(self, tokens: mx.array) -> mx.array:
        """Tokens (B, N, p*p*C) of the head -> images (B, C, H, H)."""
        c = self._config
        return unpatchify(tokens, c.patch_size, (c.grid_size, c.grid_size))


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


_LAYER_KINDS = {
    ".attn.": "attention",
    ".mlp.w": "feed_forward",
    "adaLN_modulation.": "modulation",
    "x_embedder.": "patch_embedder",
    "t_embedder.": "time_embedder",
    "final_layer.linear.": "head",
}


def layer_kind(name: str) -> str | None:
    """The kind of linear layer that a parameter belongs to; None for norms, tables and positions."""
    if "norm" in name:
        return None
    return next((kind for part, kind in _LAYER_KINDS.items() if part in name), None)


def lora_target(layer: str) -> bool:
    """Whether adapters touch a linear layer: the products of attention and feed-forward."""
    return layer_kind(f"{layer}.") in ("attention", "feed_forward")


def landmarks(c: JiTConfig) -> Shapes:
    """Shapes that show whether a file holds a network of this size."""
    return {
        "pos_embed": (1, c.grid_size**2, c.hidden_size),
        "x_embedder.proj1.weight": (c.bottleneck_dim, 3 * c.patch_size**2),
        f"blocks.{c.depth - 1}.mlp.w3.weight": (c.hidden_size, c.mlp_hidden),
    }


ARCHITECTURE = Architecture(
    name="jit",
    title="JiT",
    config=JiTConfig,
    network=JiT,
    is_product_operand=is_product_operand,
    layer_kind=layer_kind,
    layer_kinds=tuple(_LAYER_KINDS.values()),
    fixed=("pos_embed",),
    landmarks=landmarks,
    forward_flops=jit_flops,
    class_table="y_embedder.embedding_table.weight",
    head="final_layer.linear.",
    citation="JiT: Li and He, Back to Basics: Let Denoising Generative Models Denoise, arXiv 2511.13720.",
    sizes=tuple(SIZES),
    model_config=model_config,
    preset_name=preset_name,
    lora_target=lora_target,
)
