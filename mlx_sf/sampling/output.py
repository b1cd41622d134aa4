"""Where finished pictures go: folders, single files, strips of states."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.figures import grid
from ..common.files import check_writable, replacing, writable_folder
from ..common.pixels import to_uint8
from ..common.world import World
from ..errors import MlxSfError, option
from ..formats.png import image_name, save_png
from .request import Request
from .solvers import State


def finite_images(z: mx.array, numbers: Sequence[int]) -> np.ndarray:
    """Finished images (B, 3, H, W) float32; `MlxSfError` names the first that is not finite."""
    values = np.asarray(z, dtype=np.float32)
    for i, v in zip(numbers, values, strict=True):
        if not np.isfinite(v).all():
            raise MlxSfError(
                f"image {i} came out as NaN or infinite: try {option('dtype')} float32, or check the checkpoint"
            )
    return values


class Output:
    """Where finished images go: a folder of PNGs, one PNG, or an .npy of unclipped float32 (N, 3, H, W).

    Opening it proves that it can be written. `add` takes images as they are finished, `close` completes the files.
    Of several processes each writes its own PNGs; what is one file comes together on rank 0.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        request: Request,
        size: tuple[int, int],
        sheet: bool = False,
        world: World | None = None,
        pixels: Callable[[Any], np.ndarray] = to_uint8,
    ) -> None:
        self._pixels = pixels
        self.path, self.request, self.sheet, self.world = Path(path), request, sheet, world or World()
        self.kind = self.path.suffix if self.path.suffix in (".npy", ".png") and not self.path.is_dir() else "folder"
        self.written: list[Path] = []
        self._arrays: dict[int, np.ndarray] = {}
        self._shape = (3, *size) if self.kind == ".npy" else (*size, 3)
        if self.kind == "folder":
            if self.path.suffix and not self.path.exists() and self.path.suffix.lower() in (".jpg", ".jpeg", ".npz"):
                raise MlxSfError(f"{path}: pictures are written as .png or .npy, or into a folder")
            writable_folder(self.path)
        else:
            check_writable(self.path)

    def add(self, numbers: Sequence[int], z: mx.array, describe: Any) -> None:
        values = finite_images(z, numbers)
        for i, v in zip(numbers, values, strict=True):
            if self.kind == ".npy":
                self._arrays[i] = v
                continue
            picture = self._pixels(v)
            if self.kind == "folder":
                save_png(self.path / image_name(i), picture, describe(i))
                self.written.append(self.path / image_name(i))
            if self.sheet or self.kind == ".png":
                self._arrays[i] = picture

    def close(self, describe: Any) -> list[Path]:
        ordered = self._gathered()
        if not self.world.main:
            return self.written
        if self.kind == ".npy":
            with replacing(self.path) as temporary, open(temporary, "wb") as f:
                np.save(f, np.stack(ordered))
            self.written.append(self.path)
        elif self.kind == ".png":
            save_png(self.path, grid(ordered, self.request.columns), {**describe(0), "images": len(ordered)})
            self.written.append(self.path)
        elif self.sheet:
            save_png(
                self.path / "grid.png", grid(ordered, self.request.columns), {**describe(0), "images": len(ordered)}
            )
            self.written.append(self.path / "grid.png")
        return self.written

    def _gathered(self) -> list[np.ndarray]:
        """The images that go into one file, in order, from all processes."""
        if self.world.size > 1 and (self.kind != "folder" or self.sheet):
            shape, dtype = self._shape, np.float32 if self.kind == ".npy" else np.uint8
            mine = np.zeros((len(self.request), *shape), np.float32)
            for i, array in self._arrays.items():
                mine[i] = array
            return list(np.asarray(mx.distributed.all_sum(mx.array(mine))).astype(dtype))
        return [self._arrays[i] for i in sorted(self._arrays)]


class Stepwise:
    """Strips that show how each image came about: the state z above, the implied finished image below."""

    COLUMNS = 10

    def __init__(self, steps: int, pixels: Callable[[Any], np.ndarray] = to_uint8) -> None:
        self._pixels = pixels
        self.shown = {round(s) for s in np.linspace(1, steps, min(steps, self.COLUMNS))}
        self.columns: dict[int, list[np.ndarray]] = {}

    def add(self, numbers: Sequence[int], state: State) -> None:
        if state.step not in self.shown:
            return
        pictures = np.concatenate([self._pixels(state.z), self._pixels(state.x)], axis=1)
        for i, picture in zip(numbers, pictures, strict=True):
            self.columns.setdefault(i, []).append(picture)

    def save(self, folder: Path, describe: Any) -> None:
        for i, columns in self.columns.items():
            save_png(folder / f"{i:05d}_steps.png", grid(columns, columns=len(columns)), describe(i))
        self.columns.clear()
