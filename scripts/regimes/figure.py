"""Figures that say what was found to someone who has not read the paper."""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_sf.common.files import replacing

from .data import scenes
from .plan import ARMS, BASELINE, Plan
from .results import METRICS, Records, estimate, gain_per_time, gains

# Okabe and Ito's colours: told apart with any colour vision; markers say the same a second time
_STYLE = {"smooth": ("#0072B2", "o"), "rough": ("#E69F00", "s"), "detail": ("#CC3377", "^")}
_MEANING = {
    "smooth": "smooth: little fine structure",
    "rough": "rough: random fine structure",
    "detail": "detail: fine pattern in shapes",
}
_ARM_TITLES = {
    "linear": "published forcing",
    "data": "forcing with cutoffs from the data",
    "fixed": "control: a low-pass that never opens",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _zero(axes: Any) -> None:
    axes.axhline(0, color="0.4", lw=1, zorder=0)


def summary(records: Records, plan: Plan, path: Path) -> None:
    """The gain over no forcing, by patch size and kind of data: one column an arm, one row a metric."""
    plt = _pyplot()
    arms = [a for a in _ARM_TITLES if a in plan.arms]
    metrics = ("loss", "frechet")
    figure = plt.figure(figsize=(9.2, 8.0), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 4.4))
    _examples(top, plan)
    grid = bottom.subplots(len(metrics), len(arms), sharex=True, sharey="row", squeeze=False)
    patches = sorted(plan.patches)
    for row, metric in zip(grid, metrics, strict=True):
        for axes, arm in zip(row, arms, strict=True):
            _zero(axes)
            for i, regime in enumerate(plan.regimes):
                found = [gains(records, plan, metric, regime, p, arm) for p in patches]
                x = np.array([k for k, g in enumerate(found) if g]) + 0.09 * (i - (len(plan.regimes) - 1) / 2)
                e = [estimate(g) for g in found if g]
                colour, marker = _STYLE[regime]
                axes.errorbar(
                    x,
                    [v.mean for v in e],
                    [0 if np.isnan(v.half_width) else v.half_width for v in e],
                    color=colour,
                    marker=marker,
                    capsize=3,
                    lw=1.3,
                    label=_MEANING[regime],
                )
            axes.set_xticks(range(len(patches)), [f"{p}" for p in patches])
            axes.set_xlim(-0.4, len(patches) - 0.6)
        row[0].set_ylabel(f"{METRICS[metric]}: % lower\nthan without forcing")
    for axes, arm in zip(grid[0], arms, strict=True):
        axes.set_title(_ARM_TITLES[arm], fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("patch size in pixels")
    counts = {len(gains(records, plan, "loss", r, p, a)) for r in plan.regimes for p in patches for a in arms} - {0}
    seeds = " to ".join(str(n) for n in sorted({min(counts, default=0), max(counts, default=0)}))
    single = " (none: one seed)" if 1 in counts else ""
    text = (
        "Above the line: better than the same network without forcing. "
        f"{plan.img_size}-pixel pictures, {plan.steps} steps of {plan.batch_size}.\n"
        f"Mean of {seeds} paired seeds; bars: 95 % confidence{single}."
    )
    figure.supxlabel(text, fontsize=8.5)
    _save(figure, path)
    plt.close(figure)


def _examples(figure: Any, plan: Plan, count: int = 3) -> None:
    """A few pictures of every kind of data, in its colour."""
    grid = figure.subplots(1, len(plan.regimes), squeeze=False)[0]
    for axes, regime in zip(grid, plan.regimes, strict=True):
        images = scenes(regime, plan.img_size, 2, 10)[0][[1, 4, 7][:count]]
        axes.imshow(np.concatenate(list(np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)), axis=1))
        axes.set_axis_off()
        colour, marker = _STYLE[regime]
        sign = {"o": "●", "s": "■", "^": "▲"}[marker]
        axes.set_title(f"{sign} {_MEANING[regime]}", color=colour, fontsize=9, fontweight="bold")


def times(records: Records, plan: Plan, path: Path) -> None:
    """Where in time the gain lies: validation loss by t, one panel for each kind of data and patch size."""
    plt = _pyplot()
    patches = sorted(plan.patches)
    figure, grid = plt.subplots(
        len(plan.regimes),
        len(patches),
        figsize=(9.2, 7.2),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    colours = {"linear": ("#0072B2", "-"), "data": ("#009E73", "--"), "fixed": ("#D55E00", ":")}
    t = plan.times()
    for row, regime in zip(grid, plan.regimes, strict=True):
        for axes, patch in zip(row, patches, strict=True):
            _zero(axes)
            for arm in plan.arms:
                e = gain_per_time(records, plan, regime, patch, arm)
                if arm == BASELINE or not e:
                    continue
                colour, line = colours[arm]
                mean = np.array([v.mean for v in e])
                half = np.nan_to_num([v.half_width for v in e])
                axes.plot(t, mean, line, color=colour, label=_ARM_TITLES[arm])
                axes.fill_between(t, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
            axes.set_title(f"{regime}, patch {patch}", fontsize=9)
        row[0].set_ylabel("% lower than\nwithout forcing")
    for axes in grid[-1]:
        axes.set_xlabel("time t (0 noise, 1 picture)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)
    plt.close(figure)


def pictures(plan: Plan, folder: Path, path: Path, count: int = 10) -> bool:
    """Samples of the coarsest patches from the same noise, one row an arm; False if the strips in `folder` are gone."""
    patch, seed = max(plan.patches), plan.seeds[0]
    names = {(r, a): folder / f"{r}-{patch}-{a}-{seed}.png" for r in plan.regimes for a in plan.arms}
    if not all(name.exists() for name in names.values()):
        return False
    plt = _pyplot()
    figure, grid = plt.subplots(
        len(plan.arms),
        len(plan.regimes),
        figsize=(11, 2.0),
        gridspec_kw={"wspace": 0.02, "hspace": 0.06},
        squeeze=False,
    )
    for row, arm in zip(grid, plan.arms, strict=True):
        for axes, regime in zip(row, plan.regimes, strict=True):
            axes.imshow(plt.imread(names[regime, arm])[:, : count * plan.img_size], interpolation="nearest")
            axes.set(xticks=[], yticks=[], frame_on=False)
            if arm == plan.arms[0]:
                axes.set_title(f"{_MEANING[regime]}, patch {patch}", fontsize=9)
        row[0].set_ylabel(ARMS[arm], rotation=0, ha="right", va="center", fontsize=8.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return True
