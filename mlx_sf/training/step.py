"""One training step: random draws, loss, gradients, AdamW and two EMAs, as a pure function of arrays.

Master weights, moments and EMAs are float32; what the matrix products run in is `StepOptions.dtype`. Nothing random
happens inside the step: `draws` makes every number it needs from (seed, step, position in the global batch), so an
image's draws depend neither on how the batch is split over micro-batches or machines nor on when the run was resumed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..common.pixels import from_uint8
from ..flow import FlowConfig, drop_conditions, training_loss, training_times
from ..models import architecture, cast_products
from .optimizer import AdamW, clip_by_norm

Weights = dict[str, mx.array]
Arrays = dict[str, Weights]  # "model", "ema1", "ema2": weights; "m", "v": moments; all by parameter name
SETS = ("model", "ema1", "ema2")


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed. All but `optimizer`, `clip_grad` and `dtype` change results by rounding at most.

    `accumulate` splits the batch into that many micro-batches; `world` processes average their gradients.
    """

    optimizer: AdamW = field(default_factory=AdamW)
    clip_grad: float = 0.0
    dtype: mx.Dtype = mx.float32
    accumulate: int = 1
    grad_checkpoint: bool = False
    compile: bool = False
    world: int = 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: uniform (b,) against the drop rate, normals (b,) for t, noise (b, 3, H, W).

    `dropout` is a key for dropout layers, or None.
    """

    drop_uniform: mx.array
    t_normal: mx.array
    noise: mx.array
    dropout: mx.array | None = None


def draws(seed: int, step: int, batch_size: int, local: slice, size: tuple[int, int], dropout: bool = False) -> Draws:
    """Draws for positions `local` of the global batch of `step`, each position from a key of its own."""
    key = mx.random.key((seed << 32) + step)
    keys = mx.random.split(key, batch_size + 1)
    per_image = mx.vmap(lambda k: mx.random.split(k, 3))(keys[:batch_size][local])  # (b, 3, key)
    return Draws(
        drop_uniform=mx.vmap(lambda k: mx.random.uniform(key=k))(per_image[:, 0]),
        t_normal=mx.vmap(lambda k: mx.random.normal((), key=k))(per_image[:, 1]),
        noise=mx.vmap(lambda k: mx.random.normal((3, *size), key=k))(per_image[:, 2]),
        dropout=mx.random.split(keys[batch_size], 1 + (local.start or 0))[-1] if dropout else None,
    )


def initial_arrays(weights: Weights) -> Arrays:
    """A fresh training state: moments zero, both EMAs copies of the weights."""
    zeros = {k: mx.zeros(w.shape) for k, w in weights.items()}
    return {"model": dict(weights), "ema1": dict(weights), "ema2": dict(weights), "m": zeros, "v": dict(zeros)}


def trainable(network: Any) -> Weights:
    """The trained parameters by name, float32."""
    leaves: Any = tree_flatten(network.trainable_parameters())
    return {k: w.astype(mx.float32) for k, w in leaves}


@contextlib.contextmanager
def bound(network: Any, weights: Weights) -> Iterator[Any]:
    """The network with these weights. Afterwards it holds none, so that no copy or tracer stays alive in it."""
    network.update(tree_unflatten(list(weights.items())))
    try:
        yield network
    finally:
        release(network, weights)


def release(network: Any, weights: Weights) -> None:
    """Let the network hold none of these weights any more."""
    network.update(tree_unflatten([(k, mx.array(0.0)) for k in weights]))


class TrainStep:
    """step(arrays, images, condition, null, draws, lr, number, ema_decays) -> (new arrays, loss, gradient norm).

    `images` (b, H, W, 3) uint8, their `condition` and the unconditional one `null` are this process's share; `number`
    counts steps from 1. The gradient norm is None unless gradients are clipped. The network serves as a shell: its
    weights come from `arrays`, which is used up: its buffers become the new ones. Results are unevaluated.
    """

    def __init__(self, network: Any, flow: FlowConfig, options: StepOptions) -> None:
        self.network, self.flow, self.options = network, flow, options
        self._kind = architecture(network.config)
        self._differentiated = mx.value_and_grad(self._loss)
        wrap: Callable[[Any], Any] = mx.compile if options.compile else lambda f: f
        self._whole, self._micro, self._finish = wrap(self._step), wrap(self._accumulate), wrap(self._apply)

    def __call__(
        self,
        arrays: Arrays,
        images: np.ndarray,
        condition: Any,
        null: Any,
        draws: Draws,
        lr: float,
        number: int,
        ema_decays: tuple[float, float],
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        scalars = mx.array([*self.options.optimizer.scalars(lr, number), *ema_decays], dtype=mx.float32)
        batch = [mx.array(images), condition, null, draws.drop_uniform, draws.t_normal, draws.noise]
        if self.options.accumulate == 1:
            return self._whole(arrays, batch, draws.dropout, scalars)
        loss, gradients = self._in_parts(arrays["model"], batch, draws.dropout, len(images))
        return self._finish(arrays, loss, gradients, scalars)

    def _in_parts(
        self, weights: Weights, batch: list[Any], dropout: mx.array | None, size: int
    ) -> tuple[mx.array, Weights]:
        """Loss and gradients of a batch, one micro-batch evaluated after another."""
        parts = min(self.options.accumulate, size)
        keys = [None] * parts if dropout is None else list(mx.random.split(dropout, parts))
        edges = [round(i * size / parts) for i in range(parts + 1)]
        loss, gradients = mx.array(0.0), {k: mx.zeros(w.shape) for k, w in weights.items()}
        for i, key in enumerate(keys):
            start, stop = edges[i], edges[i + 1]
            micro = tree_map(lambda a, start=start, stop=stop: a[start:stop], batch)
            share = mx.array((stop - start) / size)
            loss, gradients = self._micro(weights, loss, gradients, micro, key, share)
            mx.eval(loss, gradients)
        return loss, gradients

    def _value_and_grad(self, weights: Weights, batch: list[Any], dropout: mx.array | None) -> tuple[mx.array, Weights]:
        result: tuple[mx.array, Weights] = self._differentiated(weights, batch, dropout)
        # recomputing checkpointed blocks in the backward pass puts their weights into the network again
        release(self.network, weights)
        return result

    def _loss(self, weights: Weights, batch: list[Any], dropout: mx.array | None) -> mx.array:
        images, condition, null, drop_uniform, t_normal, noise = batch
        condition = drop_conditions(condition, null, drop_uniform, self.flow.label_drop_prob)
        dtype = self.options.dtype
        wrapper = nn.utils.checkpoint if self.options.grad_checkpoint else None
        cast = weights if dtype == mx.float32 else cast_products(weights, dtype, self._kind)
        with bound(self.network, cast) as network:
            run = partial(network, key=dropout, block_wrapper=wrapper)
            t = training_times(t_normal, self.flow)
            return training_loss(run, from_uint8(images), condition, t, noise, self.flow)

    def _accumulate(
        self,
        weights: Weights,
        loss: mx.array,
        gradients: Weights,
        batch: list[Any],
        dropout: mx.array | None,
        share: mx.array,
    ) -> tuple[mx.array, Weights]:
        micro_loss, micro = self._value_and_grad(weights, batch, dropout)
        return loss + share * micro_loss, tree_map(lambda total, g: total + share * g, gradients, micro)

    def _step(
        self, arrays: Arrays, batch: list[Any], dropout: mx.array | None, scalars: mx.array
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        return self._apply(arrays, *self._value_and_grad(arrays["model"], batch, dropout), scalars)

    def _apply(
        self, arrays: Arrays, loss: mx.array, gradients: Weights, scalars: mx.array
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        """Gradients averaged over processes and clipped; AdamW; the EMAs."""
        o, norm = self.options, None
        if o.world > 1:
            # as a list: a tree of dotted names would come back nested
            gradients = dict(zip(gradients, nn.average_gradients(list(gradients.values())), strict=True))
            loss = mx.distributed.all_sum(loss) / o.world
        if o.clip_grad:
            gradients, norm = clip_by_norm(gradients, o.clip_grad)
        new: Arrays = {kind: {} for kind in arrays}
        for k, w in arrays["model"].items():
            w, new["m"][k], new["v"][k] = o.optimizer.update(
                w, gradients[k], arrays["m"][k], arrays["v"][k], scalars[:3]
            )
            new["model"][k] = w
            for ema, decay in (("ema1", scalars[3]), ("ema2", scalars[4])):
                new[ema][k] = decay * arrays[ema][k] + (1 - decay) * w
        return new, loss, norm
