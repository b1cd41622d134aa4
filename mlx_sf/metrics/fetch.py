"""Where pictures to be measured come from: a folder, a training source, a checkpoint that draws them."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.pipeline import facts, load
from ..data.decode import BadPictureError
from ..data.numbered import NumberedSource
from ..device.defaults import default_dtype
from ..formats.png import image_name, save_png
from ..models import Asked, architecture
from ..sampling.generate import generate
from ..sampling.output import finite_images
from ..sampling.request import Request
from .picture_folder import PictureFolder
from .stream import Fetch


def in_class_order(count: int, num_classes: int) -> list[Asked]:
    """Labels of `count` pictures in the reference's order: all of class 0, then all of class 1, ..."""
    return [i // (count // num_classes) for i in range(count)]


def folder_fetch(folder: PictureFolder, batch_size: int) -> Fetch:
    """The pictures of a folder as they are."""
    return lambda numbers: folder.batches(numbers, batch_size)


def source_fetch(source: NumberedSource, batch_size: int, skipped: list[str]) -> Fetch:
    """Pictures of a training source, cropped; damaged ones are left out and named in `skipped`."""

    def load_one(i: int) -> np.ndarray | str:
        try:
            return source.load(i)[0]
        except BadPictureError as e:
            return f"{source.name(i)}: {e}"

    def fetch(numbers: range) -> Iterator[tuple[int, np.ndarray]]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
            ahead = [pool.map(load_one, part) for part in parts[:2]]
            for n, part in enumerate(parts):
                ahead += [pool.map(load_one, p) for p in parts[n + 2 : n + 3]]
                loaded = list(ahead.pop(0))
                skipped.extend(x for x in loaded if isinstance(x, str))
                good = [x for x in loaded if not isinstance(x, str)]
                yield len(part), np.stack(good) if good else np.empty((0, *source.size, 3), np.uint8)

    return fetch


def sample_fetch(
    checkpoint: Checkpoint,
    config: Config,
    asked: Sequence[Asked],
    seed: int = 0,
    dtype: str | None = None,
    batch_size: int = 16,
    png_folder: Path | None = None,
) -> Fetch:
    """Pictures drawn from a checkpoint by the settings of `config`: picture i of `asked[i]`, with seed `seed` + i."""

    def fetch(numbers: range) -> Iterator[tuple[int, np.ndarray]]:
        network = load(checkpoint, weights=config.weights[0], dtype=dtype).network
        request = Request(tuple(asked[i] for i in numbers), tuple(seed + i for i in numbers))
        for within, state in generate(network, config.flow, config.sample, request, batch_size):
            if state.step < state.steps:
                continue
            pictures = architecture(config.model).to_uint8(finite_images(state.z, [numbers[i] for i in within]))
            if png_folder is not None:
                for i, picture in zip(within, pictures, strict=True):
                    told = facts(config, request, i, checkpoint.path, dtype or default_dtype())
                    save_png(png_folder / image_name(numbers[i]), picture, told)
            yield len(pictures), pictures

    return fetch
