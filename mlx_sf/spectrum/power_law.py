"""P(k) = A k^-alpha fitted to a measured spectrum, with intervals, a judgement of the fit, and published values.

The line is fitted to the logarithms of the ring powers, each ring weighted by its number of coefficients. What 8-bit
rounding adds is subtracted first, and rings that hold little else are left out.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import MlxSfError, option
from .meter import Channel, Spectrum

FIT_LOW = 4  # the mean and the three lowest rings hold few coefficients, and the composition of the pictures
FIT_HIGH = 0.75  # of n: above, resampling and JPEG thin the spectrum out; the corner lies further up still
MIN_RINGS = 6
POOR_DB, POOR_R2, CURVED = 1.0, 0.97, 0.5  # a straight line describes the data poorly beyond any of these
_ROUNDING_MARGIN = 4.0
_REPLICATES = 1000
_LEVEL = 0.95

PUBLISHED = (
    ("Field 1987, 6 photographs: amplitude close to 1/k", 2.0, None),
    ("van der Schaaf & van Hateren 1996, photographs: power", 1.9, None),
    ("Tolhurst, Tadmor & Chao 1992, 135 photographs: twice their slopes of amplitude", 2.4, (1.6, 3.0)),
)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high


@dataclass(frozen=True)
class PowerLaw:
    """The fit of one channel over the rings k = `low` ... `high`.

    amplitude: A, power of a coefficient extrapolated to k = 1, in squared units of images in [-1, 1]. alpha: exponent.
    r2 and residual_db (root mean square, both weighted): goodness of fit. alpha_lower, alpha_upper: exponents of the
    lower and the upper half of the range (in log k): they differ where the spectrum is curved.
    """

    channel: Channel
    amplitude: Interval
    alpha: Interval
    low: int
    high: int
    rings: int
    r2: float
    residual_db: float
    alpha_lower: float
    alpha_upper: float

    def at(self, k: np.ndarray) -> np.ndarray:
        """Fitted power at radial index k > 0."""
        return np.asarray(self.amplitude.value * np.asarray(k, dtype=np.float64) ** -self.alpha.value)

    @property
    def poor(self) -> str | None:
        """Why a power law is a poor description of these data; None where it is a fair one."""
        if self.residual_db > POOR_DB:
            return f"rings lie {self.residual_db:.1f} dB off the line (root mean square; want at most {POOR_DB:g})"
        if abs(self.alpha_upper - self.alpha_lower) > CURVED:
            return f"the slope changes from {self.alpha_lower:.2f} to {self.alpha_upper:.2f} within the range"
        if self.r2 < POOR_R2:
            return f"R² is {self.r2:.3f} (want at least {POOR_R2:g})"
        return None


def fit_power_law(
    spectrum: Spectrum, channel: Channel = "mean", low: int = FIT_LOW, high: int | None = None, seed: int = 0
) -> PowerLaw:
    """Fit A and alpha over the rings `low` ... `high` (default 4 to 3/4 of the side).

    Each interval is the wider of two: the bootstrap over images (1000 replicates, Student's t for few images), which
    says how much another sample of pictures would differ, and what the scatter of the rings about the line says.
    """
    high = round(FIT_HIGH * spectrum.n) if high is None else high
    if not 1 <= low < high:
        raise MlxSfError(f"spectrum: fit range is {low} to {high}, want 1 <= LOW < HIGH (radial DCT indices)")
    power = spectrum.power(channel) - spectrum.floor
    used = (spectrum.k >= low) & (spectrum.k <= high)
    used &= power > max(_ROUNDING_MARGIN * spectrum.floor, 1e-30)
    if used.sum() < MIN_RINGS:
        raise MlxSfError(
            f"spectrum: {used.sum()} ring(s) between k = {low} and {high} hold more than 8-bit rounding, "
            f"want at least {MIN_RINGS} for a fit: take larger images or a wider {option('fit_range')}"
        )
    line = _Line(spectrum, used)
    log_a, alpha, x = line.solve(np.log(power[used]))
    residual = np.log(power[used]) - (log_a - alpha * x)
    errors = _standard_errors(spectrum, channel, line, x, residual)
    w = line.weights
    y = np.log(power[used])
    middle = np.log(np.sqrt(spectrum.k[used][0] * spectrum.k[used][-1]))
    halves = [line.slope(y, x, x <= middle), line.slope(y, x, x > middle)]
    return PowerLaw(
        channel,
        Interval(*(float(np.exp(log_a + s * errors[0])) for s in (0, -1, 1))),
        Interval(*(float(alpha + s * errors[1]) for s in (0, -1, 1))),
        int(spectrum.k[used][0]),
        int(spectrum.k[used][-1]),
        int(used.sum()),
        float(1 - w @ residual**2 / (w @ (y - w @ y / w.sum()) ** 2)),
        float(10 / np.log(10) * np.sqrt(w @ residual**2 / w.sum())),
        *halves,
    )


class _Line:
    """Weighted least squares of log power on log k over some rings.

    A ring's mean power under a power law is A mean(k^-alpha) over its coefficients, not A k^-alpha at its whole number:
    the abscissa is the index at which both agree, which depends (slightly) on alpha and is found in a few rounds.
    """

    def __init__(self, spectrum: Spectrum, used: np.ndarray) -> None:
        self._rings, self._used = spectrum.rings, used
        self.weights = spectrum.rings.counts[used].astype(np.float64)
        self._radius = np.where(spectrum.rings.radius == 0, 1.0, spectrum.rings.radius)

    def abscissa(self, alpha: float) -> np.ndarray:
        if abs(alpha) < 1e-6:
            return np.asarray(self._rings.mean(np.log(self._radius))[self._used])
        return np.asarray(-np.log(self._rings.mean(self._radius**-alpha)[self._used]) / alpha)

    def fit(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log A and alpha for rows of y (..., K)."""
        w = self.weights / self.weights.sum()
        mx, my = w @ x, y @ w
        alpha = -(y * w) @ (x - mx) / (w @ (x - mx) ** 2)
        return my + alpha * mx, alpha

    def solve(self, y: np.ndarray) -> tuple[float, float, np.ndarray]:
        alpha = 2.0
        for _ in range(4):
            x = self.abscissa(alpha)
            log_a, found = self.fit(y, x)
            alpha = float(found)
        return float(log_a), alpha, x

    def slope(self, y: np.ndarray, x: np.ndarray, part: np.ndarray) -> float:
        w, x, y = self.weights[part], x[part], y[part]
        mean = w @ x / w.sum()
        return float(-(w * (x - mean)) @ y / (w @ (x - mean) ** 2))


def _standard_errors(
    spectrum: Spectrum, channel: Channel, line: _Line, x: np.ndarray, residual: np.ndarray
) -> tuple[float, float]:
    """Half-widths of the intervals of log A and alpha."""
    g, sizes = spectrum.group_power(channel)[:, line._used] - spectrum.floor, spectrum.sizes
    rng = np.random.default_rng(0)
    chosen = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), _REPLICATES) * sizes
    y = np.log(np.maximum(chosen @ g / chosen.sum(axis=1, keepdims=True), 1e-30))
    images = stats.t.ppf(0.5 + _LEVEL / 2, len(sizes) - 1) * np.sqrt(len(sizes) / (len(sizes) - 1))
    boot = [images * float(v.std()) for v in line.fit(y, x)]

    w, free = line.weights, len(x) - 2
    variance = w @ residual**2 / free  # of a ring of one coefficient
    mean, spread = w @ x / w.sum(), w @ (x - w @ x / w.sum()) ** 2
    rings = stats.t.ppf(0.5 + _LEVEL / 2, free)
    scatter = [float(rings * np.sqrt(variance * v)) for v in (1 / w.sum() + mean**2 / spread, 1 / spread)]
    return max(boot[0], scatter[0]), max(boot[1], scatter[1])


def compared(alpha: Interval) -> list[str]:
    """The exponent beside published ones for photographs, a line each: does its interval meet theirs?"""
    lines = []
    for what, value, span in PUBLISHED:
        low, high = span or (value - 0.1, value + 0.1)
        relation = "flatter than that" if alpha.high < low else "steeper than that" if alpha.low > high else "in accord"
        shown = f"{low:g} to {high:g}, mean {value:g}" if span else f"about {value:g}"
        lines.append(f"{what}, alpha {shown}: these data are {relation}")
    return lines
