"""PNG files that say how they were made, and grids of pictures."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from .errors import MlxSfError
from .files import replacing

KEY = "mlx-sf"  # of the PNG text chunk that holds the settings as JSON


def save_png(path: str | os.PathLike[str], picture: np.ndarray, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a (H, W, 3) uint8 picture, with settings as JSON in a text chunk."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(KEY, json.dumps(metadata))
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png", pnginfo=info)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings that `save_png` stored. `MlxSfError` for anything else than such a PNG."""
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            size, text = image.size, getattr(image, "text", {}).get(KEY)
        values = json.loads(text) if text is not None else None
    except FileNotFoundError:
        raise MlxSfError(f"{path}: no such file") from None
    except Exception as e:
        raise MlxSfError(f"{path}: cannot be read as a picture ({e})") from None
    if not isinstance(values, dict):
        raise MlxSfError(f"{path}: a picture of {size[0]} x {size[1]} pixels without settings of mlx-sf")
    return {"size": f"{size[0]} x {size[1]}", **values}


def grid(pictures: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures of one size (H, W, 3) side by side, row by row, on white; about square unless `columns` is given."""
    n = len(pictures)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    H, W = pictures[0].shape[:2]
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def image_name(index: int) -> str:
    """File name of sample number `index`, as in the reference's evaluation."""
    return f"{index:05d}.png"
