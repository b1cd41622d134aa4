"""A checkpoint in several files: a folder of `.safetensors` shards and an index, as the Hugging Face Hub has it.

    model-00001-of-00002.safetensors   model-00002-of-00002.safetensors   model.safetensors.index.json

The index maps each tensor to its shard and holds the text that a single file would hold. Each shard is a file of
`tensor_file`, with the text and a SHA-256 of its own.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import MlxSfError
from .tensor_file import SUFFIXES, Entry, TensorFile, check_suffix, write_tensor_file

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the size at which the Hub's own tools begin a new file
_MAX_INDEX = 64 << 20


class ShardedFile:
    """An opened folder of shards, named by its index: `text`, and `entries` by name, none of them read yet."""

    def __init__(self, index: str | os.PathLike[str]) -> None:
        self.path = Path(index)
        self.text, named = _read_index(self.path)
        names = sorted(set(named.values()))
        self._shards = [TensorFile(self._shard(name)) for name in names]
        self.container, self.size = f"safetensors in {len(names)} shards", sum(s.size for s in self._shards)
        self.entries: dict[str, Entry] = {}
        for name, shard in zip(names, self._shards, strict=True):
            if shard.text != self.text:
                raise MlxSfError(f"{shard.path}: is of another checkpoint than {self.path.name} says")
            wanted = {tensor for tensor, file in named.items() if file == name}
            if odd := sorted(wanted ^ set(shard.entries)):
                has = "lacks" if odd[0] in wanted else "holds"
                raise MlxSfError(f"{shard.path}: {has} tensor {odd[0]!r}, {self.path.name} says otherwise")
            self.entries |= shard.entries

    def _shard(self, name: str) -> Path:
        path = self.path.parent / name
        if not path.is_file():
            raise MlxSfError(f"{path}: this shard of {self.path.name} is missing: copy or download it again")
        return path

    def verify(self) -> None:
        """Compare every shard with its SHA-256; `MlxSfError` names the one that differs."""
        for shard in self._shards:
            shard.verify()


def open_foreign(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of another program's `.safetensors`, or of the shards that its index names; none of them read yet."""
    path = Path(path)
    if not path.name.endswith(".index.json"):
        return TensorFile(path, foreign=True).entries
    named = _read_index(path, foreign=True)[1]
    entries: dict[str, Entry] = {}
    for file in sorted(set(named.values())):
        if not (path.parent / file).is_file():
            raise MlxSfError(f"{path.parent / file}: this shard of {path.name} is missing: copy or download it again")
        shard = TensorFile(path.parent / file, foreign=True).entries
        entries |= {name: e for name, e in shard.items() if named.get(name) == file}
    if lost := sorted(set(named) - set(entries)):
        raise MlxSfError(f"{path.parent / named[lost[0]]}: lacks tensor {lost[0]!r}, {path.name} says otherwise")
    return entries


def _read_index(path: Path, foreign: bool = False) -> tuple[str, dict[str, str]]:
    """The text of an index, and the shard of each tensor: plain names of files beside it, never a path elsewhere."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise MlxSfError(f"{path}: is larger than any index: not an index of shards")
        data = json.loads(path.read_text())
        text, named = "" if foreign else data["metadata"]["config"], data["weight_map"]
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MlxSfError(f"{path}: not the index of an mlx-sf checkpoint (no configuration inside)") from None
    if not isinstance(text, str) or not isinstance(named, dict) or not named:
        raise MlxSfError(f"{path}: not the index of an mlx-sf checkpoint (no configuration or no tensors inside)")
    for tensor, file in named.items():
        plain = isinstance(file, str) and Path(file).name == file and file not in ("", ".", "..")
        if not plain or not file.endswith(".safetensors"):
            raise MlxSfError(f"{path}: places tensor {tensor!r} in {file!r}, want a .safetensors file beside it")
    return text, named


def open_tensors(path: str | os.PathLike[str]) -> TensorFile | ShardedFile:
    """A file of tensors, or the folder of shards that an index names."""
    return ShardedFile(path) if Path(path).name.endswith(".index.json") else TensorFile(path)


def index_of(folder: Path) -> Path | None:
    """The index of a folder of shards; None where it is no such folder."""
    return folder / INDEX if (folder / INDEX).is_file() else None


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither a file of one container nor a folder, and a folder that is there already."""
    if Path(path).suffix:
        check_suffix(path)
    elif Path(path).exists():
        raise MlxSfError(f"{path}: is there already, want a new folder for shards, or a name ending in {SUFFIXES[1]}")


def write_tensors(
    path: str | os.PathLike[str], entries: Sequence[Entry], text: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors and text, one tensor at a time: one file, or (a name without suffix) a new folder of shards.

    The folder appears when it is complete.
    """
    path = Path(path)
    check_target(path)
    if path.suffix:
        write_tensor_file(path, entries, text)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        groups = list(_grouped(entries, shard_bytes))
        named: dict[str, str] = {}
        for i, group in enumerate(groups):
            name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            write_tensor_file(temporary / name, group, text)
            named |= {e.name: name for e in group}
        total = sum(e.nbytes for e in entries)
        index = {"metadata": {"config": text, "format": "mlx", "total_size": total}, "weight_map": named}
        (temporary / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path)
    except OSError as e:
        raise MlxSfError(
            f"{path}: cannot be written ({e.strerror or e}): free some space or choose another place"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _grouped(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    """Neighbouring tensors in groups of at most `shard_bytes`, or of one that is larger."""
    group: list[Entry] = []
    for e in entries:
        if group and sum(g.nbytes for g in group) + e.nbytes > shard_bytes:
            yield group
            group = []
        group.append(e)
    if group:
        yield group
