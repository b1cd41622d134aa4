"""Spectral Forcing alone: equal to the golden numbers, a linear projection-like filter, usable in anyone's model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from scipy.fft import dctn

from mlx_sf.dct import dct2, dct_matrix, idct2, radial_frequency
from mlx_sf.errors import MlxSfError
from mlx_sf.spectral import ForcingConfig, SpectralForcing, cutoffs, describe_forcing, masks, radial_mask


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


@settings(max_examples=30, deadline=None)
@given(
    images=st.sampled_from([
        (12, 12, 6), (12, 12, 4), (20, 20, 10), (24, 24, None), (12, 20, None), (20, 8, None), (2, 30, None),
        (12, 20, 4), (24, 8, 8),
    ]),
    t=st.floats(0, 1),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_filter_equals_direct_evaluation(images, t, seed):
    """Against the definition, window by window, on squares and rectangles, with SciPy's transform in float64."""
    H, W, n = images
    h, w = (H, W) if n is None else (n, n)
    x = np.random.default_rng(seed).standard_normal((1, 2, H, W)).astype(np.float32)
    u, v = np.arange(h)[:, None] / (h - 1), np.arange(w)[None] / (w - 1)
    mask = 1 / (1 + np.exp(-30 * (0.05 + 0.95 * t - np.sqrt(u**2 + v**2) / np.sqrt(2))))
    want = np.empty_like(x, dtype=np.float64)
    for y0 in range(0, H, h):
        for x0 in range(0, W, w):
            part = dctn(x[:, :, y0 : y0 + h, x0 : x0 + w].astype(np.float64), axes=(2, 3), norm="ortho") * mask
            want[:, :, y0 : y0 + h, x0 : x0 + w] = dctn(part, type=3, axes=(2, 3), norm="ortho")
    got = SpectralForcing((H, W), n)(mx.array(x), mx.array([t]))
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)
    last = SpectralForcing((H, W), n, channels_last=True)(mx.array(np.moveaxis(x, 1, -1)), mx.array([t]))
    np.testing.assert_allclose(np.moveaxis(np.asarray(last), -1, 1), np.asarray(got), atol=1e-6)


def test_a_square_given_as_a_rectangle_is_the_same_to_the_bit():
    x, t = mx.random.normal((2, 3, 16, 16), key=mx.random.key(0)), mx.array([0.1, 0.8])
    assert mx.array_equal(SpectralForcing(16)(x, t), SpectralForcing((16, 16))(x, t))
    assert mx.array_equal(SpectralForcing(16)(x, t), SpectralForcing(16, 16)(x, t))


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
        ({"img_size": 1}, "img_size is 1, want 2 to 8192"),
        ({"img_size": (16, 10), "window_size": 8}, "window_size is 8, want a divisor of 16 and 10"),
        ({"img_size": 16, "scale_schedule": "sine"}, "SpectralForcing: scale_schedule is 'sine', want one of linear"),
        ({"img_size": 16, "scale_schedule": "data"}, r"schedule_cutoffs is \(\), want at least 2"),
        ({"img_size": 16, "exact_end": True, "max_keep": 0.9}, "exact_end is True, want false unless max_keep"),
    ],
)
def test_impossible_settings_are_refused(arguments, words):
    with pytest.raises(MlxSfError, match=words):
        SpectralForcing(**arguments)


def test_images_of_another_size_are_refused():
    with pytest.raises(MlxSfError, match="images are 16x8, want 16x16"):
        SpectralForcing(16)(mx.zeros((1, 3, 16, 8)), mx.array(0.5))


# ---------------------------------------------------------------------------------------------------- schedules

TIMES = np.array([0.0, 0.05, 0.3, 1 / 3, 0.5, 0.77, 0.95, 0.999, 1.0])
SCHEDULES = [
    ({}, 0.05 + 0.95 * TIMES),
    ({"scale_schedule": "fixed", "fixed_scale": 0.3}, 0.05 + 0.95 * 0.3 + 0 * TIMES),
    ({"scale_schedule": "power", "schedule_power": 2.0}, 0.05 + 0.95 * TIMES**2),
    ({"scale_schedule": "power", "schedule_power": 0.4, "min_keep": 0.1}, 0.1 + 0.9 * TIMES**0.4),
    ({"scale_schedule": "cosine"}, 0.05 + 0.95 * (1 - np.cos(np.pi * TIMES)) / 2),
    (
        {"scale_schedule": "data", "schedule_cutoffs": (0.1, 0.1, 0.7, 1.1)},
        np.interp(TIMES, np.linspace(0, 1, 4), (0.1, 0.1, 0.7, 1.1)),
    ),
    ({"scale_schedule": "data", "schedule_cutoffs": (0, 1)}, TIMES),
]
OPENING = [c for c, _ in SCHEDULES if c.get("scale_schedule") != "fixed"]


@pytest.mark.parametrize("changes, want", SCHEDULES)
def test_schedules_are_their_formulas(changes, want):
    config = ForcingConfig(**changes)
    np.testing.assert_allclose(cutoffs(config, TIMES), want, atol=1e-12)
    mask = 1 / (1 + np.exp(-30 * (want[:, None, None] - radial_frequency(16))))
    np.testing.assert_allclose(masks(config, (16, 16), TIMES), mask, atol=1e-12)
    np.testing.assert_allclose(masks(config, (16, 16), 0.3), mask[2:3], atol=1e-12)


@pytest.mark.parametrize("exact_end", [False, True])
@pytest.mark.parametrize("changes", OPENING)
def test_the_operator_has_the_mask_of_its_schedule(changes, exact_end):
    config = ForcingConfig(**changes, exact_end=exact_end)
    mask = SpectralForcing.of(config, 16).mask(mx.array(TIMES.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(mask), masks(config, (16, 16), TIMES.astype(np.float32)), atol=2e-6)


@pytest.mark.parametrize(
    "changes, sharpness, compiled",
    [
        *((c, 30.0, False) for c in OPENING),
        *((c, 150.0, False) for c in OPENING),
        *((c, k, True) for k in (30.0, 150.0) for c in OPENING[:1]),
    ],
)
def test_exact_end_is_one_at_the_end_and_grows_towards_it(changes, sharpness, compiled):
    config = ForcingConfig(mask_sharpness=sharpness, exact_end=True, **changes)
    forcing = SpectralForcing.of(config, 64)
    t = np.linspace(0, 1, 301).astype(np.float32)
    mask = np.asarray((mx.compile(forcing.mask) if compiled else forcing.mask)(mx.array(t)))
    assert (mask[-1] == 1).all()  # to the bit
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert np.diff(mask, axis=0).min() > -1e-6  # up to the rounding of e^x
    assert (masks(config, (64, 64), 1.0) == 1).all()
    x = mx.random.normal((1, 3, 64, 64), key=mx.random.key(0))
    np.testing.assert_allclose(np.asarray(forcing(x, mx.array(1.0))), np.asarray(x), atol=2e-5)


def test_a_steep_mask_does_not_overflow():
    config = ForcingConfig(mask_sharpness=500.0)
    t = np.linspace(0, 1, 17)
    mask = SpectralForcing.of(config, 32).mask(mx.array(t.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(mask), masks(config, (32, 32), t.astype(np.float32)), atol=5e-5)


@pytest.mark.parametrize("changes, exact_end", [(c, i % 2 == 0) for i, c in enumerate(OPENING)])
def test_every_schedule_differentiates_inside_compile(changes, exact_end):
    """In the image, and in t: against differences in float64 of the mask that the definition gives."""
    config = ForcingConfig(**changes, exact_end=exact_end)
    forcing, t = SpectralForcing.of(config, 16), mx.array([0.21, 0.6])
    x, g = (mx.random.normal((2, 3, 16, 16), key=mx.random.key(k)) for k in (1, 2))
    dx, dt = mx.compile(mx.grad(lambda x, t: (forcing(x, t) * g).sum(), argnums=(0, 1)))(x, t)
    np.testing.assert_allclose(np.asarray(dx), np.asarray(forcing(g, t)), atol=1e-5)
    h, t64 = 1e-5, np.asarray(t, np.float64)
    slope = (masks(config, (16, 16), t64 + h) - masks(config, (16, 16), t64 - h)) / (2 * h)
    fx, fg = (dctn(np.asarray(v, np.float64), axes=(2, 3), norm="ortho") for v in (x, g))
    np.testing.assert_allclose(np.asarray(dt), (fx * fg * slope[:, None]).sum((1, 2, 3)), rtol=1e-3, atol=1e-3)


@given(
    radii=st.lists(st.floats(0, 1.5), min_size=2, max_size=20).map(sorted),
    t=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=20).map(sorted),
)
def test_data_schedules_never_close(radii, t):
    config = ForcingConfig(scale_schedule="data", schedule_cutoffs=(*radii, max(1.0, radii[-1])))
    c = cutoffs(config, np.array(t))
    assert (np.diff(c) >= -1e-12).all()
    assert cutoffs(config, 0.0) == pytest.approx(radii[0], abs=1e-12)
    assert cutoffs(config, 1.0) == config.schedule_cutoffs[-1]


def test_forcings_in_words():
    assert describe_forcing(ForcingConfig()) == "linear"
    assert describe_forcing(ForcingConfig(scale_schedule="fixed", fixed_scale=0.5, window_size=8)) == (
        "fixed at 0.5, windows of 8"
    )
    data = {"scale_schedule": "data", "schedule_cutoffs": (0.1, 1.0), "min_keep": 0.3}
    assert describe_forcing(ForcingConfig(**data, mask_sharpness=20.0, exact_end=True)) == (
        "data 0.1,1.0, sharpness 20.0, exact end"
    )
    assert describe_forcing(ForcingConfig(scale_schedule="power", schedule_power=2, min_keep=0.3)) == (
        "power 2.0 from 0.3 to 1.0"
    )
