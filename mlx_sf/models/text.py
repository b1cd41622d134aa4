"""What a network reads of a prompt: features of a frozen text encoder, or words of a vocabulary trained along."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.fields import check_types, require
from ..errors import MlxSfError

# prompts -> features of each, (n, width) float32 with n at most the network's text places
Features = Callable[[Sequence[str]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class TextConfig:
    """The text side of a network's input: `length` places, each a vector of `width` numbers.

    Args:
        encoder: the frozen encoder whose features it was trained with, a name on the Hugging Face Hub; "" where it has
            none.
        width: of the encoder's last hidden state, or of the table of words.
        length: places; longer prompts are cut.
        words: the vocabulary of a network that learns a vector for each word; () where an encoder gives features.
    """

    encoder: str = "google/flan-t5-large"
    width: int = 1024
    length: int = 256
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        require(self.width >= 1, "text width", self.width, "at least 1")
        require(1 <= self.length <= 4096, "text length", self.length, "1 to 4096 places")
        ok = isinstance(self.words, list | tuple) and all(isinstance(w, str) and w for w in self.words)
        require(ok and len(set(self.words)) == len(self.words), "text words", self.words, "different words")
        object.__setattr__(self, "words", tuple(self.words))


def split_words(text: str) -> list[str]:
    """The words of a prompt: letters, digits and apostrophes, in lower case."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def word_ids(prompts: Sequence[str | None], text: TextConfig) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (B, L) int32 of the prompts' words and which places hold one (B, L) bool; None holds none.

    `MlxSfError` names a word that is not in the vocabulary, with the nearest that are.
    """
    index = {w: i for i, w in enumerate(text.words)}
    ids = np.zeros((len(prompts), text.length), np.int32)
    mask = np.zeros((len(prompts), text.length), bool)
    for row, prompt in enumerate(prompts):
        for place, word in enumerate(split_words(prompt or "")[: text.length]):
            if word not in index:
                near = difflib.get_close_matches(word, text.words, 3, 0.6) or text.words[:8]
                raise MlxSfError(
                    f"prompt {prompt!r}: {word!r} is none of the {len(text.words)} words that this model was trained "
                    f"with, such as {', '.join(near)}"
                )
            ids[row, place], mask[row, place] = index[word], True
    return ids, mask


def padded_features(
    prompts: Sequence[str | None], text: TextConfig, features: Features | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, L, E) float32 of the prompts, and which places hold a token (B, L) bool; None holds none."""
    context = np.zeros((len(prompts), text.length, text.width), np.float32)
    mask = np.zeros((len(prompts), text.length), bool)
    wanted = list(dict.fromkeys(p for p in prompts if p is not None))
    if wanted and features is None:
        raise MlxSfError("prompts need a text encoder, and this network was loaded without one")
    found = dict(zip(wanted, features(wanted) if features is not None else (), strict=True))
    for row, prompt in enumerate(prompts):
        if prompt is not None:
            values = found[prompt][: text.length]
            context[row, : len(values)], mask[row, : len(values)] = values, True
    return context, mask


class ReadsText:
    """What networks share that are conditioned on prompts: a mixin for modules with a `config.text`.

    Conditions are {"context": (B, L, E), "mask": (B, L)}, or {"words": (B, L), "mask": (B, L)} where the network has
    words of its own. Places whose mask is 0 hold a learned vector, and no prompt is a mask of zeros. `features` gives
    what the encoder makes of prompts; whoever loads the network sets it.
    """

    _features: Features | None = None
    config: Any
    mask_token: mx.array
    word_table: dict[str, mx.array]

    @property
    def features(self) -> Features | None:
        return self._features

    @features.setter
    def features(self, features: Features | None) -> None:
        self._features = features

    def _add_text_parameters(self, text: TextConfig) -> None:
        self.mask_token = mx.zeros((1, 1, text.width))
        if text.words:
            self.word_table = {"weight": mx.zeros((len(text.words), text.width))}

    def condition(self, asked: Sequence[Any]) -> dict[str, mx.array]:
        """The condition of prompts; None is no prompt, "" is an empty one. `FieldError` for a class number."""
        prompts: list[str | None] = []
        for a in asked:
            require(a is None or isinstance(a, str), "prompt", a, "a text, or None for no prompt")
            prompts.append(a if a is None else str(a))
        text = self.config.text
        if text.words:
            ids, mask = word_ids(prompts, text)
            return {"words": mx.array(ids), "mask": mx.array(mask)}
        context, mask = padded_features(prompts, text, self._features)
        return {"context": mx.array(context), "mask": mx.array(mask)}

    def _context(self, condition: dict[str, mx.array]) -> mx.array:
        """Vectors (B, L, E) of a condition's places."""
        words = condition.get("words")
        c = condition["context"] if words is None else self.word_table["weight"][words]
        return mx.where(condition["mask"][..., None] > 0.5, c, self.mask_token)
