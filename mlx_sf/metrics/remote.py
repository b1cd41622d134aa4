"""Reference statistics by address: fetched once, kept under their SHA-256, checked each time they are used.

An address is a URL, or a file on the Hugging Face Hub: `hf://org/name/file.npz`, `hf://datasets/org/name/file.npz`.
`#sha256=HEX` behind it says what must be there.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..checkpoints.names import parse
from ..common.files import cache_folder, replacing, sha256, writable_folder
from ..common.progress import Progress, tell
from ..common.text import first_line
from ..errors import MlxSfError

_ATTEMPTS = 3
_WEB = ("http://", "https://")
_SUFFIX = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Place:
    """Where a reference lies: a file or folder here; of a fetched file also its address and SHA-256."""

    path: Path
    url: str | None = None
    sha256: str | None = None


def is_address(ref: str) -> bool:
    """Whether `ref` is no path: a URL, hf://..., or org/name/file.npz where there is no such file."""
    if os.path.exists(ref):  # which takes names of any length
        return False
    bare = ref.partition("#")[0]
    on_hub = bare.endswith(".npz") and bare.count("/") >= 2 and re.match(r"[./~]", bare) is None
    return ref.startswith((*_WEB, "hf://")) or on_hub


def fetch_reference(ref: str) -> Place:
    """The file of an address: from the cache if it is there and undamaged, else fetched.

    Raises `MlxSfError` where nothing can be fetched, where it is no `.npz`, and where its SHA-256 is not the one asked
    for, or not the one that the address had when it was first fetched.
    """
    address, pinned = _split(ref)
    root = cache_folder() / "references"
    index = root / "addresses" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"
    wanted = pinned or _remembered(index)
    name = re.sub(r"[^\w.-]+", "_", Path(urlsplit(address).path).name) or "reference.npz"
    if wanted is not None:
        path = root / wanted / name
        if path.is_file() and sha256(path) == wanted:
            return Place(path, address, wanted)
        if path.exists():
            tell(f"{path}: was changed or damaged, fetching it again")
    with tempfile.TemporaryDirectory(dir=writable_folder(root)) as folder, _disk_errors(root):
        new = Path(folder) / name
        if address.startswith(_WEB):
            _download(address, new)
        else:
            shutil.copyfile(_from_hub(address), new)
        got = sha256(new)
        _check(address, new, got, pinned, wanted)
        path = writable_folder(root / got) / name
        os.replace(new, path)
    with replacing(index) as kept:
        kept.write_text(json.dumps({"url": address, "sha256": got}))
    return Place(path, address, got)


def _check(address: str, new: Path, got: str, pinned: str | None, wanted: str | None) -> None:
    if not zipfile.is_zipfile(new):
        raise MlxSfError(f"{address}: what is there is no .npz file, want statistics with arrays mu and sigma")
    if pinned is not None and got != pinned:
        raise MlxSfError(f"{address}: what is there has SHA-256 {got}, not {pinned}")
    if wanted is not None and got != wanted:
        raise MlxSfError(
            f"{address}: has changed since it was first fetched (SHA-256 {wanted}, now {got}): "
            f"add #sha256={got} to take what is there now"
        )


def _split(ref: str) -> tuple[str, str | None]:
    address, mark, suffix = ref.partition("#")
    match = _SUFFIX.fullmatch(suffix)
    if mark and match is None:
        raise MlxSfError(f"{ref}: ends in #{suffix}, want #sha256= and 64 hexadecimal digits")
    return address, match[1].lower() if match else None


def _remembered(index: Path) -> str | None:
    """The SHA-256 that an address had when it was fetched; None where it was not, or what was noted is unreadable."""
    try:
        match = _SUFFIX.fullmatch(f"sha256={json.loads(index.read_text())['sha256']}")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return match[1] if match else None


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise MlxSfError(f"{root}: cannot be written ({e.strerror or e}): free some space, or set MLX_SF_CACHE") from e


def _download(url: str, path: Path) -> None:
    """Fetch a URL; a connection that breaks off is taken up again where the server can go on."""
    tag = ""  # of the version that is being fetched: a server goes on with that one only
    for attempt in range(_ATTEMPTS):
        have = path.stat().st_size if path.exists() else 0
        headers = {"User-Agent": "mlx-sf", **({"Range": f"bytes={have}-", "If-Range": tag} if have and tag else {})}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
                tag = answer.headers.get("ETag") or ""
                have = have if answer.status == 206 else 0
                length = answer.headers.get("Content-Length")
                total = None if length is None else have + int(length)
                _receive(answer, path, have, total)
            done = path.stat().st_size
            if total is None or done == total:
                return
            reason = f"{done} of {total} bytes came"
        except urllib.error.HTTPError as e:
            raise MlxSfError(f"{url}: the server answers {e.code} {e.reason}: check the address") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as e:
            reason = str(getattr(e, "reason", None) or e or type(e).__name__)
        if attempt + 1 == _ATTEMPTS:
            raise MlxSfError(f"{url}: cannot be downloaded ({reason}): try again, or download it by hand")


def _receive(answer: Any, path: Path, have: int, total: int | None) -> None:
    with (
        open(path, "ab" if have else "wb") as f,
        Progress((total or 0) >> 20, f"downloading {path.name}", "MiB") as bar,
    ):
        while part := answer.read(1 << 20):
            f.write(part)
            bar.update()


def _from_hub(address: str) -> Path:
    """The file in the Hub client's own cache, downloaded if it is not there."""
    from huggingface_hub import errors, hf_hub_download

    bare = address.removeprefix("hf://")
    kind = "dataset" if bare.startswith("datasets/") else "model"
    name = parse(bare.removeprefix("datasets/"))
    if name is None or not name.path:
        raise MlxSfError(f"{address}: names no file on the Hub, want hf://org/name/file.npz")
    where = address if address.startswith("hf://") else f"{address} is no file here, and on the Hub"
    try:
        return Path(hf_hub_download(name.repo, name.path, repo_type=kind, revision=name.revision))
    except errors.RepositoryNotFoundError:
        raise MlxSfError(
            f"{where}: no {kind} {name.repo} on the Hub, or it is private or asks for consent: check the name "
            "(a data set is hf://datasets/org/name/file.npz), or `hf auth login`"
        ) from None
    except errors.EntryNotFoundError as e:
        if isinstance(e, errors.LocalEntryNotFoundError):
            raise MlxSfError(f"{where}: is not in the cache, and the Hub cannot be reached: go online once") from None
        raise MlxSfError(f"{where}: the {kind} {name.repo} has no file {name.path}") from None
    except Exception as e:  # the client's own transport: httpx or requests, which of them is its business
        raise MlxSfError(f"{where}: cannot be downloaded ({first_line(e)}): try again") from None
