"""Checkpoints: weights and their configuration, in a file or in shards. The only owner of their names and contents.

A file with one set of weights names its tensors as the network does, "blocks.0.attn.qkv.weight"; one with several
puts the set in front, "ema1/blocks.0...". Tensors with another prefix ("optimizer/...") are a training run's own.
The containers are those of `formats`.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxSfError
from ..formats.shards import SHARD_BYTES, open_tensors, write_tensors
from ..formats.tensor_file import Entry
from ..models import Architecture, Shapes, architecture, parameter_shapes
from ..models.quantize import FLOATS, stored
from .config import Config
from .u1_files import PublishedFile, is_published

WEIGHT_SETS = ("model", "ema1", "ema2")


def write_checkpoint(
    path: str | os.PathLike[str], entries: Sequence[Entry], config: Config, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint from entries that are read one at a time, atomically.

    The suffix chooses the container; a name without one becomes a folder of shards of at most `shard_bytes`.
    """
    write_tensors(path, entries, config.to_json(), shard_bytes)


def save_checkpoint(
    path: str | os.PathLike[str],
    weights: Mapping[str, Mapping[str, mx.array]],
    config: Config,
    extra: Mapping[str, mx.array] | None = None,
) -> None:
    """Save weight sets ({"ema1": {name: array}}) and, for a training run, extra arrays under names with a slash.

    `config.weights` is set to the names of the sets.
    """
    config = dataclasses.replace(config, weights=tuple(weights))
    entries = [Entry.of(stored_name(config, s, k), v) for s, tensors in weights.items() for k, v in tensors.items()]
    for name, v in (extra or {}).items():
        if "/" not in name or name.split("/")[0] in WEIGHT_SETS:
            raise MlxSfError(f"checkpoint: extra tensor {name!r} needs a prefix of its own")
        entries.append(Entry.of(name, v))
    write_checkpoint(path, entries, config)


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint: of its file, or of all shards in its folder."""
    p = Path(path)
    return sum(f.stat().st_size for f in p.iterdir()) if p.is_dir() else p.stat().st_size


def stored_name(config: Config, weights: str, name: str) -> str:
    """Name in the file of tensor `name` of a weight set."""
    return name if len(config.weights) == 1 else f"{weights}/{name}"


class Checkpoint:
    """An opened checkpoint: its `config` at once, `weights(...)` and `extra()` when asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = PublishedFile(Path(path)) if is_published(Path(path)) else open_tensors(path)
        self.path = self.file.path
        self.config = Config.from_json(self.file.text, str(self.path))
        self._check_sizes()

    @property
    def kind(self) -> Architecture:
        """The architecture of its network."""
        return architecture(self.config.model)

    def _check_sizes(self) -> None:
        """A configuration of absurd size is refused before a network is made of it."""
        entries, first, adapter = self.file.entries, self.config.weights[0], self.config.adapter
        sizes = self.kind.landmarks(self.config.model)
        if adapter is not None:
            known = [t for t in adapter.lora.targets if f"{t}.weight" in sizes]
            sizes = dataclasses.replace(adapter.lora, targets=tuple(known)).shapes(sizes) if known else {}
        wanted = [stand_in for key, shape in sizes.items() for stand_in in self._stored(key, shape).items()]
        for key, (_, shape) in wanted:
            e = entries.get(stored_name(self.config, first, key))
            if e is None:
                raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
            if e.shape != shape:
                raise MlxSfError(f"{self.path}: tensor {key!r} has shape {e.shape}, its configuration wants {shape}")

    def _stored(self, key: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        return stored(key, shape, self.config.quantization, self.kind)

    def shapes(self) -> Shapes:
        """Name and shape of every tensor of a weight set: of the network, or of the adapter that it holds instead."""
        shapes, adapter = parameter_shapes(self.config.model), self.config.adapter
        return shapes if adapter is None else adapter.lora.shapes(shapes)

    def fingerprint(self, weights: str | None = None) -> str:
        """What tells a weight set from others: a digest of its landmarks, which any training moves."""
        digest = hashlib.sha256()
        for key, shape in self.kind.landmarks(self.config.model).items():
            for part in self._stored(key, shape):
                digest.update(self.file.entries[stored_name(self.config, self.pick(weights), part)].read().tobytes())
        return digest.hexdigest()[:16]

    def pick(self, weights: str | None = None) -> str:
        """Name of the weight set to use: the one asked for, else "ema1" of a network, else the first.

        An adapter's run is too short for averages, which still hold much of its start.
        """
        have = self.config.weights
        if weights is None:
            return "ema1" if "ema1" in have and self.config.adapter is None else have[0]
        if weights not in have:
            listed = ", ".join(have)
            raise MlxSfError(f"{self.path}: holds weights {listed}, not {weights!r}: choose one or convert again")
        return weights

    def require_floats(self) -> None:
        """Refuse quantised weights, which are for drawing and judging pictures only."""
        if (q := self.config.quantization) is not None:
            raise MlxSfError(
                f"{self.path}: holds {q.bits}-bit weights, which cannot be trained, exported or quantised again: "
                "take the float checkpoint they were made from"
            )

    def require_network(self) -> None:
        """Refuse an adapter alone."""
        if self.config.adapter is not None:
            raise MlxSfError(f"{self.path}: is an adapter, want a whole network: merge it first with `mlx-sf export`")

    def weights(self, weights: str | None = None) -> dict[str, mx.array]:
        """One weight set of floats, checked against the configuration: every tensor, its shape, finite values."""
        self.require_floats()
        return self.tensors(weights)

    def tensors(self, weights: str | None = None) -> dict[str, mx.array]:
        """`weights` as they are stored: of quantised layers, the codes, scales and biases."""
        return dict(self.stream(weights))

    def stream(self, weights: str | None = None) -> Iterator[tuple[str, mx.array]]:
        """`tensors` one after another: none but the last need stay in memory."""
        name = self.pick(weights)
        shapes: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for key, shape in self.shapes().items():
            shapes |= self._stored(key, shape)
        known = {stored_name(self.config, s, k) for s in self.config.weights for k in shapes}
        for key in self.file.entries:
            if key not in known and ("/" not in key or key.split("/")[0] in WEIGHT_SETS):
                raise MlxSfError(f"{self.path}: tensor {key!r} is not part of the network")
        self.file.verify()
        for key, want in shapes.items():
            yield key, self.tensor(stored_name(self.config, name, key), *want)

    def tensor(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> mx.array:
        e = self.file.entries.get(key)
        if e is None:
            raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
        if e.shape != shape or e.dtype not in dtypes:
            kind = "" if e.dtype in dtypes else f"{dtypes[0]} "
            raise MlxSfError(
                f"{self.path}: tensor {key!r} is {e.dtype} {e.shape}, its configuration wants {kind}{shape}"
            )
        value = e.array()
        if e.dtype in FLOATS and not mx.all(mx.isfinite(value)).item():
            raise MlxSfError(f"{self.path}: tensor {key!r} holds NaN or infinite values: take another checkpoint")
        return value

    def extra(self) -> dict[str, mx.array]:
        """The arrays of a training run beside its weights, by name ("optimizer/...")."""
        self.file.verify()
        named = [e for name, e in self.file.entries.items() if "/" in name and name.split("/")[0] not in WEIGHT_SETS]
        return {e.name: e.array() for e in named}


def counted(entries: list[Entry], on_tensor: Callable[[int, int], None] | None) -> list[Entry]:
    """The entries, each telling `on_tensor(done, total)` when it has been read."""
    if on_tensor is None:
        return entries

    def one(i: int, e: Entry) -> Entry:
        def read() -> np.ndarray:
            bits = e.read()
            on_tensor(i + 1, len(entries))
            return bits

        return dataclasses.replace(e, read=read)

    return [one(i, e) for i, e in enumerate(entries)]


_STEP_FILE = re.compile(r"checkpoint-(\d+)\.safetensors")


def step_file(step: int) -> str:
    """File name of a run's checkpoint after `step` steps."""
    return f"checkpoint-{step:08d}.safetensors"


def step_files(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder with their steps, oldest first."""
    found = ((_STEP_FILE.fullmatch(p.name), p) for p in Path(folder).iterdir())
    return sorted((int(m[1]), p) for m, p in found if m)
