"""Batches from a source: order, flips, parallel decoding, prefetch, and the count of what could not be read.

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
from functools import lru_cache

import numpy as np

from .data import Source
from .errors import MlxSfError
from .hub_data import StreamSource
from .pictures import BadPictureError

_PREFETCH = 3  # batches in flight
_TRIES = 100  # neighbours tried in place of a bad picture before the data set is given up


@dataclass(frozen=True)
class Batch:
    """`images` (b, S, S, 3) uint8 and `labels` (b,) int32: this process's part of the global batch of `step`."""

    step: int
    epoch: int
    images: np.ndarray
    labels: np.ndarray


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Full batches in an epoch: the last partial one is dropped; fewer pictures than a batch make one full batch."""
    return max(1, length // batch_size)


@lru_cache(maxsize=2)
def epoch_order(length: int, batch_size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and flips (bool), one per position of the epoch, steps_per_epoch * batch_size of them.

    A data set smaller than a batch is gone through as often as it takes to fill one.
    """
    positions = steps_per_epoch(length, batch_size) * batch_size
    rng = np.random.default_rng((seed, epoch))
    rounds = -(-positions // length)
    order = np.concatenate([rng.permutation(length) for _ in range(rounds)])[:positions]
    return order, rng.random(positions) < 0.5


class Loader:
    """Endless batches of a source, from any step on.

    `wait_seconds` adds up the time `batches` kept its caller waiting; `bad` maps the index of every picture that
    could not be read to the reason (its place is taken by the next readable one).
    With `world` processes this one (`rank`) gets positions rank * b ... of each global batch, b = batch_size / world.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int = 0,
        flip: bool = True,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise MlxSfError(f"batch size is {batch_size}, want at least 1 and a multiple of the {world} process(es)")
        self.source, self.batch_size, self.seed, self.flip = source, batch_size, seed, flip
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.rank, self.world = rank, world
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size)
        self.wait_seconds = 0.0
        self.bad: dict[int, str] = {}

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of global steps start_step, start_step + 1, ... (counted over all epochs from 0)."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        queue: deque[tuple[int, list[Future[tuple[np.ndarray, int]]]]] = deque()
        plan = self._plan_stream(start_step) if isinstance(self.source, StreamSource) else self._plan(start_step)
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
                yield Batch(step, step // self.steps_per_epoch, images, np.array([y for _, y in pictures], np.int32))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def local(self) -> slice:
        """This process's positions within a global batch."""
        b = self.batch_size // self.world
        return slice(self.rank * b, (self.rank + 1) * b)

    def _plan(self, start: int) -> Iterator[tuple[int, list[Callable[[], tuple[np.ndarray, int]]]]]:
        n = len(self.source)
        for step in itertools.count(start):
            epoch, within = divmod(step, self.steps_per_epoch)
            order, flips = epoch_order(n, self.batch_size, self.seed, epoch)
            batch = slice(within * self.batch_size, (within + 1) * self.batch_size)
            offset = epoch * n if self.source.endless else 0
            pairs = zip(order[batch][self.local] + offset, flips[batch][self.local], strict=True)
            yield step, [lambda i=int(i), f=bool(f): self._load(i, f) for i, f in pairs]  # type: ignore[misc]

    def _load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        n = len(self.source)
        for attempt in range(min(n, _TRIES)):
            i = index if not attempt else (index + attempt) % n
            if i in self.bad:
                continue
            try:
                image, label = self.source.load(i)
                return (image[:, ::-1] if flip and self.flip else image), label
            except BadPictureError as e:
                self.bad[i] = str(e)
        first = next(iter(self.bad))
        raise MlxSfError(
            f"{self.source.name(first)}: {self.bad[first]}; nor can any of the {len(self.bad) - 1} pictures "
            "tried after it be read: check the data set"
        )

    def _plan_stream(self, start: int) -> Iterator[tuple[int, list[Callable[[], tuple[np.ndarray, int]]]]]:
        source = self.source
        assert isinstance(source, StreamSource)
        for epoch in itertools.count(start // self.steps_per_epoch):
            first = max(0, start - epoch * self.steps_per_epoch)
            rows = itertools.islice(source.rows(self.seed, epoch), first * self.batch_size, None)
            _, flips = epoch_order(len(source), self.batch_size, self.seed, epoch)
            for within in range(first, self.steps_per_epoch):
                batch = list(itertools.islice(rows, self.batch_size))
                turned = flips[within * self.batch_size :]
                local = range(*self.local.indices(self.batch_size))
                yield (
                    epoch * self.steps_per_epoch + within,
                    [lambda b=batch, j=j, f=bool(turned[j]): self._load_row(b, j, f) for j in local],  # type: ignore[misc]
                )

    def _load_row(self, rows: list[object], position: int, flip: bool) -> tuple[np.ndarray, int]:
        """Row `position` of a batch; a bad one is replaced by the batch's next."""
        assert isinstance(self.source, StreamSource)
        for j in range(len(rows)):
            try:
                image, label = self.source.decode_row(rows[(position + j) % len(rows)])
                return (image[:, ::-1] if flip and self.flip else image), label
            except BadPictureError as e:
                self.bad[len(self.bad)] = str(e)
        raise MlxSfError(f"{self.source.name(0)}: none of {len(rows)} rows in a batch could be read ({self.bad[0]})")
