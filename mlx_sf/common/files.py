"""Writing without harm: beside, flushed, then renamed, so that no reader ever sees half a file."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MlxSfError

MAX_JSON = 16 << 20  # bytes of a JSON file that describes weights


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is deleted when it does not.

    Whatever was at `path` stays until the new file is complete and on the disk. Raises `MlxSfError` where the folder
    cannot be written or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                os.fsync(folder)
            os.close(folder)
    except OSError as e:
        raise MlxSfError(
            f"{path}: cannot be written ({e.strerror or e}): free some space or choose another place"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse, before any work is done, a file path that could not be written. Makes the missing folders."""
    path = Path(path)
    if path.is_dir():
        raise MlxSfError(f"{path}: is a folder, want a file name")
    writable_folder(path.parent)


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder if it is missing and prove that files can be created in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex[:8]}.probe"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        raise MlxSfError(f"{path}: cannot write in this folder ({e.strerror or e}): choose another place") from e
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of another program holds; `MlxSfError` where it holds none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise MlxSfError(f"{path}: is larger than any such file: take another copy")
        data = json.loads(path.read_text())
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{path}: not valid JSON ({type(e).__name__}): download it again") from None
    if not isinstance(data, dict):
        raise MlxSfError(f"{path}: holds a {type(data).__name__}, want an object")
    return data


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: `MLX_SF_CACHE`, else `XDG_CACHE_HOME`/mlx-sf, else ~/.cache/mlx-sf."""
    if os.environ.get("MLX_SF_CACHE"):
        return Path(os.environ["MLX_SF_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-sf"


def hub_blob(path: Path) -> str | None:
    """The name of a file's content in the Hub's cache; None for a file elsewhere."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" else None


def file_identity(path: Path) -> list[str | int]:
    """What tells one version of a file from another: in the Hub's cache its content's name, elsewhere size and time."""
    if (blob := hub_blob(path)) is not None:
        return [path.name, blob]
    real = path.resolve()
    stat = real.stat()
    return [str(real), stat.st_size, stat.st_mtime_ns]
