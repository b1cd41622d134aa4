"""Powers of 2 and SiLU: equal to the real functions, values and gradients, over the whole range of float32."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sf.device.elementwise import composed_exp2, composed_silu, exp2_below, silu


@given(st.lists(st.floats(-126, 0, width=32), min_size=1, max_size=50), st.floats(-50, 50, width=32))
def test_powers_are_exact_to_a_few_units(below, top):
    x = np.array(below, np.float32) + np.float32(top)
    x = np.minimum(x, np.float32(top))
    for power, rtol in ((exp2_below, 1e-5), (composed_exp2, 6e-7)):
        got = np.asarray(power(mx.array(x), mx.array(np.float32(top)))).astype(float)
        np.testing.assert_allclose(got, np.exp2((x - np.float32(top)).astype(float)), rtol=rtol, atol=3e-38)


def test_powers_at_the_ends():
    x = mx.array([-math.inf, -1e30, -0.0, 0.0, math.nan])
    got = np.asarray(composed_exp2(x, mx.array(0.0)))
    assert (got[:2] < 2e-38).all()
    np.testing.assert_allclose(got[2:4], 1, rtol=2e-7)
    assert np.isnan(got[4])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_silu_and_its_gradient(values):
    x = mx.array(values)
    np.testing.assert_allclose(np.asarray(composed_silu(x)), np.asarray(nn.silu(x)), rtol=1e-6, atol=1e-6)
    ours, theirs = (mx.grad(lambda v, f=f: (f(v) * 3).sum())(x) for f in (composed_silu, nn.silu))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=5e-6)


def test_gradient_of_a_power_also_compiled():
    x = mx.linspace(-10, 0, 101)
    for run in (lambda f: f, mx.compile):
        got = run(mx.grad(lambda v: composed_exp2(v, mx.array(0.0)).sum()))(x)
        np.testing.assert_allclose(np.asarray(got), np.log(2) * np.exp2(np.asarray(x)), rtol=2e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_uses_mlx_own(dtype):
    x = mx.linspace(-5, 5, 11).astype(dtype)
    assert silu(x).dtype == dtype
    assert mx.array_equal(silu(x), nn.silu(x))
