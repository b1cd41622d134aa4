"""One run: a network is trained and judged. Everything random comes from keys that do not name the arm."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sf.checkpoints.config import Config
from mlx_sf.common.pixels import from_uint8, to_uint8
from mlx_sf.common.progress import tell
from mlx_sf.data.captioned_scenes import categories
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import add_noise, flow_loss, velocity
from mlx_sf.formats.tensor_file import Entry, TensorFile, write_tensor_file
from mlx_sf.metrics.bands import BandPowers, spectral_distance
from mlx_sf.metrics.geneval import judge
from mlx_sf.metrics.moments import Gaussian, frechet_distance, gaussian_of
from mlx_sf.metrics.scene_detector import detect
from mlx_sf.models.jit_text import JiTText
from mlx_sf.sampling.noise import seeded_noise
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.training.optimizer import AdamW
from mlx_sf.training.step import Arrays, Draws, StepOptions, TrainStep, Weights, bound, draws, initial_arrays, trainable
from scripts.regimes.features import RandomFeatures

from .data import Data, Prompt, prompts
from .plan import Plan, Run

TESTED = ("seen", "unseen")
_EVALUATION_BATCH = 60
_NOISE_SEED = 9_000_000  # evaluation noise: the same for every network of the experiment
_CURVE = 60  # points of the training curve in a record
Stop = Callable[[], bool]


class Paused(Exception):
    """A run was asked to stop before its end; it goes on another time."""


def never() -> bool:
    """Stop never."""
    return False


# ---------------------------------------------------------------------------------------------------- training


def initial_state(config: Config, seed: int) -> tuple[JiTText, Arrays]:
    """Network and training state at the start: they depend on the seed and the shapes, not on the arm."""
    model = JiTText(config.model, mx.random.key(seed))
    return model, initial_arrays(trainable(model))


def inputs(plan: Plan, run: Run, step: int) -> tuple[np.ndarray, list[str], Draws]:
    """Pictures, captions and random numbers of step 1, 2, ...; equal for all arms and patch sizes of a seed."""
    images, captions = Data(plan, run.seed).batch(step)
    whole = slice(0, plan.batch_size)
    return images, captions, draws(run.seed, step, plan.batch_size, whole, (plan.img_size, plan.img_size))


@dataclass
class Progress:
    """Where a run is: its loss at every step so far, and the seconds that they took, all sittings together."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Store:
    """Where a run keeps its checkpoint, and how often it is written, in seconds."""

    path: Path
    every: float = 120.0

    def save(self, plan: Plan, run: Run, arrays: Arrays, progress: Progress) -> None:
        """Write all that the next step depends on, beside the old file, and put it in its place."""
        entries = [Entry.of(f"{kind}/{k}", w) for kind, weights in arrays.items() for k, w in weights.items()]
        entries.append(Entry.of("losses", np.array(progress.losses, np.float64)))
        head = {"run": run.name, "settings": plan.settings(), "seconds": progress.seconds}
        write_tensor_file(self.path, entries, json.dumps(head))

    def load(self, plan: Plan, run: Run) -> tuple[Arrays, Progress] | None:
        """What `save` wrote, to the bit; None where there is nothing yet. Raises `MlxSfError` for another run's."""
        if not self.path.exists():
            return None
        file = TensorFile(self.path)
        file.verify()
        head = json.loads(file.text)
        if head["run"] != run.name or head["settings"] != plan.settings():
            raise MlxSfError(
                f"{self.path}: is the checkpoint of other settings: delete it (the run starts again) "
                "or choose another --output"
            )
        arrays: Arrays = {}
        for name, entry in file.entries.items():
            kind, _, k = name.partition("/")
            if k:
                arrays.setdefault(kind, {})[k] = entry.array()
        mx.eval(arrays)
        return arrays, Progress(file.entries["losses"].read().tolist(), head["seconds"])


def train(plan: Plan, run: Run, config: Config, store: Store, stop: Stop = never) -> tuple[JiTText, Weights, Progress]:
    """Train a run's network, from its checkpoint where there is one; returns it with its averaged weights.

    Raises `Paused`, with a checkpoint written, where `stop` says so, and `MlxSfError` where the loss is not finite.
    """
    model, arrays = initial_state(config, run.seed)
    arrays, progress = store.load(plan, run) or (arrays, Progress())
    step = TrainStep(model, config.flow, StepOptions(optimizer=AdamW(), clip_grad=1.0, compile=True))
    null = model.condition([None] * plan.batch_size)
    begun = saved = time.monotonic()
    before, first = progress.seconds, progress.step
    for number in range(progress.step + 1, plan.steps + 1):
        images, captions, numbers = inputs(plan, run, number)
        decay = plan.decay(number)
        condition = model.condition(captions)
        arrays, loss, _ = step(arrays, images, condition, null, numbers, plan.rate(number), number, (decay, decay))
        mx.eval(arrays, loss)
        progress.losses.append(float(np.array(loss)))
        now = time.monotonic()
        progress.seconds = before + now - begun
        if not np.isfinite(progress.losses[-1]):
            raise MlxSfError(f"captions: {run}: the loss of step {number} is not finite: lower the learning rate")
        if stop() and number < plan.steps:
            store.save(plan, run, arrays, progress)
            raise Paused
        if now - saved >= store.every:
            store.save(plan, run, arrays, progress)
            saved = now
            tell(f"captions: {run}: step {number} of {plan.steps}, loss {np.mean(progress.losses[-100:]):.4f}")
    if progress.step > first:
        store.save(plan, run, arrays, progress)  # one that is killed while it is judged is not trained again
    return model, arrays["ema1"], progress


# --------------------------------------------------------------------------------------------------- judgement


def _batches(count: int, stop: Stop) -> Iterator[slice]:
    for start in range(0, count, _EVALUATION_BATCH):
        if stop():
            raise Paused
        yield slice(start, min(start + _EVALUATION_BATCH, count))


def validation(plan: Plan, config: Config, model: JiTText, stop: Stop = never) -> dict[str, list[float]]:
    """Errors on held-out scenes with their captions, per time (bins,), with the same noise for every network.

    v_loss: the training loss. x_mse: squared error of the estimated clean image, in [-1, 1].
    """
    images, captions = Data(plan, 0).held_out
    flow = config.flow
    network = mx.compile(lambda z, t, condition: model(z, t, condition))
    v_loss, x_mse = np.zeros(plan.bins), np.zeros(plan.bins)
    for part in _batches(len(images), stop):
        x, condition = from_uint8(mx.array(images[part])), model.condition(captions[part])
        for i, time_ in enumerate(plan.times()):
            noise = mx.random.normal(x.shape, key=mx.random.key(_NOISE_SEED + i * plan.held_out + part.start))
            t = mx.full((len(x),), float(time_))
            z = add_noise(x, noise, t, flow.noise_scale)
            out = network(z, t[:1], condition)
            v_loss[i] += flow_loss(velocity(out, z, t, flow), x, z, t, flow).sum().item()
            x_mse[i] += mx.square(out - x).mean(axis=(1, 2, 3)).sum().item()
    return {"v_loss": (v_loss / len(images)).tolist(), "x_mse": (x_mse / len(images)).tolist()}


def samples(plan: Plan, split: str, config: Config, model: JiTText, stop: Stop = never) -> np.ndarray:
    """(prompts, pictures, n, n, 3) uint8: a split's prompts drawn with guidance.

    The noise of picture k of prompt i is the same for every network.
    """
    out, sampler = [], Sampler(model, config.flow, config.sample, compile=True)
    asked = [p.text for p in prompts(plan, split) for _ in range(plan.pictures)]
    first = _NOISE_SEED + (1 + TESTED.index(split)) * 1_000_000
    for part in _batches(len(asked), stop):
        noise = seeded_noise(range(first + part.start, first + part.stop), config.model.size)
        for state in sampler.states(noise, asked[part]):
            mx.eval(state.z)
        out.append(to_uint8(state.z))
    return np.concatenate(out).reshape(-1, plan.pictures, plan.img_size, plan.img_size, 3)


def score(asked: tuple[Prompt, ...], drawn: np.ndarray) -> list[dict[str, Any]]:
    """GenEval's verdicts on pictures (prompts, k, n, n, 3), one entry a prompt; "correct" holds k times 0 or 1."""
    return [
        {"tag": p.tag, "prompt": p.text, "correct": [int(judge(p.metadata, detect(x)).correct) for x in of_prompt]}
        for p, of_prompt in zip(asked, drawn, strict=True)
    ]


def _gaussians(images: np.ndarray) -> tuple[Gaussian, Gaussian]:
    """Of the log band powers and of the random features."""
    return gaussian_of(BandPowers(*images.shape[1:3])(images)), gaussian_of(RandomFeatures()(images))


@lru_cache(maxsize=4)
def _reference(plan: Plan) -> tuple[Gaussian, Gaussian]:
    return _gaussians(Data(plan, 0).reference)


def distances(plan: Plan, images: np.ndarray) -> dict[str, Any]:
    """Spectral distance, Fréchet distance, and power per band in dB, of pictures against scenes of seen combinations.

    The pictures (B, n, n, 3) are of the seen prompts, whose categories are as frequent as those of the scenes.
    """
    ours, reference = _gaussians(images), _reference(plan)
    spectral = spectral_distance(ours[0], reference[0])
    return {
        "spectral": spectral.total,
        "frechet": frechet_distance(ours[1], reference[1]),
        "decibels": [band.decibels for band in spectral.bands],
    }


@lru_cache(maxsize=4)
def known(plan: Plan) -> dict[str, Any]:
    """What needs no network. Scores by category, from 0 to 1, and distances, of true pictures.

    true: each on its own prompt, which the detector should find right. chance: each on the next prompt of its category,
    which says how often a good picture of something else passes.
    """
    out: dict[str, Any] = {"true": {}, "chance": {}}
    for split in TESTED:
        asked, turns = prompts(plan, split), categories(split)
        pictures = np.stack([p.true for p in asked])[:, None]
        for name, moved in (("true", pictures), ("chance", np.roll(pictures, -len(turns), axis=0))):
            verdicts = score(asked, moved)
            out[name][split] = {c: float(np.mean([v["correct"] for v in verdicts if v["tag"] == c])) for c in turns}
    return out | {"distances": distances(plan, np.stack([p.true for p in prompts(plan, "seen")]))}


def sheet(plan: Plan, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """(n, n * number, 3) uint8: the first pictures of the first `plan.sheet` prompts of each category and split."""
    parts = [drawn[split][: plan.sheet * len(categories(split)), 0] for split in TESTED]
    return np.concatenate(list(np.concatenate(parts)), axis=1)


def execute(plan: Plan, run: Run, store: Store, stop: Stop = never) -> tuple[dict[str, Any], np.ndarray]:
    """Train and judge; returns what is recorded of a run, and its sheet of samples. Raises `Paused`."""
    config = plan.config(run)
    model, weights, progress = train(plan, run, config, store, stop)
    begun = time.monotonic()
    with bound(model, weights):
        errors = validation(plan, config, model, stop)
        drawn = {split: samples(plan, split, config, model, stop) for split in TESTED}
    losses = np.array(progress.losses)
    record = {
        **errors,
        "scores": {split: score(prompts(plan, split), drawn[split]) for split in TESTED},
        **distances(plan, drawn["seen"].reshape(-1, *drawn["seen"].shape[2:])),
        "known": known(plan),
        "curve": [float(part.mean()) for part in np.array_split(losses, min(_CURVE, len(losses)))],
        "seconds_per_step": progress.seconds / plan.steps,
        "seconds_judged": time.monotonic() - begun,
        "parameters": sum(w.size for w in weights.values()),
    }
    return record, sheet(plan, drawn)
