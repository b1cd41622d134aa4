"""The figures: the spectrum and its data-to-noise map, what schedules do per time, where a network's capacity goes.

Colours are safe for the colour-blind: cividis for amounts, purple to orange around zero, Okabe and Ito's for lines.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.config import Config
from ..common.figures import save_figure
from ..flow import FlowConfig
from ..spectral import ForcingConfig, cutoffs
from .capacity import Capacity, decibels
from .meter import Channel, Spectrum
from .power_law import PowerLaw
from .ratio import contour, data_to_noise, paper_contour
from .verdict import BURIED, Row, training_share

_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _RED, _PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_CHANNELS: dict[Channel, tuple[str, str]] = {
    "luminance": (_BLACK, "-"), "red": (_RED, "--"), "green": (_GREEN, "-."), "blue": (_BLUE, ":"),
}  # fmt: skip
_LINES = (("white", "-"), ("black", "--"), ("white", "-."), ("black", ":"))
_STYLES = ((_BLUE, "-"), (_RED, "--"), (_GREEN, "-."), (_PINK, ":"))
_RANGE = (-30.0, 40.0)  # decibels shown of the data-to-noise ratio
_HIGHEST = 0.985  # times nearer to 1 have no contour worth drawing


def plot_spectrum(
    path: Path,
    spectrum: Spectrum,
    laws: Mapping[Channel, PowerLaw],
    schedules: Mapping[str, ForcingConfig | None],
    flow: FlowConfig,
) -> None:
    """Left the power per frequency with the fitted law, right the data-to-noise map with cutoffs over it. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_power(left, spectrum, laws["mean"], flow)
    _draw_map(figure, right, spectrum, laws["mean"], schedules, flow)
    size = f"{spectrum.img_size}×{spectrum.img_size}"
    if spectrum.n != spectrum.img_size:
        size += f" in windows of {spectrum.n}"
    figure.suptitle(f"Spectrum of {spectrum.count} pictures, {size} pixels, noise scale {flow.noise_scale:g}")
    save_figure(figure, path)


def _draw_power(axes: Any, spectrum: Spectrum, law: PowerLaw, flow: FlowConfig) -> None:
    k, inside = spectrum.k[1:], slice(1, None)
    axes.axvspan(law.low, law.high, color="0.93", zorder=0)
    for channel, (colour, style) in _CHANNELS.items():
        axes.loglog(k, spectrum.power(channel)[inside], style, color=colour, linewidth=1.3, label=channel)
    a, alpha = law.amplitude, law.alpha
    label = f"fit to the mean of the channels:\n{a.value:.3g} · k^−{alpha.value:.2f}  (exponent {alpha.low:.2f} to "
    label += f"{alpha.high:.2f})"
    fitted = np.array([law.low, law.high])
    axes.loglog(fitted, law.at(fitted), color=_ORANGE, linewidth=3.5, alpha=0.75, zorder=1, label=label)
    axes.loglog(k, law.at(k), color=_ORANGE, linewidth=1.2, zorder=1)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 40, top)  # room for the legend
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        noise = ((1 - t) / t * flow.noise_scale) ** 2
        if bottom < noise < top:
            axes.axhline(noise, color="0.45", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"noise at t = {t:g}", (k[-1], noise), fontsize=8, color="0.3", ha="right", va="bottom"
            )  # fmt: skip
    axes.set(
        xlim=(1, k[-1]),
        xlabel="spatial frequency k (half-waves across the picture)",
        ylabel="power of one DCT coefficient (pixels from −1 to 1)",
        title="How much the pictures hold at each frequency",
    )
    _plain_ticks(axes.xaxis)
    axes.legend(fontsize=8, loc="lower left", title="grey: range of the fit", title_fontsize=8)
    axes.grid(alpha=0.25)


def _draw_map(
    figure: Any,
    axes: Any,
    spectrum: Spectrum,
    law: PowerLaw,
    schedules: Mapping[str, ForcingConfig | None],
    flow: FlowConfig,
) -> None:
    edges, power = _fine_bands(spectrum)
    times = np.linspace(0, 1, 201)
    middle = (times[1:] + times[:-1]) / 2
    ratio = decibels(data_to_noise(power, middle, flow.noise_scale))
    mesh = axes.pcolormesh(times, edges, ratio.T, cmap="cividis", vmin=_RANGE[0], vmax=_RANGE[1], rasterized=True)
    bar = figure.colorbar(mesh, ax=axes, extend="both", pad=0.01)
    bar.set_label("data over noise, dB (0 = equal, 10 = ten times more data)")
    bar.ax.axhline(0, color=_ORANGE, linewidth=2.5)
    t = np.linspace(0.002, _HIGHEST, 600)
    unit = contour(spectrum.k, spectrum.power(), t, flow.noise_scale)
    axes.plot(t[unit > 0], unit[unit > 0], color=_ORANGE, linewidth=3, label="data = noise (measured)")
    faint = contour(spectrum.k, spectrum.power(), t, flow.noise_scale, BURIED)
    axes.plot(t[faint > 0], faint[faint > 0], color=_ORANGE, linewidth=1, label=f"data = noise / {1 / BURIED:g}")
    paper = paper_contour(t, law.alpha.value)
    axes.plot(t, paper, color=_SKY, linestyle=(0, (1, 1)), linewidth=2, label="the paper's k* = (1 − t)^(−2/α)")
    whole = np.linspace(0, 1, 400)
    forced = {name: f for name, f in schedules.items() if f is not None}
    for (name, forcing), (colour, style) in zip(forced.items(), _LINES, strict=False):
        k_c = cutoffs(forcing, whole) / spectrum.rings.fraction(1.0)
        axes.plot(whole, k_c, style, color=colour, linewidth=1.8, label=f"cutoff, {name}")
    top = spectrum.k[-1]
    axes.set(
        yscale="log",
        ylim=(1, top),
        xlim=(0, 1),
        xlabel="flow time t (0 = noise, 1 = data)",
        ylabel="spatial frequency k (half-waves across the picture)",
        title="What stands out of the noise, and what the mask lets through (below a line)",
    )
    axes.title.set_fontsize(11)
    _plain_ticks(axes.yaxis)
    legend = axes.legend(fontsize=8, loc="lower right", facecolor="0.35", labelcolor="white", framealpha=0.9)
    legend.set_zorder(5)
    side = axes.secondary_yaxis("right", functions=(_reciprocal(2 * spectrum.n), _reciprocal(2 * spectrum.n)))
    side.set_ylabel("pixels per period", labelpad=1)
    side.set_yticks([v for v in (2, 4, 8, 16, 32, 64, 128, 256, 512) if 2 * spectrum.n / top <= v <= 2 * spectrum.n])
    side.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    side.minorticks_off()


def _plain_ticks(axis: Any) -> None:
    """1, 10, 100 instead of powers of ten."""
    axis.set_major_formatter(lambda v, _: f"{v:g}")


def _reciprocal(c: float) -> Any:
    return lambda v: c / np.maximum(v, 1e-9)


def _fine_bands(spectrum: Spectrum) -> tuple[np.ndarray, np.ndarray]:
    """Edges (in k) and mean powers for the map: the rings themselves, from ring 1 to the corner."""
    k = spectrum.k[1:]
    return np.concatenate([[k[0] - 0.5], (k[1:] + k[:-1]) / 2, [k[-1] + 0.5]]), spectrum.power()[1:]


def plot_schedules(path: Path, tables: Mapping[str, Sequence[Row]], flow: FlowConfig) -> None:
    """Per time: coefficients kept, signal lost and noise removed by each schedule, and where training goes. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    what = (
        ("kept", "coefficients passed (mask at least ½)"),
        ("signal_lost", "signal energy removed"),
        ("noise_removed", "noise energy removed"),
    )
    for axes, (field, title) in zip(panels, what, strict=True):
        _draw_density(axes, flow)
        for (name, rows), (colour, style) in zip(tables.items(), _STYLES, strict=False):
            values = [100 * getattr(r, field) for r in rows]
            axes.plot([r.t for r in rows], values, style, color=colour, linewidth=2, label=name)
        axes.set(xlabel="flow time t (0 = noise, 1 = data)", ylabel="%", title=title, xlim=(0, 1))
        axes.grid(alpha=0.25)
    panels[1].set_yscale("symlog", linthresh=0.1)
    panels[1].set_ylim(0, 100)
    panels[1].set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    handles, names = panels[0].get_legend_handles_labels()
    title = "schedule (grey hill: where training spends its time)"
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), title=title, fontsize=9)
    save_figure(figure, path)


def _draw_density(axes: Any, flow: FlowConfig) -> None:
    """The density of training times as a grey hill in the background, without units."""
    edges = np.linspace(0, 1, 101)
    share = training_share(edges[:-1], edges[1:], flow)
    hill = axes.twinx()
    hill.fill_between((edges[1:] + edges[:-1]) / 2, share, color="0.9", linewidth=0)
    hill.set(ylim=(0, 1.6 * share.max()), yticks=[])
    axes.set_zorder(hill.get_zorder() + 1)
    axes.patch.set_visible(False)


def plot_capacity(path: Path, capacity: Capacity, spectrum: Spectrum, config: Config, name: str) -> None:
    """Where a network's estimate beats putting out nothing, the Wiener estimate, and the one with colours. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = (
        (capacity.against_zero, "error against an empty output"),
        (capacity.against_wiener, "error against the Wiener estimate\n(knows the spectrum, nothing else)"),
        (
            decibels(capacity.error / capacity.colour),
            "error against the Wiener estimate\nthat also knows how colours go together",
        ),
    )
    limit = float(np.clip(np.ceil(np.abs(shown[1][0]).max()), 3, 15))
    rows, columns = np.arange(len(capacity.low) + 1), np.arange(len(capacity.t) + 1)
    for axes, (values, title) in zip(panels, shown, strict=True):
        mesh = axes.pcolormesh(columns, rows, values.T, cmap="PuOr", vmin=-limit, vmax=limit)
        _mark(axes, capacity.useless.T, "x")
        _draw_forcing(axes, capacity, spectrum, config.model.forcing, config.flow)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(columns[:-1] + 0.5, [f"{t:g}" for t in capacity.t], fontsize=8)
        axes.set_xlabel("flow time t (0 = noise, 1 = data)")
    labels = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(capacity.low, capacity.high, strict=True)]
    panels[0].set_yticks(rows[:-1] + 0.5, labels, fontsize=8)
    panels[0].set_ylabel("spatial frequency k (half-waves across the picture)")
    bar = figure.colorbar(mesh, ax=panels, extend="both", pad=0.01)
    bar.set_label("error ratio in dB (below 0, orange: the network does better)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Where {name} does more than its data's spectrum would: {capacity.images} pictures, fixed noise")
    save_figure(figure, path)


def _mark(axes: Any, cells: np.ndarray, marker: str) -> None:
    y, x = np.nonzero(cells)
    label = "no better than an empty output" if len(x) else None
    axes.plot(x + 0.5, y + 0.5, marker, color="black", markersize=5, linestyle="none", label=label)


def _draw_forcing(
    axes: Any, capacity: Capacity, spectrum: Spectrum, forcing: ForcingConfig | None, flow: FlowConfig
) -> None:
    """Unit contour and the model's own cutoff, on the band numbers of the vertical axis."""
    edges = np.concatenate([capacity.low, [capacity.high[-1] + 1]]) - 0.5
    t = np.linspace(capacity.t[0], capacity.t[-1], 300)
    x = np.interp(t, capacity.t, np.arange(len(capacity.t)) + 0.5)

    def height(k: np.ndarray) -> np.ndarray:
        return np.interp(np.log(np.maximum(k, 0.5)), np.log(edges), np.arange(len(edges)))

    unit = contour(spectrum.k, spectrum.power(), t, flow.noise_scale)
    axes.plot(x, height(unit), color="black", linewidth=2, label="data = noise")
    if forcing is not None:
        k_c = cutoffs(forcing, t) / spectrum.rings.fraction(1.0)
        axes.plot(x, height(k_c), "--", color="black", linewidth=1.6, label="the model's cutoff")
