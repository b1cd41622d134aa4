"""Records on disk, a JSON file for each finished run, and the statistics that are drawn from them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.common.files import replacing, writable_folder
from mlx_sf.data.captioned_scenes import categories
from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.geneval import Outcome, Summary, summarise
from scripts.regimes.results import Estimate, estimate

from .plan import BASELINE, Plan, Run

Record = dict[str, Any]
Records = dict[Run, Record]
OVERALL = "overall"  # the unweighted mean over categories
METRICS = {"loss": "validation loss", "x_mse": "error of the clean image", "spectral": "spectral distance"}
METRICS |= {"frechet": "Fréchet distance"}
_RESAMPLES, _LEVEL = 4000, 0.95


# ------------------------------------------------------------------------------------------------------- files


def path_of(folder: Path, run: Run) -> Path:
    return folder / "records" / f"{run.name}.json"


def write(folder: Path, plan: Plan, run: Run, record: Record) -> None:
    """Keep a finished run; it is whole on the disk when this returns."""
    path = path_of(folder, run)
    writable_folder(path.parent)
    text = json.dumps({"run": asdict(run), "settings": plan.settings(), "result": record}, indent=None)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read(folder: Path, plan: Plan) -> Records:
    """The finished runs of a folder, in the plan's order; those of other patches, arms or seeds are left out.

    Raises `MlxSfError`, naming the file, for what is no result of this plan's settings.
    """
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        run, record = _parse(path, plan)
        found[run] = record
    return {run: found[run] for run in plan.runs() if run in found}


def _parse(path: Path, plan: Plan) -> tuple[Run, Record]:
    fix = "delete it (the run is done again) or choose another --output"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        run, settings, record = data["run"], data["settings"], data["result"]
        run = Run(int(run["patch"]), str(run["arm"]), int(run["seed"]))
        settings = dict(settings)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MlxSfError(f"{path}: not a result of this program: {fix}") from None
    if path.stem != run.name:
        raise MlxSfError(f"{path}: holds the result of {run.name}: rename it, or {fix}")
    wanted = plan.settings()
    for name in {**wanted, **settings}:
        got, want = settings.get(name), wanted.get(name)
        if got != want:
            raise MlxSfError(
                f"{path}: made with {name} {_short(got)}, want {_short(want)}: choose another --output for other "
                "settings"
            )
    if not complete(record, plan):
        raise MlxSfError(f"{path}: the result of {run} lacks numbers or holds some that are not finite: {fix}")
    return run, record


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def complete(record: Any, plan: Plan) -> bool:
    """Whether a record holds all that is reported of a run, in finite numbers."""
    try:
        numbers = [record["spectral"], record["frechet"], *record["v_loss"], *record["x_mse"]]
        known = record["known"]
        numbers += [known["distances"][k] for k in ("spectral", "frechet")]
        lengths = len(record["v_loss"]) == len(record["x_mse"]) == plan.bins
        for split in ("seen", "unseen"):
            numbers += [known[k][split][c] for k in ("true", "chance") for c in categories(split)]
            verdicts = record["scores"][split]
            lengths = lengths and len(verdicts) == plan.prompts * len(categories(split))
            lengths = lengths and all(len(v["correct"]) == plan.pictures and v["tag"] and v["prompt"] for v in verdicts)
            numbers += [c for v in verdicts for c in v["correct"]]
        return lengths and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    except (KeyError, TypeError):
        return False


# ---------------------------------------------------------------------------------------------------- numbers


def value(record: Record, metric: str, plan: Plan) -> float:
    """A run's number in a metric of `METRICS`; smaller is better in all of them.

    loss: the training loss on held-out scenes, bins of t weighted as often as training visits them. x_mse: the plain
    mean over the bins of the squared error of the clean image.
    """
    if metric == "loss":
        return float(np.dot(record["v_loss"], plan.weights()))
    return float(np.mean(record["x_mse"])) if metric == "x_mse" else float(record[metric])


def pairs(records: Records, patch: int, arm: str) -> list[tuple[int, Record, Record]]:
    """(seed, the arm's record, the baseline's) of each seed that has both."""
    seeds = sorted({run.seed for run in records})
    found = [(s, records.get(Run(patch, arm, s)), records.get(Run(patch, BASELINE, s))) for s in seeds]
    return [(s, a, b) for s, a, b in found if a is not None and b is not None]


def gains(records: Records, plan: Plan, metric: str, patch: int, arm: str) -> list[float]:
    """By how many percent an arm is below the baseline, for each seed that has both: positive is better."""
    found = pairs(records, patch, arm)
    return [100 * (1 - value(a, metric, plan) / value(b, metric, plan)) for _, a, b in found]


def gain_per_time(records: Records, patch: int, arm: str) -> list[Estimate]:
    """The gain in validation loss in percent, per bin of t."""
    found = [100 * (1 - np.array(a["v_loss"]) / np.array(b["v_loss"])) for _, a, b in pairs(records, patch, arm)]
    return [estimate(column) for column in np.transpose(found)] if found else []


def scores(records: Records, patch: int, arm: str, split: str) -> Summary | None:
    """GenEval's summary of all seeds of an arm; a resample of its intervals draws prompts, with all seeds' pictures."""
    outcomes = [
        Outcome(v["tag"], v["prompt"], bool(correct))
        for run, record in records.items()
        if (run.patch, run.arm) == (patch, arm)
        for v in record["scores"][split]
        for correct in v["correct"]
    ]
    return summarise(outcomes) if outcomes else None


@dataclass(frozen=True)
class Difference:
    """By how many points (percent of pictures) an arm scores above the baseline.

    `low` and `high`: percentile bootstrap interval over prompts. `per_seed`: the difference of each seed.
    """

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """A difference is called shown where its interval excludes 0 and two or more seeds all agree with it."""
        if len(self.per_seed) > 1 and self.low > 0 and min(self.per_seed) > 0:
            return "higher"
        if len(self.per_seed) > 1 and self.high < 0 and max(self.per_seed) < 0:
            return "lower"
        return "not shown"


def differences(records: Records, patch: int, arm: str, split: str) -> dict[str, Difference]:
    """The paired difference of an arm to the baseline, by category and `OVERALL`; {} where no seed has both.

    Pictures are paired: the same prompt, noise and seed. A resample draws as many prompts of each category, with the
    pictures of all seeds.
    """
    found = pairs(records, patch, arm)
    if not found:
        return {}
    tables: list[dict[str, dict[str, list[float]]]] = []  # per seed: category -> prompt -> sum of differences, pictures
    for _, ours, base in found:
        table: dict[str, dict[str, list[float]]] = {}
        for a, b in zip(ours["scores"][split], base["scores"][split], strict=True):
            if (a["tag"], a["prompt"]) != (b["tag"], b["prompt"]):
                raise MlxSfError(f"captions: {a['prompt']!r} is paired with {b['prompt']!r}: the records do not match")
            cell = table.setdefault(a["tag"], {}).setdefault(a["prompt"], [0.0, 0.0])
            cell[0] += sum(a["correct"]) - sum(b["correct"])
            cell[1] += len(a["correct"])
        tables.append(table)
    rng, out, means, drawn = np.random.default_rng(0), {}, [], []
    for tag in tables[0]:
        cells = np.array([[table[tag][prompt] for prompt in tables[0][tag]] for table in tables])  # (seeds, prompts, 2)
        per_seed = 100 * cells[..., 0].sum(axis=1) / cells[..., 1].sum(axis=1)
        rows = cells.sum(axis=0)
        times = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _RESAMPLES)  # that each prompt is drawn
        sums = times @ rows
        drawn.append(100 * sums[:, 0] / sums[:, 1])
        means.append(per_seed)
        out[tag] = _difference(per_seed, drawn[-1])
    return {**out, OVERALL: _difference(np.mean(means, axis=0), np.mean(drawn, axis=0))}


def _difference(per_seed: np.ndarray, drawn: np.ndarray) -> Difference:
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Difference(float(per_seed.mean()), float(low), float(high), tuple(float(v) for v in per_seed))


def known(records: Records, name: str, split: str) -> dict[str, float]:
    """The scores by category of true pictures that a record names "true" or "chance", from 0 to 1; with `OVERALL`."""
    by_category = next(iter(records.values()))["known"][name][split]
    return {**by_category, OVERALL: float(np.mean(list(by_category.values())))}


def seeds_text(numbers: Sequence[int]) -> str:
    """For example "3 seeds" or "2 to 3 seeds"."""
    ends = sorted({min(numbers, default=0), max(numbers, default=0)})
    return " to ".join(map(str, ends)) + (" seed" if ends == [1] else " seeds")
