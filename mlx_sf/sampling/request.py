"""A request for pictures: which class or prompt and which seed each of them has, and the solver's settings."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import MlxSfError, option
from ..models import Asked
from .noise import load_noise, seeded_noise
from .solvers import SampleConfig


@dataclass(frozen=True)
class Request:
    """What to draw: image i is of `asked[i]`, a class or a prompt, with noise from `seeds[i]` or `noise[i]`."""

    asked: tuple[Asked, ...]
    seeds: tuple[int, ...]
    noise: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.asked)

    def initial_noise(self, size: tuple[int, int], numbers: Sequence[int] | None = None) -> mx.array:
        """Standard normal noise (B, 3, H, W) of the images `numbers`; None is all."""
        chosen = range(len(self)) if numbers is None else numbers
        if self.noise is not None:
            return mx.array(np.asarray(self.noise[list(chosen)], dtype=np.float32))
        return seeded_noise([self.seeds[i] for i in chosen], size)


def find_classes(wanted: Sequence[Asked], num_classes: int, class_names: Sequence[str] = ()) -> list[Asked]:
    """Labels of classes that are given by number or by name, as text or not; "null", "none" and None are no class."""
    names = [n.lower() for n in class_names]
    labels: list[Asked] = []
    for part in wanted:
        text = str(part).strip()
        if text.lower() in names:
            labels.append(names.index(text.lower()))
        elif text.lower() in ("null", "none"):
            labels.append(None)
        elif text.isascii() and text.isdigit() and int(text) < num_classes:
            labels.append(int(text))
        else:
            known = f", or a name such as {class_names[0]}" if names else ""
            raise MlxSfError(
                f"{option('classes')}: {text!r} is no class of this model, want 0 to {num_classes - 1}{known}, or null"
            )
    return labels


def make_request(
    asked: Sequence[Asked] | None,
    every: Sequence[Asked],
    num_images: int | None,
    seed: int,
    size: tuple[int, int],
    noise: str | os.PathLike[str] | np.ndarray | None = None,
) -> Request:
    """One image for each of `asked`; with `num_images` they (default: `every`) are gone through in turn.

    Image i takes seed `seed + i`, unless initial noise (N, 3, H, W) is given as a file or an array.
    """
    array = noise if isinstance(noise, np.ndarray) or noise is None else load_noise(noise, size)
    wanted = every if asked is None else asked
    n = num_images
    if n is None:
        n = len(array) if array is not None else len(wanted) if asked is not None else min(8, len(wanted))
    if n < 1:
        raise MlxSfError(f"{option('num_images')} is {n}, want at least 1")
    if not 0 <= seed < 2**63 - n:
        raise MlxSfError(f"{option('seed')} is {seed}, want a number from 0 to 2^63")
    if array is not None and len(array) != n:
        raise MlxSfError(f"{option('noise')}: holds noise for {len(array)} images, but {n} are asked for")
    if asked is not None and len(asked) > n:
        raise MlxSfError(f"{option('classes')} names {len(asked)} images, but only {n} are asked for")
    return Request(tuple(wanted[i % len(wanted)] for i in range(n)), tuple(seed + i for i in range(n)), array)


# what a solver is asked by, in commands and in Python
SETTINGS = {f.name for f in dataclasses.fields(SampleConfig)} - {"t_eps", "cfg_low", "cfg_high"} | {
    "cfg_interval",
    "sample_t_eps",
}


def with_solver(sample: SampleConfig, changes: Mapping[str, Any]) -> SampleConfig:
    """A checkpoint's sampling settings with others put over them; None leaves a setting as it is.

    `changes` are fields of `SampleConfig`, but `cfg_interval` for both of its ends and `sample_t_eps` for `t_eps`.
    Raises `MlxSfError` for what is no setting, and where a value is out of range.
    """
    if unknown := sorted(set(changes) - SETTINGS):
        raise MlxSfError(f"no setting of sampling is called {unknown[0]!r}, want one of {', '.join(sorted(SETTINGS))}")
    given = {k: v for k, v in changes.items() if v is not None}
    if "sample_t_eps" in given:
        given["t_eps"] = given.pop("sample_t_eps")
    if "cfg_interval" in given:
        given["cfg_low"], given["cfg_high"] = given.pop("cfg_interval")
    return dataclasses.replace(sample, **given)
