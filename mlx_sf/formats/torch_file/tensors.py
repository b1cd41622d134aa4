"""From unpickled descriptions to the tree that is handed out: tensors checked against their storages, read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import MlxSfError
from .names import AGAIN, NUMPY_DTYPES, RESAVE, BadFile, DType, NumpyArray, Record, Storage, TensorSpec, show
from .storage import Deflated, Inline, Source

MAX_DEPTH = 100
MAX_VALUES = 20_000_000
WINDOW = 64 << 20  # a view that spans more of its storage than this is gathered in pieces
EXPANDED = 16 << 20  # a tensor may be larger than its storage (torch.expand) up to this size

_PLAIN = frozenset((type(None), bool, int, float, str, bytes))

# bfloat16 is handled as its 16 bits and widened at the end.
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for code, name in NUMPY_DTYPES.items()}
_DTYPES["bfloat16"] = np.dtype("u2")


@contextmanager
def reporting(path: str) -> Iterator[None]:
    """Turn whatever goes wrong into one line that begins with the path."""
    try:
        yield
    except BadFile as error:
        raise MlxSfError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise MlxSfError(f"{path}: there is no such file: check the path") from None
    except IsADirectoryError:
        raise MlxSfError(
            f"{path}: is a folder, want the checkpoint file itself: give the path of the .pth in it"
        ) from None
    except OSError as error:
        raise MlxSfError(f"{path}: cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise MlxSfError(
            f"{path}: does not fit into memory: close other programs, or check that the file is whole"
        ) from None
    except (ValueError, OverflowError, RecursionError, RuntimeError, EOFError) as error:
        raise MlxSfError(f"{path}: cannot be read ({type(error).__name__}: {error}): {AGAIN}") from None


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor in the file, not read yet.

    dtype: as in torch, without "torch."; shape: () for a scalar; name: where it is, such as model['net.pos_embed'].
    """

    dtype: str
    shape: tuple[int, ...]
    name: str = ""
    _strides: tuple[int, ...] = field(default=(), repr=False)  # in elements
    _offset: int = field(default=0, repr=False)
    _source: Source | None = field(default=None, repr=False)
    _swap: bool = field(default=False, repr=False)  # stored in the other byte order
    _path: str = field(default="", repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes when stored densely in its own dtype (bfloat16: 2 bytes an element, though read as float32)."""
        return _product(self.shape) * _DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The tensor as a new C-contiguous array in native byte order; bfloat16 comes as float32, which is exact.

        Raises MlxSfError if the file is closed, cut short or fails its checksum.
        """
        with reporting(self._path):
            array = np.empty(self.shape, _DTYPES[self.dtype])
            if array.size:
                try:
                    array = self._gather()
                except BadFile as error:
                    raise BadFile(f"tensor {self.name}: {error}") from None
            if self.dtype == "bfloat16":
                wide = array.astype(np.uint32)
                wide <<= 16
                array = wide.view(np.float32)
            return array

    def _gather(self) -> np.ndarray:
        dtype, span = _DTYPES[self.dtype], _span(self.shape, self._strides)
        if self._strides == _dense_strides(self.shape):
            return self._elements(self._offset, span).reshape(self.shape)
        out = np.empty(self.shape, dtype)
        # Split along the axis of the widest reach until the pieces are small or nearly dense.
        work = [(out, self._offset)]
        while work:
            part, offset = work.pop()
            span = _span(part.shape, self._strides)
            if span * dtype.itemsize <= WINDOW or span <= 2 * part.size or isinstance(self._source, Deflated):
                flat = self._elements(offset, span)
                byte_strides = [stride * dtype.itemsize for stride in self._strides]
                part[...] = np.lib.stride_tricks.as_strided(flat, part.shape, byte_strides, writeable=False)
            else:
                axis = max(range(part.ndim), key=lambda i: (part.shape[i] - 1) * self._strides[i])
                half = part.shape[axis] // 2
                low, high = np.split(part, [half], axis)
                work += [(low, offset), (high, offset + half * self._strides[axis])]
        return out

    def _elements(self, first: int, count: int) -> np.ndarray:
        assert self._source is not None
        dtype = _DTYPES[self.dtype]
        flat = self._source.read(first * dtype.itemsize, (first + count) * dtype.itemsize)
        if dtype == np.bool_:
            return flat != 0
        flat = flat.view(dtype)
        return flat.byteswap(inplace=True) if self._swap else flat


class Tree:
    """Copies the unpickled object, with every tensor checked against its storage and turned into a `TensorRef`."""

    def __init__(self, source: Callable[[str], Source | None], swap: bool, path: str) -> None:
        self.source, self.swap, self.path = source, swap, path
        self.done: dict[int, tuple[Any, int]] = {}  # by id: the copy, and its size were it a tree
        self.trail: list[Any] = []  # keys from the root to here; attribute names as (name,)

    def convert(self, root: Any) -> Any:
        copy, size = self._convert(root)
        if size > MAX_VALUES:
            raise BadFile(f"refused: its containers hold one another so often that they are {size} values: {RESAVE}")
        return copy

    def _convert(self, value: Any) -> tuple[Any, int]:
        if type(value) in _PLAIN:
            return value, 1
        if type(value) is DType:
            return str(value), 1
        if type(value) not in (list, tuple, dict, set, Record, TensorSpec, NumpyArray):
            name = getattr(value, "name", None)
            raise BadFile(
                f"holds {show(value) if name else 'a bare storage'} at {self._name()}, want tensors: {RESAVE}"
            )
        if id(value) in self.done:
            copy, size = self.done[id(value)]
            if size == 0:
                raise BadFile(f"refused: {self._name()} contains itself: {RESAVE}")
            return copy, size
        if len(self.trail) > MAX_DEPTH:
            raise BadFile(f"refused: its containers nest deeper than {MAX_DEPTH}: {RESAVE}")
        self.done[id(value)] = (None, 0)
        self.done[id(value)] = self._copy(value)
        return self.done[id(value)]

    def _copy(self, value: Any) -> tuple[Any, int]:
        if type(value) is TensorSpec:
            return self._tensor(value), 1
        if type(value) is NumpyArray:
            return self._numpy(value), 1
        if type(value) is set:
            return {str(v) if type(v) is DType else v for v in value}, 1 + len(value)
        if type(value) is Record:
            copies = self._items((((name,), item) for name, item in value.values.items()))
            return Record(value.kind, dict(zip(value.values, copies[0], strict=True))), copies[1]
        if type(value) is dict:
            items, size = self._items(value.items())
            return dict(zip(map(_plain, value), items, strict=True)), size
        items, size = self._items(enumerate(value))
        return (items if type(value) is list else tuple(items)), size

    def _items(self, items: Any) -> tuple[list[Any], int]:
        copies, total = [], 1
        for key, item in items:
            if type(item) in _PLAIN:  # most of a long list
                copies.append(item)
                total += 1
                continue
            self.trail.append(key)
            copy, size = self._convert(item)
            self.trail.pop()
            copies.append(copy)
            total += size
        return copies, total

    def _name(self) -> str:
        """Such as model_ema1['net.pos_embed'], state[3] or args.seed."""
        text = ""
        for key in self.trail:
            if isinstance(key, tuple):
                text += f".{key[0][:200]}"
            elif not text and isinstance(key, str) and key.isidentifier():
                text = key[:200]
            else:
                text += f"[{key[:200]!r}]" if isinstance(key, str | bytes) else f"[{key!r}]"
        return text or "(root)"

    def _tensor(self, spec: TensorSpec) -> TensorRef:
        storage, name = spec.storage, self._name()
        if spec.dtype not in _DTYPES:
            dtype = spec.dtype or "untyped"
            raise BadFile(f"tensor {name} has dtype {dtype}, want float, integer, bool or complex: {RESAVE}")
        itemsize = _DTYPES[spec.dtype].itemsize
        claimed = storage.numel * itemsize_of(storage)
        source = self.source(storage.key)
        if source is None:
            raise BadFile(f"tensor {name}: storage {show(storage.key)} is missing from the file: {AGAIN}")
        if source.size < claimed:
            raise BadFile(f"tensor {name}: storage is short, {source.size} bytes found, want {claimed}: {AGAIN}")
        length = storage.numel if storage.length is None else storage.length
        room = length * itemsize_of(storage) // itemsize
        if _product(spec.shape):
            reach = spec.offset + _span(spec.shape, spec.strides)
            if reach > room:
                found = f"{room} elements found, its shape {spec.shape} needs {reach}"
                raise BadFile(f"tensor {name}: storage is short, {found}: {AGAIN}")
            if _product(spec.shape) * itemsize > max(source.size, EXPANDED):
                raise BadFile(
                    f"refused: tensor {name} of shape {spec.shape} expands {source.size} bytes: save it .contiguous()"
                )
        elif _product([n for n in spec.shape if n]) > 1 << 40:
            raise BadFile(f"tensor {name} has the shape {spec.shape}, beyond any size: {AGAIN}")
        offset = spec.offset + storage.start
        return TensorRef(spec.dtype, spec.shape, name, spec.strides, offset, source, self.swap, self.path)

    def _numpy(self, array: NumpyArray) -> TensorRef:
        name = self._name()
        if array.dtype is None:
            raise BadFile(f"array {name} has no content: {AGAIN}")
        dtype = array.dtype.numpy()
        if (
            _product(array.shape) * dtype.itemsize != len(array.data)
            or _product([n for n in array.shape if n]) > 1 << 40
        ):
            raise BadFile(f"array {name} of shape {array.shape} has {len(array.data)} bytes: {AGAIN}")
        strides = _dense_strides(array.shape[::-1])[::-1] if array.fortran else _dense_strides(array.shape)
        swap = dtype.itemsize > 1 and not dtype.isnative
        source = Inline(array.data)
        return TensorRef(NUMPY_DTYPES[array.dtype.name], array.shape, name, strides, 0, source, swap, self.path)


def _plain(key: Any) -> Any:
    return str(key) if type(key) is DType else key


def itemsize_of(storage: Storage) -> int:
    return _DTYPES[storage.dtype].itemsize if storage.dtype else 1


def _product(shape: Any) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a tensor that is not empty."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
