"""A network as velocity field and sampler: guidance, what a time decides, compiled functions, CPU lanes."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from ..common.fields import require
from ..device import lanes
from ..flow import FlowConfig, velocity
from ..models import Asked, Condition, Network, Step, token_side
from .guidance import guide
from .solvers import SampleConfig, State, VelocityField, solve


class Sampler:
    """A network as velocity field and sampler; compiled functions live as long as it does.

    What a time and the conditions alone decide (`Network.prepare`) is computed once for each time; Heun visits most
    twice. With `compile` the guided and the unguided evaluation are each one compiled function, for fixed shapes.
    Without it, on a CPU, the batch is shared out over lanes.
    """

    def __init__(self, network: Network, flow: FlowConfig, sample: SampleConfig, compile: bool = False) -> None:
        self.network, self.flow, self.sample, self.compile = network, flow, sample, compile
        self._guided_inside = network.takes_guidance
        if self._guided_inside:
            # its output is the mean velocity over a step of the length it was told
            require(sample.method == "euler", "method", sample.method, "euler: this network is told how far to step")
        self.t_eps = flow.t_eps if sample.t_eps is None else sample.t_eps
        wrap: Callable[[Any], Any] = mx.compile if compile else lambda f: f
        self._plain, self._guided = wrap(self._evaluate), wrap(self._evaluate_guided)

    def field(self, asked: Sequence[Asked]) -> VelocityField:
        """The guided velocity for a batch of these classes or prompts.

        A branch whose weight is zero is not computed: the unconditional one at scale 1, the other one at 0.
        """
        network, s = self.network, self.sample
        condition = network.precompute(network.condition(asked))
        null = None if s.cfg == 1 or self._guided_inside else network.precompute(network.condition([None] * len(asked)))
        visited: tuple[float, Condition, Condition] = (math.nan, None, None)

        def field(z: mx.array, t: float, scale: float, length: float = 0.0) -> mx.array:
            nonlocal visited
            at = mx.array([t], dtype=mx.float32)
            scale = 1 if self._guided_inside else scale
            if t != visited[0]:
                step = Step(at, length, s.cfg, s.cfg_low, s.cfg_high)
                visited = t, *network.prepare(step, condition, None if scale == 1 else null)
            _, given, without = visited
            if scale == 1:
                return self._plain(z, at, given)
            if t == 0 and s.cfg_norm == "cfg_zero_star":
                return mx.zeros_like(z)
            if scale == 0:
                return self._plain(z, at, without)
            return self._guided(z, at, given, without, mx.array(scale, dtype=mx.float32))

        return field

    def _evaluate(self, z: mx.array, t: mx.array, condition: Condition) -> mx.array:
        network = self.network if self.compile else lanes.split_batch(self.network, self.network.parameters)
        return velocity(network(z, t, condition), z, t, self.flow, self.t_eps)

    def _evaluate_guided(
        self, z: mx.array, t: mx.array, condition: Condition, null: Condition, scale: mx.array
    ) -> mx.array:
        if not self.compile and lanes.count() > len(z):  # one branch a lane
            mx.eval(z, t, condition, null, self.network.parameters())
            outputs: Any = lanes.run([partial(self.network, z, t, c) for c in (condition, null)])
        elif not self.compile:
            outputs = lanes.split_batch(self.network.guided, self.network.parameters)(z, t, condition, null)
        else:
            outputs = self.network.guided(z, t, condition, null)
        given, without = (velocity(out, z, t, self.flow, self.t_eps) for out in outputs)
        norm = self.sample.cfg_norm
        return guide(given, without, scale, norm, token_side(self.network.config) if norm == "channel" else 1)

    def states(self, noise: mx.array, asked: Sequence[Asked]) -> Iterator[State]:
        """States of one batch, from standard normal noise (B, 3, H, W) and B classes or prompts, not yet evaluated.

        The noise scale is applied here. The caller owns progress and evaluation (`mx.eval(state.z)`).
        """
        z = self.flow.noise_scale * noise.astype(mx.float32)
        yield from solve(self.field(asked), z, self.sample, self.t_eps)
