"""Solvers equal to the golden states; seeds, batches, and pixels."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.config import SampleConfig
from mlx_sf.generate import Request, generate
from mlx_sf.sample import guidance_at, sample_states, seeded_noise, time_grid, to_uint8

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
    config = config.replace(
        sample=SampleConfig(case["method"], case["steps"], case["cfg"], low, high), noise_scale=case["noise_scale"]
    )
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
    config = config.replace(sample=SampleConfig("heun", 5, 2.9, 0.1, 1.0), noise_scale=1.0)
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
        config = SampleConfig(cfg=3.0, cfg_low=float(low), cfg_high=float(high))
        got = [guidance_at(t, config) == 3.0 for t in time_grid(int(n))]
        np.testing.assert_array_equal(got, arrays[name], err_msg=name)


def test_an_image_depends_on_its_own_seed_alone(load):
    model, config = load("forced", "ema1")
    config = config.replace(steps=4, cfg=2.0)

    def draw(seeds, labels, batch_size):
        request = Request(tuple(labels), tuple(seeds))
        images = {}
        for numbers, state in generate(model, config, request, batch_size):
            images.update(zip(numbers, np.asarray(state.z), strict=True))
        return np.stack([images[i] for i in range(len(seeds))])

    together = draw([5, 6, 7, 8, 9], [1, 2, 3, 4, 5], 5)
    in_batches = draw([5, 6, 7, 8, 9], [1, 2, 3, 4, 5], 2)
    alone = draw([8], [4], 1)
    np.testing.assert_allclose(in_batches, together, atol=1e-5)
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_seeded_noise_is_standard_normal_and_by_seed():
    noise = np.asarray(seeded_noise([3, 4, 3], 64))
    np.testing.assert_array_equal(noise[0], noise[2])
    assert abs(noise[:2].mean()) < 0.02
    assert abs(noise[:2].std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03


def test_the_state_carries_the_implied_image(load):
    """After an Euler step, x is z extrapolated along the step's velocity."""
    model, config = load("vanilla")
    config = config.replace(sample=SampleConfig("euler", 3, 1.0))
    noise = seeded_noise([0], 16)
    before = config.flow.noise_scale * noise
    t = 0.0
    for state in sample_states(model, config, noise, mx.array([1])):
        v = (state.z - before) / (state.t - t)
        np.testing.assert_allclose(np.asarray(state.x), np.asarray(before + (1 - t) * v), atol=2e-5)
        before, t = state.z, state.t
    assert state.t == 1.0


def test_sampler_time_epsilon_is_separate_from_training(load):
    model, config = load("vanilla")
    noise, labels = seeded_noise([0, 1], 16), mx.array([1, 2])

    def last(**changes):
        *_, state = sample_states(model, config.replace(sample=SampleConfig(steps=40, **changes)), noise, labels)
        return np.asarray(state.z)

    np.testing.assert_array_equal(last(), last(t_eps=0.05))
    assert np.abs(last() - last(t_eps=0.01)).max() > 1e-4


def test_quantisation_equals_golden(golden):
    arrays = golden.arrays("evaluate")
    values = arrays["quantise_in"]
    flat = np.broadcast_to(values, (3, 1, len(values)))
    np.testing.assert_array_equal(to_uint8(flat)[0, :, 0], arrays["quantise_out"])


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_a_straight_field_is_integrated_exactly(method):
    from mlx_sf.sample import solve

    target = mx.full((1, 3, 2, 2), 2.0)
    config = SampleConfig(method, 7)
    *_, state = solve(
        lambda z, t, cfg: (target - z) / (1 - t) if t < 1 else mx.zeros_like(z), mx.zeros((1, 3, 2, 2)), config
    )
    np.testing.assert_allclose(np.asarray(state.z), 2.0, atol=1e-5)
