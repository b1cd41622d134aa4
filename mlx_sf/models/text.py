"""What a network reads of a prompt: features of a frozen text encoder, or words of a vocabulary trained along."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
                import difflib

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
