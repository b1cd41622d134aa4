"""SenseNova-U1's training objective, for adapters on captioned pictures of any sizes.

The flow is that of sampling, but for the noise scale, which has no upper bound here, and the floor of 1 - t. An image
token's loss is the mean square over its entries; a picture of L tokens weighs sqrt(L), not L. For pictures of one size
this is `flow.training_loss`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..flow import FlowConfig, add_noise, velocity
from ..models import Condition
from ..models.sensenova_u1 import U1

# pictures (B, 3, H, W) in [-1, 1] of one size, their condition, times (B,), standard normal noise
Pictures = tuple[mx.array, Condition, mx.array, mx.array]


def token_losses(
    network: U1,
    x: mx.array,
    condition: Condition,
    t: mx.array,
    noise: mx.array,
    flow: FlowConfig,
    block_wrapper: Callable[[Any], Callable[..., Any]] | None = None,
) -> mx.array:
    """Mean squared velocity error (B, L) of each image token, the tokens in row-major order.

    `block_wrapper` turns a layer into the callable that runs it (gradient checkpointing).
    """
    B, C, H, W = x.shape
    P, scale = network.config.token_size, network.config.noise_at((H, W), bounded=False)
    z = add_noise(x, noise, t, scale)
    out = network(z, t, condition, block_wrapper=block_wrapper, noise_scale=scale)
    target = (x - z) / mx.maximum(1 - t.reshape(-1, 1, 1, 1), flow.t_eps)
    error = mx.square(velocity(out, z, t, flow) - target)
    return error.reshape(B, C, H // P, P, W // P, P).mean(axis=(1, 3, 5)).reshape(B, -1)


def pictures_loss(
    network: U1,
    groups: Sequence[Pictures],
    flow: FlowConfig,
    block_wrapper: Callable[[Any], Callable[..., Any]] | None = None,
) -> mx.array:
    """The loss of pictures in groups of one size each: the mean over all tokens, weighted by 1 / sqrt(L)."""
    total, weights = mx.array(0.0), 0.0
    for x, condition, t, noise in groups:
        losses = token_losses(network, x, condition, t, noise, flow, block_wrapper)
        B, L = losses.shape
        total = total + losses.sum() * L**-0.5
        weights += B * L * L**-0.5
    return total / max(1.0, weights)
