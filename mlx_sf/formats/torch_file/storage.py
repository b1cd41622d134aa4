"""Where the bytes of a torch file's storages lie: members of a zip archive, ranges of the file, the pickle itself."""

from __future__ import annotations

import errno
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import numpy as np

from .names import AGAIN, RESAVE, BadFile, show

MAX_DIRECTORY_BYTES = 16 << 20  # some 100,000 members
CHUNK = 4 << 20

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Source(Protocol):
    """The bytes of one storage."""

    size: int

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes start..stop as a fresh uint8 array."""


class _Capped:
    """What `zipfile` reads the directory through: one absurd size in it must not become one huge allocation."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.seek, self.tell, self._file, self._size = file.seek, file.tell, file, size

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self.tell())
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY_BYTES:
            raise BadFile(f"its zip directory has {count} bytes, want at most {MAX_DIRECTORY_BYTES}: {AGAIN}")
        return self._file.read(count)

    def seekable(self) -> bool:
        return True


def zip_members(file: BinaryIO, size: int) -> dict[str, Stored | Deflated]:
    """Every member, checked: inside the file, apart from the others, and named alike in both places that name it."""
    try:
        with zipfile.ZipFile(_Capped(file, size)) as archive:
            infos = archive.infolist()
    except Exception as error:  # also struct.error, ValueError and whatever else a crafted directory provokes
        if isinstance(error, BadFile) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        what = "has no end" if "not a zip file" in str(error) else f"has a damaged directory ({error})"
        raise BadFile(f"is a zip archive that {what}, {size} bytes found: cut short or damaged, {AGAIN}") from None
    members: dict[str, Stored | Deflated] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.orig_filename
        label = show(name)
        start = _payload_start(file, info, label)
        if info.header_offset < end or start + info.compress_size > size:
            raise BadFile(f"its member {label} overlaps another or lies beyond the end, {size} bytes found: {AGAIN}")
        if name in members:
            raise BadFile(f"its member {label} occurs twice: {AGAIN}")
        end = start + info.compress_size
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size:
            members[name] = Stored(file, label, start, info.file_size, info.CRC)
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            # Deflate shrinks at most 1032-fold, and only zeros; weights hardly at all.
            if info.file_size > min(1032 * info.compress_size, max(1 << 28, 100 * info.compress_size)):
                raise BadFile(
                    f"its member {label} would expand from {info.compress_size} to {info.file_size} bytes: {RESAVE}"
                )
            members[name] = Deflated(file, label, start, info.compress_size, info.file_size, info.CRC)
        else:
            raise BadFile(
                f"its member {label} is compressed by method {info.compress_type}, want stored or deflated: {RESAVE}"
            )
    return members


def _payload_start(file: BinaryIO, info: zipfile.ZipInfo, label: str) -> int:
    header = b""
    if 0 <= info.header_offset < 1 << 62:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise BadFile(f"its member {label} is not where the zip directory says: {AGAIN}")
    if info.flag_bits & 1:
        raise BadFile(f"its member {label} is encrypted: unpack and {RESAVE}")
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    name = file.read(name_length)
    if name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != info.orig_filename:
        raise BadFile(f"its member {label} has another name in front of its data, {show(name)}: {AGAIN}")
    return info.header_offset + 30 + name_length + extra_length


def _read_into(file: BinaryIO, start: int, buffer: Bytes) -> None:
    if file.closed:
        raise BadFile("the file was closed before this tensor was read: read it inside the with block")
    file.seek(start)
    got = file.readinto(buffer)  # type: ignore[attr-defined]
    if got != len(buffer):
        raise BadFile(f"the file ends {len(buffer) - got} bytes too early: it is cut short, download it again")


class Stored:
    """A byte range of the file, with its CRC-32 if there is one."""

    def __init__(self, file: BinaryIO, label: str, start: int, size: int, crc: int | None) -> None:
        self.file, self.label, self.start, self.size, self.crc = file, label, start, size, crc

    def read(self, start: int, stop: int) -> Bytes:
        whole = stop - start == self.size
        if self.crc is not None and not whole:
            self._check(self._stream_crc())
        out = np.empty(stop - start, np.uint8)
        _read_into(self.file, self.start + start, out)
        if self.crc is not None:
            self._check(zlib.crc32(out.data))
        return out

    def _stream_crc(self) -> int:
        crc, buffer = 0, np.empty(min(CHUNK, self.size), np.uint8)
        for position in range(0, self.size, CHUNK):
            part = buffer[: min(CHUNK, self.size - position)]
            _read_into(self.file, self.start + position, part)
            crc = zlib.crc32(part.data, crc)
        return crc

    def _check(self, crc: int) -> None:
        if crc != self.crc:
            raise BadFile(f"{self.label} fails its checksum: {AGAIN}")
        self.crc = None  # once is enough


class Deflated:
    """A compressed member, which torch.save never writes but packing tools do: inflated from its start every time."""

    def __init__(self, file: BinaryIO, label: str, start: int, packed: int, size: int, crc: int) -> None:
        self.file, self.label, self.start, self.packed, self.size, self.crc = file, label, start, packed, size, crc

    def read(self, start: int, stop: int) -> Bytes:
        out = np.empty(stop - start, np.uint8)
        position = crc = 0
        for chunk in self._inflate():
            crc = zlib.crc32(chunk, crc)
            low, high = max(start, position), min(stop, position + len(chunk))
            if low < high:
                out[low - start : high - start] = np.frombuffer(chunk, np.uint8)[low - position : high - position]
            position += len(chunk)
            if position > self.size:
                break
        if position != self.size or crc != self.crc:
            raise BadFile(f"{self.label} fails its checksum: {AGAIN}")
        return out

    def _inflate(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for position in range(0, self.packed, CHUNK):
                part = np.empty(min(CHUNK, self.packed - position), np.uint8)
                _read_into(self.file, self.start + position, part)
                data = part.tobytes()
                while data and not inflater.eof:
                    yield inflater.decompress(data, CHUNK)
                    data = inflater.unconsumed_tail
            yield inflater.flush()
        except zlib.error as error:
            raise BadFile(f"{self.label} cannot be decompressed ({error}): {AGAIN}") from None


class Inline:
    """Bytes that the pickle itself holds."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, start: int, stop: int) -> Bytes:
        return np.frombuffer(self.data, np.uint8)[start:stop].copy()
