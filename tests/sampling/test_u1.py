"""SenseNova-U1, drawn: every golden case through the command line; guidance forms, prompts and their cache."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_sf
from mlx_sf.common.pixels import to_uint8
from mlx_sf.errors import MlxSfError
from mlx_sf.sampling.guidance import guide, projection
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig, time_grid
from tests.u1 import (
    CASES,
    FIRST,
    OFFICIAL,
    OFFICIAL_CASES,
    PROMPTS,
    arrays,
    checkpoint,
    close,
    given,
    network,
    official_folder,
    tolerance,
)

FIRST_CASES = [(name, case) for name, cases in CASES.items() for case in cases]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path_factory.getbasetemp() / "u1 cache"))
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def settings(steps, cfg, norm, shift, interval, forced):
    """Flags of a case."""
    flags = ["--steps", steps, "--cfg", cfg, "--cfg-norm", norm, "--shift", shift, "--cfg-interval", *interval]
    return flags + ["--forcing"] * forced


@pytest.mark.parametrize("name, case", FIRST_CASES)
def test_first_set_through_the_command_line(name, case, cli, tmp_path):
    s, noise = CASES[name][case], arrays(f"{name}_parts")["in/" + CASES[name][case]["noise"]]
    (tmp_path / "system.txt").write_text(PROMPTS[name]["system"])
    np.save(tmp_path / "noise.npy", noise)
    flags = settings(s["steps"], s["cfg_scale"], s["cfg_norm"], s["timestep_shift"], s["cfg_interval"], s["sf"])
    status, _, err = cli(
        "sample", "--ckpt", FIRST / name, "--system-message", tmp_path / "system.txt",
        "--prompt", PROMPTS[name]["prompt"], "--num-images", len(noise),
        "--height", noise.shape[2], "--width", noise.shape[3], "--noise", tmp_path / "noise.npy", *flags,
        "--output", tmp_path / "x.npy",
    )  # fmt: skip
    assert status == 0, err
    assert ("ablation" in err) == s["sf"]
    final = np.load(tmp_path / "x.npy")
    close(f"{name}_sampling", f"{case}/final", final)
    if s.get("picture"):
        picture = arrays(f"{name}_sampling")[f"{case}/picture"]
        off = np.abs(to_uint8(final).astype(int) - picture)
        edge = np.abs(np.abs((final + 1) * 127.5 % 1) - 0.5).transpose(0, 2, 3, 1)
        assert off.max() <= 1
        assert not off[edge > 127.5 * tolerance(f"{name}_sampling", f"{case}/final")].any()


@pytest.mark.parametrize("case", list(OFFICIAL_CASES))
def test_official_set_through_the_command_line(case, cli, tmp_path):
    s, name = OFFICIAL_CASES[case], case.split("/")[0]
    prompt = official_folder(tmp_path, name)
    np.save(tmp_path / "noise.npy", arrays("official/sample")[s["noise"]])
    (tmp_path / "none.txt").write_text("")
    status, _, err = cli(
        "sample", "--ckpt", tmp_path, "--system-message", tmp_path / "none.txt", "--prompt", prompt,
        "--num-images", s["batch"], "--height", s["height"], "--width", s["width"], "--noise", tmp_path / "noise.npy",
        *settings(s["steps"], s["cfg"], s["norm"], s["shift"], s["interval"], s["forcing"]),
        "--output", tmp_path / "x.npy",
    )  # fmt: skip
    assert status == 0, err
    close("official/sample", f"{case}/z_after_{s['steps']}", np.load(tmp_path / "x.npy"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["wide_none", "wide_none_sf", "wide_cfg_zero_star"])
def test_traced_cases(case, compiled):
    s, a = CASES["mlp"][case], arrays("mlp_sampling")
    noise = mx.array(arrays("mlp_parts")["in/" + s["noise"]])
    model = network("mlp", noise.shape[2:], s["sf"])
    model.features = given("mlp")
    flow = dataclasses.replace(checkpoint("mlp").config.flow, noise_scale=model.config.noise_at(noise.shape[2:]))
    sample = SampleConfig("euler", s["steps"], 4.0, 0, 1, 0.02, 3.0, s["cfg_norm"], cfg_closed=True)
    close("mlp_sampling", f"{case}/times", time_grid(s["steps"], 3.0))
    sampler, z = Sampler(model, flow, sample, compiled), flow.noise_scale * noise
    alphas = []
    for state in sampler.states(noise, [""]):
        t = mx.array(time_grid(4, 3.0)[state.step - 1 : state.step])
        both = model.guided(z, t, model.condition([""]), model.condition([None]))
        alphas.append(projection(*((x - z) / mx.maximum(1 - t, 0.02) for x in both)).item())
        z = state.z
        if f"{case}/state_{state.step}" in a:
            close("mlp_sampling", f"{case}/state_{state.step}", z)
    close("mlp_sampling", f"{case}/final", z)
    if f"{case}/alpha" in a:
        close("mlp_sampling", f"{case}/alpha", np.array(alphas))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_states_of_the_official_set(name):
    for case in [c for c in OFFICIAL_CASES if c.startswith(name + "/") and OFFICIAL_CASES[c]["steps"] <= 8]:
        s = OFFICIAL_CASES[case]
        noise, place = mx.array(arrays("official/sample")[s["noise"]]), f"official/{name}"
        model = network(place, noise.shape[2:], s["forcing"])
        model.features = given(place)
        flow = dataclasses.replace(checkpoint(place).config.flow, noise_scale=model.config.noise_at(noise.shape[2:]))
        sample = SampleConfig("euler", s["steps"], s["cfg"], *s["interval"], 0.02, s["shift"], s["norm"], True)
        for state in Sampler(model, flow, sample).states(noise, [""] * len(noise)):
            if state.step in s["states"]:
                close("official/sample", f"{case}/z_after_{state.step}", state.z)


def test_guidance_forms():
    """A token and a picture whose guided velocity is shorter than the conditional one: the bound is one-sided."""
    a = arrays("official/model")
    side = 16

    def picture(tokens):  # (B, L, 3 P^2), the tokens in a row
        B, L, _ = tokens.shape
        return mx.array(tokens.reshape(B, L, side, side, 3).transpose(0, 4, 2, 1, 3).reshape(B, 3, side, L * side))

    given_v, without = picture(a["mlp/g_cond"]), picture(a["mlp/g_uncond"])
    for norm in ("none", "global", "channel", "cfg_zero_star"):
        for scale in (4, 1.5):
            v = guide(given_v, without, float(scale), norm, side)
            B, _, H, W = v.shape
            packed = np.asarray(v).reshape(B, 3, H, W // side, side).transpose(0, 3, 2, 4, 1).reshape(B, W // side, -1)
            close("official/model", f"mlp/guidance/{norm}_{scale}", packed)


def test_times_official():
    a = arrays("official/tables")
    for name in [k for k in a if k.startswith("times_")]:
        _, steps, shift = name.split("_")
        np.testing.assert_allclose(time_grid(int(steps), float(shift)), a[name], rtol=0, atol=1.2e-7)
    np.testing.assert_array_equal(to_uint8(np.tile(a["image_values"], (3, 1, 1)))[0, :, 0], a["image_uint8"])


# ------------------------------------------------------------------------------------------------ prompts


def test_prefixes_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    (tmp_path / "s.txt").write_text(PROMPTS["mlp"]["system"])

    def drawn(prompt, **changes):
        model = mlx_sf.load(FIRST / "mlp", height=32, width=32, system_message=tmp_path / "s.txt", **changes)
        return model.sample(prompt, steps=2, seed=3), model.network.features.encoded

    first, computed = drawn("a red cube")
    assert computed == 2  # the prompt, and the empty branch
    again, computed = drawn("a red cube")
    assert computed == 0
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(again[0]))
    # a damaged file is computed again
    for f in (tmp_path / "prefixes").glob("*.safetensors"):
        f.write_bytes(f.read_bytes()[:-9] + b"\0" * 9)
    again, computed = drawn("a red cube")
    assert computed == 2
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(again[0]))
    # white space at a prompt's end counts
    other, computed = drawn("a red cube ")
    assert computed == 1
    assert (np.asarray(first[0]) != np.asarray(other[0])).any()
    # prompts of different length in a batch are what they are alone
    both, _ = drawn(["a red cube", "two cats and a dog on a very long bench"])
    alone = mlx_sf.load(FIRST / "mlp", height=32, width=32, system_message=tmp_path / "s.txt").sample(
        "two cats and a dog on a very long bench", steps=2, seed=4
    )
    assert np.abs(np.asarray(both[1]).astype(int) - np.asarray(alone[0])).max() <= 1
    assert both[0].settings["prompt"] == "a red cube"


def test_the_unconditional_branch_is_not_built_without_guidance(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    (tmp_path / "s.txt").write_text("x")
    model = mlx_sf.load(FIRST / "mlp", height=32, width=32, system_message=tmp_path / "s.txt")
    model.sample("a", steps=1, cfg=1.0)
    assert model.network.features.encoded == 1


def test_adapters_through_the_command_line(cli, tmp_path):
    prompt = official_folder(tmp_path, "mlp")
    (tmp_path / "none.txt").write_text("")
    np.save(tmp_path / "noise.npy", arrays("official/sample")["mlp/noise_64x32_b1"])
    lora = OFFICIAL / "mlp" / "lora.safetensors"
    found = {}
    for how in ([], ["--lora-paths", lora], ["--lora-paths", lora, "--merge-lora"]):
        status, _, err = cli(
            "sample", "--ckpt", tmp_path / "model.safetensors.index.json", "--system-message", tmp_path / "none.txt",
            "--prompt", prompt, "--height", 32, "--width", 64, "--steps", 8, "--cfg", 1,
            "--noise", tmp_path / "noise.npy", *how, "--output", tmp_path / "x.npy",
        )  # fmt: skip
        assert status == 0, err
        found[len(how)] = np.load(tmp_path / "x.npy")
    close("official/sample", "mlp/fast/z_after_8", found[0])
    assert np.abs(found[2] - found[0]).max() > 0.1
    np.testing.assert_allclose(found[2], found[3], atol=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", 0], "--width is 0, want a multiple of 16"),
        (["--width", 33], "--width is 33, want a multiple of 16"),
        (["--height", 100_000], "--height is 100000, want a multiple of 16"),
        (["--prompt", "x " * 10_000], "tokens with its markup, want at most 4096: shorten it"),
        (["--system-message", "nowhere.txt"], "--system-message nowhere.txt: cannot be read"),
        (["--text-encoder", "x"], "--text-encoder: SenseNova-U1 reads prompts itself"),
        (["--noise-scale", 2], "says its settings itself: leave out --noise-scale"),
        (["--classes", "3"], "draws prompts, not classes"),
        (["--lora-paths", "{}"], "is of another model"),
    ],
)
def test_requests_that_cannot_be(arguments, message, refused, tmp_path):
    (tmp_path / "none.txt").write_text("")
    given = [] if "--system-message" in arguments else ["--system-message", tmp_path / "none.txt"]
    given += ["--prompt", "x"] * ("--prompt" not in arguments and "--classes" not in arguments)
    given += [] if "--height" in arguments else ["--height", 32]
    given += [] if "--width" in arguments else ["--width", 32]
    lora = OFFICIAL / "mlp" / "lora.safetensors"
    arguments = [lora if a == "{}" else a for a in arguments]
    place = FIRST / "conv" if lora in arguments else FIRST / "mlp"
    refused(message, "sample", "--ckpt", place, *given, *arguments, "-o", tmp_path / "out")
    assert not list(tmp_path.glob("out/*.png"))


def test_a_model_of_one_size_and_without_messages(refused, tmp_path):
    refused("draws 64 x 64 only: leave them out", "sample", "--width", 32, "-o", tmp_path)
    refused("has none: leave it out", "sample", "--system-message", "x", "-o", tmp_path)
    refused("--dry-run: is about SenseNova-U1", "sample", "--dry-run", "-o", tmp_path)


def test_plans(cli, refused, monkeypatch):
    from mlx_sf.checkpoints import memory_plan

    big = ["sample", "--ckpt", "sensenova/SenseNova-U1-8B-MoT", "--dry-run", "--dtype", "bfloat16"]
    monkeypatch.setattr(memory_plan, "total_memory", lambda: 64 << 30)
    status, out, _ = cli(*big, "--width", 1024, "--height", 1024)
    assert status == 0
    assert "generation side 16.44 GB" in out
    assert "keys and values 0.05 GB" in out
    monkeypatch.setattr(memory_plan, "total_memory", lambda: 16 << 30)
    refused("this machine has 17.18 GB: a copy in 8 bits (`mlx-sf convert`) would fit", *big)
    monkeypatch.setattr(memory_plan, "total_memory", lambda: 1 << 30)
    refused("no way to draw it that this program knows fits", *big)


def test_system_messages(tmp_path, monkeypatch):
    from mlx_sf.checkpoints import system_message as module

    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    text = "Made up.\n\nFor a test."
    monkeypatch.setattr(module, "SHA256", module._digest(text))
    source = tmp_path / "utils.py"
    source.write_text(
        'raise SystemExit  # never run\nSYSTEM_MESSAGE_FOR_GEN = (\n    "Made up.\\n\\n"\n    "For a test."\n)\n'
    )
    found, notes = module.system_message(source=source.as_uri())
    assert found == text
    assert "read from" in notes[0]
    source.unlink()
    assert module.system_message(source=source.as_uri()) == (text, [])  # from the cache
    for f in Path(tmp_path / "cache").rglob("*.txt"):
        f.unlink()
    for content in ("SYSTEM_MESSAGE_FOR_GEN = 'other'", "def (", "X = 1", "SYSTEM_MESSAGE_FOR_GEN = open('x').read()"):
        source.write_text(content)
        found, notes = module.system_message(source=source.as_uri())
        assert found == ""
        assert "pictures lack what the model was trained to expect" in notes[0]
    (tmp_path / "own.txt").write_text(text + "\n")
    assert module.system_message(tmp_path / "own.txt") == (text, [])
    (tmp_path / "own.txt").write_text("mine")
    assert "is not the published system message" in module.system_message(tmp_path / "own.txt")[1][0]
    (tmp_path / "own.txt").write_bytes(b"\xff")
    with pytest.raises(MlxSfError, match="is not UTF-8"):
        module.system_message(tmp_path / "own.txt")


def test_ids():
    from mlx_sf.checkpoints.two_phase import Prefixes
    from mlx_sf.models.bpe import BytePairTokenizer
    from mlx_sf.models.u1_text import rendered

    for name, told in PROMPTS.items():
        files = {f: (FIRST / name / f).read_bytes() for f in ("vocab.json", "merges.txt", "added_tokens.json")}
        tokenizer = BytePairTokenizer(files, name)
        for text, ids in told["bare"].items():
            assert tokenizer(text) == ids, text
        assert tokenizer.ids == told["special_ids"]
        assert rendered(told["prompt"], told["system"]) == told["texts"]["cond"]
        assert rendered(None, told["system"]) == told["texts"]["uncond"]
        features = Prefixes(checkpoint(name), told["system"])
        assert list(features.ids(told["prompt"])) == told["ids"]["cond"]
        assert list(features.ids(None)) == told["ids"]["uncond"]
    good = {"vocab.json": b'{"a": 0, "b": 1, "ab": 2}', "merges.txt": b"a b\n", "added_tokens.json": b'{"<x>": 3}'}
    assert BytePairTokenizer(good, "x")("ab<x>") == [2, 3]
    for changed, message in (
        ({"vocab.json": b"{"}, "vocab.json: not valid JSON"),
        ({"vocab.json": b"[1]"}, "want an object of tokens"),
        ({"merges.txt": b"a c\n"}, "joins 'a' and 'c', which vocab.json lacks"),
        ({"merges.txt": b"a\n"}, "line 1 is 'a', want two tokens"),
        ({"added_tokens.json": b'{"<x>": 2}'}, "token 2 is in vocab.json and in added_tokens.json"),
    ):
        with pytest.raises(MlxSfError, match=message):
            BytePairTokenizer({**good, **changed}, "x")
    assert json.loads((OFFICIAL / "prompt.json").read_text())["uncond_text"] == rendered(None, "x")
