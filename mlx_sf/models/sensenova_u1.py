"""The generation side of SenseNova-U1: pixels in, pixels out, with a prompt's keys and values before its own.

A picture of any height and width that the token side divides is cut into tokens of P x P pixels. They attend, without
a mask, to the prompt's keys and values of the same layer (`u1_text`) and to each other. The network predicts the clean
picture. Submodules carry the published names without `_mot_gen`, which `checkpoints.u1_files` maps.

B batch, H x W picture, p patch side, P = 2p token side, L = (H/P)(W/P) image tokens, T prompt tokens, C hidden size,
E embedder width, h query heads and g key heads of size d.

Source: "SenseNova-U1" (arXiv 2605.12500), and the public code of its authors for what the paper leaves out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..common.fields import require
from ..errors import MlxSfError
from ..spectral import SpectralForcing
from . import Architecture, Asked, Condition, Shapes, Step
from .layers import Linear, RMSNorm, TimestepEmbedder, rotate, unpatchify
from .u1_config import MERGE, U1Config
from .u1_layers import ConvHead, Layer, Places, grid_tables, merged, patch_tables, patches, time_angles

# ------------------------------------------------------------------------------------------------------ the network


class U1(nn.Module):
    """The generation side. Weights start small and random, for measurements: nobody trains it from nothing here.

    Conditions are {"k": [(B, g, T, d)], "v": [...], "cos": (B, 1, 1, d/4), "sin": ...}, a layer each, and "seen" (B, T)
    where prompts of a batch differ in length. `features` gives the prefixes of prompts (`u1_text.Prefix`), of None,
    too; whoever loads the network sets it. `places` pads every condition to that many tokens, so that those of a
    training's batches have one shape; None pads to the longest of a batch.

    Call with z (B, 3, H, W), t a scalar, (1,) or (B,); returns the predicted clean picture (B, 3, H, W), float32.
    `noise_scale` is the scale that z was made with, the size's own unless given.
    """

    takes_guidance = False

    def __init__(self, config: U1Config, key: mx.array | None = None) -> None:
        super().__init__()
        c = self._config = config
        self._features: Callable[[Sequence[str | None]], Sequence[Any]] | None = None
        self._places: int | None = None
        self._forcings: dict[tuple[int, int], SpectralForcing] = {}
        self.patch_embedding = Linear(3 * c.patch_size**2, c.embed_width)
        self.dense_embedding = Linear(c.embed_width * MERGE**2, c.hidden_size)
        self.timestep_embedder = TimestepEmbedder(c.hidden_size)
        if c.noise_embedding:
            self.noise_scale_embedder = TimestepEmbedder(c.hidden_size)
        self.head: Any
        self.layers = [Layer(c) for _ in range(c.depth)]
        self.norm = RMSNorm(c.hidden_size)
        if c.head == "conv":
            self.head = ConvHead(c)
        else:
            self.head = [Linear(c.hidden_size, c.head_width), nn.GELU(), Linear(c.head_width, 3 * c.token_size**2)]
        self.update(_initial_weights(self.parameters(), mx.random.key(0) if key is None else key))

    @property
    def config(self) -> U1Config:
        return self._config

    @property
    def features(self) -> Callable[[Sequence[str | None]], Sequence[Any]] | None:
        return self._features

    @features.setter
    def features(self, features: Callable[[Sequence[str | None]], Sequence[Any]] | None) -> None:
        self._features = features

    @property
    def places(self) -> int | None:
        return self._places

    @places.setter
    def places(self, places: int | None) -> None:
        self._places = places

    def condition(self, asked: Sequence[Asked]) -> Condition:
        """The condition of prompts; None is the unconditional branch. `FieldError` for a class number."""
        for a in asked:
            require(a is None or isinstance(a, str), "prompt", a, "a text, or None for no prompt")
        if self._features is None:
            raise MlxSfError("prompts need the understanding side of SenseNova-U1, and this network was loaded without")
        return self.condition_of(self._features([None if a is None else str(a) for a in asked]))

    def condition_of(self, prefixes: Sequence[Any]) -> Condition:
        """The condition of a batch of prefixes (`u1_text.Prefix`)."""
        lengths = np.array([p.length for p in prefixes])
        T = self._places or int(lengths.max())
        if lengths.max() > T:
            raise MlxSfError(f"a prompt has {lengths.max()} tokens, want at most {T}: shorten it")
        angles = time_angles(self._config, lengths)[:, None, None]

        def stacked(part: str, i: int) -> mx.array:
            if all(p is prefixes[0] for p in prefixes) and prefixes[0].length == T:
                one = getattr(prefixes[0], part)[i]
                return mx.broadcast_to(one[None], (len(prefixes), *one.shape))
            values = [getattr(p, part)[i] for p in prefixes]
            return mx.stack([mx.pad(v, [(0, 0), (0, T - v.shape[1]), (0, 0)]) for v in values])

        condition = {
            "k": [stacked("keys", i) for i in range(self._config.depth)],
            "v": [stacked("values", i) for i in range(self._config.depth)],
            "cos": mx.array(np.cos(angles).astype(np.float32)),
            "sin": mx.array(np.sin(angles).astype(np.float32)),
        }
        if (lengths != T).any() or self._places is not None:
            condition["seen"] = mx.array(np.arange(T)[None] < lengths[:, None])
        return condition

    def precompute(self, condition: Condition) -> Condition:
        """As it is: its prefix was computed when the prompt was first seen."""
        return condition

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """As they are: time decides nothing of them."""
        return condition, null

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        condition: Condition,
        key: mx.array | None = None,
        block_wrapper: Callable[[Any], Callable[..., Any]] | None = None,
        noise_scale: float | None = None,
    ) -> mx.array:
        return self._run(z, t, [condition], block_wrapper, noise_scale)[0]

    def guided(self, z: mx.array, t: mx.array, condition: Condition, null: Condition) -> tuple[mx.array, mx.array]:
        """Both branches side by side: one embedding, one visit to each layer, an attention for each."""
        given, without = self._run(z, t, [condition, null])
        return given, without

    def tokens_in(self, z: mx.array, t: mx.array, noise_scale: float | None = None) -> mx.array:
        """Tokens (B, L, C) before the first layer: the picture, filtered where it is forced, its time and its noise."""
        c, size = self._config, (z.shape[2], z.shape[3])
        s = c.noise_at(size) if noise_scale is None else noise_scale
        t = mx.reshape(t, (-1,)).astype(mx.float32)
        x = self._embedded(self._filtered(z, t))
        x = x + self.timestep_embedder(t)[:, None].astype(mx.float32)
        if c.noise_embedding:
            x = x + self.noise_scale_embedder(mx.array([s / c.noise_max]))[:, None].astype(mx.float32)
        return x

    def _filtered(self, z: mx.array, t: mx.array) -> mx.array:
        if self._config.forcing is None:
            return z
        size = (z.shape[2], z.shape[3])
        if size not in self._forcings:
            self._forcings[size] = SpectralForcing.of(self._config.forcing, size)
        return self._forcings[size](z, t)

    def _embedded(self, z: mx.array) -> mx.array:
        c = self._config
        rows, columns = z.shape[2] // c.patch_size, z.shape[3] // c.patch_size
        x = nn.gelu(self.patch_embedding(patches(z, c.patch_size)).astype(mx.float32))
        tables = patch_tables(c.embed_width, c.rope_theta_vision, rows, columns)
        x = rotate(x[:, :, None], *tables)[:, :, 0]
        return self.dense_embedding(merged(x, rows, columns)).astype(mx.float32)

    def _run(
        self,
        z: mx.array,
        t: mx.array,
        branches: Sequence[Condition],
        block_wrapper: Callable[[Any], Callable[..., Any]] | None = None,
        noise_scale: float | None = None,
    ) -> list[mx.array]:
        c, (H, W) = self._config, z.shape[2:]
        P = c.token_size
        if H % P or W % P:
            raise MlxSfError(f"images are {H} x {W}, want sides that are multiples of {P}")
        h = self.tokens_in(z, t, noise_scale)
        h = mx.concatenate([h] * len(branches)) if len(branches) > 1 else h
        grid = (H // P, W // P)
        time = tuple(mx.concatenate([b[name] for b in branches]) for name in ("cos", "sin"))
        places = Places((time[0], time[1]), *grid_tables(c.head_dim // 4, c.rope_theta_hw, *grid))
        for i, layer in enumerate(self.layers):
            run = layer if block_wrapper is None else block_wrapper(layer)
            h = run(h, places, [(b["k"][i], b["v"][i], b.get("seen")) for b in branches])
        x = self._pixels(self.norm(h), grid)
        return list(mx.split(x, len(branches)))

    def _pixels(self, h: mx.array, grid: tuple[int, int]) -> mx.array:
        """Clean pictures (B, 3, H, W) float32 of the last tokens."""
        if self._config.head == "conv":
            x = self.head(h.reshape(len(h), *grid, -1))
            return mx.moveaxis(x, -1, 1).astype(mx.float32)
        x = self.head[2](nn.gelu(self.head[0](h))).astype(mx.float32)
        return unpatchify(x, self._config.token_size, grid)


def _initial_weights(parameters: Any, key: mx.array) -> Any:
    """Normal within 1/sqrt(inputs) for weights, zeros for biases, ones for norms."""
    leaves: Any = tree_flatten(parameters)
    keys = mx.random.split(key, len(leaves))

    def value(path: str, w: mx.array, k: mx.array) -> mx.array:
        if "norm" in path:
            return mx.ones(w.shape)
        if path.endswith("bias"):
            return mx.zeros(w.shape)
        return mx.random.normal(w.shape, key=k) * (w.size // w.shape[0]) ** -0.5

    return tree_unflatten([(path, value(path, w, k)) for (path, w), k in zip(leaves, keys, strict=True)])


# --------------------------------------------------------------------------------------------- roles of parameters


def is_product_operand(name: str) -> bool:
    """Whether a parameter enters the large matrix products: all but norms and the embedders of time and noise."""
    return "norm" not in name and not name.startswith(("timestep_embedder", "noise_scale_embedder"))


_LAYER_KINDS = {
    "self_attn.": "attention",
    "mlp.gate_proj": "feed_forward",
    "mlp.up_proj": "feed_forward",
    "mlp.down_proj": "feed_forward",
    "patch_embedding.": "patch_embedder",
    "dense_embedding.": "patch_embedder",
    "timestep_embedder.": "time_embedder",
    "noise_scale_embedder.": "time_embedder",
    "head.0.": "head",
    "head.2.": "head",
}


def layer_kind(name: str) -> str | None:
    """The kind of linear layer that a parameter belongs to; None for norms and convolutions."""
    return None if "norm" in name and "noise" not in name else _kind_of(name)


def _kind_of(name: str) -> str | None:
    return next((kind for part, kind in _LAYER_KINDS.items() if part in name), None)


def lora_target(layer: str) -> bool:
    """Whether adapters touch a linear layer unless they say so themselves: the layers' products."""
    return layer.startswith("layers.")


def landmarks(c: U1Config) -> Shapes:
    """Shapes that show whether a file holds a network of this size."""
    inner = c.num_heads * c.head_dim
    head = {"head.conv1.weight": (c.head_width, 3, 3, c.hidden_size // 4)} if c.head == "conv" else {
        "head.0.weight": (c.head_width, c.hidden_size)
    }  # fmt: skip
    return {
        "patch_embedding.weight": (c.embed_width, 3 * c.patch_size**2),
        f"layers.{c.depth - 1}.self_attn.o_proj.weight": (c.hidden_size, inner),
        f"layers.{c.depth - 1}.mlp.down_proj.weight": (c.hidden_size, c.mlp_hidden),
        "norm.weight": (c.hidden_size,),
        **head,
    }


def forward_flops(c: U1Config) -> int:
    """Operations of a forward pass for one picture, the attention to its prompt left out."""
    L, C, E, inner = c.tokens, c.hidden_size, c.embed_width, c.num_heads * c.head_dim
    per_token = C * (2 * inner + 2 * c.num_kv_heads * c.head_dim) + 3 * C * c.mlp_hidden
    layers = c.depth * (L * per_token + 2 * L * L * inner)
    embedder = L * MERGE**2 * (3 * c.patch_size**2 * E + E * C)
    if c.head == "conv":
        head = L * 4 * 9 * (C // 4) * c.head_width + L * 16 * 9 * (c.head_width // 4) * 192
    else:
        head = L * (C * c.head_width + c.head_width * 3 * c.token_size**2)
    forcing = 0 if c.forcing is None else 3 * 2 * math.prod(c.size) * sum(c.forcing.window(c.size))
    return 2 * (layers + embedder + head + forcing)


ARCHITECTURE = Architecture(
    name="sensenova_u1",
    title="SenseNova-U1",
    config=U1Config,
    network=U1,
    is_product_operand=is_product_operand,
    layer_kind=layer_kind,
    layer_kinds=tuple(dict.fromkeys(_LAYER_KINDS.values())),
    fixed=(),
    landmarks=landmarks,
    forward_flops=forward_flops,
    lora_target=lora_target,
    lora_prefix="",
    resized=U1Config.at,
    noise_at=lambda c: c.noise_at(c.size),
    verbatim=True,
    companions=("text/", "tokenizer/"),
)
