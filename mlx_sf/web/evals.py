"""The Evaluate tab: the tables and figures that `mlx-sf eval` has written."""

import csv
import math
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.decode import BadPictureError, decode_picture
from ..errors import MlxSfError
from ..metrics.report import check_table
from . import words
from .desk import Desk

TABLE = "results.csv"
# (column of the table, what is shown, whether it is a number)
COLUMNS = (
    ("label", "what", False), ("fid", "FID", True), ("count", "pictures", True), ("is_mean", "IS", True),
    ("kid_mean", "KID", True), ("precision", "precision", True), ("recall", "recall", True),
    ("spectral", "spectral", True), ("cfg", "guidance", True), ("weights", "weights", False),
    ("method", "solver", False), ("steps", "steps", True), ("seed", "seed", True), ("samples", "of", False),
    ("reference", "against", False), ("time", "time", False),
)  # fmt: skip


def evaluate_tab(page: gr.Blocks, tab: gr.Tab, desk: Desk) -> None:
    """Build it. Endpoint: /evaluations."""
    said = gr.HTML(label="Evaluations", elem_id="evals-said")
    table = gr.Dataframe(
        headers=[shown for _, shown, _ in COLUMNS], interactive=False, wrap=True, max_height=520, show_search="filter",
        datatype=["number" if number else "str" for _, _, number in COLUMNS], buttons=["copy", "fullscreen"],
        label="Evaluations, the lowest FID first: a click on a heading sorts by it", elem_id="evals",
    )  # fmt: skip
    figures = gr.Gallery(
        label="Figures", columns=2, height="auto", object_fit="contain", interactive=False, format="png",
        buttons=["download", "fullscreen"],
    )  # fmt: skip
    again = gr.Button("Read again", size="sm")

    def evaluations() -> list[Any]:
        rows, remarks = read_tables(desk.evals)
        text = "; ".join(remarks) if remarks else ""
        if not rows and not remarks:
            text = f"No evaluation in {desk.evals} yet: mlx-sf eval writes there."
        return [words.note(text), rows, read_figures(desk.evals)]

    outputs = [said, table, figures]
    again.click(evaluations, [], outputs, api_name="evaluations", show_progress="hidden")
    for event in (tab.select, page.load):
        event(evaluations, [], outputs, api_visibility="private", show_progress="hidden")


def read_tables(folder: Path) -> tuple[list[list[Any]], list[str]]:
    """The rows of all tables in a folder of evaluations, the lowest FID first; and what could not be read."""
    rows: list[dict[str, str]] = []
    remarks = []
    for path in _inside(folder, TABLE):
        try:
            check_table(path)
            with open(path, newline="", encoding="utf-8") as f:
                rows += list(csv.DictReader(f))
        except MlxSfError as e:
            remarks.append(str(e))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            remarks.append(f"{path}: cannot be read ({e})")
    rows.sort(key=lambda row: _number(row.get("fid")) or math.inf)
    return [[_number(r.get(c)) if number else r.get(c) or "" for c, _, number in COLUMNS] for r in rows], remarks


def read_figures(folder: Path) -> list[tuple[Any, str]]:
    """The figures in a folder of evaluations with their names."""
    found = []
    for name in ("fid_is_over_cfg.png", "spectrum.png"):
        for path in _inside(folder, name):
            try:
                found.append((decode_picture(path), str(path.relative_to(folder))))
            except BadPictureError:
                continue
    return found


def _inside(folder: Path, name: str) -> list[Path]:
    """Files of this name in a folder and the folders in it; none that a link leads to from elsewhere."""
    root = folder.resolve()
    found = sorted([*folder.glob(name), *folder.glob(f"*/{name}")])
    return [p for p in found if p.is_file() and p.resolve().is_relative_to(root)]


def _number(text: str | None) -> float | int | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
