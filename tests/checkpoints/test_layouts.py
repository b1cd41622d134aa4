"""Tiny repositories in the layouts of the Hub: equal to golden numbers, and refused for what they say."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_sf
from mlx_sf.checkpoints.load import load_model
from mlx_sf.checkpoints.resolve import resolve
from mlx_sf.errors import MlxSfError
from tests.helpers import GOLDEN, run_cli

HUB = GOLDEN / "hub"
LAYOUTS = ["native", "sharded", "wrapped", "fdloss"]
SETTINGS = {"wrapped": {"noise_scale": 2.0, "in_context_start": 1}}
TOLERANCE = 2e-5


def expected(name: str) -> tuple[dict, dict]:
    return json.loads((HUB / "expected" / f"{name}.json").read_text()), dict(np.load(HUB / "expected" / f"{name}.npz"))


def asked(labels: np.ndarray, classes: int) -> list[int | None]:
    return [None if y == classes else int(y) for y in labels]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_network_equals_golden_numbers(name):
    about, want = expected(name)
    network, config = load_model(resolve(HUB / name, SETTINGS.get(name)))
    model = dict(about["model"])
    assert model.pop("spectral_forcing") is (config.model.forcing is not None)
    assert {k: getattr(config.model, k) for k in model} == model
    assert config.flow.noise_scale == about["sampling"]["noise_scale"]
    out = network(mx.array(want["x"]), mx.array(want["t"]), network.condition(asked(want["y"], model["num_classes"])))
    error = np.abs(np.array(out) - want["out"]).max() / np.abs(want["out"]).max()
    assert error < TOLERANCE


def solver_flags(name: str, about: dict) -> list[str]:
    s = about["sampling"]
    flags = [] if name == "fdloss" else ["--steps", str(s["steps"]), "--cfg", str(s["cfg"]), "--method", s["method"]]
    low, high = s["cfg_interval"]
    given = {k: str(v) for k, v in SETTINGS.get(name, {}).items()}
    return [*flags, "--cfg-interval", str(low), str(high), *(w for k, v in given.items() for w in (_flag(k), v))]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_samples(name: str, ckpt: str, folder: Path, env: dict[str, str] | None = None) -> str:
    """Draw the golden samples through the command line; returns what it said."""
    about, want = expected(name)
    np.save(folder / "noise.npy", want["noise"])
    classes = ",".join("null" if c is None else str(c) for c in asked(want["labels"], about["model"]["num_classes"]))
    words = ["sample", "--ckpt", ckpt, "--classes", classes, "--noise", str(folder / "noise.npy")]
    done = run_cli(*words, "-o", str(folder / "x.npy"), *solver_flags(name, about), "--dtype", "float32", env=env)
    assert done.returncode == 0, done.stderr
    error = np.abs(np.load(folder / "x.npy") - want["samples"]).max() / np.abs(want["samples"]).max()
    assert error < TOLERANCE
    return done.stderr


@pytest.mark.parametrize("name", LAYOUTS)
def test_command_line_draws_the_golden_samples(name, tmp_path):
    said = check_samples(name, str(HUB / name), tmp_path, {"MLX_SF_CACHE": str(tmp_path / "cache")})
    assert "converted once" in said
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 1


def test_python_draws_from_a_folder_and_names_come_with_it():
    jit = mlx_sf.load(HUB / "native")
    assert jit.config.class_names[1] == "goldfish, Carassius auratus"
    _, want = expected("native")
    pictures = jit.sample([int(want["labels"][0])], noise=want["noise"][:1], steps=4, cfg=2.0)
    assert len(pictures) == 1


def copy_of(name: str, to: Path) -> Path:
    shutil.copytree(HUB / name, to, copy_function=shutil.copyfile)
    for p in [to, *to.rglob("*")]:
        p.chmod(0o755 if p.is_dir() else 0o644)
    return to


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_converted_once_and_again_when_it_changes(tmp_path, capsys):
    model = copy_of("native", tmp_path / "m")
    first = resolve(model)
    stamp = first.stat().st_mtime_ns
    assert resolve(model) == first
    assert first.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err.count("converted once") == 1
    change(model / "transformer" / "config.json", in_context_start=2)
    second = resolve(model)
    assert second != first
    assert load_model(second)[1].model.in_context_start == 2


def test_single_file_and_other_folders_hold_the_same(tmp_path):
    model = copy_of("native", tmp_path / "m")
    (model / "transformer").rename(model / "generator")
    weights = model / "generator" / "diffusion_pytorch_model.safetensors"
    want = load_model(resolve(HUB / "native"))[1].model
    assert load_model(resolve(model))[1].model == want
    assert load_model(resolve(weights))[1].model == want
    alone = tmp_path / "alone.safetensors"
    shutil.copyfile(weights, alone)
    with pytest.raises(MlxSfError, match="neither .* say noise_scale, in_context_start"):
        resolve(alone)
    assert load_model(resolve(alone, {"noise_scale": 1.0, "in_context_start": 1}))[1].model.depth == want.depth


def test_a_shift_is_not_taken_and_said(tmp_path, capsys):
    model = copy_of("native", tmp_path / "m")
    change(model / "scheduler" / "scheduler_config.json", shift=4.0)
    assert load_model(resolve(model))[1].sample.shift == 1.0
    assert "its scheduler's shift 4.0 is another time grid than the published one: not taken" in capsys.readouterr().err


def test_refusals(tmp_path):
    def refused(message: str, settings: dict | None = None, base: str = "native", **changes: dict) -> None:
        model = copy_of(base, tmp_path / str(len(list(tmp_path.iterdir()))))
        for file, values in changes.items():
            change(next(model.rglob(f"{file}.json")), **values)
        with pytest.raises(MlxSfError, match=message):
            resolve(model, settings)

    refused("is a JiTPipeline with vae: this program knows JiT", model_index={"vae": ["diffusers", "AutoencoderKL"]})
    refused("config.json says hidden_size 64, but the file's shapes say 32", config={"hidden_size": 64})
    refused("flag in_context_start says .* 3, but the file's config.json says 1", {"in_context_start": 3})
    refused("it calls itself FluxTransformer2DModel: this program knows JiT",
            config={"_class_name": "FluxTransformer2DModel", "num_layers": 9})  # fmt: skip


def test_network_of_another_kind_is_named(tmp_path):
    from mlx_sf.formats.tensor_file import Entry, write_tensor_file

    folder = tmp_path / "flux" / "transformer"
    folder.mkdir(parents=True)
    entry = Entry.of("double_blocks.0.img_attn.qkv.weight", np.zeros((4, 4), np.float32))
    write_tensor_file(folder / "diffusion_pytorch_model.safetensors", [entry], "")
    data = (folder / "diffusion_pytorch_model.safetensors").read_bytes().replace(b'"config"', b'"c0nfig"')
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(MlxSfError, match="it calls itself FluxTransformer2DModel: this program knows JiT in pixels"):
        resolve(tmp_path / "flux")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\x00"])
def test_malicious_json_is_one_line(text, tmp_path):
    model = copy_of("native", tmp_path / "m")
    (model / "transformer" / "config.json").write_text(text)
    with pytest.raises(MlxSfError, match="config.json: (not valid JSON|holds a list, want an object)"):
        resolve(model)


def test_an_index_never_leads_out_of_its_folder(tmp_path):
    model = copy_of("sharded", tmp_path / "m")
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    for place in ("../../secret.safetensors", "/etc/passwd", "..", ""):
        data["weight_map"][next(iter(data["weight_map"]))] = place
        index.write_text(json.dumps(data))
        with pytest.raises(MlxSfError, match="want a .safetensors file beside it"):
            resolve(model)


def test_settings_of_an_own_checkpoint_are_its_own():
    with pytest.raises(MlxSfError, match="says its settings itself: leave out noise_scale"):
        resolve(GOLDEN / "v0_2" / "forced.safetensors", {"noise_scale": 2.0})
