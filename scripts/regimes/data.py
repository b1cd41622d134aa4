"""The scenes of a regime, and what is known about them before any training: spectrum, cutoffs, baselines."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mlx_sf.data.scenes import scene
from mlx_sf.dct import dct_matrix
from mlx_sf.flow import FlowConfig
from mlx_sf.spectrum.meter import Rings
from mlx_sf.spectrum.ratio import schedule_of

from .plan import REGIMES, Plan

# seeds of endless data sets that share no picture: training pools take 1000 + seed of the run
_HELD_OUT, _REFERENCE, _TRAINING = 1, 2, 1000


@lru_cache(maxsize=16)
def scenes(regime: str, size: int, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """((count, size, size, 3) uint8 pictures, (count,) int32 labels) of a regime; read-only, for they are shared."""
    pairs = [scene(i, size, seed, REGIMES[regime]) for i in range(count)]
    images, labels = np.stack([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def signal(images: np.ndarray) -> np.ndarray:
    """uint8 pictures (B, H, H, 3) -> (B, 3, H, H) float64 in [-1, 1], the scale on which noise is added."""
    return np.moveaxis(images / 127.5 - 1, 3, 1)


@dataclass(frozen=True)
class Regime:
    """The data of a regime at a plan's sizes, for runs of one seed."""

    name: str
    plan: Plan
    seed: int

    @property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        return scenes(self.name, self.plan.img_size, _TRAINING + self.seed, self.plan.pool)

    @property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for all seeds."""
        return scenes(self.name, self.plan.img_size, _HELD_OUT, self.plan.held_out)

    @property
    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """What samples are compared with; the same for all seeds."""
        return scenes(self.name, self.plan.img_size, _REFERENCE, self.plan.reference)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and labels of step 1, 2, ...: every epoch in another order; depends on (seed, step) alone."""
        images, labels = self.training
        per_epoch = self.plan.pool // self.plan.batch_size
        epoch, i = divmod(step - 1, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.plan.pool)
        chosen = order[i * self.plan.batch_size : (i + 1) * self.plan.batch_size]
        return images[chosen], labels[chosen]

    @cached_property
    def variance(self) -> np.ndarray:
        """(3, n, n) variance of each DCT coefficient over the training scenes."""
        a = dct_matrix(self.plan.img_size)
        return (a @ signal(self.training[0]) @ a.T).var(axis=0)

    def baselines(self) -> dict[str, list[float]]:
        """Mean squared errors of the clean image, per time, of two estimates that need no network.

        mean: the mean training scene. wiener: each DCT coefficient of the state shrunk by the training scenes' variance
        against the noise's, the best linear estimate that treats coefficients one by one.
        """
        t = self.plan.times()[:, None, None, None]
        noise = ((1 - t) * FlowConfig().noise_scale) ** 2
        left = self.variance * noise / (t**2 * self.variance + noise)
        mean = signal(self.training[0]).mean(axis=0)
        spread = float(np.square(signal(self.held_out[0]) - mean).mean())
        return {"mean": [spread] * self.plan.bins, "wiener": left.mean(axis=(1, 2, 3)).tolist()}

    def cutoffs(self) -> tuple[float, ...]:
        """Cutoff radii at equal steps of t, where the training scenes' data-to-noise ratio is `plan.delta`."""
        a, rings = dct_matrix(self.plan.img_size), Rings(self.plan.img_size)
        power = rings.mean(np.square(a @ signal(self.training[0]) @ a.T).mean(axis=(0, 1)))
        return schedule_of(rings, power, FlowConfig().noise_scale, self.plan.delta)
