"""Pictures of a run in progress: one row of samples per weight set."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.config import Config
from ..common.figures import grid
from ..formats.png import save_png
from ..models import architecture
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Sampler
from .step import Weights, bound


def save_preview(
    path: Path, network: Any, config: Config, sets: Mapping[str, Weights], count: int, steps: int, seed: int
) -> None:
    """A PNG with one row of `count` samples per weight set, from the same noise and classes every time.

    Image i is of class i, all classes in turn, with the noise of seed `seed` + i.
    """
    asked = [i % config.model.num_classes if config.model.num_classes else None for i in range(count)]
    noise = seeded_noise([seed + i for i in range(count)], config.model.size)
    sampler = Sampler(network, config.flow, dataclasses.replace(config.sample, steps=steps))
    pictures: list[np.ndarray] = []
    for weights in sets.values():
        with bound(network, weights):
            z = noise
            for state in sampler.states(noise, asked):
                z = state.z
                mx.eval(z)
        pictures += list(architecture(config.model).to_uint8(z))
    metadata = {"rows": list(sets), "steps": steps, "cfg": config.sample.cfg, "seed": seed}
    save_png(path, grid(pictures, columns=count), metadata)
