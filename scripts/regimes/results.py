"""Results on disk, one line of JSON for each finished run, and the statistics that are drawn from them."""

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from mlx_sf.common.files import replacing
from mlx_sf.errors import MlxSfError

from .plan import ARMS, BASELINE, Plan, Run

Record = dict[str, Any]
Records = dict[Run, Record]
METRICS = {
    "loss": "validation loss",
    "x_mse": "error of the clean image",
    "spectral": "spectral distance",
    "frechet": "Fréchet distance",
}


def read(path: Path, plan: Plan) -> Records:
    """Finished runs in a results file (none if it is missing). A last line that was cut off by a kill does not count.

    Raises `MlxSfError`, naming the line, for anything else that is not a result of this plan's settings.
    """
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise MlxSfError(f"{path}: cannot be read as text ({e}): choose another --output") from None
    found: Records = {}
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is a cut-off line or nothing
        run, record = _parse(line, f"{path} line {number}", plan)
        if run in found:
            raise MlxSfError(f"{path} line {number}: a second result of {run}: delete one of the two lines")
        found[run] = record
    return found


def drop_unfinished_line(path: Path) -> None:
    """Remove what follows the last newline, if anything does, before more is appended."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with replacing(path) as temporary:
            temporary.write_bytes(whole)


def _parse(line: str, where: str, plan: Plan) -> tuple[Run, Record]:
    fix = "delete that line (the run is done again) or choose another --output"
    try:
        data = json.loads(line)
        run, settings, record = data["run"], data["settings"], data["result"]
        run = Run(str(run["regime"]), int(run["patch"]), str(run["arm"]), int(run["seed"]))
        wanted = plan.settings(run.regime)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MlxSfError(f"{where}: not a result of this program: {fix}") from None
    for name in wanted:
        got = settings.get(name) if isinstance(settings, dict) else None
        if got != wanted[name]:
            raise MlxSfError(
                f"{where}: made with {name} {got}, want {wanted[name]}: choose another --output for other settings"
            )
    ok = isinstance(record, dict) and all(_is_number(record.get(k)) for k in ("spectral", "frechet"))
    for name in ("v_loss", "x_mse"):
        values = record.get(name) if ok else None
        ok = isinstance(values, list) and len(values) == plan.bins and all(map(_is_number, values))
    if not ok:
        raise MlxSfError(f"{where}: the result of {run} lacks numbers or holds some that are not finite: {fix}")
    return run, record


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def append(path: Path, plan: Plan, run: Run, record: Record) -> None:
    """Add one finished run; it is on the disk when this returns."""
    line = json.dumps({"run": asdict(run), "settings": plan.settings(run.regime), "result": record})
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be written ({e.strerror}): free some space or choose another --output") from e


def value(record: Record, metric: str, plan: Plan) -> float:
    """A run's number in a metric of `METRICS`; smaller is better in all of them.

    loss: the training loss on held-out scenes, bins of t weighted as often as training visits them. x_mse: the plain
    mean over the bins of the squared error of the clean image.
    """
    if metric == "loss":
        return float(np.dot(record["v_loss"], plan.weights()))
    return float(np.mean(record["x_mse"])) if metric == "x_mse" else float(record[metric])


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` seeds and the half width of its 95 % confidence interval (nan with a single seed)."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half_width:.2g}" if self.n > 1 else f"{self.mean:.3g}"


def estimate(values: Sequence[float]) -> Estimate:
    """Student's t-interval of the mean: the values are taken as independent and about normal."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), half, n)


def gains(
    records: Records, plan: Plan, metric: str, regime: str, patch: int, arm: str, over: str = BASELINE
) -> list[float]:
    """By how many percent an arm is below another, for each seed that has both: positive is better."""
    out = []
    for seed in sorted({run.seed for run in records}):
        ours = records.get(Run(regime, patch, arm, seed))
        base = records.get(Run(regime, patch, over, seed))
        if ours is not None and base is not None:
            out.append(100 * (1 - value(ours, metric, plan) / value(base, metric, plan)))
    return out


def overall(records: Records, plan: Plan, metric: str, arm: str, over: str) -> Estimate | None:
    """The gain averaged over all kinds of data and patch sizes, for each seed that has them all."""
    cells = [(regime, patch) for regime in plan.regimes for patch in plan.patches]
    per_seed = []
    for seed in sorted({run.seed for run in records}):
        mine = {run: r for run, r in records.items() if run.seed == seed}
        found = [g for cell in cells for g in gains(mine, plan, metric, *cell, arm, over)]
        if len(found) == len(cells):
            per_seed.append(float(np.mean(found)))
    return estimate(per_seed) if per_seed else None


def gain_per_time(records: Records, plan: Plan, regime: str, patch: int, arm: str) -> list[Estimate]:
    """The gain in validation loss, per bin of t (the weights 1/(1-t)^2 cancel: the same for x_mse)."""
    per_seed = []
    for seed in sorted({run.seed for run in records}):
        ours = records.get(Run(regime, patch, arm, seed))
        base = records.get(Run(regime, patch, BASELINE, seed))
        if ours is not None and base is not None:
            per_seed.append(100 * (1 - np.array(ours["v_loss"]) / np.array(base["v_loss"])))
    return [estimate(column) for column in np.transpose(per_seed)] if per_seed else []


def rows(records: Records, plan: Plan) -> Iterable[dict[str, Any]]:
    """One row per regime, patch and arm: the mean of each metric over seeds, and the paired gain with its interval."""
    for regime in plan.regimes:
        for patch in sorted(plan.patches):
            for arm in plan.arms:
                found = [r for run, r in records.items() if (run.regime, run.patch, run.arm) == (regime, patch, arm)]
                if not found:
                    continue
                row: dict[str, Any] = {"data": regime, "patch": patch, "arm": arm, "seeds": len(found)}
                for metric in METRICS:
                    row[metric] = estimate([value(r, metric, plan) for r in found])
                    paired = gains(records, plan, metric, regime, patch, arm)
                    row[f"{metric} gain %"] = estimate(paired) if paired and arm != BASELINE else None
                yield row


def write_tables(records: Records, plan: Plan, folder: Path) -> None:
    """table.csv (everything, with intervals) and table.md (for people; with the schedules against each other)."""
    table = list(rows(records, plan))
    with replacing(folder / "table.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        head = ["data", "patch", "arm", "seeds"]
        columns = [c for m in METRICS for c in (m, f"{m} gain %")]
        writer.writerow([*head, *(x for c in columns for x in (c, f"{c} 95% ±"))])
        for row in table:
            cells = [(row[c].mean, row[c].half_width) if row[c] else ("", "") for c in columns]
            writer.writerow([*(row[h] for h in head), *(_number(x) for pair in cells for x in pair)])
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(markdown(table) + "\n" + schedules(records, plan), encoding="utf-8")


def _number(x: float | str) -> str:
    return x if isinstance(x, str) else "" if math.isnan(x) else f"{x:.6g}"


def _percent(e: Estimate) -> str:
    return f"{e.mean:+.1f} ± {e.half_width:.1f} %" if e.n > 1 else f"{e.mean:+.1f} %"


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Means over seeds; in brackets the paired gain over no forcing in percent, with its 95 % interval."""
    lines = [
        "| data | patch | arm | seeds | " + " | ".join(METRICS.values()) + " |",
        "|---|---|---|---|" + "---|" * len(METRICS),
    ]
    for row in table:
        cells = [row["data"], str(row["patch"]), ARMS[row["arm"]], str(row["seeds"])]
        for metric in METRICS:
            gain = row[f"{metric} gain %"]
            more = "" if gain is None else f" ({_percent(gain)})"
            cells.append(f"{row[metric].mean:.4g}{more}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def schedules(records: Records, plan: Plan) -> str:
    """The schedules against each other, averaged over all cells: percent lower, with the 95 % interval over seeds."""
    lines = [
        "| all data and patch sizes | seeds | " + " | ".join(METRICS.values()) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    pairs = [(arm, BASELINE) for arm in plan.arms if arm != BASELINE]
    pairs += [("data", "linear")] if {"data", "linear"} <= set(plan.arms) else []
    for arm, over in pairs:
        found = [overall(records, plan, metric, arm, over) for metric in METRICS]
        cells = [_percent(e) if e else "" for e in found]
        seeds = next((str(e.n) for e in found if e), "0")
        lines.append("| " + " | ".join([f"{ARMS[arm]} over {ARMS[over]}", seeds, *cells]) + " |")
    return "\n".join(lines) + "\n"
