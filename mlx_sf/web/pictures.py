"""Pictures inside the page itself: no file is written for a state that is looked at for a moment.

Gradio's own image component leaves a file behind for every picture that it has shown; states of a night would fill a
disk. What is finished is kept as files and shown in galleries.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

Shown = np.ndarray | Image.Image | None


def picture(shown: Shown, caption: str, alt: str, side: int = 320) -> str:
    """One picture over its caption; None is an empty frame. Small ones are enlarged to about `side` pixels."""
    body = f'<img src="{_address(shown, side)}" alt="{html.escape(alt)}">' if shown is not None else "<div></div>"
    return f"<figure>{body}<figcaption>{html.escape(caption)}</figcaption></figure>"


def row(pictures: Sequence[str]) -> str:
    """Pictures side by side, on a narrow page below each other."""
    return f'<div class="pictures">{"".join(pictures)}</div>'


def enlarged(picture: np.ndarray, side: int = 320) -> np.ndarray:
    """A small picture (H, W, ...) with its pixels repeated, so that browsers do not blur them; about `side` long."""
    times = max(1, side // max(picture.shape[:2]))
    return np.repeat(np.repeat(picture, times, axis=0), times, axis=1)


def _address(shown: np.ndarray | Image.Image, side: int) -> str:
    image = shown if isinstance(shown, Image.Image) else Image.fromarray(enlarged(shown, side))
    data = io.BytesIO()
    # without loss, and four times as fast as PNG: the page waits for it
    image.save(data, "webp", lossless=True, quality=0, method=0)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
