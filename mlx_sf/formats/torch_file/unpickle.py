"""A pickle read as data: a small interpreter of the pickle opcodes that can build plain objects and nothing else.

The standard unpickler imports whatever a file names and calls it. This one has no way to do either: names
come from the table in `names`. It also keeps memory and time in proportion to the file, which the standard one
does not (memo indices, claimed sizes, numbers and tuples made to be slow to hash).
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

from .names import (
    RESAVE,
    BadFile,
    Global,
    NumpyArray,
    NumpyDType,
    Record,
    TensorSpec,
    build_numpy,
    damaged,
    find_global,
    show,
    want,
)

# A JiT-H checkpoint with two EMAs and the optimiser needs some 0.3 million opcodes and 0.02 million containers.
MAX_PICKLE_BYTES = 32 << 20
MAX_OPCODES = 2_000_000
MAX_OBJECTS = 500_000
MAX_INT_BYTES = 64


class OutOfData(Exception):
    """The pickle goes on after the bytes that were given."""


_OPS: dict[int, Callable[[Machine], None]] = {}


def _op(*names: str) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        for name in names:
            _OPS[getattr(pickle, name)[0]] = function
        return function

    return register


class Machine:
    """Runs one pickle from `data[pos:]`. `persistent` turns a persistent id into a `Storage`."""

    def __init__(self, data: bytes, pos: int, persistent: Callable[[Any], Any]) -> None:
        self.data, self.pos, self.persistent = data, pos, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack at the open MARKs
        self.memo: dict[int, Any] = {}
        self.objects = MAX_OBJECTS
        self.copies = 2 * len(data) + (1 << 20)  # elements that calls may copy: a value can be recalled for ever

    def run(self) -> Any:
        data, size, stop = self.data, len(self.data), pickle.STOP[0]
        for _ in range(MAX_OPCODES):
            if self.pos >= size:
                raise OutOfData
            code = data[self.pos]
            self.pos += 1
            if code == stop:
                result = self.pop()
                want(not self.stack and not self.marks, "values are left over at its end")
                return result
            handler = _OPS.get(code)
            if handler is None:
                raise damaged(f"byte {code:#04x} is not an opcode that torch.save writes")
            handler(self)
        raise BadFile(f"the pickle has more than {MAX_OPCODES} steps: {RESAVE}")

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            if count > MAX_PICKLE_BYTES:
                raise damaged(f"it claims a value of {count} bytes")
            raise OutOfData
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def uint(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.pos + 512)
        if end < 0:
            if len(self.data) < self.pos + 512:
                raise OutOfData
            raise damaged("a name has no end")
        return self.text(self.take(end + 1 - self.pos)[:-1])

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(f"{show(raw)} is not UTF-8") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def made(self, value: Any) -> None:
        self.objects -= 1
        if self.objects < 0:
            raise BadFile(f"the pickle makes more than {MAX_OBJECTS} objects: {RESAVE}")
        self.stack.append(value)

    def spend(self, count: int) -> None:
        self.copies -= count
        if self.copies < 0:
            raise BadFile("the pickle is refused: it copies its own values again and again")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise damaged("it takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        want(bool(self.marks), "it closes a group that it never opened")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise damaged(f"it refers to value {index}, which it never stored")
        self.stack.append(self.memo[index])

    def key(self, key: Any) -> Any:
        """Keys and set members: plain values only, since hashing a crafted tuple or a huge number can take for ever."""
        if key is None or isinstance(key, (str, bytes, bool, float)):
            return key
        if type(key) is int and -(1 << 63) <= key < 1 << 64:
            return key
        raise BadFile(f"refused: {show(key)} is used as a dictionary key, want a string or a number: {RESAVE}")

    def update(self, target: Any, items: list[Any]) -> None:
        want(type(target) is dict, f"it sets an item of {show(target)}")
        want(len(items) % 2 == 0, "a key has no value")
        for i in range(0, len(items), 2):
            target[self.key(items[i])] = items[i + 1]

    def call(self, function: Any, args: Any) -> Any:
        want(type(function) is Global and type(args) is tuple, f"it calls {show(function)}")
        if function.call is None:
            raise BadFile(f"refused: the file's pickle calls {function.name}: {RESAVE}")
        self.spend(len(args))
        try:
            return function.call(self, *args)
        except (TypeError, ValueError, struct.error):
            raise damaged(f"it calls {function.name} with the wrong arguments") from None

    def build(self, target: Any, state: Any) -> None:
        """Attributes: kept for records, used for NumPy values, dropped for containers and tensors."""
        if type(target) is Record:
            want(type(state) is dict, f"an object of {target.kind} with state {show(state)}")
            self.spend(len(state))
            want(all(type(name) is str for name in state), f"an attribute of {target.kind} is not named by a string")
            target.values.update(state)
        elif type(target) in (NumpyDType, NumpyArray):
            build_numpy(target, state)
        else:
            want(type(target) in (dict, TensorSpec), f"it sets the state of {show(target)}")


@_op("PROTO")
def _(m: Machine) -> None:
    version = m.uint(1)
    if not 2 <= version <= 5:
        raise BadFile(f"the pickle has protocol {version}, want 2 to 5: save it again with a current PyTorch")


@_op("FRAME")
def _(m: Machine) -> None:
    if m.uint(8) > MAX_PICKLE_BYTES:
        raise damaged("it claims a frame beyond any size")


_op("NONE")(lambda m: m.push(None))
_op("NEWTRUE")(lambda m: m.push(True))
_op("NEWFALSE")(lambda m: m.push(False))
_op("BININT")(lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)))
_op("BININT1")(lambda m: m.push(m.uint(1)))
_op("BININT2")(lambda m: m.push(m.uint(2)))
_op("BINFLOAT")(lambda m: m.push(struct.unpack(">d", m.take(8))[0]))
_op("BINUNICODE")(lambda m: m.push(m.text(m.take(m.uint(4)))))
_op("SHORT_BINUNICODE")(lambda m: m.push(m.text(m.take(m.uint(1)))))
_op("BINUNICODE8")(lambda m: m.push(m.text(m.take(m.uint(8)))))
_op("SHORT_BINSTRING")(lambda m: m.push(m.text(m.take(m.uint(1)))))  # str of Python 2
_op("BINSTRING")(lambda m: m.push(m.text(m.take(m.uint(4)))))
_op("BINBYTES")(lambda m: m.push(m.take(m.uint(4))))
_op("SHORT_BINBYTES")(lambda m: m.push(m.take(m.uint(1))))
_op("BINBYTES8", "BYTEARRAY8")(lambda m: m.push(m.take(m.uint(8))))
_op("EMPTY_TUPLE")(lambda m: m.push(()))
_op("EMPTY_LIST")(lambda m: m.made([]))
_op("EMPTY_DICT")(lambda m: m.made({}))
_op("EMPTY_SET")(lambda m: m.made(set()))
_op("POP_MARK")(lambda m: m.pop_mark().clear())
_op("DUP")(lambda m: m.push(m.top()))
_op("TUPLE")(lambda m: m.made(tuple(m.pop_mark())))
_op("LIST")(lambda m: m.made(m.pop_mark()))
_op("FROZENSET")(lambda m: m.made({m.key(item) for item in m.pop_mark()}))
_op("BINPUT")(lambda m: m.remember(m.uint(1)))
_op("LONG_BINPUT")(lambda m: m.remember(m.uint(4)))
_op("MEMOIZE")(lambda m: m.remember(len(m.memo)))
_op("BINGET")(lambda m: m.recall(m.uint(1)))
_op("LONG_BINGET")(lambda m: m.recall(m.uint(4)))
_op("BINPERSID")(lambda m: m.made(m.persistent(m.pop())))


@_op("LONG1", "LONG4")
def _(m: Machine) -> None:
    size = m.uint(1 if m.data[m.pos - 1] == pickle.LONG1[0] else 4)
    want(size <= MAX_INT_BYTES, f"it holds a number of {size} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


@_op("INT")
def _(m: Machine) -> None:
    """Text form: how some writers spell True and False."""
    text = m.line()
    want(re.fullmatch(r"-?[0-9]{1,19}", text) is not None, f"{show(text)} is not a number")
    m.push({"00": False, "01": True}.get(text, int(text)))


@_op("MARK")
def _(m: Machine) -> None:
    want(len(m.marks) < 1000, "it nests too deeply")
    m.marks.append(len(m.stack))


@_op("POP")
def _(m: Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.pop()


@_op("TUPLE1", "TUPLE2", "TUPLE3")
def _(m: Machine) -> None:
    count = m.data[m.pos - 1] - pickle.TUPLE1[0] + 1
    m.made(tuple([m.pop() for _ in range(count)][::-1]))


@_op("APPEND")
def _(m: Machine) -> None:
    value, target = m.pop(), m.top()
    want(type(target) is list, f"it appends to {show(target)}")
    target.append(value)


@_op("APPENDS")
def _(m: Machine) -> None:
    items, target = m.pop_mark(), m.top()
    want(type(target) is list, f"it appends to {show(target)}")
    target.extend(items)


@_op("ADDITEMS")
def _(m: Machine) -> None:
    items, target = m.pop_mark(), m.top()
    want(type(target) is set, f"it adds to {show(target)}")
    target.update(map(m.key, items))


@_op("SETITEM")
def _(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.update(m.top(), [key, value])


@_op("SETITEMS")
def _(m: Machine) -> None:
    items = m.pop_mark()
    m.update(m.top(), items)


@_op("DICT")
def _(m: Machine) -> None:
    items = m.pop_mark()
    m.made({})
    m.update(m.top(), items)


@_op("GLOBAL")
def _(m: Machine) -> None:
    module, name = m.line(), m.line()
    m.push(find_global(module, name))


@_op("STACK_GLOBAL")
def _(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    want(type(name) is str and type(module) is str, "a global is not named by strings")
    want(len(name) + len(module) <= 512, "a global's name is too long")
    m.push(find_global(module, name))


@_op("REDUCE")
def _(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    m.made(m.call(function, args))


@_op("NEWOBJ")
def _(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    want(type(cls) is Global and cls.record and args == (), f"it makes an object of {show(cls)}")
    m.made(m.call(cls, args))


@_op("BUILD")
def _(m: Machine) -> None:
    state = m.pop()
    m.build(m.top(), state)


@_op("INST")
def _(m: Machine) -> None:
    module, name = m.line(), m.line()
    find_global(module, name)
    raise BadFile(f"refused: the file's pickle makes an object of {module}.{name} by opcode INST: {RESAVE}")


@_op("EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
def _(m: Machine) -> None:
    code = m.data[m.pos - 1 : m.pos]
    names = ("EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
    name = next(name for name in names if getattr(pickle, name) == code)
    raise BadFile(f"refused: the file's pickle uses the opcode {name}, which torch.save never writes: {RESAVE}")


def loads(data: bytes, pos: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """Read the pickle that begins at `data[pos]`.

    Returns its object and the position after it. The object is made of None, bool, int, float, str, bytes, list, tuple,
    dict, set, `Record`, `TensorSpec`, `NumpyArray` and possibly stray stand-ins, which the caller refuses; containers
    may be shared or circular. Raises BadFile, or OutOfData where `data` ends first.
    """
    machine = Machine(data, pos, persistent)
    return machine.run(), machine.pos
