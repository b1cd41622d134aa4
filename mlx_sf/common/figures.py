"""Pictures side by side, and figures written without harm."""

import math
from collections.abc import Sequence
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


def save_figure(figure: Any, path: Path, dpi: int = 100) -> None:
    """Write a Matplotlib figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
