"""One training step: random draws, loss, gradients, AdamW and two EMAs, as a pure function of arrays.

Master weights, moments and EMAs are float32; what the matrix products run in is `StepOptions.dtype`. Nothing random
happens inside the step: `draws` makes every number it needs from (seed, step, position in the global batch), so an
image's draws depend neither on how the batch is split over micro-batches or machines nor on when the run was resumed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from . import lanes
from .config import FlowConfig
from .flow import drop_labels, training_loss, training_times
from .model import JiT, cast_products
from .optim import AdamW, clip_by_norm

Weights = dict[str, mx.array]
Arrays = dict[str, Weights]  # "model", "ema1", "ema2": weights; "m", "v": moments; all by parameter name
SETS = ("model", "ema1", "ema2")


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed. All but `optimizer`, `clip_grad` and `dtype` change results by rounding at most.

    `accumulate` splits the batch into that many micro-batches; `world` processes average their gradients; `lanes`
    threads share batch and parameters between them (`lanes.count()` is how many help). Dropout runs in one lane.
    """

    optimizer: AdamW = field(default_factory=AdamW)
    clip_grad: float = 0.0
    dtype: mx.Dtype = mx.float32
    accumulate: int = 1
    grad_checkpoint: bool = False
    compile: bool = False
    world: int = 1
    lanes: int = 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: uniform (b,) against the label drop rate, normals (b,) for t, noise (b, 3, H, H).

    `dropout` is a key for dropout layers, or None.
    """

    drop_uniform: mx.array
    t_normal: mx.array
    noise: mx.array
    dropout: mx.array | None = None


def draws(seed: int, step: int, batch_size: int, local: slice, img_size: int, dropout: bool = False) -> Draws:
    """Draws for positions `local` of the global batch of `step`, each position from a key of its own."""
    key = mx.random.key((seed << 32) + step)
    keys = mx.random.split(key, batch_size + 1)
    per_image = mx.vmap(lambda k: mx.random.split(k, 3))(keys[:batch_size][local])  # (b, 3, key)
    return Draws(
        drop_uniform=mx.vmap(lambda k: mx.random.uniform(key=k))(per_image[:, 0]),
        t_normal=mx.vmap(lambda k: mx.random.normal((), key=k))(per_image[:, 1]),
        noise=mx.vmap(lambda k: mx.random.normal((3, img_size, img_size), key=k))(per_image[:, 2]),
        dropout=mx.random.split(keys[batch_size], 1 + (local.start or 0))[-1] if dropout else None,
    )


def initial_arrays(weights: Weights) -> Arrays:
    """A fresh training state: moments zero, both EMAs copies of the weights."""
    zeros = {k: mx.zeros(w.shape) for k, w in weights.items()}
    return {"model": dict(weights), "ema1": dict(weights), "ema2": dict(weights), "m": zeros, "v": dict(zeros)}


def trainable(model: JiT) -> Weights:
    """The trained parameters by name, float32 (all but the position table)."""
    leaves: Any = tree_flatten(model.trainable_parameters())
    return {k: w.astype(mx.float32) for k, w in leaves}


@contextlib.contextmanager
def bound(model: JiT, weights: Weights) -> Iterator[JiT]:
    """The network with these weights. Afterwards it holds none, so that no copy or tracer stays alive in it."""
    model.update(tree_unflatten(list(weights.items())))
    try:
        yield model
    finally:
        release(model, weights)


def release(model: JiT, weights: Weights) -> None:
    """Let the network hold none of these weights any more."""
    model.update(tree_unflatten([(k, mx.array(0.0)) for k in weights]))


def pixels(images: mx.array) -> mx.array:
    """uint8 pictures (b, H, H, 3) -> (b, 3, H, H) float32 in [-1, 1], rounded as in the reference."""
    return 2 * (images.astype(mx.float32) / 255).transpose(0, 3, 1, 2) - 1


class TrainStep:
    """step(arrays, images, labels, draws, lr, number, ema_decays) -> (new arrays, loss, gradient norm).

    `images` (b, H, H, 3) uint8 and `labels` (b,) are this process's share; `number` counts steps from 1. The gradient
    norm is None unless gradients are clipped. The model serves as a shell: its weights come from `arrays`, which is
    used up: its buffers become the new ones. Results are unevaluated, unless several lanes computed them.
    """

    def __init__(self, model: JiT, flow: FlowConfig, options: StepOptions) -> None:
        self.model, self.flow, self.options = model, flow, options
        self._differentiated = mx.value_and_grad(self._loss)
        wrap: Callable[[Any], Any] = mx.compile if options.compile else lambda f: f
        self._whole, self._finish, self._reduced = wrap(self._step), wrap(self._apply), wrap(self._reduce)
        # of each lane its own, so that threads share no compiled function
        each = range(max(1, options.lanes))
        self._gradient, self._micro = [wrap(self._value_and_grad) for _ in each], [wrap(self._accumulate) for _ in each]
        self._updated = [wrap(self._update) for _ in each]

    def __call__(
        self,
        arrays: Arrays,
        images: np.ndarray,
        labels: np.ndarray,
        draws: Draws,
        lr: float,
        number: int,
        ema_decays: tuple[float, float],
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        scalars = mx.array([*self.options.optimizer.scalars(lr, number), *ema_decays], dtype=mx.float32)
        d = draws
        batch = [mx.array(images), mx.array(labels), d.drop_uniform, d.t_normal, d.noise]
        if self.options.lanes > 1 and len(images) > 1 and d.dropout is None:
            return self._in_lanes(arrays, batch, scalars)
        if self.options.accumulate == 1:
            return self._whole(arrays, batch, d.dropout, scalars)
        mx.eval(arrays, batch)
        [(loss, gradients)] = self._gradients(arrays["model"], batch, d.dropout, [slice(0, len(images))])
        return self._finish(arrays, [gradients], mx.array([1.0]), loss, scalars)

    def _value_and_grad(
        self, weights: Weights, batch: list[mx.array], dropout: mx.array | None
    ) -> tuple[mx.array, Weights]:
        result: tuple[mx.array, Weights] = self._differentiated(weights, batch, dropout)
        # recomputing checkpointed blocks in the backward pass puts their weights into the model again
        release(self.model, weights)
        return result

    def _loss(self, weights: Weights, batch: list[mx.array], dropout: mx.array | None) -> mx.array:
        images, labels, drop_uniform, t_normal, noise = batch
        y = drop_labels(labels, drop_uniform, self.flow.label_drop_prob, self.model.config.null_class)
        dtype = self.options.dtype
        wrapper = nn.utils.checkpoint if self.options.grad_checkpoint else None
        with bound(self.model, weights if dtype == mx.float32 else cast_products(weights, dtype)) as model:
            network = partial(model, key=dropout, block_wrapper=wrapper)
            t = training_times(t_normal, self.flow)
            return training_loss(network, pixels(images), y, t, noise, self.flow)

    def _gradients(
        self, weights: Weights, batch: list[mx.array], dropout: mx.array | None, mine: list[slice]
    ) -> list[tuple[mx.array, Weights]]:
        """Loss and gradients of the slices `mine` of a batch, one per lane, evaluated one micro-batch at a time."""
        parts = min(self.options.accumulate, *(s.stop - s.start for s in mine))
        if parts == 1:
            slices = [[a[s] for a in batch] for s in mine]
            mx.eval(slices, dropout)
            return lanes.run(
                [partial(f, weights, own, dropout) for f, own in zip(self._gradient, slices, strict=False)]
            )
        keys = [None] * parts if dropout is None else list(mx.random.split(dropout, parts))
        done = [(mx.array(0.0), {k: mx.zeros(w.shape) for k, w in weights.items()}) for _ in mine]
        mx.eval(keys, done)
        micros = [[_within(s, m) for m in lanes.shares(s.stop - s.start, parts)] for s in mine]
        for i, key in enumerate(keys):
            tasks: list[lanes.Task] = []
            for lane, micro in enumerate(micros):
                own = [a[micro[i]] for a in batch]
                share = mx.array(len(own[0]) / (micro[-1].stop - micro[0].start))
                mx.eval(own, share)
                tasks.append(partial(self._micro[lane], weights, *done[lane], own, key, share))
            done.clear()
            done = lanes.run(tasks)
        return done

    def _accumulate(
        self,
        weights: Weights,
        loss: mx.array,
        gradients: Weights,
        batch: list[mx.array],
        dropout: mx.array | None,
        fraction: mx.array,
    ) -> tuple[mx.array, Weights]:
        micro_loss, micro = self._value_and_grad(weights, batch, dropout)
        return loss + fraction * micro_loss, tree_map(lambda total, g: total + fraction * g, gradients, micro)

    def _step(
        self, arrays: Arrays, batch: list[mx.array], dropout: mx.array | None, scalars: mx.array
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        loss, gradients = self._value_and_grad(arrays["model"], batch, dropout)
        return self._apply(arrays, [gradients], mx.array([1.0]), loss, scalars)

    def _apply(
        self, arrays: Arrays, gradients: list[Weights], fractions: mx.array, loss: mx.array, scalars: mx.array
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        if self._needs_all_gradients:
            reduced, loss, norm = self._reduce(gradients, fractions, loss)
            gradients = [reduced]
        else:
            norm = None
        return self._update(arrays, gradients, fractions, scalars), loss, norm

    @property
    def _needs_all_gradients(self) -> bool:
        return self.options.world > 1 or self.options.clip_grad > 0

    def _reduce(
        self, gradients: list[Weights], fractions: mx.array, loss: mx.array
    ) -> tuple[Weights, mx.array, mx.array | None]:
        """The gradient of the global batch, clipped; its loss; the norm before clipping."""
        o, norm = self.options, None
        total = {k: _weighted([g[k] for g in gradients], fractions) for k in gradients[0]}
        if o.world > 1:
            # as a list: a tree of dotted names would come back nested
            total = dict(zip(total, nn.average_gradients(list(total.values())), strict=True))
            loss = mx.distributed.all_sum(loss) / o.world
        if o.clip_grad:
            total, norm = clip_by_norm(total, o.clip_grad)
        return total, loss, norm

    def _update(self, arrays: Arrays, gradients: list[Weights], fractions: mx.array, scalars: mx.array) -> Arrays:
        """AdamW and the EMAs for these parameters; the gradient is the weighted sum of `gradients`."""
        new: Arrays = {kind: {} for kind in arrays}
        for k, w in arrays["model"].items():
            g = _weighted([g[k] for g in gradients], fractions)
            w, new["m"][k], new["v"][k] = self.options.optimizer.update(
                w, g, arrays["m"][k], arrays["v"][k], scalars[:3]
            )
            new["model"][k] = w
            for ema, decay in (("ema1", scalars[3]), ("ema2", scalars[4])):
                new[ema][k] = decay * arrays[ema][k] + (1 - decay) * w
        return new

    def _in_lanes(
        self, arrays: Arrays, batch: list[mx.array], scalars: mx.array
    ) -> tuple[Arrays, mx.array, mx.array | None]:
        """The step on several threads: first each takes a share of the batch, then each a share of the parameters."""
        size, mine = len(batch[0]), lanes.shares(len(batch[0]), self.options.lanes)
        fractions = mx.array([(s.stop - s.start) / size for s in mine])
        mx.eval(arrays, batch, scalars, fractions)
        found = self._gradients(arrays["model"], batch, None, mine)
        loss, norm = (mx.stack([one for one, _ in found]) * fractions).sum(), None
        gradients = [g for _, g in found]
        del found
        if self._needs_all_gradients:
            total, loss, norm = self._reduced(gradients, fractions, loss)
            gradients, fractions = [total], mx.array([1.0])
            mx.eval(gradients, fractions, loss, norm)
        new: Arrays = {kind: {} for kind in arrays}
        portions = [
            [names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)]
            for names in _equal_shares(arrays["model"], self.options.lanes)
        ]
        for turn in zip_longest(*portions):
            updates: list[lanes.Task] = []
            for update, names in zip(self._updated, turn, strict=False):
                if names:
                    own: Arrays = {kind: {k: arrays[kind].pop(k) for k in names} for kind in arrays}
                    grads = [{k: g.pop(k) for k in names} for g in gradients]
                    updates.append(partial(update, own, grads, fractions, scalars))
                    del own, grads
            for done in lanes.run(updates):
                for kind, values in done.items():
                    new[kind].update(values)
        return new, loss, norm


# parameters that a lane updates in one evaluation: MLX lets about a hundred operations wait on all streams together,
# and a lane that comes late to a full queue starves until the others have finished
_AT_ONCE = 12


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _weighted(parts: list[mx.array], fractions: mx.array) -> mx.array:
    if len(parts) == 1:
        return parts[0]
    return sum((fractions[i] * p for i, p in enumerate(parts[1:], 1)), start=fractions[0] * parts[0])


def _equal_shares(weights: Weights, count: int) -> list[list[str]]:
    """Names of the weights in at most `count` lists of nearly the same total size."""
    lists: list[list[str]] = [[] for _ in range(min(count, len(weights)))]
    sizes = [0] * len(lists)
    for name in sorted(weights, key=lambda k: (-weights[k].size, k)):
        i = sizes.index(min(sizes))
        lists[i].append(name)
        sizes[i] += weights[name].size
    return lists
