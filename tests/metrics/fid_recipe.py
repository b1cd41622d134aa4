"""Random Inception weights by formula, and the golden values made with them. Shared by the tests of the metrics."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.metrics.inception import Inception
from mlx_sf.metrics.inception_weights import inception_shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "fid"
SEED = 20260101


@functools.cache
def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as z:
        return dict(z)


def recipe_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *map(int, words)])))
    n = rng.standard_normal(int(np.prod(shape))).reshape(shape)
    if key.endswith(".conv.weight"):
        if shape[1] % 2 == 0:
            n[:, 1::2] = 0.6 * n[:, 1::2] - 0.8 * n[:, 0::2]
        n *= 1.14 * np.sqrt(2.0 / (shape[1] * shape[2] * shape[3]))
    elif key == "fc.weight":
        n[:, 1::2] = 0.28 * n[:, 1::2] - 0.96 * n[:, 0::2]
        n *= 0.35
    elif key.endswith((".bn.weight", ".running_var")):
        n = 1 + 0.1 * n
    else:
        n *= 0.5 if key == "fc.bias" else 0.1
    return n.astype("<f4")


@functools.cache
def recipe_weights(seed: int = SEED) -> dict[str, np.ndarray]:
    return {key: recipe_tensor(key, shape, seed) for key, shape in inception_shapes().items()}


@functools.cache
def recipe_network() -> Inception:
    return Inception(recipe_weights())
