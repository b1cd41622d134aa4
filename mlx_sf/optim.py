"""AdamW exactly as torch's, and learning-rate schedules. Parameters are flat dicts {name: float32 array}."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Tensors = Mapping[str, mx.array]
LRSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class AdamW:
    """Bias-corrected Adam with decoupled weight decay, which biases and vectors are spared.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization"; order of operations as in torch.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def scalars(self, lr: float, step: int) -> list[float]:
        """The numbers that differ from step to step, in double precision; `step` counts from 1."""
        step_size = lr / (1 - self.beta1**step)
        return [1 - lr * self.weight_decay, step_size, math.sqrt(1 - self.beta2**step)]

    def update(
        self, p: mx.array, g: mx.array, m: mx.array, v: mx.array, scalars: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """One parameter's new value and moments; `scalars` (3,) float32 from `scalars`."""
        keep, step_size, correction2 = scalars[0], scalars[1], scalars[2]
        m = m + (1 - self.beta1) * (g - m)
        v = self.beta2 * v + (1 - self.beta2) * mx.square(g)
        if self.weight_decay and decays(p):
            p = p * keep
        return p - step_size * (m / (mx.sqrt(v) / correction2 + self.eps)), m, v


def decays(p: mx.array) -> bool:
    """Weight decay acts on matrices and tables, never on biases and norm weights."""
    return p.ndim > 1


def clip_by_norm(gradients: Tensors, max_norm: float) -> tuple[dict[str, mx.array], mx.array]:
    """Gradients scaled so that their joint norm is at most `max_norm` (0: left alone), and the norm before."""
    norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), start=mx.array(0.0)))
    if not max_norm:
        return dict(gradients), norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)  # as in torch's clip_grad_norm_
    return {k: g * factor for k, g in gradients.items()}, norm


def learning_rate(
    epoch: float,
    peak: float,
    warmup_epochs: float,
    epochs: float,
    schedule: LRSchedule = "constant",
    min_lr: float = 0.0,
) -> float:
    """Rate at `epoch` = step / steps per epoch: linear from 0 over the warm-up, then constant, or half a cosine."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    done = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
