"""A request for pictures: which class or prompt and which seed each of them has, and the solver's settings."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import MlxSfError, option
from ..models import Asked
from .noise import MLX, Rng, TorchNoise, load_noise, seeded_noise
from .solvers import SampleConfig


@dataclass(frozen=True)
class Request:
    """What to draw: image i is of `asked[i]`, a class or a prompt, with noise from `seeds[i]` or `noise[i]`.

    `rng` says whose numbers a seed stands for. `columns` of a sheet of all pictures; None is about a square.
    """

    asked: tuple[Asked, ...]
    seeds: tuple[int, ...]
    noise: np.ndarray | None = None
    rng: Rng = MLX
    columns: int | None = None
    _torch: dict[tuple[int, int], TorchNoise] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.asked)

    def initial_noise(self, size: tuple[int, int], numbers: Sequence[int] | None = None) -> mx.array:
        """Standard normal noise (B, 3, H, W) of the images `numbers`; None is all."""
        chosen = range(len(self)) if numbers is None else numbers
        if self.noise is not None:
            return mx.array(np.asarray(self.noise[list(chosen)], dtype=np.float32))
        if self.rng.name == "mlx":
            return seeded_noise([self.seeds[i] for i in chosen], size)
        torch = self._torch.setdefault(size, TorchNoise(self.rng, self.seeds, size))
        return mx.array(np.stack([torch.image(i) for i in chosen]))

    def noise_facts(self, i: int) -> dict[str, Any]:
        """Where the noise of image i is from, for its PNG."""
        if self.noise is not None:
            return {"noise": f"image {i} of a file"}
        if self.rng.name == "mlx":
            return {"seed": self.seeds[i]}
        if self.rng.batch == 1:
            return {"seed": self.seeds[i], "rng": self.rng.describe()}
        return {"seed": self.seeds[0], "rng": f"{self.rng.describe()}, image {i} of the stream"}


def prompt_request(
    prompts: Sequence[str],
    num_images: int | None,
    seed: int,
    size: tuple[int, int],
    noise: str | os.PathLike[str] | np.ndarray | None = None,
    rng: Rng = MLX,
    verbatim: bool = False,
) -> Request:
    """`num_images` images (default 1) of each prompt, one prompt after another; seeds and noise as in `make_request`.

    White space at a prompt's end is left out unless it is taken `verbatim`: readers of T5's tokenizer differ on it.
    """
    n = 1 if num_images is None else num_images
    if n < 1:
        raise MlxSfError(f"{option('num_images')} is {n}, want at least 1")
    if not prompts:
        raise MlxSfError(f"{option('prompt')} is missing: this model draws what a text says")
    wanted = [p if verbatim else p.rstrip() for p in prompts for _ in range(n)]
    request = make_request(wanted, wanted, len(wanted), seed, size, noise, rng)
    return dataclasses.replace(request, columns=n if n > 1 and len(prompts) > 1 else None)


def make_request(
    asked: Sequence[Asked] | None,
    every: Sequence[Asked],
    num_images: int | None,
    seed: int,
    size: tuple[int, int],
    noise: str | os.PathLike[str] | np.ndarray | None = None,
    rng: Rng = MLX,
) -> Request:
    """One image for each of `asked`; with `num_images` they (default: `every`) are gone through in turn.

    Image i takes seed `seed + i` (of PyTorch's streams, as `rng` says), unless initial noise (N, 3, H, W) is given as
    a file or an array.
    """
    if noise is not None and rng != MLX:
        raise MlxSfError(f"{option('noise')} holds the noise: leave out {option('rng')}")
    rng.check(size)
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
    return Request(tuple(wanted[i % len(wanted)] for i in range(n)), tuple(seed + i for i in range(n)), array, rng)


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
