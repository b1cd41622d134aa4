"""From a request to evaluated states: in batches, shared out over processes, a step ahead of whoever looks."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx

from ..common.world import World
from ..device.defaults import compile_by_default
from ..flow import FlowConfig
from ..models import Network
from .request import Request
from .sampler import Sampler
from .solvers import SampleConfig, State


def batches(n: int, batch_size: int) -> Iterator[range]:
    """Image numbers 0 ... n - 1 in batches."""
    return (range(i, min(i + batch_size, n)) for i in range(0, n, batch_size))


def my_batches(n: int, batch_size: int, world: World) -> list[range]:
    """The batches of this process: every `world.size`-th, as in the reference's evaluation."""
    return list(batches(n, batch_size))[world.rank :: world.size]


def generate(
    network: Network,
    flow: FlowConfig,
    sample: SampleConfig,
    request: Request,
    batch_size: int,
    world: World | None = None,
) -> Iterator[tuple[Sequence[int], State]]:
    """States of this process's batches, one after another, each with the numbers of its images; evaluated."""
    compiled = compile_by_default()
    sampler = Sampler(network, flow, sample, compiled)
    for numbers in my_batches(len(request), batch_size, world or World()):
        # a compiled function has one entry per shape: fill the last batch up, and drop what is too much
        padded = list(numbers) + [numbers[-1]] * (min(batch_size, len(request)) - len(numbers)) * compiled
        noise, m = request.initial_noise(network.config.size, padded), len(numbers)
        for state in ahead(sampler.states(noise, [request.asked[i] for i in padded])):
            yield numbers, dataclasses.replace(state, z=state.z[:m], x=state.x[:m])


def ahead(states: Iterable[State]) -> Iterator[State]:
    """Evaluated states; while one is looked at, the device already works on the next."""
    waiting: State | None = None
    for state in states:
        mx.async_eval(state.z)
        if waiting is not None:
            mx.eval(waiting.z)
            yield waiting
        waiting = state
    if waiting is not None:
        mx.eval(waiting.z)
        yield waiting
