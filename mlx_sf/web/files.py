"""The folder in which drawn pictures are kept, and pictures that come from outside."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import writable_folder
from ..data.decode import BadPictureError, load_picture
from ..errors import MlxSfError
from ..formats.png import read_metadata

MAX_UPLOAD = 32 << 20  # bytes of a picture or a request
_SHOWN = 120  # pictures in the gallery, the newest


def new_name(folder: Path, stamp: str, number: int) -> Path:
    """A name that is free: STAMP-NUMBER.png, with another number behind it where that is taken."""
    path, tries = folder / f"{stamp}-{number:03d}.png", 1
    while path.exists():
        tries += 1
        path = folder / f"{stamp}-{number:03d}-{tries}.png"
    return path


class Kept:
    """The folder of drawn pictures. Nothing outside of it is listed, also where a symbolic link points there."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = writable_folder(Path(folder).expanduser()).resolve()

    def files(self) -> list[Path]:
        """The PNGs in it, the newest first, at most as many as are shown."""
        found = [
            (e.stat().st_mtime_ns, e.path)
            for e in os.scandir(self.folder)
            if e.name.endswith(".png") and not e.name.startswith(".") and e.is_file(follow_symlinks=False)
        ]
        return [Path(path) for _, path in sorted(found, reverse=True)[:_SHOWN]]

    def gallery(self) -> list[tuple[str, str]]:
        """(file, caption) of each, for a gallery; a file that is no picture of ours has its name as the caption."""
        return [(str(path), caption(path)) for path in self.files()]

    def settings(self, index: int, name: str = "") -> tuple[Path, dict[str, Any]]:
        """The settings in the picture at this place of the gallery; by its name where new ones came in since."""
        files = self.files()
        named = [f for f in files if f.name == name]
        if not named and not 0 <= index < len(files):
            raise MlxSfError("that picture is no longer in the folder: reload the page")
        path = named[0] if named else files[index]
        return path, read_metadata(path)


def caption(path: Path) -> str:
    """What a picture shows, from its settings."""
    try:
        facts = read_metadata(path)
    except MlxSfError:
        return path.name
    return f"{subject(facts)}, seed {facts.get('seed', '?')}"


def subject(facts: Mapping[str, Any]) -> str:
    """The prompt or class that a picture's settings name."""
    if "prompt" in facts:
        return str(facts["prompt"])
    return str(facts.get("class_name") or f"class {facts.get('class', '?')}")


def uploaded_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a PNG that came from outside."""
    _check_size(path)
    try:
        return read_metadata(path)
    except MlxSfError as e:
        raise MlxSfError(e.message.replace(str(path), Path(path).name)) from None


def uploaded_picture(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """A picture that came from outside, decoded and cropped as in training: (size, size, 3) uint8."""
    _check_size(path)
    try:
        return load_picture(Path(path), size)
    except BadPictureError as e:
        raise MlxSfError(f"{Path(path).name}: {e}, want a picture file") from None


def _check_size(path: str | os.PathLike[str]) -> None:
    size = os.stat(path).st_size
    if size > MAX_UPLOAD:
        raise MlxSfError(f"{Path(path).name}: {size / 1e6:.0f} MB, want at most {MAX_UPLOAD >> 20} MiB")
