"""`mlx_sf.train` and `mlx-sf train`: the same options by keyword, by flag and from YAML; refusals; a dry run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import mlx_sf
from mlx_sf.checkpoints.checkpoint import step_files
from mlx_sf.errors import MlxSfError
from tests.training.runs import assert_equal_runs, options

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
SMALL = ["--size", "nano", "--patch", "8", "--img-size", "16"]


def test_training_from_python(micro: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    given = {**options(micro, tmp_path), "init": micro, "output": tmp_path}
    half = mlx_sf.train(**{**given, "steps": 4}, say=said.append)
    assert (half.run, half.step, half.steps, half.finished) == (tmp_path / "run", 4, 4, True)
    assert Path(half) == tmp_path / "run"
    assert any(line.startswith("step 4:") for line in said)
    capsys.readouterr()
    outcome = mlx_sf.train(resume=half, steps=8)
    assert capsys.readouterr() == ("", "")
    assert outcome.checkpoint == tmp_path / "run" / "checkpoint-00000008.safetensors"
    assert step_files(tmp_path / "run")[-1][1].read_bytes() == step_files(whole)[-1][1].read_bytes()
    tuned = mlx_sf.train(**{**given, "init": outcome, "name": "tuned", "steps": 1})  # a run where a path is wanted
    assert (tuned.run.name, tuned.step) == ("tuned", 1)
    with pytest.raises(MlxSfError, match="train: unknown option 'batch_sise': did you mean 'batch_size'"):
        mlx_sf.train(batch_sise=4)
    with pytest.raises(MlxSfError, match="^batch_size is 0, want at least 1$"):
        mlx_sf.train(batch_size=0)


def test_yaml_flags_and_a_runs_own_configuration(micro: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "c.yaml").write_text(f"init: {micro}\nbatch-size: 4\nepoch-size: 20\nsteps: 5\nlr: 1e-4\n")
    given = ["--config", tmp_path / "c.yaml", "--output", tmp_path, "--preview-every", "0"]
    assert cli("train", *given, "--steps", "1", "--name", "x")[0] == 0
    stored = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())
    assert (stored["steps"], stored["lr"], stored["batch_size"], stored["patch"]) == (1, 1e-4, 4, 8)
    assert cli("train", "--config", tmp_path / "x" / "config.yaml", "--name", "again")[0] == 0
    assert_equal_runs(tmp_path / "x", tmp_path / "again", 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "--batch-size is 0, want at least 1"),
        (["--batch-size", "6", "--accumulate", "4"], "--accumulate is 4, want a divisor of --batch-size"),
        (["--lr", "-1"], "--lr is -1.0, want above 0"),
        (["--p-std", "-1"], "--p-std is -1.0, want 0 or more"),
        (["--steps", "3", "--epochs", "2"], "--steps and --epochs: both are given"),
        (["--size", "huge"], "size 'huge' is unknown"),
        (["--patch", "7", "--img-size", "16"], "patch_size is 7"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--name", "a/b"], "--name is 'a/b', want a plain name: the folder it lies in is --output"),
        (["--report-to", "wandb"], "--report-to wandb: needs the package wandb: pip install wandb"),
        (["--init", "/nowhere/x.npz"], "/nowhere/x.npz: no such file"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["--cache", "x"], "--cache: only a folder or a data set on this machine"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(message, "train", *([] if "--size" in arguments else SMALL), "--output", tmp_path / "runs", *arguments)
    assert not list(tmp_path.rglob("config.yaml"))  # nothing was started


def test_dry_run_measures_and_writes_nothing(tmp_path: Path, cli: Cli) -> None:
    status, out, _ = cli("train", *SMALL, "--steps", "100", "--dry-run", "--output", tmp_path / "r")
    assert status == 0
    assert all(word in out for word in ("parameters", "GFLOP an image", "images/s", "peak memory", "100 steps"))
    assert not (tmp_path / "r").exists()


def test_help_shows_every_option_with_its_default(cli: Cli) -> None:
    status, out, _ = cli("train", "--help")
    assert status == 0
    text = " ".join(out.split())
    for words in ("--flip / --no-flip", "[default: on;", "--batch-size INTEGER", "[default: 32]", "--config PATH"):
        assert words in text
