"""Runs that start from another checkpoint: what is kept, what is made anew, and the forcing that goes with weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from mlx_sf.checkpoints.checkpoint import Checkpoint, step_files
from mlx_sf.checkpoints.load import load_model
from tests.training.runs import options, run

Refused = Callable[..., str]
TABLE = "y_embedder.embedding_table.weight"


def newest(folder: Path) -> Checkpoint:
    return Checkpoint(step_files(folder)[-1][1])


def test_what_fits_is_kept_and_what_is_made_anew_is_said(whole: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24), "red").save(tmp_path / "data" / name / "1.png")
    given: dict[str, Any] = {"init": str(whole), "data": str(tmp_path / "data"), "img_size": 24, "vanilla": True}
    given |= {"batch_size": 2, "steps": 1, "output": str(tmp_path), "name": "tuned", "preview_every": 0, "lr": 1e-30}
    told: list[str] = []
    tuned = run(given, say=told.append).run
    text = "\n".join(told)
    assert "class table made anew for 2 class(es), it had 10; the row for no class is kept" in text
    assert "positions made anew for 24 x 24 pixels, it had 16 x 16" in text
    assert "Spectral Forcing is off now" in text
    old, new = newest(whole), newest(tuned)
    assert new.config.model.size == (24, 24)
    assert new.config.model.forcing is None
    a, b = old.weights("ema1"), new.weights("model")
    assert a.keys() == b.keys()
    assert mx.array_equal(a[TABLE][-1], b[TABLE][-1])
    assert all(mx.array_equal(a[k], b[k]) for k in a if k not in (TABLE, "pos_embed"))
    assert run({**given, "steps": 2}).step == 2  # and it continues, without reading the other checkpoint again


def test_the_same_classes_keep_their_table_and_the_size_is_kept(whole: Path, tmp_path: Path, refused: Refused) -> None:
    outcome = run(options(whole, tmp_path, steps=1, lr=1e-30))
    a, b = load_model(whole)[0], load_model(outcome.run, "model")[0]
    x, t = mx.random.normal((1, 3, 16, 16), key=mx.random.key(0)), mx.array([0.3])
    assert mx.array_equal(a(x, t, a.condition([4])), b(x, t, b.condition([4])))
    refused("cannot change its size", "train", "--init", whole, "--size", "tiny")
    refused("the network of --init has 8", "train", "--init", whole, "--patch", "4")


def test_another_prediction_makes_the_head_anew(micro: Path, tmp_path: Path) -> None:
    told: list[str] = []
    outcome = run(options(micro, tmp_path, steps=1, pred_param="hybrid", lr=1e-30), say=told.append)
    assert "init: head made anew for 6 output channels" in told
    old, new = Checkpoint(micro).weights(), newest(outcome.run).weights("model")
    assert all(mx.array_equal(old[k], new[k]) for k in old if not k.startswith("final_layer.linear."))
    assert new["final_layer.linear.weight"].shape[0] == 2 * old["final_layer.linear.weight"].shape[0]


def test_a_weight_set_can_be_chosen(whole: Path, tmp_path: Path, refused: Refused) -> None:
    told: list[str] = []
    outcome = run(options(whole, tmp_path, steps=1, lr=1e-30, init_weights="model"), say=told.append)
    assert any(line.startswith("init:") and line.endswith("(model)") for line in told)
    old, new = newest(whole).weights("model"), newest(outcome.run).weights("model")
    assert all(mx.array_equal(old[k], new[k]) for k in old)
    refused("holds weights model, ema1, ema2, not 'best'", "train", "--init", whole, "--init-weights", "best",
            "--output", tmp_path, "--name", "other")  # fmt: skip


def test_a_schedule_stays_with_its_weights(micro: Path, tmp_path: Path, refused: Refused) -> None:
    """Trained with one schedule, a model is sampled and continued with it; only a new run from it may change it."""
    (tmp_path / "cutoffs.txt").write_text("0.2 0.6 1\n")
    given = options(micro, tmp_path, steps=1, scale_schedule="data", schedule_cutoffs=str(tmp_path / "cutoffs.txt"))
    folder = run(given).run
    (tmp_path / "cutoffs.txt").write_text("0.9 1\n")  # what was read counts, not what the file holds now
    forcing = load_model(folder, "model")[1].model.forcing
    assert forcing.schedule_cutoffs == (0.2, 0.6, 1.0)

    for change in (["--scale-schedule", "linear"], ["--schedule-cutoffs", tmp_path / "cutoffs.txt"], ["--exact-end"],
                   ["--schedule-power", "2"]):  # fmt: skip
        refused(f"was started with {change[0]}", "train", "--resume", folder, "--steps", "2", *change)
    for command in (["sample", "--ckpt", folder], ["eval", "--ckpt", folder, "--ref", "x.npz"]):
        refused("No such option", *command, "--scale-schedule", "linear")
    assert run({**given, "schedule_cutoffs": "0.2,0.6,1", "steps": 2}).step == 2

    told: list[str] = []
    kept = run(options(folder, tmp_path, steps=1, name="kept"), say=told.append).run
    assert load_model(kept)[1].model.forcing == forcing
    assert not any("forcing" in line for line in told)
    changed = run(options(folder, tmp_path, steps=1, name="changed", scale_schedule="linear"), say=told.append).run
    assert "init: the forcing is linear now, the weights were trained with data 0.2,0.6,1.0" in told
    assert load_model(changed)[1].model.forcing.scale_schedule == "linear"
