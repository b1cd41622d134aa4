"""The system message that SenseNova-U1's published scripts put before every prompt: data of the model, not of ours.

A file of the user's; else the published text, read once from the authors' source file, which is parsed and never
executed, compared with its SHA-256, and kept in the cache.
"""

import ast
import hashlib
import os
import urllib.request
from pathlib import Path

from ..common.files import cache_folder, replacing
from ..common.text import first_line
from ..errors import MlxSfError, option

SHA256 = "97bc0d73e6f61b20689dd81ad2bcf9eb795a65de5d07dd2e2c01d16503f44492"
SOURCE = "https://raw.githubusercontent.com/OpenSenseNova/SenseNova-U1/main/src/sensenova_u1/models/neo_unify/utils.py"
_CONSTANT = "SYSTEM_MESSAGE_FOR_GEN"
_MOST_BYTES = 4 << 20
_SECONDS = 20


def system_message(path: str | os.PathLike[str] | None = None, source: str = SOURCE) -> tuple[str, list[str]]:
    """The system message of a file, or the published one, and what to tell the user of it.

    Where the published one cannot be had the text is "", which leaves the system message out. Raises `MlxSfError`
    where the file cannot be read.
    """
    if path is not None:
        text = _read(Path(path).expanduser())
        if _digest(text) == SHA256:
            return text, []
        # an editor's line break at the end is no part of the message
        if _digest(text.removesuffix("\n")) == SHA256:
            return text.removesuffix("\n"), []
        return text, [f"{path} is not the published system message (SHA-256 {SHA256[:12]}...): pictures differ by it"]
    kept = cache_folder() / "sensenova_u1" / "system_message.txt"
    if kept.is_file() and _digest(text := _read(kept)) == SHA256:
        return text, []
    try:
        text = _published(source)
    except (OSError, ValueError) as e:
        return "", [
            f"without the published system message, which could not be read ({first_line(e)}): pictures lack what the "
            f"model was trained to expect before a prompt; save it in a file and name that with "
            f"{option('system_message')}"
        ]
    with replacing(kept) as temporary:
        temporary.write_bytes(text.encode())
    return text, [f"system message read from {source}, into {kept}"]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as e:
        raise MlxSfError(f"{option('system_message')} {path}: cannot be read ({e.strerror or e})") from None
    except UnicodeDecodeError as e:
        raise MlxSfError(f"{option('system_message')} {path}: is not UTF-8 (byte {e.start + 1})") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _published(source: str) -> str:
    """The constant of the authors' source file. `OSError` or `ValueError` where it cannot be had."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise ValueError("offline")
    with urllib.request.urlopen(source, timeout=_SECONDS) as answer:
        data = answer.read(_MOST_BYTES)
    try:
        tree = ast.parse(data)
        found = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == _CONSTANT for t in node.targets)
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{source} cannot be parsed") from None
    if not found or not isinstance(found[0], str):
        raise ValueError(f"{source} holds no {_CONSTANT}")
    if _digest(found[0]) != SHA256:
        raise ValueError(f"{source} holds another text than the one this program knows")
    return found[0]
