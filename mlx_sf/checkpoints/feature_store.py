"""Vectors of texts, computed once and kept: an append-only file read by memory map, and an index beside it.

`features.f32` holds rows of float32; a line of `index.jsonl` says where a key's rows are. Data goes to the disk before
its line does, so that a kill leaves at worst rows that nothing names. Processes that add take turns.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..common.files import writable_folder
from ..errors import MlxSfError


def text_key(text: str) -> str:
    """The key of a text. `MlxSfError` where it cannot be written as UTF-8."""
    try:
        return hashlib.sha256(text.encode()).hexdigest()[:32]
    except UnicodeEncodeError:
        raise MlxSfError(f"prompt {text.encode(errors='replace').decode()!r}: is not UTF-8") from None


class FeatureStore:
    """Rows (n, width) float32 by key in a folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._data, self._index = folder / "features.f32", folder / "index.jsonl"
        self._places: dict[str, tuple[int, int]] = {}
        self._read_to = 0
        self._map: np.memmap | None = None

    def get(self, key: str) -> np.ndarray | None:
        """A key's rows, None where it has none."""
        if key not in self._places:
            self._refresh()
        if key not in self._places:
            return None
        start, count = self._places[key]
        if self._map is None or len(self._map) < start + count:
            rows = self._data.stat().st_size // (4 * self.width)
            self._map = np.memmap(self._data, np.float32, "r", shape=(rows, self.width))
        return np.array(self._map[start : start + count])

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Keep rows of new keys."""
        writable_folder(self.folder)
        with open(self._index, "ab") as index, open(self._data, "ab") as data:
            fcntl.flock(index, fcntl.LOCK_EX)
            row = -(-data.seek(0, os.SEEK_END) // (4 * self.width))
            data.truncate(row * 4 * self.width)  # what a kill left of a row is filled up
            data.seek(0, os.SEEK_END)
            lines = []
            for key, values in features.items():
                data.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
                lines.append(json.dumps([key, row, len(values)]) + "\n")
                row += len(values)
            data.flush()
            os.fsync(data.fileno())
            cut_short = index.seek(0, os.SEEK_END) and not _ends_a_line(self._index)
            index.write(("\n" if cut_short else "").encode() + "".join(lines).encode())

    def _refresh(self) -> None:
        """Take in the lines that came since the last look."""
        if not self._index.is_file():
            return
        with open(self._index, "rb") as f:
            f.seek(self._read_to)
            for line in f:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                try:
                    key, start, count = json.loads(line)
                    self._places[str(key)] = int(start), int(count)
                except (ValueError, TypeError):  # cut short by a kill: its rows are computed again
                    continue


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"
