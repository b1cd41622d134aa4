"""exp and SiLU: equal to the real functions, values and gradients, over the whole range of float32."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sf.device.elementwise import composed_exp, composed_silu, exp, silu


@given(st.lists(st.floats(-87, 88, width=32), min_size=1, max_size=50))
def test_exp_is_exact_to_a_few_units(values):
    got = np.asarray(composed_exp(mx.array(values))).astype(float)
    np.testing.assert_allclose(got, np.exp(np.array(values, np.float32).astype(float)), rtol=3e-7)


def test_exp_at_the_ends():
    got = np.asarray(composed_exp(mx.array([-math.inf, -1e30, -0.0, 0.0, 1e30, math.nan])))
    assert (got[:2] < 2e-38).all()
    np.testing.assert_array_equal(got[2:4], 1)
    assert np.isfinite(got[4])
    assert np.isnan(got[5])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_silu_and_its_gradient(values):
    x = mx.array(values)
    np.testing.assert_allclose(np.asarray(composed_silu(x)), np.asarray(nn.silu(x)), rtol=1e-6, atol=1e-6)
    ours, theirs = (mx.grad(lambda v, f=f: (f(v) * 3).sum())(x) for f in (composed_silu, nn.silu))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=5e-6)


def test_gradient_of_exp_is_exp_also_compiled():
    x = mx.linspace(-10, 10, 101)
    for run in (lambda f: f, mx.compile):
        np.testing.assert_allclose(
            np.asarray(run(mx.grad(lambda v: composed_exp(v).sum()))(x)), np.asarray(mx.exp(x)), rtol=1e-6
        )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_uses_mlx_own(dtype):
    x = mx.linspace(-5, 5, 11).astype(dtype)
    assert exp(x).dtype == silu(x).dtype == dtype
    assert mx.array_equal(exp(x), mx.exp(x))
