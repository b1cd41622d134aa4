"""A checkpoint in shards: the same tensors as in one file, complete or refused by name, never a file from elsewhere."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.checkpoint import Checkpoint, write_checkpoint
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.shards import INDEX
from tests.helpers import PARITY


@pytest.fixture
def sharded(tmp_path, cli):
    """The golden forced network in one file, and in four shards."""
    one, folder = tmp_path / "one.safetensors", tmp_path / "many"
    assert cli("convert", PARITY / "forced.pth", one, "--in-context-start", 1)[0] == 0
    whole = Checkpoint(one)
    write_checkpoint(folder, list(whole.file.entries.values()), whole.config, shard_bytes=64_000)
    assert len(list(folder.glob("model-*.safetensors"))) >= 4
    return one, folder


def test_shards_hold_what_one_file_holds(sharded, cli, tmp_path):
    one, folder = sharded
    whole, many = Checkpoint(one), Checkpoint(folder / INDEX)
    assert many.config == whole.config
    a, b = whole.weights(), many.weights()
    assert list(a) == list(b)
    assert all(mx.array_equal(a[k], b[k]) for k in a)
    for source, out in ((one, "a.npy"), (folder, "b.npy")):
        arguments = ("--classes", 3, "--steps", 2, "-o", tmp_path / out)
        assert cli("sample", "--ckpt", source, *arguments)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert "shards" in cli("info", folder)[1]
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in many.file.entries.values())


def test_the_command_writes_and_quantises_folders(sharded, cli, tmp_path):
    _, folder = sharded
    status, out, err = cli("convert", folder, tmp_path / "q8", "--quantize", 8, "--verify")
    assert status == 0, err
    assert "verified ema1" in out
    assert (tmp_path / "q8" / INDEX).exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def changed_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d, f: f[1].unlink(), "this shard of model.safetensors.index.json is missing"),
        (lambda d, f: f[1].rename(d / "model-9.safetensors"), "is missing"),
        (lambda d, f: f[1].write_bytes(f[1].read_bytes()[:-8]), "truncated"),
        (lambda d, f: f[1].write_bytes(f[0].read_bytes()), "says otherwise"),
        (lambda d, f: f[1].write_bytes(f[1].read_bytes()[:-1] + b"x"), "does not match its SHA-256"),
        (lambda d, f: (d / INDEX).write_text("{"), "not the index of an mlx-sf checkpoint"),
        (lambda d, f: (d / INDEX).write_text("[" * 100_000), "not the index of an mlx-sf checkpoint"),
        (lambda d, f: changed_index(d, lambda i: i["metadata"].pop("config")), "no configuration inside"),
        (lambda d, f: changed_index(d, lambda i: i["weight_map"].popitem()), "says otherwise"),
        (lambda d, f: changed_index(d, lambda i: i["weight_map"].update(extra=f[0].name)), "lacks tensor 'extra'"),
        (lambda d, f: changed_index(d, lambda i: i["weight_map"].update(pos_embed="../x.safetensors")), "beside it"),
        (lambda d, f: changed_index(d, lambda i: i["weight_map"].update(pos_embed="/x.safetensors")), "beside it"),
        (lambda d, f: changed_index(d, lambda i: i["weight_map"].update(pos_embed=7)), "beside it"),
    ],
)
def test_damaged_folders_are_refused_by_name(sharded, refused, tmp_path, damage, words):
    _, folder = sharded
    damage(folder, sorted(folder.glob("model-*.safetensors")))
    refused(words, "sample", "--ckpt", folder, "-o", tmp_path / "out")


def test_a_folder_that_is_there_stays(sharded, refused, tmp_path):
    one, folder = sharded
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    refused("is there already, want a new folder", "convert", one, folder, "--quantize", 8)
    refused("is there already", "convert", PARITY / "forced.pth", folder, "--in-context-start", 1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(sharded, monkeypatch, tmp_path):
    from mlx_sf.common import files

    one, _ = sharded
    whole = Checkpoint(one)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MlxSfError, match="cannot be written .No space left on device."):
        write_checkpoint(tmp_path / "new", list(whole.file.entries.values()), whole.config)
    assert not [p for p in tmp_path.iterdir() if "new" in p.name]
