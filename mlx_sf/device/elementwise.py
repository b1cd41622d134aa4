"""Powers and SiLU that are fast on every device.

On Linux CPUs MLX evaluates `exp` one element at a time, about 25 ns each: a fifth of a forward pass. There, and only
there, it is composed of multiplications and additions, which the C++ compiler vectorises; relative error below 6e-7.
`mx.compile` makes one loop of them: 5 ns an element, 12 where no g++ is installed. Elsewhere these are MLX's own
functions.
"""

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_LN2_HIGH, _LN2_LOW = (
    0.693359375,
    -2.12194440e-4,
)  # their sum is ln 2; the first has few enough bits to multiply exactly
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to a whole number, held in the low bits
_ROUND_BITS = 0x4B400000
LOG2_E = 1.4426950408889634
# 2^f for |f| <= 1/2, from the highest power down: least relative error of degree 5, 8e-8
_POWER_OF_2 = (1.32764668e-3, 9.67554129e-3, 5.55071329e-2, 2.40220197e-1, 6.93147067e-1, 1.00000007)


def _composed(dtype: mx.Dtype) -> bool:
    return sys.platform == "linux" and dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def exp2_below(x: mx.array, top: mx.array) -> mx.array:
    """2^(x - top) for x at most `top`, which counts as a constant in derivatives; float32.

    Differences below -126 give the smallest normal number instead of a denormal or zero.
    """
    return composed_exp2(x, top) if _composed(x.dtype) else mx.exp((x - top) / LOG2_E)  # type: ignore[return-value]


def gelu(x: mx.array) -> mx.array:
    """x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), for inference."""
    return _gelu_loop(x) if _composed(x.dtype) else nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return composed_silu(x) if _composed(x.dtype) else nn.silu(x)  # type: ignore[return-value]


def _exp_polynomial(x: mx.array) -> mx.array:
    # e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2
    x = mx.clip(x, -87.0, 88.0)
    shifted = x * 1.44269504 + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1 / 720 * r + 1 / 120
    for c in (1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + c
    power = mx.view((mx.view(shifted, mx.int32) + (127 - _ROUND_BITS)) << 23, mx.float32)
    return p * power


def _exp2_polynomial(x: mx.array, top: mx.array) -> mx.array:
    x = mx.maximum(x - top, -126.0)
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = _POWER_OF_2[0] * f + _POWER_OF_2[1]
    for c in _POWER_OF_2[2:]:
        p = p * f + c
    # the whole part is added to the exponent of 2^f
    return mx.view(mx.view(p, mx.int32) + (mx.view(shifted, mx.int32) << 23), mx.float32)


# one loop each: these are made once and kept for every shape that occurs
_exp2_loop = mx.compile(_exp2_polynomial)
# by 1 + tanh(u) = 2 / (1 + e^(-2u))
_gelu_loop = mx.compile(lambda x: x / (1 + _exp_polynomial(-1.5957691216 * (x + 0.044715 * x * x * x))))
_silu_loop = mx.compile(lambda x: x / (1 + _exp_polynomial(-x)))


@mx.custom_function
def composed_exp2(x: mx.array, top: mx.array) -> mx.array:
    return _exp2_loop(x, top)


@composed_exp2.vjp
def _exp2_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    return cotangent * output * (1 / LOG2_E), mx.zeros_like(primals[1])


@mx.custom_function
def composed_silu(x: mx.array) -> mx.array:
    return _silu_loop(mx.contiguous(x))  # a loop over rows that lie apart takes half as long again


@composed_silu.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    s = 1 / (1 + _exp_polynomial(-x))
    return cotangent * (s + output * (1 - s))
