"""Byte-level BPE in the form of Qwen2, from a checkpoint's own vocabulary, merges and added tokens.

The `tokenizers` library does the work. Added tokens are recognised anywhere in a text; what stands between them is
normalised (NFC), cut into pieces, and each piece merged on its own. Nothing is put in front of a text or behind it.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..common.text import first_line
from ..errors import MlxSfError

FILES = ("vocab.json", "merges.txt", "added_tokens.json")

# where a text may be cut, the first alternative that fits: an English contraction's ending; letters, with at most one
# sign before them; a single digit; other signs, with a space before and line breaks behind; line breaks; white space
# but for the last before a word; white space
_PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class BytePairTokenizer:
    """Text -> token ids, from the contents of the three `FILES`; `where` names them in messages.

    `ids` are those of the added tokens by their text. Raises `MlxSfError` where the files do not fit together.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        if missing := [name for name in FILES if name not in files]:
            raise MlxSfError(
                f"{where}: lacks {', '.join(missing)}: prompts cannot be read, copy it from the repository"
            )
        vocabulary, self.ids = (
            _numbers(files[name], f"{where}: {name}") for name in ("vocab.json", "added_tokens.json")
        )
        merges = _merges(files["merges.txt"], f"{where}: merges.txt")
        for pair in merges:
            if not {*pair, "".join(pair)} <= vocabulary.keys():
                raise MlxSfError(f"{where}: merges.txt joins {pair[0]!r} and {pair[1]!r}, which vocab.json lacks")
        if both := set(vocabulary.values()) & set(self.ids.values()):
            raise MlxSfError(f"{where}: token {min(both)} is in vocab.json and in added_tokens.json")
        try:
            model: Any = Tokenizer(models.BPE({**vocabulary, **self.ids}, merges))
            model.normalizer = normalizers.NFC()
            pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
            model.pre_tokenizer = pre_tokenizers.Sequence(
                [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            model.decoder = decoders.ByteLevel()
            model.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self.ids])
        except Exception as e:  # the library raises plain Exceptions
            raise MlxSfError(f"{where}: no byte-level BPE ({first_line(e)}): copy the files again") from None
        self._model = model

    def __call__(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)


def _numbers(data: bytes, where: str) -> dict[str, int]:
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{where}: not valid JSON ({first_line(e)})") from None
    ok = isinstance(found, dict) and all(isinstance(i, int) and not isinstance(i, bool) for i in found.values())
    if not ok or not found:
        raise MlxSfError(f"{where}: want an object of tokens and their numbers")
    return found


def _merges(data: bytes, where: str) -> list[tuple[str, str]]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise MlxSfError(f"{where}: is not UTF-8: copy the file again") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise MlxSfError(f"{where}: line {number} is {line!r}, want two tokens")
        merges.append((parts[0], parts[1]))
    return merges
