"""How the spectrum of samples differs from the data's, band by band: needs no network, and few pictures.

Each picture is reduced to the logarithm of its mean DCT power in rings of equal width of the radial frequency that
Spectral Forcing's mask uses. Their mean and covariance over a set are compared: per band as one-dimensional
Gaussians, together by the Fréchet distance. Powers are relative, so a band that carries little still counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..common.pixels import ROUNDING_POWER, from_uint8
from ..dct import Transform, radial_frequency
from ..errors import MlxSfError
from .moments import Gaussian, frechet_distance

BANDS = 16


class BandPowers:
    """Log power per band of pictures of one size. `edges` (bands + 1,) are radii from 0 (mean) to 1 (corner)."""

    def __init__(self, height: int, width: int, bands: int = BANDS) -> None:
        if min(height, width) < 2:
            raise MlxSfError(f"spectral distance: pictures are {height}x{width}, want at least 2x2")
        self.shape = height, width
        # rings must not be thinner than the step of the coarser axis, or some would be empty
        self.edges = np.linspace(0, 1, min(bands, min(height, width) - 1) + 1)
        radius = radial_frequency(height, width)
        ring = np.minimum((radius * (len(self.edges) - 1)).astype(int), len(self.edges) - 2).reshape(-1)
        ring[0] = len(self.edges)  # the mean brightness is no frequency
        member = (ring[:, None] == np.arange(len(self.edges) - 1)).astype(np.float32)
        self._average = mx.array(member / member.sum(axis=0))
        self._transform = Transform(height, width)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, bands) float64 natural logarithms of mean power, from pictures (B, H, W, 3) uint8."""
        power = mx.square(self._transform(from_uint8(mx.array(np.ascontiguousarray(images))))).mean(axis=1)  # (B, H, W)
        bands = power.reshape(len(images), -1) @ self._average
        return np.log(np.array(bands).astype(np.float64) + ROUNDING_POWER)


@dataclass(frozen=True)
class Band:
    """One ring of radii `low` to `high`.

    decibels: how much more power the samples have. distance: Fréchet distance of the log powers (natural units).
    """

    low: float
    high: float
    decibels: float
    distance: float


@dataclass(frozen=True)
class SpectralDistance:
    """`total`: Fréchet distance of all bands together; `bands`: each on its own."""

    total: float
    bands: Sequence[Band]


def spectral_distance(samples: Gaussian, reference: Gaussian) -> SpectralDistance:
    """Compare the log band powers of two sets of pictures."""
    total = frechet_distance(samples, reference)
    shift = samples.mu - reference.mu
    spread = np.sqrt(np.diag(samples.sigma)) - np.sqrt(np.diag(reference.sigma))
    edges = np.linspace(0, 1, samples.dims + 1)
    bands = [
        Band(
            float(edges[i]),
            float(edges[i + 1]),
            float(10 / np.log(10) * shift[i]),
            float(shift[i] ** 2 + spread[i] ** 2),
        )
        for i in range(samples.dims)
    ]
    return SpectralDistance(total, bands)
