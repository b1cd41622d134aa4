"""Streaming pictures through the network into statistics: resumable, in shards, in bounded memory."""

import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import replacing, writable_folder
from ..common.progress import Progress
from ..common.world import World
from ..errors import MlxSfError
from .bands import BandPowers
from .inception import TAPS, Inception
from .moments import Moments
from .scores import InceptionScore
from .statistics_file import Measured

SAVE_EVERY = 60.0  # seconds: at most this much is lost when a run is killed
# picture numbers -> batches in that order: how many numbers it stands for, and the pictures (B, H, W, 3) uint8;
# a source that skips damaged pictures gives fewer of them than numbers
Fetch = Callable[[range], Iterator[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class What:
    """What to measure on `count` pictures of `size` (height, width).

    splits: of the Inception Score, 0 for none. keep_rows: keep all features, for KID and precision/recall.
    """

    count: int
    size: tuple[int, int]
    tap: str = "2048"
    splits: int = 0
    keep_rows: bool = False


class Measure:
    """The running statistics of one shard: `shard` are the numbers of its pictures among all `what.count`.

    State is about 50 MB (the covariance and a buffer), plus the features where they are kept: those lie in a
    memory-mapped file in `folder`.
    """

    def __init__(self, what: What, shard: range, folder: Path | None = None, name: str = "") -> None:
        self.what, self.shard, self.folder, self.name = what, shard, folder, name
        self.moments = Moments(TAPS[what.tap])
        self.powers = BandPowers(*what.size)
        self.spectrum = Moments(len(self.powers.edges) - 1)
        self.score = InceptionScore(what.count, splits=what.splits) if what.splits else None
        self.position = 0  # picture numbers worked off
        self.done = 0  # pictures taken in: fewer, where some were skipped
        self.rows: np.ndarray | None = None
        if folder is not None:
            writable_folder(folder)
        if what.keep_rows:
            self.rows = self._open_rows()
        if folder is not None and self._state_file.exists():
            self._restore()

    @property
    def _state_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"state-{self.name}.npz"

    def _open_rows(self) -> np.ndarray:
        shape = (len(self.shard), TAPS[self.what.tap])
        if self.folder is None:
            return np.empty(shape, np.float32)
        path = self.folder / f"features-{self.name}.npy"
        if path.exists() and self._state_file.exists():
            rows = np.load(path, mmap_mode="r+")
            if rows.shape == shape and rows.dtype == np.float32:
                return rows
        self._state_file.unlink(missing_ok=True)  # without its features the state is of no use
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def add(self, network: Inception, numbers: int, images: np.ndarray) -> None:
        """Add `images`, which stand for the shard's next `numbers` pictures: fewer, where some could not be read."""
        self.position += numbers
        if not len(images):
            return
        taps = [self.what.tap, *(["logits_unbiased"] if self.score is not None else [])]
        features = network.features(images, taps)
        rows = features[self.what.tap]
        self.moments.add(rows)
        self.spectrum.add(self.powers(images))
        if self.score is not None:
            self.score.add(features["logits_unbiased"], self.shard.start + self.position - numbers)
        if self.rows is not None:
            self.rows[self.done : self.done + len(rows)] = rows
        self.done += len(images)

    def arrays(self) -> dict[str, Any]:
        """Everything but the kept features, as arrays."""
        parts = {"moments": self.moments.state(), "spectrum": self.spectrum.state()}
        if self.score is not None:
            parts["score"] = self.score.state()
        counts = np.array([self.position, self.done])
        return {"counts": counts, **{f"{p}.{k}": v for p, s in parts.items() for k, v in s.items()}}

    def save(self) -> None:
        """Write the state, atomically."""
        if self.folder is None:
            return
        if isinstance(self.rows, np.memmap):
            self.rows.flush()
        with replacing(self._state_file) as temporary, open(temporary, "wb") as f:
            np.savez(f, **self.arrays())

    def _restore(self) -> None:
        try:
            with np.load(self._state_file, allow_pickle=False) as z:
                self.load(dict(z))
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise MlxSfError(f"{self._state_file}: damaged ({e}): delete it to start this measurement again") from None

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from `arrays`."""
        part = {p: {k.split(".")[1]: v for k, v in arrays.items() if k.startswith(p + ".")} for p in _PARTS}
        self.position, self.done = (int(n) for n in arrays["counts"])
        self.moments, self.spectrum = Moments.from_state(part["moments"]), Moments.from_state(part["spectrum"])
        if self.score is not None:
            self.score.restore(part["score"])

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add another shard's `arrays`."""
        other = Measure(replace(self.what, keep_rows=False), range(0))
        other.load(arrays)
        self.done += other.done
        self.moments.merge(other.moments)
        self.spectrum.merge(other.spectrum)
        if self.score is not None and other.score is not None:
            self.score.merge(other.score)

    def forget(self) -> None:
        """Remove the files of a measurement that is finished."""
        if self.folder is not None:
            self._state_file.unlink(missing_ok=True)
            (self.folder / f"features-{self.name}.npy").unlink(missing_ok=True)


_PARTS = ("moments", "spectrum", "score")


def shard_of(count: int, rank: int, size: int) -> range:
    """The picture numbers of one of `size` processes: neighbouring ones, as even as can be."""
    return range(rank * count // size, (rank + 1) * count // size)


def measure(
    network: Inception,
    what: What,
    fetch: Fetch,
    label: str,
    world: World,
    folder: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Measured | None:
    """Measure a set of pictures, shared out over the processes of `world`; the result on rank 0, None elsewhere.

    With `folder`, progress is kept there: the same call continues where an earlier one ended, however it ended.
    """
    rank, size = world.rank, world.size
    shard = shard_of(what.count, rank, size)
    _check_same_group(folder, size)
    m = Measure(what, shard, folder, f"{rank}of{size}")
    saved = time.monotonic()
    with Progress(len(shard), label, "images") as bar:
        bar.update(m.position)
        try:
            for numbers, images in fetch(shard[m.position :]):
                m.add(network, numbers, images)
                bar.update(numbers)
                if time.monotonic() - saved > SAVE_EVERY:
                    m.save()
                    saved = time.monotonic()
        except BaseException:  # an interruption too
            m.save()
            raise
    if size > 1:
        m.save()  # the other ranks may take long, or fail
    merged = _gather(m, world)
    if merged is None:
        return None
    return Measured(
        merged.moments.finish(),
        merged.spectrum.finish(),
        merged.rows,
        merged.score.finish() if merged.score is not None else None,
        dict(provenance or {}),
        label,
    )


def _check_same_group(folder: Path | None, size: int) -> None:
    """Shards of an interrupted measurement belong to its number of processes."""
    begun = sorted(folder.glob("state-*.npz")) if folder is not None else []
    other = next((p for p in begun if not p.stem.endswith(f"of{size}")), None)
    if other is not None:
        raise MlxSfError(
            f"{folder}: was begun by {other.stem.split('of')[-1]} processes, this run has {size}: "
            "start as many again, or delete the folder to begin anew"
        )


def _gather(m: Measure, world: World) -> Measure | None:
    """All shards in one `Measure` on rank 0."""
    if world.size == 1:
        if m.rows is not None:
            m.rows = m.rows[: m.done]
        return m
    buffer = io.BytesIO()
    np.savez(buffer, **m.arrays())
    packed = world.gather(buffer.getvalue())
    rows = _gather_rows(m, world) if m.what.keep_rows else None
    if not world.main:
        return None
    whole = Measure(replace(m.what, keep_rows=False), range(0))
    for data in packed:
        with np.load(io.BytesIO(data)) as z:
            whole.merge(dict(z))
    whole.rows = rows
    return whole


def _gather_rows(m: Measure, world: World) -> np.ndarray | None:
    """Kept features of all shards in order, on rank 0; passed on in pieces."""
    assert m.rows is not None
    step, longest = 1024, max(len(shard_of(m.what.count, r, world.size)) for r in range(world.size))
    pieces: list[list[np.ndarray]] = [[] for _ in range(world.size)]
    for i in range(0, longest, step):
        piece = np.ascontiguousarray(m.rows[: m.done][i : i + step])
        for r, data in enumerate(world.gather(piece.tobytes())):
            if world.main:
                pieces[r].append(np.frombuffer(data, np.float32).reshape(-1, m.rows.shape[1]))
    return np.concatenate([p for of_rank in pieces for p in of_rank]) if world.main else None
