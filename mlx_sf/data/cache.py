"""Cropped pictures of a source, written once to a memory-mapped file."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import MlxSfError
from .decode import BadPictureError
from .numbered import NumberedSource, Picture, square_or


class CachedSource(NumberedSource):
    """A source whose cropped pictures were written once to a memory-mapped uint8 file, for slow disks and decoders."""

    cacheable = False

    def __init__(self, source: NumberedSource, folder: str | Path, workers: int | None = None) -> None:
        super().__init__()
        self.source, self.size, self.class_names = source, source.size, source.class_names
        side = "x".join(map(str, np.atleast_1d(square_or(source.size))))
        self._captions = source.captions()  # of captioned pictures the file of labels holds numbers in this list
        self.path = Path(folder) / f"{source.fingerprint()}-{side}.npy"
        if not self.path.exists() or not self.path.with_suffix(".labels.npy").exists():
            self._build(workers or min(8, os.cpu_count() or 1))
        self._images = np.load(self.path, mmap_mode="r")
        self._labels = np.load(self.path.with_suffix(".labels.npy"))
        shape = (len(source), *source.size, 3)
        if self._images.shape != shape or self._labels.shape != shape[:1]:
            raise MlxSfError(f"{self.path}: holds {self._images.shape}, want {shape}: delete it, it is made again")

    def _build(self, workers: int) -> None:
        n = len(self.source)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".partial-{os.getpid()}.npy")
        try:
            images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(n, *self.size, 3))
            labels = np.full(n, -1, np.int32)  # -1: could not be read
            numbers = {caption: i for i, caption in enumerate(self._captions)}

            def work(i: int) -> None:
                try:
                    images[i], label = self.source.load(i)
                except BadPictureError:
                    return
                labels[i] = numbers[label] if isinstance(label, str) else label

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

    def load(self, index: int) -> Picture:
        if self._labels[index] < 0:
            raise BadPictureError("could not be read when the cache was made")
        label = int(self._labels[index])
        return np.array(self._images[index]), self._captions[label] if self._captions else label

    def name(self, index: int) -> str:
        return self.source.name(index)

    def describe(self) -> str:
        return f"{self.source.describe()}; cached in {self.path}"

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def mirrors(self, label: int | str) -> bool:
        return self.source.mirrors(label)

    def captions(self) -> Sequence[str]:
        return self._captions

    def caption_notes(self) -> list[str]:
        return self.source.caption_notes()

    def short_sides(self, seed: int, count: int) -> Iterator[int]:
        return self.source.short_sides(seed, count)
