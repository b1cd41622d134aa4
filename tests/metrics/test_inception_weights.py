"""Inception weights come from any container, and from the network once, checked; anything else is refused."""

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.metrics import inception_weights as w
from tests.metrics.fid_recipe import golden_json, recipe_weights

SHA = golden_json("expected.json")["weights"]["sha256_of_all"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_converted_file_holds_the_same_tensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inception{suffix}"
    w.save_inception(path, recipe_weights(), "recipe")
    assert w.content_sha256(w.load_inception(path)) == SHA
    by_mlx = mx.load(str(path))
    assert np.array_equal(np.array(by_mlx["fc.bias"]), recipe_weights()["fc.bias"])


def test_plain_containers_made_by_hand(tmp_path: Path) -> None:
    """Someone with torch but without mlx-sf may have saved the state dict."""
    np.savez(tmp_path / "a.npz", **recipe_weights())
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {k: mx.array(v) for k, v in recipe_weights().items()})
    for name in ("a.npz", "b.safetensors"):
        assert w.content_sha256(w.load_inception(tmp_path / name)) == SHA


@pytest.mark.parametrize("layout", ["legacy", "zip"])
def test_torch_files(tmp_path: Path, layout: str) -> None:
    torch = pytest.importorskip("torch")
    state = {k: torch.from_numpy(v.copy()) for k, v in recipe_weights().items()}
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=layout == "zip")
    assert w.content_sha256(w.load_inception(tmp_path / "w.pth")) == SHA
    assert w.is_inception_file(tmp_path / "w.pth")
    line = w.convert_inception_file(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert SHA in line
    assert "other weights than the public file's" in line
    assert w.content_sha256(w.load_inception(tmp_path / "w.safetensors")) == SHA


def changed(**changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {k: np.broadcast_to(np.float32(1), s) for k, s in w.inception_shapes().items()}
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fc__bias": None}, "x.pth: lacks tensor 'fc.bias'"),
        ({"AuxLogits__fc__weight": np.ones(3)}, "holds a foreign tensor, 'AuxLogits.fc.weight'"),
        ({"fc__bias": np.ones(1000)}, "'fc.bias' has shape (1000,), the FID Inception wants (1008,)"),
        ({"fc__bias": np.ones(1008, int)}, "'fc.bias' is int64, want floating point"),
        ({"fc__bias": np.full(1008, np.inf)}, "'fc.bias' holds NaN or infinite values"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MlxSfError) as e:
        w.convert_inception(changed(**changes), "x.pth")
    assert message in str(e.value)


def test_key_recognition() -> None:
    assert w.is_inception_state_dict(w.inception_shapes())
    assert not w.is_inception_file("/no/such/file.pth")
    assert not w.is_inception_state_dict(["blocks.0.attn.qkv.weight", "fc.weight"])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    w.save_inception(tmp_path / "good.safetensors", recipe_weights())
    data = bytearray((tmp_path / "good.safetensors").read_bytes())
    (tmp_path / "short.safetensors").write_bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(100_000_000, np.float32))
    for name, words in (
        ("short.safetensors", "truncated"),
        ("flipped.safetensors", "does not match its SHA-256"),
        ("junk.npz", "damaged or not an .npz"),
        ("junk.safetensors", "junk.safetensors"),
        ("bomb.npz", "more than four times"),
        ("gone.npz", "no such file, want Inception weights: download https://"),
    ):
        with pytest.raises(MlxSfError, match=words):
            w.load_inception(tmp_path / name)
    with pytest.raises(MlxSfError, match="is a folder"):
        w.load_inception(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_download_is_checked_and_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"weights" * 1000
    (tmp_path / "source.pth").write_bytes(content)
    monkeypatch.setattr(w, "URLS", (f"file://{tmp_path}/gone.pth", f"file://{tmp_path}/source.pth"))
    monkeypatch.setattr(w, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    assert w.fetch_inception().read_bytes() == content
    (tmp_path / "source.pth").unlink()
    assert w.fetch_inception() == cache / w.FILE_NAME  # no network needed any more
    assert [p.name for p in cache.iterdir()] == [w.FILE_NAME]
    (cache / w.FILE_NAME).write_bytes(b"broken")
    with pytest.raises(MlxSfError, match="is not the file it should be"):
        w.fetch_inception()


def test_failed_download_says_what_to_fetch_and_where_to_put_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.pth").write_bytes(b"an error page")
    monkeypatch.setattr(w, "URLS", (f"file://{tmp_path}/gone.pth", f"file://{tmp_path}/other.pth"))
    with pytest.raises(MlxSfError) as e:
        w.load_inception()
    text = str(e.value)
    assert "cannot be downloaded" in text
    assert f"download file://{tmp_path}/gone.pth" in text
    assert str(cache / w.FILE_NAME) in text
    assert w.FILE_SHA256 in text
    assert "inception_weights" in text
    assert not list(cache.glob("*"))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_SF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert w.cache_folder() == Path("/x/mlx-sf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert w.cache_folder() == Path.home() / ".cache" / "mlx-sf"
