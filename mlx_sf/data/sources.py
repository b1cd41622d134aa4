"""Where training pictures come from: an image folder, a Hugging Face data set, or the built-in scenes.

A source gives uint8 pictures of one size with labels, epoch by epoch; batches and flips are the loader's. Labels count
from 0 in the order of `class_names`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import MlxSfError, option
from .cache import CachedSource
from .decode import Decode, load_picture, short_side
from .hub import DatasetSource, StreamSource
from .numbered import NumberedSource, Picture
from .scenes import SCENE_CLASSES, SceneOptions, scene

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_UNREADABLE = (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".svg", ".psd")  # pictures, but not to Pillow


class Source(Protocol):
    """What training needs of its pictures. `len` is the number of pictures in an epoch.

    `size` is (height, width). `endless`: every epoch has new pictures. `bad` maps the name of each picture that could
    not be read so far to the reason.
    """

    class_names: tuple[str, ...]
    size: tuple[int, int]
    endless: bool
    bad: dict[str, str]

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Iterator[Callable[[], Picture]]:
        """The pictures of an epoch in its random order, at least `len` of them, each a function that loads it.

        A picture is (H, W, 3) uint8 with its label. The functions are called from several threads at once; they raise
        `BadPictureError` where a picture cannot be read and the source has no other in its place.
        """

    def fingerprint(self) -> str:
        """Identity of the data as far as a resumed run can check it."""

    def short_sides(self, seed: int, count: int) -> Iterator[int]:
        """The stored pictures' own shorter sides in pixels, of at most `count` pictures in random order."""

    def describe(self) -> str:
        """One line for the console and for the run's configuration."""


class SceneSource(NumberedSource):
    """The built-in scenes; `length` only sets how many make an epoch. Rectangles are cut from the middle of squares."""

    endless = True
    cacheable = False

    def __init__(
        self, size: tuple[int, int], length: int = 2560, seed: int = 0, options: SceneOptions | None = None
    ) -> None:
        super().__init__()
        self.class_names, self.size = SCENE_CLASSES, size
        self._length, self._seed, self._options = length, seed, options

    def __len__(self) -> int:
        return self._length

    def load(self, index: int) -> Picture:
        h, w = self.size
        picture, label = scene(index, max(h, w), self._seed, self._options)
        top, left = (len(picture) - h) // 2, (len(picture) - w) // 2
        return picture[top : top + h, left : left + w], label

    def name(self, index: int) -> str:
        return f"scene {index}"

    def describe(self) -> str:
        return f"built-in scenes, {len(self.class_names)} classes, {self._length} new ones an epoch"


class FolderSource(NumberedSource):
    """Pictures in `root/CLASS/...`, or all in `root`, which is then one class; a `train` folder inside is entered.

    Classes are in sorted order, pictures in the order of torchvision's ImageFolder. Raises `MlxSfError` at once if
    there is no picture, a class without any, or a layout that could be read in two ways.
    """

    def __init__(self, root: str | Path, size: tuple[int, int], decode: Decode = "upright") -> None:
        super().__init__()
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

    def load(self, index: int) -> Picture:
        return load_picture(self._files[index], self.size, self._decode), int(self._labels[index])

    def listing(self) -> str:
        pairs = zip(self._files, self._labels, strict=True)
        return "".join(f"{path.relative_to(self.root)}\0{label}\n" for path, label in pairs)

    def short_side(self, index: int) -> int | None:
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


@dataclass(frozen=True)
class DataOptions:
    """Which pictures. An empty text or 0 stands for what the data set says of itself.

    Args:
        data: "" for the built-in scenes; a folder of pictures, a saved data set, a .parquet or .arrow file, a Hub name.
        split, image_column, label_column: of a data set. streaming: read it as a stream.
        epoch_size: pictures in an epoch, of scenes (0: 2560) or a stream. num_classes: of a stream that does not say.
        decode: what is done with orientation and transparency. cache: folder for the cropped pictures, "" for none.
    """

    data: str = ""
    split: str = "train"
    image_column: str = ""
    label_column: str = ""
    streaming: bool = False
    epoch_size: int = 0
    num_classes: int = 0
    decode: Decode = "upright"
    cache: str = ""

    def open(self, size: tuple[int, int], seed: int = 0) -> Source:
        """The source, its pictures cropped to `size`. `seed` chooses among endless data. Raises `MlxSfError`."""
        if self.data and self.streaming:
            stream = StreamSource(
                self.data, size, self.epoch_size, self.decode, self.split, self.image_column, self.label_column,
                self.num_classes,
            )  # fmt: skip
            return stream if not self.cache else _not_cacheable()
        source: NumberedSource
        if not self.data:
            source = SceneSource(size, self.epoch_size or 2560, seed)
        elif _is_picture_folder(self.data):
            source = FolderSource(Path(self.data).expanduser(), size, self.decode)
        else:
            source = DatasetSource(self.data, size, self.decode, self.split, self.image_column, self.label_column)
        if not self.cache:
            return source
        return CachedSource(source, self.cache) if source.cacheable else _not_cacheable()


def _not_cacheable() -> Source:
    raise MlxSfError(f"{option('cache')}: only a folder or a data set on this machine can be cached")


def open_source(
    data: str | None,
    img_size: int | tuple[int, int],
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
    """The source that `data` names: None for the scenes, a folder, a saved data set or parquet, else a Hub name.

    Its pictures are cropped to `img_size`, a side in pixels or (height, width).
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    return DataOptions(
        data or "", split, image_column or "", label_column or "", streaming, epoch_size or 0, num_classes or 0,
        decode, cache or "",
    ).open(size, seed)  # fmt: skip


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
