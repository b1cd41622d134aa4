"""Where pictures to be measured come from: a folder, a training source, a checkpoint; and the network they go into."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, device
from ..checkpoint import Checkpoint, load_model
from ..config import Config
from ..data import Source
from ..errors import MlxSfError
from ..generate import Request, generate, metadata
from ..image import image_name, save_png
from ..pictures import BadPictureError
from ..sample import to_uint8
from .folder import PictureFolder
from .inception import Inception
from .inception_weights import content_sha256, load_inception
from .measure import Fetch


class Extractor:
    """The network and its identity."""

    def __init__(self, path: str | None, tap: str) -> None:
        weights = load_inception(path)
        self.path, self.tap, self.sha256 = path or "public file", tap, content_sha256(weights)
        self.network = Inception(weights)


def describe_extractor(e: Extractor) -> dict[str, Any]:
    """For the provenance of what it measured."""
    return {"tap": e.tap, "inception_sha256": e.sha256, "program": f"mlx-sf {__version__}"}


def class_labels(count: int, config: Config) -> np.ndarray:
    """Labels (count,) in the reference's order: all of class 0, then all of class 1, ..."""
    k = config.model.num_classes
    return np.repeat(np.arange(k), count // k)


def folder_fetch(folder: PictureFolder, batch_size: int) -> Fetch:
    """The pictures of a folder as they are."""
    return lambda numbers: folder.batches(numbers, batch_size)


def source_fetch(source: Source, batch_size: int, skipped: list[str]) -> Fetch:
    """Pictures of a training source, cropped; damaged ones are left out and named in `skipped`."""

    def load(i: int) -> np.ndarray | str:
        try:
            return source.load(i)[0]
        except BadPictureError as e:
            return f"{source.name(i)}: {e}"

    def fetch(numbers: range) -> Iterator[tuple[int, np.ndarray]]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
            ahead = [pool.map(load, part) for part in parts[:2]]
            for n, part in enumerate(parts):
                ahead += [pool.map(load, p) for p in parts[n + 2 : n + 3]]
                loaded = list(ahead.pop(0))
                skipped.extend(x for x in loaded if isinstance(x, str))
                good = [x for x in loaded if not isinstance(x, str)]
                yield len(part), np.stack(good) if good else np.empty((0, source.size, source.size, 3), np.uint8)

    return fetch


def sample_fetch(
    config: Config,
    ckpt: Checkpoint,
    labels: np.ndarray,
    seed: int = 0,
    dtype: str | None = None,
    batch_size: int = 16,
    png_folder: Path | None = None,
) -> Fetch:
    """Pictures drawn from a checkpoint: image i has label `labels[i]` and seed `seed` + i."""

    def fetch(numbers: range) -> Iterator[tuple[int, np.ndarray]]:
        model, _ = load_model(ckpt, config.weights[0], device.pick_dtype(dtype), device.dequantize_by_default())
        request = Request(tuple(int(labels[i]) for i in numbers), tuple(seed + i for i in numbers))
        for within, state in generate(model, config, request, batch_size):
            if state.step < state.steps:
                continue
            z = np.asarray(state.z, dtype=np.float32)
            for i, image in zip(within, z, strict=True):
                if not np.isfinite(image).all():
                    raise MlxSfError(
                        f"image {numbers[i]} came out as NaN or infinite: try --dtype float32, or check the checkpoint"
                    )
            pictures = to_uint8(z)
            if png_folder is not None:
                for i, picture in zip(within, pictures, strict=True):
                    facts = metadata(config, request, i, str(ckpt.path), dtype or device.default_dtype())
                    save_png(png_folder / image_name(numbers[i]), picture, facts)
            yield len(pictures), pictures

    return fetch
