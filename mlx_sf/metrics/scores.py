"""Inception Score, KID and improved precision/recall, with the reference's splits and random draws, in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..common.progress import Progress
from ..errors import MlxSfError, option

SEED = 2020  # the reference's, for the shuffle of the Inception Score and the subsets of KID


@dataclass(frozen=True)
class MeanStd:
    """Mean and population standard deviation over splits or subsets."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray) -> "MeanStd":
        return cls(float(values.mean()), float(values.std()))


class InceptionScore:
    """Streaming Inception Score of a known number of pictures: memory does not grow with it.

    Row i of the logits goes to the split that the reference's shuffle puts it in; per split only the sums of
    p and of p log p are kept. Rows may come in any order, each with its index.

    Args:
        count: number of pictures, at least `splits`.
        splits, shuffle, seed: 10, True and 2020 in the reference.
    """

    def __init__(
        self, count: int, classes: int = 1008, splits: int = 10, shuffle: bool = True, seed: int = SEED
    ) -> None:
        if count < splits:
            raise MlxSfError(f"Inception Score: {count} pictures for {splits} splits, want at least one for each")
        order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
        starts = [s * count // splits for s in range(splits + 1)]
        self._split = np.empty(count, dtype=np.int64)
        for s in range(splits):
            self._split[order[starts[s] : starts[s + 1]]] = s
        self._rows = np.zeros(splits, dtype=np.int64)
        self._p = np.zeros((splits, classes))
        self._p_log_p = np.zeros(splits)
        self._sizes = np.diff(starts)

    def add(self, logits: np.ndarray, first: int) -> None:
        """Add logits (B, classes) of pictures `first`, `first` + 1, ..."""
        z = logits.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        split = self._split[first : first + len(p)]
        np.add.at(self._rows, split, 1)
        np.add.at(self._p, split, p)
        np.add.at(self._p_log_p, split, (p * log_p).sum(axis=1))

    def merge(self, other: "InceptionScore") -> None:
        for name, value in other.state().items():
            getattr(self, "_" + name)[:] += value

    def state(self) -> dict[str, np.ndarray]:
        return {"rows": self._rows.copy(), "p": self._p.copy(), "p_log_p": self._p_log_p.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for name, value in state.items():
            getattr(self, "_" + name)[:] = value

    def finish(self) -> MeanStd:
        """The score: exp of the mean KL divergence from the split's mean prediction, over the splits."""
        if not np.array_equal(self._rows, self._sizes):
            raise MlxSfError(f"Inception Score: saw {self._rows.sum()} of {self._sizes.sum()} pictures")
        q = self._p / self._rows[:, None]
        # classes that never occur in float64 contribute 0, not NaN
        entropy = (q * np.log(np.where(q > 0, q, 1.0))).sum(axis=1)
        return MeanStd.of(np.exp(self._p_log_p / self._rows - entropy))


def inception_score(logits: np.ndarray, splits: int = 10, shuffle: bool = True, seed: int = SEED) -> MeanStd:
    """Inception Score of logits (N, classes): the reference uses the 1008 logits without the bias."""
    score = InceptionScore(len(logits), logits.shape[1], splits, shuffle, seed)
    score.add(logits, 0)
    return score.finish()


# ---- kernel inception distance ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """The polynomial kernel (gamma x.y + coef0)^degree, gamma None meaning 1 / D, or exp(-|x - y|^2 / (2 sigma^2))."""

    kind: Literal["poly", "rbf"] = "poly"
    degree: int = 3
    gamma: float | None = None
    coef0: float = 1.0
    sigma: float = 10.0

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if self.kind == "rbf":
            return np.exp(-squared_distances(x, y) / (2 * self.sigma**2))
        gamma = 1.0 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * (x @ y.T) + self.coef0) ** self.degree


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    kernel: Kernel | None = None,
    seed: int = SEED,
    progress: bool = False,
) -> MeanStd:
    """KID of features x (N1, D), y (N2, D): the unbiased squared MMD over random subsets, by the reference's draws."""
    check_kid(len(x), len(y), subset_size)
    rng, kernel, m = np.random.RandomState(seed), kernel or Kernel(), subset_size
    values = np.empty(subsets)
    with _progress(subsets, "KID", "subsets", progress) as bar:
        for i in range(subsets):
            a = x[rng.choice(len(x), m, replace=False)].astype(np.float64)
            b = y[rng.choice(len(y), m, replace=False)].astype(np.float64)
            kaa, kbb, kab = kernel(a, a), kernel(b, b), kernel(a, b)
            within = kaa.sum() - np.trace(kaa) + kbb.sum() - np.trace(kbb)
            values[i] = within / (m * (m - 1)) - 2 * kab.sum() / m**2
            bar.update()
    return MeanStd.of(values)


def check_kid(n1: int, n2: int, subset_size: int) -> None:
    """Refuse, before any work, sets that are too small for the subsets."""
    if min(n1, n2) < subset_size or subset_size < 2:
        raise MlxSfError(
            f"KID: subsets of {subset_size} from sets of {n1} and {n2} pictures: "
            f"use {option('kid_subset_size')} from 2 to {min(n1, n2)}, or more pictures"
        )


# ---- improved precision and recall -----------------------------------------------------------------------------


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N1, N2) in float64; equal rows are at exactly 0."""
    xx, yy = (x * x).sum(axis=1)[:, None], (y * y).sum(axis=1)[None, :]
    total = xx + yy
    d = total - 2 * (x @ y.T)
    d[d < 1e-13 * total] = 0  # what is left of the cancellation for equal rows
    return d


def _progress(total: int, what: str, unit: str, shown: bool) -> Progress:
    return Progress(total, what, unit, after=2.0 if shown else float("inf"))


def _blocks(n: int, size: int) -> Iterator[slice]:
    yield from (slice(i, min(i + size, n)) for i in range(0, n, size))


def neighbour_radii(x: np.ndarray, k: int, block: int = 2048, bar: Progress | None = None) -> np.ndarray:
    """Squared distance (N,) from each row of x (N, D) to its k-th neighbour among the others, block by block."""
    out = np.empty(len(x))
    for rows in _blocks(len(x), block):
        a = x[rows].astype(np.float64)
        nearest = np.full((len(a), k + 1), np.inf)
        for columns in _blocks(len(x), block):
            d = squared_distances(a, x[columns].astype(np.float64))
            nearest = np.partition(np.concatenate([nearest, d], axis=1), k, axis=1)[:, : k + 1]
            if bar is not None:
                bar.update()
        out[rows] = nearest.max(axis=1)  # the row itself is the nearest, so the (k + 1)-th
    return out


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: share of the samples inside the data's manifold. Recall: share of the data inside the samples'."""

    precision: float
    recall: float

    @property
    def f_score(self) -> float:
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


def precision_recall(
    samples: np.ndarray, data: np.ndarray, k: int = 3, block: int = 2048, progress: bool = False
) -> PrecisionRecall:
    """Improved precision and recall of features (N1, D), (N2, D), in the literature's sense of the two names.

    The torch-fidelity fork behind the JiT numbers takes its first input as the data: with samples first, as they are
    usually passed, its two names are the other way round.

    Memory: the two feature sets plus a few blocks of `block`^2 float64 distances.
    """
    check_precision_recall(len(samples), len(data), k)
    b1, b2 = -(-len(samples) // block), -(-len(data) // block)
    total = b1 * b1 + b2 * b2 + b1 * b2
    with _progress(total, "precision/recall", "blocks", progress) as bar:
        samples_radii = neighbour_radii(samples, k, block, bar)
        data_radii = neighbour_radii(data, k, block, bar)
        sample_inside, data_inside = np.zeros(len(samples), bool), np.zeros(len(data), bool)
        for rows in _blocks(len(samples), block):
            a = samples[rows].astype(np.float64)
            for columns in _blocks(len(data), block):
                d = squared_distances(a, data[columns].astype(np.float64))
                sample_inside[rows] |= (d <= data_radii[columns][None, :]).any(axis=1)
                data_inside[columns] |= (d <= samples_radii[rows][:, None]).any(axis=0)
                bar.update()
    return PrecisionRecall(float(sample_inside.mean()), float(data_inside.mean()))


def check_precision_recall(n1: int, n2: int, k: int) -> None:
    """Refuse, before any work, sets that are too small for a k-th neighbour."""
    if k < 1 or min(n1, n2) <= k:
        raise MlxSfError(f"precision/recall: neighbour {k} in sets of {n1} and {n2} pictures: want more pictures")
