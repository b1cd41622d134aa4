"""What quantised weights cost in precision, kind of layer by kind of layer, and what they save in bytes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.load import demo_checkpoint, load_model
from ..checkpoints.resolve import resolve
from ..common.pixels import from_uint8
from ..data.scenes import scene
from ..flow import add_noise, velocity
from ..models import Architecture, architecture
from ..models.jit import JiT, layer_kind
from ..models.jit_sizes import model_config
from ..models.quantize import QuantizationConfig, dequantize, is_quantized, quantize, quantize_layers, stored
from ..sampling.noise import seeded_noise
from ..training.step import Weights

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
BITS = (8, 4)


def random_weights(model: JiT, key: int = 0) -> Weights:
    """Weights of which none is zero, as the parity data's: uniform with about unit gain, adaLN half-width 0.05."""
    rng = np.random.default_rng(key)

    def value(name: str, w: mx.array) -> mx.array:
        if name == "pos_embed":
            return w
        centre, half = 0.0, 0.15
        if "norm" in name:
            centre, half = 1.0, 0.3
        elif layer_kind(name) is None:
            half = 0.5
        elif w.ndim == 2:
            half = 0.05 if layer_kind(name) == "modulation" else 1.7 * w.shape[1] ** -0.5
        return mx.array(centre + half * (2 * rng.random(w.shape, dtype=np.float32) - 1))

    leaves: Any = tree_flatten(model.parameters())
    return {name: value(name, w) for name, w in leaves}


def measure_quantization(ckpt: str | None, size: str, img_size: int, batch: int, group_size: int) -> dict[str, Any]:
    """Relative errors of a checkpoint's network, or of one of `size` with random weights, for each choice of layers.

    An error is that of the network's output and of its velocity on noisy built-in scenes: the root of the squared
    difference over the squared magnitude, taken over the batch, then the root mean square over `TIMES`. The quantised
    weights are expanded first, which changes nothing but rounding and is fast everywhere. "demo" is the model that
    comes with the program.
    """
    if ckpt is not None:
        checkpoint = Checkpoint(demo_checkpoint() if ckpt == "demo" else resolve(ckpt))
        checkpoint.require_floats()
        model, config = load_model(checkpoint)
        leaves: Any = tree_flatten(model.parameters())
        weights = dict(leaves)
    else:
        config = Config(model_config(size, img_size=img_size), name=f"{size}, random weights")
        model = JiT(config.model)
        weights = random_weights(model)
    kind, total = architecture(config.model), sum(w.size for w in weights.values())
    run = _runner(model, config, batch)
    exact = run(weights)
    rows = []
    for label, layers in _choices(kind):
        row: dict[str, Any] = {"layers": label}
        for bits in BITS:
            q = QuantizationConfig(bits, group_size, layers)
            chosen = {k for k in weights if is_quantized(k, q, kind)}
            row["share"] = sum(weights[k].size for k in chosen) / total
            row[f"output_error_{bits}"], row[f"velocity_error_{bits}"] = _errors(
                run({k: _rounded(w, q) if k in chosen else w for k, w in weights.items()}), exact
            )
        rows.append(row)
    return {
        "what": f"{config.name} at {config.model.size[0]}, {batch} images, groups of {group_size}",
        "rows": rows,
        "file_bytes": {"float32": 4 * total, "bfloat16": _half_bytes(weights, kind)}
        | {f"{bits} bits": file_bytes(weights, QuantizationConfig(bits, group_size), kind) for bits in BITS},
    }


def _choices(kind: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each kind of layer alone, the default, and everything."""
    kinds = kind.layer_kinds
    yield from ((layer, (layer,)) for layer in kinds)
    yield "default", QuantizationConfig(8).layers
    yield "all", kinds


def _runner(model: JiT, config: Config, batch: int) -> Callable[[Weights], list[tuple[mx.array, mx.array]]]:
    c = config.model
    drawn = [scene(i, c.size[0]) for i in range(batch)]
    x = from_uint8(mx.array(np.stack([picture for picture, _ in drawn])))
    y = model.condition([label % c.num_classes for _, label in drawn])
    noise = seeded_noise(range(batch), c.size)

    def run(weights: Weights) -> list[tuple[mx.array, mx.array]]:
        model.load_weights(list(weights.items()))
        results = []
        for time_ in TIMES:
            t = mx.array([time_])
            z = add_noise(x, noise, t, config.flow.noise_scale)
            out = model(z, t, y)
            mx.eval(out)
            results.append((out, velocity(out, z, t, config.flow)))
        return results

    return run


def _rounded(weight: mx.array, q: QuantizationConfig) -> mx.array:
    return dequantize(*quantize(weight, q), weight.shape[1], q)


def _errors(got: list[tuple[mx.array, mx.array]], want: list[tuple[mx.array, mx.array]]) -> tuple[float, float]:
    squares = [
        [mx.square(a - b).sum().item() / mx.square(b).sum().item() for a, b in zip(g, w, strict=True)]
        for g, w in zip(got, want, strict=True)
    ]
    output, velocity_ = np.sqrt(np.mean(squares, axis=0))
    return float(output), float(velocity_)


def file_bytes(weights: Weights, q: QuantizationConfig, kind: Architecture) -> int:
    """Bytes of a network's tensors in a quantised file whose other tensors are float32."""
    total = 0
    for name, w in weights.items():
        for types, shape in stored(name, tuple(w.shape), q, kind).values():
            total += (4 if "uint32" in types or not is_quantized(name, q, kind) else 2) * int(np.prod(shape))
    return total


def _half_bytes(weights: Weights, kind: Architecture) -> int:
    return sum((2 if kind.is_product_operand(name) else 4) * w.size for name, w in weights.items())


def measure_quantized_speed(size: str, img_size: int, batch: int, group_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of a forward pass with float32 weights, with 8 and with 4 bits, taking turns; the best of `rounds`."""
    config = model_config(size, img_size=img_size)
    networks: dict[str, JiT] = {"float32": JiT(config)}
    for bits in BITS:
        networks[f"{bits}_bits"] = JiT(config)
        quantize_layers(networks[f"{bits}_bits"], QuantizationConfig(bits, group_size), architecture(config))
    x, t = seeded_noise(range(batch), config.size), mx.full((batch,), 0.5)
    y = networks["float32"].condition([0] * batch)
    mx.eval(x, t, y, *(n.parameters() for n in networks.values()))
    seconds = dict.fromkeys(networks, float("inf"))
    for _ in range(rounds):
        for name, network in networks.items():
            start = time.perf_counter()
            mx.eval(network(x, t, y))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    result: dict[str, Any] = {
        "what": f"forward pass, {size} at {img_size}, batch {batch}, groups of {group_size}",
        "rounds": rounds,
    }
    result |= {f"{name}_seconds": s for name, s in seconds.items()}
    return result | {f"{bits}_bits_over_float32": seconds[f"{bits}_bits"] / seconds["float32"] for bits in BITS}
