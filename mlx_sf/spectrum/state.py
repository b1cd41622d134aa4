"""One moment of the flow, per band: how much data and how much noise the state holds, and what a mask leaves of it.

The state at time t is t x + (1 - t) e, so band k of power P holds t^2 P(k) of data and (1 - t)^2 noise_scale^2 of
noise. A mask M leaves the mean of M^2 over the band's coefficients.
"""

from dataclasses import dataclass

import numpy as np

from ..spectral import ForcingConfig, cutoffs, masks
from .meter import Rings, Spectrum
from .ratio import contour


@dataclass(frozen=True)
class Bands:
    """Powers per ring (K,) at one time: of data and noise before the mask, of both together behind it.

    `k` (K,) are the rings from 1 on. cutoff: index where the mask is 1/2; unit: index below which data exceed noise.
    """

    t: float
    k: np.ndarray
    data: np.ndarray
    noise: np.ndarray
    passed: np.ndarray
    cutoff: float
    unit: float

    def sentence(self) -> str:
        """What is seen, in words."""
        top = self.k[-1]
        seen = "everything" if self.cutoff >= top else f"what is coarser than k = {self.cutoff:.0f}"
        data = (
            "data exceed noise everywhere"
            if self.unit >= top
            else f"data exceed noise up to k = {self.unit:.0f}"
            if self.unit > 0
            else "noise exceeds data everywhere"
        )
        return f"At t = {self.t:g} the mask lets through {seen}, of {top:.0f}; {data}."


def bands(spectrum: Spectrum, forcing: ForcingConfig | None, noise_scale: float, t: float) -> Bands:
    """The bands of these data at time t; without a forcing everything passes."""
    rings, k, power = spectrum.rings, spectrum.k[1:], spectrum.power()
    data, noise = t**2 * power[1:], np.full(len(k), ((1 - t) * noise_scale) ** 2)
    if forcing is None:
        gain = np.ones(len(k))
    else:
        gain = rings.mean(masks(forcing, (spectrum.img_size, spectrum.img_size), t)[0] ** 2)[1:]
    cutoff = float(k[-1]) if forcing is None else float(cutoff_line(rings, forcing, np.array([t]))[0])
    unit = float(unit_line(spectrum, noise_scale, np.array([t]))[0])
    return Bands(float(t), k, data, noise, gain * (data + noise), cutoff, unit)


def cutoff_line(rings: Rings, forcing: ForcingConfig, t: np.ndarray) -> np.ndarray:
    """The index (T,) at which a forcing's mask is 1/2, at times t (T,)."""
    return np.asarray(cutoffs(forcing, t) / rings.fraction(1.0))


def unit_line(spectrum: Spectrum, noise_scale: float, t: np.ndarray) -> np.ndarray:
    """The data's own line (T,): the index below which they exceed the noise, at times t (T,)."""
    return contour(spectrum.k, spectrum.power(), np.asarray(t, dtype=np.float64), noise_scale)
