"""Noising, loss and gradients equal to the golden numbers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sf import flow
from mlx_sf.flow import FlowConfig
from tests.helpers import changed, classes

CASES = [
    "forced_x", "vanilla", "vanilla_as_v", "hybrid", "hybrid_1_snr_inverse", "hybrid_2_snr", "hybrid_3_snr"
]  # fmt: skip


def test_every_loss_case_is_tested(golden):
    assert sorted(c["case"] for c in golden.configs["loss"]) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_golden(golden, load, name):
    case = next(c for c in golden.configs["loss"] if c["case"] == name)
    arrays = golden.arrays("loss")

    def get(what: str) -> mx.array:
        return mx.array(arrays[f"{case['inputs']}/{what}"])

    overrides = dict(case["overrides"])
    model, config = load(case["model"], "model", {k: v for k, v in overrides.items() if k != "pred_param"})
    settings = changed(config, **{k: v for k, v in overrides.items() if k == "pred_param"}).flow
    x = 2 * (get("x_uint8").astype(mx.float32) / 255) - 1
    np.testing.assert_allclose(np.asarray(x), arrays[f"{case['inputs']}/x"], atol=1e-7)
    null = model.condition([None] * len(get("labels")))
    y = flow.drop_conditions(classes(model, get("labels")), null, get("drop_uniform"), case["label_drop_prob"])
    np.testing.assert_array_equal(np.asarray(y["labels"]), arrays[f"{case['inputs']}/labels_dropped"])
    t = flow.training_times(get("t_normal"), settings)
    np.testing.assert_allclose(np.asarray(t), arrays[f"{case['inputs']}/t"], atol=2e-7)
    z = flow.add_noise(x, get("noise"), t, settings.noise_scale)
    golden.close("loss", f"{case['inputs']}/z", z)
    v = flow.velocity(model(z, t, y), z, t, settings)
    golden.close("loss", f"{name}/v_pred", v)
    golden.close("loss", f"{name}/loss", flow.flow_loss(v, x, z, t, settings).mean())
    golden.close("loss", f"{name}/loss", flow.training_loss(model, x, y, t, get("noise"), settings))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_equal_golden(golden, load, compiled):
    arrays = golden.arrays("loss")
    model, config = load("forced")
    x, t, y, noise = (mx.array(arrays[f"forced_x/{k}"]) for k in ("x", "t", "labels_dropped", "noise"))

    def loss(parameters):
        model.update(parameters)
        return flow.training_loss(model, x, classes(model, y), t, noise, config.flow)

    step = mx.value_and_grad(loss)
    value, gradients = (mx.compile(step) if compiled else step)(model.trainable_parameters())
    golden.close("loss", "forced_x/loss", value)
    by_name = dict(tree_flatten(gradients))
    listed = [n for n in arrays if n.startswith("forced_x/grad/")]
    assert len(listed) == len(by_name) == 70
    for name in listed:
        key = name.removeprefix("forced_x/grad/net.")
        golden.close("loss", name, by_name[key].reshape(arrays[name].shape))


def test_velocity_is_bounded_near_the_data():
    """1 - t is clamped at t_eps, also with one of the sampler's own."""
    z, out = mx.zeros((2, 3, 2, 2)), mx.ones((2, 3, 2, 2))
    t = mx.array([0.5, 1.0])
    settings = FlowConfig()
    np.testing.assert_allclose(np.asarray(flow.velocity(out, z, t, settings))[:, 0, 0, 0], [2, 20])
    np.testing.assert_allclose(np.asarray(flow.velocity(out, z, t, settings, 0.01))[:, 0, 0, 0], [2, 100], rtol=1e-6)
