"""The page's own figures, as pictures with a clear background: their greys can be read on light and on dark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..spectral import ForcingConfig
from ..spectrum import Spectrum
from ..spectrum.state import Bands, cutoff_line, unit_line

_INK = "#7d8590"  # contrast above 3 with white and with Gradio's dark grey
_DATA, _NOISE, _PASSED, _CUTOFF = "#E69F00", "#7d8590", "#2f81f7", "#D55E00"
_STYLES = ((_PASSED, "-"), (_INK, "--"), (_INK, "-."), (_INK, ":"), (_INK, (0, (5, 1, 1, 1))))
_DPI = 100


def _figure(width: float, height: float, wspace: float) -> Any:
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="none")
    # fixed margins: a layout that is computed draws everything twice
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.92, wspace=wspace)
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Any, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_facecolor("none")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10, color=_INK)
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side in axes.spines.values():
        side.set_color(_INK)
    axes.grid(alpha=0.25, color=_INK)


def _legend(axes: Any, place: str) -> Any:
    return axes.legend(fontsize=8, loc=place, framealpha=0, labelcolor=_INK)


def _plain(axis: Any) -> None:
    axis.set_major_formatter(lambda v, _: f"{v:g}")


class StateFigure:
    """The bands at one time, beside cutoff and data over all times, for spectra of one kind.

    Frames, ticks and titles are drawn once, and lines over them each time: a whole drawing takes a fifth of a second.
    `top` is the largest power that fits, `k` the rings from 1 on.
    """

    def __init__(self, k: np.ndarray, top: float) -> None:
        figure = _figure(10.4, 3.9, 0.15)
        self._left, self._right = figure.subplots(1, 2)
        self._k, self._times = k, np.linspace(0, 1, 201)
        self._left.set(xscale="log", yscale="log", xlim=(1, k[-1]), ylim=(1e-6, top))
        _dress(self._left, "frequency k (half-waves across)", "power of a coefficient", "At this t")
        _plain(self._left.xaxis)
        self._right.set(yscale="log", xlim=(0, 1), ylim=(1, k[-1]))
        _dress(
            self._right, "flow time t (0 = noise, 1 = data)", "frequency k", "Over all times: below a line it passes"
        )
        _plain(self._right.yaxis)
        self._canvas: Any = figure.canvas
        self._canvas.draw()
        self._still: Any = self._canvas.copy_from_bbox(figure.bbox)
        self._data, self._noise, self._seen = (
            self._line(self._left, k, name, colour, style, width)
            for name, colour, style, width in (
                ("data", _DATA, "-", 1.6),
                ("noise", _NOISE, "--", 1.4),
                ("what the network sees", _PASSED, "-", 2.2),
            )
        )
        self._cut = self._left.axvline(1, color=_CUTOFF, linewidth=1.2, linestyle=":", label="cutoff")
        self._legend = _legend(self._left, "lower left")
        self._now = self._right.axvline(0, color=_CUTOFF, linewidth=1.4)
        self._unit = self._line(self._right, self._times, "data = noise", _DATA, "-", 2.4)
        self._schedules = [self._line(self._right, self._times, "", colour, style, 1.6) for colour, style in _STYLES]
        self._schedules_legend: Any = None

    def _line(self, axes: Any, x: np.ndarray, name: str, colour: str, style: Any, width: float) -> Any:
        return axes.plot(x, np.full(len(x), np.nan), linestyle=style, color=colour, linewidth=width, label=name)[0]

    def set(self, spectrum: Spectrum, forcings: Mapping[str, ForcingConfig | None], noise_scale: float) -> None:
        """Take other data, schedules (the first one chosen) and noise."""
        unit = unit_line(spectrum, noise_scale, self._times[1:-1])
        self._unit.set_ydata([np.nan, *np.where(unit > 0, unit, np.nan), np.nan])
        shown = [(name, f) for name, f in forcings.items() if f is not None]
        lines = self._schedules if forcings and next(iter(forcings.values())) is not None else self._schedules[1:]
        for line in self._schedules:
            line.set(ydata=np.full(len(self._times), np.nan), label="_")
        for line, (name, forcing) in zip(lines, shown, strict=False):
            line.set(ydata=cutoff_line(spectrum.rings, forcing, self._times), label=name)
        self._schedules_legend = _legend(self._right, "lower right")

    def at(self, b: Bands) -> Image.Image:
        """The figure at one time."""
        for line, values in ((self._data, b.data), (self._noise, b.noise), (self._seen, b.passed)):
            line.set_ydata(np.maximum(values, 1e-12))
        self._cut.set_xdata([b.cutoff, b.cutoff])
        self._now.set_xdata([b.t, b.t])
        self._canvas.restore_region(self._still)
        for artist in (self._data, self._noise, self._seen, self._cut, self._legend):
            self._left.draw_artist(artist)
        for artist in (self._unit, *self._schedules, self._now, self._schedules_legend):
            self._right.draw_artist(artist)
        return _picture(self._canvas)


def run_figure(metrics: Sequence[Mapping[str, Any]], system: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A run's loss, its images a second, and the share of the initial weights in its averages, over its steps."""
    figure = _figure(10.4, 3.4, 0.3)
    loss, speed, share = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    steps = [m["step"] for m in metrics]
    loss.plot(steps, [m["loss"] for m in metrics], color=_PASSED, linewidth=1.3)
    loss.set_yscale("log")
    speed.plot([s["step"] for s in system], [s["images_per_second"] for s in system], color=_DATA, linewidth=1.2)
    speed.set_ylim(bottom=0)
    for name, style in (("ema1", "-"), ("ema2", "--")):
        values = [max(m.get(f"{name}_initial_share", np.nan), 1e-4) * 100 for m in metrics]
        share.plot(steps, values, style, color=_CUTOFF, linewidth=1.3, label=name)
    share.set(yscale="log", ylim=(0.01, 120))
    _plain(share.yaxis)
    _dress(loss, "step", "loss", "Loss")
    _dress(speed, "step", "images a second", "Speed")
    _dress(share, "step", "% of the initial weights", "EMA share")
    loss.yaxis.set_minor_formatter(lambda v, _: f"{v:g}")
    loss.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    loss.tick_params(which="minor", labelsize=8)
    _legend(share, "upper right")
    figure.canvas.draw()
    return _picture(figure.canvas)


def _picture(canvas: Any) -> Image.Image:
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())
