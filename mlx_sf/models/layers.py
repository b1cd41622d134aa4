"""Layers that several networks share."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device.elementwise import exp, silu

__all__ = ["Linear", "RMSNorm", "attention", "drop", "exp", "modulate", "rotate", "silu"]

RMS_EPS = 1e-6


@mx.custom_function
def _affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_affine.vjp
def _affine_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # dW comes out row-major; MLX's own rule gives a transposed view, which slows the optimiser's fused kernel
    x, weight, _bias = primals
    return cotangent @ weight, cotangent.T @ x, cotangent.sum(axis=0)


class Linear(nn.Module):
    """`x W^T + b`, computed in the weight's float type whatever the type of x (as under autocast)."""

    def __init__(self, dims_in: int, dims_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((dims_out, dims_in))
        if bias:
            self.bias = mx.zeros((dims_out,))

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.weight.dtype)
        if "bias" not in self:
            return x @ self.weight.T
        out: mx.array = _affine(x.reshape(-1, x.shape[-1]), self.weight, self.bias)  # type: ignore[assignment]
        return out.reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight; statistics in float32, result in the input's type."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), RMS_EPS)


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Adaptive layer norm's affine part: x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each interleaved pair (2j, 2j + 1) of the last axis of x (B, T, h, d) by its angle."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, dropout: float = 0.0, key: mx.array | None = None) -> mx.array:
    """softmax(q k^T / sqrt(d)) v over (B, h, T, d), scores in float32; dropout on the softmax where a key is given."""
    scale = q.shape[-1] ** -0.5
    if key is None and mx.default_device() != mx.cpu:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    scores = (q.astype(mx.float32) * scale) @ k.astype(mx.float32).swapaxes(-1, -2)
    # dividing after the product with v touches d columns instead of T: cheaper on a CPU, where this branch runs
    e = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = e.sum(axis=-1, keepdims=True)
    if key is not None:
        e = drop(e, dropout, key)
    return ((e @ v.astype(mx.float32)) / total).astype(v.dtype)


def drop(x: mx.array, p: float, key: mx.array | None) -> mx.array:
    """Dropout with an explicit random key; without one (or at p = 0) x itself."""
    if key is None or p == 0:
        return x
    return mx.where(mx.random.bernoulli(1 - p, x.shape, key), x / (1 - p), 0).astype(x.dtype)
