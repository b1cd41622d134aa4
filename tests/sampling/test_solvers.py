"""Solvers equal to the golden states; seeds, batches, and pixels."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.common.pixels import to_uint8
from mlx_sf.errors import MlxSfError
from mlx_sf.sampling.generate import generate
from mlx_sf.sampling.guidance import guidance_at
from mlx_sf.sampling.noise import seeded_noise
from mlx_sf.sampling.request import Request
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig, evaluations, solve, time_grid
from tests.helpers import changed, sample_states

CASES = [
    *(f"vanilla_{i:02d}" for i in range(24)), *(f"forced_{i}" for i in range(5)), "edge_30", "forced_window",
    "hybrid_0_one_minus_t", "hybrid_1_snr_inverse", "hybrid_2_snr", "noctx_0", "noctx_1",
]  # fmt: skip


def test_every_sampling_case_is_tested(golden):
    assert sorted(c["case"] for c in golden.configs["sampling"]) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_states_equal_golden(golden, load, name):
    case = next(c for c in golden.configs["sampling"] if c["case"] == name)
    arrays = golden.arrays("sample")
    model, config = load(case["model"], case["weights"], case["overrides"])
    low, high = case["interval"]
    sample = SampleConfig(case["method"], case["steps"], case["cfg"], low, high)
    config = changed(config, sample=sample, noise_scale=case["noise_scale"])
    noise, labels = (mx.array(arrays[f"{case['inputs']}/{what}"]) for what in ("noise", "labels"))
    seen = []
    for state in sample_states(model, config, noise, labels):
        if state.step in case["states"]:
            golden.close("sample", f"{name}/z_after_{state.step}", state.z)
            seen.append(state.step)
    assert seen == case["states"]


def test_compiled_states_equal_golden(golden, load):
    arrays = golden.arrays("sample")
    model, config = load("vanilla")
    config = changed(config, sample=SampleConfig("heun", 5, 2.9, 0.1, 1.0), noise_scale=1.0)
    noise, labels = (mx.array(arrays[f"vanilla/{what}"]) for what in ("noise", "labels"))
    *_, last = sample_states(model, config, noise, labels, compile=True)
    golden.close("sample", "vanilla_02/z_after_5", last.z)


def test_time_grid_equals_golden_to_the_bit(golden):
    arrays = golden.arrays("schedule")
    names = [k for k in arrays if k.startswith("times_")]
    assert len(names) >= 10
    for name in names:
        np.testing.assert_array_equal(time_grid(int(name[6:])), arrays[name])


def test_guidance_interval_equals_golden(golden):
    arrays = golden.arrays("schedule")
    names = [k for k in arrays if k.startswith("guided_")]
    assert names
    for name in names:
        _, n, low, high = name.split("_")
        got = [guidance_at(t, 3.0, float(low), float(high)) == 3.0 for t in time_grid(int(n))]
        np.testing.assert_array_equal(got, arrays[name], err_msg=name)


@pytest.mark.parametrize("method", ["heun", "multistep"])
def test_an_image_depends_on_its_own_seed_alone(load, method):
    model, config = load("forced", "ema1")
    config = changed(config, steps=4, cfg=2.0, method=method)

    def draw(seeds, labels, batch_size):
        request = Request(tuple(labels), tuple(seeds))
        images = {}
        for numbers, state in generate(model, config.flow, config.sample, request, batch_size):
            images.update(zip(numbers, np.asarray(state.z), strict=True))
        return np.stack([images[i] for i in range(len(seeds))])

    together = draw([5, 6, 7, 8, 9], [1, 2, 3, 4, 5], 5)
    in_batches = draw([5, 6, 7, 8, 9], [1, 2, 3, 4, 5], 2)
    alone = draw([8], [4], 1)
    np.testing.assert_allclose(in_batches, together, atol=1e-5)
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_seeded_noise_is_standard_normal_and_by_seed():
    noise = np.asarray(seeded_noise([3, 4, 3], (64, 64)))
    np.testing.assert_array_equal(noise[0], noise[2])
    assert abs(noise[:2].mean()) < 0.02
    assert abs(noise[:2].std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03


def test_the_state_carries_the_implied_image(load):
    """After an Euler step, x is z extrapolated along the step's velocity."""
    model, config = load("vanilla")
    config = changed(config, sample=SampleConfig("euler", 3, 1.0))
    noise = seeded_noise([0], (16, 16))
    before = config.flow.noise_scale * noise
    t = 0.0
    for state in sample_states(model, config, noise, mx.array([1])):
        v = (state.z - before) / (state.t - t)
        np.testing.assert_allclose(np.asarray(state.x), np.asarray(before + (1 - t) * v), atol=2e-5)
        before, t = state.z, state.t
    assert state.t == 1.0


def test_sampler_time_epsilon_is_separate_from_training(load):
    model, config = load("vanilla")
    noise, labels = seeded_noise([0, 1], (16, 16)), mx.array([1, 2])

    def last(**changes):
        *_, state = sample_states(model, changed(config, sample=SampleConfig(steps=40, **changes)), noise, labels)
        return np.asarray(state.z)

    np.testing.assert_array_equal(last(), last(t_eps=0.05))
    assert np.abs(last() - last(t_eps=0.01)).max() > 1e-4


def test_quantisation_equals_golden(golden):
    arrays = golden.arrays("evaluate")
    values = arrays["quantise_in"]
    flat = np.broadcast_to(values, (3, 1, len(values)))
    np.testing.assert_array_equal(to_uint8(flat)[0, :, 0], arrays["quantise_out"])


@pytest.mark.parametrize("method", ["heun", "euler", "multistep"])
def test_a_straight_field_is_integrated_exactly(method):
    target = mx.full((1, 3, 2, 2), 2.0)
    config = SampleConfig(method, 7)
    *_, state = solve(
        lambda z, t, cfg, length: (target - z) / (1 - t) if t < 1 else mx.zeros_like(z), mx.zeros((1, 3, 2, 2)), config
    )
    np.testing.assert_allclose(np.asarray(state.z), 2.0, atol=1e-5)


def gaussian_rate(t, s):
    """d log z / dt along the flow of data from N(0, s^2): z(t) stays proportional to the standard deviation at t."""
    return (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)


def gaussian_spread(t, s):
    return np.sqrt(t**2 * s**2 + (1 - t) ** 2)


def end(field, method, steps, t_eps=1e-9, **guidance):
    *_, state = solve(field, mx.array(1.0), SampleConfig(method, steps, **guidance), t_eps)
    assert state.t == 1.0
    return state.z.item()


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("multistep", 2)])
@pytest.mark.parametrize("s", [0.5, 1.5])
def test_order_of_convergence_on_gaussian_data(method, order, s):
    """The exact flow ends at s z(0)."""

    def field(z, t, cfg, length=0.0):
        return gaussian_rate(t, s) * z

    errors = [abs(end(field, method, n) - s) for n in (10, 20, 40, 80)]
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert abs(rates[-1] - order) < 0.25, (errors, rates)


@pytest.mark.parametrize("interval", [(0.1, 1.0), (0.13, 0.71)])
def test_multistep_stays_second_order_where_guidance_begins_and_ends(interval):
    """Class and no class are Gaussians of their own: then the guided flow, too, has a closed form."""
    low, high = interval
    with_class, without, cfg = 0.6, 1.2, 2.5

    def field(z, t, scale, length=0.0):
        u = gaussian_rate(t, without)
        return (u + scale * (gaussian_rate(t, with_class) - u)) * z

    def grown(a, b, s):
        return np.log(gaussian_spread(b, s) / gaussian_spread(a, s))

    exact = grown(0, 1, with_class) + (cfg - 1) * (grown(low, high, with_class) - grown(low, high, without))
    errors = {
        n: abs(end(field, "multistep", n, cfg=cfg, cfg_low=low, cfg_high=high) - np.exp(exact)) for n in (40, 80, 160)
    }
    assert errors[160] < errors[40] / 10, errors
    assert errors[80] < abs(end(field, "euler", 80, cfg=cfg, cfg_low=low, cfg_high=high) - np.exp(exact)) / 3


def test_multistep_begins_with_the_first_order_step():
    """Which is Euler's, and z' = r'/r z + (1 - r'/r) p with p the predicted image (DDIM's)."""

    def field(z, t, cfg, length=0.0):
        return mx.sin(3 * z) + t

    z = mx.random.normal((2, 3, 4, 4), key=mx.random.key(0))
    first, second = list(solve(field, z, SampleConfig("multistep", 4)))[:2]
    euler = next(solve(field, z, SampleConfig("euler", 4)))
    np.testing.assert_allclose(np.asarray(first.z), np.asarray(euler.z), atol=1e-6)
    p0, p1 = z + field(z, 0.0, 1), first.z + 0.75 * field(first.z, 0.25, 1)
    np.testing.assert_allclose(np.asarray(first.z), np.asarray(0.75 * z + 0.25 * p0), atol=1e-6)
    np.testing.assert_allclose(np.asarray(second.x), np.asarray(p1), atol=1e-6)
    slope = (p1 - p0) / 0.25
    want = first.z * (0.5 / 0.75) + p1 * (1 - 0.5 / 0.75) + slope * (0.25 - 0.5 * np.log(0.75 / 0.5))
    np.testing.assert_allclose(np.asarray(second.z), np.asarray(want), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 200])
def test_multistep_leaves_no_more_noise_than_heun(steps):
    """A perfect predictor of a black image, the published bound: what is left of the noise at the end."""

    def field(z, t, cfg, length=0.0):
        return -z / max(1 - t, 0.05)

    left = end(field, "multistep", steps, 0.05)
    assert -1e-6 < left <= end(field, "heun", steps, 0.05) + 1e-6
    assert left < 0.0185


@pytest.mark.parametrize("name", ["forced", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hybrid", "noctx"))])
def test_multistep_and_heun_solve_the_same_flow(load, name):
    """x-, hybrid and v-predictors, guided: both end at the same pictures."""
    model, config = load(name)
    noise, labels = seeded_noise([0, 1], config.model.size), mx.array([1, 2])

    def last(method, steps):
        settings = changed(config, sample=SampleConfig(method, steps, 2.0, 0.0, 1.0))
        *_, state = sample_states(model, settings, noise, labels)
        return np.asarray(state.z)

    fine = last("heun", 150)
    distance = {n: np.sqrt(np.mean((last("multistep", n) - fine) ** 2)) for n in (25, 100)}
    euler = np.sqrt(np.mean((last("euler", 100) - fine) ** 2))
    assert distance[100] < distance[25] / 3
    assert distance[100] < euler / 2
    np.testing.assert_allclose(last("multistep", 1), last("euler", 1), atol=1e-5)


def test_unknown_method_is_refused():
    with pytest.raises(MlxSfError, match="method is 'dpm', want one of heun, euler, multistep"):
        SampleConfig("dpm")


def test_evaluations_per_image():
    def count(method, steps, cfg=2.9, low=0.1, high=1.0):
        return evaluations(SampleConfig(method, steps, cfg, low, high))

    assert count("heun", 50, 1.0) == 99
    assert count("heun", 50, low=0.0) == 198  # as many as the published loop, which computes both halves everywhere
    assert count("heun", 50) == 187
    assert count("multistep", 25, 1.0) == 25
    assert count("multistep", 50) == 50 + 45


def test_conditioning_shared_by_images_equals_each_ones_own(load):
    """Classes that repeat, in any order, with and without compilation, over batches that share a sampler."""
    model, config = load("forced")
    config = changed(config, steps=3, cfg=2.0)
    noise, labels = seeded_noise(range(5), config.model.size), [3, 1, 3, config.model.null_class, 1]

    class Unprepared:
        """The same network, which computes everything anew for every image and evaluation."""

        config, condition, parameters = model.config, model.condition, model.parameters
        __call__ = staticmethod(model.__call__)

        def guided(self, z, t, condition, null):
            return model(z, t, condition), model(z, t, null)

        takes_guidance = False

        def precompute(self, condition):
            return condition

        def prepare(self, step, condition, null):
            return condition, null

    *_, want = sample_states(Unprepared(), config, noise, labels)
    for compiled in (False, True):
        sampler = Sampler(model, config.flow, config.sample, compiled)
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
            *_, got = sampler.states(noise[mx.array(order)], [labels[i] for i in order])
            np.testing.assert_allclose(np.asarray(got.z), np.asarray(want.z)[order], atol=1e-5)
