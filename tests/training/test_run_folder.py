"""A run's folder: what it holds, and what is refused as one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlx_sf.checkpoints.checkpoint import step_files
from mlx_sf.errors import MlxSfError
from mlx_sf.training.run_folder import RunFolder
from tests.training.runs import flags, options, run

Refused = Callable[..., str]


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_what_a_run_leaves(micro: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    given = options(micro, tmp_path, keep=1, log_every=2, preview_every=4, preview_images=3, preview_steps=2)
    status, out, _ = cli("train", *flags(given))
    folder = tmp_path / "run"
    assert status == 0
    assert f"{folder}: step 8 of 8, finished: mlx-sf sample --ckpt {folder}" in out
    assert [s for s, _ in step_files(folder)] == [8]
    assert sorted(p.name for p in (folder / "previews").iterdir()) == ["00000004.png", "00000008.png"]
    assert picture_size(folder / "previews" / "00000008.png") == (3 * 18 - 2, 3 * 18 - 2)  # rows: model, ema1, ema2
    assert (folder / "loss.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"loss", "lr", "epoch", "images", "ema1_initial_share"} <= set(lines[0])
    machine = json.loads((folder / "system.jsonl").read_text().splitlines()[-1])
    assert {"images_per_second", "data_wait_share", "peak_gb"} <= set(machine)


def test_sampling_from_a_run(whole: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    for weights in ("model", "ema1", "ema2"):
        picture = tmp_path / f"{weights}.png"
        drawn = cli(
            "sample", "--ckpt", whole, "--weights", weights, "--classes", "house", "--steps", "2", "-o", picture
        )
        assert drawn[0] == 0, drawn
        assert picture_size(picture) == (16, 16)


def test_what_is_not_a_run_is_refused(whole: Path, tmp_path: Path, refused: Refused) -> None:
    file = next(whole.glob("*.safetensors"))
    refused(f"is a file, want a run's folder: give {whole}", "train", "--resume", file)
    refused(f"no such folder ({whole.parent} holds run)", "train", "--resume", whole.parent / "rum")
    refused(f"has no config.yaml but run: did you mean {whole}?", "train", "--resume", whole.parent)
    refused("is not a run, it has no config.yaml but nothing", "train", "--resume", tmp_path)
    refused("leave --name and --output out", "train", "--resume", whole, "--name", "x")


def test_a_changed_run_is_refused(micro: Path, whole: Path, tmp_path: Path, refused: Refused) -> None:
    lr = "was started with --lr 0.0005, got 0.01: leave it out to continue"
    refused(lr, "train", "--resume", whole, "--lr", "0.01")
    refused("was started with --vanilla False, got True", "train", "--resume", whole, "--vanilla")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(data / f"{i}.png")
    run(options(micro, tmp_path, data=str(data), steps=1))
    Image.new("RGB", (16, 16)).save(data / "9.png")
    refused("its data has changed", "train", "--resume", tmp_path / "run")


def test_a_second_process_is_refused(micro: Path, tmp_path: Path, refused: Refused) -> None:
    folder = run(options(micro, tmp_path, steps=1)).run
    with RunFolder(folder).locked():
        refused(f"process {os.getpid()} is training this run already", "train", "--resume", folder)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("config.yaml", "steps: 3\n", "config.yaml: is not the configuration of a run: restore it"),
        ("config.yaml", "steps: 0\ndata_fingerprint: x\n", "config.yaml: --steps is 0, want at least 1"),
        ("config.yaml", "a: [", "config.yaml: not valid YAML"),
        ("config.yaml", "stepps: 3\ndata_fingerprint: x\n", "unknown option 'stepps': did you mean 'steps'?"),
        ("model.json", "{}", "model.json: not an mlx-sf checkpoint"),
    ],
)
def test_a_damaged_folder_is_refused(
    file: str, text: str, message: str, micro: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = run(options(micro, tmp_path, steps=1)).run
    (folder / file).write_text(text)
    refused(message, "train", "--resume", folder)
    (folder / "model.json").unlink()
    with pytest.raises(MlxSfError, match=r"model\.json: is missing: restore it, or start a new run with name"):
        run({}, resume=str(folder))
