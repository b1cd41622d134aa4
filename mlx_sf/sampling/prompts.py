"""Prompts from the command line and from files: one a line, as text or as JSON."""

import json
import os
from pathlib import Path

from ..errors import MlxSfError

_MOST_BYTES = 64 << 20


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a UTF-8 file, one a line; empty lines are left out.

    A line that begins with "{" is JSON whose "prompt" counts, as in GenEval's files. `MlxSfError` names the first line
    that is broken.
    """
    p = Path(path).expanduser()
    try:
        if p.stat().st_size > _MOST_BYTES:
            raise MlxSfError(f"{path}: is larger than any file of prompts, want a text file with a prompt a line")
        data = p.read_bytes()
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror or e}), want a text file with a prompt a line") from None
    prompts = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        prompt = _prompt(line.removesuffix(b"\r"), f"{path} line {number}")
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise MlxSfError(f"{path}: holds no prompt, want a text file with a prompt a line")
    return prompts


def _prompt(line: bytes, where: str) -> str | None:
    try:
        text = line.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as e:
        raise MlxSfError(f"{where}: is not UTF-8 (byte {e.start + 1}): save the file as UTF-8") from None
    if not text.strip():
        return None
    if "\0" in text:
        raise MlxSfError(f"{where}: holds a zero byte: want a text file with a prompt a line")
    if not text.lstrip().startswith("{"):
        return text
    try:
        prompt = json.loads(text)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise MlxSfError(f'{where}: begins with {{ and is no JSON object with a "prompt": mend it, or leave it out')
    return prompt.rstrip()
