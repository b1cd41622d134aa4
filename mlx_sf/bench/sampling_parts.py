"""A Heun step of sampling, guided at both of its evaluations, and the parts that it is made of."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..device.lanes import split_batch
from ..flow import FlowConfig, velocity
from ..models.jit import Block, JiTConfig
from ..sampling.guidance import guide
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig
from .network import network
from .parts import Parts, Run, hidden_states, normal, norms, rotary, tokens

_CFG, _T = 2.9, 0.5


def sampling_parts(c: JiTConfig, batch: int, dtype: mx.Dtype, compiled: bool) -> Parts:
    """The step of `batch` images, and its parts as often as they occur in it, each at its real shapes."""
    model, D, flow = network(c, dtype), c.hidden_size, FlowConfig()
    noise, classes = seeded_noise(range(batch), c.size), [i % c.num_classes for i in range(batch)]
    field = Sampler(model, flow, SampleConfig("heun", 1, _CFG, 0.1, 1.0), compiled).field(classes)
    distinct = mx.array(np.unique([*classes, c.null_class]))
    at, later = mx.array([_T]), mx.array([_T + 0.02])
    hidden = hidden_states(model, 2 * batch)  # guidance: two halves of a batch, which share forcing and embedding
    m = normal((2 * batch, 6 * D))
    mx.eval(noise, distinct)

    def lanes(run: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def alone(z: mx.array, t: mx.array) -> mx.array:
            return run(z)

        split = split_batch(mx.compile(alone) if compiled else alone, [m, model.parameters()])
        return lambda z: split(z, at)

    def each_block(of: Callable[[Block, mx.array, int], mx.array]) -> Run:
        def layer(block: Block, T: int) -> Callable[[], mx.array]:
            run = lanes(lambda z: of(block, z, T))
            return lambda: run(hidden[T])

        layers = [layer(b, T) for b, T in zip(model.blocks, tokens(model), strict=True)]
        return lambda: [run() for _ in range(2) for run in layers]

    count = iter(range(10**9))

    def whole() -> mx.array:
        shift = 1e-6 * next(count)  # another time at each call, as in a run: adaLN vectors are computed anew
        v = field(noise, _T + shift, _CFG, 0.02)
        return noise + 0.02 * 0.5 * (v + field(noise + 0.02 * v, _T + 0.02 + shift, _CFG, 0.02))

    def guidance() -> mx.array:
        z = noise
        for _ in range(2):
            given, without = (velocity(noise, z, at, flow) for _ in range(2))
            z = noise + 0.02 * guide(given, without, _CFG)
        return z

    N = c.grid_size**2
    forcing = lanes(lambda z: model._forcing(z, at)) if c.forcing is not None else None
    embed = lanes(lambda z: model.x_embedder(z) + model.pos_embed)
    head = lanes(lambda z: model.unpatchify(model.final_layer(z, None, m[: len(z), : 2 * D])))
    return whole, [
        ("forcing", lambda: [forcing(noise) for _ in range(2)] if forcing else []),
        ("embedder", lambda: [embed(noise) for _ in range(2)]),
        ("conditioning (adaLN)", lambda: [model.modulations(t, distinct) for t in (at, later)]),
        ("attention", each_block(lambda b, z, T: b.attn(z, *rotary(model, T), None))),
        ("feed-forward", each_block(lambda b, z, T: b.mlp(z, None))),
        ("norms and modulation", each_block(lambda b, z, T: norms(b, z, m[: len(z)]))),
        ("head", lambda: [head(hidden[T][:, -N:]) for T in [max(hidden)] * 2]),
        ("guidance and solver", guidance),
    ]
