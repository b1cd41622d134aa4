"""T5's tokenizer: the pipeline that a `tokenizer.json` describes, run by the `tokenizers` library.

Readers of these files differ on trailing white space, literal special tokens and stacked accents. This one does what
the file says, and takes prompts without trailing white space, on which all of them agree.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.text import first_line
from ..errors import MlxSfError

END, PAD = 1, 0  # "</s>" and "<pad>"


class Tokenizer:
    """Text -> token ids. `length` bounds them, the closing "</s>" included."""

    def __init__(self, path: Path, length: int) -> None:
        from tokenizers import Tokenizer as Pipeline

        try:
            self._pipeline: Any = Pipeline.from_file(str(path))
        except Exception as e:  # the library raises plain Exceptions
            reason = "no such file" if not path.is_file() else first_line(e)
            raise MlxSfError(f"{path}: cannot be read as a tokenizer ({reason}), want T5's tokenizer.json") from None
        self.length = length
        self._pipeline.no_padding()
        self._pipeline.no_truncation()
        ids = self._pipeline.encode("").ids
        if ids != [END]:
            raise MlxSfError(f"{path}: gives {ids} for an empty text, want [{END}]: it is no tokenizer of T5")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, at most `length`, the last one "</s>"; not padded."""
        return [self.cut(ids) for ids in self.whole(texts)]

    def whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, however long."""
        return [list(e.ids) for e in self._pipeline.encode_batch([t.rstrip() for t in texts])]

    def cut(self, ids: list[int]) -> list[int]:
        """Ids cut to at most `length`, the last one "</s>"."""
        return ids if len(ids) <= self.length else [*ids[: self.length - 1], END]
