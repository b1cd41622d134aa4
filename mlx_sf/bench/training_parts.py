"""A training step with AdamW and two EMAs, and the parts that it is made of, forward and backward."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ..checkpoints.config import Config
from ..common.pixels import from_uint8
from ..flow import add_noise, flow_loss, training_times, velocity
from ..models.jit import Block, JiTConfig
from ..training.step import StepOptions, draws
from .network import network
from .parts import Parts, Run, hidden_states, normal, norms, rotary, tokens
from .training import RepeatedStep


def training_parts(c: JiTConfig, batch: int, dtype: mx.Dtype, compiled: bool) -> Parts:
    """The step of `batch` images, and its parts as often as they occur in it, each at its real shapes."""
    model, config, D = network(c, dtype), Config(c), c.hidden_size
    whole = RepeatedStep(config, batch, StepOptions(dtype=dtype, compile=compiled))
    x, noise = from_uint8(mx.array(whole.images)), normal((batch, 3, *c.size))
    t = training_times(mx.zeros(batch), config.flow)
    hidden = hidden_states(model, batch)
    m, c_vector, y = normal((batch, 6 * D)), normal((batch, D)), whole.condition["labels"]
    gradients = tree_map(mx.zeros_like, whole.arrays["model"])
    scalars = mx.array([1.0, 1e-4, 0.5, 0.9999, 0.9996])
    mx.eval(x, t, gradients, whole.arrays)

    def with_gradients(layer: Any, run: Callable[..., mx.array], *inputs: mx.array) -> Run:
        """run(*inputs) forward and backward, with gradients for the layer's parameters and the inputs."""

        def value(parameters: Any, *inputs: mx.array) -> mx.array:
            layer.update(parameters)
            return run(*inputs).sum()

        own: Any = layer.trainable_parameters()
        f = mx.value_and_grad(value, argnums=tuple(range(1 + len(inputs))))
        f = mx.compile(f) if compiled else f

        def call() -> Any:
            result = f(own, *inputs)
            layer.update(own)
            leaves: Any = tree_flatten(result)
            return [a for _, a in leaves]

        return call

    def each_block(make: Callable[[Block, int], Run]) -> Run:
        layers = [make(b, T) for b, T in zip(model.blocks, tokens(model), strict=True)]
        return lambda: [run() for run in layers]

    def noised() -> mx.array:
        d = draws(0, 1, batch, slice(0, batch), c.size)
        z = add_noise(from_uint8(mx.array(whole.images)), d.noise, t, 1.0)
        return flow_loss(velocity(z, z, t, config.flow), x, z, t, config.flow)

    def modulations(layer: Any) -> Run:
        return with_gradients(layer, lambda v: layer(v), c_vector)

    N, linear = c.grid_size**2, model.final_layer.linear
    adaln = [modulations(layer.adaLN_modulation[1]) for layer in (*model.blocks, model.final_layer)]
    embed_t = with_gradients(model.t_embedder, lambda: model.t_embedder(t))
    embed_y = with_gradients(model.y_embedder, lambda: model.y_embedder(y))
    return whole, [
        ("random draws, noise, loss", noised),
        ("forcing", lambda: model._forcing(noise, t) if c.forcing is not None else []),
        ("embedder", with_gradients(model.x_embedder, lambda: model.x_embedder(noise) + model.pos_embed)),
        ("conditioning (adaLN)", lambda: [embed_t(), embed_y(), *(run() for run in adaln)]),
        (
            "attention",
            each_block(lambda b, T: with_gradients(b.attn, lambda z: b.attn(z, *rotary(model, T), None), hidden[T])),
        ),
        ("feed-forward", each_block(lambda b, T: with_gradients(b.mlp, lambda z: b.mlp(z, None), hidden[T]))),
        ("norms and modulation", each_block(lambda b, T: _norms_with_gradients(b, hidden[T], m, compiled))),
        ("head", with_gradients(linear, lambda z: model.unpatchify(linear(z)), hidden[max(hidden)][:, -N:])),
        ("AdamW and two EMAs", lambda: whole.step._finish(whole.arrays, mx.array(0.0), gradients, scalars)[0]),
    ]


def _norms_with_gradients(block: Block, x: mx.array, m: mx.array, compiled: bool) -> Run:
    def value(weights: list[mx.array], x: mx.array, m: mx.array) -> mx.array:
        block.norm1.weight, block.norm2.weight = weights
        return norms(block, x, m).sum()

    own = [block.norm1.weight, block.norm2.weight]
    f = mx.value_and_grad(value, argnums=(0, 1, 2))
    f = mx.compile(f) if compiled else f

    def call() -> Any:
        result = f(own, x, m)
        block.norm1.weight, block.norm2.weight = own
        return result

    return call
