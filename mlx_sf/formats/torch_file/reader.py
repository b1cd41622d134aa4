"""Reads the files that `torch.save` writes, without torch, lazily and safely.

The tree of containers and records is read at once; tensors stay in the file until `TensorRef.read`, so memory stays
near one tensor. Nothing in the file is executed (see `_torch.unpickle`). Two layouts are known:

- "zip" (PyTorch 1.6 and later): an uncompressed zip archive `NAME/` with `data.pkl`, `byteorder` and one member
  `data/KEY` per storage. Every member's CRC-32 is checked before bytes of it are handed out.
- "legacy" (before): pickles of a magic number, the protocol, facts about the writer's system, the object and the list
  of storage keys; then for each key a 64-bit count of elements and the elements. It has no checksums.

Everything that is wrong with a file is an `MlxSfError` that begins with its path.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from .names import AGAIN, RESAVE, BadFile, Record, Storage, damaged, show
from .storage import Stored, zip_members
from .tensors import TensorRef, Tree, itemsize_of, reporting
from .unpickle import MAX_PICKLE_BYTES, OutOfData, loads

__all__ = ["Record", "TensorRef", "TorchFile", "open_torch_file"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class TorchFile:
    """An open `torch.save` file; a context manager. Its tensors can be read until it is closed.

    root: what was saved: dict (an OrderedDict too), list, tuple, set, int, float, str, bytes, bool, None, `Record` and
    `TensorRef`. torch.Size is a tuple; dtypes, devices and paths are strings; NumPy scalars are Python numbers, NumPy
    arrays are TensorRefs. Attributes of containers and tensors are dropped.
    """

    root: Any
    layout: Literal["zip", "legacy"]
    path: Path

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        head = _recognise(file)
        self.layout = "zip" if head.startswith(b"PK") else "legacy"
        self.root = _load_zip(file, str(path)) if self.layout == "zip" else _load_legacy(file, str(path))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_torch_file(path: str | os.PathLike[str]) -> TorchFile:
    """Open a file written by `torch.save`, in the zip or the legacy layout; raises MlxSfError.

    All tensors are checked against the file's storages here; what `read` can still meet is damage to the payload.
    """
    with reporting(str(path)):
        file = open(path, "rb")  # noqa: SIM115 - it stays open in the TorchFile
        try:
            return TorchFile(Path(path), file)
        except BaseException:
            file.close()
            raise


def _recognise(file: BinaryIO) -> bytes:
    """The file's first bytes if they may be a torch file's; otherwise say what it is instead."""
    head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise BadFile("is empty (0 bytes): copy or download it again")
    if head.startswith(b"PK\x05\x06"):
        raise BadFile("is an empty zip archive, want a file from torch.save: copy or download it again")
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return head
    if head.startswith(b"version https://git-lfs"):
        raise BadFile(
            "is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`, or download the file by its link"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadFile(
            "is a web page, not a checkpoint: download the file itself (a login or confirmation page came instead)"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.seek(0, os.SEEK_END):
        raise BadFile("is a safetensors file, want one from torch.save: name it .safetensors and load it directly")
    if head[257:262] == b"ustar":
        raise BadFile(
            "is a tar archive, perhaps a torch file from before 2017: unpack it, or torch.load and torch.save it again"
        )
    for magic, kind in _OTHER_FILES.items():
        if head.startswith(magic):
            raise BadFile(f"is {kind}, want a file from torch.save")
    if text.startswith((b"{", b"[")):
        raise BadFile("looks like JSON, want a file from torch.save")
    if head.startswith((b"c", b"(")):  # a pickle of protocol 0 or 1: name what it asks for, as far as it can be read
        with suppress(OutOfData):
            loads(head, 0, _no_storages)
    raise BadFile(f"is not a file from torch.save: begins with {show(head[:8])}, want a zip archive or a pickle")


_OTHER_FILES = {
    b"\x93NUMPY": "a NumPy .npy array",
    b"\x1f\x8b": "gzip-compressed (run gunzip on it first)",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
}


def _no_storages(pid: Any) -> Any:
    raise BadFile("is a plain pickle with persistent ids, not a file from torch.save")


# --- the zip layout


def _load_zip(file: BinaryIO, path: str) -> Any:
    size = file.seek(0, os.SEEK_END)
    members = zip_members(file, size)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadFile(_not_torch_zip(list(members), pickles))
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in members or any(name.startswith(prefix + "code/") for name in members):
        raise BadFile(f"is a TorchScript program (torch.jit.save), want a checkpoint: {RESAVE}")
    data = members[pickles[0]]
    if data.size > MAX_PICKLE_BYTES:
        raise BadFile(f"its data.pkl has {data.size} bytes, want at most {MAX_PICKLE_BYTES}: {RESAVE}")
    order = "little"
    if prefix + "byteorder" in members and members[prefix + "byteorder"].size <= 16:
        member = members[prefix + "byteorder"]
        order = member.read(0, member.size).tobytes().decode("latin1")
    if order not in ("little", "big"):
        raise BadFile(f"its byteorder is {show(order)}, want little or big: {AGAIN}")

    try:
        root, _ = loads(data.read(0, data.size).tobytes(), 0, _zip_storage)
    except OutOfData:
        raise BadFile(f"its data.pkl ends too early: {AGAIN}") from None
    return Tree(lambda key: members.get(f"{prefix}data/{key}"), order != sys.byteorder, path).convert(root)


def _not_torch_zip(names: list[str], pickles: list[str]) -> str:
    if pickles:
        return f"holds {len(pickles)} data.pkl, want one: pack the checkpoints into files of their own"
    if names and all(name.endswith(".npy") for name in names):
        return "is a NumPy .npz archive, want a file from torch.save: name it .npz and load it directly"
    return (
        f"is a zip archive without data.pkl, so not from torch.save (it holds {show(names[0]) if names else 'nothing'})"
    )


def _zip_storage(pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
        raise damaged(f"{show(pid)} is not the id of a storage")
    return _storage(pid)


def _storage(pid: tuple[Any, ...]) -> Storage:
    _, cls, key, _, numel = pid[:5]
    dtype = getattr(cls, "storage_dtype", None)
    if dtype is None or type(key) is not str or len(key) > 200 or type(numel) is not int or not 0 <= numel < 1 << 62:
        raise damaged(f"a storage of {show(numel)} elements has class {show(cls)}, key {show(key)}")
    return Storage(key, dtype, numel)


# --- the legacy layout


def _load_legacy(file: BinaryIO, path: str) -> Any:
    size = file.seek(0, os.SEEK_END)
    window = 1 << 20
    while True:  # the pickles are small; how small shows only when they end
        file.seek(0)
        data = file.read(min(window, size, MAX_PICKLE_BYTES))
        try:
            root, keys, storages, big, position = _legacy_pickles(data)
            break
        except OutOfData:
            if len(data) == size:
                raise BadFile(f"its pickle ends too early, {size} bytes found: {AGAIN}") from None
            if len(data) == MAX_PICKLE_BYTES:
                raise BadFile(f"its pickle has more than {MAX_PICKLE_BYTES} bytes: {RESAVE}") from None
            window *= 4
    sources, swap = _legacy_sources(file, size, position, keys, storages, big)

    return Tree(sources.get, swap, path).convert(root)


def _legacy_pickles(data: bytes) -> tuple[Any, list[str], dict[str, Storage], bool, int]:
    """The five pickles: (object, keys in file order, storages by key, written on a big-endian system, end)."""
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            raise BadFile(f"refused: the file holds a whole model object: {RESAVE}")
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise damaged(f"{show(pid)} is not the id of a storage")
        storage = _storage(pid)
        known = storages.setdefault(storage.key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            raise damaged(f"storage {show(storage.key)} has two different types or sizes")
        view = pid[5] if len(pid) == 6 else None
        if view is None:
            return storage
        if not (isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:])):
            raise damaged(f"a storage view is described by {show(view)}")
        if view[1] + view[2] > storage.numel:
            raise damaged(f"a view of storage {show(storage.key)} reaches beyond its end")
        return Storage(storage.key, storage.dtype, storage.numel, view[1], view[2])

    magic, position = loads(data, 0, _no_storages)
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise BadFile(f"is a plain pickle, not a file from torch.save: load it where it was made and {RESAVE}")
    protocol, position = loads(data, position, _no_storages)
    if type(protocol) is not int or protocol != LEGACY_PROTOCOL:
        raise BadFile(
            f"has the legacy torch.save layout with version {show(protocol)}, want {LEGACY_PROTOCOL}: {RESAVE}"
        )
    system, position = loads(data, position, _no_storages)
    root, position = loads(data, position, persistent)
    keys, position = loads(data, position, _no_storages)
    if type(system) is not dict or type(keys) is not list or not all(type(key) is str for key in keys):
        raise BadFile(f"its list of storages is damaged: {AGAIN}")
    return root, keys, storages, system.get("little_endian") is False, position


def _legacy_sources(
    file: BinaryIO, size: int, position: int, keys: list[str], storages: dict[str, Storage], big: bool
) -> tuple[dict[str, Stored], bool]:
    """Where each storage lies, and whether its bytes must be swapped.

    torch writes this layout little-endian on every system, whatever the system facts say; a writer that did not is
    recognised by the counts in front of the storages.
    """
    orders: list[Literal["little", "big"]] = ["little", "big"] if big else ["little"]
    sources: dict[str, Stored] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in sources:
            raise BadFile(f"its list of storages names {show(key)}, which no tensor uses or which came before: {AGAIN}")
        file.seek(position)
        raw = file.read(8)
        if len(raw) < 8:
            raise BadFile(f"it ends at {size} bytes, before storage {show(key)}: it is cut short, download it again")
        orders = [order for order in orders if int.from_bytes(raw, order) == storage.numel]
        if not orders:
            got = int.from_bytes(raw, "little", signed=True)
            raise BadFile(
                f"its storage {show(key)} has {got} elements, want {storage.numel} as its tensors say: {AGAIN}"
            )
        nbytes = storage.numel * itemsize_of(storage)
        position += 8
        if position + nbytes > size:
            raise BadFile(f"it ends at {size} bytes, inside storage {show(key)}: it is cut short, download it again")
        sources[key] = Stored(file, f"storage {show(key)}", position, nbytes, None)
        position += nbytes
    if position != size:
        raise BadFile(f"it has {size - position} bytes after its last storage, want none: {AGAIN}")
    return sources, orders[0] != sys.byteorder
