"""AdamW exactly as torch's, learning-rate schedules, and the decay of averages of the weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

Tensors = Mapping[str, mx.array]  # parameters, or what belongs to them, by name; float32
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


@dataclass(frozen=True)
class OptimizerOptions:
    """How a run moves its weights and averages them: the peak rate `lr`, AdamW, and two exponential averages.

    `warmup_epochs` and the cosine to `min_lr` are counted in epochs. `clip_grad` bounds the gradients' norm; 0 is no
    bound. `ema_warmup` shortens the averages early in a run.
    """

    lr: float
    warmup_epochs: float
    ema_decay1: float
    ema_decay2: float
    ema_warmup: bool
    lr_schedule: LRSchedule = "constant"
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 0.0

    @property
    def adamw(self) -> AdamW:
        return AdamW(self.beta1, self.beta2, weight_decay=self.weight_decay)

    def rate(self, epoch: float, epochs: float) -> float:
        """Learning rate at `epoch` of a run of `epochs`, both fractional."""
        return learning_rate(epoch, self.lr, self.warmup_epochs, epochs, self.lr_schedule, self.min_lr, self.warmup_lr)

    def ema_decays(self, step: int) -> tuple[float, float]:
        """Decays of both averages at step `step` (from 1)."""
        d1, d2 = (ema_decay(d, step, self.ema_warmup) for d in (self.ema_decay1, self.ema_decay2))
        return d1, d2

    def initial_shares(self, steps: int) -> tuple[float, float]:
        """Shares of the initial weights that are still in both averages after `steps` steps."""
        s1, s2 = (initial_share(d, steps, self.ema_warmup) for d in (self.ema_decay1, self.ema_decay2))
        return s1, s2


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
    warmup_lr: float = 0.0,
) -> float:
    """Rate at `epoch` = step / steps per epoch: linear from `warmup_lr` over the warm-up, then constant or a cosine.

    A warm-up that begins above 0 is computed in float32, as Optax does: MiniT2I's code has it.
    """
    if epoch < warmup_epochs and warmup_lr:
        rise, end, left = (np.float32(v) for v in (warmup_lr - peak, peak, 1 - epoch / warmup_epochs))
        return float(rise * left + end)
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    done = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(decay: float, step: int, warmup: bool) -> float:
    """The decay of step `step` (from 1). With warm-up it grows as (1 + n) / (10 + n), so early averages are short."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def initial_share(decay: float, steps: int, warmup: bool) -> float:
    """Share of the initial weights that is still in the average after `steps` steps: 0.9999^5000 is 0.61."""
    if not warmup:
        return float(decay**steps)
    n = np.arange(1, steps + 1)
    return float(np.exp(np.log(np.minimum(decay, (1 + n) / (10 + n))).sum()))
