"""Every download of weights from the Hugging Face Hub: only weights and JSON, and nothing of it is executed.

The client's own environment variables hold: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, and those of its progress.
"""

import errno
import glob
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.files import MAX_JSON, sha256
from ..common.progress import tell
from ..common.text import first_line
from ..errors import MlxSfError
from ..formats.orbax import ORBAX_MANIFEST
from .names import HubName

WEIGHTS = (".safetensors", ".npz", ".pth")
COMPONENTS = ("transformer", "generator", "checkpoint")  # folders that hold the network inside a model's folder
_INDEX = ".safetensors.index.json"
_DESCRIPTIONS = ("config.json", "model_index.json", "scheduler_config.json")


@dataclass(frozen=True)
class Listing:
    """What a repository holds at a commit: sizes by path, SHA-256 of large files. `local` is its snapshot here."""

    name: HubName
    commit: str
    sizes: dict[str, int]
    sha256: dict[str, str]
    local: Path | None = None

    def models(self) -> dict[str, list[str]]:
        """Model -> its files: a folder of weights (around its component), or a file that is one of several."""
        folders: dict[str, list[str]] = {}
        found: dict[str, list[str]] = {}
        for path in self.sizes:
            if path.endswith(WEIGHTS) and within(path, self.name.path):
                folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
            elif _is_orbax(path) and within(path, self.name.path):
                folder = str(PurePosixPath(path).parent).removesuffix(".")
                found[_model_folder(folder)] = [path, *(p for p in self.sizes if within(p, folder) and p != path)]
        for folder, weights in folders.items():
            index = [p for p in self.sizes if str(PurePosixPath(p).parent) == folder and p.endswith(_INDEX)]
            sharded = [w for w in weights if "-of-" in PurePosixPath(w).name]
            single = [w for w in weights if w not in sharded]
            root = _model_folder(folder)
            if index and sharded:
                found[root] = sharded + index
            elif len(variants(single)) == 1:
                found[root] = variants(single)
            else:
                found |= {w: [w] for w in single}
        return found

    def size(self, files: Iterable[str]) -> int:
        return sum(self.sizes[f] for f in files)


@dataclass(frozen=True)
class Fetched:
    """A model in the cache: its file of weights or the index of its shards, and where it came from."""

    path: Path
    name: HubName
    commit: str


def within(path: str, place: str) -> bool:
    """Whether a path is `place`, or inside it; "" is everywhere."""
    return place in ("", path) or path.startswith(place + "/")


def _is_orbax(path: str) -> bool:
    """Whether a file marks an Orbax folder; those of single processes are parts of one."""
    parts = PurePosixPath(path).parts
    return parts[-1] == ORBAX_MANIFEST and not any(p.startswith("ocdbt.process_") for p in parts)


def variants(weights: list[str]) -> list[str]:
    """The one file of those that hold the same weights in other types: `x.safetensors`, not `x.fp16.safetensors`."""
    stems = {PurePosixPath(w).name.split(".")[0] for w in weights if w.endswith(".safetensors")}
    if len(weights) > 1 and len(stems) == 1 and all(w.endswith(".safetensors") for w in weights):
        return [min(weights, key=len)]
    return weights


def _model_folder(folder: str) -> str:
    path = PurePosixPath(folder)
    root = path.parent if path.name in COMPONENTS else path
    return "" if str(root) == "." else str(root)


def listing(name: HubName) -> Listing:
    """What a repository holds, asked from the Hub; from the cache where there is no network or none is wanted."""
    from huggingface_hub import HfApi, constants

    _quiet()
    if constants.HF_HUB_OFFLINE:
        return _cached_listing(name, "offline")
    api = HfApi()

    def ask() -> Listing:
        commit = str(api.model_info(name.repo, revision=name.revision).sha)
        sizes, digests = {}, {}
        for entry in api.list_repo_tree(name.repo, recursive=True, revision=commit):
            path, size, lfs = entry.path, getattr(entry, "size", None), getattr(entry, "lfs", None)
            if size is None or path.startswith("/") or "\\" in path or ".." in path.split("/"):
                continue  # a folder; or a path that would leave the cache
            sizes[path] = size
            if lfs is not None:
                digests[path] = str(lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256)
        return Listing(name, commit, sizes, digests)

    return _told(ask, name, lambda reason: _cached_listing(name, reason))


def fetch(name: HubName, also: Sequence[str] = (), copies: int = 2) -> Fetched:
    """Fetch the one model that a name means; only its weights and the JSON beside them, `also` by their names.

    `copies` is how often it will lie on the disk: 2 where it is going to be converted.

    `MlxSfError` where the name means none or several, what is there is no network of ours, the Hub refuses, or the
    disk is too small; a file whose SHA-256 is not the Hub's is removed again.
    """
    found = listing(name)
    model, files = choose(found)
    wanted = [*files, *_described_by(found, model, also)]
    weights = next((f for f in files if f.endswith(_INDEX)), files[0])
    where = HubName(name.repo, model, name.revision)
    if found.local is not None:
        return Fetched(found.local / weights, where, found.commit)
    here = {f: path for f in wanted if (path := _in_cache(name.repo, found.commit, f)) is not None}
    missing = [f for f in wanted if f not in here]
    if not missing:
        return Fetched(here[weights], where, found.commit)
    size = found.size(missing)
    _check_space(name, size, copies)
    tell(f"{name}: downloading {size / 1e6:,.1f} MB ({', '.join(PurePosixPath(f).name for f in files[:3])})")

    def download() -> Path:
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(f) for f in wanted]
        # by the revision's name, not the commit's: so the cache learns what `main` was, for days without a network
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns))

    folder = _told(download, name, None)
    for file in missing:
        want = found.sha256.get(file)
        if want is not None and sha256(folder / file) != want:
            (folder / file).resolve().unlink(missing_ok=True)
            (folder / file).unlink(missing_ok=True)
            raise MlxSfError(
                f"{name}: the SHA-256 of {file} is not the Hub's: damaged on its way and removed, try again"
            )
    return Fetched(folder / weights, where, folder.name)


def choose(found: Listing) -> tuple[str, list[str]]:
    """The only model of a listing and its files; `MlxSfError` says what there is where there is none, or several."""
    name, models = found.name, found.models()
    if len(models) == 1:
        return next(iter(models.items()))
    if models:
        told = ", ".join(f"{m or '.'} ({found.size(f) / 1e9:.2f} GB)" for m, f in sorted(models.items())[:12])
        raise MlxSfError(f"{name}: holds {len(models)} models, want one of {told}: name it as {name.repo}/NAME")
    inside = [p for p in found.sizes if within(p, name.path)]
    if name.path and not inside:
        places = sorted({p.split("/")[0] for p in found.sizes})
        raise MlxSfError(f"{name}: the repository has no {name.path}, it has {', '.join(places[:12])}")
    told = ", ".join(sorted(inside)[:5]) or "nothing"
    raise MlxSfError(f"{name}: holds no weights that this program reads ({' '.join(WEIGHTS)}), found {told}")


def _described_by(found: Listing, model: str, also: Sequence[str] = ()) -> list[str]:
    """The JSON that says what a model is: beside its weights, and one folder around them."""
    places = {model, *(f"{model}/{c}".strip("/") for c in (*COMPONENTS, "scheduler"))}
    if found.sizes.get(model) is not None:  # a file: its own folder, and around that if it is a component's
        folder = str(PurePosixPath(model).parent).removesuffix(".")
        places = {folder, _model_folder(folder), f"{_model_folder(folder)}/scheduler".strip("/")}
    wanted = {f"{place}/{n}".strip("/") for place in places for n in (*_DESCRIPTIONS, *also)}
    return sorted(p for p in wanted if p in found.sizes and found.sizes[p] < MAX_JSON)


# ------------------------------------------------------------------------------------------------ the cache


def cached(repo: str, path: str) -> Path | None:
    """The newest copy of a place of a repository that is in the cache with weights; None where there is none."""
    for snapshot in sorted((_cache_of(repo) / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        place = snapshot / path
        if place.is_file() or any(p.name.endswith(WEIGHTS) or p.name == ORBAX_MANIFEST for p in _files(place)):
            return place
    return None


def _cache_of(repo: str) -> Path:
    """The folder of a repository in the client's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else iter(())


def _in_cache(repo: str, commit: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _cached_listing(name: HubName, why: str) -> Listing:
    """What the cache holds of a repository. The client itself refuses one of which only some models were fetched."""
    place = _cache_of(name.repo)
    ref = place / "refs" / name.revision
    folder = place / "snapshots" / (ref.read_text().strip() if ref.is_file() else name.revision)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in _files(folder)}
    if not any((p.endswith(WEIGHTS) or _is_orbax(p)) and within(p, name.path) for p in sizes):
        raise MlxSfError(
            f"{name}: no file or folder here, is not in the cache, and there is no network ({why}): go online once"
        )
    if why != "offline":
        tell(f"{name}: no network ({why}): taking the copy of commit {folder.name[:12]} from the cache")
    return Listing(name, folder.name, sizes, {}, folder)


def _check_space(name: HubName, size: int, copies: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if copies * size > free:
        conversion = " with its conversion" if copies > 1 else ""
        raise MlxSfError(
            f"{name}: needs {copies * size / 1e9:,.1f} GB{conversion}, {place} has {free / 1e9:,.1f} GB left: "
            "free some space, or set HF_HOME and MLX_SF_CACHE to folders on a larger disk"
        )


# ------------------------------------------------------------------------------------------------ what goes wrong


def _told(ask: Callable[[], Any], name: HubName, without_network: Callable[[str], Any] | None) -> Any:
    """The answer of the Hub, or one line that says why there is none; without a network, what the cache holds."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise MlxSfError(
            f"{name}: its authors ask for consent: accept the terms on the repository's page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MlxSfError(
            f"{name}: no file or folder here, and no repository {name.repo} on the Hub, or it is private: "
            "check the name, or `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise MlxSfError(f"{name}: {name.repo} has no branch, tag or commit {name.revision!r}") from None
    except errors.HFValidationError:
        raise MlxSfError(f"{name}: {name.repo!r} cannot be the name of a repository, want org/name") from None
    except MlxSfError:
        raise
    except Exception as e:  # the disk; or the client's own transport, httpx or requests, which is its business
        # before 1.0 the client's "not here, and no network" was an answer of the Hub, too
        if isinstance(e, errors.HfHubHTTPError) and not isinstance(e, errors.LocalEntryNotFoundError):
            raise MlxSfError(f"{name}: the Hub refuses ({_reason(e)}): try again later") from None
        if isinstance(e, OSError) and e.errno is not None and e.filename is not None:
            raise MlxSfError(f"{name}: cannot be stored in {e.filename} ({e.strerror}): free some space") from None
        if isinstance(e, OSError) and e.errno in _FULL:
            raise MlxSfError(f"{name}: cannot be stored ({e.strerror}): free some space, or set HF_HOME") from None
        if without_network is not None:
            return without_network(_reason(e))
        raise MlxSfError(
            f"{name}: the download broke off ({_reason(e)}): try again, it goes on where it stopped"
        ) from None


_FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


def _reason(e: Exception) -> str:
    return first_line(e).rstrip(".:")


def _quiet() -> None:
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not for our user: one line says it all
