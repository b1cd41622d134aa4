"""The frozen text encoder of a checkpoint: found here or on the Hub, run once for each prompt, its output kept.

Its output depends on prompt, weights, tokenizer, number of places and precision alone, and is kept under all of these
in the cache. Weights are read layer by layer, and only when a prompt is new.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from ..common.fields import choice
from ..common.files import cache_folder, file_identity, hub_blob, replacing, sha256
from ..common.progress import Progress
from ..errors import MlxSfError, option
from ..formats.shards import open_foreign
from ..formats.tensor_file import Entry
from ..models.t5 import T5Config, encode, encoder_shapes
from ..models.text import TextConfig
from ..models.tokenizer import Tokenizer
from . import hub
from .feature_store import FeatureStore, text_key
from .names import parse

EncoderPrecision = Literal["float32", "bfloat16", "8-bit"]
_TOKENIZER = "tokenizer.json"
_SHOWN = 60


@dataclass(frozen=True)
class EncoderFiles:
    """A text encoder on this machine: its configuration, its weights (a file, or the index of shards), its tokenizer.

    `where` names it in messages.
    """

    config: Path
    weights: Path
    tokenizer: Path
    where: str

    def digest(self) -> str:
        """What tells this encoder's output from another's: its weights and its tokenizer."""
        weights = [self.weights]
        if self.weights.name.endswith(".index.json"):
            weights += sorted(self.weights.parent.glob("*.safetensors"))
        parts = [_digest(p) for p in (*weights, self.tokenizer)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_encoder(name: str | os.PathLike[str]) -> EncoderFiles:
    """The text encoder of a folder or a Hub name. `MlxSfError` where it is none, or cannot be had."""
    place, text = Path(name).expanduser(), os.fspath(name)
    if place.is_dir():
        return _in_folder(place, text)
    hub_name = None if place.exists() or text.startswith((".", "/", "~")) else parse(text)
    if hub_name is None:
        raise MlxSfError(f"text encoder {text}: no such folder, want one with config.json, weights and {_TOKENIZER}")
    try:
        found = hub.fetch(hub_name, also=(_TOKENIZER,))
    except MlxSfError as e:
        raise MlxSfError(f"text encoder {e.message}; or name a folder with {option('text_encoder')}") from None
    return _in_folder(found.path.parent, text)


def _in_folder(folder: Path, where: str) -> EncoderFiles:
    """The encoder in a folder; or in its sub-folders text_encoder and tokenizer, as diffusers lays it out."""
    own = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    names = sorted(p.name for p in own.iterdir())
    index = [n for n in names if n.endswith(".safetensors.index.json")]
    weights = index or [n for n in names if n.endswith(".safetensors") and "-of-" not in n]
    tokenizer = next((f / _TOKENIZER for f in (own, folder / "tokenizer") if (f / _TOKENIZER).is_file()), None)
    parts = {"config.json": "config.json" in names, _TOKENIZER: tokenizer is not None, ".safetensors": bool(weights)}
    if missing := [part for part, there in parts.items() if not there]:
        raise MlxSfError(f"text encoder {where}: its folder lacks {', '.join(missing)}: copy all of google/flan-t5-...")
    return EncoderFiles(own / "config.json", own / min(weights, key=len), Path(str(tokenizer)), where)


def _digest(path: Path) -> str:
    """SHA-256 of a file, remembered by its size and time; in the Hub's cache a file's name is one already."""
    if (blob := hub_blob(path)) is not None:
        return blob
    memory, key = cache_folder() / "digests.json", " ".join(map(str, file_identity(path)))
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known.get(key), str):
        known[key] = sha256(path)
        with replacing(memory) as temporary:
            temporary.write_text(json.dumps(known, indent=1))
    return str(known[key])


class TextFeatures:
    """What a text encoder makes of prompts, for a network's `features`: from the cache, else computed and kept.

    Nothing is read before the first prompt. `encoded` counts the prompts that were computed; `truncated` maps prompts
    that were too long to their number of tokens.
    """

    def __init__(
        self, encoder: str | os.PathLike[str], text: TextConfig, precision: EncoderPrecision = "float32"
    ) -> None:
        choice("text_encoder_precision", precision, EncoderPrecision)
        self.encoder, self.text, self.precision = encoder, text, precision
        self.encoded = 0
        self.truncated: dict[str, int] = {}
        self._opened: tuple[EncoderFiles, T5Config, FeatureStore] | None = None
        self._tokenizer: Tokenizer | None = None
        self._recent: dict[str, np.ndarray] = {}

    @staticmethod
    def width_of(encoder: str | os.PathLike[str]) -> int:
        """Numbers that an encoder gives for a token."""
        return T5Config.read(find_encoder(encoder).config).d_model

    def _open(self) -> tuple[EncoderFiles, T5Config, FeatureStore]:
        if self._opened is None:
            files = find_encoder(self.encoder)
            config = T5Config.read(files.config)
            if config.d_model != self.text.width:
                raise MlxSfError(
                    f"text encoder {files.where}: gives {config.d_model} numbers a token, this network reads "
                    f"{self.text.width}: name the encoder it was trained with ({self.text.encoder or 'unknown'})"
                )
            key = hashlib.sha256(json.dumps([files.digest(), self.text.length, self.precision]).encode()).hexdigest()
            self._opened = files, config, FeatureStore(cache_folder() / "text" / key[:16], config.d_model)
        return self._opened

    def ensure(self, prompts: Sequence[str]) -> None:
        """Compute the features of those prompts that the cache lacks; the encoder's memory is free again after it."""
        files, config, store = self._open()
        wanted = [p for p in dict.fromkeys(p.rstrip() for p in prompts) if p not in self._recent]
        missing = []
        for p in wanted:
            values = store.get(text_key(p))
            if values is None:
                missing.append(p)
            elif len(wanted) <= 1024:
                self._recent[p] = values
            if values is not None and len(values) == self.text.length:
                self._ids(files, [p])
        if not missing:
            return
        ids = self._ids(files, missing)
        entries = _entries(files, config)
        with Progress(config.num_layers, f"encoding {len(missing)} prompts", "layers") as bar:
            found = encode(
                config,
                lambda name: _entry(entries, name, files).array(),
                lambda rows: _rows(entries, files, rows),
                ids,
                mx.bfloat16 if self.precision == "bfloat16" else mx.float32,
                8 if self.precision == "8-bit" else None,
                on_layer=lambda done, total: bar.update(),
            )
        mx.clear_cache()
        self.encoded += len(missing)
        store.add({text_key(p): values for p, values in zip(missing, found, strict=True)})

    def _ids(self, files: EncoderFiles, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, cut to the network's places; `truncated` notes which were cut."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(files.tokenizer, self.text.length)
        whole = self._tokenizer.whole(prompts)
        self.truncated |= {p: len(ids) for p, ids in zip(prompts, whole, strict=True) if len(ids) > self.text.length}
        return [self._tokenizer.cut(ids) for ids in whole]

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Features (n, E) float32 of each prompt, n its tokens."""
        self.ensure(prompts)
        store = self._open()[2]
        result = []
        for p in prompts:
            p = p.rstrip()
            values = self._recent.get(p)
            values = store.get(text_key(p)) if values is None else values
            assert values is not None  # `ensure` put it there
            result.append(values)
        return result

    def notes(self) -> list[str]:
        """What the encoder had to cut, in words."""
        cut = list(self.truncated.items())
        if not cut:
            return []
        places = self.text.length
        if len(cut) == 1:
            (text, count), shown = cut[0], cut[0][0][:_SHOWN]
            more = "..." if len(text) > _SHOWN else ""
            return [f"prompt {shown + more!r}: {count} tokens, the model reads the first {places - 1}"]
        return [f"{len(cut)} prompts have more than {places} tokens: the model reads the first {places - 1} of each"]


def text_features(
    text: TextConfig | None, encoder: str | os.PathLike[str] | None = None, precision: EncoderPrecision = "float32"
) -> TextFeatures | None:
    """The features of a network that reads `text`; None where it needs none.

    `encoder`, a folder or a Hub name, takes the place of the one that the checkpoint names.
    """
    if text is None or text.words:
        if encoder is not None:
            needed = "class numbers" if text is None else "words of its own"
            raise MlxSfError(
                f"{option('text_encoder')}: this model takes {needed} and has no text encoder: leave it out"
            )
        return None
    named = encoder or text.encoder
    if not named:
        raise MlxSfError(f"{option('text_encoder')} is missing: the checkpoint does not say which encoder it reads")
    return TextFeatures(named, text, precision)


def _entries(files: EncoderFiles, config: T5Config) -> dict[str, Entry]:
    """The tensors of the weights' file, its sizes checked against the configuration."""
    entries = open_foreign(files.weights)
    for name, shape in encoder_shapes(config).items():
        if (got := _entry(entries, name, files).shape) != shape:
            raise MlxSfError(f"text encoder {files.where}: tensor {name!r} has shape {got}, config.json wants {shape}")
    return entries


def _entry(entries: dict[str, Entry], name: str, files: EncoderFiles) -> Entry:
    if name not in entries:
        raise MlxSfError(f"text encoder {files.where}: lacks tensor {name!r}: it is no T5 encoder, or incomplete")
    return entries[name]


def _rows(entries: dict[str, Entry], files: EncoderFiles, rows: np.ndarray) -> mx.array:
    """Rows of the table of embeddings, which an encoder alone may have under another name."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    entry = _entry(entries, next((n for n in names if n in entries), names[0]), files)
    if rows[-1] >= entry.shape[0]:
        raise MlxSfError(
            f"text encoder {files.where}: its tokenizer gives token {rows[-1]}, its table has {entry.shape[0]} rows"
        )
    return entry.rows(rows)


PRECISIONS = get_args(EncoderPrecision)
