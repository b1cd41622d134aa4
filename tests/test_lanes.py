"""A batch over several CPU streams: the network's own results and gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf import lanes
from mlx_sf.config import model_config
from mlx_sf.model import JiT


@pytest.fixture(autouse=True)
def three_lanes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(lanes.sys, "platform", "linux")


@pytest.fixture(scope="module")
def network():
    model = JiT(model_config("nano", 8, 32, num_classes=10, depth=2))
    key = mx.random.key(1)
    model.final_layer.linear.weight = mx.random.normal(model.final_layer.linear.weight.shape, key=key)
    return model


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_results_are_the_networks_own(network, batch, shared, compiled):
    z = mx.random.normal((batch, 3, 32, 32), key=mx.random.key(2))
    t = mx.array([0.3]) if shared else mx.linspace(0.1, 0.9, batch)
    y = mx.arange(batch)
    split = lanes.split_batch(network)
    got = (mx.compile(split) if compiled else split)(z, t, y)
    np.testing.assert_allclose(np.asarray(got), np.asarray(network(z, t, y)), atol=2e-5)


def test_gradients_are_the_networks_own(network):
    z, t, y = mx.random.normal((5, 3, 32, 32), key=mx.random.key(2)), mx.linspace(0.1, 0.9, 5), mx.arange(5)
    split = lanes.split_batch(network)

    def loss(run):
        def value(parameters):
            network.update(parameters)
            return mx.square(run(z, t, y)).mean()

        return mx.grad(value)(network.trainable_parameters())

    ours, own = loss(split), loss(network)
    for name in ("x_embedder", "final_layer"):
        for (_, a), (_, b) in zip(lanes_leaves(ours[name]), lanes_leaves(own[name]), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5 + 1e-5 * float(mx.abs(b).max()))


def lanes_leaves(tree):
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def test_one_core_and_other_systems_have_no_lanes(monkeypatch, network):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert lanes.split_batch(network) is network
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(lanes.sys, "platform", "darwin")
    assert lanes.split_batch(network) is network
