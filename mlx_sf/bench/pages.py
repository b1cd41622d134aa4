"""Pages of results in Markdown, rendered from records alone: never written by hand, and the same for all versions."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import replacing, writable_folder
from . import tables
from .records import Record, keep, kept
from .solvers import plot_solvers
from .tables import Result, Table


def _rounds(r: Result) -> str:
    return f"{r['rounds']} by turns; the median, in brackets the fastest and the slowest"


def _fastest(r: Result) -> str:
    timed = r["speed"].get("rounds", 0)
    return "1 of the errors" + (f"; {timed} of the times, the fastest" if timed else "")


def _once(r: Any) -> str:
    return "1"


@dataclass(frozen=True)
class Measurement:
    """A kind of measurement: its page, its heading there, its tables, how often it runs, its figure if it has one."""

    page: str
    title: str
    tables: Callable[[Any], list[Table]]
    runs: Callable[[Any], str]
    draw: Callable[[Path, Any], None] | None = None


# in the order of their sections
MEASUREMENTS: dict[str, Measurement] = {
    "parity": Measurement("parity", "Golden numbers", tables.parity, _once),
    # no command measures this one, nor "quality" below: their records were written down once, for version 0.2
    "evaluation": Measurement("parity", "Features and scores of an evaluation", lambda r: [], _once),
    "forward": Measurement("speed", "A forward pass", tables.timed, _rounds),
    "sample": Measurement("speed", "Guided samples", tables.timed, _rounds),
    "train": Measurement("speed", "A training step", tables.timed, _rounds),
    "fid": Measurement("speed", "Features and distances of an evaluation", tables.fid, _rounds),
    "t2i": Measurement("speed", "Text to image", tables.t2i, _rounds),
    "convert": Measurement("speed", "Converting a checkpoint", tables.convert, _once),
    "profile": Measurement("speed", "Where the time of a step goes", tables.profile, _rounds),
    "memory": Measurement("memory", "Sampling and training", tables.memory, lambda r: "1 for each figure"),
    "t2i-memory": Measurement("memory", "Text to image", tables.t2i_memory, lambda r: "1 for each figure"),
    "solvers": Measurement(
        "solvers", "Distance to the pictures of 1,000 Heun steps", tables.solvers, _once, plot_solvers
    ),
    "quality": Measurement("solvers", "Quality of pictures", lambda r: [], _once),
    "quantize": Measurement("quantisation", "Precision, size and speed", tables.quantization, _fastest),
    "forcing": Measurement("forcing", "The operator alone", tables.forcing, _rounds),
}
# page -> title and what it holds, in one sentence
PAGES = {
    "parity": (
        "Is it really the same?",
        "The published code's numbers against this program's, as the tests compare them. A tolerance is 20 times the "
        "difference between a float32 and a float64 run of the reference, and at least 2e-5 of the array's largest "
        "magnitude.",
    ),
    "speed": ("Speed", "Times against PyTorch in the same process, by turns; ratios above 1 favour mlx-sf."),
    "memory": ("Memory", "Peak memory of sampling and training, each figure from a process of its own."),
    "solvers": ("Solvers", "How near each solver's pictures are to the exact ones, over evaluations of the network."),
    "quantisation": ("Fewer bits", "What 8 and 4 bits a weight cost in precision and time, and what they save."),
    "forcing": ("Spectral Forcing", "What the operator costs, alone and as a share of a forward pass."),
}


def publish(folder: Path, record: Record) -> list[Path]:
    """Keep a new record in a folder, with its figure, and write the folder's pages anew."""
    kind = MEASUREMENTS[record.measurement]
    if kind.draw is not None:
        figure = f"figures/{record.name}-{record.version}.png"
        writable_folder((folder / figure).parent)
        kind.draw(folder / figure, record.result)
        record = dataclasses.replace(record, figure=figure)
    keep(folder, record)
    return write_pages(folder)


def write_pages(folder: Path) -> list[Path]:
    """Render all records of a folder to its pages; returns the pages that have something to say."""
    written = []
    for name, text in rendered(kept(folder)).items():
        path = folder / f"{name}.md"
        with replacing(path) as temporary:
            temporary.write_text(text)
        written.append(path)
    return written


def rendered(records: Sequence[Record]) -> Mapping[str, str]:
    """Page -> its text, for the pages of which there are records."""
    shown = {page: [r for r in records if MEASUREMENTS[r.measurement].page == page] for page in PAGES}
    return {page: "\n".join(_page(page, own)) + "\n" for page, own in shown.items() if own}


def _page(page: str, records: Sequence[Record]) -> Iterator[str]:
    title, about = PAGES[page]
    yield f"# {title}"
    yield ""
    yield about
    yield ""
    yield "`mlx-sf bench ... --write-docs` writes this page from the files in `records/`."
    yield "[notes.md](notes.md) says what was tried and found."
    for measurement, kind in MEASUREMENTS.items():
        own = [r for r in records if r.measurement == measurement]
        if own:
            yield ""
            yield f"## {kind.title}"
        for record in own:
            yield from _section(record, kind)


def _section(r: Record, kind: Measurement) -> Iterator[str]:
    yield ""
    yield f"**Version {r.version}**, measured {r.date}: `{r.command}`"
    yield ""
    yield "; ".join(f"{name}: {value}" for name, value in r.machine.items()) + f"; runs: {r.runs}."
    ready = r.result.get("tables")
    for table in kind.tables(r.result) if ready is None else [_ready(t) for t in ready]:
        yield ""
        if table.caption:
            yield f"{table.caption}:"
            yield ""
        yield from table.markdown()
    if r.figure:
        yield ""
        yield f"![{kind.title}]({r.figure})"
    for remark in r.remarks:
        yield ""
        yield remark


def _ready(table: Mapping[str, Any]) -> Table:
    """A table that a record holds as it is."""
    return Table(tuple(table["columns"]), tuple(tuple(row) for row in table["rows"]), table.get("caption", ""))
