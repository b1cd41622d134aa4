"""Metrics survive being cut short, FLOPs are counted right, trackers get what the files get."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mlx_sf.common.text import duration
from mlx_sf.errors import MlxSfError
from mlx_sf.models.flops import forward_flops
from mlx_sf.models.jit_sizes import model_config
from mlx_sf.training.log import JsonLines, read_lines, tracker


def test_lines_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    lines = JsonLines(path, 2)
    lines.write({"step": 3, "loss": 0.1})
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.1}]


def test_flops_of_published_sizes() -> None:
    plain = forward_flops(model_config("B/32", forcing=None))
    assert 15e9 < plain < 25e9  # JiT-B: 131 M parameters at 64 to 96 tokens, two operations each
    assert 0.02 < forward_flops(model_config("B/32")) / plain - 1 < 0.03  # the forcing's two DCTs: 2.6 %


def test_durations() -> None:
    assert [duration(s) for s in (5, 300, 5400, float("inf"))] == ["5 s", "5 min", "1 h 30 min", "unknown"]


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    run = types.SimpleNamespace(log=lambda v, step: seen.append((v, step)), finish=lambda: seen.append("finished"))
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: run))
    for name in ("tensorboard", "wandb"):
        t = tracker(name, tmp_path, {})
        assert t is not None
        t.log(3, {"loss": 0.5})
        t.close()
    assert seen == [str(tmp_path / "tensorboard"), ("loss", 0.5, 3), "closed", ({"loss": 0.5}, 3), "finished"]
    assert tracker("", tmp_path, {}) is None
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MlxSfError, match="pip install tensorboardX"):
        tracker("tensorboard", tmp_path, {})
