"""The four-step student of MM-JiT: guidance and the length of a step are inputs, and one evaluation a step does.

Twenty tokens stand before the text: 8 for the prompt as a whole, 4 for the guidance scale, 2 and 2 for the ends of the
guidance interval, 4 for the step's length. In the text blocks they turn with their places; beside the image they do
not turn at all.

Source: the branch `mean_flow_distill` of the original code of MiniT2I.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx

from . import Condition, Step
from .layers import Linear, TimestepEmbedder
from .mmjit import ARCHITECTURE as MMJIT
from .mmjit import MMJiT, MMJiTConfig, initial_weights

# what it was trained to be sampled with: step, guidance scale, interval
PUBLISHED_STEPS = 4
PUBLISHED_GUIDANCE = (12.0, 0.2, 0.8)


@dataclass(frozen=True)
class MMJiTMFConfig(MMJiTConfig):
    """The student's sizes: those of its teacher."""

    architecture: ClassVar[str] = "mmjit_mf"


class MMJiTMF(MMJiT):
    """The network; conditions as MM-JiT's, and "settings" (B, 4): step length, guidance scale, interval's ends.

    Conditions without "settings" get the published ones.
    """

    takes_guidance = True
    extra_tokens = 20

    def __init__(self, config: MMJiTMFConfig, key: mx.array | None = None) -> None:
        super().__init__(config, key)
        D = config.hidden_size
        self.aux_pooled_embedder = Linear(config.text.width, D, bias=False)
        counts = {"context": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
        for name, count in counts.items():
            self[f"{name}_tokens"] = mx.zeros((1, count, D))
        for name in ("omega", "t_min", "t_max", "h"):
            self[f"{name}_embedder"] = TimestepEmbedder(D)
        self.update(initial_weights(self.parameters(), mx.random.key(0) if key is None else key))

    def precompute(self, condition: Condition) -> Condition:
        """As it is: the prompt enters together with the step's length."""
        return condition

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """The text as the double blocks take it, for a step of this length and this guidance."""
        settings = mx.array([[step.length, step.cfg, step.cfg_low, step.cfg_high]] * len(condition["mask"]))
        return {"text": self._text({**condition, "settings": settings})}, null

    def _embedded_text(self, condition: Condition) -> mx.array:
        c = self._context(condition)
        settings = condition.get("settings")
        if settings is None:
            settings = mx.array([[1 / PUBLISHED_STEPS, *PUBLISHED_GUIDANCE]] * len(c))
        h, omega, t_min, t_max = (settings[:, i] for i in range(4))
        extra = {
            "context": self.aux_pooled_embedder(c.mean(axis=1)),
            "omega": self.omega_embedder(1 - 1 / omega),
            "t_min": self.t_min_embedder(t_min),
            "t_max": self.t_max_embedder(t_max),
            "time": self.h_embedder(h),
        }
        tokens = [self[f"{name}_tokens"] + vector[:, None] for name, vector in extra.items()]
        return mx.concatenate([*tokens, self.txt_embedder(c)], axis=1).astype(mx.float32)


def is_product_operand(name: str) -> bool:
    """As in MM-JiT; nor do the tokens and the embedders of settings enter large products."""
    small = ("_tokens", "omega_embedder", "t_min_embedder", "t_max_embedder", "h_embedder")
    return MMJIT.is_product_operand(name) and not any(part in name for part in small)


def _layer_kind(name: str) -> str | None:
    return MMJIT.layer_kind(name) if is_product_operand(name) else None


ARCHITECTURE = replace(
    MMJIT,
    name="mmjit_mf",
    title="MM-JiT of four steps",
    config=MMJiTMFConfig,
    network=MMJiTMF,
    model_config=None,
    is_product_operand=is_product_operand,
    layer_kind=_layer_kind,
)
