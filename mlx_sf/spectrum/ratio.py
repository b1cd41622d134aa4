"""Data against noise in each band at each time, and cutoff schedules that follow from it.

At time t the state is t x + (1 - t) e with e white of standard deviation `noise_scale`, so band k holds data and noise
in the ratio t^2 P(k) / ((1 - t)^2 noise_scale^2). Where it is 1 the data stop standing out: the unit contour.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import MlxSfError
from .meter import Rings, Spectrum


def data_to_noise(power: np.ndarray, t: np.ndarray, noise_scale: float) -> np.ndarray:
    """The ratio (T, K) at times t (T,) in bands of power (K,); infinite at t = 1."""
    t = np.asarray(t, dtype=np.float64)[:, None]
    with np.errstate(divide="ignore"):
        odds = np.square(t / ((1 - t) * noise_scale))
        return np.asarray(np.where(power > 0, np.maximum(power, 1e-300) * odds, 0.0))


def contour(k: np.ndarray, power: np.ndarray, t: np.ndarray, noise_scale: float, threshold: float = 1.0) -> np.ndarray:
    """Highest index, at each time (T,), of a band whose data-to-noise ratio is at least `threshold`.

    Between rings the power is interpolated on logarithmic axes. 0 where no band k > 0 reaches the threshold, the last
    ring's index where that one does. Every band that stands out lies below, also where the spectrum is not monotone.
    """
    above = k > 0
    # seen from the top, the largest power at or above k falls with k, and crosses any level once
    log_k = np.log(k[above])
    envelope = np.maximum.accumulate(np.log(np.maximum(power[above], 1e-300))[::-1])[::-1]
    with np.errstate(divide="ignore"):
        t = np.asarray(t, dtype=np.float64)
        level = np.log(threshold * np.square(noise_scale)) + 2 * (np.log1p(-t) - np.log(t))
    # np.interp wants rising abscissae; on a plateau the last (highest) k is meant
    found = np.exp(_crossing(log_k, envelope, level))
    return np.asarray(np.where(level > envelope[0], 0.0, np.where(level <= envelope[-1], k[-1], found)))


def _crossing(x: np.ndarray, falling: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Where piecewise-linear `falling` (x) goes below each level, which lies within its range."""
    right = np.clip(np.searchsorted(-falling, -level, side="right"), 1, len(x) - 1)
    drop = falling[right - 1] - falling[right]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(drop > 0, (falling[right - 1] - level) / drop, 1.0)
    return np.asarray(x[right - 1] + np.clip(share, 0, 1) * (x[right] - x[right - 1]))


def paper_contour(t: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's k*(t) = (1 - t)^(-2 / alpha): the unit contour for A = noise_scale = 1, with t^2 taken as 1."""
    with np.errstate(divide="ignore"):
        return np.asarray((1 - np.asarray(t, dtype=np.float64)) ** (-2 / alpha))


def data_schedule(
    spectrum: Spectrum,
    noise_scale: float,
    delta: float = 1.0,
    power: np.ndarray | None = None,
    steps: int = 100,
) -> tuple[float, ...]:
    """Cutoff radii (steps + 1,) at equal steps of t from 0 to 1: where the data-to-noise ratio equals `delta`.

    They never fall, start at 0 and end at 1: `ForcingConfig(scale_schedule="data", schedule_cutoffs=...)`. `power` (K,)
    replaces the measured power, by a fit say. A larger delta filters more. Raises `MlxSfError` unless delta and the
    noise scale are positive numbers.
    """
    power = spectrum.power() if power is None else power
    return schedule_of(spectrum.rings, power, noise_scale, delta, steps)


def schedule_of(
    rings: Rings, power: np.ndarray | Sequence[float], noise_scale: float, delta: float = 1.0, steps: int = 100
) -> tuple[float, ...]:
    """`data_schedule` from a plain array of powers, one per ring."""
    for name, value in (("delta", delta), ("noise scale", noise_scale)):
        if not (np.isfinite(value) and value > 0):
            raise MlxSfError(f"data schedule: {name} is {value}, want a number above 0")
    if steps < 1:
        raise MlxSfError(f"data schedule: {steps} steps, want at least 1")
    t = np.linspace(0, 1, steps + 1)
    c = rings.fraction(contour(rings.k.astype(np.float64), np.asarray(power), t, noise_scale, delta))
    c = np.minimum(np.maximum.accumulate(c), 1.0)
    c[-1] = 1.0
    return tuple(float(round(v, 6)) for v in c)
