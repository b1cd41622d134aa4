"""Classifier-free guidance: when it acts, how strongly over a step, and how two velocities become one."""

from typing import Literal

import mlx.core as mx
import numpy as np

GuidanceNorm = Literal["none", "global", "channel", "cfg_zero_star"]


def guidance_at(t: float, scale: float, low: float, high: float, closed: bool = False) -> float:
    """Guidance scale at time t: `scale` inside the interval, 1 outside.

    Ends are outside, except a low end of 0; those of a `closed` interval are inside.
    """
    start, end = np.float32(low), np.float32(high)
    if closed:
        return scale if start <= np.float32(t) <= end else 1.0
    inside = np.float32(t) < end and (start == 0 or np.float32(t) > start)
    return scale if inside else 1.0


def mean_guidance(t: float, t_next: float, scale: float, low: float, high: float) -> float:
    """Guidance scale averaged over the step from t to t_next: 1 + (scale - 1) * (share of the step in the interval).

    A solver with one evaluation a step stays second order when the interval begins or ends inside a step or on the
    grid. (By the scale at the step's first time alone, an end would count up to one step too late.)
    """
    start, end = float(np.float32(low)), float(np.float32(high))
    share = max(0.0, min(t_next, end) - max(t, start)) / (t_next - t)
    share = 0.0 if share < 1e-5 else 1.0 if share > 1 - 1e-5 else share  # the grid is float32: no slivers
    return scale if share == 1 else 1 + (scale - 1) * share


def guide(
    given: mx.array, without: mx.array, scale: float | mx.array, norm: GuidanceNorm = "none", token: int = 1
) -> mx.array:
    """v = v_without + scale (v_given - v_without), of velocities (B, C, H, W).

    `norm` "global" shortens each image's v to the length of its v_given, where it is longer. "channel" does so for each
    token of `token` x `token` pixels. "cfg_zero_star" first multiplies v_without by `projection`, so that it lies as
    near to v_given as it can; its first step is zero, which is the sampler's business (CFG-Zero*, arXiv 2503.18886).
    """
    if norm == "cfg_zero_star":
        without = projection(given, without) * without
    v = without + scale * (given - without)
    if norm == "global":
        length, most = (mx.sqrt(mx.square(a).sum(axis=(1, 2, 3), keepdims=True)) for a in (v, given))
        v = v * mx.minimum(most / (length + 1e-8), 1.0)
    if norm == "channel":
        B, C, H, W = v.shape
        blocks = (B, C, H // token, token, W // token, token)
        length, most = (mx.sqrt(mx.square(a.reshape(blocks)).sum(axis=(1, 3, 5), keepdims=True)) for a in (v, given))
        v = (v.reshape(blocks) * mx.minimum(most / (length + 1e-8), 1.0)).reshape(v.shape)
    return v


def projection(given: mx.array, without: mx.array) -> mx.array:
    """The number (B, 1, 1, 1) by which each image's v_without comes nearest to its v_given."""
    product, square = ((a * without).sum(axis=(1, 2, 3), keepdims=True) for a in (given, without))
    return product / (square + 1e-8)
