"""The flow, its loss and the network's parameterisation: pure functions, every random number an argument.

Path: z = t x + (1 - t) e with e = noise_scale * normal; t = 0 is noise, 1 is data. Images are (B, C, H, W), t is (B,)
or a scalar. Velocities divide by max(1 - t, t_eps), at sampling too.
"""

from collections.abc import Callable

import mlx.core as mx

from .config import FlowConfig

Network = Callable[[mx.array, mx.array, mx.array], mx.array]  # (z, t, y) -> output


def _per_image(t: mx.array) -> mx.array:
    return t.reshape(-1, 1, 1, 1)


def published_noise_scale(img_size: int) -> float:
    """Standard deviation of the noise in the published recipes: 1 at 256 pixels, 2 at 512; never below 1."""
    return max(1.0, img_size / 256)


def training_times(normal: mx.array, flow: FlowConfig) -> mx.array:
    """Logit-normal times t = sigmoid(P_mean + P_std * n) from standard normal draws."""
    return mx.sigmoid(flow.P_mean + flow.P_std * normal)


def drop_labels(y: mx.array, uniform: mx.array, probability: float, null_class: int) -> mx.array:
    """Labels, replaced by the null class where the uniform draw in [0, 1) is below `probability`."""
    return mx.where(uniform < probability, null_class, y)


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
    network: Network, x: mx.array, y: mx.array, t: mx.array, noise: mx.array, flow: FlowConfig
) -> mx.array:
    """Mean loss of images x in [-1, 1] with labels y (dropped already), times t and standard normal noise."""
    z = add_noise(x, noise, t, flow.noise_scale)
    return flow_loss(velocity(network(z, t, y), z, t, flow), x, z, t, flow).mean()


def guided_velocity(
    network: Network,
    z: mx.array,
    t: mx.array,
    y: mx.array,
    flow: FlowConfig,
    null_class: int,
    cfg: float = 1.0,
    t_eps: float | None = None,
) -> mx.array:
    """Classifier-free guidance, v_uncond + cfg (v_cond - v_uncond), at one time t shared by the batch.

    Both halves run at once: the network gets 2B labels with its B images, and answers for each image with both. A half
    whose weight is zero (cfg 1, or 0) is not computed. What labels are is between the caller and the network.
    """
    if cfg == 1.0:
        return velocity(network(z, t, y), z, t, flow, t_eps)
    null = mx.full(y.shape, null_class, dtype=y.dtype)
    if cfg == 0.0:
        return velocity(network(z, t, null), z, t, flow, t_eps)
    cond, uncond = mx.split(network(z, t, mx.concatenate([y, null])), 2)
    v_cond, v_uncond = (velocity(out, z, t, flow, t_eps) for out in (cond, uncond))
    return v_uncond + cfg * (v_cond - v_uncond)
