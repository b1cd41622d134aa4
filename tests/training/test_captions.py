"""Runs that train on captions: a vocabulary of their own or a frozen encoder, adapters, previews, exact resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import mlx_sf
from mlx_sf.checkpoints.checkpoint import Checkpoint
from mlx_sf.data.captioned_scenes import VOCABULARY, CaptionedSceneSource
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import read_metadata
from mlx_sf.training.dry_run import dry_run
from mlx_sf.training.optimizer import learning_rate
from mlx_sf.training.plan import plan
from tests.helpers import run_cli
from tests.minit2i import PLACES, T2I, arrays
from tests.training.runs import assert_equal_runs, run, run_until

T5 = str(T2I / "t5")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of nine pictures with captions in metadata.jsonl."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    source = CaptionedSceneSource((16, 16))
    for i in range(9):
        picture, caption = source.load(i)
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def scenes(output: Path, **changes: Any) -> dict[str, Any]:
    """A run from scratch on captioned scenes."""
    base = {
        "data": "captioned-scenes",
        "architecture": "mmjit",
        "size": "nano",
        "patch": 8,
        "img_size": 16,
        "batch_size": 2,
        "epoch_size": 8,
    }
    base |= {"preview_every": 0, "steps": 6, "save_every": 2, "log_every": 3, "keep": 0}
    return {**base, "output": str(output), "name": "run", **changes}


def adapter(pictures: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run that trains an adapter of the golden network which reads the golden encoder."""
    base = {"init": str(PLACES["e2e"]), "text_encoder": T5, "lora": True, "lora_rank": 4, "data": str(pictures)}
    base |= {"caption_column": "text", "steps": 6, "save_every": 2, "log_every": 2, "keep": 0, "preview_every": 0}
    return {**base, "output": str(output), "name": "run", **changes}


@pytest.mark.parametrize("architecture", [None, "mmjit"])
def test_scenes_from_scratch(architecture, tmp_path):
    given = scenes(tmp_path, architecture=architecture, preview_every=6, preview_images=3, preview_steps=2)
    outcome = run({k: v for k, v in given.items() if v is not None})
    config = Checkpoint(outcome.checkpoint).config
    assert config.model.architecture == (architecture or "jit_text")
    assert config.model.text.words == tuple(sorted(VOCABULARY))
    assert (config.model.forcing is None) == (architecture == "mmjit")
    assert config.sample.cfg_low == 0
    with Image.open(tmp_path / "run" / "previews" / "00000006.png") as preview:
        assert preview.width == 3 * 128 + 2 * 2
        assert preview.height > 3 * 128 + 2 * 2 + 10  # the captions below
    assert len(read_metadata(tmp_path / "run" / "previews" / "00000006.png")["prompts"]) == 3
    pictures = mlx_sf.load(outcome).sample(["a red star", ""], steps=2)
    assert pictures[0].size == (16, 16)
    with pytest.raises(MlxSfError, match="'dog' is none of the 50 words"):
        mlx_sf.load(outcome).sample("a dog", steps=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vanilla": False, "accumulate": 2, "grad_checkpoint": True},
        {"architecture": "jit_text", "attn_dropout": 0.1},
    ],
)
def test_resumed_equals_uninterrupted(changes, tmp_path):
    for folder, killed_at in (("whole", None), ("parts", 3)):
        given = scenes(tmp_path / folder, **changes)
        if killed_at:
            run_until(given, killed_at)
        run(given)
    assert_equal_runs(tmp_path / "whole" / "run", tmp_path / "parts" / "run", 6)


def test_forcing_is_an_option_and_said(tmp_path):
    said: list[str] = []
    run(scenes(tmp_path, vanilla=False, steps=1), say=said.append)
    assert any("does not see t; forcing tells it the noise level" in line for line in said)
    assert Checkpoint(tmp_path / "run" / "checkpoint-00000001.safetensors").config.model.forcing is not None


def test_adapter_on_captions(pictures, tmp_path):
    """Trains, resumes to the bit, is read by others, merges."""
    said: list[str] = []
    whole = run(
        adapter(pictures, tmp_path / "whole", preview_every=6, preview_images=2, preview_steps=2), say=said.append
    )
    assert "text: 9 captions read by " + T5 in said
    run_until(adapter(pictures, tmp_path / "parts"), 3)
    run(adapter(pictures, tmp_path / "parts"))
    assert_equal_runs(whole.run, tmp_path / "parts" / "run", 6)
    settings = {"text_encoder": T5}
    want = mlx_sf.load(whole, **settings).sample("a blue ring", steps=3)[0]
    beside = mlx_sf.load(PLACES["e2e"], lora_paths=[whole.run / "adapter"], **settings).sample("a blue ring", steps=3)[
        0
    ]
    np.testing.assert_array_equal(np.asarray(want), np.asarray(beside))
    plain = mlx_sf.load(PLACES["e2e"], **settings).sample("a blue ring", steps=3)[0]
    assert (np.asarray(plain) != np.asarray(want)).any()
    ran = run_cli("export", whole.run, tmp_path / "merged.safetensors", "--dtype", "float32")
    assert ran.returncode == 0, ran.stderr
    merged = mlx_sf.load(tmp_path / "merged.safetensors", **settings).sample("a blue ring", steps=3)[0]
    assert np.abs(np.asarray(want).astype(int) - np.asarray(merged)).max() <= 1
    assert mlx_sf.load(whole, **settings).config.sample.t_eps == 0.001  # drawn as its base is
    assert "rank 4, alpha 4, 26 layers" in run_cli("info", whole.run / "adapter").stdout


def test_fine_tuned_whole(pictures, tmp_path):
    given = adapter(pictures, tmp_path)
    for name in ("lora", "lora_rank"):
        del given[name]
    outcome = run({**given, "steps": 2, "batch_size": 2})
    config = Checkpoint(outcome.checkpoint).config
    assert (config.flow.label_drop_prob, config.flow.noise_scale, config.sample.method) == (0.1, 2.0, "euler")
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert options["flip"] is False  # as published
    assert Path(options["text_encoder"]).is_absolute()


def test_words_of_a_folder(pictures, tmp_path):
    given = scenes(tmp_path, data=str(pictures), architecture="mmjit", text_encoder="words", steps=2)
    config = Checkpoint(run(given).checkpoint).config
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert set(config.model.text.words) == {w for row in rows for w in row["text"].lower().replace(",", "").split()}


def test_plans_and_what_they_say(pictures, tmp_path):
    text = dry_run(plan(scenes(tmp_path)))
    assert "captions of up to 24 tokens" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mmjit", "data": None}, "captions"),
        ({"size": "H"}, "size is 'H', want one of nano, tiny, small, B, L"),
        ({"attn_dropout": 0.1}, "attn_dropout is 0.1, want another value: MM-JiT has no such part"),
        ({"pred_param": "hybrid"}, "pred_param is 'hybrid', want another value: MM-JiT has no such part"),
        (
            {"init": str(PLACES["e2e"]), "architecture": "jit_text", "size": None, "patch": None},
            "holds a network of mmjit",
        ),
        (
            {"init": str(PLACES["e2e"]), "text_encoder": "words", "size": None, "patch": None},
            "cannot change what it reads",
        ),
        ({"loss": "x0", "pred_param": "v"}, "loss is 'x0', want velocity, unless x is predicted"),
        ({"preview_prompts": "nowhere.txt", "steps": 1}, "nowhere.txt: cannot be read"),
    ],
)
def test_runs_that_cannot_be(changes, message, tmp_path):
    given = {k: v for k, v in scenes(tmp_path, **changes).items() if v is not None}
    with pytest.raises(MlxSfError, match=message):
        run(given)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_published_rate():
    a = arrays("train.npz")
    for step, want in zip(a["lr_published_b16_step"], a["lr_published_b16"], strict=True):
        np.testing.assert_allclose(learning_rate(step, 4e-4, 5000, 1e9, warmup_lr=1e-6), want, rtol=1e-6)
    for step, want in enumerate(a["lr"]):
        np.testing.assert_allclose(learning_rate(step, 2e-3, 3, 1e9, warmup_lr=1e-6), want, rtol=1e-6)
