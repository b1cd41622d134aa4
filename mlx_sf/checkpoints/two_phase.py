"""SenseNova-U1's first phase: prompts through the understanding side, layer by layer, their keys and values kept.

It runs before the generation side is loaded and leaves nothing behind but the prefixes. These depend on the tokens,
the weights and the compute type alone, and are kept under all three in the cache.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..common.files import cache_folder, file_identity
from ..common.progress import Progress
from ..device.defaults import dtype_name
from ..errors import MlxSfError
from ..formats.tensor_file import Entry, TensorFile, write_tensor_file
from ..models.bpe import BytePairTokenizer
from ..models.quantize import FLOATS
from ..models.u1_text import MARKUP, Prefix, encode, rendered, text_shapes
from .checkpoint import Checkpoint
from .u1_files import TEXT, tokenizer_files

_FORMAT = 1  # of the files in the cache
CACHE_BYTES = 4 * 10**9
_SHOWN = 60
_RECENT = 64


class Prefixes:
    """Prefixes of prompts for a network's `features`: from the cache, else computed and kept. None is no prompt.

    `encoded` counts the prompts that were computed. `updates` are changes of the understanding side's matrices by name,
    as adapters bring them: pairs (B, A), each to be added as B A.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        system_message: str = "",
        dtype: mx.Dtype = mx.float32,
        updates: Mapping[str, Sequence[tuple[mx.array, mx.array]]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.checkpoint, self.system_message, self.dtype = checkpoint, system_message, dtype
        self.encoded = 0
        self._updates, self._notes = dict(updates or {}), list(notes)
        self._tokenizer: BytePairTokenizer | None = None
        self._recent: dict[tuple[int, ...], Prefix] = {}
        self._ids: dict[str | None, tuple[int, ...]] = {}

    @property
    def where(self) -> str:
        return str(self.checkpoint.path)

    def ids(self, prompt: str | None) -> tuple[int, ...]:
        """Token ids of a prompt with its markup. `MlxSfError` where it is too long, or the tokenizer lacks a token."""
        if prompt not in self._ids:
            if self._tokenizer is None:
                self._tokenizer = BytePairTokenizer(tokenizer_files(self.checkpoint.file.entries), self.where)
                if missing := [t for t in MARKUP if t not in self._tokenizer.ids]:
                    raise MlxSfError(f"{self.where}: added_tokens.json lacks {missing[0]!r}: copy it again")
            try:
                ids = tuple(self._tokenizer(rendered(prompt, self.system_message)))
            except UnicodeEncodeError:
                raise MlxSfError(f"prompt {_shown(prompt)}: is not UTF-8") from None
            c = self.checkpoint.config.model
            if len(ids) > c.prompt_length:
                raise MlxSfError(
                    f"prompt {_shown(prompt)}: {len(ids)} tokens with its markup, want at most {c.prompt_length}: "
                    "shorten it"
                )
            if max(ids) >= c.vocab_size:
                raise MlxSfError(f"{self.where}: token {max(ids)} is beyond its table of {c.vocab_size} rows")
            self._ids[prompt] = ids
        return self._ids[prompt]

    def ensure(self, prompts: Sequence[str | None]) -> None:
        """Compute the prefixes of those prompts that the cache lacks; the layers' memory is free again after it."""
        wanted = dict.fromkeys(self.ids(p) for p in prompts)
        missing = [ids for ids in wanted if ids not in self._recent and not self._take_from_cache(ids)]
        if not missing:
            return
        c, entries = self.checkpoint.config.model, self.checkpoint.file.entries
        shapes = text_shapes(c)

        def tensor(name: str) -> mx.array:
            value = self.checkpoint.tensor(TEXT + name, FLOATS, shapes[name])
            for b, a in self._updates.get(name, ()):
                value = value.astype(mx.float32) + b @ a
            return value

        def rows(numbers: np.ndarray) -> mx.array:
            name = "embed_tokens.weight"
            e = entries.get(TEXT + name)
            if e is None or e.shape != shapes[name] or e.dtype not in FLOATS:
                raise MlxSfError(f"{self.where}: lacks {name!r} of shape {shapes[name]}: not a complete checkpoint")
            return e.rows(numbers)

        with Progress(c.depth, f"reading {len(missing)} prompts", "layers") as bar:
            found = encode(
                c, tensor, rows, missing, self.dtype, on_layer=lambda done, total: bar.update()
            )  # fmt: skip
        self.encoded += len(missing)
        for ids, prefix in zip(missing, found, strict=True):
            self._keep(ids, prefix)
            self._save(ids, prefix)
        prune(self._folder, CACHE_BYTES)

    def __call__(self, prompts: Sequence[str | None]) -> list[Prefix]:
        """The prefix of each prompt; equal prompts share one."""
        self.ensure(prompts)
        found = []
        for p in prompts:
            ids = self.ids(p)
            if ids not in self._recent and not self._take_from_cache(ids):
                self.ensure([p])
            found.append(self._recent[ids])
        return found

    def notes(self) -> list[str]:
        """What to tell the user, once."""
        notes, self._notes = self._notes, []
        return notes

    # ---------------------------------------------------------------------------------------------- the cache

    @property
    def _folder(self) -> Path:
        return cache_folder() / "prefixes"

    def _place(self, ids: Sequence[int]) -> Path:
        digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes())
        for name in sorted(self._updates):
            for pair in self._updates[name]:
                digest.update(name.encode() + b"".join(np.asarray(w).tobytes() for w in pair))
        told = [_FORMAT, digest.hexdigest(), identity(self.checkpoint), dtype_name(self.dtype)]
        return self._folder / (hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32] + ".safetensors")

    def _keep(self, ids: tuple[int, ...], prefix: Prefix) -> None:
        self._recent[ids] = prefix
        while len(self._recent) > _RECENT:
            self._recent.pop(next(iter(self._recent)))

    def _take_from_cache(self, ids: tuple[int, ...]) -> bool:
        place, c = self._place(ids), self.checkpoint.config.model
        shape = (c.depth, c.num_kv_heads, len(ids), c.head_dim)
        with contextlib.suppress(MlxSfError, KeyError):  # not there, or damaged: computed again
            if not place.is_file():
                return False
            file = TensorFile(place)
            file.verify()
            k, v = (file.entries[name].array() for name in ("keys", "values"))
            if k.shape == v.shape == shape:
                self._keep(ids, Prefix(tuple(k), tuple(v)))
                place.touch()
                return True
        return False

    def _save(self, ids: tuple[int, ...], prefix: Prefix) -> None:
        parts = {"keys": mx.stack(list(prefix.keys)), "values": mx.stack(list(prefix.values))}
        write_tensor_file(self._place(ids), [Entry.of(name, w) for name, w in parts.items()], f"prefix {_FORMAT}")


def identity(checkpoint: Checkpoint) -> list[list[str | int]]:
    """What tells one version of a checkpoint's files from others: see `file_identity`."""
    index = checkpoint.path.name.endswith(".index.json")
    files = sorted(checkpoint.path.parent.glob("*.safetensors")) if index else [checkpoint.path]
    return [file_identity(f) for f in files]


def prune(folder: Path, most: int) -> None:
    """Delete the files of a folder that were used longest ago, until the others take at most `most` bytes."""
    with contextlib.suppress(OSError):  # another process may prune, too
        files = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
        held = 0
        for path in files:
            held += path.stat().st_size
            if held > most:
                path.unlink()


def _shown(prompt: str | None) -> str:
    text = (prompt or "").encode(errors="replace").decode()
    return repr(text[:_SHOWN] + ("..." if len(text) > _SHOWN else ""))
