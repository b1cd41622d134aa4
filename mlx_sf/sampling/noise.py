"""Initial noise: from seeds, by mlx-sf's own stream or by PyTorch's; or from a file."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from ..common.fields import choice, require
from ..errors import MlxSfError, option
from .torch_random import GPU_THREADS, CpuGenerator, cuda_randn, randn

RngName = Literal["mlx", "torch-cpu", "torch-cuda"]


@dataclass(frozen=True)
class Rng:
    """Whose random numbers the noise of a seed is.

    Args:
        name: "mlx"; "torch-cpu" or "torch-cuda", the numbers of PyTorch's generators.
        batch: images in one draw of PyTorch's. 1: image i is `manual_seed(seed + i)`, then `randn(1, 3, H, W)`.
            Above 1: what the published script draws. Of `world` processes number r seeds its stream with seed + r
            and draws (batch, 3, H, W) again and again; image k is row k % batch of a draw of number
            k // batch % world, the last draw being full like all others.
        threads: of "torch-cuda", the GPU that is followed, one of `GPU_THREADS` or a number of threads; needed only
            where one draw has more numbers than the smallest of these GPUs starts threads.
        world: processes of the published script.
    """

    name: RngName = "mlx"
    batch: int = 1
    threads: str | int | None = None
    world: int = 1

    def __post_init__(self) -> None:
        choice("rng", self.name, RngName)
        require(self.batch >= 1, "rng_batch", self.batch, "at least 1")
        require(self.world >= 1, "rng_world", self.world, "at least 1")
        changed = {"rng_batch": self.batch != 1, "rng_world": self.world != 1, "rng_threads": self.threads is not None}
        given = next((name for name, is_given in changed.items() if is_given), None)
        if self.name == "mlx" and given:
            raise MlxSfError(f"{option(given)} is about PyTorch's noise: give {option('rng')} torch-cpu or torch-cuda")
        if self.name == "torch-cpu" and self.threads is not None:
            raise MlxSfError(f"{option('rng_threads')} is about a GPU: leave it out, or use {option('rng')} torch-cuda")
        if self.world > 1 and self.batch == 1:
            raise MlxSfError(f"{option('rng_world')} is {self.world}, want {option('rng_batch')} above 1 with it")
        if self.threads is not None:
            known = f"one of {', '.join(GPU_THREADS)}, or a multiple of 256"
            given_number = isinstance(self.threads, int) and self.threads >= 256 and self.threads % 256 == 0
            require(given_number or self.threads in GPU_THREADS, "rng_threads", self.threads, known)

    def check(self, size: tuple[int, int]) -> None:
        """Refuse a draw that is not the same on every GPU, where no GPU is named."""
        least = min(GPU_THREADS, key=lambda name: GPU_THREADS[name])
        numbers = self.batch * 3 * math.prod(size)
        if self.name == "torch-cuda" and self.threads is None and numbers > GPU_THREADS[least]:
            raise MlxSfError(
                f"{option('rng_threads')} is missing: a draw of {self.batch} x 3 x {size[0]} x {size[1]} depends on "
                f"the GPU, name the one to follow: {', '.join(GPU_THREADS)}, or its number of threads"
            )

    def describe(self) -> str:
        """The settings in words, for a PNG."""
        parts: list[str] = [self.name]
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.world > 1:
            parts.append(f"world {self.world}")
        if self.threads is not None:
            parts.append(f"threads {self.threads}")
        return ", ".join(parts)


MLX = Rng()


def as_rng(rng: str | Rng, batch: int = 1, threads: str | int | None = None, world: int = 1) -> Rng:
    """The generator of a name and its settings, or the one given; a number of threads may be text."""
    if isinstance(rng, Rng):
        if (batch, threads, world) != (1, None, 1):
            raise MlxSfError(f"{option('rng')} is an Rng with settings of its own: leave out the others")
        return rng
    if str(threads) in GPU_THREADS:  # "4090" is one of them
        threads = str(threads)
    elif isinstance(threads, str) and threads.isdecimal():
        threads = int(threads)
    return Rng(rng, batch, threads, world)  # type: ignore[arg-type]  # checked when it is made


class TorchNoise:
    """PyTorch's noise (3, H, W) of any image, in any order; goes on where it was when they come in order."""

    def __init__(self, rng: Rng, seeds: Sequence[int], size: tuple[int, int]) -> None:
        self.rng, self.seeds, self.shape = rng, seeds, (rng.batch, 3, *size)
        self._streams: dict[int, tuple[CpuGenerator, int]] = {}  # of a process: its generator, the next draw's number
        self._drawn: tuple[int, int, np.ndarray] | None = None

    def image(self, k: int) -> np.ndarray:
        """Noise of image k."""
        rng, seed = self.rng, self.seeds[k]
        if rng.batch == 1:
            device: Literal["cpu", "cuda"] = "cpu" if rng.name == "torch-cpu" else "cuda"
            return randn(self.shape, seed, device, self._threads)[0]
        draw, row = divmod(k, rng.batch)
        call, process = divmod(draw, rng.world)
        if rng.name == "torch-cpu":
            return self._cpu_draw(process, call)[row]
        return cuda_randn(self.shape, self.seeds[0] + process, self._threads, call, slice(row, row + 1))[0]

    @property
    def _threads(self) -> int:
        threads = self.rng.threads
        # without a name no draw has more numbers than any of the GPUs starts threads
        return threads if isinstance(threads, int) else GPU_THREADS[threads or "a100"]

    def _cpu_draw(self, process: int, call: int) -> np.ndarray:
        if self._drawn is not None and self._drawn[:2] == (process, call):
            return self._drawn[2]
        generator, at = self._streams.get(process, (None, 0))
        if generator is None or call < at:
            generator, at = CpuGenerator(self.seeds[0] + process), 0
        for _ in range(at, call):
            generator.skip(math.prod(self.shape))
        self._drawn = process, call, generator.randn(self.shape)
        self._streams[process] = generator, call + 1
        return self._drawn[2]


def seeded_noise(seeds: Sequence[int], size: tuple[int, int]) -> mx.array:
    """Standard normal noise (B, 3, H, W), image i from `seeds[i]` alone, the same bits on every device of a machine."""
    with mx.stream(mx.cpu):
        return mx.stack([mx.random.normal((3, *size), key=mx.random.key(seed)) for seed in seeds])


def load_noise(path: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """Initial noise from an .npy file: standard normal, (N, 3, H, W), before the noise scale."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = getattr(e, "strerror", None) or "not a plain .npy array"
        raise MlxSfError(f"{path}: cannot be read as noise ({reason}), want float32 (N, 3, H, W)") from None
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[1:] != (3, *size) or array.dtype.kind != "f":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise MlxSfError(f"{path}: is {got}, want float32 noise of shape (N, 3, {size[0]}, {size[1]})")
    if len(array) == 0 or not np.isfinite(array).all():
        raise MlxSfError(f"{path}: is empty or holds NaN or infinite values, want standard normal noise")
    return array
