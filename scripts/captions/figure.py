"""Figures that one reads at a glance, from records and the sheets of samples beside them."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.common.files import replacing
from mlx_sf.data.captioned_scenes import categories

from .plan import ARMS, BASELINE, Plan, Run
from .results import OVERALL, Records, differences, gain_per_time, known, pairs, scores, seeds_text

# Okabe and Ito's colours: told apart with any colour vision; markers say the same a second time
_STYLE = {"none": ("#555555", "o"), "linear": ("#0072B2", "s"), "fixed": ("#D55E00", "^")}
_CATEGORY = {
    "single_object": "single\nobject",
    "two_object": "two\nobjects",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "two\ncolours",
    OVERALL: "OVERALL",
}
_SPLIT = {"seen": "seen combinations", "unseen": "combinations that\ntraining never showed"}
_RIGHT, _WRONG = "#009E73", "#CC3377"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _save(plt: Any, figure: Any, path: Path, **options: Any) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, **options)
    plt.close(figure)


def _grid(plt: Any, columns: int, height: float) -> tuple[Any, Any]:
    return plt.subplots(
        2, columns, figsize=(1.4 + 4.6 * columns, height), sharey="row", layout="constrained", squeeze=False
    )


def _dodge(plan: Plan, arm: str) -> float:
    return 0.2 * (plan.arms.index(arm) - (len(plan.arms) - 1) / 2)


def _category_axis(axes: Any, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), [_CATEGORY[n] for n in names], fontsize=7.5)
    axes.axvspan(len(names) - 1.5, len(names) - 0.5, color="0.94", zorder=0)
    axes.set_xlim(-0.5, len(names) - 0.5)


def score_figure(records: Records, plan: Plan, path: Path) -> None:
    """Score per category by arm with its interval: a column a patch size, seen above and unseen below."""
    plt = _pyplot()
    figure, grid = _grid(plt, len(plan.patches), 6.4)
    for row, split in zip(grid, _SPLIT, strict=True):
        names = [*categories(split), OVERALL]
        floor, top = known(records, "chance", split), known(records, "true", split)
        for axes, patch in zip(row, plan.patches, strict=True):
            for x, name in enumerate(names):
                for level, line in ((100 * floor[name], ":"), (100 * top[name], "-")):
                    axes.hlines(level, x - 0.4, x + 0.4, colors="0.6", linestyles=line, lw=1, zorder=1)
            for arm in plan.arms:
                summary = scores(records, patch, arm, split)
                if summary is None:
                    continue
                shares = [(s.value, s.low, s.high) for s in (summary.tags[n] for n in names[:-1])]
                shares.append((summary.overall, *(summary.overall_interval or (summary.overall,) * 2)))
                mean, low, high = 100 * np.array(shares, float).T
                colour, marker = _STYLE[arm]
                axes.errorbar(
                    np.arange(len(names)) + _dodge(plan, arm),
                    mean,
                    np.maximum([mean - low, high - mean], 0),
                    fmt=marker,
                    color=colour,
                    capsize=2.5,
                    lw=1.2,
                    ms=5,
                    label=ARMS[arm],
                )
            _category_axis(axes, names)
            axes.set_ylim(-3, 105)
        row[0].set_ylabel(f"{_SPLIT[split]}\n% of pictures right")
    for axes, patch in zip(grid[0], plan.patches, strict=True):
        axes.set_title(f"patch {patch}", fontsize=11, fontweight="bold")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(plan.arms), frameon=False)
    counts = [sum(1 for run in records if (run.patch, run.arm) == (p, a)) for p in plan.patches for a in plan.arms]
    figure.supxlabel(
        f"Bars: 95 % bootstrap over prompts, {seeds_text(counts)} together. Grey: true pictures on their own prompt "
        "(line) and on another one (dots).",
        fontsize=8,
    )
    _save(plt, figure, path)


def gain_figure(records: Records, plan: Plan, path: Path) -> None:
    """The paired difference to the baseline per category, with its interval and each seed's own as a dot."""
    plt = _pyplot()
    figure, grid = _grid(plt, len(plan.patches), 6.0)
    for row, split in zip(grid, _SPLIT, strict=True):
        names = [*categories(split), OVERALL]
        for axes, patch in zip(row, plan.patches, strict=True):
            axes.axhline(0, color=_STYLE[BASELINE][0], lw=1, zorder=1)
            for arm in plan.arms:
                found = differences(records, patch, arm, split)
                if arm == BASELINE or not found:
                    continue
                colour, marker = _STYLE[arm]
                x = np.arange(len(names)) + _dodge(plan, arm)
                d = [found[n] for n in names]
                mean = np.array([v.mean for v in d])
                bars = np.maximum([mean - [v.low for v in d], [v.high for v in d] - mean], 0)
                axes.errorbar(x, mean, bars, fmt=marker, color=colour, capsize=2.5, lw=1.2, ms=5, label=ARMS[arm])
                for at, v in zip(x, d, strict=True):
                    axes.plot([at + 0.07] * len(v.per_seed), v.per_seed, ".", color=colour, ms=3, alpha=0.6)
            _category_axis(axes, names)
        row[0].set_ylabel(f"{_SPLIT[split]}\npoints above no forcing")
    for axes, patch in zip(grid[0], plan.patches, strict=True):
        axes.set_title(f"patch {patch}", fontsize=11, fontweight="bold")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(plan.arms), frameon=False)
    counts = [len(pairs(records, p, BASELINE)) for p in plan.patches]
    figure.supxlabel(
        "Above the line: more pictures are right than without forcing, from the same noise. Bars: 95 % bootstrap over "
        f"prompts. Dots: each of {seeds_text(counts)}.",
        fontsize=8,
    )
    _save(plt, figure, path)


def time_figure(records: Records, plan: Plan, path: Path) -> None:
    """Validation loss by t relative to the baseline, a panel for each patch size."""
    plt = _pyplot()
    figure, grid = plt.subplots(
        1,
        len(plan.patches),
        figsize=(1.4 + 4 * len(plan.patches), 3.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    t = plan.times()
    for axes, patch in zip(grid[0], plan.patches, strict=True):
        axes.axhline(0, color=_STYLE[BASELINE][0], lw=1, zorder=0)
        for arm in plan.arms:
            e = gain_per_time(records, patch, arm)
            if arm == BASELINE or not e:
                continue
            mean, half = np.array([v.mean for v in e]), np.nan_to_num([v.half_width for v in e])
            colour, marker = _STYLE[arm]
            axes.plot(t, mean, marker=marker, ms=4, color=colour, label=ARMS[arm])
            axes.fill_between(t, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        axes.set_title(f"patch {patch}", fontsize=10)
        axes.set_xlabel("time t (0 noise, 1 picture)")
    # intervals of few seeds can be wider than the picture: what must stay in sight are the means
    means = [v.mean for p in plan.patches for a in plan.arms for v in gain_per_time(records, p, a)]
    reach = max(2.0, 2 * float(np.abs(means).max(initial=0)))
    grid[0][0].set_ylim(-reach, reach)
    grid[0][0].set_ylabel("validation loss:\n% lower than without forcing")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(plan.arms), frameon=False)
    _save(plt, figure, path)


def sample_figure(records: Records, plan: Plan, folder: Path, path: Path) -> bool:
    """Samples of the first seed with their prompts, a row an arm; frames say what the detector found.

    False, and nothing is written, where no patch size has the sheets of all arms in `folder`.
    """
    seed = plan.seeds[0]
    patches = [
        p
        for p in plan.patches
        if all(Run(p, a, seed) in records and (folder / f"{Run(p, a, seed).name}.png").exists() for a in plan.arms)
    ]
    if not patches or not plan.sheet:
        return False
    plt = _pyplot()
    rows = [(split, patch) for split in _SPLIT for patch in patches]
    columns = plan.sheet * max(len(categories(split)) for split in _SPLIT)
    figure = plt.figure(figsize=(1.2 + 0.95 * columns, sum(0.75 + 0.98 * len(plan.arms) for _ in rows)))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (split, patch) in zip(parts, rows, strict=True):
        frames = f" (seed {seed}; frames: green line right, red dashes wrong)" if part is parts[0] else ""
        part.suptitle(f"patch {patch}, {' '.join(_SPLIT[split].split())}{frames}", fontsize=10, y=0.985)
        grid = part.subplots(
            len(plan.arms), columns, squeeze=False,
            gridspec_kw={"wspace": 0.08, "hspace": 0.08, "left": 0.1, "right": 0.995, "top": 0.8, "bottom": 0.02},
        )  # fmt: skip
        first = 0 if split == "seen" else plan.sheet * len(categories("seen"))
        number = plan.sheet * len(categories(split))
        for row, arm in zip(grid, plan.arms, strict=True):
            run = Run(patch, arm, seed)
            strip = plt.imread(folder / f"{run.name}.png")
            verdicts = records[run]["scores"][split]
            for i, axes in enumerate(row):
                axes.set(xticks=[], yticks=[])
                if i >= number:
                    axes.set_axis_off()
                    continue
                n = plan.img_size
                axes.imshow(strip[:, (first + i) * n : (first + i + 1) * n], interpolation="nearest")
                right = verdicts[i]["correct"][0]
                for spine in axes.spines.values():
                    spine.set(visible=True, color=_RIGHT if right else _WRONG, lw=2.2, ls="-" if right else "--")
                if arm == plan.arms[0]:
                    axes.set_title("\n".join(textwrap.wrap(verdicts[i]["prompt"], 15)), fontsize=6)
            row[0].set_ylabel(ARMS[arm], rotation=0, ha="right", va="center", fontsize=8)
    _save(plt, figure, path)
    return True
