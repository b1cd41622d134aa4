"""From a checkpoint to a network: its weights loaded, and whether it runs."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import MlxSfError, option
from ..flow import velocity
from ..models import build, cast_products, parameter_count, parameter_shapes
from ..models.lora import add_adapter
from ..models.quantize import dequantized, quantize_layers
from ..models.u1_config import U1Config
from ..sampling.noise import seeded_noise
from .adapters import open_base
from .checkpoint import Checkpoint
from .config import Config
from .resolve import resolve
from .two_phase import Prefixes


def demo_checkpoint() -> Path:
    """The small trained model that comes with the program."""
    package = Path(__file__).parents[1]
    for folder in (package / "weights", package.parent / "weights"):
        if found := sorted(folder.glob("demo*.safetensors")):
            return found[0]
    raise MlxSfError(f"no demo model is installed: name a checkpoint with {option('ckpt')}")


def load_model(
    source: "Checkpoint | str | os.PathLike[str]",
    weights: str | None = None,
    dtype: mx.Dtype | None = None,
    dequantize: bool = False,
    updates: Mapping[str, Sequence[tuple[mx.array, mx.array]]] | None = None,
) -> tuple[Any, Config]:
    """The network of a checkpoint (opened, or a path, run folder or Hugging Face repo id) and its configuration.

    `weights` picks a set ("model", "ema1", "ema2"; default ema1 where there is one); the configuration returned names
    just that one. An adapter comes with the network that it belongs to. Weights are float32, or with `dtype` the matrix
    products run in it (`models.cast_products`). Quantised weights stay so, unless `dequantize` expands them to floats,
    as the configuration returned then says. `updates` are pairs (B, A) by parameter, whose products are added to it.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(resolve(source))
    name, kind = checkpoint.pick(weights), checkpoint.kind
    config = dataclasses.replace(checkpoint.config, weights=(name,))
    if (adapter := config.adapter) is not None:
        model = load_model(open_base(adapter, checkpoint.path), adapter.weights, dtype)[0]
        add_adapter(model, adapter.lora, checkpoint.weights(name))
        return model, config
    model, stream = build(config.model), checkpoint.stream(name)
    if config.quantization is not None and dequantize:
        stream = dequantized(stream, parameter_shapes(config.model), config.quantization, kind)
        config = dataclasses.replace(config, quantization=None)
    elif config.quantization is not None:
        quantize_layers(model, config.quantization, kind)
    loaded = []
    for key, value in stream:
        for b, a in (updates or {}).get(key, ()):
            if value.dtype == mx.uint32:
                raise MlxSfError(f"{checkpoint.path}: {key} is quantised: leave out {option('merge_lora')}")
            value = value.astype(mx.float32) + b @ a
        if value.dtype != mx.uint32:  # codes of quantised weights stay what they are
            value = cast_products({key: value}, dtype or mx.float32, kind)[key]
        mx.eval(value)  # one by one: in bfloat16 a network takes half of its float32 file's size, not one and a half
        loaded.append((key, value))
    model.load_weights(loaded, strict=True)
    return model, config


def verify_checkpoint(path: str | os.PathLike[str]) -> dict[str, str]:
    """Run every weight set of a checkpoint once; returns a line for each. Raises `MlxSfError` where one fails."""
    results = {}
    opened = Checkpoint(resolve(path))
    if isinstance(opened.config.model, U1Config):  # any size does: a small one
        side = 8 * opened.config.model.token_size
        opened.config = opened.config.at(side, side)
    for name in opened.config.weights:
        model, config = load_model(opened, name)
        if isinstance(config.model, U1Config):
            model.features = Prefixes(opened)
        leaves: Any = tree_flatten(model.parameters())
        # of quantised weights and adapters every tensor was there, too: `load_model` is strict
        want = parameter_count(config.model)
        count = want if config.quantization or config.adapter else sum(math.prod(v.shape) for _, v in leaves)
        if count != want:
            raise MlxSfError(f"{path}: weights {name!r} are {count:,} numbers, its configuration wants {want:,}")
        z = config.flow.noise_scale * seeded_noise([0, 1], config.model.size)
        t, condition = mx.array([0.0, 0.5]), model.condition([0 if config.model.num_classes else None, None])
        v = velocity(model(z, t, condition), z, t, config.flow)
        if not mx.all(mx.isfinite(v)).item():
            raise MlxSfError(f"{path}: weights {name!r} do not run: their velocity is not finite")
        results[name] = f"{count:,} parameters, forward pass finite, velocity RMS {mx.sqrt(mx.mean(v * v)).item():.3f}"
    return results
