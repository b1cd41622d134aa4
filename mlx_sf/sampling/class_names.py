"""Classes by name: a number, a WordNet id, a whole label or one of its synonyms; never a guess.

A label is "tench, Tinca tinca": synonyms, the most common one first. A model of 1,000 classes whose checkpoint names
none has ImageNet's, in the order of sorted WordNet ids, as all published ones do.
"""

import difflib
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MlxSfError, option
from ..models import Asked

_TABLE = Path(__file__).with_name("imagenet1k.tsv")
_NONE = ("null", "none")
_SHOWN = 6
_IMAGENET_CLASSES = 1000


@functools.cache
def imagenet() -> tuple[tuple[str, str], ...]:
    """(WordNet id, label) of ImageNet's 1,000 classes in index order."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    return tuple((wnid, label) for wnid, _, label in (line.partition("\t") for line in lines))


@functools.cache
def _columns() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The table's WordNet ids, and its labels."""
    wnids, labels = zip(*imagenet(), strict=True)
    return wnids, labels


@dataclass(frozen=True)
class ClassNames:
    """The names of a model's classes.

    `labels` may be empty; `wnids` are there for ImageNet's own table only. `assumed`: nobody named them, they are
    ImageNet's because there are 1,000.
    """

    count: int
    labels: tuple[str, ...] = ()
    wnids: tuple[str, ...] = ()
    assumed: bool = False

    @classmethod
    def of(cls, num_classes: int, class_names: Sequence[str] = ()) -> "ClassNames":
        """The names that a checkpoint holds; ImageNet's where it holds none and has 1,000 classes."""
        labels = tuple(class_names)
        if num_classes != _IMAGENET_CLASSES:
            return cls(num_classes, labels)
        wnids, table = _columns()
        if not labels:
            return cls(num_classes, table, wnids, True)
        return cls(num_classes, labels, wnids if labels == table else ())

    def short(self, number: int) -> str:
        """The first synonym of a class; "" where it has no name."""
        return _synonyms(self.labels[number])[0] if self.labels else ""

    def find(self, part: Asked) -> Asked:
        """The number of a class that is named or numbered, None for no class; `MlxSfError` with the choices otherwise.

        In this order: a number, unless a class is called so; "null"; a WordNet id; then, without regard to case,
        accents, hyphens and apostrophes, a whole label; the first synonym of one class; a synonym of one class. Where
        words are those of several classes, one that is spelt with exactly this case is taken.
        """
        if part is None:
            return None
        text = str(part).strip()
        if text.isdigit() or text.lower() in _NONE:
            called = [i for i, label in enumerate(self.labels) if label.lower() == text.lower()]
            if len(called) == 1:
                return called[0]
        if text.isascii() and text.isdigit() and int(text) < self.count:
            return int(text)
        if text.lower() in _NONE:
            return None
        if text.lower() in self.wnids:
            return self.wnids.index(text.lower())
        return self._by_words(text)

    def _by_words(self, text: str) -> int:
        index = _index(self.labels)
        word = _plain(text)
        choices: list[int] = []
        for where in index if word else ():
            found = where.get(word, [])
            if len(found) == 1:
                return found[0]
            # "Cardigan" is the dog, "cardigan" the jacket
            same = [i for i in found if text in _synonyms(self.labels[i])]
            if len(same) == 1:
                return same[0]
            choices = choices or found
        if choices:
            raise MlxSfError(f"{option('classes')}: {text!r} is several classes, want {self._told(choices, ' or ')}")
        near = self._near(text)
        hint = f": did you mean {self._told(near, ', ')}?" if near else ""
        known = f", or a name such as {self.short(0)}" if self.labels else ""
        raise MlxSfError(
            f"{option('classes')}: {text!r} is no class of this model, want 0 to {self.count - 1}{known}, or null{hint}"
        )

    def _told(self, numbers: Sequence[int], between: str) -> str:
        def one(i: int) -> str:
            return f"{i} ({self.wnids[i] + ' ' if self.wnids else ''}{self.labels[i]})"

        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        return between.join(one(i) for i in numbers[:_SHOWN]) + more

    def _near(self, text: str) -> list[int]:
        """Classes whose words contain the text, else those that are spelt like it."""
        if not self.labels or len(text) < 3:
            return []
        if found := [number for number, _, _ in self.search(text)]:
            return found
        every = {w: i for i in reversed(range(len(self.labels))) for w in map(_plain, _synonyms(self.labels[i]))}
        return list(dict.fromkeys(every[w] for w in difflib.get_close_matches(_plain(text), every, 3, 0.75)))

    def split(self, text: str) -> list[str]:
        """The parts of a list of classes: at ";" or line ends if there are any; one whole label; else at commas."""
        if re.search(r"[;\n]", text):
            return [p.strip() for p in re.split(r"[;\n]+", text) if p.strip()]
        if "," in text and _plain(text) in _index(self.labels)[0]:
            return [text]
        return text.split(",")

    def search(self, text: str) -> list[tuple[int, str, str]]:
        """(number, WordNet id or "", label) of the classes whose id or label contains a text; all for ""."""
        word = _plain(text)
        rows = [
            (i, self.wnids[i] if self.wnids else "", self.labels[i] if self.labels else "") for i in range(self.count)
        ]
        if not text.strip():
            return rows
        return [r for r in rows if (word and word in _plain(r[2])) or text.strip() in (str(r[0]), r[1])]


def _synonyms(label: str) -> list[str]:
    return [part.strip() for part in label.split(",")]


def _plain(text: str) -> str:
    """Words without case, accents, apostrophes; hyphens and underscores are blanks."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\s_\-,]+", " ", re.sub(r"['’`]", "", bare)).casefold().split())


@functools.lru_cache(maxsize=8)
def _index(labels: tuple[str, ...]) -> tuple[dict[str, list[int]], ...]:
    """Classes by whole label of several synonyms, by first synonym, by any; "maillot" alone may be two classes."""
    whole: dict[str, list[int]] = {}
    first: dict[str, list[int]] = {}
    every: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        words = [_plain(s) for s in _synonyms(label)]
        if len(words) > 1:
            whole.setdefault(_plain(label), []).append(i)
        first.setdefault(words[0], []).append(i)
        for word in dict.fromkeys(words):
            every.setdefault(word, []).append(i)
    return whole, first, every
