"""Does a checkpoint run? One forward pass of each weight set, finiteness and the number of parameters."""

import math
import os
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint, load_model, parameter_shapes
from .errors import MlxSfError
from .flow import velocity
from .sample import seeded_noise


def verify_checkpoint(path: str | os.PathLike[str]) -> dict[str, str]:
    """Run every weight set of a checkpoint once; returns a line for each. Raises `MlxSfError` where one fails."""
    results = {}
    for name in Checkpoint(path).config.weights:
        model, config = load_model(path, name)
        leaves: Any = tree_flatten(model.parameters())
        want = sum(map(math.prod, parameter_shapes(config.model).values()))
        count = want  # of quantised weights every tensor was there, too: `load_model` is strict
        if config.quantization is None:
            count = sum(v.size for _, v in leaves)
        z = config.flow.noise_scale * seeded_noise([0, 1], config.model.img_size)
        t, y = mx.array([0.0, 0.5]), mx.array([0, config.model.null_class])
        v = velocity(model(z, t, y), z, t, config.flow)
        if count != want or not mx.all(mx.isfinite(v)).item():
            raise MlxSfError(f"{path}: weights {name!r} do not run: {count} of {want} parameters, velocity not finite")
        results[name] = f"{count:,} parameters, forward pass finite, velocity RMS {mx.sqrt(mx.mean(v * v)).item():.3f}"
    return results
