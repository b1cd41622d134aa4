"""Pictures of a run in progress: one row of samples per weight set."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.config import Config
from ..common.figures import captioned_grid, grid
from ..data.sources import Source
from ..formats.png import save_png
from ..models import Asked, architecture
from ..sampling.noise import seeded_noise
from ..sampling.prompts import read_prompts
from ..sampling.sampler import Sampler
from .recipe import ReportOptions
from .step import Weights, bound


def preview_asked(config: Config, source: Source, reports: ReportOptions, seed: int) -> list[Asked]:
    """What previews show: all classes in turn; or prompts, of a file or the first captions of the data."""
    count = reports.preview_images
    if not architecture(config.model).reads_text:
        return [i % config.model.num_classes if config.model.num_classes else None for i in range(count)]
    if reports.preview_prompts:
        return list(read_prompts(reports.preview_prompts)[:count])
    captions = [caption for caption in source.captions()[:count]]
    if not captions:  # endless data, or a stream
        pictures = itertools.islice(source.epoch(seed, 0), count)
        captions = [str(load()[1]) for load in pictures]
    return list(itertools.islice(itertools.cycle(captions), count))


def save_preview(
    path: Path,
    network: Any,
    config: Config,
    sets: Mapping[str, Weights],
    asked: Sequence[Asked],
    steps: int,
    seed: int,
) -> None:
    """A PNG with a row of samples of what is asked for per weight set, from the same noise every time.

    Image i has the noise of seed `seed` + i. Prompts stand below their column.
    """
    noise = seeded_noise([seed + i for i in range(len(asked))], config.model.size)
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
    prompts = [str(a) for a in asked if isinstance(a, str)]
    sheet = captioned_grid(pictures, prompts) if prompts else grid(pictures, columns=len(asked))
    save_png(path, sheet, {**metadata, **({"prompts": prompts} if prompts else {})})
