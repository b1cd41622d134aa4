"""JiT: equal to the golden forward passes, the published shapes and counts, initialisation, dropout, compute types."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sf.flow import hybrid_weight, velocity
from mlx_sf.models import cast_products, parameter_shapes
from mlx_sf.models.jit import ARCHITECTURE, JiT, JiTConfig
from mlx_sf.models.jit_sizes import SIZES, model_config
from mlx_sf.models.layers import sincos_position_table
from mlx_sf.spectral import SpectralForcing
from tests.helpers import classes

FORWARD = [
    "forced", "vanilla", "hybrid", "noctx", "head64", "forced_ema1", "vanilla_ema1", "forced_ema2", "vanilla_ema2",
    "forced_window16", "forced_window8", "forced_fixed0.3", "forced_fixed1.0", "hybrid_0_one_minus_t",
    "hybrid_1_snr_inverse", "hybrid_2_snr", "hybrid_3_snr",
]  # fmt: skip


def case_of(golden, group: str, name: str) -> dict:
    return next(c for c in golden.configs[group] if c["case"] == name)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_equals_golden(golden, load, name):
    case, arrays = case_of(golden, "forward", name), golden.arrays("forward")
    model, config = load(case["model"], case["weights"], case["overrides"])
    x, t, y = (mx.array(arrays[f"{case['inputs']}/{what}"]) for what in "xty")
    out = model(x, t, classes(model, y))
    for what in case["arrays"]:
        golden.close("forward", f"{name}/{what}", out if what == "out" else velocity(out, x, t, config.flow))


def test_every_forward_case_is_tested(golden):
    assert sorted(FORWARD) == sorted(c["case"] for c in golden.configs["forward"])


@pytest.mark.parametrize("name", [n for n in FORWARD if n[:8] in ("hybrid_0", "hybrid_1", "hybrid_2", "hybrid_3")])
def test_hybrid_weight_equals_golden(golden, load, name):
    case = case_of(golden, "forward", name)
    _, config = load("hybrid", "model", case["overrides"])
    t = mx.array(golden.arrays("forward")["hybrid_weight_t"])
    golden.close("forward", name.replace("hybrid_", "hybrid_weight_", 1), hybrid_weight(t, config.flow))


def test_compiled_forward_equals_golden(golden, load):
    arrays = golden.arrays("forward")
    model, _ = load("vanilla")
    x, t, y = (mx.array(arrays[f"vanilla/{what}"]) for what in "xty")
    golden.close("forward", "vanilla/out", mx.compile(model)(x, t, classes(model, y)))


def test_published_size_equals_golden(golden):
    """JiT-B/32 at 256, weights by rule."""
    full, arrays = golden.configs["fullsize"], golden.arrays("fullsize")
    model = JiT(model_config("B/32"))
    weights = []
    for key, shape, centre, halfwidth, seed in full["rule"]:
        u = np.random.RandomState(seed).random_sample(shape)
        w = (centre + halfwidth * (2 * u - 1)).astype(np.float32)
        key = key.removeprefix("net.")
        weights.append((key, mx.array(w.reshape(w.shape[0], -1) if "x_embedder.proj" in key and w.ndim > 1 else w)))
    model.load_weights(weights, strict=False)
    assert len(weights) == len(parameter_shapes(model.config)) - 1  # all but the position table
    x = mx.array(np.random.RandomState(full["x_seed"]).standard_normal((2, 3, 256, 256)).astype(np.float32))
    t, y = mx.array(arrays["t"]), mx.array(arrays["y"])
    forcing = SpectralForcing.of(model.config.forcing, model.config.size)
    golden.close("fullsize", "filtered_every8", forcing(x, t)[:, :, ::8, ::8])
    out = model(x, t, classes(model, y))
    golden.close("fullsize", "out_every8", out[:, :, ::8, ::8])
    golden.close("fullsize", "out_corner", out[:, :, 200:232, 96:128])
    golden.close("fullsize", "out_mean_abs", mx.abs(out).mean(axis=(2, 3)))


@pytest.mark.parametrize("name", ["JiT-B/16", "JiT-B/32", "JiT-L/32", "JiT-H/32", "JiT-700M"])
@pytest.mark.parametrize("forced", [True, False])
def test_published_keys_and_shapes(golden, name, forced):
    """Every key of the manifest is a parameter of ours, with its shape up to the reshape of the convolutions."""
    shapes = parameter_shapes(model_config(name, **({} if forced else {"forcing": None})))
    listed = {k: s for k, s, _ in golden.manifest["keys"][name]}
    assert {f"net.{k}" for k in shapes} == set(listed)
    for key, shape in shapes.items():
        want = listed[f"net.{key}"]
        assert shape == tuple(want) or (key == "x_embedder.proj2.weight" and shape == tuple(want[:2])), key


def test_published_parameter_counts(golden):
    for name, preset in golden.manifest["presets"].items():
        config = model_config(name)
        for field in ("depth", "hidden_size", "num_heads", "patch_size", "bottleneck_dim", "in_context_start"):
            assert getattr(config, field) == preset[field], (name, field)
        shapes = parameter_shapes(config)
        total = sum(map(math.prod, shapes.values()))
        assert total == preset["parameters_256"], name
        assert total - math.prod(shapes["pos_embed"]) == preset["trainable_256"], name
        assert len(shapes) == preset["keys"]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_counts_its_parameters(size):
    """No parameter hides in a container, and none but the position table is frozen."""
    config = model_config(size, 8, 32)
    model = JiT(config)
    names = {k for k, _ in tree_flatten(model.parameters())}
    assert names - {k for k, _ in tree_flatten(model.trainable_parameters())} == {"pos_embed"}
    assert len([n for n in names if n.startswith("blocks.")]) == 14 * config.depth


def test_position_table_orders_columns_first():
    table = sincos_position_table(16, 3)[0]
    omega = 10000.0 ** (-np.arange(4) / 4)
    column, row = 2, 1
    want = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
    np.testing.assert_allclose(table[row * 3 + column], want, atol=1e-6)


def test_initial_weights_are_the_references():
    model = JiT(JiTConfig(img_size=32, patch_size=8, hidden_size=96, depth=2, num_heads=2, in_context_start=1))
    weights = {k: np.asarray(v) for k, v in tree_flatten(model.parameters())}
    for name, w in weights.items():
        if name == "pos_embed":
            continue
        if "adaLN" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            assert not w.any(), name
        elif "norm" in name:
            assert (w == 1).all(), name
        elif name.startswith(("t_embedder", "y_embedder", "in_context")):
            assert abs(w.std() - 0.02) < 0.002, name
        else:
            bound = math.sqrt(6 / sum(w.shape))
            assert np.abs(w).max() <= bound, name
            assert abs(w.std() - bound / math.sqrt(3)) < 0.05 * bound, name
    again = JiT(model.config)
    other = JiT(model.config, mx.random.key(1))
    assert mx.array_equal(model.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert not mx.array_equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    # no two tensors of one shape start alike
    assert not mx.array_equal(model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_a_new_network_returns_zero():
    model = JiT(JiTConfig(img_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, in_context_start=1))
    out = model(mx.ones((2, 3, 16, 16)), mx.array([0.0, 1.0]), model.condition([3, None]))
    assert out.shape == (2, 3, 16, 16)
    assert not mx.any(out).item()


def test_dropout_acts_in_the_middle_half_and_only_with_a_key(load):
    model, _ = load("forced", "model", {"attn_dropout": 0.3, "proj_dropout": 0.2})
    active = [b.attn.attn_dropout > 0 and b.attn.proj_dropout > 0 and b.mlp.proj_dropout > 0 for b in model.blocks]
    assert active == [False, True, True, False]
    x, t, y = mx.random.normal((2, 3, 32, 32), key=mx.random.key(5)), mx.array([0.2, 0.8]), model.condition([1, 2])
    plain, _ = load("forced")
    key = mx.random.key(3)
    assert mx.array_equal(model(x, t, y), plain(x, t, y))
    assert mx.array_equal(model(x, t, y, key), model(x, t, y, key))
    assert not mx.array_equal(model(x, t, y, key), model(x, t, y))
    assert not mx.array_equal(model(x, t, y, key), model(x, t, y, mx.random.key(4)))
    # a key changes nothing where the rates are zero, up to the order of summation
    np.testing.assert_allclose(np.asarray(plain(x, t, y, key)), np.asarray(plain(x, t, y)), atol=1e-5)


def test_dropout_keeps_the_mean():
    from mlx_sf.models.layers import drop

    x = mx.ones((200, 200))
    out = np.asarray(drop(x, 0.25, mx.random.key(0)))
    assert abs(out.mean() - 1) < 0.01
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_products_stay_near(golden, load, dtype):
    arrays = golden.arrays("forward")
    model, _ = load("forced")
    model.update(cast_products(model.parameters(), dtype, ARCHITECTURE))
    types = {k: v.dtype for k, v in tree_flatten(model.parameters())}
    assert types["blocks.0.attn.qkv.weight"] == dtype
    for name in ("pos_embed", "blocks.0.norm1.weight", "t_embedder.mlp.0.weight", "in_context_posemb"):
        assert types[name] == mx.float32, name
    x, t, y = (mx.array(arrays[f"forced/{what}"]) for what in "xty")
    out = model(x, t, classes(model, y))
    want = arrays["forced/out"]
    assert out.dtype == mx.float32
    assert np.abs(np.asarray(out) - want).max() < 0.03 * np.abs(want).max()


def test_linear_has_the_gradients_of_nn_linear():
    from mlx_sf.models.layers import Linear

    ours, theirs = Linear(6, 4), nn.Linear(6, 4)
    ours.update(theirs.parameters())
    x = mx.random.normal((3, 5, 6), key=mx.random.key(1))

    def loss(model, x):
        return mx.sin(model(x)).sum()

    for run in (lambda f: f, mx.compile):
        a = run(lambda x: nn.value_and_grad(ours, loss)(ours, x))(x)
        b = nn.value_and_grad(theirs, loss)(theirs, x)
        for (_, u), (_, v) in zip(tree_flatten(a), tree_flatten(b), strict=True):
            np.testing.assert_allclose(np.asarray(u), np.asarray(v), atol=1e-6)
        gx = [mx.grad(lambda x, m=m: loss(m, x))(x) for m in (ours, theirs)]
        np.testing.assert_allclose(np.asarray(gx[0]), np.asarray(gx[1]), atol=1e-6)
