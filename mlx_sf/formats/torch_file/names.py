"""What the names in a torch.save pickle stand for here.

`find_global` answers every name that a pickle may ask for with an inert stand-in from one table, or refuses it. The
stand-ins describe tensors (`TensorSpec` on `Storage`) and rebuild containers, records and NumPy values; nothing is ever
imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

MAX_RANK = 64  # what NumPy can hold
AGAIN = "copy or download the file again"
RESAVE = "save it again with torch.save(model.state_dict(), PATH)"


class BadFile(Exception):
    """What is wrong with the file, without its path."""


class Budget(Protocol):
    """What a stand-in may ask of the interpreter that calls it."""

    def spend(self, count: int) -> None:
        """Copy `count` elements; `BadFile` where a pickle has copied too many."""

    def key(self, value: Any) -> Any:
        """`value` as a key of a dictionary or a member of a set; `BadFile` where it cannot be one."""

    def call(self, function: Any, args: Any) -> Any:
        """What a stand-in gives for these arguments."""


@dataclass(frozen=True)
class Record:
    """An `argparse.Namespace` (or similar) of the file: its attributes, and where its class lives."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.values


@dataclass(frozen=True, eq=False)
class Global:
    """Stands for a class or function that the pickle names; `call` is what we do in its place."""

    name: str
    call: Callable[..., Any] | None = None
    record: bool = False  # may be made by NEWOBJ, gets its attributes by BUILD
    storage_dtype: str | None = None  # for storage classes; "" is an untyped one


class DType(str):
    """The name of a torch dtype, such as "torch.float32"; a plain string to whoever reads the tree."""


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage that the pickle refers to. `numel` counts elements of `dtype`, bytes if `dtype` is "" (untyped)."""

    key: str
    dtype: str
    numel: int
    start: int = 0  # first element, for a view of a storage in the legacy layout
    length: int | None = None  # elements of the view


@dataclass(frozen=True, eq=False)
class TensorSpec:
    """A tensor as the pickle describes it; nothing of it is checked against the storage yet. Strides count elements."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class NumpyDType:
    name: str
    byteorder: str = "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype((">" if self.byteorder == ">" else "<") + self.name)


@dataclass(eq=False)
class NumpyArray:
    dtype: NumpyDType | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: bytes = b""


NUMPY_DTYPES = {
    "b1": "bool",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
    **{f"{kind}{size}": f"{'' if kind == 'i' else 'u'}int{8 * size}" for kind in "iu" for size in (1, 2, 4, 8)},
}

_GLOBALS: dict[str, Global] = {}


def _calls(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what is done when the pickle calls one of `names`. It gets the interpreter first."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _GLOBALS[name] = Global(name, function)
        return function

    return register


def damaged(what: str) -> BadFile:
    return BadFile(f"its pickle is damaged, {what}: {AGAIN}")


def want(condition: bool, what: str) -> None:
    if not condition:
        raise damaged(what)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _counts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) <= MAX_RANK and all(map(_count, value))


# --- tensors


@_calls("torch._utils._rebuild_tensor")
def _tensor(budget: Budget, storage: Any, offset: Any, shape: Any, strides: Any, dtype: str = "") -> TensorSpec:
    want(type(storage) is Storage, f"a tensor is built on {show(storage)} instead of a storage")
    want(_counts(shape) and _counts(strides), f"a tensor has shape {show(shape)} and strides {show(strides)}")
    want(len(shape) == len(strides), f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    want(_count(offset), f"a tensor starts at element {show(offset)} of its storage")
    return TensorSpec(storage, dtype or storage.dtype, tuple(shape), tuple(strides), offset)


@_calls("torch._utils._rebuild_tensor_v2")
def _tensor_v2(
    budget: Budget, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> TensorSpec:
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        raise BadFile("holds a tensor saved as a lazy conjugate or negative: save x.resolve_conj().resolve_neg()")
    return _tensor(budget, storage, offset, shape, strides)


@_calls("torch._utils._rebuild_tensor_v3")
def _tensor_v3(
    budget: Budget,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TensorSpec:
    want(type(dtype) is DType, f"a tensor has dtype {show(dtype)}")
    return _tensor(budget, storage, offset, shape, strides, dtype.removeprefix("torch."))


@_calls("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
def _parameter(budget: Budget, data: Any, grad: Any, hooks: Any, state: Any = None) -> TensorSpec:
    want(type(data) is TensorSpec, f"a parameter is built on {show(data)} instead of a tensor")
    return data


@_calls("torch._tensor._rebuild_from_type_v2")
def _from_type(budget: Budget, function: Any, cls: Any, args: Any, state: Any) -> Any:
    """A tensor that carries Python attributes (dropped here). Subclasses were refused when their class was named."""
    want(type(cls) is Global and cls.name in _TENSOR_CLASSES, f"a tensor has the class {show(cls)}")
    want(type(function) is Global and function.name in _TENSOR_FUNCTIONS, f"a tensor is made by {show(function)}")
    return budget.call(function, args)


_TENSOR_FUNCTIONS = [f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")]
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


# --- plain containers and values


@_calls("collections.OrderedDict")
def _ordered_dict(budget: Budget, pairs: Any = ()) -> dict[Any, Any]:
    """Also what Python 2 wrote: a list of [key, value] lists."""
    want(isinstance(pairs, (list, tuple)), f"an OrderedDict of {show(pairs)}")
    budget.spend(len(pairs))
    want(all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs), "an OrderedDict without pairs")
    return {budget.key(key): value for key, value in pairs}


@_calls("collections.defaultdict")
def _default_dict(budget: Budget, factory: Any = None) -> dict[Any, Any]:
    return {}


@_calls("collections.Counter")
def _counter(budget: Budget, counts: Any = None) -> dict[Any, Any]:
    want(counts is None or type(counts) is dict, f"a Counter of {show(counts)}")
    budget.spend(len(counts or ()))
    return dict(counts or {})


@_calls("builtins.set", "builtins.frozenset")
def _set(budget: Budget, items: Any = ()) -> set[Any]:
    want(isinstance(items, (list, tuple)), f"a set of {show(items)}")
    budget.spend(len(items))
    return {budget.key(item) for item in items}


@_calls("torch.Size")
def _size(budget: Budget, items: Any = ()) -> tuple[Any, ...]:
    want(_counts(items), f"a torch.Size of {show(items)}")
    return tuple(items)


@_calls("torch.device")
def _device(budget: Budget, kind: Any, index: Any = None) -> str:
    want(type(kind) is str and len(kind) < 64 and (index is None or type(index) is int), "a malformed torch.device")
    return kind if index is None else f"{kind}:{index}"


@_calls("_codecs.encode")
def _encode(budget: Budget, text: Any, encoding: Any) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    want(type(text) is str and encoding in ("latin1", "latin-1"), f"bytes made of {show(text)} by {show(encoding)}")
    budget.spend(len(text))
    return text.encode("latin1")


@_calls("builtins.bytes", "builtins.bytearray", "__builtin__.bytes")
def _bytes(budget: Budget, data: Any = b"") -> bytes:
    want(type(data) is bytes, f"bytes of {show(data)}")
    return data


@_calls("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath")
def _path(budget: Budget, *parts: Any) -> str:
    want(all(type(part) is str for part in parts), "a path that is not made of strings")
    budget.spend(sum(map(len, parts)))
    return str(PurePosixPath(*parts))


# --- NumPy scalars and arrays, which trainers leave in their records


@_calls("numpy.dtype")
def _numpy_dtype(budget: Budget, name: Any, align: Any = False, copy: Any = True) -> NumpyDType:
    if type(name) is not str or name not in NUMPY_DTYPES:
        raise BadFile(f"holds a NumPy value of dtype {show(name)}, want a number type: {RESAVE}")
    return NumpyDType(name)


@_calls("numpy.core.multiarray.scalar")
def _numpy_scalar(budget: Budget, dtype: Any, data: Any) -> Any:
    want(type(dtype) is NumpyDType and type(data) is bytes, "a malformed NumPy scalar")
    numpy_dtype = dtype.numpy()
    want(len(data) == numpy_dtype.itemsize, f"a NumPy scalar of {numpy_dtype.itemsize} bytes has {len(data)}")
    if numpy_dtype.kind == "c":
        raise BadFile(f"holds a complex NumPy scalar, want real ones: {RESAVE}")
    return np.frombuffer(data, numpy_dtype)[0].item()


@_calls("numpy.core.multiarray._reconstruct")
def _numpy_array(budget: Budget, cls: Any, shape: Any, dtype: Any) -> NumpyArray:
    want(type(cls) is Global and cls.name == "numpy.ndarray", f"a NumPy array of class {show(cls)}")
    return NumpyArray()


def build_numpy(target: NumpyDType | NumpyArray, state: Any) -> None:
    want(type(state) is tuple, "a malformed NumPy value")
    if isinstance(target, NumpyDType):
        want(len(state) >= 3 and state[1] in ("<", ">", "|", "="), f"a NumPy dtype with state {show(state)}")
        target.byteorder = state[1]
        return
    want(len(state) == 5, f"a NumPy array with state {show(state)}")
    _, shape, dtype, fortran, data = state
    want(_counts(shape) and type(dtype) is NumpyDType and type(data) is bytes, "a malformed NumPy array")
    target.dtype, target.shape, target.fortran, target.data = dtype, tuple(shape), bool(fortran), data


# --- names

for _name in ("argparse.Namespace", "types.SimpleNamespace"):
    _GLOBALS[_name] = Global(_name, lambda budget, _name=_name: Record(_name), record=True)
# Named, never called: tensor classes, array classes and the factories of defaultdicts.
for _name in (*_TENSOR_CLASSES, "numpy.ndarray", "builtins.dict", "builtins.list", "builtins.int", "builtins.float"):
    _GLOBALS[_name] = Global(_name)
for _prefix, _dtype in {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "",
}.items():
    for _module in ("torch", "torch.cuda", "torch.storage"):
        _GLOBALS[f"{_module}.{_prefix}Storage"] = Global(f"{_module}.{_prefix}Storage", storage_dtype=_dtype)

# float8 and the like may be mentioned in a record; a tensor of such a type is refused where its storage is looked at.
_TORCH_DTYPE = re.compile(
    r"torch\.(float(16|32|64)|bfloat16|half|float|double|u?int(8|16|32|64)|long|int|short|bool|complex(64|128)|float8_\w+)"
)


def find_global(module: str, name: str) -> Any:
    """The stand-in for a name in the pickle, or BadFile. Nothing is imported or looked up outside the table."""
    full = f"{module}.{name}"
    full = re.sub(r"^__builtin__\.", "builtins.", full)
    full = re.sub(r"^numpy\._core\.", "numpy.core.", full)
    if full in _GLOBALS:
        return _GLOBALS[full]
    if len(full) < 40 and _TORCH_DTYPE.fullmatch(full):
        return DType(full)
    shown = full if len(full) <= 80 and re.fullmatch(r"[\w.<>]+", full, re.ASCII) else show(full)
    if module.startswith("torch.nn.") or module == "__main__":
        hint = f"it seems to hold a whole model object: {RESAVE}"
    else:
        kinds = "tensors, plain containers, numbers, strings and argparse.Namespace records"
        hint = f"only {kinds} are read: if the file is yours, {RESAVE}"
    raise BadFile(f"refused: the file's pickle asks for {shown}; {hint}")


def show(value: Any) -> str:
    """A short description for messages, whatever the value is or how deep it nests."""
    if isinstance(value, Global):
        return value.name
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, bytes)):
        return ascii(value) if len(value) <= 60 else ascii(value[:60]) + "..."
    if isinstance(value, (tuple, list)) and len(value) <= 8 and all(isinstance(v, (int, float)) for v in value):
        return repr(value)
    return f"a {type(value).__name__.lower()}"
