"""Records of measurements: JSON files that say what was measured, when, with which version and on what machine.

A record lies in FOLDER/records/VERSION/NAME.json; `pages.py` renders all records of a folder to pages of Markdown.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..common.files import replacing, writable_folder
from ..device import blas
from ..device.defaults import describe, on_gpu, total_memory
from ..device.lanes import cores
from ..errors import MlxSfError
from .rates import product_rate


@dataclass(frozen=True)
class Record:
    """One measurement.

    Args:
        measurement: its kind, a key of `pages.MEASUREMENTS`.
        name: of its file; a measurement of the same name and version takes its place.
        version: of mlx-sf. date: ISO, or a year and month.
        machine: what it ran on, in words: processor, threads, BLAS, versions, product rate.
        command: the command line that measured it.
        runs: how often each figure was taken, and which of them is shown.
        result: what the command gives with --json; or {"tables": [...]}, for measurements that had no record.
        figure: file of its figure, from the folder of the pages; "" where it has none.
        remarks: paragraphs that belong under the tables.
    """

    measurement: str
    name: str
    version: str
    date: str
    machine: Mapping[str, str]
    command: str
    runs: str
    result: Mapping[str, Any]
    figure: str = ""
    remarks: tuple[str, ...] = ()


def new_record(measurement: str, command: str, runs: str, result: Mapping[str, Any], name: str | None = None) -> Record:
    """The record of something measured just now on this machine; `name` comes from the command and the threads."""
    threads = f"{cores()} thread{'s' if cores() > 1 else ''}"
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", f"{command.partition('bench ')[2]} {threads}".lower()).strip("-")
    rate = result.get("product_rate") or product_rate(mx.float32)
    machine = {
        "processor": processor(),
        "threads": threads,
        "memory": f"{total_memory() / 2**30:.0f} GiB",
        "system": platform.system(),
        **software(),
        "product rate": f"{rate / 1e9:.0f} GFLOP/s",
    }
    return Record(measurement, name, __version__, datetime.date.today().isoformat(), machine, command, runs, result)


def processor() -> str:
    """The device in words: a GPU's name, else the processor's kind."""
    if on_gpu():
        return describe()["device"]
    name = ""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else ""
    return f"{name or 'CPU'} ({platform.machine()})"


def software() -> dict[str, str]:
    """Names and versions of the libraries that compute: BLAS, MLX and, where it is installed, PyTorch."""
    library = Path(blas.in_use()).name  # a name, or the path of a library
    versions = {}
    for package in ("mkl", "mlx", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "mkl" in library:
        library = f"MKL {versions.get('mkl', '')}".strip()
    torch = {"PyTorch": versions["torch"]} if "torch" in versions else {}
    return {"BLAS": library, "MLX": versions.get("mlx", "unknown"), **torch}


def save(path: Path, record: Record) -> None:
    """Write a record as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Record:
    """The record in a file. `MlxSfError` where it is none."""
    try:
        data = json.loads(path.read_text())
        return Record(**{**data, "remarks": tuple(data.get("remarks", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise MlxSfError(f"{path}: is no record of a measurement ({e}): measure again") from None


def keep(folder: Path, record: Record) -> Path:
    """Write a record to its place among those of a folder."""
    path = folder / "records" / record.version / f"{record.name}.json"
    writable_folder(path.parent)
    save(path, record)
    return path


def kept(folder: Path) -> list[Record]:
    """All records of a folder: the newest version first, then by name."""
    found = [read(path) for path in sorted((folder / "records").glob("*/*.json"))]
    return sorted(found, key=lambda r: [-int(n) for n in re.findall(r"\d+", r.version)])
