"""The whole experiment: what is missing is run, each result kept at once; then tables and figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.common.files import writable_folder
from mlx_sf.common.progress import Progress
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import save_png

from . import results
from .plan import Plan, Run
from .runs import execute

Executor = Callable[[Plan, Run], tuple[dict[str, Any], np.ndarray]]


def experiment(plan: Plan, folder: Path, limit: int | None = None, execute: Executor = execute) -> None:
    """Run what `folder`/results.jsonl lacks, at most `limit` runs. A killed run is done again from its start."""
    path = writable_folder(folder) / "results.jsonl"
    done = results.read(path, plan)
    results.drop_unfinished_line(path)
    missing = [run for run in plan.runs() if run not in done][:limit]
    with Progress(len(missing), "regimes", "runs", every=60.0) as progress:
        for run in missing:
            record, pictures = execute(plan, run)
            if not np.isfinite([*record["v_loss"], record["spectral"], record["frechet"]]).all():
                raise MlxSfError(f"regimes: {run} ended with numbers that are not finite: lower the learning rate")
            strip = np.concatenate(list(pictures[:20]), axis=1)  # two of each class, to be looked at
            save_png(folder / "samples" / f"{run.regime}-{run.patch}-{run.arm}-{run.seed}.png", strip)
            results.append(path, plan, run, record)
            progress.note(f"{run}: loss {results.value(record, 'loss', plan):.4g}")
            progress.update()


def report(plan: Plan, folder: Path) -> list[Path]:
    """Write tables and figures of the results in `folder`; returns their paths."""
    from .figure import pictures, summary, times  # matplotlib is slow to import

    path = folder / "results.jsonl"
    records = results.read(path, plan)
    if not records:
        raise MlxSfError(f"{path}: no finished run there: run the experiment first, or name its folder with --output")
    results.write_tables(records, plan, folder)
    summary(records, plan, folder / "summary.png")
    times(records, plan, folder / "times.png")
    written = ["table.md", "table.csv", "summary.png", "times.png"]
    if pictures(plan, folder / "samples", folder / "samples.png"):
        written.append("samples.png")
    return [folder / name for name in written]
