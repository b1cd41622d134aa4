"""The flow, its loss and the network's parameterisation: pure functions, every random number an argument.

Path: z = t x + (1 - t) e with e = noise_scale * normal; t = 0 is noise, 1 is data. Images are (B, C, H, W), t is (B,)
or a scalar. Velocities divide by max(1 - t, t_eps), at sampling too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_map

from .common.fields import check_types, choice, require

PredParam = Literal["x", "v", "hybrid"]


LossKind = Literal["velocity", "x0"]
HybridMode = Literal["one_minus_t", "snr", "snr_inverse"]


@dataclass(frozen=True)
class FlowConfig:
    """The flow, its loss and the network's parameterisation. Times run from 0 (noise) to 1 (data)."""

    pred_param: PredParam = "x"
    hybrid_x_weight_mode: HybridMode = "one_minus_t"
    hybrid_x_weight_power: float = 1.0
    hybrid_x_weight_min: float = 0.0
    hybrid_x_weight_max: float = 1.0
    noise_scale: float = 1.0
    t_eps: float = 0.05
    P_mean: float = -0.8
    P_std: float = 0.8
    label_drop_prob: float = 0.1
    loss: LossKind = "velocity"

    def __post_init__(self) -> None:
        check_types(self)
        choice("pred_param", self.pred_param, PredParam)
        choice("hybrid_x_weight_mode", self.hybrid_x_weight_mode, HybridMode)
        choice("loss", self.loss, LossKind)
        require(self.loss == "velocity" or self.pred_param == "x", "loss", self.loss, "velocity, unless x is predicted")
        require(self.noise_scale > 0, "noise_scale", self.noise_scale, "above 0")
        require(0 < self.t_eps <= 1, "t_eps", self.t_eps, "above 0, at most 1")
        require(self.P_std >= 0, "P_std", self.P_std, "0 or more")
        require(0 <= self.label_drop_prob <= 1, "label_drop_prob", self.label_drop_prob, "a probability")
        low, high = self.hybrid_x_weight_min, self.hybrid_x_weight_max
        require(low <= high, "hybrid_x_weight_min", low, f"at most hybrid_x_weight_max {high}")


def _per_image(t: mx.array) -> mx.array:
    return t.reshape(-1, 1, 1, 1)


def published_noise_scale(img_size: int) -> float:
    """Standard deviation of the noise in the published recipes: 1 at 256 pixels, 2 at 512; never below 1."""
    return max(1.0, img_size / 256)


def training_times(normal: mx.array, flow: FlowConfig) -> mx.array:
    """Logit-normal times t = sigmoid(P_mean + P_std * n) from standard normal draws."""
    return mx.sigmoid(flow.P_mean + flow.P_std * normal)


def drop_conditions(condition: Any, null: Any, uniform: mx.array, probability: float) -> Any:
    """A batch's condition, replaced by `null` for the images whose uniform draw in [0, 1) is below `probability`.

    Both are trees of arrays whose first axis is the batch, as a network's `condition` gives them.
    """
    dropped = uniform < probability
    return tree_map(lambda c, n: mx.where(dropped.reshape(-1, *[1] * (c.ndim - 1)), n, c), condition, null)


def add_noise(x: mx.array, noise: mx.array, t: mx.array, noise_scale: float) -> mx.array:
    """z_t on the straight path from scaled standard normal noise to the images x."""
    t = _per_image(t)
    return t * x + (1 - t) * (noise_scale * noise)


def hybrid_weight(t: mx.array, flow: FlowConfig, t_eps: float | None = None) -> mx.array:
    """Share of the x-head in the hybrid parameterisation at times t: before a power and a clamp, by mode,

    one_minus_t: max(1 - t, eps); snr: s / (1 + s); snr_inverse: 1 / (1 + s); s = max(t, eps)^2 / max(1 - t, eps)^2.
    """
    eps = flow.t_eps if t_eps is None else t_eps
    rest = mx.maximum(1 - t, eps)
    if flow.hybrid_x_weight_mode == "one_minus_t":
        w = rest
    else:
        snr = mx.square(mx.maximum(t, eps)) / mx.square(rest)
        w = (snr if flow.hybrid_x_weight_mode == "snr" else 1.0) / (1 + snr)
    return mx.clip(w**flow.hybrid_x_weight_power, flow.hybrid_x_weight_min, flow.hybrid_x_weight_max)


def velocity(out: mx.array, z: mx.array, t: mx.array, flow: FlowConfig, t_eps: float | None = None) -> mx.array:
    """Velocity (B, 3, H, W) that a network output stands for at state z and time t.

    `t_eps` other than the flow's own bounds 1 - t differently (at sampling); the hybrid's blending weight, which the
    network was trained with, keeps the flow's.
    """
    if flow.pred_param == "v":
        return out
    rest = mx.maximum(1 - _per_image(t), flow.t_eps if t_eps is None else t_eps)
    if flow.pred_param == "x":
        return (out - z) / rest
    out_x, out_v = mx.split(out, 2, axis=1)
    w = _per_image(hybrid_weight(t, flow))
    return w * (out_x - z) / rest + (1 - w) * out_v


def flow_loss(v_pred: mx.array, x: mx.array, z: mx.array, t: mx.array, flow: FlowConfig) -> mx.array:
    """Squared velocity error per image (B,): the mean over its pixels. The loss is the mean over the batch."""
    v = (x - z) / mx.maximum(1 - _per_image(t), flow.t_eps)
    return mx.square(v - v_pred).mean(axis=(1, 2, 3))


def training_loss(
    network: Callable[[mx.array, mx.array, Any], mx.array],
    x: mx.array,
    condition: Any,
    t: mx.array,
    noise: mx.array,
    flow: FlowConfig,
) -> mx.array:
    """Mean loss of images x in [-1, 1] with their condition (dropped already), times t and standard normal noise."""
    z = add_noise(x, noise, t, flow.noise_scale)
    out = network(z, t, condition)
    if flow.loss == "x0":
        return mx.square(out - x).mean()
    return flow_loss(velocity(out, z, t, flow), x, z, t, flow).mean()
