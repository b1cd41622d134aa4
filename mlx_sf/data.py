"""Where training pictures come from: an image folder, a Hugging Face data set, or the built-in scenes.

A source is a numbered list of square uint8 pictures with labels; order, augmentation and batches are the loader's
(`mlx_sf/loader.py`). Labels count from 0 in the order of `class_names`.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from .errors import MlxSfError
from .hub_data import DatasetSource, StreamSource
from .pictures import BadPictureError, Decode, load_picture, short_side
from .scenes import SCENE_CLASSES, SceneOptions, scene

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_UNREADABLE = (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".svg", ".psd")  # pictures, but not to Pillow


class Source(Protocol):
    """What the loader needs. `endless`: index n, n + 1, ... exist too, so every epoch can have new pictures."""

    class_names: tuple[str, ...]
    size: int
    endless: bool

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[np.ndarray, int]:
        """Picture (size, size, 3) uint8 and label; raises `BadPictureError`. Called from several threads at once."""

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""

    def describe(self) -> str:
        """One line for the console and for the run's configuration."""


class SceneSource:
    """The built-in scenes; `length` only sets how many make an epoch."""

    endless = True

    def __init__(self, size: int, length: int = 2560, seed: int = 0, options: SceneOptions | None = None) -> None:
        self.class_names, self.size = SCENE_CLASSES, size
        self._length, self._seed, self._options = length, seed, options

    def __len__(self) -> int:
        return self._length

    def load(self, index: int) -> tuple[np.ndarray, int]:
        return scene(index, self.size, self._seed, self._options)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def describe(self) -> str:
        return f"built-in scenes, {len(self.class_names)} classes, {self._length} new ones an epoch"


class FolderSource:
    """Pictures in `root/CLASS/...`, or all in `root`, which is then one class; a `train` folder inside is entered.

    Classes are in sorted order, pictures in the order of torchvision's ImageFolder. Raises `MlxSfError` at once if
    there is no picture, a class without any, or a layout that could be read in two ways.
    """

    endless = False

    def __init__(self, root: str | Path, size: int, decode: Decode = "upright") -> None:
        self.root, self.size, self._decode = Path(root), size, decode
        if not self.root.is_dir():
            raise MlxSfError(f"{root}: no such folder, want one with pictures in it, or in one folder per class")
        if (self.root / "train").is_dir():
            self.root = self.root / "train"
        folders = sorted(e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith("."))
        skipped: Counter[str] = Counter()
        here = _pictures(self.root, skipped, recursive=False)
        per_class = {name: _pictures(self.root / name, skipped) for name in folders}
        if here and any(per_class.values()):
            raise MlxSfError(
                f"{self.root}: has {len(here)} pictures beside class folders ({folders[0]}, ...): "
                "move them into a class folder, or the folders elsewhere"
            )
        self.class_names = (self.root.name,) if here else tuple(folders)
        groups = [here] if here else list(per_class.values())
        self.skipped = dict(skipped)
        if not any(groups):
            note = "; found only " + ", ".join(f"{n} {e}" for e, n in skipped.items()) if skipped else ""
            raise MlxSfError(
                f"{self.root}: no picture in this folder or its class folders{note}: "
                f"want files ending in {', '.join(EXTENSIONS)}"
            )
        for name, group in zip(self.class_names, groups, strict=True):
            if not group:
                raise MlxSfError(f"{self.root / name}: a class folder without a picture: fill it or remove it")
        self._files = [path for group in groups for path in group]
        self._labels = np.repeat(np.arange(len(groups)), [len(g) for g in groups])

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> tuple[np.ndarray, int]:
        return load_picture(self._files[index], self.size, self._decode), int(self._labels[index])

    def short_side(self, index: int) -> int | None:
        """The stored picture's own shorter side in pixels; None where it cannot be read."""
        return short_side(self._files[index])

    def name(self, index: int) -> str:
        return str(self._files[index])

    def describe(self) -> str:
        skipped = "".join(f", {n} {e} files skipped (convert them to JPEG or PNG)" for e, n in self.skipped.items())
        return f"{self.root}: {len(self)} pictures, {len(self.class_names)} class(es){skipped}"


def _pictures(folder: Path, skipped: Counter[str], recursive: bool = True) -> list[Path]:
    found = []
    for root, directories, files in sorted(os.walk(folder, followlinks=True)):
        if not recursive:
            directories.clear()
            if Path(root) != folder:
                continue
        for file in sorted(files):
            extension = os.path.splitext(file)[1].lower()
            if file.startswith("."):  # .DS_Store, and AppleDouble's ._picture.jpg
                continue
            if extension in EXTENSIONS:
                found.append(Path(root) / file)
            elif extension in _UNREADABLE:
                skipped[extension] += 1
    return found


def fingerprint(source: Source) -> str:
    """Identity of a data set as far as a resumed run can check it: names, labels and number, not pixels."""
    if isinstance(source, CachedSource):
        return fingerprint(source.source)
    h = hashlib.sha256(repr((source.class_names, source.size, len(source))).encode())
    if isinstance(source, FolderSource):
        for path, label in zip(source._files, source._labels, strict=True):
            h.update(f"{path.relative_to(source.root)}\0{label}\n".encode())
    return h.hexdigest()[:16]


class CachedSource:
    """A source whose cropped pictures were written once to a memory-mapped uint8 file, for slow disks and decoders."""

    endless = False

    def __init__(self, source: Source, folder: str | Path, workers: int | None = None) -> None:
        if source.endless or isinstance(source, StreamSource):
            raise MlxSfError("--cache: only a folder or a data set on this machine can be cached")
        self.source, self.size, self.class_names = source, source.size, source.class_names
        self.path = Path(folder) / f"{fingerprint(source)}-{source.size}.npy"
        if not self.path.exists() or not self.path.with_suffix(".labels.npy").exists():
            self._build(workers or min(8, os.cpu_count() or 1))
        self._images = np.load(self.path, mmap_mode="r")
        self._labels = np.load(self.path.with_suffix(".labels.npy"))
        shape = (len(source), source.size, source.size, 3)
        if self._images.shape != shape or self._labels.shape != shape[:1]:
            raise MlxSfError(f"{self.path}: holds {self._images.shape}, want {shape}: delete it, it is made again")

    def _build(self, workers: int) -> None:
        n, size = len(self.source), self.size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".partial-{os.getpid()}.npy")
        try:
            images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(n, size, size, 3))
            labels = np.full(n, -1, np.int32)  # -1: could not be read

            def work(i: int) -> None:
                try:
                    images[i], labels[i] = self.source.load(i)
                except BadPictureError:
                    return

            with ThreadPoolExecutor(workers) as pool:
                for _ in tqdm(pool.map(work, range(n)), total=n, desc="cache", unit="picture", mininterval=1):
                    pass
            images.flush()
            with open(partial.with_suffix(".labels"), "wb") as f:
                np.save(f, labels)
            os.replace(partial.with_suffix(".labels"), self.path.with_suffix(".labels.npy"))
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[np.ndarray, int]:
        if self._labels[index] < 0:
            raise BadPictureError("could not be read when the cache was made")
        return np.array(self._images[index]), int(self._labels[index])

    def name(self, index: int) -> str:
        return self.source.name(index)

    def describe(self) -> str:
        return f"{self.source.describe()}; cached in {self.path}"


def open_source(
    data: str | None,
    size: int,
    *,
    decode: Decode = "upright",
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    epoch_size: int | None = None,
    num_classes: int | None = None,
    cache: str | None = None,
    seed: int = 0,
) -> Source:
    """The source that `data` names: None for the scenes, a folder, a saved data set or parquet, else a Hub name."""
    source: Source
    if data is None:
        source = SceneSource(size, epoch_size or 2560, seed)
    elif streaming:
        source = StreamSource(data, size, epoch_size, decode, split, image_column, label_column, num_classes)
    elif _is_picture_folder(data):
        source = FolderSource(data, size, decode)
    else:
        source = DatasetSource(data, size, decode, split, image_column, label_column)
    return CachedSource(source, cache) if cache else source


def _is_picture_folder(data: str) -> bool:
    path = Path(data).expanduser()
    if not path.exists():
        if data.startswith((".", "/", "~")) or data.count("/") > 1:
            raise MlxSfError(f"{data}: no such folder or file")
        return False
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise MlxSfError(f"{data}: is a file, want a folder of pictures, a data set's folder, or a .parquet file")
        return False
    marks = ("state.json", "dataset_dict.json")
    return not any((path / m).exists() for m in marks) and next(path.rglob("*.parquet"), None) is None
