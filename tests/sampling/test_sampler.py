"""Guidance and the door: which branches are computed, how they become one velocity, any network behind the protocol."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.flow import FlowConfig
from mlx_sf.sampling.guidance import guide
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig, time_grid
from tests.models.toy import ToyConfig, ToyNetwork


class Recorder:
    """A network whose output is its label; notes every pass."""

    def __init__(self):
        self.passes = []

    def condition(self, asked):
        return {"labels": mx.array([7 if a is None else a for a in asked])}

    def prepare(self, t, condition, null):
        return condition, null

    takes_guidance = False

    def parameters(self):
        return {}

    def precompute(self, condition):
        return condition

    def __call__(self, z, t, condition):
        y = condition["labels"]
        self.passes.append(np.array(y).tolist())
        return mx.zeros_like(z) + y.reshape(-1, 1, 1, 1)

    def guided(self, z, t, condition, null):
        both = mx.concatenate([condition["labels"], null["labels"]])
        out = self(mx.concatenate([z, z]), t, {"labels": both})
        return tuple(mx.split(out, 2))


def first_velocity(cfg):
    network = Recorder()
    sampler = Sampler(network, FlowConfig(pred_param="v"), SampleConfig("euler", 1, cfg, 0.0, 1.0))
    velocity = np.asarray(sampler.field([1, 2])(mx.zeros((2, 3, 4, 4)), 0.5, cfg))
    return velocity, network.passes


def test_guidance_extrapolates_all_channels_from_no_class():
    v, passes = first_velocity(3.0)
    assert sorted(y for batch in passes for y in batch) == [1, 2, 7, 7]
    np.testing.assert_allclose(v[0], 7 + 3 * (1 - 7))
    np.testing.assert_allclose(v[1], 7 + 3 * (2 - 7))


@pytest.mark.parametrize("cfg, labels", [(1.0, [1, 2]), (0.0, [7, 7])])
def test_the_branch_that_cannot_matter_is_not_computed(cfg, labels):
    v, passes = first_velocity(cfg)
    assert [y for batch in passes for y in batch] == labels
    np.testing.assert_allclose(v[:, 0, 0, 0], labels)


def test_global_norm_never_lengthens_the_velocity():
    given, without = (mx.random.normal((4, 3, 8, 8), key=mx.random.key(i)) for i in (0, 1))
    plain, bounded = guide(given, without, 4.0), guide(given, without, 4.0, "global")

    def lengths(v):
        return np.sqrt(np.square(np.asarray(v, dtype=np.float64)).sum(axis=(1, 2, 3)))

    assert (lengths(plain) > lengths(given)).all()
    np.testing.assert_allclose(lengths(bounded), lengths(given), rtol=1e-5)
    # where guidance shortens it, it stays as it is
    np.testing.assert_array_equal(guide(given, without, 1.0, "global"), guide(given, without, 1.0))


def test_a_shift_moves_every_time_towards_the_noise():
    plain, shifted = time_grid(10), time_grid(10, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (np.diff(shifted) > 0).all()
    noise = 1 - plain[1:-1].astype(np.float64)
    np.testing.assert_allclose(1 - shifted[1:-1], 3 * noise / (1 + 2 * noise), rtol=1e-6)
    np.testing.assert_array_equal(time_grid(10, 1.0), plain)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["euler", "heun", "multistep"])
def test_a_network_with_prompts_and_rectangles_samples(compiled, method):
    """Branches of different length, images that are no squares, no labels anywhere."""
    network = ToyNetwork(ToyConfig(height=12, width=20), mx.random.key(1))
    sample = SampleConfig(method, 6, 2.0, 0.1, 1.0)
    noise = mx.random.normal((3, 3, 12, 20), key=mx.random.key(2))
    prompts = ["a cat", "two dogs on a very long bench", ""]
    *_, last = Sampler(network, FlowConfig(), sample, compiled).states(noise, prompts)
    assert last.z.shape == (3, 3, 12, 20)
    # each image by itself is the same: neither batch nor the other prompts' lengths matter
    for i, prompt in enumerate(prompts):
        *_, alone = Sampler(network, FlowConfig(), sample, compiled).states(noise[i : i + 1], [prompt])
        np.testing.assert_allclose(np.asarray(alone.z[0]), np.asarray(last.z[i]), atol=1e-5)
    assert np.abs(np.asarray(last.z[0] - last.z[2])).max() > 1e-3


def test_guidance_with_the_toy_is_its_own_two_passes():
    network = ToyNetwork(ToyConfig(height=8, width=16), mx.random.key(1))
    flow, cfg = FlowConfig(), 2.5
    z, t = mx.random.normal((2, 3, 8, 16), key=mx.random.key(3)), mx.array([0.25])
    field = Sampler(network, flow, SampleConfig("euler", 4, cfg, 0.0, 1.0)).field(["red", "a blue house"])
    got = field(z, 0.25, cfg)
    given, without = (
        (network(z, t, network.condition(asked)) - z) / 0.75 for asked in (["red", "a blue house"], [None, None])
    )
    np.testing.assert_allclose(np.asarray(got), np.asarray(without + cfg * (given - without)), atol=1e-5)
