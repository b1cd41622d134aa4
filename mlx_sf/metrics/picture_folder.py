"""A folder of finished pictures, read as torch-fidelity reads it: no crop, no resize, no rotation."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.progress import Progress
from ..errors import MlxSfError, option

EXTENSIONS = (".png", ".jpg", ".jpeg")
_WORKERS = min(8, os.cpu_count() or 1)


class PictureFolder:
    """The pictures directly in a folder, in the order of their resolved paths as plain strings.

    Opening it lists them; `check` looks at every one of them, before any hour is spent on the first.

    Args:
        count: use only the first `count` pictures; None for all.
    """

    def __init__(self, root: str | os.PathLike[str], count: int | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise MlxSfError(f"{root}: no such folder, want one with pictures ({', '.join(EXTENSIONS)})")
        names = [p for p in self.root.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
        self.files = sorted(str(p.resolve()) for p in names)
        if not self.files:
            inside = next((p.name for p in sorted(self.root.iterdir()) if p.is_dir()), None)
            hint = f"; its folder {inside!r} is not looked into" if inside else ""
            raise MlxSfError(f"{root}: no picture in this folder{hint}, want files ending in {', '.join(EXTENSIONS)}")
        if count is not None and count > len(self.files):
            raise MlxSfError(
                f"{root}: holds {len(self.files)} pictures, {count} are asked for with {option('num_images')}"
            )
        self.files = self.files[:count]
        self.size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def check(self) -> tuple[int, int]:
        """(height, width) of all pictures. Raises `MlxSfError` naming the first that differs or is damaged."""
        first: tuple[int, int] | None = None
        with ThreadPoolExecutor(_WORKERS) as pool, Progress(len(self), f"checking {self.root}", "pictures") as bar:
            for path, size in zip(self.files, pool.map(_checked_size, self.files), strict=True):
                first = first or size
                if size != first:
                    raise MlxSfError(
                        f"{path}: is {size[1]}x{size[0]} pixels, {Path(self.files[0]).name} is {first[1]}x{first[0]}: "
                        "all pictures of a folder must have one size"
                    )
                bar.update()
        assert first is not None
        self.size = first
        return first

    def batches(self, indices: range, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """How many, and the pictures (B, H, W, 3) uint8; decoded a batch ahead."""
        parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            ahead = [[pool.submit(_decode, self.files[i]) for i in part] for part in parts[:1]]
            for n in range(len(parts)):
                ahead += [[pool.submit(_decode, self.files[i]) for i in part] for part in parts[n + 1 : n + 2]]
                batch = ahead.pop(0)
                yield len(batch), np.stack([f.result() for f in batch])

    def fingerprint(self) -> str:
        """Changes with the names, sizes and times of the files."""
        digest = hashlib.sha256()
        for path in self.files:
            s = os.stat(path)
            digest.update(f"{os.path.basename(path)}\0{s.st_size}\0{s.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _checked_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            size = image.height, image.width
            if image.format == "PNG":
                image.verify()  # every chunk against its CRC, without decoding
            else:
                image.load()
            return size
    except Exception as e:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error
        raise MlxSfError(f"{path}: cannot be read as a picture ({_reason(e)}): make it again or remove it") from None


def _decode(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as e:
        raise MlxSfError(f"{path}: cannot be read as a picture ({_reason(e)}): make it again or remove it") from None


def _reason(e: Exception) -> str:
    text = str(e)
    return "not a picture, or damaged" if not text or "cannot identify" in text else text
