"""Where the time goes: a guided Heun step, or a training step, part by part.

Each part is run alone, at the shapes that it has within the whole, as often as it occurs there. The whole is timed in
the same way; what the parts do not add up to is named "other". Where a compiled whole fuses across parts, "other" can
be negative.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..config import Config, SampleConfig, model_config
from ..device import compile_by_default, dtype_name
from ..flow import add_noise, flow_loss, training_times, velocity
from ..lanes import split_batch
from ..model import Block, JiT, cast_products, modulate
from ..sample import Sampler, seeded_noise
from ..train import StepOptions, TrainStep, draws, initial_arrays, pixels, trainable
from .rates import Runs, alternate

Part = tuple[str, Callable[[], Any]]
_CFG, _T = 2.9, 0.5


def profile_step(
    kind: Literal["sample", "train"],
    size: str = "B/32",
    img_size: int = 256,
    batch: int = 8,
    dtype: mx.Dtype = mx.float32,
    rounds: int = 5,
    compile: bool | None = None,
) -> dict[str, Any]:
    """Seconds of each part of a step and of the whole: medians of `rounds` turns in which all take part.

    "sample" is a Heun step of `batch` images, guided at both of its evaluations; "train" a step with AdamW and two
    EMAs. Compiled or not as the program does it by default: on a CPU it samples eagerly and trains compiled.
    """
    compiled = (kind == "train" or compile_by_default()) if compile is None else compile
    whole, parts = (_sampling_parts if kind == "sample" else _training_parts)(size, img_size, batch, dtype, compiled)
    runs: Runs = {name: partial(_evaluate, run) for name, run in [("whole step", whole), *parts]}
    seconds = alternate(runs, rounds)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    total = medians.pop("whole step")
    return {
        "what": f"{kind} step, {size} at {img_size}, batch {batch}, {dtype_name(dtype)}, "
        + ("compiled" if compiled else "eager"),
        "seconds": total,
        "spread": [min(seconds["whole step"]), max(seconds["whole step"])],
        "parts": {**medians, "other": total - sum(medians.values())},
    }


def _evaluate(run: Callable[[], Any]) -> None:
    mx.eval(run())


def profile_lines(result: dict[str, Any]) -> list[str]:
    """The profile as a table: seconds and shares of the whole."""
    total = result["seconds"]
    lines = [f"{result['what']}: {total:.3f} s ({result['spread'][0]:.3f} to {result['spread'][1]:.3f})"]
    return lines + [f"  {name:<26} {s:8.4f} s {s / total:6.1%}" for name, s in result["parts"].items()]


def _network(size: str, img_size: int, dtype: mx.Dtype) -> JiT:
    model = JiT(model_config(size, img_size=img_size))
    model.update(cast_products(model.parameters(), dtype))
    mx.eval(model.parameters())
    return model


def _normal(shape: Sequence[int], seed: int = 0) -> mx.array:
    x = mx.random.normal(list(shape), key=mx.random.key(seed))
    mx.eval(x)
    return x


def _tokens(model: JiT) -> list[int]:
    """Tokens per image in each block."""
    c = model.config
    late = [bool(c.in_context_len) and i >= c.in_context_start for i in range(c.depth)]
    return [c.grid_size**2 + c.in_context_len * inside for inside in late]


def _tables(model: JiT, tokens: int) -> tuple[mx.array, mx.array]:
    return model._cos[-tokens:], model._sin[-tokens:]


def _norms(block: Block, x: mx.array, m: mx.array) -> mx.array:
    """All that a block does but for attention and feed-forward, whose place their own inputs take."""
    shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(m, 6, axis=-1)
    x = x + gate1[:, None] * modulate(block.norm1(x), shift1, scale1)
    return x + gate2[:, None] * modulate(block.norm2(x), shift2, scale2)


def _sampling_parts(
    size: str, img_size: int, batch: int, dtype: mx.Dtype, compiled: bool
) -> tuple[Callable[[], Any], list[Part]]:
    model = _network(size, img_size, dtype)
    c, D = model.config, model.config.hidden_size
    config = Config(c, sample=SampleConfig("heun", 1, _CFG, 0.1, 1.0))
    noise, labels = seeded_noise(range(batch), img_size), mx.arange(batch) % c.num_classes
    field = Sampler(model, config, compiled).field(labels)
    both = mx.concatenate([noise, noise])  # guidance: two halves of a batch, which share forcing and embedding
    classes = mx.array(np.unique(np.append(np.array(labels), c.null_class)))
    at, later = mx.array([_T]), mx.array([_T + 0.02])
    hidden = {T: _normal((2 * batch, T, D)) for T in sorted(set(_tokens(model)))}
    m = _normal((2 * batch, 6 * D))
    mx.eval(both, classes, hidden, m)

    def lanes(run: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def alone(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
            return run(z)

        split = split_batch(mx.compile(alone) if compiled else alone, [m, model.parameters()])
        return lambda z: split(z, at, mx.zeros((len(z),), dtype=mx.int32))

    def each_block(of: Callable[[Block, mx.array, int], mx.array]) -> Callable[[], list[mx.array]]:
        def layer(block: Block, T: int) -> Callable[[], mx.array]:
            run = lanes(lambda z: of(block, z, T))
            return lambda: run(hidden[T])

        layers = [layer(b, T) for b, T in zip(model.blocks, _tokens(model), strict=True)]
        return lambda: [run() for _ in range(2) for run in layers]

    count = iter(range(10**9))

    def whole() -> mx.array:
        shift = 1e-6 * next(count)  # another time at each call, as in a run: adaLN vectors are computed anew
        v = field(noise, _T + shift, _CFG)
        return noise + 0.02 * 0.5 * (v + field(noise + 0.02 * v, _T + 0.02 + shift, _CFG))

    def guide() -> mx.array:
        z = noise
        for _ in range(2):
            v = velocity(both, both, at, config.flow)
            cond, uncond = mx.split(v, 2)
            z = noise + 0.02 * (uncond + _CFG * (cond - uncond))
        return z

    N = c.grid_size**2
    forcing = lanes(lambda z: model._forcing(z, at)) if c.spectral_forcing else None
    embed = lanes(lambda z: model.x_embedder(z) + model.pos_embed)
    head = lanes(lambda z: model.unpatchify(model.final_layer(z, None, m[: len(z), : 2 * D])))
    parts: list[Part] = [
        ("forcing", lambda: [forcing(noise) for _ in range(2)] if forcing else []),
        ("embedder", lambda: [embed(noise) for _ in range(2)]),
        ("conditioning (adaLN)", lambda: [model.modulations(t, classes) for t in (at, later)]),
        ("attention", each_block(lambda b, z, T: b.attn(z, *_tables(model, T), None))),
        ("feed-forward", each_block(lambda b, z, T: b.mlp(z, None))),
        ("norms and modulation", each_block(lambda b, z, T: _norms(b, z, m[: len(z)]))),
        ("head", lambda: [head(hidden[T][:, -N:]) for T in [max(hidden)] * 2]),
        ("guidance and solver", guide),
    ]
    return whole, parts


def _training_parts(
    size: str, img_size: int, batch: int, dtype: mx.Dtype, compiled: bool
) -> tuple[Callable[[], Any], list[Part]]:
    model = _network(size, img_size, dtype)
    c, D, config = model.config, model.config.hidden_size, Config(model.config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, img_size, img_size, 3), dtype=np.uint8)
    labels = rng.integers(0, c.num_classes, batch)
    shell = JiT(c)
    step = TrainStep(shell, config.flow, StepOptions(dtype=dtype, compile=compiled))
    arrays, number = initial_arrays(trainable(shell)), 0
    x, noise = pixels(mx.array(images)), _normal((batch, 3, img_size, img_size))
    t = training_times(mx.zeros(batch), config.flow)
    hidden = {T: _normal((batch, T, D)) for T in sorted(set(_tokens(model)))}
    m, c_vector, y = _normal((batch, 6 * D)), _normal((batch, D)), mx.array(labels)
    gradients = tree_map(mx.zeros_like, arrays["model"])
    scalars = mx.array([1.0, 1e-4, 0.5, 0.9999, 0.9996])
    mx.eval(x, t, gradients, arrays)

    def whole() -> Any:
        nonlocal arrays, number
        number += 1
        d = draws(0, number, batch, slice(0, batch), img_size)
        arrays, loss, _ = step(arrays, images, labels, d, 1e-4, number, (0.9999, 0.9996))
        mx.eval(arrays, loss)
        return loss

    def with_gradients(layer: Any, run: Callable[..., mx.array], *inputs: mx.array) -> Callable[[], Any]:
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

    def each_block(make: Callable[[Block, int], Callable[[], Any]]) -> Callable[[], list[Any]]:
        layers = [make(b, T) for b, T in zip(model.blocks, _tokens(model), strict=True)]
        return lambda: [run() for run in layers]

    def noised() -> mx.array:
        d = draws(0, 1, batch, slice(0, batch), img_size)
        z = add_noise(pixels(mx.array(images)), d.noise, t, 1.0)
        return flow_loss(velocity(z, z, t, config.flow), x, z, t, config.flow)

    def modulations(layer: Any) -> Callable[[], Any]:
        return with_gradients(layer, lambda v: layer(v), c_vector)

    N, linear = c.grid_size**2, model.final_layer.linear
    adaln = [modulations(layer.adaLN_modulation[1]) for layer in (*model.blocks, model.final_layer)]
    embed_t = with_gradients(model.t_embedder, lambda: model.t_embedder(t))
    embed_y = with_gradients(model.y_embedder, lambda: model.y_embedder(y))
    parts: list[Part] = [
        ("random draws, noise, loss", noised),
        ("forcing", lambda: model._forcing(noise, t) if c.spectral_forcing else []),
        ("embedder", with_gradients(model.x_embedder, lambda: model.x_embedder(noise) + model.pos_embed)),
        ("conditioning (adaLN)", lambda: [embed_t(), embed_y(), *(run() for run in adaln)]),
        (
            "attention",
            each_block(lambda b, T: with_gradients(b.attn, lambda z: b.attn(z, *_tables(model, T), None), hidden[T])),
        ),
        ("feed-forward", each_block(lambda b, T: with_gradients(b.mlp, lambda z: b.mlp(z, None), hidden[T]))),
        ("norms and modulation", each_block(lambda b, T: _norms_with_gradients(b, hidden[T], m, compiled))),
        ("head", with_gradients(linear, lambda z: model.unpatchify(linear(z)), hidden[max(hidden)][:, -N:])),
        ("AdamW and two EMAs", lambda: step._finish(arrays, [gradients], mx.array([1.0]), mx.array(0.0), scalars)[0]),
    ]
    return whole, parts


def _norms_with_gradients(block: Block, x: mx.array, m: mx.array, compiled: bool) -> Callable[[], Any]:
    def value(weights: list[mx.array], x: mx.array, m: mx.array) -> mx.array:
        block.norm1.weight, block.norm2.weight = weights
        return _norms(block, x, m).sum()

    own = [block.norm1.weight, block.norm2.weight]
    f = mx.value_and_grad(value, argnums=(0, 1, 2))
    f = mx.compile(f) if compiled else f

    def call() -> Any:
        result = f(own, x, m)
        block.norm1.weight, block.norm2.weight = own
        return result

    return call
