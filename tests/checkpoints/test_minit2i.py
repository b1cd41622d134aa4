"""MiniT2I's files in every layout that its authors write: the same network of each, or one line why not."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.conversion import convert
from mlx_sf.checkpoints.load import load_model, verify_checkpoint
from mlx_sf.checkpoints.resolve import resolve
from mlx_sf.errors import MlxSfError
from tests.helpers import run_cli
from tests.minit2i import PLACES, T2I, arrays, close, text

HALF = mx.array([0.5])
# Orbax folders say neither the images' side nor the number of places
JAX = {"small": {"img_size": 32, "text_length": 7}, "nopre": {"img_size": 16, "text_length": 3}}


def output(path, name, weights=None):
    model, _ = load_model(path, weights)
    a = arrays("forward.npz")
    return model(mx.array(a[f"{name}/x"]), HALF, text(a[f"{name}/context"], a[f"{name}/mask"]))


@pytest.mark.parametrize("name", ["small", "hd52", "hd64", "nopre"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_folder_of_the_hub(name, suffix, tmp_path):
    report = convert(PLACES[name], tmp_path / f"x{suffix}")
    close("forward.npz", f"{name}/out", output(tmp_path / f"x{suffix}", name))
    assert report.layout == "hub"
    assert report.config.sample.t_eps == 0.001  # the pipeline on the Hub
    assert report.config.flow.t_eps == 0.05  # training
    assert (report.config.sample.method, report.config.sample.steps, report.config.flow.noise_scale) == (
        "euler",
        100,
        2,
    )
    assert all(k.startswith(("t_embedder", "pooled_embedder")) for k in report.ignored)


def test_folder_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    close("forward.npz", "small/out", output(resolve(PLACES["small"]), "small"))
    close("forward.npz", "small/out", output(resolve(PLACES["small"] / "transformer"), "small"))


def test_folder_of_several_models(tmp_path, monkeypatch):
    """The one that its own pipeline takes unless told otherwise."""
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    close("forward.npz", "small/out", output(resolve(T2I / "hub"), "small"))
    close("forward.npz", "hd52/out", output(resolve(T2I / "hub" / "minit2i-l-16"), "hd52"))


def test_trainers_file(tmp_path):
    source = T2I / "nopre_checkpoint_000002.pt"
    report = convert(source, tmp_path / "ema.npz")
    assert report.config.weights == ("ema1",)
    close("forward.npz", "nopre/out", output(tmp_path / "ema.npz", "nopre"))
    convert(source, tmp_path / "both.safetensors", weights=["model", "ema1"])
    close("forward.npz", "nopre_trainer_model/out", output(tmp_path / "both.safetensors", "nopre", "model"))
    close("forward.npz", "nopre/out", output(tmp_path / "both.safetensors", "nopre"))
    assert report.config.sample.t_eps is None  # as trained: 0.05
    assert report.config.sample.cfg == 2.0
    with pytest.raises(MlxSfError, match="holds weights model, ema1, not 'ema2'"):
        convert(source, tmp_path / "x.npz", weights="ema2")


def test_export(tmp_path):
    report = convert(T2I / "nopre_export.pt", tmp_path / "x.npz")
    assert report.layout == "export"
    close("forward.npz", "nopre/out", output(tmp_path / "x.npz", "nopre"))
    convert(T2I / "second" / "mmjit" / "d" / "checkpoint.pt", tmp_path / "d.npz")
    model, _ = load_model(tmp_path / "d.npz")
    a = arrays("second/mmjit/d/golden.npz")
    out = model(mx.array(a["img"]), HALF, text(a["context"], a["mask_full"]))
    close("second/mmjit/d/golden.npz", "out_full", out)


@pytest.mark.parametrize("name", ["small", "nopre"])
def test_orbax(name, tmp_path):
    pytest.importorskip("tensorstore")
    for source in (T2I / f"{name}_jax", T2I / f"{name}_jax" / "checkpoint"):
        report = convert(source, tmp_path / f"{source.name}.npz", **JAX[name])
        assert report.layout == "JAX"
        close("forward.npz", f"{name}/out", output(tmp_path / f"{source.name}.npz", name))


def test_orbax_damaged(tmp_path):
    pytest.importorskip("tensorstore")
    shutil.copytree(T2I / "nopre_jax", tmp_path / "x")
    for f in (tmp_path / "x" / "checkpoint" / "ocdbt.process_0" / "d").iterdir():
        f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    with pytest.raises(MlxSfError, match="cannot be read"):
        convert(tmp_path / "x", tmp_path / "x.npz", **JAX["nopre"])
    assert not (tmp_path / "x.npz").exists()


def test_through_the_command_line(tmp_path):
    ran = run_cli("convert", T2I / "small_jax", tmp_path / "x.npz", "--img-size", 32, "--text-length", 7, "--verify")
    assert ran.returncode == 0, ran.stderr
    assert "verified model" in ran.stdout
    assert "text places 7" in ran.stdout
    ran = run_cli("convert", T2I / "nopre_checkpoint_000002.pt", tmp_path / "y.npz", "--num-classes", 3)
    assert ran.returncode == 1
    assert "--num-classes is no setting of MiniT2I, want none but --img-size, --text-length" in ran.stderr
    ran = run_cli("convert", PLACES["small"], tmp_path / "z.npz", "--text-length", 9)
    assert "flag --text-length says text_length 9, but the file's config.json says 7" in ran.stderr


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(bits, tmp_path):
    report = convert(PLACES["hd64"], tmp_path / "x.safetensors", quantize=bits)
    assert report.config.quantization.layers == ("attention", "feed_forward")
    assert verify_checkpoint(tmp_path / "x.safetensors")
    want = arrays("forward.npz")["hd64/out"]
    error = np.asarray(output(tmp_path / "x.safetensors", "hd64")) - want
    assert error.std() < (0.02 if bits == 8 else 0.25) * want.std()
    convert(PLACES["hd64"], tmp_path / "float.safetensors")
    convert(tmp_path / "float.safetensors", tmp_path / "again.npz", quantize=bits)
    np.testing.assert_array_equal(
        np.asarray(output(tmp_path / "again.npz", "hd64")), np.asarray(output(tmp_path / "x.safetensors", "hd64"))
    )


def test_files_that_do_not_fit(tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(PLACES["nopre"], folder)
    weights, config = folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "transformer/config.json"
    tensors, said = mx.load(str(weights)), json.loads(config.read_text())

    def refused(message, settings=None, **changes):
        mx.save_safetensors(str(weights), {k: v for k, v in {**tensors, **changes}.items() if v is not None})
        config.write_text(json.dumps({**said, **(settings or {})}))
        with pytest.raises(MlxSfError, match=message):
            convert(folder, tmp_path / "x.npz")
        assert not (tmp_path / "x.npz").exists()

    key = "model.net.double_blocks.1.img_mlp.w2.weight"
    refused("lacks 'double_blocks.1.img_mlp.w2.weight'", **{key: None})
    refused("has 'double_blocks.1.gate'", **{"model.net.double_blocks.1.gate": mx.zeros(3)})
    refused("holds NaN or infinite values", **{key: mx.full(tensors[key].shape, float("nan"))})
    refused(r"has shape \(3, 3\), want", **{key: mx.zeros((3, 3))})
    refused("config.json says hidden_size 32, but the file's shapes say 16", {"hidden_size": 32})
    refused("patch_size is 8, want a divisor of img_size 20", {"image_size": 20})


def test_what_info_says():
    for source, words in (
        (PLACES["small"], "mmjit"),
        (T2I / "nopre_export.pt", "state_dict"),
        (T2I / "nopre_checkpoint_000002.pt", "ema"),
    ):
        ran = run_cli("info", source)
        assert ran.returncode == 0, ran.stderr
        assert words in ran.stdout
    pytest.importorskip("tensorstore")
    told = run_cli("info", T2I / "small_jax").stdout
    assert "Orbax" in told
    assert "MiniT2I" in told
