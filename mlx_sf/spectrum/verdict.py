"""What a cutoff schedule does to given data: per time, and in plain words.

The mask M attenuates amplitudes, so energies count with M^2. Signal energy is that of the pictures without their mean
brightness (k = 0); noise is white, so every coefficient holds the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import logit, ndtr

from ..flow import FlowConfig
from ..spectral import ForcingConfig, cutoffs, masks
from .meter import Spectrum
from .ratio import contour, data_to_noise

Judgement = Literal["too timid", "right", "bold", "harmful"]

CLEAR = 2.0  # +3 dB: a band with twice as much data as noise stands out
# -20 dB: about the faintest band that small networks on the scenes make anything of (`capacity`), pooling coefficients
BURIED = 0.01
HARM_SHARE = 0.10  # harmful: more than this share of the clear coefficients is removed
TIMID_SHARE = 0.50  # too timid: more than this share of what passes is buried
BOLD_SHARE = 0.50  # bold: more than this share of the faint coefficients, neither clear nor buried, is removed
_ROUNDING = 1e-9  # a coefficient right on the cutoff has a mask of 1/2, give or take the rounding of exp


@dataclass(frozen=True)
class Row:
    """One time. Shares are from 0 to 1.

    training: share of training steps with a time nearer to this row's than to its neighbours'. cutoff, cutoff_k: c(t)
    as a radius and as a radial index. kept: share of coefficients with mask at least 1/2. signal_lost: share of signal
    energy removed; noise_removed: of noise energy. contour_k: index below which data exceed noise; faint_k: below which
    they exceed a hundredth of it. ratio: data over noise at the cutoff.

    Bands are clear above a ratio of 2, buried below 0.01, else faint. clear_removed, faint_removed: share of their
    coefficients above the cutoff (mask below 1/2). clear_dimmed: share of the clear bands' signal energy that the mask
    takes, be it by its soft edge. buried_passed: share, of the energy of noise that passes, in buried bands.
    """

    t: float
    training: float
    cutoff: float
    cutoff_k: float
    kept: float
    signal_lost: float
    noise_removed: float
    contour_k: float
    faint_k: float
    ratio: float
    clear_removed: float
    clear_dimmed: float
    faint_removed: float
    buried_passed: float

    @property
    def judgement(self) -> Judgement:
        if self.clear_removed > HARM_SHARE:
            return "harmful"
        opens_too_far = self.cutoff_k > 1.01 * self.faint_k  # a schedule placed there is rounded
        if opens_too_far and self.buried_passed > TIMID_SHARE:
            return "too timid"
        return "bold" if self.faint_removed > BOLD_SHARE else "right"


def training_share(low: np.ndarray, high: np.ndarray, flow: FlowConfig) -> np.ndarray:
    """Share of training times between `low` and `high` under the logit-normal distribution of t."""
    if flow.P_std == 0:
        t = 1 / (1 + np.exp(-flow.P_mean))
        return np.asarray(((low <= t) & (t < high)).astype(np.float64))
    with np.errstate(divide="ignore"):
        return np.asarray(
            ndtr((logit(high) - flow.P_mean) / flow.P_std) - ndtr((logit(low) - flow.P_mean) / flow.P_std)
        )


def assess(
    spectrum: Spectrum, forcing: ForcingConfig | None, flow: FlowConfig, times: np.ndarray | None = None
) -> list[Row]:
    """A row per time (default 0, 0.05, ..., 1): what a forcing does to these data; None passes everything.

    Its windows must be those that the spectrum was measured in.
    """
    t = np.linspace(0, 1, 21) if times is None else np.asarray(times, dtype=np.float64)
    edges = np.concatenate([[0.0], (t[1:] + t[:-1]) / 2, [1.0]])
    training = training_share(edges[:-1], edges[1:], flow)
    power, rings = spectrum.power(), spectrum.rings
    size = (spectrum.img_size, spectrum.img_size)
    c = np.full(len(t), np.sqrt(2)) if forcing is None else cutoffs(forcing, t)
    k_c = c / rings.fraction(1.0)
    edge, faint = (contour(spectrum.k, power, t, flow.noise_scale, level) for level in (1.0, BURIED))
    ratios = data_to_noise(power, t, flow.noise_scale)
    rows = []
    for i, time in enumerate(t):
        mask = np.ones((spectrum.n, spectrum.n)) if forcing is None else masks(forcing, size, time)[0]
        at_cutoff = np.exp(np.interp(k_c[i], spectrum.k[1:], np.log(np.maximum(power[1:], 1e-300))))
        rows.append(
            Row(
                t=float(time),
                training=float(training[i]),
                cutoff=float(c[i]),
                cutoff_k=float(k_c[i]),
                kept=float((mask >= 0.5 - _ROUNDING).mean()),
                contour_k=float(edge[i]),
                faint_k=float(faint[i]),
                ratio=float(data_to_noise(at_cutoff[None], t[i : i + 1], flow.noise_scale)[0, 0]),
                **_passed(spectrum, mask, ratios[i]),
            )
        )
    return rows


def _passed(spectrum: Spectrum, mask: np.ndarray, ratio: np.ndarray) -> dict[str, float]:
    """The shares of a `Row` that follow from one mask (n, n) and the data-to-noise ratios (K,)."""
    rings, counts = spectrum.rings, spectrum.rings.counts.astype(np.float64)
    gain, cut = rings.mean(mask**2), rings.mean((mask < 0.5 - _ROUNDING).astype(np.float64))
    signal = counts * spectrum.power()
    signal[0] = 0.0  # the mean brightness is no detail
    clear, buried = counts * (ratio > CLEAR), counts * (ratio < BURIED)
    faint = counts - clear - buried
    clear_signal = np.where(clear > 0, signal, 0.0)
    return {
        "signal_lost": float(1 - signal @ gain / signal.sum()),
        "noise_removed": float(1 - counts @ gain / counts.sum()),
        "clear_removed": float(clear @ cut / clear.sum()) if clear.any() else 0.0,
        "clear_dimmed": float(1 - clear_signal @ gain / clear_signal.sum()) if clear_signal.any() else 0.0,
        "faint_removed": float(faint @ cut / faint.sum()) if faint.any() else 0.0,
        "buried_passed": float(buried @ gain / max(counts @ gain, 1e-300)),
    }


@dataclass(frozen=True)
class Verdict:
    """The judgement on a schedule as a whole, and why: `shares` of training time, `lines` in plain words."""

    judgement: Judgement
    shares: dict[Judgement, float]
    lines: list[str]


_HEADS: dict[Judgement, str] = {
    "harmful": "harmful: it removes bands in which these data stand out from the noise",
    "bold": "bold: it passes what stands out from the noise, and removes faint bands too that networks can use",
    "right": "about right: it passes what stands out, and removes what is lost in the noise",
    "too timid": "too timid: most of what it lets through is lost in the noise",
}


def judge(rows: Sequence[Row]) -> Verdict:
    """Harmful where more than a tenth of the training time is; else what most of the training time is."""
    shares: dict[Judgement, float] = dict.fromkeys(get_args(Judgement), 0.0)
    for r in rows:
        shares[r.judgement] += r.training
    overall: Judgement = "harmful" if shares["harmful"] > HARM_SHARE else max(shares, key=lambda j: shares[j])
    lines = [_HEADS[overall]]
    for judgement, group in itertools.groupby(rows, key=lambda r: r.judgement):
        part = list(group)
        lines.append(f"t {_span(part)} ({sum(r.training for r in part):.0%} of training): {judgement}, {_why(part)}")
    return Verdict(overall, shares, lines)


def _span(part: Sequence[Row]) -> str:
    return f"{part[0].t:.2f}" if len(part) == 1 else f"{part[0].t:.2f} to {part[-1].t:.2f}"


def _why(part: Sequence[Row]) -> str:
    r = max(part, key=lambda r: r.training)  # the time that matters most
    text = f"at t = {r.t:.2f} it opens to k = {r.cutoff_k:.0f}; data exceed noise up to k = {r.contour_k:.0f}"
    text += f", a hundredth of it up to {r.faint_k:.0f}"
    if r.judgement == "harmful":
        return f"{text}: {r.clear_removed:.0%} of the coefficients with twice as much data as noise are cut"
    if r.judgement == "too timid":
        return f"{text}: {r.buried_passed:.0%} of what passes has a hundred times more noise than data"
    if r.judgement == "bold":
        text += f": {r.faint_removed:.0%} of the coefficients in between are cut"
    if r.clear_dimmed > HARM_SHARE:
        text += f"; the mask's soft edge takes {r.clear_dimmed:.0%} of the energy of bands that stand out"
    return text
