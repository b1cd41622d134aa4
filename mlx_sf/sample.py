"""ODE solvers as generators of states, seeds, and pixels.

Heun (for every step but the last, which is Euler's) and Euler are the published solvers, guidance decided at each
evaluation's own time. The multistep solver is second order with one evaluation a step. Times are float32 numbers on a
grid from 0 to 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from .config import Config, FlowConfig, SampleConfig
from .flow import Network, guided_velocity
from .lanes import split_batch
from .model import JiT

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


def mean_guidance(t: float, t_next: float, config: SampleConfig) -> float:
    """Guidance scale averaged over the step from t to t_next: 1 + (cfg - 1) * (share of the step in the interval).

    A solver with one evaluation a step stays second order when the interval begins or ends inside a step or on the
    grid. (By the scale at the step's first time alone, an end would count up to one step too late.)
    """
    low, high = float(np.float32(config.cfg_low)), float(np.float32(config.cfg_high))
    share = max(0.0, min(t_next, high) - max(t, low)) / (t_next - t)
    share = 0.0 if share < 1e-5 else 1.0 if share > 1 - 1e-5 else share  # the grid is float32: no slivers
    return config.cfg if share == 1 else 1 + (config.cfg - 1) * share


def solve(field: VelocityField, z: mx.array, config: SampleConfig, t_eps: float = FlowConfig.t_eps) -> Iterator[State]:
    """Integrate dz/dt = field from noise z at t = 0 to t = 1; yields the state after each step, not yet evaluated.

    `t_eps` is the field's own bound of 1 - t; the multistep solver integrates with the same.
    """
    if config.method == "multistep":
        yield from _multistep(field, z, config, t_eps)
        return
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


def _multistep(field: VelocityField, z: mx.array, config: SampleConfig, t_eps: float) -> Iterator[State]:
    """Second order, one evaluation a step: the linear part of the flow solved exactly, the prediction extrapolated.

    With r(t) = max(1 - t, t_eps) the velocity is (p - z) / r, where p = z + r v is the predicted finished image (an
    x-predictor's own output). With p(s) = p + (s - t) p' over a step of length h from t to t',

        z(t') = a z + (1 - a) p + b p',   a = exp(-integral of ds / r(s)),   b = h - integral of a(s, t') ds.

    Where r = 1 - t this is a = r'/r, b = h - r' log(r / r'). The slope p' is that from the last evaluation to this one.
    The first step, and one at which the guidance scale changes (p jumps), takes p' = 0: without the bound, Euler's
    step. The last step is z + h v + h^2 / (2 r) p': like the published ones it leaves less noise behind than the
    bounded flow itself would. This is DPM-Solver++ (2M) of Lu et al. on this flow, with the prediction extrapolated in
    t instead of the log signal-to-noise ratio, which is infinite at both ends.
    """
    times = [float(t) for t in time_grid(config.steps)]
    last: tuple[float, float, mx.array] | None = None  # time, guidance scale, prediction
    for i, (t, t_next) in enumerate(pairwise(times)):
        cfg, r = mean_guidance(t, t_next, config), max(1 - t, t_eps)
        v = field(z, t, cfg)
        p, x = z + r * v, z + (1 - t) * v
        if i < config.steps - 1:
            a, b = _step_weights(t, t_next, t_eps)
        else:
            h = t_next - t
            a, b = 1 - h / r, h * h / (2 * r)
        z = a * z + (1 - a) * p
        if last is not None and last[1] == cfg:
            z = z + b / (t - last[0]) * (p - last[2])
        last = t, cfg, p
        yield State(i + 1, config.steps, t_next, z, x)


def _step_weights(t: float, t_next: float, t_eps: float) -> tuple[float, float]:
    """a and b of `_multistep` for the step from t to t_next, part of which may lie where t_eps bounds 1 - t."""
    r, r_next = max(1 - t, t_eps), max(1 - t_next, t_eps)
    free, bounded = r_next / r, math.exp((min(1 - t_next, t_eps) - min(1 - t, t_eps)) / t_eps)
    integral = r_next * math.log(r / r_next) * bounded + t_eps * (1 - bounded)
    return free * bounded, t_next - t - integral


def evaluations(config: SampleConfig) -> int:
    """Network evaluations per image: a guided velocity takes two, one with the class and one without."""
    count = 0

    def field(z: mx.array, t: float, cfg: float) -> mx.array:
        nonlocal count
        count += 1 if cfg in (0, 1) else 2
        return z

    for _ in solve(field, mx.array(0.0), config):
        pass
    return count


class Sampler:
    """A network as velocity field and sampler, by a configuration; compiled functions live as long as it does.

    What t and the classes alone decide in a `JiT` is computed once for each time (Heun visits most twice) and each
    distinct class, not once per image. With `compile` the guided and the unguided evaluation are each one compiled
    function, for fixed shapes.
    """

    def __init__(self, network: Network, config: Config, compile: bool = False) -> None:
        self.network, self.config, self.compile = network, config, compile
        t_eps = config.sample.t_eps
        self.t_eps = config.flow.t_eps if t_eps is None else t_eps
        self._functions: dict[float, Callable[..., mx.array]] = {}

    def field(self, labels: mx.array) -> VelocityField:
        """The guided velocity for a batch with these labels (B,)."""
        images, null = np.array(labels), self.config.model.null_class
        if self.compile:  # the number of distinct classes would be another shape
            rows, index = np.append(images, null), np.arange(len(images) + 1)
        else:
            rows, index = np.unique(np.append(images, null), return_inverse=True)
        classes, rows_of_images, null_row = mx.array(rows), mx.array(index[:-1]), int(index[-1])
        visited: tuple[float, list[mx.array]] = (math.nan, [])

        def field(z: mx.array, t: float, cfg: float) -> mx.array:
            nonlocal visited
            at = mx.array([t], dtype=mx.float32)
            if t != visited[0]:
                visited = t, self.network.modulations(at, classes) if isinstance(self.network, JiT) else []
            return self._function(cfg)(z, at, classes, rows_of_images, null_row, visited[1])

        return field

    def _function(self, cfg: float) -> Callable[..., mx.array]:
        if cfg in self._functions:
            return self._functions[cfg]

        def evaluate(
            z: mx.array, t: mx.array, classes: mx.array, rows: mx.array, null_row: int, table: list[mx.array]
        ) -> mx.array:
            def network(z: mx.array, t: mx.array, rows: mx.array) -> mx.array:
                if not table:
                    return self.network(z, t, classes[rows])
                return self.network(z, t, classes[rows], modulations=[m[rows] for m in table])  # type: ignore[call-arg]

            run = network if self.compile else split_batch(network, [classes, table, self._parameters()])
            return guided_velocity(run, z, t, rows, self.config.flow, null_row, cfg, self.t_eps)

        return self._functions.setdefault(cfg, mx.compile(evaluate) if self.compile else evaluate)

    def _parameters(self) -> Any:
        return self.network.parameters() if isinstance(self.network, JiT) else []

    def states(self, noise: mx.array, labels: mx.array) -> Iterator[State]:
        """States of one batch, from standard normal noise (B, 3, H, W) and labels (B,), not yet evaluated.

        The noise scale is applied here. The caller owns progress and evaluation (`mx.eval(state.z)`).
        """
        z = self.config.flow.noise_scale * noise.astype(mx.float32)
        yield from solve(self.field(labels), z, self.config.sample, self.t_eps)


def sample_states(
    network: Network, config: Config, noise: mx.array, labels: mx.array, compile: bool = False
) -> Iterator[State]:
    """States of one batch by `config.sample`: `Sampler.states` for a single use."""
    return Sampler(network, config, compile).states(noise, labels)


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
