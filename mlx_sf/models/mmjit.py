"""MM-JiT, the network of MiniT2I: text to image in pixels, by double-stream blocks without any modulation.

Images are (B, 3, H, H). Submodules carry the names of the published PyTorch files, so that a parameter's path here is
its key there without "model.net.". The published files also hold `t_embedder` and `pooled_embedder`, whose results
nothing reads: this network has neither, and sees t through Spectral Forcing alone, if it has that.

B batch, H image side, p patch side, S = H/p, N = S*S image tokens, L text places, E width of the text features,
D hidden size, h heads of size d.

Source: Wang, Zhao, Lu, Zhou, Ma, He, "MiniT2I: A Minimalist Baseline for Text-to-Image Generation" (2026).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..common.fields import check_types, require
from ..common.pixels import to_uint8_half_up
from ..spectral import ForcingConfig, SpectralForcing
from . import Architecture, Condition, Shapes, Step
from .layers import (
    Linear,
    PatchEmbed,
    RMSNorm,
    attention,
    rotate_halves,
    silu,
    sincos_position_table,
    unpatchify,
)
from .text import ReadsText, TextConfig


@dataclass(frozen=True)
class MMJiTConfig:
    """The network; with Spectral Forcing on its input or (`forcing` None, as published) without.

    `depth` counts double blocks, `text_depth` the blocks before them that see text alone. `num_heads` x `head_dim` need
    not be `hidden_size`. Raises `FieldError` where sizes do not fit together.
    """

    architecture: ClassVar[str] = "mmjit"
    num_classes: ClassVar[int] = 0
    out_channels: ClassVar[int] = 3

    img_size: int = 512
    patch_size: int = 16
    hidden_size: int = 768
    depth: int = 17
    text_depth: int = 2
    num_heads: int = 12
    head_dim: int = 64
    mlp_hidden: int = 2048
    bottleneck_dim: int = 128
    text: TextConfig = field(default_factory=TextConfig)
    forcing: ForcingConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        positive = ("img_size", "patch_size", "hidden_size", "depth", "num_heads", "mlp_hidden", "bottleneck_dim")
        for name in positive:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(2 <= self.img_size <= 8192, "img_size", self.img_size, "2 to 8192 pixels")
        want = f"a divisor of img_size {self.img_size}"
        require(self.img_size % self.patch_size == 0, "patch_size", self.patch_size, want)
        require(self.hidden_size % 4 == 0, "hidden_size", self.hidden_size, "a multiple of 4")
        require(self.head_dim >= 4 and self.head_dim % 4 == 0, "head_dim", self.head_dim, "a multiple of 4")
        require(self.text_depth >= 0, "text_depth", self.text_depth, "0 or more")
        require(isinstance(self.text, TextConfig), "text", self.text, "a TextConfig")
        if self.forcing is not None:
            require(isinstance(self.forcing, ForcingConfig), "forcing", self.forcing, "a ForcingConfig or None")
            object.__setattr__(self, "forcing", self.forcing.on(self.size))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.img_size, self.img_size

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.img_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the joint sequence of text and image."""
        return self.text.length + self.grid_size**2


Tables = tuple[mx.array, mx.array]  # cosines and sines (T, 1, d/2)


def _tables(angles: np.ndarray) -> Tables:
    angles = angles[:, None]
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def text_angles(head_dim: int, places: int) -> np.ndarray:
    """Rotary angles (L, d/2) of text places: l * 10000^(-2j/d)."""
    return np.arange(places)[:, None] * 10000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)


def image_angles(head_dim: int, grid_size: int) -> np.ndarray:
    """Rotary angles (N, d/2) of image tokens: the first d/4 by row, the others by column, r * 10000^(-4j/d)."""
    axis = np.arange(grid_size)[:, None] * 10000.0 ** (-4 * np.arange(head_dim // 4) / head_dim)  # (S, d/4)
    return np.concatenate([np.repeat(axis, grid_size, axis=0), np.tile(axis, (grid_size, 1))], axis=1)


class SwiGLU(nn.Module):
    def __init__(self, c: MMJiTConfig) -> None:
        super().__init__()
        self.w1 = Linear(c.hidden_size, c.mlp_hidden, bias=False)
        self.w3 = Linear(c.hidden_size, c.mlp_hidden, bias=False)
        self.w2 = Linear(c.mlp_hidden, c.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(silu(self.w1(x)) * self.w3(x))


def _heads(qkv: mx.array, c: MMJiTConfig) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values (B, T, h, d) of a `qkv` layer's output."""
    parts = qkv.reshape(*qkv.shape[:2], 3, c.num_heads, c.head_dim)
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def _attended(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention over (B, T, h, d), its heads joined: (B, T, h*d)."""
    x = attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


class TextBlock(nn.Module):
    """A transformer block on the text alone."""

    def __init__(self, c: MMJiTConfig) -> None:
        super().__init__()
        self._config = c
        inner = c.num_heads * c.head_dim
        self.norm1, self.norm2 = RMSNorm(c.hidden_size), RMSNorm(c.hidden_size)
        self.qkv, self.attn_proj = Linear(c.hidden_size, 3 * inner), Linear(inner, c.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)
        self.mlp = SwiGLU(c)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        q, k, v = _heads(self.qkv(self.norm1(x)), self._config)
        q, k = rotate_halves(self.q_norm(q), cos, sin), rotate_halves(self.k_norm(k), cos, sin)
        x = x + self.attn_proj(_attended(q, k, v))
        return x + self.mlp(self.norm2(x))


class DoubleBlock(nn.Module):
    """Text and image with weights of their own and one attention over both, without a mask.

    The last block of a network gives its image tokens alone: nothing reads its text.
    """

    def __init__(self, c: MMJiTConfig, last: bool) -> None:
        super().__init__()
        self._config, self.last = c, last
        inner = c.num_heads * c.head_dim
        for stream in ("img", "txt"):
            self[f"{stream}_norm1"], self[f"{stream}_norm2"] = RMSNorm(c.hidden_size), RMSNorm(c.hidden_size)
            self[f"{stream}_qkv"] = Linear(c.hidden_size, 3 * inner)
            self[f"{stream}_attn_proj"] = Linear(inner, c.hidden_size)
            self[f"{stream}_mlp"] = SwiGLU(c)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)

    def __call__(self, txt: mx.array, img: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
        T = txt.shape[1]
        text = _heads(self.txt_qkv(self.txt_norm1(txt)), self._config)
        image = _heads(self.img_qkv(self.img_norm1(img)), self._config)
        q, k, v = (mx.concatenate([a, b], axis=1) for a, b in zip(text, image, strict=True))
        if self.last:
            q, T = image[0], 0
        q = rotate_halves(self.q_norm(q), cos[-q.shape[1] :], sin[-q.shape[1] :])
        x = _attended(q, rotate_halves(self.k_norm(k), cos, sin), v)
        img = img + self.img_attn_proj(x[:, T:])
        img = img + self.img_mlp(self.img_norm2(img))
        if not self.last:
            txt = txt + self.txt_attn_proj(x[:, :T])
            txt = txt + self.txt_mlp(self.txt_norm2(txt))
        return txt, img


class FinalLayer(nn.Module):
    def __init__(self, c: MMJiTConfig) -> None:
        super().__init__()
        self.norm_final = RMSNorm(c.hidden_size)
        self.linear = Linear(c.hidden_size, c.patch_size**2 * c.out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self.norm_final(x))


class MMJiT(ReadsText, nn.Module):
    """The network. Weights start as in the original code, drawn from `key` (default: key 0).

    Conditions are those of `ReadsText`; precomputed ones are {"text": (B, L, D)}.
    Call with x (B, 3, H, H), t a scalar, (1,) or (B,), which matters to forcing alone; returns (B, 3, H, H) float32.
    """

    takes_guidance = False
    # text tokens that are no places of the prompt
    extra_tokens = 0

    def __init__(self, config: MMJiTConfig, key: mx.array | None = None) -> None:
        super().__init__()
        c = self._config = config
        if c.forcing is not None:
            self._forcing = SpectralForcing.of(c.forcing, c.size)
        self._add_text_parameters(c.text)
        self.img_embedder = PatchEmbed(c.patch_size, c.bottleneck_dim, c.hidden_size)
        self.txt_embedder = Linear(c.text.width, c.hidden_size, bias=False)
        self.txt_preamble_blocks = [TextBlock(c) for _ in range(c.text_depth)]
        self.double_blocks = [DoubleBlock(c, last=i == c.depth - 1) for i in range(c.depth)]
        self.final_layer = FinalLayer(c)
        self._positions = mx.array(sincos_position_table(c.hidden_size, c.grid_size))
        E = self.extra_tokens
        angles = text_angles(c.head_dim, E + c.text.length)
        self._text_rotary = _tables(angles)
        # extra tokens turn among the text, but not beside the image
        angles = np.concatenate([0 * angles[:E], angles[E:], image_angles(c.head_dim, c.grid_size)])
        self._joint_rotary = _tables(angles)
        self.update(initial_weights(self.parameters(), mx.random.key(0) if key is None else key))

    @property
    def config(self) -> MMJiTConfig:
        return self._config

    # ---------------------------------------------------------------------------------------- text

    def _embedded_text(self, condition: Condition) -> mx.array:
        """Tokens (B, L, D) of the prompts, before any block."""
        # float32 as the image's tokens are: the residual stream, whatever type the products run in
        return self.txt_embedder(self._context(condition)).astype(mx.float32)

    def _text(self, condition: Condition) -> mx.array:
        """Text tokens (B, T, D) as the double blocks take them."""
        return self._preamble(self._embedded_text(condition))

    def _preamble(self, x: mx.array, block_wrapper: Callable[[Any], Callable[..., Any]] | None = None) -> mx.array:
        for block in self.txt_preamble_blocks:
            x = (block if block_wrapper is None else block_wrapper(block))(x, *self._text_rotary)
        return x

    def precompute(self, condition: Condition) -> Condition:
        """The text as the double blocks take it, once for each distinct prompt."""
        keys = [tuple(np.array(v[i]).tobytes() for v in condition.values()) for i in range(len(condition["mask"]))]
        first = {k: i for i, k in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        text = self._text({name: v[mx.array(places)] for name, v in condition.items()})
        return {"text": text[mx.array([places.index(first[k]) for k in keys])]}

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """As they are: time decides nothing."""
        return condition, null

    # ---------------------------------------------------------------------------------------- image

    def __call__(
        self,
        x: mx.array,
        t: mx.array,
        condition: Condition,
        key: mx.array | None = None,
        block_wrapper: Callable[[Any], Callable[..., Any]] | None = None,
    ) -> mx.array:
        text = condition.get("text")
        if text is None:
            text = self._preamble(self._embedded_text(condition), block_wrapper)
        return self._run(self._embedded(x, t), text, block_wrapper)

    def guided(self, x: mx.array, t: mx.array, condition: Condition, null: Condition) -> tuple[mx.array, mx.array]:
        """Both branches in one batch: forcing and patch embedding, which no prompt enters, run once."""
        h = self._embedded(x, t)
        text = mx.concatenate([c["text"] if "text" in c else self._text(c) for c in (condition, null)])
        given, without = mx.split(self._run(mx.concatenate([h, h]), text), 2)
        return given, without

    def _embedded(self, x: mx.array, t: mx.array) -> mx.array:
        """Tokens (B, N, D) of the images, filtered where the network is forced."""
        if self._config.forcing is not None:
            x = self._forcing(x, mx.reshape(t, (-1,)))
        return self.img_embedder(x) + self._positions

    def _run(
        self, h: mx.array, text: mx.array, block_wrapper: Callable[[Any], Callable[..., Any]] | None = None
    ) -> mx.array:
        c = self._config
        for block in self.double_blocks:
            text, h = (block if block_wrapper is None else block_wrapper(block))(text, h, *self._joint_rotary)
        out = self.final_layer(h).astype(mx.float32)
        return unpatchify(out, c.patch_size, (c.grid_size, c.grid_size))


def initial_weights(parameters: Any, key: mx.array) -> Any:
    """The original code's initial values for a tree of MM-JiT parameters.

    Xavier-uniform for the feed-forward and the patch embedder; uniform within 1/sqrt(inputs) for the other linear
    layers, biases included; zeros for the head and the patch embedder's bias; normal(0.02) for the mask token; ones
    for norms. A table of words, which the original does not have, is standard normal.
    """
    leaves: Any = tree_flatten(parameters)
    keys = mx.random.split(key, len(leaves))
    shapes = {path: w.shape for path, w in leaves}

    def value(path: str, w: mx.array, k: mx.array) -> mx.array:
        if path.startswith("final_layer.linear") or path == "img_embedder.proj2.bias":
            return mx.zeros_like(w)
        if path == "mask_token" or path.endswith("_tokens"):
            return 0.02 * mx.random.normal(w.shape, key=k)
        if path.startswith("word_table"):
            return mx.random.normal(w.shape, key=k)
        if "norm" in path:
            return mx.ones_like(w)
        if ".mlp." in path or "_mlp." in path or path.startswith("img_embedder"):
            bound = math.sqrt(6 / sum(w.shape))
        else:
            bound = shapes[path.removesuffix("bias") + "weight" if path.endswith("bias") else path][1] ** -0.5
        return mx.random.uniform(-bound, bound, w.shape, key=k)

    return tree_unflatten([(path, value(path, w, k)) for (path, w), k in zip(leaves, keys, strict=True)])


def is_product_operand(name: str) -> bool:
    """Whether a parameter enters the large matrix products: linear weights and their biases, no norms and no tokens."""
    return "norm" not in name and not name.startswith(("mask_token", "word_table"))


_LAYER_KINDS = {
    "qkv.": "attention",
    "attn_proj.": "attention",
    "mlp.w": "feed_forward",
    "img_embedder.": "patch_embedder",
    "txt_embedder.": "text_embedder",
    "final_layer.linear.": "head",
}


def layer_kind(name: str) -> str | None:
    """The kind of linear layer that a parameter belongs to; None for norms and tables."""
    return next((kind for part, kind in _LAYER_KINDS.items() if part in name), None)


def lora_target(layer: str) -> bool:
    """Whether the published adapters touch a linear layer."""
    return any(part in layer for part in ("qkv", "attn_proj", "mlp.w", "txt_embedder"))


def landmarks(c: MMJiTConfig) -> Shapes:
    """Shapes that show whether a file holds a network of this size."""
    return {
        "mask_token": (1, 1, c.text.width),
        "img_embedder.proj1.weight": (c.bottleneck_dim, 3 * c.patch_size**2),
        f"double_blocks.{c.depth - 1}.img_mlp.w2.weight": (c.hidden_size, c.mlp_hidden),
        "final_layer.linear.weight": (3 * c.patch_size**2, c.hidden_size),
    }


def forward_flops(c: MMJiTConfig) -> int:
    """Operations of a forward pass for one image whose text has been through its own blocks already."""
    N, L, D, inner = c.grid_size**2, c.text.length, c.hidden_size, c.num_heads * c.head_dim
    per_token = 3 * D * inner + inner * D + 3 * D * c.mlp_hidden
    T = N + L
    blocks = c.depth * (T * per_token + 2 * T * T * inner)
    # of the last block's text only keys and values are needed
    blocks -= L * (D * inner + inner * D + 3 * D * c.mlp_hidden) + 2 * L * T * inner
    ends = N * (3 * c.patch_size**2 * c.bottleneck_dim + c.bottleneck_dim * D + D * c.patch_size**2 * 3)
    forcing = 0
    if c.forcing is not None:
        forcing = 3 * 2 * c.img_size**2 * sum(c.forcing.window(c.size))
    return 2 * (blocks + ends + forcing)


# hidden size, double blocks, text blocks, heads, head size, feed-forward, bottleneck, published patches
SIZES: dict[str, tuple[int, int, int, int, int, int, int, tuple[int, ...]]] = {
    # ours, for one laptop
    "nano": (128, 4, 1, 2, 64, 344, 64, ()),
    "tiny": (192, 6, 1, 3, 64, 512, 64, ()),
    "small": (384, 10, 2, 6, 64, 1024, 128, ()),
    # published
    "B": (768, 17, 2, 12, 64, 2048, 128, (16, 32)),
    "L": (1248, 23, 2, 24, 52, 3376, 128, (16,)),
}


def size_name(c: MMJiTConfig) -> str | None:
    """The name of a network's size, None where it is none of ours."""
    own = (c.hidden_size, c.depth, c.text_depth, c.num_heads, c.head_dim, c.mlp_hidden, c.bottleneck_dim)
    return next((name for name, size in SIZES.items() if size[:7] == own), None)


def model_config(size: str, patch_size: int, img_size: int, **changes: Any) -> MMJiTConfig:
    """The configuration of a size by name, "nano" to "L", with other fields changed as given."""
    found = next((n for n in SIZES if n.lower() == size.lower()), None)
    require(found is not None, "size", size, "one of " + ", ".join(SIZES))
    hidden, depth, text_depth, heads, head_dim, mlp_hidden, bottleneck, _ = SIZES[str(found)]
    return MMJiTConfig(
        img_size, patch_size, hidden, depth, text_depth, heads, head_dim, mlp_hidden, bottleneck, **changes
    )


ARCHITECTURE = Architecture(
    name="mmjit",
    title="MM-JiT",
    config=MMJiTConfig,
    network=MMJiT,
    is_product_operand=is_product_operand,
    layer_kind=layer_kind,
    layer_kinds=tuple(dict.fromkeys(_LAYER_KINDS.values())),
    fixed=(),
    landmarks=landmarks,
    forward_flops=forward_flops,
    head="final_layer.linear.",
    lora_target=lora_target,
    lora_prefix="base_model.model.model.net.",
    to_uint8=to_uint8_half_up,
    citation="MiniT2I: Wang, Zhao, Lu, Zhou, Ma, He, A Minimalist Baseline for Text-to-Image Generation, 2026.",
    sizes=tuple(SIZES),
    model_config=model_config,
    preset_name="MM-JiT-{}/{}".format,
    reads_text=True,
    sees_time=False,
)
