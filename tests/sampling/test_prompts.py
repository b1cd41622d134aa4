"""Text to image, sampled: the authors' trajectories, settings and whole pipeline; prompts from flags and files."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mlx_sf
from mlx_sf.errors import MlxSfError
from mlx_sf.models.mmjit import MMJiT, MMJiTConfig
from mlx_sf.sampling.guidance import guidance_at
from mlx_sf.sampling.prompts import read_prompts
from mlx_sf.sampling.request import prompt_request
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig, grid_of
from mlx_sf.spectral import ForcingConfig
from tests.helpers import run_cli
from tests.minit2i import PLACES, SECOND, SETTINGS, T2I, arrays, close, given_prompts, network, tolerances

E2E = json.loads((T2I / "e2e.json").read_text())


def sample_config(s):
    """The settings of a case, by our names."""
    low, high = s["interval"]
    method = "euler" if s["method"] == "euler-4e-2" else s["method"]
    last = 0.04 if s["method"] == "euler-4e-2" else 0.0
    config = SampleConfig(method, s["steps"], s["guidance_scale"], low, high, s["t_floor"], cfg_closed=True)
    return replace(config, last_step=last)


@pytest.mark.parametrize("case", list(SETTINGS["sampling"]))
def test_trajectories(case, monkeypatch):
    s, a = SETTINGS["sampling"][case], arrays("sample.npz")
    model, config = network(s["model"])
    sample = sample_config(s)
    np.testing.assert_allclose(grid_of(sample), a[f"{case}/times"], atol=2e-7)
    if f"{case}/guided" in a:
        scale = [guidance_at(t, 2.0, sample.cfg_low, sample.cfg_high, True) for t in a[f"{case}/times"][:-1]]
        np.testing.assert_array_equal(np.array(scale) == 2, a[f"{case}/guided"].astype(bool))
    prompts = given_prompts(model, a[f"{s['model']}/context"], a[f"{s['model']}/mask"], monkeypatch)
    sampler = Sampler(model, config.flow, sample)
    for state in sampler.states(mx.array(a[f"{s['model']}/noise"]), prompts):
        if state.step in s["states_after"]:
            close("sample.npz", f"{case}/z_after_{state.step}", state.z)


@pytest.mark.parametrize("name", "abcd")
def test_trajectories_second_set(name, monkeypatch):
    model, config = network(name)
    file = f"second/mmjit/{name}/golden.npz"
    a, info = arrays(file), json.loads((T2I / file).with_name("golden.json").read_text())
    prompts = given_prompts(model, a["context"][:2], a["traj_mask"], monkeypatch)
    for run in info["runs"]:
        low, high = run["interval"]
        sample = SampleConfig("euler", run["steps"], run["scale"], low, high, run["clamp"], cfg_closed=True)
        states = [2 * a["noise"]]
        states += [np.asarray(x.z) for x in Sampler(model, config.flow, sample).states(mx.array(a["noise"]), prompts)]
        if f"traj_{run['name']}_states" in a:
            close(file, f"traj_{run['name']}_states", np.stack(states))
        close(file, f"traj_{run['name']}_final", states[-1])
        pixels = mlx_sf.models.architecture(config.model).to_uint8(states[-1]).astype(int)
        different = np.abs(pixels - a[f"traj_{run['name']}_uint8"])
        assert different.max() <= 1
        assert (different > 0).mean() <= 0.001
    # the training repository's own sampler: all times guided, its end clipped
    sample = SampleConfig("euler", 5, 3.0, 0.0, 1.0, 0.05, cfg_closed=True)
    *_, last = Sampler(model, config.flow, sample).states(mx.array(a["noise"]), prompts)
    close(file, "train_sampler_final", mx.clip(last.z, -1, 1))


def test_forced_trajectory(monkeypatch):
    model, config = network("small")
    forced = MMJiT(MMJiTConfig(**{**config.model.__dict__, "forcing": ForcingConfig()}))
    forced.update(model.parameters())
    a = arrays("sample.npz")
    prompts = given_prompts(forced, a["small/context"], a["small/mask"], monkeypatch)
    sample = SampleConfig("euler", 6, 3.0, 0.0, 1.0, 0.05, cfg_closed=True)
    for state in Sampler(forced, config.flow, sample).states(mx.array(a["small/noise"]), prompts):
        if state.step in (1, 3, 6):
            close("forced.npz", f"small/z_after_{state.step}", state.z)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_or_not(compiled, monkeypatch):
    s, a = SETTINGS["sampling"]["hd52_00"], arrays("sample.npz")
    model, config = network("hd52")
    prompts = given_prompts(model, a["hd52/context"], a["hd52/mask"], monkeypatch)
    sampler = Sampler(model, config.flow, sample_config(s), compiled)
    *_, last = sampler.states(mx.array(a["hd52/noise"]), prompts)
    close("sample.npz", "hd52_00/z_after_6", last.z)


@pytest.mark.parametrize("converted", [False, True])
def test_the_whole_pipeline_through_the_command_line(converted, tmp_path):
    env = {"MLX_SF_CACHE": str(tmp_path / "cache"), "MLX_ENABLE_TF32": "0"}
    ckpt = PLACES["e2e"]
    if converted:
        ckpt = tmp_path / "e2e.npz"
        assert run_cli("convert", PLACES["e2e"], ckpt, "--verify", env=env).returncode == 0
    for case in "pq" if converted else "p":
        s = E2E["cases"][case]
        np.save(tmp_path / "noise.npy", arrays("e2e.npz")[f"{case}/noise"])
        prompts = [x for p in E2E["prompts"] for x in ("--prompt", p)]
        command = ["sample", "--ckpt", ckpt, "--text-encoder", T2I / "t5", *prompts, "--noise", tmp_path / "noise.npy"]
        command += ["--steps", s["steps"], "--cfg", s["guidance_scale"], "--sample-t-eps", s["t_floor"]]
        ran = run_cli(*command, "--output", tmp_path / f"{case}.npy", env=env)
        assert ran.returncode == 0, ran.stderr
        close("e2e.npz", f"{case}/sample", np.load(tmp_path / f"{case}.npy"))
    ran = run_cli(*command, "--output", tmp_path / "pictures", "--grid", "--stepwise", env=env)
    assert ran.returncode == 0, ran.stderr
    values, tolerance = arrays("e2e.npz")[f"{case}/sample"], tolerances("e2e.npz")[f"{case}/sample"]
    for i in range(3):
        with Image.open(tmp_path / "pictures" / f"{i:05d}.png") as picture:
            off = np.abs(np.asarray(picture).astype(int) - arrays("e2e.npz")[f"{case}/uint8"][i])
        steps = 127.5 * values[i].transpose(1, 2, 0) + 128
        assert not off[np.abs(steps - np.round(steps)) > 127.5 * tolerance].any()
        assert off.max() <= 1
    assert (tmp_path / "pictures" / "00002_steps.png").exists()
    told = run_cli("info", tmp_path / "pictures" / "00001.png").stdout
    assert E2E["prompts"][1] in told
    assert "t_eps         0.05" in told


def test_the_whole_pipeline_second_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    file = "second/e2e/golden.npz"
    a, info = arrays(file), json.loads((T2I / file).with_name("golden.json").read_text())
    folder = tmp_path / "encoder"  # the parts of this set are in folders of their own
    folder.mkdir()
    for source in (SECOND / "t5" / "a", SECOND / "tokenizer"):
        for f in source.iterdir():
            if f.name in ("config.json", "model.safetensors", "tokenizer.json"):
                (folder / f.name).symlink_to(f)
    model = mlx_sf.load(SECOND / "mmjit" / "a", text_encoder=folder, dtype="float32")
    settings = {"steps": info["steps"], "cfg": info["scale"], "sample_t_eps": info["clamp"]}
    *_, last = model.states(info["prompts"], noise=a["noise"], **settings)
    close(file, "final", last.z)
    pictures = model.sample(info["prompts"], noise=a["noise"], **settings)
    off = np.abs(np.stack([np.asarray(p) for p in pictures]).astype(int) - a["uint8"])
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.005


def test_pictures_of_each_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    model = mlx_sf.load(PLACES["e2e"], text_encoder=T2I / "t5")
    pictures = model.sample(["a cat", "a dog  "], num_images=2, steps=2, seed=5)
    alone = model.sample("a dog", steps=2, seed=7)
    assert len(pictures) == 4
    np.testing.assert_array_equal(np.asarray(pictures[2]), np.asarray(alone[0]))
    assert pictures[3].settings["prompt"] == "a dog"
    assert pictures[3].settings["seed"] == 8
    assert prompt_request(["a", "b"], 3, 0, (4, 4)).columns == 3
    # the empty prompt is not "no prompt"
    empty, none = (model.network.condition([p]) for p in ("", None))
    assert empty["mask"].sum().item() == 1
    assert none["mask"].sum().item() == 0


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeffa cat \r\n\n  {"tag": "colors", "prompt": "a red dog"}\n  two  words\n', encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a red dog", "  two  words"]
    for data, message in (
        (b"a\nb\xff\n", r"line 2: is not UTF-8 \(byte 2\)"),
        (b'a\n\n{"prompt": 3}\n', r"line 3: begins with \{ and is no JSON object"),
        (b"{oops\n", "line 1: begins with"),
        (b"a\0b", "line 1: holds a zero byte"),
        (b"\n \n", "holds no prompt"),
    ):
        path.write_bytes(data)
        with pytest.raises(MlxSfError, match=message):
            read_prompts(path)
    with pytest.raises(MlxSfError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1), min_size=1, max_size=5)
)
def test_any_text_is_a_prompt(tmp_path_factory, lines):
    lines = [f"x{line}" for line in lines]
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(path) == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing: this model draws what a text says"),
        (["--classes", "3"], "draws prompts, not classes: use --prompt"),
        (["--prompt", "x", "--width", "512"], "16 x 512 pixels, but MiniT2I draws 16 x 16 only"),
        (["--prompt", "x", "--text-encoder", str(SECOND / "t5" / "a")], "its folder lacks tokenizer.json"),
        (
            ["--prompt", "x", "--offline"],
            "text encoder google/flan-t5-large: no file or folder here, is not in the cache",
        ),
        (["--prompt", "x", "--text-encoder", "{}"], "gives 32 numbers a token, this network reads 20"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_requests_that_cannot_be(arguments, message, tmp_path):
    ckpt = PLACES["small"] if "{}" in arguments else PLACES["e2e"]
    arguments = [str(T2I / "t5") if a == "{}" else a for a in arguments]
    env = {"MLX_SF_CACHE": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    ran = run_cli("sample", "--ckpt", ckpt, *arguments, "-o", tmp_path / "out", env=env)
    assert ran.returncode == 1
    assert message in ran.stderr
    assert ran.stderr.count("\n") <= 2  # at most one line beside it, of the conversion
    assert not list((tmp_path / "out").glob("*.png")) if (tmp_path / "out").exists() else True


def test_a_model_of_classes_takes_no_prompts(tmp_path):
    ran = run_cli("sample", "--prompt", "a fish", "-o", tmp_path / "out")
    assert ran.returncode == 1
    assert "draws classes, not prompts: use --classes" in ran.stderr
    ran = run_cli("sample", "--text-encoder", "x", "-o", tmp_path / "out")
    assert "this model takes class numbers and has no text encoder" in ran.stderr
