"""Checkpoint files: what goes in comes out; damaged ones are refused in a line, and nothing is damaged by a failure."""

import json
import os
import struct
import zipfile
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint, step_file
from mlx_sf.checkpoints.config import Config
from mlx_sf.checkpoints.load import load_model
from mlx_sf.checkpoints.resolve import resolve
from mlx_sf.common import files
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.tensor_file import Entry, TensorFile, write_tensor_file
from mlx_sf.models.jit import JiT, JiTConfig

CONFIG = Config(JiTConfig(8, 4, 8, 1, 1, 4, 2, 0, 3), class_names=("ant", "bee", "cat"), provenance={"by": "ä"})


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    return dict(tree_flatten(JiT(CONFIG.model).parameters()))


@pytest.fixture(params=["x.npz", "x.safetensors"])
def path(request, tmp_path, weights):
    save_checkpoint(tmp_path / request.param, {"ema1": weights}, CONFIG)
    return tmp_path / request.param


def test_everything_comes_back(path, weights):
    model, config = load_model(path)
    assert config == replace(CONFIG, weights=("ema1",))
    for key, value in tree_flatten(model.parameters()):
        assert mx.array_equal(value, weights[key])


def test_equal_input_gives_an_equal_file(path, weights, tmp_path):
    save_checkpoint(tmp_path / ("y" + path.suffix), {"ema1": weights}, CONFIG)
    assert (tmp_path / ("y" + path.suffix)).read_bytes() == path.read_bytes()


def test_other_programs_can_read_it(path, weights):
    opened = mx.load(str(path))
    assert all(mx.array_equal(opened[k], v) for k, v in weights.items())
    if path.suffix == ".npz":
        with np.load(path) as z:
            assert json.loads(z["__config__"].tobytes())["model"]["img_size"] == 8
    else:
        _, metadata = mx.load(str(path), return_metadata=True)
        assert json.loads(metadata["config"])["model"]["img_size"] == 8


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_training_state_rides_along(name, weights, tmp_path):
    other = {k: v + 1 for k, v in weights.items()}
    extra = {"optimizer/step": mx.array([7], dtype=mx.uint32), "optimizer/m/a": mx.zeros((0, 3))}
    save_checkpoint(tmp_path / name, {"model": weights, "ema2": other}, CONFIG, extra)
    checkpoint = Checkpoint(tmp_path / name)
    assert checkpoint.config.weights == ("model", "ema2")
    assert mx.array_equal(checkpoint.weights("ema2")["pos_embed"], other["pos_embed"])
    assert {k: v.tolist() for k, v in checkpoint.extra().items()} == {"optimizer/step": [7], "optimizer/m/a": []}
    assert load_model(checkpoint)[1].weights == ("model",)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(
        st.text(
            st.characters(codec="utf-8", exclude_characters="/\\\x00", exclude_categories=["Cs", "Cc"]), min_size=1
        ),
        st.tuples(
            st.sampled_from(["float32", "float16", "float64", "int32", "int64", "uint8", "uint32"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=5,
    ),
    text=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_tensors_round_trip(suffix, tensors, text, tmp_path):
    arrays = {
        name: np.random.default_rng(i).integers(0, 99, shape).astype(dtype)
        for i, (name, (dtype, shape)) in enumerate(tensors.items())
    }
    path = tmp_path / f"t{suffix}"
    if "__config__" in arrays or "__metadata__" in arrays:
        return
    write_tensor_file(path, [Entry.of(n, a) for n, a in arrays.items()], text)
    file = TensorFile(path)
    file.verify()
    assert file.text == text
    assert list(file.entries) == list(arrays)
    for name, a in arrays.items():
        got = file.entries[name].read()
        assert got.dtype == a.dtype
        np.testing.assert_array_equal(got, a)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_files_give_the_right_tensors_or_one_clear_line(suffix, data, tmp_path, weights):
    source = tmp_path / f"valid{suffix}"
    if not source.exists():
        save_checkpoint(source, {"ema1": weights}, CONFIG)
    raw = bytearray(source.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "header"]))
    # headers are where the structure is: aim there half of the time
    limit = min(len(raw), 4000) if kind == "header" or data.draw(st.booleans()) else len(raw)
    at = data.draw(st.integers(0, limit - 1))
    if kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "delete":
        del raw[at : at + data.draw(st.integers(1, 9))]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    target = tmp_path / f"mutated{suffix}"
    target.write_bytes(raw)
    try:
        got = Checkpoint(target).weights()
    except MlxSfError as e:
        assert str(e).startswith(str(target))
        assert "\n" not in str(e)
    else:
        assert Checkpoint(target).config == replace(CONFIG, weights=("ema1",))
        for key, value in weights.items():
            assert mx.array_equal(got[key], value), key


def rewrite_npz(path, change):
    with np.load(path) as z:
        arrays = {k: z[k] for k in z.files}
    change(arrays)
    np.savez(path, **arrays)


def drop(key):
    return lambda arrays: arrays.pop(key)


@pytest.mark.parametrize(
    "change, words",
    [
        (drop("blocks.0.attn.qkv.weight"), "lacks tensor 'blocks.0.attn.qkv.weight'"),
        (drop("pos_embed"), "lacks tensor 'pos_embed'"),
        (drop("__config__"), "not an mlx-sf checkpoint"),
        (
            lambda a: a.update({"blocks.0.norm1.weight": np.ones(9, np.float32)}),
            "'blocks.0.norm1.weight' is float32 (9,)",
        ),
        (lambda a: a.update({"blocks.0.norm1.weight": np.ones(8, np.int32)}), "is int32 (8,)"),
        (lambda a: a["blocks.0.norm1.weight"].__setitem__(0, np.nan), "'blocks.0.norm1.weight' holds NaN"),
        (lambda a: a.update({"surplus": np.ones(8, np.float32)}), "'surplus' is not part of the network"),
        (lambda a: a.update({"__config__": np.frombuffer(b"{}", np.uint8)}), "not an mlx-sf checkpoint"),
        (lambda a: a.update({"__config__": np.frombuffer(b"{", np.uint8)}), "not valid JSON"),
        (lambda a: a.update({"object": np.array([{}], dtype=object)}), "unexpected .npy header"),
        (lambda a: a.update({"pos_embed": np.asfortranarray(a["pos_embed"].reshape(2, 2, 8))}), "header"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, weights, change, words):
    path = tmp_path / "x.npz"
    save_checkpoint(path, {"ema1": weights}, CONFIG)
    rewrite_npz(path, change)
    with pytest.raises(MlxSfError) as e:
        load_model(path)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("depth", 10**9, "lacks tensor 'blocks.999999999.mlp.w3.weight'"),
        ("img_size", 10**6, "img_size is 1000000, want 2 to 8192 pixels"),
        ("img_size", 4096, "'pos_embed' has shape (1, 4, 8), its configuration wants (1, 1048576, 8)"),
        ("patch_size", "4", "patch_size is '4', want a whole number"),
        ("colour", 1, "unknown configuration entry 'colour'"),
    ],
)
def test_absurd_configurations_are_refused_before_a_network_is_made(tmp_path, weights, field, value, words):
    path = tmp_path / "x.npz"
    save_checkpoint(path, {"ema1": weights}, CONFIG)

    def change(arrays):
        config = json.loads(arrays["__config__"].tobytes())
        config["model"] |= {field: value}
        arrays["__config__"] = np.frombuffer(json.dumps(config).encode(), np.uint8)

    rewrite_npz(path, change)
    with pytest.raises(MlxSfError) as e:
        load_model(path)
    assert words in str(e.value)


def test_foreign_and_damaged_files_are_told_apart(tmp_path, weights, path):
    def said(raw: bytes) -> str:
        (tmp_path / "f").write_bytes(raw)
        with pytest.raises(MlxSfError) as e:
            Checkpoint(tmp_path / "f")
        return str(e.value)

    assert "empty file" in said(b"")
    assert "a web page" in said(b"<!doctype html><html></html>" * 10)
    assert "Git LFS pointer" in said(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "older PyTorch file" in said(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    whole = path.read_bytes()
    assert "damaged" in said(whole[:-100]) or "truncated" in said(whole[:-100])
    huge = struct.pack("<Q", 2**60) + whole[8:]
    assert "not a checkpoint, or truncated" in said(huge)
    with zipfile.ZipFile(tmp_path / "torch.zip", "w") as z:
        z.writestr("archive/data.pkl", b"")
    with pytest.raises(MlxSfError, match="is a PyTorch file: convert it first"):
        Checkpoint(tmp_path / "torch.zip")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(MlxSfError, match="not an mlx-sf checkpoint"):
        Checkpoint(tmp_path / "other.npz")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(MlxSfError, match="not an mlx-sf checkpoint"):
        Checkpoint(tmp_path / "other.safetensors")


def test_a_compressed_member_is_refused(tmp_path, weights):
    """A few kilobytes could expand to gigabytes."""
    save_checkpoint(tmp_path / "x.npz", {"ema1": weights}, CONFIG)
    with zipfile.ZipFile(tmp_path / "x.npz", "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb.npy", bytes(50_000_000))
    with pytest.raises(MlxSfError, match="'bomb.npy' is compressed"):
        Checkpoint(tmp_path / "x.npz")


def test_a_flipped_bit_is_noticed(path, weights):
    raw = bytearray(path.read_bytes())
    stored = np.asarray(weights["x_embedder.proj1.weight"]).tobytes()
    raw[raw.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(MlxSfError, match="SHA-256|CRC|header"):
        Checkpoint(path).weights()


def test_a_failed_write_leaves_the_old_file(path, weights, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MlxSfError, match="cannot be written .No space left on device."):
        save_checkpoint(path, {"ema1": {k: v + 1 for k, v in weights.items()}}, CONFIG)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_names_are_checked(tmp_path, weights):
    with pytest.raises(MlxSfError, match=r"must end in .npz or .safetensors"):
        save_checkpoint(tmp_path / "x.bin", {"ema1": weights}, CONFIG)
    with pytest.raises(MlxSfError, match="needs a prefix of its own"):
        save_checkpoint(tmp_path / "x.npz", {"ema1": weights}, CONFIG, {"ema1/x": mx.zeros(1)})


def test_paths_and_run_folders(tmp_path, weights):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    with pytest.raises(MlxSfError, match="want exactly one .npz or .safetensors checkpoint, found none"):
        resolve(run)
    for step in (100, 2000, 30):
        save_checkpoint(run / step_file(step), {"model": weights}, CONFIG)
    assert resolve(run) == run / step_file(2000)
    only = tmp_path / "only"
    only.mkdir()
    save_checkpoint(only / "m.npz", {"model": weights}, CONFIG)
    assert resolve(only) == only / "m.npz"
    for missing in ("nothing.npz", "runs/b.safetensors", "/no/where", "a b"):
        with pytest.raises(MlxSfError, match="no such file or folder"):
            resolve(missing)
