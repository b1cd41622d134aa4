"""From a picture file to a uint8 training image: decoding of every kind of file, and ADM's crop."""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

Decode = Literal["upright", "reference"]
_LONGEST = 64  # a picture resized to more than this many crops' length is no photograph but a memory hazard


class BadPictureError(Exception):
    """One picture that cannot be used, and why. The loader counts and names it and goes on."""


def decode_picture(file: str | Path | bytes, decode: Decode = "upright") -> Image.Image:
    """Any picture file, or its bytes, as an upright 8-bit RGB image.

    CMYK, grey, palette, 16-bit, 32-bit and float pictures are brought to 8-bit RGB; of an animation the first frame
    counts. With "upright" the EXIF orientation is applied and transparency is laid over white; "reference" ignores
    both, as the published code does. Raises `BadPictureError` with the reason.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened) if decode == "upright" else opened
            return _to_rgb(image, over_white=decode == "upright")
    except BadPictureError:
        raise
    except Exception as e:  # Pillow's decoders raise nearly anything: OSError, ValueError, SyntaxError, struct.error
        reason = " ".join(str(e).split()) or type(e).__name__
        raise BadPictureError("not a picture that can be read" if "cannot identify" in reason else reason) from None


def short_side(file: str | Path | bytes) -> int | None:
    """The shorter side of a picture file, from its header; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            return min(opened.size)
    except Exception:  # as in `decode_picture`, which says why when the picture is wanted
        return None


def _to_rgb(image: Image.Image, over_white: bool) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide(image)
    if over_white and (image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits: Pillow's own conversion would clip them at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise BadPictureError(f"grey values from {values.min():g} to {values.max():g}, want 0 to 65535")
    if image.mode == "F":
        scale = 255.0 if values.max() <= 1 else 1.0 if values.max() <= 255 else 255 / 65535
    else:  # mode "I" also carries 8-bit values
        scale = 1.0 if image.mode == "I" and values.max() <= 255 else 255 / 65535
    return Image.fromarray(np.round(values * scale).astype(np.uint8)).convert("RGB")


def adm_crop(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """ADM's centre crop, (H, W, 3) uint8; squares are equal to the reference's to the last digit.

    `size` is a side or (height, width). Halve with a box filter while both sides are at least twice as long as wanted,
    resize (bicubic) to what just covers `size`, crop the centre.
    """
    h, w = (size, size) if isinstance(size, int) else size
    while image.width >= 2 * w and image.height >= 2 * h:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > _LONGEST * min(image.size):
        raise BadPictureError(f"{image.width} x {image.height} pixels is too long and thin, want at most {_LONGEST}:1")
    scale = max(w / image.width, h / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return np.asarray(image)[top : top + h, left : left + w].copy()


def load_picture(file: Any, size: int | tuple[int, int], decode: Decode = "upright") -> np.ndarray:
    """`decode_picture`, then `adm_crop`: (H, W, 3) uint8."""
    return adm_crop(decode_picture(file, decode), size)
