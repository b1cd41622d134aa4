"""What a cutoff schedule does to given data: per time, and in plain words.

The mask M attenuates amplitudes, so energies count with M^2. Signal energy is that of the pictures without their mean
brightness (k = 0); noise is white, so every coefficient holds the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import logit, ndtr

from ..config import FlowConfig, ModelConfig
from ..spectral import cutoffs, masks
from .meter import Spectrum
from .ratio import contour, data_to_noise

Judgement = Literal["too timid", "right", "harmful"]

CLEAR = 2.0  # +3 dB: a band with twice as much data as noise stands out
BURIED = 0.1  # -10 dB: a band with ten times more noise than data is mostly noise
HARM_SHARE = 0.10  # harmful: more than this share of the clear coefficients is removed
TIMID_SHARE = 0.50  # too timid: more than this share of what passes is buried
_ROUNDING = 1e-9  # a coefficient right on the cutoff has a mask of 1/2, give or take the rounding of exp


@dataclass(frozen=True)
class Row:
    """One time. Shares are from 0 to 1.

    training: share of training steps with a time nearer to this row's than to its neighbours'. cutoff, cutoff_k: c(t)
    as a radius and as a radial index. kept: share of coefficients with mask at least 1/2. signal_lost: share of signal
    energy removed; noise_removed: of noise energy. contour_k: index below which data exceed noise. ratio: data over
    noise at the cutoff. clear_removed: share, of the coefficients that stand out (ratio above 2), that lie above the
    cutoff (mask below 1/2); clear_dimmed: share of their signal energy that the mask takes, be it by its soft edge;
    buried_passed: share, of the energy of noise that passes, in bands that are mostly noise
    (ratio below 0.1).
    """

    t: float
    training: float
    cutoff: float
    cutoff_k: float
    kept: float
    signal_lost: float
    noise_removed: float
    contour_k: float
    ratio: float
    clear_removed: float
    clear_dimmed: float
    buried_passed: float

    @property
    def judgement(self) -> Judgement:
        if self.clear_removed > HARM_SHARE:
            return "harmful"
        opens_too_far = self.cutoff_k > self.contour_k
        return "too timid" if opens_too_far and self.buried_passed > TIMID_SHARE else "right"


def training_share(low: np.ndarray, high: np.ndarray, flow: FlowConfig) -> np.ndarray:
    """Share of training times between `low` and `high` under the logit-normal distribution of t."""
    if flow.P_std == 0:
        t = 1 / (1 + np.exp(-flow.P_mean))
        return np.asarray(((low <= t) & (t < high)).astype(np.float64))
    with np.errstate(divide="ignore"):
        return np.asarray(
            ndtr((logit(high) - flow.P_mean) / flow.P_std) - ndtr((logit(low) - flow.P_mean) / flow.P_std)
        )


def assess(spectrum: Spectrum, model: ModelConfig, flow: FlowConfig, times: np.ndarray | None = None) -> list[Row]:
    """A row per time (default 0, 0.05, ..., 1): what the model's forcing does to these data.

    A model without forcing is described as one that passes everything.
    """
    t = np.linspace(0, 1, 21) if times is None else np.asarray(times, dtype=np.float64)
    edges = np.concatenate([[0.0], (t[1:] + t[:-1]) / 2, [1.0]])
    training = training_share(edges[:-1], edges[1:], flow)
    power, rings = spectrum.power(), spectrum.rings
    c = cutoffs(model, t) if model.spectral_forcing else np.full(len(t), np.sqrt(2))
    k_c = c / rings.fraction(1.0)
    edge = contour(spectrum.k, power, t, flow.noise_scale)
    ratios = data_to_noise(power, t, flow.noise_scale)
    rows = []
    for i, time in enumerate(t):
        mask = masks(model, time)[0] if model.spectral_forcing else np.ones((spectrum.n, spectrum.n))
        at_cutoff = np.exp(np.interp(k_c[i], spectrum.k[1:], np.log(np.maximum(power[1:], 1e-300))))
        rows.append(
            Row(
                t=float(time),
                training=float(training[i]),
                cutoff=float(c[i]),
                cutoff_k=float(k_c[i]),
                kept=float((mask >= 0.5 - _ROUNDING).mean()),
                contour_k=float(edge[i]),
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
    clear_signal = np.where(clear > 0, signal, 0.0)
    return {
        "signal_lost": float(1 - signal @ gain / signal.sum()),
        "noise_removed": float(1 - counts @ gain / counts.sum()),
        "clear_removed": float(clear @ cut / clear.sum()) if clear.any() else 0.0,
        "clear_dimmed": float(1 - clear_signal @ gain / clear_signal.sum()) if clear_signal.any() else 0.0,
        "buried_passed": float(buried @ gain / max(counts @ gain, 1e-300)),
    }


@dataclass(frozen=True)
class Verdict:
    """The judgement on a schedule as a whole, and why: `shares` of training time, `lines` in plain words."""

    judgement: Judgement
    shares: dict[Judgement, float]
    lines: list[str]


def judge(rows: Sequence[Row]) -> Verdict:
    """Harmful where more than a tenth of the training time is; else what most of the training time is."""
    shares: dict[Judgement, float] = {"too timid": 0.0, "right": 0.0, "harmful": 0.0}
    for r in rows:
        shares[r.judgement] += r.training
    overall: Judgement = "harmful" if shares["harmful"] > HARM_SHARE else max(shares, key=lambda j: shares[j])
    if overall == "harmful":
        head = "harmful: it removes bands in which these data stand out from the noise"
    elif overall == "right":
        head = "about right: it removes noise, and little that stands out from it"
    else:
        head = "too timid: what it lets through is mostly noise, so it can do little"
    lines = [head]
    for judgement, group in itertools.groupby(rows, key=lambda r: r.judgement):
        part = list(group)
        lines.append(f"t {_span(part)} ({sum(r.training for r in part):.0%} of training): {judgement}, {_why(part)}")
    return Verdict(overall, shares, lines)


def _span(part: Sequence[Row]) -> str:
    return f"{part[0].t:.2f}" if len(part) == 1 else f"{part[0].t:.2f} to {part[-1].t:.2f}"


def _why(part: Sequence[Row]) -> str:
    r = max(part, key=lambda r: r.training)  # the time that matters most
    where = f"at t = {r.t:.2f} it opens to k = {r.cutoff_k:.0f} and data exceed noise up to k = {r.contour_k:.0f}"
    if r.judgement == "harmful":
        return f"{where}: {r.clear_removed:.0%} of the coefficients with twice as much data as noise are cut"
    text = f"{where}: {r.buried_passed:.0%} of what passes is in bands with ten times more noise than data"
    if r.clear_dimmed > HARM_SHARE:
        text += f"; the mask's soft edge takes {r.clear_dimmed:.0%} of the energy of bands that stand out"
    return text
