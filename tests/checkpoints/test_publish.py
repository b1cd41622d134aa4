"""`mlx-sf upload`: the repository that it writes, and the real client's upload to a server on 127.0.0.1."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image

from mlx_sf.checkpoints import publish
from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint
from mlx_sf.formats.shards import INDEX
from tests.helpers import GOLDEN, run_cli
from tests.hub_server import HubServer

FORCED = GOLDEN / "v0_2" / "forced.safetensors"
QUANTISED = GOLDEN / "v0_2" / "quantised.safetensors"
RUN = GOLDEN / "v0_2" / "run"


def dry(source: Path, folder: Path, *more: str) -> Path:
    done = run_cli("upload", source, "someone/birds", "--license", "mit", "--dry-run", "-o", folder, *more)
    assert done.returncode == 0, done.stderr
    return folder


def header(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    return dict(yaml.safe_load(text.split("---\n")[1]))


def draw(ckpt: Path | str, to: Path, *more: str, env: dict[str, str] | None = None) -> np.ndarray:
    done = run_cli("sample", "--ckpt", ckpt, "--seed", "0", "-o", to, *more, env=env)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(to))


def test_a_repository_is_whole_and_draws_its_own_card_again(tmp_path):
    folder = dry(FORCED, tmp_path / "birds")
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "demo.png", "model.safetensors"}
    told = header(folder)
    assert told["license"] == "mit"
    assert told["library_name"] == "mlx"
    assert told["pipeline_tag"] == "unconditional-image-generation"
    assert {"mlx-sf", "spectral-forcing"} <= set(told["tags"])
    assert "base_model" not in told
    command = next(line for line in (folder / "README.md").read_text().splitlines() if "--seed 0" in line)
    classes = command.split("--classes ")[1].split()[0]
    again = draw(folder, tmp_path / "again.png", "--classes", classes)
    np.testing.assert_array_equal(again, np.asarray(Image.open(folder / "demo.png")))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == config["architecture"] == "jit"
    assert list(config) == sorted(config)


def test_a_run_gives_one_set_and_nothing_of_the_run(tmp_path):
    folder = dry(RUN, tmp_path / "birds", "--no-demo", "--weights", "ema2")
    published = Checkpoint(folder / "model.safetensors")
    assert published.config.weights == ("ema2",)
    assert not [name for name in published.file.entries if "/" in name]
    assert "data" not in published.config.provenance
    for file in folder.iterdir():
        data = file.read_bytes()
        for trace in (str(tmp_path), str(Path.home()), str(GOLDEN), "optimizer"):
            assert trace.encode() not in data, (file, trace)


def test_quantised_weights_say_so(tmp_path):
    folder = dry(QUANTISED, tmp_path / "birds", "--no-demo", "--base-model", "org/base")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == config["quantization_config"]["bits"] == 8
    assert header(folder)["base_model_relation"] == "quantized"
    assert header(folder)["base_model"] == "org/base"
    draw(folder, tmp_path / "x.png", "-n", "1")


def test_large_weights_become_shards_and_vanilla_cites_jit_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "SHARD_BYTES", 100_000)
    checkpoint = Checkpoint(FORCED)
    plain = replace(checkpoint.config, model=replace(checkpoint.config.model, forcing=None))
    save_checkpoint(tmp_path / "plain.safetensors", {"ema1": checkpoint.weights()}, plain)
    words = publish.Words("mit", lambda _: "mlx-sf sample")
    vanilla = Checkpoint(tmp_path / "plain.safetensors")
    files = publish.write_repository(vanilla, tmp_path / "birds", "a/b", words, demo=False)
    assert {"README.md", "config.json", INDEX} < {p.name for p in files}
    assert len([p for p in files if p.suffix == ".safetensors"]) > 1
    assert "spectral-forcing" not in header(tmp_path / "birds")["tags"]
    text = (tmp_path / "birds" / "README.md").read_text()
    assert "2511.13720" in text
    assert "2606.15236" not in text
    again = Checkpoint(tmp_path / "birds" / INDEX).weights()
    assert all(mx.array_equal(v, again[k]).item() for k, v in vanilla.weights().items())


def test_a_record_is_quoted_with_all_that_it_depends_on(tmp_path):
    record = {
        "time": "2026-11-25T12:00:00+0000",
        "metrics": {"fid": 12.3456, "count": 500},
        "settings": {"config": {"sample": {"cfg": 2.5, "method": "heun", "steps": 50}}, "seed": 7},
        "reference": {"where": "/private/ref.npz", "url": None, "sha256": "ab" * 32},
        "checkpoint_sha256": "cd" * 32,
    }
    (tmp_path / "r.json").write_text(json.dumps(record))
    folder = dry(FORCED, tmp_path / "birds", "--no-demo", "--record", str(tmp_path / "r.json"))
    text = (folder / "README.md").read_text()
    for part in ("| FID | 12.3456 |", "| N | 500 |", "| guidance | 2.5 |", "| seed | 7 |", "ref.npz", "cd" * 32):
        assert part in text
    assert "/private" not in text
    (tmp_path / "r.json").write_text("[]")
    done = run_cli("upload", FORCED, "a/b", "--license", "mit", "--dry-run", "--record", tmp_path / "r.json")
    assert done.returncode == 1
    assert "is no record that `mlx-sf eval` wrote" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a/b"], "--license is not given, want that of the weights"),
        (["b", "--license", "mit"], "'b' cannot be the name of a repository, want ORG/NAME"),
        (["a/b/c", "--license", "mit"], "cannot be the name of a repository"),
    ],
)
def test_bad_requests_are_one_line(words, message, tmp_path):
    done = run_cli("upload", FORCED, *words, "--dry-run", "-o", tmp_path / "x")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_there_stays(tmp_path):
    (tmp_path / "mine").write_text("x")
    done = run_cli("upload", FORCED, "a/b", "--license", "mit", "--dry-run", "-o", tmp_path)
    assert done.returncode == 1
    assert "is there already, want a new folder" in done.stderr
    assert (tmp_path / "mine").read_text() == "x"


def test_the_real_client_uploads_and_the_repository_draws(tmp_path):
    with HubServer() as hub:
        env = hub.env(tmp_path / "hf") | {"HF_TOKEN": "x", "MLX_SF_CACHE": str(tmp_path / "cache")}
        done = run_cli("upload", FORCED, "someone/birds", "--license", "mit", "--private", env=env)
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/someone/birds/commit/" in done.stdout
        asked = hub.created[0]  # releases of the client differ in how they say it
        assert asked.get("private") is True or asked.get("visibility") == "private"
        assert set(hub.commits["someone/birds"]) == {"README.md", "config.json", "demo.png", "model.safetensors"}
        draw("someone/birds", tmp_path / "x.png", "-n", "1", env=env)
        hub.role = "read"
        refused = run_cli("upload", FORCED, "someone/birds", "--license", "mit", env=env)
        assert refused.returncode == 1
        assert "the Hub's token may only read" in refused.stderr
        nobody = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
        refused = run_cli("upload", FORCED, "someone/birds", "--license", "mit", env=nobody)
        assert refused.returncode == 1
        assert "the Hub cannot be reached" in refused.stderr
        hub.role = "write"
        refused = run_cli("upload", FORCED, "a/b", "--license", "mit", "--no-demo", "--revision", "v9", env=env)
        assert refused.returncode == 1
        assert "a/b: has no branch 'v9'" in refused.stderr
        refused = run_cli("upload", FORCED, "someone/birds", "--license", "mit", env={**env, "HF_TOKEN": ""})
        assert refused.returncode == 1
        assert "the Hub knows no valid token of yours" in refused.stderr
