"""Batches from a source: flips, parallel decoding, prefetch.

A picture whose mirror image would have another label (a caption that says left or right) is never flipped.

Everything random derives from (seed, epoch), so a run resumed at any step sees the very batches that it would have
seen. Decoding runs in threads: Pillow releases the interpreter's lock while it decodes and resizes.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import MlxSfError
from .decode import BadPictureError
from .numbered import Picture, epoch_flips
from .sources import Source

_PREFETCH = 3  # batches in flight


@dataclass(frozen=True)
class Batch:
    """`images` (b, H, W, 3) uint8 and their b `labels`: this process's part of the global batch of `step`."""

    step: int
    epoch: int
    images: np.ndarray
    labels: tuple[int | str, ...]


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Full batches in an epoch: the last partial one is dropped; fewer pictures than a batch make one full batch."""
    return max(1, length // batch_size)


class Loader:
    """Endless batches of a source, from any step on.

    `wait_seconds` adds up the time `batches` kept its caller waiting. With `world` processes this one (`rank`) gets
    positions rank * b ... of each global batch, b = batch_size / world. `workers` 0 is one per core, at most 8.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int = 0,
        flip: bool = True,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise MlxSfError(f"batch size is {batch_size}, want at least 1 and a multiple of the {world} process(es)")
        self.source, self.batch_size, self.seed, self.flip = source, batch_size, seed, flip
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size)
        self.wait_seconds = 0.0
        b = batch_size // world
        self.local = slice(rank * b, (rank + 1) * b)  # this process's positions within a global batch

    @property
    def bad(self) -> dict[str, str]:
        """Name of every picture that could not be read, and the reason; another took its place."""
        return self.source.bad

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of global steps start_step, start_step + 1, ... (counted over all epochs from 0)."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        queue: deque[tuple[int, list[Future[Picture]]]] = deque()
        plan = self._plan(start_step)
        try:
            while True:
                while len(queue) < _PREFETCH:
                    step, tasks = next(plan)
                    queue.append((step, [pool.submit(task) for task in tasks]))
                step, futures = queue.popleft()
                started = time.perf_counter()
                pictures = [f.result() for f in futures]
                self.wait_seconds += time.perf_counter() - started
                images = np.stack([image for image, _ in pictures])
                yield Batch(step, step // self.steps_per_epoch, images, tuple(label for _, label in pictures))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, start: int) -> Iterator[tuple[int, list[Callable[[], Picture]]]]:
        """Each step from `start` on, with a function for every picture of this process."""
        size, positions = self.batch_size, self.steps_per_epoch * self.batch_size
        for epoch in itertools.count(start // self.steps_per_epoch):
            first = max(0, start - epoch * self.steps_per_epoch)
            pictures = itertools.islice(self.source.epoch(self.seed, epoch), first * size, None)
            flips = epoch_flips(len(self.source), positions, self.seed, epoch) & self.flip
            for within in range(first, self.steps_per_epoch):
                batch, flipped = list(itertools.islice(pictures, size)), flips[within * size : (within + 1) * size]
                mine = range(size)[self.local]
                tasks: list[Callable[[], Picture]] = [partial(self._load, batch, i, bool(flipped[i])) for i in mine]
                yield epoch * self.steps_per_epoch + within, tasks

    def _load(self, batch: list[Callable[[], Picture]], position: int, flip: bool) -> Picture:
        """Picture `position` of a batch, in place of one that cannot be read the batch's next."""
        for load in batch[position:] + batch[:position]:
            try:
                image, label = load()
                return (image[:, ::-1] if flip and self.source.mirrors(label) else image), label
            except BadPictureError:
                continue  # the source has noted it in `bad`
        name, reason = next(iter(self.bad.items()))
        raise MlxSfError(
            f"{self.source.describe()}: none of {len(batch)} pictures in a batch could be read ({name}: {reason})"
        )
