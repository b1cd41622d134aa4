"""Where training pictures come from: an image folder, a Hugging Face data set, tar files, or the built-in scenes.

A source gives uint8 pictures of one size with labels, epoch by epoch; batches and flips are the loader's. Labels count
from 0 in the order of `class_names`; of a captioned source they are captions (`captions`).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import MlxSfError, option
from .cache import CachedSource
from .captioned_scenes import CAPTIONED_SCENES, CaptionedSceneSource
from .captions import CaptionedFolderSource
from .decode import Decode, load_picture, short_side
from .hub import CaptionedDatasetSource, DatasetSource, StreamSource
from .numbered import NumberedSource, Picture
from .picture_files import found_only, list_pictures, skipped_note
from .scenes import SCENE_CLASSES, SceneOptions, scene
from .webdataset import WebDatasetSource, shards


class Source(Protocol):
    """What training needs of its pictures. `len` is the number of pictures in an epoch.

    `size` is (height, width). `class_names` is () where labels are captions. `endless`: every epoch has new pictures.
    `bad` maps the name of each picture that could not be read so far to the reason.
    """

    class_names: tuple[str, ...]
    size: tuple[int, int]
    endless: bool
    bad: dict[str, str]

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Iterator[Callable[[], Picture]]:
        """The pictures of an epoch in its random order, at least `len` of them, each a function that loads it.

        A picture is (H, W, 3) uint8 with its label, a class or a caption. The functions are called from several threads
        at once; they raise `BadPictureError` where a picture cannot be read and the source has no other in its place.
        """

    def fingerprint(self) -> str:
        """Identity of the data as far as a resumed run can check it."""

    def mirrors(self, label: int | str) -> bool:
        """Whether the mirror image of a picture with this label has the same label."""

    def captions(self) -> Sequence[str]:
        """The distinct captions in an order that stays; () of streams, endless sources and sources with classes."""

    def caption_notes(self) -> list[str]:
        """Lines for the user: how many captions were left out or are empty, with the first names."""

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
        here = list_pictures(self.root, skipped, recursive=False)
        per_class = {name: list_pictures(self.root / name, skipped) for name in folders}
        if here and any(per_class.values()):
            raise MlxSfError(
                f"{self.root}: has {len(here)} pictures beside class folders ({folders[0]}, ...): "
                "move them into a class folder, or the folders elsewhere"
            )
        self.class_names = (self.root.name,) if here else tuple(folders)
        groups = [here] if here else list(per_class.values())
        self.skipped = dict(skipped)
        if not any(groups):
            raise MlxSfError(f"{self.root}: no picture in this folder or its class folders{found_only(skipped)}")
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
        counts = f"{len(self)} pictures, {len(self.class_names)} class(es)"
        return f"{self.root}: {counts}{skipped_note(self.skipped)}"


@dataclass(frozen=True)
class DataOptions:
    """Which pictures. An empty text or 0 stands for what the data set says of itself.

    Args:
        data: "" for the built-in scenes, "captioned-scenes" for those with captions; a folder of pictures, a saved data
            set, a .parquet or .arrow file, a Hub name; with captions also a .tar file or a folder of them.
        split, image_column, label_column: of a data set. Captioned scenes have the splits train, seen and unseen.
        streaming: read a data set as a stream.
        epoch_size: pictures in an epoch, of scenes (0: 2560) or a stream. num_classes: of a stream that does not say.
        decode: what is done with orientation and transparency. cache: folder for the cropped pictures, "" for none.
        captions: labels are captions, which the data must have. Captioned scenes always give them.
        caption_column: the column of captions, which then need not be asked for.
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
    captions: bool = False
    caption_column: str = ""

    def open(self, size: tuple[int, int], seed: int = 0) -> Source:
        """The source, its pictures cropped to `size`. `seed` chooses among endless data. Raises `MlxSfError`."""
        captioned = self.captions or bool(self.caption_column)
        if self.streaming and self.data not in ("", CAPTIONED_SCENES):
            stream = StreamSource(
                self.data, size, self.epoch_size, self.decode, self.split, self.image_column, self.label_column,
                self.num_classes, captioned, self.caption_column,
            )  # fmt: skip
            return stream if not self.cache else _not_cacheable()
        source: NumberedSource
        if self.data == CAPTIONED_SCENES:
            source = CaptionedSceneSource(size, self.epoch_size or 2560, seed, self.split)
        elif captioned:
            source = self._open_captioned(size)
        elif not self.data:
            source = SceneSource(size, self.epoch_size or 2560, seed)
        elif _is_picture_folder(self.data):
            source = FolderSource(Path(self.data).expanduser(), size, self.decode)
        else:
            source = DatasetSource(self.data, size, self.decode, self.split, self.image_column, self.label_column)
        if not self.cache:
            return source
        return CachedSource(source, self.cache) if source.cacheable else _not_cacheable()

    def _open_captioned(self, size: tuple[int, int]) -> NumberedSource:
        if not self.data:
            want = f"{CAPTIONED_SCENES!r}, or pictures with captions"
            raise MlxSfError(f"{option('data')}: the built-in scenes have classes and no captions, want {want}")
        path = Path(self.data).expanduser()
        if shards(path):
            return WebDatasetSource(path, size, self.decode, self.caption_column)
        if _is_picture_folder(self.data):
            return CaptionedFolderSource(path, size, self.decode, self.caption_column)
        return CaptionedDatasetSource(self.data, size, self.decode, self.split, self.image_column, self.caption_column)


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
    captions: bool = False,
    caption_column: str | None = None,
    seed: int = 0,
) -> Source:
    """The source that `data` names: None for the scenes, a folder, a saved data set or parquet, else a Hub name.

    Its pictures are cropped to `img_size`, a side in pixels or (height, width). `DataOptions` says what the rest is.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    return DataOptions(
        data or "", split, image_column or "", label_column or "", streaming, epoch_size or 0, num_classes or 0,
        decode, cache or "", captions, caption_column or "",
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
