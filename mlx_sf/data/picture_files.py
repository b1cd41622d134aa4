"""Picture files in a folder: which names are pictures, in which order."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_UNREADABLE = (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".svg", ".psd")  # pictures, but not to Pillow


def list_pictures(folder: Path, skipped: Counter[str], recursive: bool = True) -> list[Path]:
    """Picture files of `folder` and, if `recursive`, of the folders in it, in the order of torchvision's ImageFolder.

    Adds to `skipped` how many files there are of each kind that is a picture, but none that can be read.
    """
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


def found_only(skipped: Mapping[str, int]) -> str:
    """What follows "no picture in this folder": the files that are no use, and those that are wanted."""
    note = "; found only " + ", ".join(f"{n} {e}" for e, n in skipped.items()) if skipped else ""
    return f"{note}: want files ending in {', '.join(EXTENSIONS)}"


def skipped_note(skipped: Mapping[str, int]) -> str:
    """What a source's description ends with."""
    return "".join(f", {n} {e} files skipped (convert them to JPEG or PNG)" for e, n in skipped.items())
