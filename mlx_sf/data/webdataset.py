"""WebDataset: captioned pictures in tar files, read in place and in any order.

A shard is a plain tar file. Its members KEY.jpg (.jpeg, .png, .webp) and KEY.txt, or KEY.json with "caption" or "text",
are one picture and its caption; KEY ends at the first dot of the file's name. Each shard is read through once, for the
places of its members; nothing is unpacked to the disk, and names inside a tar never become paths. Members that are no
regular files (links, devices) are passed over.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MlxSfError
from .captions import CaptionedSource, CaptionNotes
from .decode import BadPictureError, Decode
from .picture_files import list_pictures

_PICTURES = ("jpg", "jpeg", "png", "webp")
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # key and extension; files that start with a dot have none


def shards(path: Path) -> list[Path]:
    """The tar files that `path` stands for: itself, or those in the folder, else those in its `train` folder.

    A folder of pictures with a tar file beside them has none.
    """
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    for folder in (path, path / "train"):
        found = sorted(p for p in folder.glob("*.tar") if p.is_file() and not p.name.startswith("."))
        if found:
            return [] if list_pictures(folder, Counter(), recursive=False) else found
    return []


class WebDatasetSource(CaptionedSource):
    """The captioned pictures of one tar file, or of all in a folder in the order of their names.

    `column` names the entry of KEY.json that holds the caption; "" takes KEY.txt, else "caption" or "text" of KEY.json.
    Raises `MlxSfError` for a tar file that is damaged or compressed, and if there is no picture or no caption.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], decode: Decode = "upright", column: str = "") -> None:
        self._shards = shards(Path(path))
        notes, captions, places, self._names = CaptionNotes(), list[str](), list[tuple[int, int, int]](), list[str]()
        pictures = 0
        for number, shard in enumerate(self._shards):
            for member, stored, text in _samples(shard, column):
                pictures += 1
                caption = notes.read(stored, f"{shard.name}: {member.name}", f"{shard.name}: {text}")
                if caption is not None:
                    captions.append(caption)
                    places.append((number, member.offset_data, member.size))
                    self._names.append(f"{shard.name}: {member.name}")
        if not pictures:
            raise MlxSfError(f"{path}: no picture in {len(self._shards)} tar file(s), want KEY.{', .'.join(_PICTURES)}")
        entries = f'"{column}"' if column else '"caption" or "text"'
        looked_for = f"{'' if column else 'KEY.txt, or '}KEY.json with {entries}, for each of {pictures} picture(s)"
        super().__init__(str(path), size, decode, captions, notes, looked_for)
        self._places = np.array(places, np.int64)

    def stored(self, index: int) -> bytes:
        shard, offset, size = self._places[index].tolist()
        try:
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as e:
            raise BadPictureError(f"cannot be read ({e.strerror})") from None

    def name(self, index: int) -> str:
        return self._names[index]

    def listing(self) -> str:
        return "".join(f"{name}\0" for name in self._names) + super().listing()


def _samples(shard: Path, column: str) -> Iterator[tuple[tarfile.TarInfo, Any, str]]:
    """Each picture of a shard, what is stored as its caption (None: nothing), and the name of the member that this is.

    The pictures are in the order in which their keys first appear.
    """
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in tar:
                # sparse members do not lie in one piece
                if member.isreg() and not member.issparse() and (name := _NAME.fullmatch(member.name)):
                    samples.setdefault(name[1], {})[name[2].lower()] = member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # `tarfile` takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")

            def content(member: tarfile.TarInfo) -> bytes:
                file.seek(member.offset_data)
                return file.read(member.size)

            for parts in samples.values():
                picture = next((parts[kind] for kind in _PICTURES if kind in parts), None)
                if picture is not None:
                    yield picture, *_caption(parts, column, content)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise MlxSfError(f"{shard}: cannot be read ({reason}), want a whole tar file, not compressed") from None


def _caption(
    parts: dict[str, tarfile.TarInfo], column: str, content: Callable[[tarfile.TarInfo], bytes]
) -> tuple[Any, str]:
    if column in ("", "txt") and "txt" in parts:
        return content(parts["txt"]), parts["txt"].name
    if "json" not in parts:
        return None, ""
    try:
        # what is not UTF-8 stays recognisable, to be counted as such
        values = json.loads(content(parts["json"]).decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None, ""
    asked = (column,) if column else ("caption", "text")
    entry = next((name for name in asked if isinstance(values, dict) and name in values), "")
    return (values[entry] if entry else None), parts["json"].name
