"""Two containers for named tensors and one text: `.npz` and `.safetensors`, streamed, checked, without surprises.

`.safetensors`: the text lies under the metadata key "config", a SHA-256 of text and data under "sha256". `.npz`: an
uncompressed zip of `.npy` members, the text as bytes in the uint8 member `__config__`; each member carries a CRC.
Both open in `mx.load`, `.npz` also in `np.load` (bfloat16 shows there as 2-byte records).

Writing and reading go one tensor at a time. Opening checks the container's structure against the file's real size, so
nothing is ever allocated for a tensor that the file does not hold.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from ..common.files import replacing
from ..errors import MlxSfError

SUFFIXES = (".npz", ".safetensors")
_TEXT_MEMBER = "__config__"
_MAX_TEXT = 64 << 20


@dataclass(frozen=True)
class _DType:
    bits: "np.dtype[Any]"  # the NumPy type that carries its bits
    safetensors: str
    descr: str  # in .npy headers; "<V2" is what MLX reads as bfloat16


_DTYPES = {
    "float32": _DType(np.dtype("<f4"), "F32", "<f4"),
    "float16": _DType(np.dtype("<f2"), "F16", "<f2"),
    "bfloat16": _DType(np.dtype("<u2"), "BF16", "<V2"),
    "float64": _DType(np.dtype("<f8"), "F64", "<f8"),
    "uint32": _DType(np.dtype("<u4"), "U32", "<u4"),
    "int32": _DType(np.dtype("<i4"), "I32", "<i4"),
    "int64": _DType(np.dtype("<i8"), "I64", "<i8"),
    "uint8": _DType(np.dtype("u1"), "U8", "|u1"),
}
_BY_SAFETENSORS = {v.safetensors: k for k, v in _DTYPES.items()}
_BY_DESCR = {v.descr: k for k, v in _DTYPES.items()} | {"|V2": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """A named tensor whose bits (C order; bfloat16 as uint16) are fetched when asked for.

    `read_rows` fetches some of its rows and leaves the others in the file, where the container allows it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_rows: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].bits.itemsize

    def array(self) -> mx.array:
        return self._array(self.read())

    def rows(self, numbers: np.ndarray) -> mx.array:
        """The rows of these numbers."""
        return self._array(self.read()[numbers] if self.read_rows is None else self.read_rows(numbers))

    def _array(self, bits: np.ndarray) -> mx.array:
        array = mx.array(bits)
        return array.view(mx.bfloat16) if self.dtype == "bfloat16" else array

    @classmethod
    def of(cls, name: str, value: mx.array | np.ndarray) -> "Entry":
        """An entry for an array in memory."""
        dtype = str(value.dtype).removeprefix("mlx.core.")
        if dtype not in _DTYPES:
            raise MlxSfError(f"checkpoint: tensor {name!r} is {dtype}, want one of {', '.join(_DTYPES)}")

        def read() -> np.ndarray:
            bits = value.view(mx.uint16) if isinstance(value, mx.array) and dtype == "bfloat16" else value
            return np.asarray(bits)

        return cls(name, dtype, tuple(value.shape), read)


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float values rounded to "float32", "float16" or "bfloat16", in the NumPy type that carries its bits."""
    if dtype == "bfloat16":
        return np.asarray(mx.array(values.astype(np.float32, copy=False)).astype(mx.bfloat16).view(mx.uint16))
    return values.astype(_DTYPES[dtype].bits, copy=False)


def write_tensor_file(path: str | os.PathLike[str], entries: Sequence[Entry], text: str) -> None:
    """Write tensors and text, one tensor at a time, atomically. The suffix of `path` chooses the container."""
    path = Path(path)
    check_suffix(path)
    names = [e.name for e in entries]
    if len(set(names)) != len(names) or _TEXT_MEMBER in names:
        raise MlxSfError(f"{path}: tensor names repeat or are reserved")
    with replacing(path) as temporary:
        (_write_npz if path.suffix == ".npz" else _write_safetensors)(temporary, entries, text)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint name that does not say which container it is."""
    if Path(path).suffix not in SUFFIXES:
        raise MlxSfError(f"{path}: the name of a checkpoint must end in {' or '.join(SUFFIXES)}")


def _bytes(e: Entry) -> Any:
    bits = np.ascontiguousarray(e.read()).reshape(e.shape)
    if bits.dtype != _DTYPES[e.dtype].bits:
        raise MlxSfError(f"checkpoint: tensor {e.name!r} came as {bits.dtype}, want {e.dtype}")
    return bits.reshape(-1).view(np.uint8).data


def _write_npz(path: Path, entries: Sequence[Entry], text: str) -> None:
    member = np.frombuffer(text.encode(), dtype=np.uint8)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
        for e in [Entry(_TEXT_MEMBER, "uint8", member.shape, lambda: member), *entries]:
            info = zipfile.ZipInfo(e.name + ".npy", (1980, 1, 1, 0, 0, 0))  # equal input, equal file
            info.external_attr = 0o644 << 16
            with z.open(info, "w", force_zip64=True) as f:
                header = {"descr": _DTYPES[e.dtype].descr, "fortran_order": False, "shape": e.shape}
                np.lib.format.write_array_header_1_0(f, header)
                f.write(_bytes(e))


def _write_safetensors(path: Path, entries: Sequence[Entry], text: str) -> None:
    blank = "0" * 64
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", "sha256": blank, "config": text}}
    start = 0
    for e in entries:
        end = start + e.nbytes
        header[e.name] = {"dtype": _DTYPES[e.dtype].safetensors, "shape": e.shape, "data_offsets": [start, end]}
        start = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256(text.encode())
    with open(path, "w+b") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for e in entries:
            data = _bytes(e)
            f.write(data)
            digest.update(data)
        f.seek(8)
        f.write(head.replace(blank.encode(), digest.hexdigest().encode(), 1))


class TensorFile:
    """An opened file: `text`, and `entries` by name, none of them read yet.

    With `foreign` a `.safetensors` of another program is opened, too; its text is "".
    """

    def __init__(self, path: str | os.PathLike[str], foreign: bool = False) -> None:
        self.path, self._foreign = Path(path), foreign
        try:
            with open(self.path, "rb") as f:
                magic = f.read(8)
                self.size = f.seek(0, os.SEEK_END)
        except IsADirectoryError:
            raise MlxSfError(f"{path}: is a folder, want a checkpoint file") from None
        except OSError as e:
            raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
        self._sha256: str | None = None
        with _reading(self.path):
            self.container = "npz" if magic[:4] == b"PK\x03\x04" else "safetensors"
            text, entries = self._open_npz() if self.container == "npz" else self._open_safetensors(magic)
            self.text = text.decode()
        self.entries = {e.name: e for e in entries}
        if len(self.entries) != len(entries):
            raise MlxSfError(f"{self.path}: a tensor's name stands twice in the file")

    def _open_npz(self) -> tuple[bytes, list[Entry]]:
        with zipfile.ZipFile(self.path) as z:
            if any(i.filename.endswith("data.pkl") for i in z.infolist()):
                raise MlxSfError(f"{self.path}: is a PyTorch file: convert it first with `mlx-sf convert`")
            if _TEXT_MEMBER + ".npy" not in z.namelist():
                raise MlxSfError(f"{self.path}: not an mlx-sf checkpoint (no {_TEXT_MEMBER} inside)")
            entries = [self._npz_entry(z, info) for info in z.infolist()]
        member = next(e for e in entries if e.name == _TEXT_MEMBER)
        if member.dtype != "uint8" or member.nbytes > _MAX_TEXT:
            raise MlxSfError(f"{self.path}: {_TEXT_MEMBER} is {member.dtype} {member.shape}, want uint8 text")
        return member.read().tobytes(), [e for e in entries if e.name != _TEXT_MEMBER]

    def _npz_entry(self, z: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
        name = info.filename.removesuffix(".npy")
        # members are written uncompressed; a compressed one could expand without limit
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size or name == info.filename:
            raise MlxSfError(f"{self.path}: member {info.filename!r} is compressed, too long, or not an array")
        with z.open(info) as f:
            shape, dtype, offset = _npy_header(f, f"{self.path}: {name}")
        kind, size = _DTYPES[dtype].bits, info.file_size - offset
        if math.prod(shape) * kind.itemsize != size:
            raise MlxSfError(f"{self.path}: tensor {name!r} of shape {shape} does not fit its {size} bytes")

        def read() -> np.ndarray:
            with _reading(self.path), zipfile.ZipFile(self.path) as zf, zf.open(info) as f:
                f.read(offset)
                data = f.read()  # to the member's end, where zipfile compares the CRC
            if len(data) != size:
                raise MlxSfError(f"{self.path}: tensor {name!r} ends after {len(data)} of {size} bytes")
            return np.frombuffer(data, dtype=kind).reshape(shape)

        return Entry(name, dtype, shape, read)

    def _open_safetensors(self, magic: bytes) -> tuple[bytes, list[Entry]]:
        length = struct.unpack("<Q", magic)[0] if len(magic) == 8 else -1
        if not 2 <= length <= min(self.size - 8, _MAX_TEXT):
            raise MlxSfError(f"{self.path}: {_foreign(magic)}, want an .npz or .safetensors file made by mlx-sf")
        with open(self.path, "rb") as f:
            f.seek(8)
            header = json.loads(f.read(length))
        meta = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        meta = meta if isinstance(meta, dict) else {}
        text = meta.get("config")
        if not isinstance(text, str) and not self._foreign:
            raise MlxSfError(f"{self.path}: not an mlx-sf checkpoint (no configuration in its metadata)")
        self._sha256, self._data = (meta.get("sha256") if isinstance(text, str) else None), 8 + length
        entries, position = [], 0
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])  # names may come in any order
        for name, v in tensors:
            dtype, shape = _BY_SAFETENSORS[v["dtype"]], tuple(v["shape"])
            start, end = v["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
            if not whole or start != position or end - start != math.prod(shape) * _DTYPES[dtype].bits.itemsize:
                raise MlxSfError(f"{self.path}: tensor {name!r} of shape {shape} does not fit its bytes {start}-{end}")
            position = end
            entries.append(self._safetensors_entry(name, dtype, shape, self._data + start))
        if self._data + position != self.size:
            raise MlxSfError(
                f"{self.path}: is {self.size} bytes long, its header promises {self._data + position}: "
                "truncated or not completely downloaded?"
            )
        return (text if isinstance(text, str) else "").encode(), entries

    def _safetensors_entry(self, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Entry:
        count = math.prod(shape)

        def read() -> np.ndarray:
            with _reading(self.path):
                return np.fromfile(self.path, _DTYPES[dtype].bits, count, offset=offset).reshape(shape)

        def read_rows(numbers: np.ndarray) -> np.ndarray:
            with _reading(self.path):
                return np.array(np.memmap(self.path, _DTYPES[dtype].bits, "r", offset, shape)[numbers])

        return Entry(name, dtype, shape, read, read_rows)

    def verify(self) -> None:
        """Compare text and data with the file's SHA-256; `MlxSfError` where they differ. (.npz: checked in reading.)"""
        if self.container != "safetensors" or self._sha256 is None:
            return
        digest = hashlib.sha256(self.text.encode())
        with _reading(self.path), open(self.path, "rb") as f:
            f.seek(self._data)
            while part := f.read(1 << 22):
                digest.update(part)
        if digest.hexdigest() != self._sha256:
            raise MlxSfError(f"{self.path}: its data does not match its SHA-256: damaged, copy or convert it again")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes the libraries raise becomes one clear line."""
    try:
        yield
    except MlxSfError:
        raise
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:
        line = f"{path}: damaged or not a checkpoint ({type(e).__name__}: {e}): copy or convert it again"
        raise MlxSfError(line) from None


_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|>=]?\w+)', 'fortran_order': False, 'shape': \(((?:\d{1,18},? ?)*)\),? ?\}\s*"
)


def _npy_header(f: IO[bytes], where: str) -> tuple[tuple[int, ...], str, int]:
    """(shape, dtype name, bytes before the data) of a version 1.0 .npy member in C order."""
    magic = f.read(10)
    if magic[:8] != b"\x93NUMPY\x01\x00" or len(magic) != 10:
        raise MlxSfError(f"{where}: not a .npy array")
    length = struct.unpack("<H", magic[8:])[0]
    header = f.read(length)
    match = _NPY_HEADER.fullmatch(header)
    if match is None or match[1].decode() not in _BY_DESCR:
        raise MlxSfError(f"{where}: unexpected .npy header {header[:80]!r}")
    shape = tuple(int(n) for n in match[2].replace(b",", b" ").split())
    return shape, _BY_DESCR[match[1].decode()], 10 + length


def _foreign(magic: bytes) -> str:
    if not magic:
        return "empty file"
    if magic[:1] == b"\x80":
        return "a pickle, perhaps an older PyTorch file (convert it first with `mlx-sf convert`)"
    if magic[:1] == b"<":
        return "a web page"
    if magic.startswith(b"version"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    return "not a checkpoint, or truncated"
