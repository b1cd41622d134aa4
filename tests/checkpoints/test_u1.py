"""SenseNova-U1's files: read where they lie, converted shard by shard, refused in one line where they do not fit."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.checkpoint import Checkpoint
from mlx_sf.checkpoints.conversion import convert
from mlx_sf.checkpoints.load import load_model, verify_checkpoint
from mlx_sf.checkpoints.resolve import resolve
from mlx_sf.checkpoints.u1_files import text_entries
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.tensor_file import Entry, TensorFile, write_tensor_file
from tests.helpers import ROOT, run_cli
from tests.u1 import FIRST, NETWORKS, OFFICIAL, PROMPTS, arrays, checkpoint, close, given


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def output(path, name):
    opened = Checkpoint(resolve(path))
    x = mx.array(arrays(f"{name}_parts")["in/fwd_image"])
    opened.config = opened.config.at(*x.shape[2:])
    model = load_model(opened)[0]
    model.features = given(name)
    return model(x, mx.array([0.3]), model.condition([""]))


def flat(x, name):
    from tests.u1 import tokens

    return tokens(x, checkpoint(name).config.model.token_size)


@pytest.mark.parametrize("name", NETWORKS)
def test_read_where_it_lies(name, tmp_path):
    for place in (FIRST / name, FIRST / name / "model.safetensors.index.json"):
        assert resolve(place) == FIRST / name / "model.safetensors.index.json"
    close(f"{name}_parts", "fwd/x_pred", flat(output(FIRST / name, name), name))
    assert not (tmp_path / "cache" / "converted").exists()
    config = checkpoint(name).config
    s = config.sample
    assert (s.method, s.steps, s.cfg, s.t_eps, s.shift, s.cfg_low, s.cfg_high) == ("euler", 50, 4, 0.02, 3, 0, 1)
    assert (config.flow.t_eps, config.flow.P_mean, config.flow.P_std) == (0.05, -0.8, 0.8)


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_floats(name, suffix, tmp_path):
    report = convert(FIRST / name, tmp_path / f"x{suffix}", dtype="float32")
    close(f"{name}_parts", "fwd/x_pred", flat(output(tmp_path / f"x{suffix}", name), name))
    assert report.ignored
    held = text_entries(Checkpoint(resolve(tmp_path / f"x{suffix}")).file.entries)
    assert len(held) == len(text_entries(checkpoint(name).file.entries))
    assert {e.dtype for e in held if "proj" in e.name} == {"bfloat16"}  # the understanding side keeps its type


# largest error of x_pred, relative to its root mean square; measured at most 1.1 and 21 per cent
@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_quantised(name, bits, most, tmp_path):
    # rows of 48, 80 and 96 are filled up to the group's 64
    report = convert(FIRST / name, tmp_path / "x", quantize=None if bits == 8 else bits)
    assert report.config.quantization.bits == bits
    assert report.config.quantization.group_size == 64
    assert report.config.quantization.layers == ("attention", "feed_forward")
    assert any(("8 bits, the default" if bits == 8 else "4 bits: two ports") in note for note in report.notes)
    entries = Checkpoint(resolve(tmp_path / "x")).file.entries
    assert entries["layers.0.mlp.up_proj.weight"].dtype == "uint32"
    assert entries["dense_embedding.weight"].dtype == "bfloat16"
    assert entries["norm.weight"].dtype == "float32"
    want = arrays(f"{name}_parts")["fwd/x_pred"]
    error = (flat(output(tmp_path / "x", name), name) - want).std() / want.std()
    assert 0 < error < most
    # from a copy in floats the same
    convert(FIRST / name, tmp_path / "floats", dtype="float32")
    convert(tmp_path / "floats", tmp_path / "again", quantize=bits, dtype="bfloat16")
    again = flat(output(tmp_path / "again", name), name)
    np.testing.assert_array_equal(again, flat(output(tmp_path / "x", name), name))
    assert text_entries(Checkpoint(resolve(tmp_path / "again")).file.entries)
    print(f"{name} {bits} bits: {error:.4f}")
    with pytest.raises(MlxSfError, match=f"holds {bits}-bit weights"):
        convert(tmp_path / "x", tmp_path / "y", quantize=8)


def test_pictures_of_a_converted_copy(tmp_path):
    """Everything that a picture needs went along: prompts, too."""
    (tmp_path / "s.txt").write_text(PROMPTS["mlp"]["system"])
    np.save(tmp_path / "noise.npy", arrays("mlp_parts")["in/noise_wide"])
    env = {"MLX_SF_CACHE": str(tmp_path / "cache"), "MLX_ENABLE_TF32": "0"}
    ran = run_cli("convert", FIRST / "mlp", tmp_path / "x", "--dtype", "float32", "--verify", env=env)
    assert ran.returncode == 0, ran.stderr
    assert "verified model" in ran.stdout
    ran = run_cli(
        "sample", "--ckpt", tmp_path / "x", "--system-message", tmp_path / "s.txt", "--noise", tmp_path / "noise.npy",
        "--prompt", PROMPTS["mlp"]["prompt"], "--height", 32, "--width", 64, "--steps", 4,
        "-o", tmp_path / "x.npy", env=env,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    close("mlp_sampling", "wide_none/final", np.load(tmp_path / "x.npy"))
    told = run_cli("info", tmp_path / "x", env=env).stdout
    assert "sensenova_u1" in told
    assert verify_checkpoint(tmp_path / "x")


def test_rows_are_read_alone(tmp_path):
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    write_tensor_file(tmp_path / "x.safetensors", [Entry.of("a", mx.array(table).astype(mx.bfloat16))], "x")
    e = TensorFile(tmp_path / "x.safetensors").entries["a"]
    np.testing.assert_array_equal(np.asarray(e.rows(np.array([7, 2])).astype(mx.float32)), table[[7, 2]])


# ------------------------------------------------------------------------------------------------ refusals


def copied(tmp_path, name="mlp"):
    folder = tmp_path / "copy"
    shutil.copytree(FIRST / name, folder)
    return folder


def config_of(folder, change):
    path = folder / "config.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["llm_config"].update(num_experts=128), "sparse mixture of experts"),
        (lambda c: c["llm_config"].update(model_type="qwen3_moe"), "sparse mixture of experts"),
        (lambda c: c.update(use_adaLN=True), "use_adaLN is True, want False"),
        (lambda c: c.update(concat_time_token_num=1), "concat_time_token_num is 1"),
        (lambda c: c.update(fm_head_layers=6), "fm_head_layers is 6"),
        (lambda c: c["llm_config"].update(attention_bias=True), "llm_config.attention_bias is True"),
        (lambda c: c.pop("noise_scale_mode"), "does not say noise_scale_mode"),
        (lambda c: c.pop("noise_scale_max_value"), "does not say noise_scale_max_value"),
        (lambda c: c["llm_config"].pop("head_dim"), "does not say llm_config.head_dim"),
        (lambda c: c.update(use_pixel_head=True), "says use_pixel_head True, its weights have a linear head"),
        (lambda c: c["llm_config"].update(num_hidden_layers=4), "lacks 'language_model.model.layers.3"),
        (lambda c: c["llm_config"].update(hidden_size=48), "want floats of shape"),
        (lambda c: c["llm_config"].update(num_key_value_heads=3), "num_kv_heads is 3, want a divisor"),
        (lambda c: c.update(patch_size="x"), "patch_size is 'x', want a whole number"),
        (lambda c: c.update(t_eps=-1), "t_eps is -1"),
    ],
)
def test_configurations_of_other_networks(change, message, tmp_path):
    folder = copied(tmp_path)
    config_of(folder, change)
    with pytest.raises(MlxSfError, match=message):
        Checkpoint(resolve(folder))


def test_scales_that_are_lists_or_numbers(tmp_path):
    folder = copied(tmp_path)
    config_of(folder, lambda c: c["vision_config"].update(downsample_ratio=[0.5], llm_hidden_size=[64]))
    close("mlp_parts", "fwd/x_pred", flat(output(folder, "mlp"), "mlp"))


def test_shards_that_do_not_fit(tmp_path):
    folder = copied(tmp_path)
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    told, data = json.loads(index.read_text()), shard.read_bytes()

    def refused(message):
        with pytest.raises(MlxSfError, match=message):
            convert(folder, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("copy", "cache")) == []

    shard.unlink()
    refused("model-00002-of-00003.safetensors: this shard of model.safetensors.index.json is missing")
    shard.write_bytes(data[:-1000])
    refused("its header promises .* truncated or not completely downloaded")
    os.rename(shard, folder / "renamed.safetensors")
    refused("is missing")
    shard.write_bytes(data)
    (folder / "renamed.safetensors").unlink()
    tensors = mx.load(str(shard))
    key = next(k for k in tensors if "layers.1.mlp_mot_gen.up_proj" in k)

    def saved(**changes):
        mx.save_safetensors(str(shard), {k: v for k, v in {**tensors, **changes}.items() if v is not None})

    saved(**{key: tensors[key].astype(mx.int32)})
    refused("is int32 .* want floats of shape")
    saved(**{key: None})
    refused("lacks tensor 'language_model.model.layers.1.mlp_mot_gen.up_proj")
    saved(**{key: mx.full(tensors[key].shape, float("nan"), mx.bfloat16)})
    refused("holds NaN or infinite values")
    saved(**{key: mx.zeros((3, 3))})
    refused(r"is \(3, 3\), want floats of shape \(96, 64\)")
    # types differ from tensor to tensor: each is read from its own header
    saved(**{key: tensors[key].astype(mx.float32)})
    close("mlp_parts", "fwd/x_pred", flat(output(folder, "mlp"), "mlp"))
    shard.write_bytes(data)
    for place in ("../x.safetensors", "/etc/passwd", "sub/x.safetensors"):
        index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], key: place}}))
        refused("want a .safetensors file beside it")
    index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], "model.gate": shard.name}}))
    refused("lacks tensor 'model.gate'")
    index.unlink()
    refused("want exactly one")


def test_keys_too_many(tmp_path):
    folder = copied(tmp_path)
    index, shard = folder / "model.safetensors.index.json", folder / "model-00003-of-00003.safetensors"
    mx.save_safetensors(str(shard), {**mx.load(str(shard)), "fm_modules.gate.weight": mx.zeros(3)})
    told = json.loads(index.read_text())
    told["weight_map"]["fm_modules.gate.weight"] = shard.name
    index.write_text(json.dumps(told))
    with pytest.raises(MlxSfError, match="holds 'fm_modules.gate.weight', which is not part"):
        Checkpoint(resolve(folder))


def test_a_full_disk(tmp_path):
    """A limit on a file's size stands for it: nothing stays behind."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from mlx_sf.cli import main; main(sys.argv[1:])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "convert", str(FIRST / "mlp"), str(tmp_path / "x")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "cannot be written" in ran.stderr
    assert ran.stderr.count("error:") == 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_without_a_tokenizer(tmp_path):
    ran = run_cli(
        "sample", "--ckpt", OFFICIAL / "mlp", "--prompt", "x", "--height", 32, "--width", 32, "--offline",
        "-o", tmp_path / "out", env={"MLX_SF_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert ran.returncode == 1
    assert "lacks vocab.json, merges.txt, added_tokens.json: prompts cannot be read" in ran.stderr
    assert "note: without the published system message" in ran.stderr


def test_adapters_that_do_not_fit(tmp_path):
    from mlx_sf.checkpoints.adapters import read_adapter

    model = checkpoint("official/mlp").config.model
    tensors = mx.load(str(OFFICIAL / "mlp" / "lora.safetensors"))
    key = "fm_modules.fm_head.0"

    def refused(message, **changes):
        path = tmp_path / "x.safetensors"
        mx.save_safetensors(str(path), {k: v for k, v in {**tensors, **changes}.items() if v is not None})
        with pytest.raises(MlxSfError, match=message):
            read_adapter(path, model)

    refused("has no lora_up.weight", **{f"{key}.lora_up.weight": None})
    refused("want .* of another model", **{f"{key}.lora_up.weight": mx.zeros((3, 2))})
    refused("is no lora_down, lora_up or alpha", **{f"{key}.dora_scale": mx.zeros(3)})
    odd = {f"fm_modules.x.{part}.weight": mx.zeros((2, 2)) for part in ("lora_up", "lora_down")}
    refused("has no linear layer 'fm_modules.x'", **odd)
    refused("holds NaN", **{f"{key}.lora_up.weight": mx.full((40, 2), float("nan"))})
    # prefixes and ranks differ from program to program
    named = {f"diffusion_model.{k}": v for k, v in tensors.items()}
    down = named[f"diffusion_model.{key}.lora_down.weight"]
    named[f"diffusion_model.{key}.lora_down.weight"] = mx.concatenate([down, mx.zeros((3, 64))])
    up = named[f"diffusion_model.{key}.lora_up.weight"]
    named[f"diffusion_model.{key}.lora_up.weight"] = mx.concatenate([up, mx.zeros((40, 3))], axis=1) * 2.5
    mx.save_safetensors(str(tmp_path / "y.safetensors"), named)
    one, other = (read_adapter(p, model) for p in (OFFICIAL / "mlp" / "lora.safetensors", tmp_path / "y.safetensors"))
    assert (one.lora.rank, other.lora.rank) == (2, 5)
    for layer in one.lora.targets:
        a, b = ((t.tensors[layer + ".lora_B.weight"] @ t.tensors[layer + ".lora_A.weight"]) for t in (one, other))
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)


def test_an_adapter_of_the_understanding_side(tmp_path):
    """It changes the prefixes, and is refused where it would be all."""
    from mlx_sf.checkpoints.adapters import read_adapter
    from mlx_sf.checkpoints.features import features_of

    opened = checkpoint("mlp")
    layer, own = "language_model.model.layers.0.self_attn.k_proj", "language_model.model.layers.0.mlp_mot_gen.up_proj"
    pair = {f"{layer}.lora_down.weight": mx.ones((1, 64)), f"{layer}.lora_up.weight": 0.01 * mx.ones((64, 1))}
    mx.save_safetensors(str(tmp_path / "text.safetensors"), pair)
    with pytest.raises(MlxSfError, match="adapts the understanding side alone"):
        read_adapter(tmp_path / "text.safetensors", opened.config.model)
    pair |= {f"{own}.lora_down.weight": mx.zeros((1, 64)), f"{own}.lora_up.weight": mx.zeros((96, 1))}
    mx.save_safetensors(str(tmp_path / "both.safetensors"), pair)
    adapter = read_adapter(tmp_path / "both.safetensors", opened.config.model)
    (tmp_path / "s.txt").write_text("")
    plain, changed = (features_of(opened, message=tmp_path / "s.txt", adapters=a)(["x"])[0] for a in ((), (adapter,)))
    assert mx.abs(plain.keys[0] - changed.keys[0]).max().item() > 0.01
    np.testing.assert_array_equal(np.asarray(plain.values[0]), np.asarray(changed.values[0]))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_peaks_of_both_phases(tmp_path):
    """A network of 3.8 GB: each phase's peak stays below its plan."""
    command = [sys.executable, ROOT / "scripts" / "u1_memory.py", tmp_path / "network"]
    env = {**os.environ, "MLX_SF_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3000, check=True)
    found = json.loads(ran.stdout)
    first, second = found["first"], found["second"]
    assert first["mlx"] <= first["prefixes"] + 2 * first["layer"]
    assert first["process_above_start"] <= first["planned"]
    assert second["mlx"] <= second["planned"]
