"""ODE solvers as generators of states, seeds, and pixels.

The solvers are the published ones: Heun for every step but the last, which is Euler's; guidance decided at each
evaluation's own time. Times are float32 numbers on a grid from 0 to 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .config import Config, SampleConfig
from .flow import Network, guided_velocity
from .lanes import all_threads_for_products, split_batch

# (state z, time t, guidance scale) -> velocity
VelocityField = Callable[[mx.array, float, float], mx.array]


@dataclass(frozen=True)
class State:
    """A point on the sampling path: after `step` of `steps` steps the state is `z` (B, 3, H, W) at time `t`.

    `x` is the estimate of the finished image that the step's first velocity implied: z + (1 - t) v.
    """

    step: int
    steps: int
    t: float
    z: mx.array
    x: mx.array


def time_grid(steps: int) -> np.ndarray:
    """Times (steps + 1,) float32 from 0 to 1, bit for bit as the reference's framework spaces them on a CPU.

    The first half counts up from 0 in multiples of the float32 step, the second half down from 1, each with a single
    rounding. (A grid computed as i / steps puts a few times one unit elsewhere, and that decides whether a time at
    the end of the guidance interval is guided: with 30 steps and an interval from 0.1, the third.)
    """
    i = np.arange(steps + 1, dtype=np.float64)
    step = np.float64(np.float32(1) / np.float32(steps))
    return np.where(i < (steps + 1) // 2, step * i, 1 - step * (steps - i)).astype(np.float32)


def guidance_at(t: float, config: SampleConfig) -> float:
    """Guidance scale at time t: `cfg` inside the interval, 1 outside. Ends are outside, except a low end of 0."""
    low, high = np.float32(config.cfg_low), np.float32(config.cfg_high)
    inside = np.float32(t) < high and (low == 0 or np.float32(t) > low)
    return config.cfg if inside else 1.0


def solve(field: VelocityField, z: mx.array, config: SampleConfig) -> Iterator[State]:
    """Integrate dz/dt = field from noise z at t = 0 to t = 1; yields the state after each step, not yet evaluated."""
    times = time_grid(config.steps)
    for i in range(config.steps):
        t, t_next = times[i], times[i + 1]
        dt = float(t_next - t)
        v = field(z, float(t), guidance_at(t, config))
        x = z + (1 - float(t)) * v
        if config.method == "euler" or i == config.steps - 1:
            z = z + dt * v
        else:
            v_next = field(z + dt * v, float(t_next), guidance_at(t_next, config))
            z = z + dt * (0.5 * (v + v_next))
        yield State(i + 1, config.steps, float(t_next), z, x)


def velocity_field(network: Network, config: Config, labels: mx.array, compile: bool = False) -> VelocityField:
    """The guided velocity of a network for a batch with these labels (B,).

    With `compile` the guided and the unguided evaluation are each one compiled function, for fixed shapes.
    """
    network = split_batch(network)
    flow, null_class, t_eps = config.flow, config.model.null_class, config.sample.t_eps
    cache: dict[float, Callable[[mx.array, mx.array], mx.array]] = {}

    def function(cfg: float) -> Callable[[mx.array, mx.array], mx.array]:
        def evaluate(z: mx.array, t: mx.array) -> mx.array:
            return guided_velocity(network, z, t, labels, flow, null_class, cfg, t_eps)

        return mx.compile(evaluate) if compile else evaluate

    def field(z: mx.array, t: float, cfg: float) -> mx.array:
        if cfg not in cache:
            cache[cfg] = function(cfg)
        return cache[cfg](z, mx.array([t], dtype=mx.float32))

    return field


def sample_states(
    network: Network, config: Config, noise: mx.array, labels: mx.array, compile: bool = False
) -> Iterator[State]:
    """States of one batch, from standard normal noise (B, 3, H, W) and labels (B,), by `config.sample`.

    The noise scale is applied here. The caller owns progress and evaluation (`mx.eval(state.z)`).
    """
    field = velocity_field(network, config, labels, compile)
    try:
        yield from solve(field, config.flow.noise_scale * noise.astype(mx.float32), config.sample)
    finally:
        all_threads_for_products()  # a training run that drew a preview goes on as fast as before


def seeded_noise(seeds: Sequence[int], img_size: int) -> mx.array:
    """Standard normal noise (B, 3, H, W), image i from `seeds[i]` alone, the same bits on every device of a machine."""
    shape = (3, img_size, img_size)
    with mx.stream(mx.cpu):
        return mx.stack([mx.random.normal(shape, key=mx.random.key(seed)) for seed in seeds])


def to_uint8(x: mx.array | np.ndarray) -> np.ndarray:
    """Images (..., 3, H, W) in [-1, 1] -> pictures (..., H, W, 3) uint8: 255 (x + 1) / 2, clipped, ties to even."""
    v = np.asarray(x, dtype=np.float32)
    v = (v + np.float32(1)) / np.float32(2) * np.float32(255)
    return np.moveaxis(np.round(np.clip(v, 0, 255)), -3, -1).astype(np.uint8)
