"""The settings of sampling, the time grid, and the ODE solvers, as generators of states.

Heun (for every step but the last, which is Euler's) and Euler are the published solvers, guidance decided at each
evaluation's own time. The multistep solver is second order with one evaluation a step. Times are float32 numbers on a
grid from 0 to 1.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import mlx.core as mx
import numpy as np

from ..common.fields import check_types, choice, finite, require
from ..flow import FlowConfig
from .guidance import GuidanceNorm, guidance_at, mean_guidance

Method = Literal["heun", "euler", "multistep"]


@dataclass(frozen=True)
class SampleConfig:
    """How to draw samples.

    `heun` and `euler` are the published solvers; `multistep` is second order with one evaluation a step.
    `cfg` is the guidance scale, 1 means off; it acts for `cfg_low < t < cfg_high` (a low end of 0 included).
    `cfg_closed`: the interval's ends count, too, as MiniT2I has it: `cfg_low <= t <= cfg_high`.
    `t_eps`: lower bound of 1 - t in the velocity; None takes the flow's own, as the published sampler does.
    `shift`: above 1 puts more of the steps near the noise (`time_grid`); 1 is the published grid of JiT.
    `last_step`: length of the last step, the others being equal; 0 makes it one of them. MiniT2I's code has a grid
    with 0.04.
    `cfg_norm`: what bounds the guided velocity (`guidance.guide`).
    """

    method: Method = "heun"
    steps: int = 50
    cfg: float = 1.0
    cfg_low: float = 0.1
    cfg_high: float = 1.0
    t_eps: float | None = None
    shift: float = 1.0
    cfg_norm: GuidanceNorm = "none"
    cfg_closed: bool = False
    last_step: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        choice("method", self.method, Method)
        choice("cfg_norm", self.cfg_norm, GuidanceNorm)
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.cfg >= 0, "cfg", self.cfg, "0 or more (1 means off)")
        ok = 0 <= self.cfg_low <= self.cfg_high <= 1
        require(ok, "cfg_interval", (self.cfg_low, self.cfg_high), "LOW HIGH with 0 <= LOW <= HIGH <= 1")
        require(0 <= self.last_step < 1, "last_step", self.last_step, "from 0 to below 1")
        require(not self.last_step or self.steps > 1, "last_step", self.last_step, "0 where there is one step only")
        require(self.shift > 0, "shift", self.shift, "above 0 (1 means off)")
        if self.t_eps is not None:
            require(finite(self.t_eps) and 0 < self.t_eps <= 1, "sample_t_eps", self.t_eps, "above 0, at most 1")
            object.__setattr__(self, "t_eps", float(self.t_eps))


# (state z, time t, guidance scale, length of the step that begins at t) -> velocity
VelocityField = Callable[[mx.array, float, float, float], mx.array]


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


def time_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """Times (steps + 1,) float32 from 0 to 1, bit for bit as the reference's framework spaces them on a CPU.

    The first half counts up from 0 in multiples of the float32 step, the second half down from 1, each with a single
    rounding. (A grid computed as i / steps puts a few times one unit elsewhere, and that decides whether a time at
    the end of the guidance interval is guided: with 30 steps and an interval from 0.1, the third.)

    A `shift` s moves every time of that grid: with u = 1 - t its share of noise, u' = s u / (1 + (s - 1) u), the shift
    of Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (equation 23).
    """
    i = np.arange(steps + 1, dtype=np.float64)
    step = np.float64(np.float32(1) / np.float32(steps))
    times = np.where(i < (steps + 1) // 2, step * i, 1 - step * (steps - i)).astype(np.float32)
    if shift == 1:
        return times
    s, noise = np.float32(shift), np.float32(1) - times
    return np.float32(1) - s * noise / (np.float32(1) + (s - np.float32(1)) * noise)


def grid_of(config: SampleConfig) -> np.ndarray:
    """The times (steps + 1,) float32 that sampling visits."""
    if not config.last_step:
        return time_grid(config.steps, config.shift)
    last = np.float32(1 - config.last_step)
    return np.append(time_grid(config.steps - 1, config.shift) * last, np.float32(1))


def solve(field: VelocityField, z: mx.array, config: SampleConfig, t_eps: float = FlowConfig.t_eps) -> Iterator[State]:
    """Integrate dz/dt = field from noise z at t = 0 to t = 1; yields the state after each step, not yet evaluated.

    `t_eps` is the field's own bound of 1 - t; the multistep solver integrates with the same.
    """
    if config.method == "multistep":
        yield from _multistep(field, z, config, t_eps)
        return
    times, interval = grid_of(config), (config.cfg, config.cfg_low, config.cfg_high, config.cfg_closed)
    for i in range(config.steps):
        t, t_next = times[i], times[i + 1]
        dt = float(t_next - t)
        v = field(z, float(t), guidance_at(t, *interval), dt)
        x = z + (1 - float(t)) * v
        if config.method == "euler" or i == config.steps - 1:
            z = z + dt * v
        else:
            after = float(times[i + 2] - t_next)
            v_next = field(z + dt * v, float(t_next), guidance_at(t_next, *interval), after)
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
    times, interval = grid_of(config).tolist(), (config.cfg, config.cfg_low, config.cfg_high)
    last: tuple[float, float, mx.array] | None = None  # time, guidance scale, prediction
    for i, (t, t_next) in enumerate(pairwise(times)):
        cfg, r = mean_guidance(t, t_next, *interval), max(1 - t, t_eps)
        v = field(z, t, cfg, t_next - t)
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

    def field(z: mx.array, t: float, cfg: float, length: float) -> mx.array:
        nonlocal count
        count += 1 if cfg in (0, 1) else 2
        return z

    for _ in solve(field, mx.array(0.0), config):
        pass
    return count
