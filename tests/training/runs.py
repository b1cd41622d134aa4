"""Tiny runs, and what is compared of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.checkpoints.checkpoint import step_files
from mlx_sf.training.plan import plan
from mlx_sf.training.trainer import Outcome, fit


def options(micro: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run of 8 steps over almost two epochs, which starts from the tiny checkpoint `micro`."""
    base = {"init": str(micro), "batch_size": 4, "epoch_size": 20, "preview_every": 0, "keep": 0, "steps": 8}
    return {**base, "save_every": 3, "log_every": 3, "output": str(output), "name": "run", **changes}


def run(given: dict[str, Any], resume: str | None = None, say: Callable[[str], None] = lambda line: None) -> Outcome:
    return fit(plan(given, resume), say)


def flags(given: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    return [x for k, v in given.items() for x in ("--" + k.replace("_", "-"), *([] if v is True else [str(v)]))]


def content(folder: Path, step: int) -> bytes:
    """All of a checkpoint: weights, EMAs, moments, position, configuration."""
    return dict(step_files(folder))[step].read_bytes()


def assert_equal_runs(a: Path, b: Path, step: int) -> None:
    assert content(a, step) == content(b, step)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


class KilledError(BaseException):
    """Ends a run as a power cut would, as far as one process can."""


class DyingSource:
    """A source whose pictures for step `step` end the run."""

    def __init__(self, source: Any, step: int, batch_size: int) -> None:
        self.source, self.step, self.batch_size = source, step, batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, seed: int, epoch: int) -> Iterator[Callable[[], tuple[np.ndarray, int | str]]]:
        before = epoch * (len(self.source) // self.batch_size)
        for n, load in enumerate(self.source.epoch(seed, epoch)):
            yield load if before + n // self.batch_size != self.step else _die


def _die() -> Any:
    raise KilledError


def run_until(given: dict[str, Any], step: int) -> None:
    """Train, and die before step `step` (from 0) is taken."""
    p = plan(given)
    try:
        fit(replace(p, source=DyingSource(p.source, step, p.recipe.batch_size)), lambda line: None)
    except KilledError:
        return
    raise AssertionError("the run outlived its end")
