"""From what a user names to a checkpoint of mlx-sf: found here, fetched from the Hub, converted once into the cache."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..common.files import cache_folder, file_identity
from ..common.progress import Progress, tell
from ..errors import MlxSfError, option
from ..formats.orbax import ORBAX_MANIFEST, orbax_folder
from ..formats.shards import index_of
from ..formats.tensor_file import SUFFIXES, TensorFile
from ..models.bpe import FILES
from ..models.quantize import QuantizationConfig
from . import hub
from .checkpoint import step_files
from .convert import diffusers, jit, minit2i, sensenova_u1
from .convert.report import Report
from .known import U1S, Known, assumed, at, by_name, default_in
from .names import HubName, parse
from .u1_files import is_published

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Found:
    """What a name stands for: a checkpoint of mlx-sf ("own"), or one of others.

    Those are converted before use, but for SenseNova-U1 ("u1"), which is read where it lies.

    `where` names it in messages. `origin` is the place and commit of one from the Hub, `known` its row in the table.
    """

    path: Path
    kind: Literal["own", "torch", "diffusers", "orbax", "u1"]
    where: str
    folder: diffusers.Folder | None = None
    known: Known | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def assumed(self) -> dict[str, tuple[Any, str]]:
        """Settings that its files need not say, because it is a known model."""
        return assumed(self.known.settings) if self.known else {}

    def files(self) -> list[Path]:
        """What a conversion reads."""
        if self.kind == "orbax":
            return sorted(p for p in self.path.rglob("*") if p.is_file())
        return [self.path] if self.folder is None else list(self.folder.files())


def resolve(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint file of mlx-sf that `path` means.

    A file; a run's folder (its newest checkpoint); a folder or file in a layout of `convert`; a short name of `known`;
    a place on the Hugging Face Hub. What is foreign is converted once, into the cache. `settings` say what the files of
    a foreign checkpoint do not (noise_scale=2.0, in_context_start=4). Raises `MlxSfError` where nothing is found.
    """
    found = locate(path)
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    if found.kind in ("own", "u1"):
        if given:
            flag = option(next(iter(given)))
            raise MlxSfError(f"{found.where}: says its settings itself: leave out {flag}")
        return found.path
    return _converted(found, given)


def locate(path: str | os.PathLike[str]) -> Found:
    """What `path` means, fetched if it is on the Hub; nothing is converted."""
    name = hub_name(path)
    if name is None:
        return _at(Path(path).expanduser(), str(path))
    known = by_name(str(path))
    if known:
        tell(f"{path}: {name}")
    elif not name.path and (known := default_in(name.repo)):
        tell(f"{path}: holds several models, taking {known.path}: name another as {name.repo}/FOLDER")
        name = replace(name, path=known.path)
    # a SenseNova-U1 is used where it lies, all others are converted into a second copy
    copies = 1 if (known or at(name.repo, name.path)) in U1S else 2
    fetched = hub.fetch(name, also=FILES, copies=copies)
    origin = {"repo": str(HubName(fetched.name.repo, fetched.name.path)), "commit": fetched.commit}
    known = known or at(fetched.name.repo, fetched.name.path)
    return replace(_at(fetched.path, str(fetched.name)), known=known, origin=origin)


def hub_name(path: str | os.PathLike[str]) -> HubName | None:
    """The place on the Hub that `path` means, by a short name or its own; None where it is a file or folder here."""
    p, text = Path(path).expanduser(), str(path)
    if p.exists():
        return None
    known = by_name(text)
    return HubName(known.repo, known.path, known.revision or "main") if known else _hub_name(text, p)


def _hub_name(text: str, p: Path) -> HubName:
    # "runs/x.npz" is a path that is missing; "org/name/x.npz" may be on the Hub
    looks_local = p.suffix in (*SUFFIXES, *TORCH_SUFFIXES) and text.count("/") < 2
    local = looks_local or re.match(r"[./~]", text) is not None
    name = None if local else parse(text)
    if name is None:
        raise MlxSfError(
            f"{p}: no such file or folder (a Hugging Face repo is named org/name; `mlx-sf models` lists short names)"
        )
    return name


def _at(p: Path, where: str) -> Found:
    """What lies at a path that exists."""
    if p.is_dir():
        return _in_folder(p, where)
    if p.suffix in TORCH_SUFFIXES:
        return Found(p, "torch", where)
    if p.name == ORBAX_MANIFEST:
        return Found(p.parent, "orbax", where)
    if _is_foreign(p):
        if is_published(p):
            return Found(p, "u1", where)
        return Found(p, "diffusers", where, diffusers.find(p))
    return Found(p, "own", where)


def _is_foreign(p: Path) -> bool:
    """Whether a `.safetensors`, or an index of shards, is another program's. What is damaged is left to its reader."""
    try:
        if p.name.endswith(".index.json"):
            metadata = json.loads(p.read_text()).get("metadata")
            return not (isinstance(metadata, dict) and ("config" in metadata or metadata.get("format") == "mlx"))
        return p.suffix == ".safetensors" and TensorFile(p, foreign=True).text == ""
    except (MlxSfError, OSError, ValueError, AttributeError, RecursionError):
        return False


def _in_folder(p: Path, where: str) -> Found:
    if steps := step_files(p):
        return Found(steps[-1][1], "own", where)
    if (index := index_of(p)) is not None:
        return _at(index, where)
    if (p / "adapter_config.json").is_file():
        raise MlxSfError(f"{where}: is an adapter: name its model, and the adapter with {option('lora_paths')}")
    if (orbax := orbax_folder(p)) is not None:
        return Found(orbax, "orbax", where)
    if (folder := diffusers.find(p)) is not None:
        return Found(folder.weights, "diffusers", where, folder)
    several = [c.name for c in sorted(p.iterdir()) if c.is_dir() and diffusers.find(c) is not None]
    if (known := minit2i.default_folder(p)) in several:
        if len(several) > 1:
            tell(f"{where}: holds {len(several)} models, taking {known}: name another's folder")
        several = [known]
    if len(several) == 1:
        return _in_folder(p / several[0], f"{where}/{several[0]}")
    if several:
        told = ", ".join(several[:12])
        raise MlxSfError(f"{where}: holds {len(several)} models, want one of {told}: name its folder")
    found = sorted(f for f in p.rglob("*") if f.suffix in SUFFIXES)
    torch = sorted(f for f in p.rglob("*") if f.suffix in (".pth", ".pt"))
    if not found and len(torch) == 1:
        return Found(torch[0], "torch", where)
    if len(found) != 1:
        names = ", ".join(f.name for f in (found or torch)[:5]) or "none"
        raise MlxSfError(
            f"folder {where}: want exactly one .npz or .safetensors checkpoint, found {names}: name the file"
        )
    return _at(found[0], where)


# ------------------------------------------------------------------------------------------------ conversion


def _converted(found: Found, settings: Mapping[str, Any]) -> Path:
    """The converted copy in the cache of a foreign checkpoint, made if it is not there yet."""
    told = [file_identity(f) for f in found.files()]
    # the commit belongs to it: pictures say which one their weights came from
    key = json.dumps(
        [__version__, told, sorted(settings.items()), sorted(found.assumed.items()), sorted(found.origin.items())]
    )
    stem = re.sub(r"[^\w.-]+", "-", found.origin.get("repo", found.where).strip("/"))[-60:].strip("-.")
    target = cache_folder() / "converted" / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if target.is_file():
        return target
    with Progress(0, f"converting {found.where}", "tensors") as bar:

        def tick(done: int, total: int) -> None:
            bar.set_total(total)
            bar.update()

        report = convert_found(found, target, settings, tick)
    for line in (*taken(report), f"converted once, into {target}"):
        tell(f"{found.where}: {line}")
    return target


def convert_found(
    found: Found,
    target: str | os.PathLike[str],
    settings: Mapping[str, Any],
    on_tensor: Callable[[int, int], None] | None = None,
    dtype: str | None = None,
    quantization: QuantizationConfig | None = None,
    weights: Sequence[str] | None = None,
) -> Report:
    """Convert what was found, by its network and layout; `weights` choose among the sets of a `.pth`."""
    if found.kind == "u1":
        return sensenova_u1.convert(
            found.path, target, weights, dtype, settings, on_tensor, quantization, found.where, found.origin
        )
    if found.kind == "orbax" or minit2i.is_minit2i(found.path, found.folder):
        return minit2i.convert(
            found.path, found.folder, target, weights, dtype, settings, on_tensor, quantization, found.where,
            found.origin, found.assumed,
        )  # fmt: skip
    if found.folder is not None:
        if weights and list(weights) != ["model"]:
            raise MlxSfError(f"{found.where}: holds one weight set: leave out {option('weights')}")
        return diffusers.convert(
            found.folder, target, dtype, settings, on_tensor, quantization, found.where, found.origin
        )
    return jit.convert(
        found.path,
        target,
        weights,
        dtype or "float32",
        settings,
        on_tensor,
        quantization,
        found.assumed,
        found.where,
        found.origin,
    )


def taken(report: Report) -> list[str]:
    """What a conversion took from the table of known models, and what it left out, in words."""
    settings = report.origin.get("table")
    lines = [f"its files do not say, taken from the table of known models: {', '.join(settings)}"] if settings else []
    return lines + report.notes
