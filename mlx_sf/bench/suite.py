"""Everything that `mlx-sf bench` measures in one go, each part in a process of its own: a record and a table."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import MlxSfError
from ..files import replacing

Record = dict[str, Any]
# the sub-commands with their options; {out} is the folder of the results
PARTS: dict[str, list[str]] = {
    "forward": ["forward"],
    "sample": ["sample", "--batch-size", "4"],
    "train": ["train"],
    "forcing": ["forcing"],
    "fid": ["fid"],
    "convert": ["convert"],
    "profile-sample": ["profile", "sample"],
    "profile-train": ["profile", "train"],
    "quantize": ["quantize"],
    "memory": ["memory"],
    "solvers": ["solvers", "--output", "{out}/solvers.png"],
}
DEFAULT = ("forward", "sample", "train", "forcing", "fid", "convert", "profile-sample", "profile-train")


def chosen(text: str) -> list[str]:
    """Names of parts from a list with commas; "all" is all of them."""
    names = list(PARTS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise MlxSfError(f"--suite has {name!r}, want some of {', '.join(PARTS)}, with commas between, or all")
    return names


def run_suite(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Record]]:
    """Measure the parts one after another; a record each, with an "error" where one did not get through.

    Everything measured so far lies in `folder`/bench.json at any time.
    """
    done: dict[str, Record] = {}
    for name in names:
        arguments = [a.format(out=folder) for a in PARTS[name]]
        command = [sys.executable, "-m", "mlx_sf.cli", "bench", *arguments, "--json"]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        try:
            done[name] = json.loads(ended.stdout)
        except ValueError:
            done[name] = {"error": f"ended with status {ended.returncode}"}
        done[name]["command"] = "mlx-sf bench " + " ".join(arguments)
        with replacing(folder / "bench.json") as temporary:
            temporary.write_text(json.dumps(done, indent=1))
        yield name, done[name]


def table(records: dict[str, Record]) -> list[str]:
    """Markdown: a row per part that has a single figure; profiles, memory and precision print tables of their own."""
    lines = ["| what | mlx-sf | PyTorch | ratio | share of product rate | peak memory |", "|---|---|---|---|---|---|"]
    for name, record in records.items():
        if name in _ROWS and "error" not in record:
            lines.append("| " + " | ".join(_ROWS[name](record)) + " |")
    return lines


def _timed(r: Record) -> list[str]:
    other = f"{r['torch_seconds']:.2f} s ({r['torch_spread']})" if "torch_seconds" in r else ""
    ratio = f"{r['torch_over_mlx']:.2f}" if "torch_over_mlx" in r else ""
    share = f"{r['share_of_product_rate']:.0%}" if "share_of_product_rate" in r else ""
    ours = f"{r['mlx_seconds']:.2f} s ({r['mlx_spread']})"
    return [r["what"], ours, other, ratio, share, f"{r['mlx_peak_bytes'] / 1e9:.2f} GB"]


def _forcing(r: Record) -> list[str]:
    times, shared = (f"{1000 * r[f'forcing_{k}_seconds']:.1f} ms" for k in ("per_image", "shared"))
    of = " and ".join(f"{r[f'share_of_forward_{k}']:.2%}" for k in ("per_image", "shared"))
    share = f"{r['share_of_product_rate']:.0%}"
    return [
        f"forcing, {r['what']}: a time per image, shared",
        f"{times}, {shared}: {of} of a forward",
        "",
        "",
        share,
        "",
    ]


def _fid(r: Record) -> list[str]:
    def rate(name: str) -> str:
        key = f"{name}_images_per_second"
        return f"{r[key]:.1f} images/s ({r[f'{name}_spread']})" if key in r else ""

    ratio = f"{r['speed_over_peer']:.2f}" if "speed_over_peer" in r else ""
    memory = f"{r['network_peak_bytes'] / 1e9:.2f} GB"
    return ["FID features, 256 x 256 pictures", rate("mlx_sf"), rate("torch_fidelity"), ratio, "", memory]


def _convert(r: Record) -> list[str]:
    return ["converting a checkpoint", f"{r['seconds']:.1f} s", "", "", "", f"{r['peak_bytes'] / 1e9:.2f} GB"]


_ROWS: dict[str, Callable[[Record], list[str]]] = {
    "forward": _timed,
    "sample": _timed,
    "train": _timed,
    "forcing": _forcing,
    "fid": _fid,
    "convert": _convert,
}
