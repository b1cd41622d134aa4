"""Sources whose pictures have numbers: the order of an epoch, and what takes the place of an unreadable picture."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from ..errors import MlxSfError
from .decode import BadPictureError

Picture = tuple[np.ndarray, int | str]  # (H, W, 3) uint8, and a class label or a caption
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_TRIES = 100  # neighbours tried in place of a bad picture before the data set is given up


def square_or(size: tuple[int, int]) -> int | tuple[int, int]:
    """One number for squares: how versions that knew only squares spelt sizes."""
    return size[0] if size[0] == size[1] else size


def epoch_order(length: int, seed: int, epoch: int) -> Iterator[int]:
    """Numbers from 0 to length - 1 in the random order of an epoch; after the last one another round begins."""
    rng = np.random.default_rng((seed, epoch))
    while True:
        yield from rng.permutation(length).tolist()


def epoch_flips(length: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """Which of the epoch's first `count` pictures are mirrored, (count,) bool.

    Drawn from the generator of `epoch_order`, after the rounds that `count` pictures take.
    """
    rng = np.random.default_rng((seed, epoch))
    for _ in range(-(-count // length)):
        rng.permutation(length)
    return rng.random(count) < 0.5


def mirrors(label: int | str) -> bool:
    """Whether a picture's mirror image has the same label: not where a caption says left or right."""
    return not (isinstance(label, str) and _SIDES.search(label))


class NumberedSource(ABC):
    """A source with random access: `load(index)` in any order, from several threads at once.

    `bad` maps the name of each picture that could not be read to the reason; the next readable one takes its place.
    """

    class_names: tuple[str, ...]
    size: tuple[int, int]
    endless = False
    cacheable = True

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}
        self._bad_numbers: set[int] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Picture:
        """Picture (H, W, 3) uint8 and label. Raises `BadPictureError`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""

    @abstractmethod
    def describe(self) -> str: ...

    def epoch(self, seed: int, epoch: int) -> Iterator[Callable[[], Picture]]:
        """The pictures of an epoch in its order, not yet loaded; endless ones are new in every epoch."""
        offset = epoch * len(self) if self.endless else 0
        for index in epoch_order(len(self), seed, epoch):
            yield partial(self._load_or_next, index + offset)

    def fingerprint(self) -> str:
        """Identity as far as a resumed run can check it: names, labels and number, not pixels."""
        h = hashlib.sha256(repr((self.class_names, square_or(self.size), len(self))).encode())
        h.update(self.listing().encode(errors="surrogatepass"))  # a file's name may be no text
        return h.hexdigest()[:16]

    def listing(self) -> str:
        """What else tells this source's pictures from another's, in the fingerprint."""
        return ""

    def mirrors(self, label: int | str) -> bool:
        """Whether the mirror image of a picture with this label has the same label."""
        return mirrors(label)

    def captions(self) -> Sequence[str]:
        """The distinct captions of a finite captioned source, in an order that stays; () of any other source."""
        return ()

    def caption_notes(self) -> list[str]:
        """Lines for the user: how many captions were left out or are empty, with the first names."""
        return []

    def short_side(self, index: int) -> int | None:
        """The stored picture's own shorter side in pixels; None where it is drawn at any size, or cannot be read."""
        return None

    def short_sides(self, seed: int, count: int) -> Iterator[int]:
        """The stored pictures' own shorter sides in pixels, of at most `count` pictures in random order."""
        order = np.random.default_rng(seed).permutation(len(self))[:count]
        return (side for i in order if (side := self.short_side(int(i))) is not None)

    def _load_or_next(self, index: int) -> Picture:
        n = len(self)
        for attempt in range(min(n, _TRIES)):
            i = index if not attempt else (index + attempt) % n
            if i in self._bad_numbers:
                continue
            try:
                return self.load(i)
            except BadPictureError as e:
                self._bad_numbers.add(i)
                self.bad[self.name(i)] = str(e)
        first = next(iter(self.bad))
        raise MlxSfError(
            f"{first}: {self.bad[first]}; nor can any of the {len(self.bad) - 1} pictures "
            "tried after it be read: check the data set"
        )
