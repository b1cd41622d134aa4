"""Runs: resumed after any interruption they end equal to the bit; what goes wrong costs one line and no work."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sf.checkpoints.checkpoint import Checkpoint, step_files
from mlx_sf.errors import MlxSfError
from tests.helpers import GOLDEN, ROOT
from tests.training.runs import assert_equal_runs, content, flags, options, run, run_until

# `mlx-sf train`, killed by SIGKILL around the NUMBER-th time that a file whose name begins with PREFIX takes its place
KILLED_AROUND_A_RENAME = """
import os, signal, sys
from mlx_sf.cli import main
prefix, number, where, *arguments = sys.argv[1:]
seen, rename = 0, os.replace
def killing(source, target):
    global seen
    seen += os.path.basename(target).startswith(prefix)
    if seen != int(number) or not os.path.basename(target).startswith(prefix):
        return rename(source, target)
    if where == "half":
        os.truncate(source, os.path.getsize(source) // 2)
    if where == "after":
        rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
main(["train", *arguments])
"""


def killed(prefix: str, number: int, where: str, given: dict[str, Any]) -> int:
    """Exit status of a run that SIGKILL ends: with half a file written, before the file's rename, or after."""
    command = [sys.executable, "-c", KILLED_AROUND_A_RENAME, prefix, str(number), where, *flags(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=120).returncode


@pytest.mark.parametrize("step", [1, 3, 5], ids=["before the first save", "right after a save", "at an epoch's end"])
def test_ended_between_saves_a_run_continues_to_the_bit(step: int, micro: Path, whole: Path, tmp_path: Path) -> None:
    given = options(micro, tmp_path)
    run_until(given, step)
    assert run(given).finished  # the same options again
    assert_equal_runs(whole, tmp_path / "run", 8)


@pytest.mark.parametrize("number, where", [(1, "half"), (2, "before"), (2, "after")])
def test_killed_in_a_save_a_run_continues_to_the_bit(
    number: int, where: str, micro: Path, whole: Path, tmp_path: Path
) -> None:
    given = options(micro, tmp_path)
    assert killed("checkpoint-", number, where, given) == -signal.SIGKILL
    assert len(step_files(tmp_path / "run")) == (number if where == "after" else number - 1)
    assert run(given).finished
    assert_equal_runs(whole, tmp_path / "run", 8)
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.slow
def test_killed_thirty_times_around_any_file_a_run_continues_to_the_bit(micro: Path, tmp_path: Path) -> None:
    changes = {"steps": 60, "save_every": 1, "keep": 2}
    whole = run(options(micro, tmp_path / "whole", **changes)).run
    given, rng = options(micro, tmp_path / "killed", **changes), random.Random(0)
    for _ in range(30):
        assert killed("", rng.randint(1, 8), rng.choice(["half", "before", "after"]), given) == -signal.SIGKILL
    assert run(given).finished
    assert_equal_runs(whole, tmp_path / "killed" / "run", 60)


def test_stopped_by_a_signal_it_saves_and_resumes(micro: Path, whole: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("step 3:"):
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run(options(micro, tmp_path), say=interrupt)
    assert (outcome.step, outcome.finished) == (4, False)  # mid-epoch, off the schedule of saves, mid-window
    assert outcome.checkpoint == tmp_path / "run" / "checkpoint-00000004.safetensors"
    assert run({}, resume=str(tmp_path / "run")).finished
    assert_equal_runs(whole, tmp_path / "run", 8)


def test_resume_with_accumulation_on_a_folder_in_mid_epoch(micro: Path, tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / "data" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "data" / f"c{i % 2}" / f"{i}.png")
    changes = {"data": str(tmp_path / "data"), "accumulate": 2, "clip_grad": 1.0, "weight_decay": 0.1}
    a = run(options(micro, tmp_path / "a", **changes)).run
    b = run(options(micro, tmp_path / "b", **changes, steps=4)).run
    assert run({"steps": 8}, resume=str(b)).step == 8
    assert content(a, 8) == content(b, 8)
    assert json.loads((b / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] > 0
    config = Checkpoint(dict(step_files(a))[8]).config
    assert config.class_names == ("c0", "c1")
    assert config.weights == ("model", "ema1", "ema2")


@pytest.mark.slow  # a minute of g++
def test_resume_of_a_compiled_step(micro: Path, tmp_path: Path) -> None:
    a = run(options(micro, tmp_path / "a", compile=True)).run
    given = options(micro, tmp_path / "b", compile=True)
    run_until(given, 5)
    assert_equal_runs(a, run(given).run, 8)


def test_a_run_of_version_0_2_continues_with_its_losses(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "v0_2" / "run", tmp_path / "run")
    assert run({"steps": 8}, resume=str(tmp_path / "run")).finished
    texts = [p.read_text() for p in (GOLDEN / "v0_2" / "resumed_metrics.jsonl", tmp_path / "run" / "metrics.jsonl")]
    want, got = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [line["step"] for line in got] == list(range(1, 9))
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=5e-5)


def test_resume_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    def train(threads: int, **changes: Any) -> Path:
        given = {"size": "nano", "patch": 8, "img_size": 128, "batch_size": 4, "epoch_size": 16, "lr": 1e-3}
        given |= {"warmup_epochs": 0, "log_every": 1, "preview_every": 0, "output": tmp_path, **changes}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "mlx_sf.cli", "train", *flags(given)]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=120)
        return tmp_path / str(changes["name"])

    a = train(2, name="a", steps=2)
    train(2, name="b", steps=1)
    assert_equal_runs(a, train(1, name="b", steps=2), 2)


def test_a_finished_run_is_left_alone_and_can_be_lengthened(micro: Path, tmp_path: Path) -> None:
    given = options(micro, tmp_path, steps=6)
    first = run(given)
    before = content(first.run, 6)
    assert run(given) == first
    assert content(first.run, 6) == before
    assert run({**given, "steps": 8}).step == 8


def test_saves_by_the_clock_as_well(micro: Path, tmp_path: Path) -> None:
    outcome = run(options(micro, tmp_path, steps=3, save_every=100, save_minutes=1e-6))
    assert [n for n, _ in step_files(outcome.run)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(micro: Path, tmp_path: Path) -> None:
    with pytest.raises(MlxSfError, match=r"(the loss is (nan|inf) at step \d|after step \d are not finite)") as e:
        run(options(micro, tmp_path, lr=1e25, warmup_epochs=0.5, save_every=1, steps=20))
    kept = step_files(tmp_path / "run")
    assert str(kept[-1][1]) in str(e.value)
    assert "try a lower lr" in str(e.value)
    for name in ("model", "ema1", "ema2"):
        Checkpoint(kept[-1][1]).weights(name)  # refuses what is not finite


def test_a_full_disk_stops_with_one_line_and_loses_nothing(micro: Path, tmp_path: Path, whole: Path) -> None:
    given = options(micro, tmp_path)
    with pytest.MonkeyPatch.context() as m:
        sync = os.fsync

        def full(descriptor: int) -> None:
            if len(step_files(tmp_path / "run")) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        m.setattr(os, "fsync", full)
        with pytest.raises(MlxSfError, match=r"cannot be written \(No space left on device\)"):
            run(given)
    assert [s for s, _ in step_files(tmp_path / "run")] == [3]
    assert run(given).finished
    assert_equal_runs(whole, tmp_path / "run", 8)


def test_unreadable_pictures_are_named(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    said: list[str] = []
    run(options(micro, tmp_path, data=str(tmp_path / "data")), say=said.append)
    assert f"could not read {tmp_path / 'data' / '3.png'}: not a picture that can be read" in said


def test_an_error_of_the_data_ends_the_run_at_its_step(micro: Path, tmp_path: Path) -> None:
    run_until(options(micro, tmp_path, save_every=1), 4)
    assert [s for s, _ in step_files(tmp_path / "run")] == [1, 2, 3, 4]


Refused = Callable[..., str]


def test_a_damaged_checkpoint_is_named_and_not_skipped(micro: Path, tmp_path: Path, refused: Refused) -> None:
    given = options(micro, tmp_path)
    newest = run(given).checkpoint
    assert newest is not None
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    refused("delete it to continue from checkpoint-00000006", "train", "--resume", tmp_path / "run")
    newest.unlink()
    assert run(given).step == 8
