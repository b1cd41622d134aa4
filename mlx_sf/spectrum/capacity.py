"""Where a network's capacity goes: its denoising error per band and time, against what needs no network at all.

For pictures x, noise e and times t the network's estimate of x from t x + (1 - t) e is compared with two closed-form
baselines, band by band: putting out nothing (error: the signal's own power), and the Wiener estimate, which knows the
data's spectrum and nothing else (S N / (S + N) with signal power S and noise power N = ((1 - t) / t)^2 noise_scale^2).
Only where a network beats the Wiener estimate does it model more than the spectrum: edges, shapes, classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoints.config import Config
from ..common.progress import Progress
from ..data.sources import Source
from ..device.lanes import split_batch
from ..errors import MlxSfError, option
from ..flow import add_noise, velocity
from ..models import Asked, Condition, Network
from ..sampling.noise import seeded_noise
from .meter import MAX_GROUPS, MIN_IMAGES, Meter, Rings, Spectrum, loader, pictures

TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_NEAR = 0.5  # dB: closer than this to a baseline counts as no better


@dataclass(frozen=True)
class Capacity:
    """Mean squared errors of a coefficient at times t (T,) in bands (K,): arrays (T, K).

    error: the network's; zero: of putting out nothing, which is the signal's power; wiener: of the Wiener estimate,
    channel by channel; colour: of the Wiener estimate that also knows how the channels go together. `deviation`:
    standard error, in dB, of error / wiener over the images. ratio: data over noise, of powers. `low`, `high` (K,):
    first and last index k of each band.
    """

    t: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    zero: np.ndarray
    wiener: np.ndarray
    colour: np.ndarray
    deviation: np.ndarray
    ratio: np.ndarray
    images: int

    @property
    def against_wiener(self) -> np.ndarray:
        """Error over the Wiener estimate's in dB: below 0 the network models more than the spectrum."""
        return decibels(self.error / self.wiener)

    @property
    def against_zero(self) -> np.ndarray:
        """Error over the signal's power in dB: 0 and above, the band would be better left empty."""
        return decibels(self.error / self.zero)

    @property
    def useless(self) -> np.ndarray:
        """Cells (T, K) in which the network is no better than putting out nothing (by half a dB)."""
        return np.asarray(self.against_zero > -_NEAR)

    @property
    def modelled(self) -> np.ndarray:
        """Cells (T, K) in which the network beats the Wiener estimate by half a dB and two standard errors."""
        return np.asarray(self.against_wiener < -np.maximum(_NEAR, 2 * self.deviation))


def decibels(ratio: np.ndarray) -> np.ndarray:
    return np.asarray(10 * np.log10(np.maximum(ratio, 1e-30)))


def band_edges(rings: Rings) -> np.ndarray:
    """Bands for display: single rings at first, then half octaves; first indices (bands + 1,), the mean left out."""
    edges, top = [1], int(rings.k[-1]) + 1
    while edges[-1] < top:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2**0.5)))
    edges[-1] = top
    if len(edges) > 2 and edges[-1] - edges[-2] < 0.2 * edges[-2]:  # a sliver at the corner joins its neighbour
        del edges[-2]
    return np.array(edges)


def into_bands(rings: Rings, values: np.ndarray) -> np.ndarray:
    """Ring means (..., K) into means over the coefficients of each band."""
    edges = band_edges(rings)
    first = np.searchsorted(rings.k, edges[:-1])
    weighted = np.add.reduceat(values * rings.counts, first, axis=-1)
    return np.asarray(weighted / np.add.reduceat(rings.counts, first))


def wiener_error(signal: np.ndarray, gain_signal: np.ndarray, noise: float) -> np.ndarray:
    """Expected error, on pictures of power `signal`, of the Wiener estimate made for power `gain_signal`.

    With both equal this is S N / (S + N).
    """
    gain = gain_signal / (gain_signal + noise)
    return np.asarray((1 - gain) ** 2 * signal + gain**2 * noise)


def colour_wiener_error(signal: np.ndarray, known: np.ndarray, noise: float) -> np.ndarray:
    """The same with the covariance of the channels: arrays (K, 3, 3) -> mean over the channels (K,)."""
    gain = known @ np.linalg.inv(known + noise * np.eye(3))
    rest = np.eye(3) - gain
    error = rest @ signal @ rest.swapaxes(-1, -2) + noise * gain @ gain.swapaxes(-1, -2)
    return np.asarray(np.trace(error, axis1=-2, axis2=-1) / 3)


def classes_for(config: Config, source: Source, labels: Sequence[Asked]) -> list[Asked]:
    """The pictures' labels where the network knows these classes, else "no class"."""
    names = config.class_names
    same = source.class_names == names if names else len(source.class_names) == config.model.num_classes > 1
    return list(labels) if same else [None] * len(labels)


def measure_capacity(
    network: Network,
    config: Config,
    source: Source,
    spectrum: Spectrum,
    count: int = 64,
    times: Sequence[float] = TIMES,
    seed: int = 0,
) -> Capacity:
    """Errors of a network on `count` pictures; noise from `seed` + picture number, the same at every time.

    The pictures are picked at random, in another order than the spectrum's. Raises `MlxSfError` for other sizes than
    the spectrum's, fewer than 8 or more than 1024 pictures, or times outside (0, 1).
    """
    size = (spectrum.img_size, spectrum.img_size)
    if config.model.size != size or source.size != size:
        raise MlxSfError(
            f"capacity: network {config.model.size}, pictures {source.size}, spectrum {size} pixels, want one size"
        )
    count = count if source.endless else min(count, len(source))
    if not MIN_IMAGES <= count <= MAX_GROUPS:
        raise MlxSfError(
            f"capacity: {count} picture(s), want {MIN_IMAGES} to {MAX_GROUPS}: change {option('capacity_images')}"
        )
    if not all(0 < t < 1 for t in times):
        raise MlxSfError(f"capacity: times are {tuple(times)}, want all above 0 and below 1")
    meter = Meter(spectrum.img_size, spectrum.n)
    errors: list[list[np.ndarray]] = [[] for _ in times]  # per time, per image: (K,)
    run, done = split_batch(network, network.parameters), 0
    with Progress(count * len(times), "denoising error", "estimates") as bar:
        for images, labels in pictures(loader(source, count, seed + 1), count):
            meter.add(images)
            x = mx.array(images)
            noise = seeded_noise([seed + done + i for i in range(len(images))], source.size)
            condition = network.condition(classes_for(config, source, labels))
            for i, t in enumerate(times):
                estimate = denoised(run, config, x, noise, condition, t)
                f = meter.coefficients(np.array(estimate - x))
                errors[i] += list(meter.rings.mean((f**2).mean(axis=(1, 2))))
                bar.update(len(images))
            done += len(images)
    return _compared(spectrum, meter.finish(source.describe()), np.array(errors), times, config.flow.noise_scale)


def denoised(
    network: Callable[[mx.array, mx.array, Condition], mx.array],
    config: Config,
    x: mx.array,
    noise: mx.array,
    condition: Condition,
    t: float,
) -> mx.array:
    """The network's estimate of images x from t x + (1 - t) e, whatever it predicts: z + (1 - t) v."""
    flow, time = config.flow, mx.array([t], dtype=mx.float32)
    z = add_noise(x, noise, time, flow.noise_scale)
    out = network(z, time, condition).astype(mx.float32)
    # 1 - t, bounded as in the velocity: what predicts x comes back as it was put out
    rest = max(1 - t, flow.t_eps)
    return z + rest * velocity(out, z, time, flow)


def _compared(
    spectrum: Spectrum, shown: Spectrum, errors: np.ndarray, times: Sequence[float], noise_scale: float
) -> Capacity:
    """Network and baselines on the very same pictures; the Wiener estimate knows the larger set's spectrum."""
    rings = spectrum.rings
    known, signal = spectrum.groups[..., :3], shown.groups[..., :3]  # (G, K, channels)
    known_power = np.tensordot(spectrum.sizes, known, 1) / spectrum.count
    per_image = signal.mean(axis=-1)
    wiener, colour, deviation = [], [], []
    for i, t in enumerate(times):
        noise = ((1 - t) / t * noise_scale) ** 2
        of_image = wiener_error(signal, known_power, noise).mean(axis=-1)  # (N, K)
        wiener.append(into_bands(rings, of_image.mean(axis=0)))
        colour.append(into_bands(rings, colour_wiener_error(shown.colours(), spectrum.colours(), noise)))
        deviation.append(_deviation(into_bands(rings, errors[i]), into_bands(rings, of_image)))
    edges = band_edges(rings)
    zero = into_bands(rings, per_image.mean(axis=0))
    return Capacity(
        np.array(times),
        edges[:-1],
        edges[1:] - 1,
        into_bands(rings, errors.mean(axis=1)),
        np.broadcast_to(zero, (len(times), len(zero))),
        np.array(wiener),
        np.array(colour),
        np.array(deviation),
        np.array([zero / (((1 - t) / t * noise_scale) ** 2) for t in times]),
        errors.shape[1],
    )


def _deviation(error: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Standard error in dB of mean(error) / mean(baseline), rows (N, K) being images (delta method)."""
    ratio = error.mean(axis=0) / baseline.mean(axis=0)
    rest = (error - ratio * baseline) / error.mean(axis=0)
    return np.asarray(10 / np.log(10) * rest.std(axis=0, ddof=1) / np.sqrt(len(error)))
