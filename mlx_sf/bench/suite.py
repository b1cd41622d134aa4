"""Everything that `mlx-sf bench` measures in one go, each part in a process of its own: a record and a table."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import replacing
from ..errors import MlxSfError, option
from . import tables
from .tables import TIMED, Table

Record = dict[str, Any]
# the sub-commands with their options; {out} is the folder of the results
PARTS: dict[str, list[str]] = {
    "forward": ["forward"],
    "sample": ["sample", "--batch-size", "4"],
    "train": ["train"],
    "forcing": ["forcing"],
    "fid": ["fid"],
    "t2i": ["t2i"],
    "t2i-memory": ["t2i-memory"],
    "convert": ["convert"],
    "profile-sample": ["profile", "sample"],
    "profile-train": ["profile", "train"],
    "quantize": ["quantize"],
    "quantize-demo": ["quantize", "--ckpt", "demo", "--batch-size", "16", "--no-speed"],
    "memory": ["memory"],
    "solvers": ["solvers", "--output", "{out}/solvers.png"],
}
DEFAULT = ("forward", "sample", "train", "forcing", "fid", "convert", "profile-sample", "profile-train")


def chosen(text: str | None) -> dict[str, list[str]]:
    """Parts from a list of their names with commas: "all" is all of them, None those that take minutes, not hours."""
    if text is None:
        names = list(DEFAULT)
    else:
        names = list(PARTS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise MlxSfError(f"{option('suite')} has {name!r}, want some of {known}, with commas between, or all")
    return {name: PARTS[name] for name in names}


def run_suite(
    parts: Mapping[str, Sequence[str]], folder: Path, docs: Path | None = None
) -> Iterator[tuple[str, Record]]:
    """Measure the parts, command lines by name, one after another.

    Yields a record each, with an "error" where one did not get through. Everything measured so far lies in
    `folder`/bench.json at any time. With `docs` each part also writes its pages there.
    """
    done: dict[str, Record] = {}
    for name, part in parts.items():
        arguments = [a.format(out=folder) for a in part]
        command = [sys.executable, "-m", "mlx_sf.cli", "bench", *arguments, "--json"]
        ended = subprocess.run(
            command + (["--write-docs", str(docs)] if docs else []), stdout=subprocess.PIPE, text=True
        )
        try:
            done[name] = json.loads(ended.stdout)
        except ValueError:
            done[name] = {"error": f"ended with status {ended.returncode}"}
        done[name]["command"] = "mlx-sf bench " + " ".join(arguments)
        with replacing(folder / "bench.json") as temporary:
            temporary.write_text(json.dumps(done, indent=1))
        yield name, done[name]


def table(records: Mapping[str, Record]) -> list[str]:
    """Markdown: a row per part that has a single figure; profiles, memory and precision print tables of their own."""
    rows = (_ROWS[name](record) for name, record in records.items() if name in _ROWS and "error" not in record)
    return Table(TIMED, tuple(rows)).markdown()


def failures(records: Mapping[str, Record]) -> list[str]:
    """The parts that did not get through, each with what is known of it."""
    return [f"{name} ({r['error']})" for name, r in records.items() if "error" in r]


_ROWS: dict[str, Callable[[Record], tuple[str, ...]]] = {
    "forward": tables.timed_row,
    "sample": tables.timed_row,
    "train": tables.timed_row,
    "forcing": tables.forcing_row,
    "fid": tables.fid_row,
    "convert": tables.convert_row,
}
