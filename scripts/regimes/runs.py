"""One run: a network is trained and judged. Everything random comes from keys that do not name the arm."""

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sf.checkpoints.config import Config
from mlx_sf.common.pixels import from_uint8, to_uint8
from mlx_sf.dct import dct_matrix, radial_frequency
from mlx_sf.flow import add_noise, flow_loss, velocity
from mlx_sf.metrics.bands import BandPowers, spectral_distance
from mlx_sf.metrics.moments import Gaussian, frechet_distance, gaussian_of
from mlx_sf.models.jit import JiT
from mlx_sf.sampling.noise import seeded_noise
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.training.optimizer import AdamW
from mlx_sf.training.step import Arrays, Draws, StepOptions, TrainStep, Weights, bound, draws, initial_arrays, trainable

from .data import Regime
from .features import RandomFeatures
from .plan import Plan, Run

_EVALUATION_BATCH = 128
_NOISE_SEED = 9_000_000  # evaluation noise: the same for every network of the experiment
BANDS = 4  # rings of the radial frequency in which errors are reported


def initial_state(config: Config, seed: int) -> tuple[JiT, Arrays]:
    """Network and training state at the start: they depend on the seed and the shapes, not on the arm."""
    model = JiT(config.model, mx.random.key(seed))
    return model, initial_arrays(trainable(model))


def inputs(plan: Plan, run: Run, step: int) -> tuple[np.ndarray, np.ndarray, Draws]:
    """Pictures, labels and random numbers of step 1, 2, ...; equal for all arms of a seed."""
    images, labels = Regime(run.regime, plan, run.seed).batch(step)
    size, whole = (plan.img_size, plan.img_size), slice(0, plan.batch_size)
    return images, labels, draws(run.seed, step, plan.batch_size, whole, size)


def train(plan: Plan, run: Run, config: Config) -> tuple[JiT, Weights, list[float]]:
    """Train a run's network; returns it with its averaged weights and the loss of every step."""
    model, arrays = initial_state(config, run.seed)
    step = TrainStep(model, config.flow, StepOptions(optimizer=AdamW(), compile=True))
    losses: list[mx.array] = []
    null = model.condition([None] * plan.batch_size)
    for number in range(1, plan.steps + 1):
        lr = plan.lr * min(1.0, number / max(plan.warmup, 1))
        # at first the average is over the steps so far: it never holds much of the initial weights
        decay = min(plan.ema, number / (number + 10))
        images, labels, numbers = inputs(plan, run, number)
        condition = model.condition(labels.tolist())
        arrays, loss, _ = step(arrays, images, condition, null, numbers, lr, number, (decay, decay))
        mx.eval(arrays, loss)
        losses.append(loss)
    return model, arrays["ema1"], np.array(mx.stack(losses)).tolist()


def _batches(count: int) -> Iterator[slice]:
    for start in range(0, count, _EVALUATION_BATCH):
        yield slice(start, min(start + _EVALUATION_BATCH, count))


def validation(plan: Plan, regime: Regime, config: Config, model: JiT) -> dict[str, Any]:
    """Errors on held-out scenes, per time, with the same noise for every network.

    v_loss (bins,): the training loss. x_mse (bins,): squared error of the estimated clean image, in [-1, 1].
    x_mse_bands (bins, 4): the parts of x_mse that lie in each quarter of the radial frequency.
    """
    images, labels = regime.held_out
    size, flow = plan.img_size, config.flow
    powers = BandErrors(size)
    network = mx.compile(lambda z, t, condition: model(z, t, condition))
    v_loss, bands = np.zeros(plan.bins), np.zeros((plan.bins, BANDS))
    for part in _batches(len(images)):
        x, condition = from_uint8(mx.array(images[part])), model.condition(labels[part].tolist())
        for i, time_ in enumerate(plan.times()):
            noise = mx.random.normal(x.shape, key=mx.random.key(_NOISE_SEED + i * plan.held_out + part.start))
            t = mx.full((len(x),), float(time_))
            z = add_noise(x, noise, t, flow.noise_scale)
            out = network(z, t[:1], condition)
            v_loss[i] += flow_loss(velocity(out, z, t, flow), x, z, t, flow).sum().item()
            bands[i] += powers(out - x)
    bands /= len(images)
    return {
        "v_loss": (v_loss / len(images)).tolist(),
        "x_mse": bands.sum(axis=1).tolist(),
        "x_mse_bands": bands.tolist(),
    }


class BandErrors:
    """Squared errors of images (B, 3, n, n), summed over the batch, by quarter of the radial frequency (4,).

    The transform keeps energy, so the four add up to the images' mean squared error.
    """

    def __init__(self, n: int) -> None:
        ring = np.minimum((radial_frequency(n) * BANDS).astype(int), BANDS - 1).reshape(-1)
        self._member = mx.array((ring[:, None] == np.arange(BANDS)).astype(np.float32))
        self._dct = mx.array(dct_matrix(n).astype(np.float32))

    def __call__(self, error: mx.array) -> np.ndarray:
        power = mx.square((self._dct @ error) @ self._dct.T).mean(axis=1).sum(axis=0).reshape(1, -1)
        return np.array(power @ self._member, dtype=np.float64)[0] / power.size


def samples(plan: Plan, config: Config, model: JiT) -> np.ndarray:
    """(samples, n, n, 3) uint8, classes in turn, without guidance; noise i is the same for every network."""
    out, sampler = [], Sampler(model, config.flow, config.sample, compile=True)
    for part in _batches(plan.samples):
        noise = seeded_noise(range(_NOISE_SEED + part.start, _NOISE_SEED + part.stop), config.model.size)
        for state in sampler.states(noise, [i % config.model.num_classes for i in range(part.start, part.stop)]):
            mx.eval(state.z)
        out.append(to_uint8(state.z))
    return np.concatenate(out)


@lru_cache(maxsize=16)
def _reference(regime: Regime) -> tuple[Gaussian, Gaussian]:
    return _gaussians(regime.reference[0])


def _gaussians(pictures: np.ndarray) -> tuple[Gaussian, Gaussian]:
    """Of the log band powers and of the random features."""
    powers = BandPowers(*pictures.shape[1:3])
    return gaussian_of(powers(pictures)), gaussian_of(RandomFeatures()(pictures))


def distances(regime: Regime, pictures: np.ndarray) -> dict[str, Any]:
    """Spectral distance, Fréchet distance, and power per band in dB, of pictures against the regime's reference."""
    ours, reference = _gaussians(pictures), _reference(regime)
    spectral = spectral_distance(ours[0], reference[0])
    return {
        "spectral": spectral.total,
        "frechet": frechet_distance(ours[1], reference[1]),
        "decibels": [band.decibels for band in spectral.bands],
    }


@lru_cache(maxsize=16)
def known(regime: Regime) -> dict[str, Any]:
    """What needs no network: cutoffs, baselines, and the distances of as many real scenes as there are samples."""
    real = distances(regime, regime.training[0][: regime.plan.samples])
    return {"cutoffs": list(regime.cutoffs()), "baselines": regime.baselines(), "real": real}


def execute(plan: Plan, run: Run) -> tuple[dict[str, Any], np.ndarray]:
    """Train and judge; returns what is recorded of a run, and its samples."""
    regime = Regime(run.regime, plan, run.seed)
    data = known(regime)
    config = plan.config(run, tuple(data["cutoffs"]))
    start = time.perf_counter()
    model, weights, losses = train(plan, run, config)
    trained = time.perf_counter()
    with bound(model, weights):
        errors = validation(plan, regime, config, model)
        pictures = samples(plan, config, model)
    record = {
        **errors,
        **distances(regime, pictures),
        **data,
        "last_loss": float(np.mean(losses[-max(1, plan.steps // 10) :])),
        "seconds_per_step": (trained - start) / plan.steps,
        "parameters": sum(w.size for w in weights.values()),
    }
    return record, pictures
