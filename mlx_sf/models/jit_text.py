"""JiT conditioned on captions: their tokens where a class's enter in context, their mean where a class enters adaLN.

The time stays in adaLN, so that Spectral Forcing tells the network nothing that it does not know. The caption is read
by a frozen encoder, or through a vocabulary of the network's own that is trained along (`text.TextConfig`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..common.fields import require
from . import Condition, Shapes, Step
from .jit import ARCHITECTURE as JIT
from .jit import JiT
from .jit_sizes import SIZES, JiTConfig
from .jit_sizes import model_config as jit_config
from .layers import Linear
from .text import ReadsText, TextConfig


@dataclass(frozen=True)
class JiTTextConfig(JiTConfig):
    """The network: a `JiTConfig` without classes, whose in-context tokens are the places of `text`."""

    architecture: ClassVar[str] = "jit_text"
    least_classes: ClassVar[int] = 0

    num_classes: int = 0
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        require(isinstance(self.text, TextConfig), "text", self.text, "a TextConfig")
        require(self.num_classes == 0, "num_classes", self.num_classes, "0: captions take the place of classes")
        object.__setattr__(self, "in_context_len", self.text.length)
        super().__post_init__()


class CaptionEmbedder(nn.Module):
    """Places (B, L, E) -> D."""

    def __init__(self, dims_in: int, dims_out: int) -> None:
        super().__init__()
        self.proj = Linear(dims_in, dims_out)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


class JiTText(ReadsText, JiT):
    """The network. Conditions are those of `ReadsText`; precomputed ones are {"vector": (B, D), "tokens": (B, L, D)}.

    The vector is the mean over a caption's own places; without a caption, of the learned one that stands everywhere.
    Weights start as JiT's; words are standard normal, the learned vector is normal(0.02).
    """

    def __init__(self, config: JiTTextConfig, key: mx.array | None = None) -> None:
        super().__init__(config, key)
        self._add_text_parameters(config.text)
        k1, k2 = mx.random.split(mx.random.split(mx.random.key(0) if key is None else key)[1])
        self.mask_token = 0.02 * mx.random.normal(self.mask_token.shape, key=k1)
        if config.text.words:
            weight = self.word_table["weight"]
            self.word_table = {"weight": mx.random.normal(weight.shape, key=k2)}

    def _condition_embedder(self, c: Any) -> Any:
        return CaptionEmbedder(c.text.width, c.hidden_size)

    def _conditioned(self, condition: Condition) -> tuple[mx.array, mx.array]:
        if "vector" in condition:
            return condition["vector"], condition["tokens"]
        tokens = self.y_embedder(self._context(condition)).astype(mx.float32)
        own = condition["mask"].astype(mx.float32)
        own = mx.where(own.sum(axis=1, keepdims=True) > 0, own, 1.0)[..., None]
        return (tokens * own).sum(axis=1) / own.sum(axis=1), tokens

    def precompute(self, condition: Condition) -> Condition:
        """The caption as the network takes it, which no time enters."""
        vector, tokens = self._conditioned(condition)
        return {"vector": vector, "tokens": tokens}

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """Adds the adaLN vectors."""
        ready: list[Condition] = []
        for c in (condition, null):
            if c is None:
                ready.append(None)
                continue
            vector, tokens = self._conditioned(c)
            ready.append({"vector": vector, "tokens": tokens, "modulations": self._modulations(step.t, vector)})
        return ready[0], ready[1]


def is_product_operand(name: str) -> bool:
    """As in JiT; the caption's embedder, too."""
    return name.startswith("y_embedder.") or (
        JIT.is_product_operand(name) and not name.startswith(("mask_token", "word_table"))
    )


def layer_kind(name: str) -> str | None:
    """As in JiT; the caption's embedder is a kind of its own."""
    return "text_embedder" if name.startswith("y_embedder.") else JIT.layer_kind(name)


def landmarks(c: JiTTextConfig) -> Shapes:
    """Shapes that show whether a file holds a network of this size."""
    return {**JIT.landmarks(c), "y_embedder.proj.weight": (c.hidden_size, c.text.width)}


def model_config(size: str, patch_size: int, img_size: int, **changes: Any) -> JiTTextConfig:
    """The configuration of a size by name, "nano" to "B" and beyond, with other fields changed as given."""
    text: TextConfig = changes.pop("text", TextConfig())
    plain = jit_config(size, patch_size, img_size, **{**changes, "num_classes": 1})
    own = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    return JiTTextConfig(**{**own, "num_classes": 0, "text": text})


ARCHITECTURE = dataclasses.replace(
    JIT,
    name="jit_text",
    title="JiT with captions",
    config=JiTTextConfig,
    network=JiTText,
    is_product_operand=is_product_operand,
    layer_kind=layer_kind,
    layer_kinds=(*JIT.layer_kinds, "text_embedder"),
    landmarks=landmarks,
    class_table=None,
    sizes=tuple(SIZES),
    model_config=model_config,
    preset_name="JiT-text-{}/{}".format,
    reads_text=True,
)
