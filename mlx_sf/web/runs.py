"""The runs in a folder: what each has come to, read from the files that training writes."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import step_files
from ..common.text import duration
from ..errors import MlxSfError
from ..training.log import METRICS, read_lines
from ..training.options import Options
from ..training.run_folder import RunFolder

SYSTEM = "system.jsonl"
HEADERS = ("run", "state", "step", "of", "loss", "images a second", "EMA share")


@dataclass(frozen=True)
class Run:
    """A run's folder as it is at one moment.

    `saved`: step of its newest checkpoint, 0 before the first. `training`: the process that trains it now.
    """

    path: Path
    saved: int
    training: int | None


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its options, its lines of metrics and of what the machine did, its preview pictures."""

    run: Run
    options: Options
    metrics: Sequence[dict[str, Any]]
    system: Sequence[dict[str, Any]]
    previews: Sequence[Path]

    @property
    def step(self) -> int:
        return max(self.run.saved, int(self.metrics[-1]["step"]) if self.metrics else 0)

    @property
    def steps(self) -> int | None:
        """Of the whole run; None where it is to last a number of epochs, whose steps only its data say."""
        return self.options.steps if self.options.epochs is None else None

    @property
    def state(self) -> str:
        if self.run.training is not None:
            return "training now"
        return "finished" if self.steps is not None and self.run.saved >= self.steps else "stopped"

    @property
    def resume(self) -> str:
        """The command that continues the run."""
        return shlex.join(["mlx-sf", "train", "--resume", str(self.run.path)])


def find_runs(folder: Path) -> list[Run]:
    """The runs in a folder, the one that changed last first. Links to other places are left out."""
    root = folder.resolve()
    found = []
    for config in folder.glob("*/config.yaml"):
        path = config.parent
        if path.is_symlink() or not config.resolve().is_relative_to(root):
            continue
        changed = max(f.stat().st_mtime for f in (config, path / METRICS) if f.exists())
        files = step_files(path)
        found.append((changed, Run(path, files[-1][0] if files else 0, RunFolder(path).held_by())))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]


def find_run(folder: Path, name: str) -> Run:
    """The run of this name; `MlxSfError` where the folder holds none, whatever else the name may point to."""
    for run in find_runs(folder):
        if run.path.name == name:
            return run
    raise MlxSfError(f"{folder}: holds no run {name!r}: choose one that is listed")


def training_now(folder: Path) -> list[Run]:
    """The runs that another process trains at this moment."""
    return [run for run in find_runs(folder) if run.training is not None]


def progress(run: Run) -> Progress:
    """What the run's files say."""
    metrics, system = (read_lines(run.path / name) for name in (METRICS, SYSTEM))
    previews = sorted((run.path / "previews").glob("*.png"))
    inside = [p for p in previews if not p.is_symlink()]
    return Progress(run, RunFolder(run.path).read().options, metrics, system, inside)


def overview(folder: Path) -> list[list[Any]]:
    """A row for each run, as `HEADERS` says. A run that cannot be read says so in its row."""
    rows: list[list[Any]] = []
    for run in find_runs(folder):
        try:
            p = progress(run)
        except MlxSfError:
            rows.append([run.path.name, "cannot be read", run.saved, "", "", "", ""])
            continue
        last, system = (lines[-1] if lines else {} for lines in (p.metrics, p.system))
        rows.append([
            run.path.name, p.state, p.step, p.steps or "", _number(last.get("loss"), 4),
            _number(system.get("images_per_second"), 1), _share(last.get("ema1_initial_share")),
        ])  # fmt: skip
    return rows


def rows_of(p: Progress) -> list[tuple[str, str]]:
    """What the page says of a run, by name."""
    last, system = (lines[-1] if lines else {} for lines in (p.metrics, p.system))
    training = f" by process {p.run.training}" if p.run.training is not None else ""
    rows = [
        ("State", p.state + training),
        ("Step", f"{p.step} of {p.steps}" if p.steps else str(p.step)),
        ("Loss", _number(last.get("loss"), 4)),
        ("Images a second", _number(system.get("images_per_second"), 1)),
        ("EMA share", f"{_share(last.get('ema1_initial_share'))} of the initial weights are still in ema1"),
        ("Peak memory", f"{_number(system.get('peak_gb'), 2)} GB"),
        ("Newest checkpoint", f"step {p.run.saved}" if p.run.saved else "none yet"),
    ]
    if p.run.training is not None and p.steps and (speed := system.get("images_per_second")):
        images = (p.steps - p.step) * last.get("images", 0) / max(1, last.get("step", 1))
        rows.insert(2, ("Time left", f"about {duration(images / speed)}"))
    return rows


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else ""


def preview_step(path: Path) -> str:
    """The step that a preview's name says."""
    return str(int(path.stem)) if path.stem.isdigit() else path.stem
