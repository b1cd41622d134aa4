"""What a measured spectrum says: printed lines and a JSON record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..checkpoints.config import Config
from ..common.files import replacing
from ..flow import FlowConfig
from .capacity import Capacity, decibels
from .meter import CHANNELS, Channel, Spectrum
from .power_law import PowerLaw, compared
from .verdict import BOLD_SHARE, BURIED, CLEAR, HARM_SHARE, TIMID_SHARE, Row, Verdict


def spectrum_lines(spectrum: Spectrum, laws: Mapping[Channel, PowerLaw]) -> list[str]:
    """The measurement and its fit."""
    lines = [f"{spectrum.source}: {spectrum.count} pictures at {spectrum.img_size} x {spectrum.img_size}"]
    if spectrum.n != spectrum.img_size:
        lines.append(f"in windows of {spectrum.n} pixels, as the forcing sees them")
    if spectrum.flat:
        lines.append(f"note: {spectrum.flat} of them are constant")
    if spectrum.replaced:
        lines.append(f"note: {spectrum.replaced} could not be read and were replaced by the next")
    law = laws["mean"]
    lines.append(
        f"power law P(k) = A k^-alpha, fitted to k = {law.low} ... {law.high} half-waves across "
        f"({2 * spectrum.n / law.high:.1f} to {2 * spectrum.n / law.low:.0f} pixels a period): "
        "the mean, the lowest bands and the corner are left out"
    )
    lines.append("  channel      A (95 % interval)               alpha (95 % interval)    R²      off the line")
    for channel, law in laws.items():
        a, alpha = law.amplitude, law.alpha
        lines.append(
            f"  {channel:<10} {a.value:9.4g} ({a.low:.4g} to {a.high:.4g})".ljust(46)
            + f"{alpha.value:.3f} ({alpha.low:.3f} to {alpha.high:.3f})".ljust(25)
            + f"{law.r2:.4f}  {law.residual_db:.2f} dB"
        )
    law = laws["mean"]
    if law.poor:
        lines.append(f"  a power law describes these data poorly: {law.poor}; the measured bands are used below")
    return lines + [f"  {text}" for text in compared(law.alpha)]


def table_lines(name: str, rows: Sequence[Row], verdict: Verdict) -> list[str]:
    """What one schedule does at each time, and the verdict in words. Every second row."""
    lines = [
        f"schedule {name}",
        "     t  training  cutoff   passed  signal lost  noise removed   data = noise  data/noise",
        "           time    r    k  coeff.     energy        energy        up to k     at cutoff",
    ]
    for r in rows[:: 2 if len(rows) > 12 else 1]:
        ratio = (
            f"{10 * np.log10(r.ratio):+6.1f} dB"
            if 0 < r.ratio < np.inf
            else "   none  "
            if r.ratio == 0
            else "      -  "
        )
        lines.append(
            f"  {r.t:4.2f}  {r.training:6.1%}  {r.cutoff:.3f} {r.cutoff_k:4.0f}  {r.kept:6.1%}  {r.signal_lost:9.2%}  "
            f"{r.noise_removed:11.1%}  {r.contour_k:12.0f}  {ratio}  {r.judgement}"
        )
    return [*lines, "  verdict: " + verdict.lines[0], *("    " + text for text in verdict.lines[1:])]


def meaning() -> list[str]:
    """The thresholds behind the verdicts."""
    return [
        f"harmful: more than {HARM_SHARE:.0%} of the coefficients with {CLEAR:g} times as much data as noise "
        "lie above the cutoff.",
        f"too timid: more than {TIMID_SHARE:.0%} of what passes is in bands with {1 / BURIED:g} times more noise than "
        "data.",
        f"bold: more than {BOLD_SHARE:.0%} of the coefficients in between lie above the cutoff. right: none of these.",
        "passed: mask at least 1/2; energies count with the mask's square; signal without the mean brightness.",
        "Bands fainter than the noise are not worthless: a network pools coefficients, as its capacity shows.",
    ]


def capacity_lines(capacity: Capacity, name: str) -> list[str]:
    """Where the network does more than the spectrum would."""
    cells, modelled, useless = capacity.error.size, capacity.modelled, capacity.useless
    gain = capacity.against_wiener
    lines = [
        f"capacity of {name}: {capacity.images} pictures, {len(capacity.t)} times, {len(capacity.low)} bands",
        f"  {modelled.sum()} of {cells} cells are modelled: error below the Wiener estimate's",
        f"  {useless.sum()} cells are no better than an empty output",
    ]
    best = np.unravel_index(np.argmin(gain), gain.shape)
    k = f"{capacity.low[best[1]]} to {capacity.high[best[1]]}"
    lines.append(f"  largest gain over it: {-gain[best]:.1f} dB at t = {capacity.t[best[0]]:g}, k = {k}")
    if modelled.any():
        highest = [int(capacity.high[m].max()) if m.any() else 0 for m in modelled]
        shown = ", ".join(f"{t:g}: {k}" for t, k in zip(capacity.t, highest, strict=True))
        lines.append(f"  highest k modelled at each t: {shown}")
        lowest = float(decibels(capacity.ratio[modelled]).min())
        lines.append(f"  faintest band modelled: {lowest:.0f} dB of data over noise")
    return lines


def record(
    spectrum: Spectrum,
    laws: Mapping[Channel, PowerLaw],
    tables: Mapping[str, tuple[Sequence[Row], Verdict]],
    flow: FlowConfig,
    capacity: Capacity | None,
    checkpoint: Config | None,
) -> dict[str, Any]:
    """Everything measured, for JSON. Infinite ratios are null."""
    return {
        "program": f"mlx-sf {__version__}",
        "source": spectrum.source,
        "images": spectrum.count,
        "constant_images": spectrum.flat,
        "img_size": spectrum.img_size,
        "window_size": spectrum.n,
        "units": "power of an orthonormal DCT coefficient of images in [-1, 1]; k = half-waves across the window",
        "rounding_power": spectrum.floor,
        "noise_scale": flow.noise_scale,
        "P_mean": flow.P_mean,
        "P_std": flow.P_std,
        "k": spectrum.rings.k.tolist(),
        "coefficients": spectrum.rings.counts.tolist(),
        "power": {c: [float(f"{v:.6g}") for v in spectrum.power(c)] for c in CHANNELS},
        "power_law": {c: {**asdict(law), "poor": law.poor} for c, law in laws.items()},
        "schedules": {
            name: {
                "verdict": asdict(verdict),
                "rows": [{**_finite(asdict(r)), "judgement": r.judgement} for r in rows],
            }
            for name, (rows, verdict) in tables.items()
        },
        "thresholds": {
            "clear": CLEAR,
            "buried": BURIED,
            "harm_share": HARM_SHARE,
            "timid_share": TIMID_SHARE,
            "bold_share": BOLD_SHARE,
        },
        **({"capacity": _capacity_record(capacity)} if capacity is not None else {}),
        **({"checkpoint": json.loads(checkpoint.to_json())} if checkpoint is not None else {}),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if np.isfinite(v) else None for k, v in values.items()}


def _capacity_record(c: Capacity) -> dict[str, Any]:
    arrays = {
        "error": c.error,
        "zero": c.zero,
        "wiener": c.wiener,
        "colour_wiener": c.colour,
        "deviation_db": c.deviation,
    }
    return {
        "images": c.images,
        "t": c.t.tolist(),
        "k_low": c.low.tolist(),
        "k_high": c.high.tolist(),
        **{name: [[float(f"{v:.5g}") for v in row] for row in a] for name, a in arrays.items()},
    }


def schedule_record(
    cutoffs: Sequence[float], delta: float, spectrum: Spectrum, flow: FlowConfig, placed_by: str
) -> dict[str, Any]:
    """The data-driven schedule as `mlx-sf train --schedule-cutoffs FILE` reads it, and where it came from."""
    return {
        "schedule_cutoffs": list(cutoffs),
        "delta": delta,
        "provenance": {
            "program": f"mlx-sf {__version__}",
            "data": spectrum.source,
            "images": spectrum.count,
            "img_size": spectrum.img_size,
            "window_size": spectrum.n,
            "noise_scale": flow.noise_scale,
            "placed_by": placed_by,
        },
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
