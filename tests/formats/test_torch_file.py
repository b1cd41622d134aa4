"""torch_file: the right tensors or one clear line, and nothing of the file is ever executed."""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_sf.errors import MlxSfError
from mlx_sf.formats.torch_file.reader import Record, TensorRef, open_torch_file
from tests.helpers import GOLDEN, ROOT

# SHA-256 over every tensor's path, dtype, shape and bytes and every other value, as `flatten` lists them.
DIGESTS = {
    "parity/forced.pth": "3d4a4af0fe5f76c3ad2cc2020eda4f60e612287c2fc3025f41477f07983e1d01",
    "parity/head64.pth": "a25d20e0b3c76760694fed1b1059533fb57f4e8a81a2c2097a951c4a1d0e5801",
    "parity/hybrid.pth": "9709ca1a49432733b29c8369a7ef1f2b587018e97455dcf77d98519e85dc4d49",
    "parity/noctx.pth": "f6c1cd2135c68bdcb46ea33d51e0802d424780c485afa5557821908b468e0de7",
    "parity/vanilla.pth": "74088faf0b2211fc26f27c6c662a322a25ba7a9d6e857899829e1b359898dfb3",
    "torch/legacy.pth": "5f28771a4167bbd8a0348fdfe02861c32eb056bccd45c70de43fcb6292574999",
    "torch/zip.pth": "5f28771a4167bbd8a0348fdfe02861c32eb056bccd45c70de43fcb6292574999",
    "torch/zip_big_endian.pth": "5f28771a4167bbd8a0348fdfe02861c32eb056bccd45c70de43fcb6292574999",
}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value}, tensors as (dtype, shape, bytes)."""
    if isinstance(value, TensorRef):
        array = value.read()
        assert array.shape == value.shape
        assert array.flags.c_contiguous
        assert array.dtype.isnative
        assert array.dtype == ("float32" if value.dtype == "bfloat16" else value.dtype)
        return {path: (value.dtype, value.shape, array.tobytes())}
    if isinstance(value, Record):
        return {path: value.kind} | flatten(value.values, path + ".")
    if isinstance(value, dict):
        items = [(f"{path}/{key!r}", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {path: (type(value).__name__, repr(value))}
    result: dict[str, Any] = {path: (type(value).__name__, len(items))}
    for name, item in items:
        result |= flatten(item, name)
    return result


def read(path: Path) -> dict[str, Any]:
    with open_torch_file(path) as file:
        return flatten(file.root)


def refused(path: Path, *words: str) -> str:
    """Opening and reading everything fails with one line that begins with the path and holds the words."""
    with pytest.raises(MlxSfError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    for word in words:
        assert word in line, line
    assert "\n" not in line
    assert len(line) < 500
    return line


def expected(value: Any, path: str = "") -> dict[str, Any]:
    """What `flatten` should find, computed by torch from the object that was saved."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return {path: (str(value.dtype).removeprefix("torch."), tuple(value.shape), array.tobytes())}
    if isinstance(value, np.ndarray):
        return {path: (value.dtype.name, value.shape, value.astype(value.dtype.newbyteorder("=")).tobytes())}
    if isinstance(value, np.generic):
        return expected(value.item(), path)
    if isinstance(value, argparse.Namespace | SimpleNamespace):
        kind = "argparse.Namespace" if isinstance(value, argparse.Namespace) else "types.SimpleNamespace"
        return {path: kind} | expected(vars(value), path + ".")
    if isinstance(value, torch.device | torch.dtype | Path):
        return expected(str(value), path)
    if isinstance(value, bytearray):
        return expected(bytes(value), path)
    if isinstance(value, frozenset):
        return expected(set(value), path)
    if isinstance(value, dict):
        items = [(f"{path}/{key!r}", item) for key, item in value.items()]
        result: dict[str, Any] = {path: ("dict", len(items))}
    elif isinstance(value, (list, tuple)):
        items = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        result = {path: ("list" if isinstance(value, list) else "tuple", len(items))}
    else:
        return {path: (type(value).__name__, repr(value))}
    for name, item in items:
        result |= expected(item, name)
    return result


# --- files made by hand: no torch needed


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(path: Path, pickled: bytes, **storages: bytes) -> Path:
    """A zip-layout file with this data.pkl and storages s0=..., s1=... under the keys "s0", "s1"."""
    members = {"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n"}
    path.write_bytes(zip_bytes(members | {f"x/data/{key}": data for key, data in storages.items()}))
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def integers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int = 0,
    key: str = "s0",
    numel: int = 4,
    cls: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    """The opcodes of one tensor in the zip layout."""
    storage = b"(" + text("storage") + cls + text(key) + text("cpu") + integer(numel) + b"tQ"
    rest = integer(offset) + integers(*shape) + integers(*strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def pickle_of(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


FLOATS = np.arange(4, dtype="<f4").tobytes()
MODEL = b"}" + text("model") + b"}" + text("net.w")


def digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


@pytest.mark.parametrize("name", DIGESTS)
def test_golden_file_without_torch(name: str) -> None:
    assert digest(read(GOLDEN / name)) == DIGESTS[name]


@pytest.mark.parametrize("name", [name for name in DIGESTS if not name.endswith("big_endian.pth")])
def test_golden_file_equals_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    assert read(GOLDEN / name) == expected(torch.load(GOLDEN / name, map_location="cpu", weights_only=False))


def test_golden_structure() -> None:
    with open_torch_file(GOLDEN / "parity/forced.pth") as file:
        assert file.layout == "zip"
        assert list(file.root) == ["model", "optimizer", "epoch", "args", "model_ema1", "model_ema2"]
        assert file.root["epoch"] == 3
        args = file.root["args"]
        assert isinstance(args, Record)
        assert args.kind == "argparse.Namespace"
        assert args.values["model"] == args.get("model") == "custom"
        assert "model" in args
        assert "no_such_option" not in args
        position = file.root["model_ema1"]["net.pos_embed"]
        assert position.name == "model_ema1['net.pos_embed']"
        assert (position.dtype, position.nbytes) == ("float32", 4 * int(np.prod(position.shape)))


# --- against torch

LAYOUTS = [
    pytest.param({}, id="zip"),
    pytest.param({"pickle_protocol": 4}, id="zip-protocol-4"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
    pytest.param({"_use_new_zipfile_serialization": False, "pickle_protocol": 5}, id="legacy-protocol-5"),
]


def save(value: Any, path: Path, **options: Any) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


def everything() -> dict[str, Any]:
    """One of each thing that a checkpoint may hold."""
    import torch

    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    tagged = torch.ones(3)
    tagged.note = "a tensor with a Python attribute"  # type: ignore[attr-defined]
    integers = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    return {
        "floats": {str(d): torch.linspace(-3, 3, 7).to(d) for d in (torch.float16, torch.bfloat16, torch.float64)},
        "integers": [torch.arange(5).to(dtype) * -1 for dtype in integers],
        "complex": (torch.randn(3, dtype=torch.complex64), torch.randn(2, dtype=torch.complex128)),
        "bool": torch.tensor([True, False, True]),
        "views": collections.OrderedDict(
            base=base,
            row=base[2],
            column=base[:, 3],
            turned=base.t(),
            block=base[1:4, 2:9:3],
            permuted=base.reshape(5, 3, 4).permute(2, 0, 1),
            expanded=base[0, :3].expand(4, 3),
            bfloat=torch.arange(24).to(torch.bfloat16).reshape(4, 6)[:, 1::2],
        ),
        "scalar": torch.tensor(2.5),
        "empty": [torch.zeros(0), torch.zeros(3, 0, 2)],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "tagged": tagged,
        "args": argparse.Namespace(lr=1e-4, name="ünï", path=Path("a/b"), none=None, list=[1, (2, 3)], big=-(2**70)),
        "simple": SimpleNamespace(a=1),
        "numpy": [np.float64(1.5), np.int32(-3), np.bool_(True), np.float32(0.1)],
        "arrays": [
            np.arange(6).reshape(2, 3),
            np.asfortranarray(np.eye(3, 4, dtype=np.float32)),
            np.arange(3, dtype=">f4"),
        ],
        "others": [torch.Size([2, 3]), torch.device("cuda", 1), torch.bfloat16, b"\x00\xff", bytearray(b"xy"), {1}],
        "counters": [collections.Counter([1, 1, 2]), frozenset(["a"]), collections.defaultdict(list, {3: 4})],
        1: {2.5: {None: {True: ()}}},
    }


@pytest.mark.parametrize("options", LAYOUTS)
def test_everything(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    value = everything()
    if options.get("pickle_protocol") == 5:
        del value["arrays"]  # that protocol writes arrays in another way, which torch.save's default never does
    path = save(value, tmp_path / "a.pth", **options)
    assert read(path) == expected(value)
    with open_torch_file(path) as file:
        assert file.layout == ("legacy" if "_use_new_zipfile_serialization" in options else "zip")


def test_unsigned_types_of_newer_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = [torch.arange(6).to(dtype)[1::2] for dtype in (torch.uint16, torch.uint32, torch.uint64)]
    assert read(save(value, tmp_path / "a.pth")) == expected(value)


def test_zip64_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for files beyond 4 GB: sizes and places in the ZIP64 fields of the directory."""
    want = read(GOLDEN / "torch/zip.pth")
    members = zip_members((GOLDEN / "torch/zip.pth").read_bytes())
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    data = zip_bytes(members)
    monkeypatch.undo()
    assert b"PK\x06\x06" in data
    (tmp_path / "a.pth").write_bytes(data)
    assert read(tmp_path / "a.pth") == want


def test_deflated_archive(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    value = everything()
    path = save(value, tmp_path / "a.pth")
    want = read(path)
    path.write_bytes(zip_bytes(zip_members(path.read_bytes()), zipfile.ZIP_DEFLATED))
    assert read(path) == want


def swap_storages(members: dict[str, bytes], itemsizes: dict[str, int]) -> dict[str, bytes]:
    result = dict(members)
    for name, itemsize in itemsizes.items():
        data = np.frombuffer(members[name], np.uint8).reshape(-1, itemsize)[:, ::-1]
        result[name] = data.tobytes()
    return result


def test_big_endian_zip(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bool, torch.int16)
    value = [torch.tensor([0, 1, 2, 300]).to(dtype) for dtype in dtypes]
    members = zip_members(save(value, tmp_path / "a.pth").read_bytes())
    members = swap_storages(members, {f"a/data/{i}": tensor.element_size() for i, tensor in enumerate(value)})
    members["a/byteorder"] = b"big"
    (tmp_path / "b.pth").write_bytes(zip_bytes(members))
    assert read(tmp_path / "b.pth") == expected(value)
    assert expected(torch.load(tmp_path / "b.pth")) == expected(value)
    (tmp_path / "c.pth").write_bytes(zip_bytes(members | {"a/byteorder": b"middle"}))
    refused(tmp_path / "c.pth", "byteorder", "'middle'", "little or big")


def test_legacy_of_a_big_endian_system(tmp_path: Path) -> None:
    """torch writes little-endian payloads whatever the system; counts in big-endian mean that the payload is too."""
    torch = pytest.importorskip("torch")
    value = torch.tensor([1.0, 2.0, 300.0])
    data = save(value, tmp_path / "a.pth", _use_new_zipfile_serialization=False).read_bytes()
    flag = data.index(b"little_endian")
    position = data.index(b"\x88", flag)
    data = data[:position] + b"\x89" + data[position + 1 :]
    (tmp_path / "b.pth").write_bytes(data)
    assert read(tmp_path / "b.pth") == expected(value) == expected(torch.load(tmp_path / "b.pth"))
    swapped = struct.pack(">q", 3) + value.numpy().astype(">f4").tobytes()
    (tmp_path / "c.pth").write_bytes(data[:-20] + swapped)
    assert read(tmp_path / "c.pth") == expected(value)


def test_shared_storage_is_read_in_part(tmp_path: Path) -> None:
    """Also the checksum of a storage that no tensor reads whole."""
    torch = pytest.importorskip("torch")
    base = torch.randn(1000)
    value = {"a": base[10:20], "b": base[15:400:5], "c": base[999]}
    path = save(value, tmp_path / "a.pth")
    assert read(path) == expected(value)
    data = bytearray(path.read_bytes())
    position = data.index(base.numpy().tobytes()) + 4 * 600  # a byte that none of the three covers
    data[position] ^= 1
    path.write_bytes(data)
    refused(path, "data/0", "checksum", "download the file again")


def test_sparse_view_of_a_large_storage_is_gathered_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("mlx_sf.formats.torch_file.tensors.WINDOW", 256)
    base = torch.arange(10000, dtype=torch.int32)
    value = [base[::97], base.reshape(100, 100)[::7, 3::11], base.reshape(10, 10, 10, 10).permute(3, 1, 0, 2)[::3, ::2]]
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        assert read(save(value, tmp_path / "a.pth", **options)) == expected(value)


class _Legacy(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, _Pid) else None


class _Pid:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def legacy_bytes(root: Any, keys: list[str], payload: bytes) -> bytes:
    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
        pickle.dump(value, buffer, 2)
    _Legacy(buffer, 2).dump(root)
    pickle.dump(keys, buffer, 2)
    return buffer.getvalue() + payload


def test_legacy_storage_views(tmp_path: Path) -> None:
    """Files of the oldest versions describe a tensor's storage as a view (key, offset, size) of a root storage."""
    torch = pytest.importorskip("torch")

    def view(start: int, size: int) -> _Pid:
        return _Pid("storage", torch.FloatStorage, "7", "cpu", 6, (f"v{start}", start, size))

    def made(storage: _Pid, offset: int, size: int) -> _Call:
        return _Call(torch._utils._rebuild_tensor, storage, offset, (size,), (1,))

    payload = struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes()
    root = {"a": made(view(2, 3), 1, 2), "b": made(view(0, 6), 0, 6)}
    path = tmp_path / "a.pth"
    path.write_bytes(legacy_bytes(root, ["7"], payload))
    assert read(path) == expected({"a": torch.tensor([3.0, 4.0]), "b": torch.arange(6.0)})
    path.write_bytes(legacy_bytes({"a": made(view(2, 3), 1, 3)}, ["7"], payload))
    refused(path, "tensor a: storage is short", "3 elements found", "needs 4")
    path.write_bytes(legacy_bytes({"a": made(view(5, 3), 0, 1)}, ["7"], payload))
    refused(path, "view of storage '7'", "beyond its end")
    path.write_bytes(legacy_bytes(root, ["8"], payload))
    refused(path, "names '8'")
    path.write_bytes(legacy_bytes(root, [], b""))
    refused(path, "'7' is missing")


def test_python_2_strings(tmp_path: Path) -> None:
    """Checkpoints written by Python 2 spell str as (SHORT_)BINSTRING."""
    body = b"}U\x05net.wU\x03abcs"
    assert read(zip_of(tmp_path / "a.pth", pickle_of(body))) == {"": ("dict", 1), "/'net.w'": ("str", "'abc'")}


scalars = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=8) | st.binary()


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    torch = pytest.importorskip("torch")
    names = [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
    ]
    dtype = getattr(torch, draw(st.sampled_from(names)))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    seed = draw(st.integers(0, 99))
    value = torch.from_numpy(np.random.default_rng(seed).normal(0, 50, shape)).to(dtype)
    if value.ndim and draw(st.booleans()):
        value = value.permute(*draw(st.permutations(range(value.ndim))))
    if value.ndim and draw(st.booleans()):
        value = value[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
    return torch.nn.Parameter(value) if dtype.is_floating_point and draw(st.booleans()) else value


trees = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=4)
        | st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), inner, max_size=3).map(
            lambda values: argparse.Namespace(**values)
        )
    ),
    max_leaves=12,
)
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(FUZZ, max_examples=60)
@given(value=trees, legacy=st.booleans())
def test_any_tree_comes_back(tmp_path: Path, value: Any, legacy: bool) -> None:
    pytest.importorskip("torch")
    path = save(value, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert read(path) == expected(value)


# --- damaged files


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A list of edits; positions are fractions, so that they fit any file."""
    position = st.floats(0, 1, exclude_max=True)
    edit = st.one_of(
        st.tuples(st.just("flip"), position, st.integers(0, 7)),
        st.tuples(st.just("set"), position, st.sampled_from([0, 0x2E, 0x52, 0x62, 0x72, 0x80, 0x8E, 0xFF])),
        st.tuples(st.just("insert"), position, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("delete"), position, st.integers(1, 500)),
        st.tuples(st.just("cut"), position, st.none()),
        st.tuples(st.just("splice"), position, st.tuples(position, st.integers(4, 500))),
        st.tuples(
            st.just("word"), position, st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        ),
    )
    return draw(st.lists(edit, min_size=1, max_size=3))


def mutate(data: bytes, edits: Any) -> bytes:
    out = bytearray(data)
    for kind, fraction, value in edits:
        at = int(fraction * len(out))
        if kind == "flip":
            out[at : at + 1] = bytes(byte ^ 1 << value for byte in out[at : at + 1])
        elif kind == "set":
            out[at : at + 1] = bytes([value])
        elif kind == "insert":
            out[at:at] = value
        elif kind == "delete":
            del out[at : at + value]
        elif kind == "cut":
            del out[at:]
        elif kind == "splice":
            start = int(value[0] * len(out))
            out[at : at + value[1]] = out[start : start + value[1]]
        else:
            out[at : at + 4] = value
    return bytes(out)


def survives(path: Path, data: bytes) -> dict[str, Any] | None:
    """The tensors, or None after an MlxSfError; anything else, or taking long, fails the test."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        found: dict[str, Any] | None = read(path)
    except MlxSfError as error:
        found, line = None, str(error)
        assert line.startswith(f"{path}: "), line
    assert time.perf_counter() - start < 5
    return found


@settings(FUZZ, max_examples=300)
@given(edits=mutations(), deflated=st.booleans())
def test_damaged_zip_gives_the_right_tensors_or_an_error(tmp_path: Path, edits: Any, deflated: bool) -> None:
    path = GOLDEN / "torch/zip.pth"
    data = path.read_bytes()
    if deflated:
        data = zip_bytes(zip_members(data), zipfile.ZIP_DEFLATED)
    found = survives(tmp_path / "a.pth", mutate(data, edits))
    assert found is None or digest(found) == DIGESTS["torch/zip.pth"]


@settings(FUZZ, max_examples=300)
@given(edits=mutations(), name=st.sampled_from(["pickle", "legacy"]))
def test_damaged_pickle_gives_some_tree_or_an_error(tmp_path: Path, edits: Any, name: str) -> None:
    """Here nothing tells a changed number from the right one; but nothing may crash, hang or run."""
    if name == "legacy":
        data = mutate((GOLDEN / "torch/legacy.pth").read_bytes(), edits)
    else:
        members = zip_members((GOLDEN / "torch/zip.pth").read_bytes())
        key = next(key for key in members if key.endswith("data.pkl"))
        data = zip_bytes(members | {key: mutate(members[key], edits)})
    survives(tmp_path / "a.pth", data)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_cut_short_anywhere(tmp_path: Path, name: str) -> None:
    data = (GOLDEN / "torch" / name).read_bytes()
    for size in {*range(0, len(data), 61), *range(len(data) - 30, len(data))}:
        path = tmp_path / "a.pth"
        path.write_bytes(data[:size])
        line = refused(path)
        assert "download" in line or size < 13, line


def test_payload_bit_flips_are_noticed(tmp_path: Path) -> None:
    data = (GOLDEN / "parity/noctx.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    for info in infos[:: max(1, len(infos) // 12)]:
        extra = int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
        at = info.header_offset + 30 + len(info.filename) + extra + info.file_size // 2
        (tmp_path / "a.pth").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        refused(tmp_path / "a.pth", "tensor ", "fails its checksum")


def test_missing_parts(tmp_path: Path) -> None:
    good = pickle_of(MODEL + tensor((4,), (1,)) + b"ss")
    assert read(zip_of(tmp_path / "ok.pth", good, s0=FLOATS))["/'model'/'net.w'"] == ("float32", (4,), FLOATS)
    refused(zip_of(tmp_path / "a.pth", good), "storage 's0' is missing", "model['net.w']")
    refused(
        zip_of(tmp_path / "b.pth", good, s0=FLOATS[:12]), "model['net.w']", "storage is short", "12 bytes", "want 16"
    )
    refused(zip_of(tmp_path / "c.pth", good[:-1], s0=FLOATS), "data.pkl ends too early")
    path = tmp_path / "d.pth"
    path.write_bytes(zip_bytes({"x/byteorder": b"little"}))
    refused(path, "without data.pkl", "x/byteorder")
    path.write_bytes(zip_bytes({"x/data.pkl": good, "y/data.pkl": good}))
    refused(path, "holds 2 data.pkl")
    path.write_bytes(zip_bytes({"x/data.pkl": good, "x/constants.pkl": b"", "x/code/a.py": b""}))
    refused(path, "TorchScript")


@pytest.mark.parametrize(
    "shape, strides, offset, word",
    [
        ((5,), (1,), 0, "storage is short"),
        ((2, 2), (3, 1), 0, "storage is short"),
        ((1,), (1,), 4, "storage is short"),
        ((2,), (1,), 2**61, "storage is short"),
        ((2**40,), (1,), 0, "storage is short"),
        ((2**40,), (0,), 0, "expands"),
        ((2**20, 2**20, 2**20), (0, 0, 0), 0, "expands"),
        ((0, 2**61, 2**61), (0, 0, 0), 0, "beyond any size"),
        ((-1,), (1,), 0, "damaged"),
        ((2,), (-1,), 1, "damaged"),
        ((2,), (1,), -1, "damaged"),
        ((2, 2), (1,), 0, "damaged"),
        ((1,) * 65, (1,) * 65, 0, "damaged"),
    ],
)
def test_tensor_outside_its_storage(tmp_path: Path, shape: Any, strides: Any, offset: int, word: str) -> None:
    path = zip_of(tmp_path / "a.pth", pickle_of(MODEL + tensor(shape, strides, offset) + b"ss"), s0=FLOATS)
    line = refused(path, word)
    assert word == "damaged" or "model['net.w']" in line


# --- hostile files


class _Attack:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks() -> dict[str, tuple[bytes, str]]:
    import os

    def stack_global(module: str, name: str, args: bytes) -> bytes:
        return b"\x80\x04" + text(module) + text(name) + b"\x93" + args + b"R."

    touch = b"(" + text("touch PWNED") + b"t"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return {
        "os.system": (pickle.dumps(_Attack(os.system, "touch PWNED"), 2), "posix.system"),
        "eval": (pickle.dumps(_Attack(eval, "open('PWNED','w')"), 2), "builtins.eval"),
        "exec-protocol-4": (pickle.dumps(_Attack(exec, "open('PWNED','w')"), 4), "builtins.exec"),
        "stack-global": (stack_global("os", "system", touch), "os.system"),
        "dotted": (stack_global("torch", "serialization.os.system", touch), "torch.serialization.os.system"),
        "getattr": (b"\x80\x02c__builtin__\ngetattr\n" + touch + b"R.", "builtins.getattr"),
        "reconstructor": (b"\x80\x02ccopyreg\n_reconstructor\n" + touch + b"R.", "copyreg._reconstructor"),
        "subprocess": (b"\x80\x02csubprocess\nPopen\n" + touch + b"R.", "subprocess.Popen"),
        "torch.load": (b"\x80\x02ctorch.serialization\nload\n" + touch + b"R.", "torch.serialization.load"),
        "inst": (b"\x80\x02(" + text("touch PWNED") + b"ios\nsystem\n.", "os.system"),
        "inst-of-allowed": (b"\x80\x02(icollections\nOrderedDict\n.", "INST"),
        "obj": (b"\x80\x02(cos\nsystem\n" + text("touch PWNED") + b"o.", "os.system"),
        "obj-of-allowed": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        "newobj": (b"\x80\x02cos\nsystem\n" + touch + b"\x81.", "os.system"),
        "newobj-of-function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "makes an object"),
        "newobj-ex": (b"\x80\x04cargparse\nNamespace\n)}\x92.", "NEWOBJ_EX"),
        "ext1": (b"\x80\x02\x82\x01.", "EXT1"),
        "ext4": (b"\x80\x02\x84\x01\0\0\0.", "EXT4"),
        "persid": (b"\x80\x02Pstorage\n.", "PERSID"),
        "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "protocol-0-op": (b"\x80\x02S'a'\n.", "opcode"),
        "protocol-9": (b"\x80\x09N.", "protocol 9"),
        "persistent-id-string": (b"\x80\x02" + text("storage") + b"Q.", "not the id of a storage"),
        "persistent-id-short": (b"\x80\x02(" + text("storage") + b"tQ.", "not the id of a storage"),
        "persistent-id-class": (
            b"\x80\x02(" + text("storage") + b"cargparse\nNamespace\n" + text("0") + text("cpu") + b"K\x01tQ.",
            "argparse.Namespace",
        ),
        "persistent-id-path": (pickle_of(tensor((1,), (1,), key="../data.pkl")), "'../data.pkl' is missing"),
        "persistent-id-size": (pickle_of(tensor((1,), (1,), numel=-1)), "-1 elements"),
        "module": (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", "torch.nn.modules.linear.Linear"),
        "main": (b"\x80\x02c__main__\nModel\n)\x81.", "whole model object"),
        "quantized": (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.", "torch._utils._rebuild_qtensor"),
        "sparse": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.", "torch._utils._rebuild_sparse_tensor"),
        "quantized-storage": (b"\x80\x02ctorch\nQInt8Storage\n.", "torch.QInt8Storage"),
        "omegaconf": (b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81.", "omegaconf.dictconfig.DictConfig"),
        "long-name": (b"\x80\x02c" + b"a" * 5000 + b"\nb\n.", "damaged"),
        "odd-name": (b"\x80\x02c\x1b[31m\nb\n.", "\\x1b[31m.b"),
        "class-as-value": (b"\x80\x02ccollections\nOrderedDict\n.", "collections.OrderedDict at (root)"),
        "storage-as-value": (
            b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("s0") + text("cpu") + b"K\x01tQ.",
            "bare storage",
        ),
        "not-a-storage": (b"\x80\x02" + rebuilt + b"NK\x00))\x89NtR.", "None instead of a storage"),
        "wrong-arguments": (b"\x80\x02" + rebuilt + b"tR.", "wrong arguments"),
        "call-a-dict": (b"\x80\x02})R.", "calls a dict"),
        "call-a-dtype": (b"\x80\x02ctorch\nfloat32\n)R.", "calls 'torch.float32'"),
        "build-on-list": (b"\x80\x02]}b.", "sets the state of []"),
        "namespace-state": (b"\x80\x02cargparse\nNamespace\n)\x81]b.", "with state []"),
        "namespace-keys": (b"\x80\x02cargparse\nNamespace\n)\x81}K\x01K\x02sb.", "not named by a string"),
        "numpy-objects": (b"\x80\x02cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR.", "'O8'"),
        "tuple-key": (b"\x80\x02}(K\x01K\x02tK\x03s.", "used as a dictionary key"),
        "huge-key": (b"\x80\x02}\x8a\x10" + b"\x7f" * 16 + b"K\x03s.", "used as a dictionary key"),
        "cycle": (b"\x80\x02]q\x00h\x00a.", "contains itself"),
        "cycle-by-record": (
            b"\x80\x02cargparse\nNamespace\n)\x81q\x00}" + text("me") + b"h\x00sb.",
            "contains itself",
        ),
        "lazy-conjugate": (
            pickle_of(tensor((4,), (1,))[:-2] + b"}" + text("conj") + b"\x88stR"),
            "resolve_conj",
        ),
        "float8": (
            pickle_of(
                tensor((4,), (1,), cls=b"ctorch.storage\nUntypedStorage\n")[:-2].replace(b"tensor_v2", b"tensor_v3")
                + b"ctorch\nfloat8_e4m3fn\ntR"
            ),
            "float8_e4m3fn",
        ),
    }


@pytest.mark.parametrize("name", attacks())
def test_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    data, word = attacks()[name]
    refused(zip_of(tmp_path / "zip.pth", data, s0=FLOATS), word)
    header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    keys, payload = (["s0"], struct.pack("<q", 4) + FLOATS) if b"s0" in data else ([], b"")
    (tmp_path / "legacy.pth").write_bytes(header + data + pickle.dumps(keys, 2) + payload)
    # Ids of storages are of another form in this layout, which then comes up first.
    refused(tmp_path / "legacy.pth", "" if "persistent-id" in name or "storage" in name or name == "float8" else word)
    (tmp_path / "plain.pth").write_bytes(data)
    refused(tmp_path / "plain.pth")
    assert not (tmp_path / "PWNED").exists()


def test_protocol_0_pickle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    refused(path, "refused", "os.system")


def doubling() -> bytes:
    body = b"]"
    for i in range(60):
        body += b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
    return pickle_of(body)


def repeated_encode() -> bytes:
    body = b"c_codecs\nencode\nq\x00" + text("a" * 1_000_000) + b"q\x01" + text("latin1") + b"q\x02]"
    return pickle_of(body + b"h\x00h\x01h\x02\x86Ra" * 20_000)


def repeated_update() -> bytes:
    state = b"}q\x00(" + b"".join(text(str(i)) + b"N" for i in range(20_000)) + b"u0"
    return pickle_of(state + b"cargparse\nNamespace\n)\x81" + b"h\x00b" * 100_000)


BOMBS = {
    "memo-index": (lambda: pickle_of(b"]r\xff\xff\xff\x7f"), None),
    "memo-index-get": (lambda: pickle_of(b"]j\xff\xff\xff\x7f"), "never stored"),
    "binbytes8": (lambda: pickle_of(b"\x8e" + struct.pack("<Q", 2**60)), "claims a value"),
    "binbytes8-max": (lambda: pickle_of(b"\x8e" + b"\xff" * 8), "claims a value"),
    "binunicode8": (lambda: pickle_of(b"\x8d" + struct.pack("<Q", 2**40)), "claims a value"),
    "bytearray8": (lambda: pickle_of(b"\x96" + struct.pack("<Q", 2**33)), "claims a value"),
    "binunicode": (lambda: pickle_of(b"X" + b"\xff" * 4), "claims a value"),
    "frame": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "frame"),
    "long4": (lambda: pickle_of(b"\x8b\xff\xff\xff\x7f"), "a number of"),
    "long1": (lambda: pickle_of(b"\x8a\xff" + b"\x7f" * 255), "a number of"),
    "int-digits": (lambda: pickle_of(b"I" + b"9" * 400 + b"\n"), "not a number"),
    "marks": (lambda: pickle_of(b"(" * 500_000), "nests too deeply"),
    "nested-lists": (lambda: pickle_of(b"]" * 300_000 + b"a" * 299_999), "nest deeper"),
    "nested-tuples": (lambda: pickle_of(b")" + b"\x85" * 500_000), "nest deeper"),
    "nested-calls": (
        lambda: pickle_of(
            b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00)" + b"h\x00ctorch\nTensor\n}t" * 10_000 + b"R"
        ),
        "",
    ),
    "empty-sets": (lambda: pickle_of(b"\x8f" * 2_000_000), "objects"),
    "too-many-steps": (lambda: pickle_of(b"N0" * 2_000_000), "steps"),
    "doubling": (doubling, "hold one another"),
    "repeated-encode": (repeated_encode, "again and again"),
    "repeated-update": (repeated_update, "again and again"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_bomb(tmp_path: Path, name: str, layout: str) -> None:
    make, word = BOMBS[name]
    path = tmp_path / "a.pth"
    if layout == "zip":
        zip_of(path, make())
    else:
        header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(header + make() + pickle.dumps([], 2))
    size = path.stat().st_size
    measured = name not in (
        "empty-sets",
        "too-many-steps",
        "nested-tuples",
        "nested-lists",
    )  # tracing is slow on many objects
    if measured:
        tracemalloc.start()
    start = time.perf_counter()
    if word is None:
        read(path)
    else:
        refused(path, word)
    assert time.perf_counter() - start < 20
    if measured:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * size + (8 << 20)


def test_zip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    tracemalloc.start()
    path.write_bytes(zip_bytes({"x/data.pkl": b"\x80\x02" + bytes(40 << 20)}, zipfile.ZIP_DEFLATED))
    tracemalloc.reset_peak()
    refused(path, "data.pkl has 41943042 bytes")
    # A directory that claims more than there is, in sizes and in place.
    good = zip_bytes({"x/data.pkl": pickle_of(tensor((4,), (1,))), "x/data/s0": FLOATS})
    central = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02") + 4)
    for offset in (20, 24, 42):  # packed size, size, place
        data = bytearray(good)
        data[central + offset : central + offset + 4] = b"\xf0\xff\xff\x7f"
        path.write_bytes(data)
        refused(path)
    # The size of the directory itself.
    data = bytearray(good)
    data[-10:-6] = b"\xf0\xff\xff\x7f"
    path.write_bytes(data)
    refused(path, "directory")
    # Deflate cannot shrink more than 1032-fold.
    packed = zip_bytes({"x/data.pkl": pickle_of(tensor((4,), (1,))), "x/data/s0": FLOATS}, zipfile.ZIP_DEFLATED)
    central = packed.index(b"PK\x01\x02", packed.index(b"PK\x01\x02") + 4)
    data = bytearray(packed)
    data[central + 24 : central + 28] = b"\xf0\xff\xff\x7f"
    path.write_bytes(data)
    refused(path, "would expand")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_overlapping_and_doubled_members(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    pickled = pickle_of(tensor((4,), (1,)))
    good = bytearray(zip_bytes({"x/data.pkl": pickled, "x/data/s0": FLOATS, "x/data/s1": FLOATS}))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    third = good.rindex(b"PK\x01\x02")
    good[third + 42 : third + 46] = struct.pack("<I", offsets[1])
    path.write_bytes(good)
    refused(path, "data/s1", "another name")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in (("x/data.pkl", pickled), ("x/data/s0", FLOATS), ("x/data/s0", FLOATS[::-1])):
                archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())
    refused(path, "data/s0", "twice")


# --- other files


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "empty"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (npz_bytes(), "npz"),
        (bytes(257) + b"ustar\0" + bytes(300), "tar archive"),
        (b"\x1f\x8b\x08\0", "gunzip"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\x93NUMPY\x01\0", ".npy"),
        (b'{"a": 1}', "JSON"),
        (pickle.dumps({"a": 1}, 2), "plain pickle"),
        (pickle.dumps([1], 4), "plain pickle"),
        (b"\x80", "ends too early"),
        (b"PK\x03\x04 and nothing more", "cut short"),
        (b"hello", "not a file from torch.save"),
        (bytes(1000), "not a file from torch.save"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    refused(path, word)


def test_paths(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "folder")
    path = zip_of(tmp_path / "a.pth", pickle_of(MODEL + tensor((4,), (1,)) + b"ss"), s0=FLOATS)
    with open_torch_file(str(path)) as file:
        tensor_ref = file.root["model"]["net.w"]
    with pytest.raises(MlxSfError, match="was closed before"):
        tensor_ref.read()


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """192 MiB of tensors of 8 MiB each, in an interpreter of its own."""
    path, count, each = tmp_path / "big.pth", 24, 8 << 20
    body = b"}" + b"".join(
        text(f"w{i}") + tensor((each // 4,), (1,), key=f"s{i}", numel=each // 4) + b"s" for i in range(count)
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("big/data.pkl", pickle_of(body))
        for i in range(count):
            archive.writestr(f"big/data/s{i}", bytes([i]) * each)
    program = """
import resource, sys
from mlx_sf.formats.torch_file.reader import open_torch_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_torch_file(sys.argv[1]) as file:
    for i, tensor in enumerate(file.root.values()):
        assert tensor.read().view("u1").max() == i
        del tensor
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(peak if sys.platform == "darwin" else peak * 1024)
"""
    root = ROOT
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=root, check=True)
    assert int(done.stdout) < 3 * each
