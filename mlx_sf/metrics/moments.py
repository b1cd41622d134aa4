"""Mean, covariance and Fréchet distance of features, in float64 throughout.

The reference takes the trace term from the eigenvalues of the non-symmetric product sigma1 sigma2. Here sigma = L L^T
and the trace term is the sum of the singular values of L1^T L2: the same number in exact arithmetic, faster, and right
where a covariance has not full rank (fewer samples than dimensions), where the reference's is rounding noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg

from ..errors import MlxSfError

_FLUSH = 1024  # rows that are folded into the covariance at a time


class Moments:
    """Streaming mean and covariance of rows (B, D), in constant memory: 8 D^2 bytes and a buffer of 1024 rows.

    Rows are folded in by the pairwise update of Chan, Golub and LeVeque, which does not cancel where the mean is large
    against the spread. The buffer makes the arithmetic independent of how the rows were batched; their order matters
    only to rounding. While there are fewer rows than a buffer holds, they are kept, and the factor is exact.
    """

    def __init__(self, dims: int) -> None:
        self.dims, self.count = dims, 0
        self._mean = np.zeros(dims)
        self._scatter = np.zeros((dims, dims))
        self._folded = 0
        self._buffer = np.empty((_FLUSH, dims))

    def add(self, rows: np.ndarray) -> None:
        """Add rows (B, D) of any float type. Raises `MlxSfError` for NaN or infinite values."""
        if rows.ndim != 2 or rows.shape[1] != self.dims:
            raise MlxSfError(f"moments: rows have shape {rows.shape}, want (N, {self.dims})")
        if not np.isfinite(rows).all():
            raise MlxSfError("moments: features hold NaN or infinite values: is the network or a picture damaged?")
        start = 0
        while start < len(rows):
            waiting = self.count - self._folded
            n = min(len(rows) - start, _FLUSH - waiting)
            self._buffer[waiting : waiting + n] = rows[start : start + n]
            self.count, start = self.count + n, start + n
            if self.count - self._folded == _FLUSH:
                self._fold()

    def _fold(self) -> None:
        n = self.count - self._folded
        if n:
            rows = self._buffer[:n]
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._merge(n, mean, centred.T @ centred)

    def _merge(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total, delta = self._folded + n, mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self._folded * n / total))
        self._mean += delta * (n / total)
        self._folded = total

    def merge(self, other: "Moments") -> None:
        """Add everything that `other` has seen. `other` is left unusable."""
        other._fold()
        if other.count:
            self._fold()
            self._merge(other.count, other._mean, other._scatter)
            self.count = self._folded

    def finish(self) -> "Gaussian":
        """Mean and covariance (divisor N - 1) of the rows so far; more rows may follow."""
        if self.count < 2:
            raise MlxSfError(f"moments: {self.count} samples, want at least 2 for a covariance")
        if self._folded == 0:  # few rows: their own factor is exact and far smaller than the covariance
            rows = self._buffer[: self.count]
            mean = rows.mean(axis=0)
            factor = (rows - mean).T / math.sqrt(self.count - 1)
            return Gaussian(mean, factor @ factor.T, self.count, factor if self.count <= self.dims else None)
        whole = Moments.from_state(self.state())
        whole._fold()
        return Gaussian(whole._mean, whole._scatter / (whole.count - 1), whole.count)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` continues to the bit."""
        return {
            "count": np.array([self.count, self._folded]),
            "mean": self._mean.copy(),
            "scatter": self._scatter.copy(),
            "buffer": self._buffer[: self.count - self._folded].copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "Moments":
        self = cls(len(state["mean"]))
        self.count, self._folded = (int(n) for n in state["count"])
        self._mean, self._scatter = state["mean"].copy(), state["scatter"].copy()
        self._buffer[: len(state["buffer"])] = state["buffer"]
        return self


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, of `count` samples (None: the file does not say).

    `factor` (D, r), if known, has covariance = factor factor^T. `provenance` says how a statistics file was made.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    factor: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        return len(self.mu)


def gaussian_of(features: np.ndarray) -> Gaussian:
    """The Gaussian of features (N, D)."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.finish()


def covariance_factor(g: Gaussian) -> np.ndarray:
    """L (D, r) with L L^T = sigma, r the numerical rank: Cholesky with pivoting, which stops where sigma ends."""
    if g.factor is not None:
        return g.factor
    # dpstrf wants column order; a symmetric matrix is its own transpose, so no copy is wasted on that
    c, pivots, rank, info = scipy.linalg.lapack.dpstrf(g.sigma.T, lower=1)
    if info < 0:
        raise MlxSfError("Fréchet distance: the covariance holds values that are not finite")
    factor = np.zeros((g.dims, rank))
    factor[pivots - 1] = np.tril(c)[:, :rank]
    return factor


def trace_of_root(a: Gaussian, b: Gaussian) -> float:
    """tr (sigma_a sigma_b)^(1/2): the sum of the singular values of L_a^T L_b."""
    m = covariance_factor(a).T @ covariance_factor(b)
    if min(m.shape) == 0:
        return 0.0
    if min(m.shape) <= 1024:
        return float(scipy.linalg.svdvals(m).sum())
    # four times faster than singular values; squares lose only what is below 1e-8 of the largest
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    return float(np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance |mu_a - mu_b|^2 + tr sigma_a + tr sigma_b - 2 tr (sigma_a sigma_b)^(1/2).

    Nothing is added or clipped: equal Gaussians give rounding, perhaps below 0.
    """
    if a.dims != b.dims:
        raise MlxSfError(f"Fréchet distance: features have {a.dims} and {b.dims} dimensions, want the same")
    delta = a.mu - b.mu
    traces = float(np.trace(a.sigma)) + float(np.trace(b.sigma))
    return float(delta @ delta) + traces - 2 * trace_of_root(a, b)


def unreliable(*sides: Gaussian) -> str | None:
    """Why a distance between these is no estimate of the true one, if it is not: fewer samples than dimensions."""
    for g in sides:
        if g.count is not None and g.count <= g.dims:
            return (
                f"{g.count} samples for {g.dims} dimensions: the covariance has not full rank, so the distance "
                "compares these pictures but does not estimate the distance of the distributions"
            )
    return None
