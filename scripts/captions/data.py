"""The scenes and the prompts of an experiment. All derives from the plan and, for training, the run's seed."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlx_sf.data import captioned_scenes
from mlx_sf.data.captioned_scenes import (
    COUNTS,
    RELATIONS,
    SPLITS,
    Description,
    SceneObject,
    caption,
    categories,
    draw,
    held_out,
)
from mlx_sf.metrics.geneval import Metadata
from mlx_sf.metrics.scene_prompts import metadata

from .plan import Plan, Scenes

# seeds of endless streams that share no picture: training pools take 1000 + seed of the run
_HELD_OUT, _REFERENCE, _PROMPTS, _TRAINING = 1, 2, 3, 1000


# what a picture of the split "unseen" holds out, as in the library
_HELD_OUT_IN = {"counting": "count", "colors": "colour", "position": "relation", "color_attr": "colour"}


def describe(scenes: Scenes, index: int, seed: int, split: str) -> Description:
    """Description number `index` of a split: the library's own, or drawn by its rules from the chosen parts."""
    if scenes == Scenes(phrasings=scenes.phrasings, options=scenes.options):
        return captioned_scenes.describe(index, seed, split)
    turns = categories(split)
    category = turns[index % len(turns)]
    wanted = {_HELD_OUT_IN[category]} if split == "unseen" else set()
    number = 2 if category in ("two_object", "position", "color_attr") else 1
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    while True:
        shapes = rng.choice(len(scenes.shapes), number, replace=False)
        colours = rng.choice(len(scenes.colours), number, replace=False)
        count = int(rng.integers(2, len(COUNTS))) if category == "counting" else 1
        relation = RELATIONS[rng.integers(len(RELATIONS))] if number == 2 else ""
        background = scenes.backgrounds[rng.integers(len(scenes.backgrounds))]
        parts = [(scenes.shapes[s], scenes.colours[c], count) for s, c in zip(shapes, colours, strict=True)]
        description = Description(tuple(SceneObject(*p) for p in parts), relation, background, category)
        if held_out(description) == wanted:
            return description


def _phrasing(scenes: Scenes, index: int, split: str) -> int:
    """Phrasings take turns in each category."""
    return index // len(categories(split)) % scenes.phrasings


@lru_cache(maxsize=16)
def pictures(scenes: Scenes, size: int, split: str, seed: int, number: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """((number, size, size, 3) uint8 pictures, their captions); read-only, for they are shared."""
    wanted = [describe(scenes, i, seed, split) for i in range(number)]
    seeds = [
        (seed, SPLITS.index(split), i, 1) for i in range(number)
    ]  # the last number parts it from the description's
    images = np.stack([draw(d, size, s, scenes.options)[0] for d, s in zip(wanted, seeds, strict=True)])
    images.flags.writeable = False
    return images, tuple(caption(d, _phrasing(scenes, i, split)) for i, d in enumerate(wanted))


@dataclass(frozen=True)
class Prompt:
    """What is asked for: GenEval's line with its prompt, and a true picture of it (size, size, 3) uint8."""

    metadata: Metadata
    true: np.ndarray

    @property
    def tag(self) -> str:
        return str(self.metadata["tag"])

    @property
    def text(self) -> str:
        return str(self.metadata["prompt"])


@lru_cache(maxsize=4)
def prompts(plan: Plan, split: str) -> tuple[Prompt, ...]:
    """The prompts of "seen" or "unseen", the same for all runs; their categories take turns, and texts may repeat."""
    images, _ = pictures(plan.scenes, plan.img_size, split, _PROMPTS, plan.prompts * len(categories(split)))
    return tuple(
        Prompt(metadata(describe(plan.scenes, i, _PROMPTS, split), _phrasing(plan.scenes, i, split)), image)
        for i, image in enumerate(images)
    )


@dataclass(frozen=True)
class Data:
    """Pictures and captions for runs of one seed."""

    plan: Plan
    seed: int

    @property
    def training(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return pictures(self.plan.scenes, self.plan.img_size, "train", _TRAINING + self.seed, self.plan.pool)

    @property
    def held_out(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The same for all seeds."""
        return pictures(self.plan.scenes, self.plan.img_size, "seen", _HELD_OUT, self.plan.held_out)

    @property
    def reference(self) -> np.ndarray:
        """What samples are compared with; the same for all seeds."""
        return pictures(self.plan.scenes, self.plan.img_size, "seen", _REFERENCE, self.plan.reference)[0]

    def batch(self, step: int) -> tuple[np.ndarray, list[str]]:
        """Pictures and captions of step 1, 2, ...: every epoch in another order; depends on (seed, step) alone."""
        images, captions = self.training
        size = self.plan.batch_size
        epoch, i = divmod(step - 1, self.plan.pool // size)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.plan.pool)
        rows = order[i * size : (i + 1) * size]
        return images[rows], [captions[r] for r in rows]
