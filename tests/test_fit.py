"""Runs: resumed after any interruption they end equal to the bit; what cannot be continued is refused."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_sf.checkpoint import Checkpoint, load_model, step_files  # before mlx.core: mlx_sf chooses the BLAS

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from PIL import Image

from mlx_sf import checkpoint as checkpoint_module
from mlx_sf import files
from mlx_sf.cli import main
from mlx_sf.config import SIZES, Size
from mlx_sf.errors import MlxSfError
from mlx_sf.fit import Outcome, Trainer, fit, plan
from mlx_sf.run import RunFolder
from mlx_sf.spectral import SpectralForcing

SIZES["micro"] = Size(2, 32, 2, 16, 2, 1)  # smaller than any on offer: here only the bookkeeping counts
TINY = {"size": "micro", "patch": 8, "img_size": 16, "batch_size": 4, "epoch_size": 20, "preview_every": 0, "keep": 0}


def options(output: Path, **changes: Any) -> dict[str, Any]:
    base = {**TINY, "steps": 8, "save_every": 3, "log_every": 2, "output": str(output), "name": "run"}
    return {**base, **changes}


def train(output: Path, resume: str | None = None, **changes: Any) -> Outcome:
    given = options(output, **changes) if resume is None else changes
    return fit(plan(given, resume), lambda line: None)


def content(run: Path, step: int) -> bytes:
    """All of a checkpoint: weights, EMAs, moments, position, configuration."""
    return dict(step_files(run))[step].read_bytes()


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def equal_runs(a: Path, b: Path, step: int) -> None:
    assert content(a, step) == content(b, step)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps over almost two epochs."""
    output = tmp_path_factory.mktemp("whole")
    assert train(output) == Outcome(8, True, output / "run" / "checkpoint-00000008.safetensors")
    return output / "run"


class KilledError(BaseException):
    """Ends a run as a power cut would, as far as one process can."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    take = Trainer.take

    def taken(self: Trainer, batch: Any) -> Any:
        if batch.step == step:
            raise KilledError
        return take(self, batch)

    monkeypatch.setattr(Trainer, "take", taken)


def kill_in_save(monkeypatch: pytest.MonkeyPatch, number: int, where: str) -> None:
    """In save `number`: while the file is written, before its rename, or just after it."""
    calls = {"n": 0}
    module, name = (checkpoint_module, "write_checkpoint") if where == "during" else (files.os, "replace")
    original: Callable[..., Any] = getattr(module, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        is_checkpoint = "checkpoint-" in str(args[-1 if where != "during" else 0])
        calls["n"] += is_checkpoint
        if not is_checkpoint or calls["n"] != number:
            return original(*args, **kwargs)
        if where == "during":
            Path(args[0]).with_name(f".{Path(args[0]).name}.dead.tmp").write_bytes(b"half a file")
        if where == "after":
            original(*args, **kwargs)
        raise KilledError

    monkeypatch.setattr(module, name, patched)


@pytest.mark.parametrize(
    "kill",
    [
        lambda m: kill_at(m, 1),  # before the first save
        lambda m: kill_at(m, 3),  # right after a save
        lambda m: kill_at(m, 5),  # between saves, at an epoch's end
        lambda m: kill_in_save(m, 1, "during"),
        lambda m: kill_in_save(m, 2, "before"),
        lambda m: kill_in_save(m, 2, "after"),
    ],
    ids=["start", "saved", "between", "in-save", "before-rename", "after-rename"],
)
def test_killed_anywhere_a_run_continues_to_the_bit(
    kill: Callable[[pytest.MonkeyPatch], None], whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as m:
        kill(m)
        with pytest.raises(KilledError):
            train(tmp_path)
    assert train(tmp_path).finished  # the same command again
    equal_runs(whole, tmp_path / "run", 8)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_stopped_by_a_signal_it_saves_and_resumes(whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as m:
        take = Trainer.take

        def signalled(self: Trainer, batch: Any) -> Any:
            if batch.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return take(self, batch)

        m.setattr(Trainer, "take", signalled)
        outcome = train(tmp_path)
    assert (outcome.step, outcome.finished) == (5, False)  # mid-epoch, off the schedule of saves, mid-window
    assert train(tmp_path, resume=str(tmp_path / "run")).finished
    equal_runs(whole, tmp_path / "run", 8)


def test_resume_with_accumulation_on_a_folder_in_mid_epoch(tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / "data" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "data" / f"c{i % 2}" / f"{i}.png")
    changes = {"data": str(tmp_path / "data"), "accumulate": 2, "clip_grad": 1.0, "weight_decay": 0.1}
    train(tmp_path / "a", **changes)
    train(tmp_path / "b", steps=4, **changes)
    assert train(tmp_path / "b", resume=str(tmp_path / "b" / "run"), steps=8).step == 8
    assert content(tmp_path / "a" / "run", 8) == content(tmp_path / "b" / "run", 8)
    line = json.loads((tmp_path / "b" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["grad_norm"] > 0
    config = Checkpoint(tmp_path / "a" / "run" / "checkpoint-00000008.safetensors").config
    assert config.class_names == ("c0", "c1")
    assert config.weights == ("model", "ema1", "ema2")


@pytest.mark.slow  # a minute of g++
def test_resume_of_a_compiled_step(tmp_path: Path) -> None:
    train(tmp_path / "a", compile=True)
    with pytest.MonkeyPatch.context() as m:
        kill_at(m, 5)
        with pytest.raises(KilledError):
            train(tmp_path / "b", compile=True)
    assert train(tmp_path / "b", compile=True).finished
    equal_runs(tmp_path / "a" / "run", tmp_path / "b" / "run", 8)


def test_a_finished_run_is_left_alone_and_can_be_lengthened(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, steps=6)
    before = content(tmp_path / "run", 6)
    assert train(tmp_path, steps=6) == Outcome(6, True, tmp_path / "run" / "checkpoint-00000006.safetensors")
    assert content(tmp_path / "run", 6) == before
    assert train(tmp_path, steps=8).step == 8


def test_saves_by_the_clock_as_well(tmp_path: Path) -> None:
    train(tmp_path, steps=3, save_every=100, save_minutes=1e-6)
    assert [n for n, _ in step_files(tmp_path / "run")] == [1, 2, 3]


def test_sampling_from_a_run(whole: Path, tmp_path: Path) -> None:
    for weights in ("model", "ema1", "ema2"):
        model, config = load_model(whole, weights)
        out = model(mx.zeros((1, 3, 16, 16)), mx.array([0.5]), mx.array([0]))
        assert bool(mx.all(mx.isfinite(out)))
    assert config.provenance["step"] == 8
    assert config.class_names[0] == "sunset"
    main(["sample", "--ckpt", str(whole), "--classes", "house", "--steps", "2", "-o", str(tmp_path / "x.png")])
    assert picture_size(tmp_path / "x.png") == (16, 16)


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {**options(tmp_path, keep=1, preview_every=4, preview_images=3, preview_steps=2)}
    main(["train", *(x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v)))])
    run = tmp_path / "run"
    assert [s for s, _ in step_files(run)] == [8]
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["00000004.png", "00000008.png"]
    assert picture_size(run / "previews" / "00000008.png") == (3 * 18 - 2, 3 * 18 - 2)  # rows: model, ema1, ema2
    assert (run / "loss.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"loss", "lr", "epoch", "images", "ema1_initial_share"} <= set(lines[0])
    machine = json.loads((run / "system.jsonl").read_text().splitlines()[-1])
    assert {"images_per_second", "data_wait_share", "peak_gb"} <= set(machine)
    assert "finished: mlx-sf sample --ckpt" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- refusals


Refused = Callable[..., str]


def test_resume_refuses_what_is_not_a_run(whole: Path, tmp_path: Path, refused: Refused) -> None:
    file = next(whole.glob("*.safetensors"))
    refused(f"is a file, want a run's folder: pass --resume {whole}", "train", "--resume", str(file))
    refused(f"no such folder ({whole.parent} holds run)", "train", "--resume", str(whole.parent / "rum"))
    refused(f"has no config.yaml but run: did you mean {whole}?", "train", "--resume", str(whole.parent))
    refused("is not a run, it has no config.yaml but nothing", "train", "--resume", str(tmp_path))
    refused("leave --name and --output out", "train", "--resume", str(whole), "--name", "x")


def test_a_changed_run_is_refused(whole: Path, tmp_path: Path, refused: Refused) -> None:
    lr = "was started with --lr 7.8125e-07, got 0.01: leave it out to continue"
    refused(lr, "train", "--resume", str(whole), "--lr", "0.01")
    refused("was started with --vanilla False, got True", "train", "--resume", str(whole), "--vanilla")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(data / f"{i}.png")
    train(tmp_path, data=str(data), steps=1)
    Image.new("RGB", (16, 16)).save(data / "9.png")
    refused("its data has changed", "train", "--resume", str(tmp_path / "run"))


def test_a_second_process_is_refused(whole: Path, refused: Refused) -> None:
    with RunFolder(whole).locked():
        refused(f"process {os.getpid()} is training this run already", "train", "--resume", str(whole))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(tmp_path: Path) -> None:
    with pytest.raises(MlxSfError, match=r"(the loss is (nan|inf) at step \d|after step \d are not finite)") as e:
        train(tmp_path, lr=1e25, warmup_epochs=0.5, save_every=1, steps=20)
    kept = step_files(tmp_path / "run")
    assert str(kept[-1][1]) in str(e.value)
    assert "try a lower --lr" in str(e.value)
    for name in ("model", "ema1", "ema2"):
        Checkpoint(kept[-1][1]).weights(name)  # refuses what is not finite


def test_a_full_disk_stops_with_one_line_and_loses_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as m:
        save = files.os.fsync

        def full(descriptor: int) -> None:
            if len(step_files(tmp_path / "run")) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(descriptor)

        m.setattr(files.os, "fsync", full)
        with pytest.raises(MlxSfError, match=r"cannot be written \(No space left on device\)"):
            train(tmp_path)
    assert [s for s, _ in step_files(tmp_path / "run")] == [3]
    assert train(tmp_path).finished
    equal_runs(whole, tmp_path / "run", 8)


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    said: list[str] = []
    fit(plan(options(tmp_path, data=str(tmp_path / "data"))), said.append)
    assert f"could not read {tmp_path / 'data' / '3.png'}: not a picture that can be read" in said


def test_yaml_and_flags(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("size: micro\npatch: 8\nimg-size: 16\nbatch-size: 4\nsteps: 5\nlr: 1e-4\n")
    main(["train", "--config", str(tmp_path / "c.yaml"), "--steps", "1", "--output", str(tmp_path), "--name", "x"])
    settings, _ = RunFolder(tmp_path / "x").read_config()
    assert (settings.steps, settings.lr, settings.batch_size) == (1, 1e-4, 4)
    main(["train", "--config", str(tmp_path / "x" / "config.yaml"), "--name", "again"])  # a run's own serves as well
    assert (tmp_path / "again" / "checkpoint-00000001.safetensors").exists()


def test_a_damaged_checkpoint_is_named_and_not_skipped(tmp_path: Path, refused: Refused) -> None:
    train(tmp_path)
    newest = tmp_path / "run" / "checkpoint-00000008.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    refused("delete it to continue from checkpoint-00000006", "train", "--resume", str(tmp_path / "run"))
    newest.unlink()
    assert train(tmp_path).step == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "--batch-size is 0, want at least 1"),
        (["--batch-size", "6", "--accumulate", "4"], "--accumulate is 4, want a divisor of batch-size"),
        (["--lr", "-1"], "--lr is -1.0, want above 0"),
        (["--steps", "3", "--epochs", "2"], "both are given"),
        (["--size", "huge"], "size 'huge' is unknown"),
        (["--patch", "7", "--img-size", "16"], "patch_size is 7"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--name", "a/b"], "--name is 'a/b', want a plain name"),
        (["--report-to", "wandb"], "needs the package wandb: pip install wandb"),
        (["--init", "/nowhere/x.npz"], "/nowhere/x.npz: no such file"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    small = [] if "--size" in arguments else ["--size", "nano", "--patch", "8", "--img-size", "16"]
    refused(message, "train", *small, "--output", tmp_path, *arguments)


def test_dry_run_measures_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--size", "nano", "--patch", "8", "--img-size", "16", "--steps", "100", "--dry-run",
          "--output", str(tmp_path / "r")])  # fmt: skip
    out = capsys.readouterr().out
    assert all(word in out for word in ("parameters", "GFLOP an image", "images/s", "peak memory", "100 steps"))
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------------- from a checkpoint


def test_init_keeps_what_fits_and_says_what_it_made_anew(whole: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24), "red").save(tmp_path / "data" / name / "1.png")
    given = {"init": str(whole), "data": str(tmp_path / "data"), "img_size": 24, "vanilla": True, "batch_size": 2}
    given |= {"steps": 1, "output": str(tmp_path), "name": "tuned", "preview_every": 0, "lr": 1e-30}
    told: list[str] = []
    fit(plan(given), told.append)
    text = "\n".join(told)
    assert "class table made anew for 2 class(es), it had 10; the row for no class is kept" in text
    assert "positions made anew for 24 pixels, it had 16" in text
    assert "Spectral Forcing is off now" in text
    old, new = Checkpoint(step_files(whole)[-1][1]), Checkpoint(step_files(tmp_path / "tuned")[-1][1])
    assert new.config.model.img_size == 24
    assert not new.config.model.spectral_forcing
    a, b = old.weights("ema1"), new.weights("model")
    assert a.keys() == b.keys()
    table = "y_embedder.embedding_table.weight"
    assert mx.array_equal(a[table][-1], b[table][-1])
    assert all(mx.array_equal(a[k], b[k]) for k in a if k not in (table, "pos_embed"))
    fit(plan({**given, "steps": 2}), told.append)  # and it continues, without reading --init again
    assert step_files(tmp_path / "tuned")[-1][0] == 2


def test_init_with_the_same_classes_keeps_the_table_and_refuses_another_size(
    whole: Path, tmp_path: Path, refused: Refused
) -> None:
    given = options(tmp_path, init=str(whole), steps=1, lr=1e-30, img_size=None, patch=None, size=None)
    fit(plan(given), lambda line: None)
    a, b = load_model(whole)[0], load_model(tmp_path / "run", "model")[0]
    x, t, y = mx.random.normal((1, 3, 16, 16), key=mx.random.key(0)), mx.array([0.3]), mx.array([4])
    assert mx.array_equal(a(x, t, y), b(x, t, y))
    refused("cannot change its size", "train", "--init", str(whole), "--size", "tiny")
    refused("the network of --init has 8", "train", "--init", str(whole), "--patch", "4")


# --------------------------------------------------------------------------------------- the forcing's schedule


def test_a_schedule_stays_with_its_weights(tmp_path: Path, refused: Refused) -> None:
    """Trained with one schedule, a model is sampled and continued with it; only --init with its flag changes it."""
    (tmp_path / "cutoffs.txt").write_text("0.2 0.6 1\n")
    given = options(tmp_path, steps=1, scale_schedule="data", schedule_cutoffs=str(tmp_path / "cutoffs.txt"))
    fit(plan(given), lambda line: None)
    (tmp_path / "cutoffs.txt").write_text("0.9 1\n")  # what was read counts, not what the file holds now
    run = tmp_path / "run"
    model = load_model(run, "model")[0]
    assert model.config.schedule_cutoffs == (0.2, 0.6, 1.0)
    x, t = mx.random.normal((1, 3, 16, 16), key=mx.random.key(0)), mx.array([0.3])
    data = SpectralForcing(16, scale_schedule="data", schedule_cutoffs=(0.2, 0.6, 1.0))
    assert mx.array_equal(model._forcing(x, t), data(x, t))
    assert not mx.allclose(model._forcing(x, t), SpectralForcing(16)(x, t))

    for change in (["--scale-schedule", "linear"], ["--schedule-cutoffs", tmp_path / "cutoffs.txt"], ["--exact-end"],
                   ["--schedule-power", "2"]):  # fmt: skip
        refused(f"was started with {change[0]}", "train", "--resume", run, "--steps", "2", *change)
    for command in (["sample", "--ckpt", run], ["eval", "--ckpt", run, "--ref", "x.npz"]):
        refused("No such option", *command, "--scale-schedule", "linear")
    fit(plan({**given, "schedule_cutoffs": "0.2,0.6,1", "steps": 2}), lambda line: None)
    assert step_files(run)[-1][0] == 2

    told: list[str] = []
    tuned = {"init": str(run), "output": str(tmp_path), "steps": 1, "batch_size": 4, "epoch_size": 20}
    fit(plan({**tuned, "name": "kept", "preview_every": 0}), told.append)
    assert load_model(tmp_path / "kept")[1].model == model.config
    assert not any("forcing" in line for line in told)
    fit(plan({**tuned, "name": "changed", "preview_every": 0, "scale_schedule": "linear"}), told.append)
    assert "init: the forcing is linear now, the weights were trained with data 0.2,0.6,1.0" in told
    assert load_model(tmp_path / "changed")[1].model.scale_schedule == "linear"


# ------------------------------------------------------------------------------------------- other processes

COMMAND = [sys.executable, "-c", "from mlx_sf.cli import main; main()", "train"]


def flags(output: Path, **changes: Any) -> list[str]:
    return [x for k, v in options(output, size="nano", **changes).items() for x in ("--" + k.replace("_", "-"), str(v))]


def killed_loop(output: Path, whole: Path, kills: int, step: int, **changes: Any) -> None:
    """Kill -9 at random moments, start again, until `kills` are done; then let it finish."""
    rng = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(COMMAND + flags(output, **changes), stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.8, 3.0))
        process.kill()
        process.wait()
    subprocess.run(COMMAND + flags(output, **changes), check=True, stdout=subprocess.DEVNULL)
    equal_runs(whole, output / "run", step)


def test_kill_minus_nine(tmp_path: Path) -> None:
    train(tmp_path / "whole", size="nano")
    killed_loop(tmp_path / "killed", tmp_path / "whole" / "run", 2, 8)


@pytest.mark.slow
def test_thirty_times_kill_minus_nine(tmp_path: Path) -> None:
    changes = {"steps": 60, "save_every": 1, "keep": 2}
    train(tmp_path / "whole", size="nano", **changes)
    killed_loop(tmp_path / "killed", tmp_path / "whole" / "run", 30, 60, **changes)


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mlx-sf train` in two processes on this machine, under MLX's launcher."""
    script = folder / "train.py"
    script.write_text("from mlx_sf.cli import main\nmain()\n")
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "-p", "41873"]
    command = [*launch, "--python", sys.executable, str(script), "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_is_one_line(tmp_path: Path) -> None:
    done = launched(tmp_path, "--lr", "-1")
    assert "--lr is -1.0, want above 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_equal_one(tmp_path: Path) -> None:
    done = launched(tmp_path, *flags(tmp_path / "two", steps=2))
    assert (tmp_path / "two" / "run").exists(), done.stdout + done.stderr
    train(tmp_path / "one", size="nano", steps=2)
    one, two = (dict(step_files(tmp_path / d / "run")) for d in ("one", "two"))
    assert one.keys() == two.keys()
    a, b = (Checkpoint(c[2]).weights("model") for c in (one, two))
    assert max(mx.abs(a[k] - b[k]).max().item() for k in a) < 2e-5  # steps of 1e-3 each: equal but for rounding
    losses = [
        json.loads(text)["loss"] for text in (tmp_path / "two" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    want = [json.loads(text)["loss"] for text in (tmp_path / "one" / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, want, rtol=1e-5)
