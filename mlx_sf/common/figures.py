"""Pictures side by side, and figures written without harm."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import replacing


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


def captioned_grid(pictures: Sequence[np.ndarray], captions: Sequence[str], side: int = 128) -> np.ndarray:
    """A grid with a column for each caption, which stands below it; small pictures are enlarged to about `side`."""
    from PIL import Image, ImageDraw, ImageFont

    times = max(1, side // pictures[0].shape[1])
    large = [np.repeat(np.repeat(p, times, axis=0), times, axis=1) for p in pictures]
    sheet = grid(large, columns=len(captions))
    width, font = large[0].shape[1], ImageFont.load_default(11)
    lines = [_wrapped(c, lambda text: font.getlength(text) <= width - 4) for c in captions]
    strip = Image.new("RGB", (sheet.shape[1], 14 * max(map(len, lines)) + 4), "white")
    draw = ImageDraw.Draw(strip)
    for i, words in enumerate(lines):
        draw.multiline_text((i * (width + 2) + 2, 2), "\n".join(words), "black", font, spacing=3)
    return np.concatenate([sheet, np.asarray(strip)])


def _wrapped(text: str, fits: Callable[[str], bool], most: int = 6) -> list[str]:
    """A text in at most `most` lines that fit, cut where it is longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]


def save_figure(figure: Any, path: Path, dpi: int = 100) -> None:
    """Write a Matplotlib figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
