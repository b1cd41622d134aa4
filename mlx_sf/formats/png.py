"""PNG files that say how they were made."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from ..common.files import replacing
from ..errors import MlxSfError

KEY = "mlx-sf"  # of the PNG text chunk that holds the settings as JSON


class Picture(Image.Image):
    """A PIL image whose settings (`info["mlx-sf"]`, JSON) go along into a PNG file that it is saved to."""

    @classmethod
    def of(cls, pixels: np.ndarray, settings: Mapping[str, Any] | None = None) -> "Picture":
        """From (H, W, 3) uint8 pixels and settings that JSON can hold."""
        image = Image.fromarray(pixels)
        picture = cls()
        picture.im, picture._mode, picture._size = image.im, image.mode, image.size
        if settings is not None:
            picture.info[KEY] = json.dumps(settings)
        return picture

    @property
    def settings(self) -> dict[str, Any]:
        """Everything needed to draw the picture again."""
        return dict(json.loads(self.info.get(KEY, "{}")))

    def save(self, fp: Any, format: str | None = None, **options: Any) -> None:
        """As PIL's; a PNG gets the settings in a text chunk."""
        if KEY in self.info and "pnginfo" not in options:
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_text(KEY, self.info[KEY])
        super().save(fp, format, **options)


def save_png(path: str | os.PathLike[str], picture: np.ndarray, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a (H, W, 3) uint8 picture, with settings as JSON in a text chunk."""
    with replacing(path) as temporary:
        Picture.of(picture, metadata).save(temporary, format="png")


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


def image_name(index: int) -> str:
    """File name of sample number `index`, as in the reference's evaluation."""
    return f"{index:05d}.png"
