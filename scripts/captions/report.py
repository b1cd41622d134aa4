"""What the README says about results: tables, figures and one plain sentence each, from records alone."""

from pathlib import Path

import numpy as np

from mlx_sf.common.files import replacing, writable_folder
from mlx_sf.data.captioned_scenes import categories
from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.geneval import Share
from scripts.regimes.results import Estimate, estimate

from . import results
from .plan import ARMS, BASELINE, Plan, Run
from .results import METRICS, OVERALL, Difference, Records, differences, gains, known, scores, value

_WANTED = 60  # percent on seen combinations that the best arm should reach for the experiment to say something
_EMPTY = "Nothing was run yet: there are no results."
_NAMES = {"seen": "seen", "unseen": "unseen"}


def report(preset: str, plan: Plan, folder: Path, readme: Path) -> list[Path]:
    """Write figures into `folder` and the results of a preset into `readme`; returns the files written.

    In a README they stand between the lines that `marks` gives; a file that is missing is made.
    """
    records = results.read(folder, plan)
    written = _figures(records, plan, folder) if records else []
    text = render(records, plan, [p.name for p in written], _relative(folder, readme))
    begin, end = marks(preset)
    before = readme.read_text(encoding="utf-8") if readme.exists() else f"# Results\n\n{begin}\n{end}\n"
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(end) < before.index(begin):
        raise MlxSfError(f"{readme}: want the lines {begin} and {end}, once each: put them where the results belong")
    after = before[: before.index(begin) + len(begin)] + "\n\n" + text + "\n" + before[before.index(end) :]
    writable_folder(readme.parent)
    with replacing(readme) as temporary:
        temporary.write_text(after, encoding="utf-8")
    return [*written, readme]


def marks(preset: str) -> tuple[str, str]:
    """The lines of a README between which the results of a preset stand."""
    return f"<!-- results of {preset}: written by `report` -->", f"<!-- end of the results of {preset} -->"


def _relative(folder: Path, readme: Path) -> str:
    try:
        inside = folder.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return f"{folder.resolve().as_posix()}/"
    return "" if inside == "." else f"{inside}/"


def _figures(records: Records, plan: Plan, folder: Path) -> list[Path]:
    from . import figure  # matplotlib is slow to import

    paths = [folder / n for n in ("scores.png", "gains.png", "times.png", "samples.png")]
    figure.score_figure(records, plan, paths[0])
    figure.gain_figure(records, plan, paths[1])
    figure.time_figure(records, plan, paths[2])
    return paths if figure.sample_figure(records, plan, folder / "samples", paths[3]) else paths[:3]


# -------------------------------------------------------------------------------------------------------- text


def render(records: Records, plan: Plan, figures: list[str], prefix: str) -> str:
    """The results in Markdown; `figures` are the names of those that lie in the folder `prefix`."""
    if not records:
        return _EMPTY + "\n"
    parts = [_state(records, plan), _best(records, plan)]
    if "scores.png" in figures:
        parts.append(f"![score per category, arm and patch size]({prefix}scores.png)")
    parts += ["**Does it help?** " + _legend(plan), _overall(records, plan)]
    if "gains.png" in figures:
        parts.append(f"![difference to no forcing per category]({prefix}gains.png)")
    legend = "Percent of pictures right, and the paired difference in points."
    parts += [f"**In which categories?** {legend}", _by_category(records, plan)]
    parts += ["**Loss and distances.** " + _distances_legend(records), _numbers(records, plan)]
    if "times.png" in figures:
        parts.append(f"![validation loss over time relative to no forcing]({prefix}times.png)")
    if "samples.png" in figures:
        parts.append(f"![samples with their prompts]({prefix}samples.png)")
    return "\n\n".join(p for p in parts if p) + "\n"


def _state(records: Records, plan: Plan) -> str:
    total = sum(1 for _ in plan.runs())
    made = [r.get("made", {}) for r in records.values()]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(m[name]) for m in made if m.get(name)})) or "unknown"

    seconds = {p: _mean([r["seconds_per_step"] for k, r in records.items() if k.patch == p]) for p in plan.patches}
    speeds = ", ".join(f"{s:.3f} s at patch {p}" for p, s in seconds.items() if s is not None)
    sizes = sorted({round(r["parameters"] / 1e6, 2) for r in records.values()})
    millions = " to ".join(f"{s:g}" for s in dict.fromkeys((sizes[0], sizes[-1])))
    unfinished = "" if len(records) == total else " **The experiment is not finished**: what follows is of these alone."
    return (
        f"Finished: {len(records)} of {total} networks ({all_of('date')}; mlx-sf {all_of('mlx_sf')}, "
        f"MLX {all_of('mlx')}, {all_of('machine')}, {all_of('device')}).{unfinished} "
        f"Each has {millions} million parameters and took {plan.steps:,} steps of {plan.batch_size} pictures "
        f"({speeds} a step, with whatever else ran on the machine)."
    )


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _best(records: Records, plan: Plan) -> str:
    found = {
        (p, a): s.overall for p in plan.patches for a in plan.arms if (s := scores(records, p, a, "seen")) is not None
    }
    (patch, arm), best = max(found.items(), key=lambda item: item[1])
    reached = "is above" if 100 * best > _WANTED else "is not above"
    return (
        f"The best arm, {ARMS[arm]} at patch {patch}, scores {100 * best:.1f} % overall on seen combinations, which "
        f"{reached} the {_WANTED} % that the experiment was to reach."
    )


def _legend(plan: Plan) -> str:
    return (
        "Overall is the unweighted mean over the categories. In brackets: 95 % bootstrap intervals over prompts, with "
        "the pictures of all seeds. *By seed*: each seed's own difference. A difference is called shown where its "
        "interval excludes 0 and all seeds, two or more, agree in its sign."
    )


def _interval(s: Share) -> str:
    low, high = (s.value if b is None else b for b in (s.low, s.high))
    return f"{100 * s.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _points(d: Difference) -> str:
    return f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def _overall(records: Records, plan: Plan) -> str:
    rows = []
    for patch in plan.patches:
        for split in _NAMES:
            for arm in plan.arms:
                s = scores(records, patch, arm, split)
                if s is None:
                    continue
                low, high = s.overall_interval or (s.overall, s.overall)
                cells = [str(patch), split, ARMS[arm], f"{100 * s.overall:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
                d = differences(records, patch, arm, split).get(OVERALL) if arm != BASELINE else None
                cells += [_points(d), ", ".join(f"{v:+.1f}" for v in d.per_seed), d.verdict] if d else ["", "", ""]
                rows.append(cells)
    head = ["patch", "combinations", "arm", "overall %", "points above no forcing", "by seed", "difference"]
    return _table(head, rows)


def _by_category(records: Records, plan: Plan) -> str:
    others = [a for a in plan.arms if a != BASELINE]
    rows = []
    for patch in plan.patches:
        for split in _NAMES:
            summaries = {a: scores(records, patch, a, split) for a in plan.arms}
            paired = {a: differences(records, patch, a, split) for a in others}
            if not any(summaries.values()):
                continue
            top, floor = known(records, "true", split), known(records, "chance", split)
            for tag in categories(split):
                cells = [str(patch), split, tag]
                cells += [_interval(s.tags[tag]) if s else "" for s in summaries.values()]
                for a in others:
                    d = paired[a].get(tag)
                    mark = "" if d is None or d.verdict == "not shown" else f" **{d.verdict}**"
                    cells.append("" if d is None else _points(d) + mark)
                rows.append([*cells, f"{100 * top[tag]:.1f}", f"{100 * floor[tag]:.1f}"])
    head = ["patch", "combinations", "category", *(f"{ARMS[a]} %" for a in plan.arms)]
    head += [f"{ARMS[a]}: points" for a in others] + ["true pictures %", "another prompt %"]
    return _table(head, rows)


def _distances_legend(records: Records) -> str:
    real = [r["known"]["distances"] for r in records.values()]
    return (
        "Means over seeds; in brackets how much lower than without forcing, in percent, with the 95 % t-interval of "
        f"the paired seeds. As many true pictures get a spectral distance of {real[0]['spectral']:.3g} and a Fréchet "
        f"distance of {real[0]['frechet']:.3g}."
    )


def _percent(e: Estimate) -> str:
    return f"{e.mean:+.1f} ± {e.half_width:.1f} %" if e.n > 1 else f"{e.mean:+.1f} %"


def _numbers(records: Records, plan: Plan) -> str:
    rows = []
    for patch in plan.patches:
        for arm in plan.arms:
            found = [records[r] for r in (Run(patch, arm, s) for s in plan.seeds) if r in records]
            if not found:
                continue
            cells = [str(patch), ARMS[arm], str(len(found))]
            for metric in METRICS:
                paired = gains(records, plan, metric, patch, arm) if arm != BASELINE else []
                more = f" ({_percent(estimate(paired))})" if paired else ""
                cells.append(f"{np.mean([value(r, metric, plan) for r in found]):.4g}{more}")
            rows.append(cells)
    return _table(["patch", "arm", "seeds", *METRICS.values()], rows)
