"""Spectral Forcing alone: equal to the golden numbers, a linear projection-like filter, usable in anyone's model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from scipy.fft import dctn

from mlx_sf.errors import MlxSfError
from mlx_sf.spectral import SpectralForcing, dct2, dct_matrix, idct2, radial_frequency, radial_mask


@pytest.mark.parametrize("n", [8, 16, 32])
def test_transforms_equal_golden(golden, n):
    arrays = golden.arrays("operator")
    a = mx.array(dct_matrix(n).astype(np.float32))
    x = mx.array(arrays[f"x_{n}"])
    golden.close("operator", f"dct_matrix_{n}", a)
    golden.close("operator", f"dct2_{n}", dct2(x, a))
    golden.close("operator", f"idct2_{n}", idct2(x, a))
    radius = mx.array(radial_frequency(n).astype(np.float32))
    golden.close("operator", f"mask_{n}", radial_mask(mx.array(arrays["mask_scales"]), radius))


@pytest.mark.parametrize("n", [256, 512])
def test_large_matrix_rows_equal_golden(golden, n):
    rows = golden.arrays("operator")[f"dct_matrix_{n}_row_index"]
    golden.close("operator", f"dct_matrix_{n}_rows", dct_matrix(n)[rows].astype(np.float32))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("filter_window16", {}),
        ("filter_window8", {"window_size": 8}),
        ("filter_window4", {"window_size": 4}),
        ("filter_fixed0.3", {"scale_schedule": "fixed", "fixed_scale": 0.3}),
        ("filter_fixed1.0", {"scale_schedule": "fixed", "fixed_scale": 1.0}),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_filter_equals_golden(golden, name, arguments, compiled, channels_last):
    arrays = golden.arrays("operator")
    x, t = mx.array(arrays["filter_x"]), mx.array(arrays["filter_t"])
    forcing = SpectralForcing(16, channels_last=channels_last, **arguments)
    run = mx.compile(forcing) if compiled else forcing
    out = mx.moveaxis(run(mx.moveaxis(x, 1, -1), t), -1, 1) if channels_last else run(x, t)
    golden.close("operator", name, out)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 48), seed=st.integers(0, 2**32 - 1))
def test_transform_is_scipys_and_orthonormal(n, seed):
    x = np.random.default_rng(seed).standard_normal((n, n))
    a = dct_matrix(n)
    np.testing.assert_allclose(a @ x @ a.T, dctn(x, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(a @ a.T, np.eye(n), atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(size=st.sampled_from([(12, 6), (12, 4), (20, 10), (24, 24)]), t=st.floats(0, 1), seed=st.integers(0, 999))
def test_filter_equals_direct_evaluation(size, t, seed):
    """Against the definition, window by window, with SciPy's transform in float64."""
    H, w = size
    x = np.random.default_rng(seed).standard_normal((1, 2, H, H)).astype(np.float32)
    i = np.arange(w)
    r = np.sqrt(i[:, None] ** 2 + i[None] ** 2) / np.sqrt(2 * (w - 1) ** 2)
    mask = 1 / (1 + np.exp(-30 * (0.05 + 0.95 * t - r)))
    want = np.empty_like(x, dtype=np.float64)
    for y0 in range(0, H, w):
        for x0 in range(0, H, w):
            part = dctn(x[:, :, y0 : y0 + w, x0 : x0 + w].astype(np.float64), axes=(2, 3), norm="ortho") * mask
            want[:, :, y0 : y0 + w, x0 : x0 + w] = dctn(part, type=3, axes=(2, 3), norm="ortho")
    got = SpectralForcing(H, w)(mx.array(x), mx.array([t]))
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)


def test_shared_time_is_a_scalar_or_a_batch():
    forcing = SpectralForcing(16)
    x = mx.random.normal((3, 3, 16, 16), key=mx.random.key(0))
    a, b = forcing(x, mx.array(0.4)), forcing(x, mx.array([0.4, 0.4, 0.4]))
    assert mx.array_equal(a, b)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_input_is_filtered_in_float32(dtype):
    forcing = SpectralForcing(32)
    x = mx.random.normal((2, 3, 32, 32), key=mx.random.key(0)).astype(dtype)
    t = mx.array([0.2, 0.7])
    out = forcing(x, t)
    assert out.dtype == dtype
    assert mx.array_equal(out, forcing(x.astype(mx.float32), t).astype(dtype))


def test_it_has_no_parameters_and_sits_in_front_of_anyones_embedder():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.forcing = SpectralForcing(16, channels_last=True)
            self.embed = nn.Conv2d(3, 8, 4, 4)

        def __call__(self, x, t):
            return self.embed(self.forcing(x, t))

    model = Theirs()
    assert [k for k, _ in tree_flatten(model.parameters())] == ["embed.weight", "embed.bias"]
    x, t = mx.ones((2, 16, 16, 3)), mx.array([0.1, 0.9])
    loss, grads = nn.value_and_grad(model, lambda m: m(x, t).square().mean())(model)
    assert np.isfinite(loss.item())
    assert mx.abs(grads["embed"]["weight"]).max() > 0


def test_gradient_is_the_filter_itself():
    """The filter is linear and symmetric, so the gradient of <SF(x), g> is SF(g)."""
    forcing, t = SpectralForcing(16, 8), mx.array([0.3])
    x, g = (mx.random.normal((1, 3, 16, 16), key=mx.random.key(k)) for k in (1, 2))
    gradient = mx.grad(lambda x: (forcing(x, t) * g).sum())(x)
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(forcing(g, t)), atol=1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"img_size": 16, "window_size": 5}, "window_size is 5"),
        ({"img_size": 16, "window_size": 1}, "window_size is 1"),
        ({"img_size": 16, "scale_schedule": "cosine"}, "scale_schedule is 'cosine'"),
    ],
)
def test_impossible_settings_are_refused(arguments, words):
    with pytest.raises(MlxSfError, match=words):
        SpectralForcing(**arguments)


def test_images_of_another_size_are_refused():
    with pytest.raises(MlxSfError, match="images are 16x8, want 16x16"):
        SpectralForcing(16)(mx.zeros((1, 3, 16, 8)), mx.array(0.5))
