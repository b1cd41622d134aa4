"""The real client of the Hub against a server on 127.0.0.1: fetched, found again, and refused in one line each."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.load import load_model
from tests.checkpoints.test_layouts import HUB, LAYOUTS, check_samples
from tests.helpers import GOLDEN, ROOT, run_cli
from tests.hub_server import HubServer
from tests.minit2i import PLACES, T2I, arrays, text, tolerances

REPO = "someone/JiT-diffusers"
NATIVE = "transformer/diffusion_pytorch_model.safetensors"


def files_of(folder: Path, inside: str = "") -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {f"{inside}/{name}".strip("/"): data for name, data in found.items()}


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server:
        yield server


@pytest.fixture
def env(hub, tmp_path):
    return {**hub.env(tmp_path / "hf"), "MLX_SF_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}


def draw(ckpt: str, env: dict[str, str], folder: Path, *more: str):
    return run_cli("sample", "--ckpt", ckpt, "-n", "1", "--steps", "1", "-o", str(folder / "x.png"), *more, env=env)


def refused(ckpt: str, env: dict[str, str], folder: Path, *more: str) -> str:
    done = draw(ckpt, env, folder, *more)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mlx-sf: error: "), done.stderr
    assert "Traceback" not in done.stderr
    return last


def bodies(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_from_the_hub_draws_the_golden_samples(name, hub, env, tmp_path):
    extra = {"pipeline.py": b"raise SystemExit('never run')", "README.md": b"#", "demo.png": b"x"}
    hub.add(REPO, {**files_of(HUB / name, name), **extra})
    said = check_samples(name, f"{REPO}/{name}", tmp_path, env)
    assert "downloading" in said
    assert not [p for p in bodies(hub) if p.endswith((".py", ".md", ".png"))]


def test_second_run_needs_no_network(hub, env, tmp_path):
    hub.add(REPO, files_of(HUB / "native"))
    first = draw(REPO, env, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "someone/JiT-diffusers at commit" in run_cli("info", str(tmp_path / "x.png")).stdout
    fetched = len(bodies(hub))
    again = draw(REPO, env, tmp_path)
    assert again.returncode == 0
    assert len(bodies(hub)) == fetched
    assert "converted" not in again.stderr
    asked = len(hub.requests)
    assert draw(REPO, env, tmp_path, "--offline").returncode == 0
    assert draw(REPO, {**env, "HF_HUB_OFFLINE": "1"}, tmp_path).returncode == 0
    assert len(hub.requests) == asked
    unreachable = draw(REPO, {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path)
    assert unreachable.returncode == 0, unreachable.stderr
    assert "no network" in unreachable.stderr


def test_offline_without_a_copy(env, tmp_path):
    assert "is not in the cache, and there is no network (offline): go online once" in refused(
        REPO, env, tmp_path, "--offline"
    )
    assert "is not in the cache, and there is no network" in refused(
        REPO, {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path
    )


def test_a_changed_revision_is_fetched_and_an_old_one_kept(hub, env, tmp_path):
    files = files_of(HUB / "native")
    old = "a" * 40
    hub.add(REPO, files, sha=old)
    assert draw(REPO, env, tmp_path).returncode == 0
    changed = json.loads(files["transformer/config.json"]) | {"in_context_start": 2}
    hub.add(REPO, {**files, "transformer/config.json": json.dumps(changed).encode()}, sha="b" * 40)
    new = draw(REPO, env, tmp_path)
    assert "converted once" in new.stderr
    assert "at commit " + "b" * 40 in run_cli("info", str(tmp_path / "x.png")).stdout
    pinned = draw(f"{REPO}@{old}", env, tmp_path)
    assert pinned.returncode == 0, pinned.stderr
    assert "converted once" not in pinned.stderr


def test_several_models_are_listed_with_their_sizes(hub, env, tmp_path):
    hub.add(REPO, {**files_of(HUB / "native", "JiT-B-16"), **files_of(HUB / "fdloss", "JiT-B-32")})
    line = refused(REPO, env, tmp_path)
    assert "holds 2 models, want one of JiT-B-16 (0.00 GB), JiT-B-32 (0.00 GB)" in line
    listed = run_cli("info", REPO, env=env)
    assert "JiT-B-16" in listed.stdout
    assert "JiT-B-32" in listed.stdout
    assert not bodies(hub)
    assert "the repository has no JiT-Z, it has JiT-B-16, JiT-B-32" in refused(f"{REPO}/JiT-Z", env, tmp_path)


def test_a_broken_connection_is_resumed(hub, env, tmp_path):
    data = files_of(HUB / "native")
    hub.add(REPO, data)
    hub.cut[NATIVE] = len(data[NATIVE]) // 2
    done = draw(REPO, env, tmp_path)
    if done.returncode:
        assert "try again" in done.stderr
        done = draw(REPO, env, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wrong_checksum_is_refused_and_removed(hub, env, tmp_path):
    hub.add(REPO, files_of(HUB / "native"))
    hub.corrupt.add(NATIVE)
    line = refused(REPO, env, tmp_path)
    assert f"the SHA-256 of {NATIVE} is not the Hub's: damaged on its way and removed, try again" in line
    hub.corrupt.clear()
    assert draw(REPO, env, tmp_path).returncode == 0


def test_missing_gated_and_unknown_are_one_line_each(hub, env, tmp_path):
    hub.add(REPO, files_of(HUB / "native"))
    assert "no repository someone/else on the Hub, or it is private" in refused("someone/else", env, tmp_path)
    assert "has no branch, tag or commit 'v9'" in refused(f"{REPO}@v9", env, tmp_path)
    hub.gated.add(REPO)
    assert "accept the terms on the repository's page, then `hf auth login`" in refused(REPO, env, tmp_path)


def test_a_repository_of_another_network(hub, env, tmp_path):
    hub.add(REPO, {"checkpoint.msgpack": b"x", "README.md": b"#"})
    line = refused(REPO, env, tmp_path)
    assert "holds no weights that this program reads (.safetensors .npz .pth)" in line
    assert "found README.md, checkpoint.msgpack" in line
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    hub.add("other/flux", {**files_of(HUB / "native"), "model_index.json": json.dumps(index).encode()})
    assert "is a FluxPipeline with vae: this program knows JiT in pixels" in refused("other/flux", env, tmp_path)


def test_a_full_disk(hub, env, tmp_path):
    hub.add(REPO, files_of(HUB / "native"))
    hub.sizes = {NATIVE: 10**15}
    line = refused(REPO, env, tmp_path)
    assert "needs 2,000,000.0 GB with its conversion" in line
    assert not bodies(hub)


def test_a_disk_that_fills_while_it_downloads(hub, env, tmp_path):
    hub.add(REPO, files_of(HUB / "native"))
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from mlx_sf.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "sample", "--ckpt", REPO, "-o", str(tmp_path / "x.png")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "free some space" in done.stderr.strip().splitlines()[-1]
    assert draw(REPO, env, tmp_path).returncode == 0


class _Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (eval, (f"open({str(self.trace)!r}, 'w')",))


def test_a_malicious_pickle_is_data(hub, env, tmp_path):
    hub.add(REPO, {"model.pth": pickle.dumps(_Evil(tmp_path / "pwned"))})
    line = refused(REPO, env, tmp_path)
    assert "model.pth" in line
    assert not (tmp_path / "pwned").exists()


def test_a_malicious_listing_never_leaves_the_cache(hub, env, tmp_path):
    hub.add(REPO, {**files_of(HUB / "native"), "../../escaped.safetensors": b"x", "/abs.safetensors": b"x"})
    assert draw(REPO, env, tmp_path).returncode == 0
    assert not list(tmp_path.rglob("*escaped*"))


def test_pth_of_the_trainer_and_own_checkpoints_from_the_hub(hub, env, tmp_path):
    hub.add("a/pth", {"checkpoint-last.pth": (GOLDEN / "parity" / "forced.pth").read_bytes()})
    done = draw("a/pth", env, tmp_path, "--in-context-start", "1")
    assert done.returncode == 0, done.stderr
    hub.add("a/own", {"model.safetensors": (GOLDEN / "v0_2" / "forced.safetensors").read_bytes(), "config.json": b"{}"})
    assert draw("a/own", env, tmp_path).returncode == 0
    assert draw("a/own/model.safetensors", env, tmp_path).returncode == 0
    page = f"{env['HF_ENDPOINT']}/a/own/blob/main/model.safetensors"
    assert draw(page, env, tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def text_to_image(hub: HubServer) -> None:
    """Two models in one repository and the encoder that they name, as published, but tiny."""
    both = {**files_of(PLACES["e2e"], "minit2i-b-16"), **files_of(PLACES["hd52"], "minit2i-l-16")}
    index = (T2I / "hub" / "model_index.json").read_bytes()
    hub.add("MiniT2I/MiniT2I", {**both, "model_index.json": index, "pipeline.py": b"raise SystemExit('never run')"})
    encoder = {f.name: f.read_bytes() for f in (T2I / "t5").iterdir()}
    hub.add("google/flan-t5-large", {**encoder, "pytorch_model.bin": b"x", "tf_model.h5": b"x", "spiece.model": b"x"})


def test_text_to_image_in_one_command(hub, env, tmp_path):
    text_to_image(hub)
    np.save(tmp_path / "noise.npy", arrays("e2e.npz")["p/noise"][:1])
    prompt = json.loads((T2I / "e2e.json").read_text())["prompts"][0]
    settings = ["--noise", tmp_path / "noise.npy", "--steps", "8", "--cfg", "2.5", "--sample-t-eps", "0.05"]
    for ckpt, more in (("MiniT2I/MiniT2I", []), ("minit2i-b/16", []), ("MiniT2I/MiniT2I", ["--offline"])):
        command = ["sample", "--ckpt", ckpt, "--prompt", prompt, *settings, "-o", tmp_path / "x.npy", *more]
        done = run_cli(*command, env={**env, "MLX_ENABLE_TF32": "0"})
        assert done.returncode == 0, done.stderr
        want = arrays("e2e.npz")["p/sample"][:1]
        assert np.abs(np.load(tmp_path / "x.npy") - want).max() <= tolerances("e2e.npz")["p/sample"]
    fetched = {path.rsplit("/", 1)[-1] for path in bodies(hub)}
    assert {"tokenizer.json", "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"} <= fetched
    assert not fetched & {"pipeline.py", "pytorch_model.bin", "tf_model.h5", "spiece.model"}
    listed = run_cli("info", "MiniT2I/MiniT2I", env=env).stdout
    assert "minit2i-b-16" in listed
    assert "minit2i-l-16" in listed


def test_text_to_image_without_its_encoder(hub, env, tmp_path):
    text_to_image(hub)
    del hub.repos["google/flan-t5-large"]
    done = run_cli("sample", "--ckpt", "MiniT2I/MiniT2I", "--prompt", "x", "-o", tmp_path / "x.png", env=env)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "text encoder google/flan-t5-large: " in line
    assert line.endswith("or name a folder with --text-encoder")


def test_orbax_from_the_hub(hub, env, tmp_path):
    pytest.importorskip("tensorstore")
    hub.add("MiniT2I/MiniT2I-B-16-jax", {**files_of(T2I / "nopre_jax"), "README.md": b"#"})
    command = ["convert", "minit2i-b/16-jax", tmp_path / "x.npz", "--img-size", "16", "--text-length", "3", "--verify"]
    for more in ([], ["--offline"]):
        done = run_cli(*command, *more, env=env)
        assert done.returncode == 0, done.stderr
    a = arrays("forward.npz")
    model, _ = load_model(tmp_path / "x.npz")
    out = model(mx.array(a["nopre/x"]), mx.array([0.5]), text(a["nopre/context"], a["nopre/mask"]))
    assert np.abs(np.asarray(out) - a["nopre/out"]).max() <= tolerances("forward.npz")["nopre/out"]
