"""exp and SiLU that are fast on every device.

On Linux CPUs MLX evaluates `exp` one element at a time, about 25 ns each: a fifth of a forward pass. There, and only
there, it is composed of multiplications and additions, which the C++ compiler vectorises; relative error below 3e-7.
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


def _composed(dtype: mx.Dtype) -> bool:
    return sys.platform == "linux" and dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def exp(x: mx.array) -> mx.array:
    """e^x. Inputs below -87 give the smallest normal number instead of a denormal or zero; above 88, about e^88."""
    return composed_exp(x) if _composed(x.dtype) else mx.exp(x)  # type: ignore[return-value]


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


# one loop each: these are made once and kept for every shape that occurs
_exp_loop = mx.compile(_exp_polynomial)
_silu_loop = mx.compile(lambda x: x / (1 + _exp_polynomial(-x)))


@mx.custom_function
def composed_exp(x: mx.array) -> mx.array:
    return _exp_loop(x)


@composed_exp.vjp
def _exp_vjp(_: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


@mx.custom_function
def composed_silu(x: mx.array) -> mx.array:
    return _silu_loop(mx.contiguous(x))  # a loop over rows that lie apart takes half as long again


@composed_silu.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    s = 1 / (1 + _exp_polynomial(-x))
    return cotangent * (s + output * (1 - s))
