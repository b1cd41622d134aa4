"""A batch on several CPU threads: the network's own results; errors come through; buffers are given back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.device import lanes
from mlx_sf.models import Step
from mlx_sf.models.jit import JiT
from mlx_sf.models.jit_sizes import model_config


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
    condition = network.condition(list(range(batch)))
    got = lanes.split_batch(mx.compile(network) if compiled else network)(z, t, condition)
    np.testing.assert_allclose(np.asarray(got), np.asarray(network(z, t, condition)), atol=2e-5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("prepared", [False, True])
def test_both_branches_of_guidance_share_their_lanes(network, batch, prepared):
    z, t = mx.random.normal((batch, 3, 32, 32), key=mx.random.key(2)), mx.array([0.3])
    branches = network.condition(list(range(batch))), network.condition([None] * batch)
    want = [network(z, t, c) for c in branches]
    if prepared:
        branches = network.prepare(Step(t, 0.1), *branches)
    for split in (network.guided, lanes.split_batch(network.guided, network.parameters)):
        for got, one in zip(split(z, t, *branches), want, strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(one), atol=2e-5)


def test_lanes_run_side_by_side_and_again_after_an_error():
    x = mx.arange(6.0)
    mx.eval(x)

    def fail():
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            lanes.run([lambda: x + 1, fail])
        with pytest.raises(ValueError, match="no"):
            lanes.run([fail, lambda: x + 1])
        got = lanes.run([lambda i=i: (x * i).sum() for i in range(5)])
        assert [g.item() for g in got] == [15.0 * i for i in range(5)]


def test_a_task_gives_its_arrays_back():
    x = [mx.ones((1000, 1000)) for _ in range(4)]
    mx.eval(x)
    tasks = [lambda a=a: a + 1 for a in x]
    x.clear()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lanes.run(tasks)
    assert tasks == []
    assert mx.get_peak_memory() <= before + 1000  # every result took its input's place


@pytest.mark.parametrize("size, parts", [(1, 3), (2, 2), (5, 3), (8, 3), (7, 7)])
def test_shares_cover_everything_once(size, parts):
    covered = [i for s in lanes.shares(size, parts) for i in range(s.start, s.stop)]
    assert covered == list(range(size))
    assert len(lanes.shares(size, parts)) == min(size, parts)


def test_one_core_and_other_systems_have_no_lanes(monkeypatch, network):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert lanes.split_batch(network) is network
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(lanes.sys, "platform", "darwin")
    assert lanes.count() == 1
    assert lanes.split_batch(network) is network
