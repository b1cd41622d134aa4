"""DPG-Bench's arithmetic: from the answers of a question-answering network to scores.

The rules are those of the published scorer (`compute_dpg_bench.py`) and of MiniT2I's JAX version of it, which adds the
scores up differently (`Aggregation`). A picture is one tile, or four. Each question is one proposition about it; one
whose parent does not hold does not hold either.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..common.fields import choice
from ..errors import MlxSfError

Aggregation = Literal["pytorch", "jax"]
Tile = Mapping[int, str]  # proposition -> answer; "yes" holds, anything else does not


@dataclass(frozen=True)
class Question:
    """One proposition: the numbers of its `parents`, and its category ("attribute - color")."""

    proposition: int
    parents: tuple[int, ...]
    category: str


@dataclass(frozen=True)
class Dpg:
    """Scores in percent. `items` holds each picture's share (0 to 1), `errors` why others are left out.

    `level2` is by category ("relation - spatial"), `level1` by its first word; both before parents are looked at.
    """

    score: float
    level1: Mapping[str, float]
    level2: Mapping[str, float]
    items: Mapping[str, float]
    errors: Mapping[str, str]


# --------------------------------------------------------------------------------------------------- questions


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Questions of each item, in the file's order.

    A .csv file as published, whose first row of data the published scorer skips, and so does this; or JSON, an array or
    an object a line, of the same rows, or of rows with a list `questions`, where nothing is skipped. Raises
    `MlxSfError` naming the row that is broken.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise MlxSfError(f"{path}: cannot be read ({e}), want questions as .csv or JSON") from None
    if path.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(text)))[1:]
    else:
        rows = _json_rows(text, path)
    items: dict[str, list[Question]] = {}
    before = None
    for n, row in enumerate(rows, start=2 if path.suffix == ".csv" else 1):
        where = f"{path}: row {n} of data"
        nested = row.get("questions") if isinstance(row, dict) else None
        for question in nested if isinstance(nested, list) else [row]:
            whole = {**row, **question} if isinstance(row, dict) and isinstance(question, dict) else question
            item, asked = _question(whole, where)
            if item != before:
                items[item] = []  # as published: an item that comes again begins afresh
            before = item
            # a number that comes again keeps its place
            numbers = [q.proposition for q in items[item]]
            at = numbers.index(asked.proposition) if asked.proposition in numbers else len(numbers)
            items[item][at : at + 1] = [asked]
    if not items:
        raise MlxSfError(f"{path}: holds no question, want rows with item_id, proposition_id, dependency and tuple")
    return items


def _json_rows(text: str, path: Path) -> list[Any]:
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{path}: is no JSON ({e}), want an array of rows, or a row a line") from None


def _question(row: Any, where: str) -> tuple[str, Question]:
    try:
        parents = tuple(int(p) for p in str(row["dependency"]).split(","))
        if row.get("tuple"):
            category = str(row["tuple"]).split("(")[0].strip()
        else:
            category = f"{row['category_broad']} - {row.get('category_detailed') or ''}".strip()
        return str(row["item_id"]), Question(int(row["proposition_id"]), parents, category)
    except KeyError as e:
        raise MlxSfError(f"{where}: has no {e.args[0]}, want item_id, proposition_id, dependency and tuple") from None
    except (ValueError, TypeError, AttributeError) as e:
        raise MlxSfError(
            f"{where}: cannot be read ({e}), want whole numbers as proposition_id and dependency"
        ) from None


def read_answers(path: Path) -> dict[str, list[Tile]]:
    """Answers to each item's questions: a JSON object, item -> tiles, each an object of proposition -> answer.

    Raises `MlxSfError` naming the item that is broken.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise MlxSfError(f"{path}: cannot be read ({e}), want answers as JSON") from None
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{path}: is no JSON ({e}), want an object of item -> tiles") from None
    if not isinstance(values, dict) or not values:
        raise MlxSfError(f"{path}: holds a {type(values).__name__}, want an object of item -> tiles")
    answers: dict[str, list[Tile]] = {}
    for item, tiles in values.items():
        try:
            answers[item] = [{int(p): str(a) for p, a in tile.items()} for tile in tiles]
        except (ValueError, AttributeError, TypeError):
            answers[item] = []
        if not answers[item]:
            raise MlxSfError(f'{path}: item {item}: want one object of proposition -> answer a tile, {{"1": "yes"}}')
    return answers


# ------------------------------------------------------------------------------------------------------ scores


def tile_score(questions: Sequence[Question], answers: Tile, missing_parents: bool = False) -> float:
    """Share of propositions that hold in one tile, 0 to 1.

    Parents are looked at in the file's order, so that a parent listed later counts by its own answer alone. A parent
    that is no question raises `KeyError`; with `missing_parents` it does not hold.
    """
    holds = {q.proposition: float(answers[q.proposition] == "yes") for q in questions}
    for q in questions:
        for parent in q.parents:
            if parent and (holds.get(parent, 0.0) if missing_parents else holds[parent]) == 0:
                holds[q.proposition] = 0.0
                break
    return sum(holds.values()) / len(holds)


def dpg_score(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Tile]],
    aggregation: Aggregation = "pytorch",
) -> Dpg:
    """DPG-Bench's scores of all items with answers.

    `aggregation` "pytorch", as published: an item one of whose parents is no question is left out, and the categories
    look at an item's last tile only. "jax": such a parent does not hold, and the categories look at all tiles.
    Raises `MlxSfError` for an item without questions, a question without answer, and where no item is left.
    """
    choice("aggregation", aggregation, Aggregation)
    items: dict[str, float] = {}
    errors: dict[str, str] = {}
    level1: dict[str, list[float]] = {}
    level2: dict[str, list[float]] = {}
    for item, tiles in answers.items():
        asked = questions.get(item)
        if asked is None:
            raise MlxSfError(f"item {item}: has answers but no question: give the questions that it was asked")
        for n, tile in enumerate(tiles):
            if missing := [q.proposition for q in asked if q.proposition not in tile]:
                raise MlxSfError(f"item {item}, tile {n}: proposition {missing[0]} has no answer, want one for each")
        try:
            scores = [tile_score(asked, tile, aggregation == "jax") for tile in tiles]
        except KeyError as e:
            errors[item] = f"parent {e.args[0]} is no question"
            continue
        items[item] = sum(scores) / len(scores)
        for tile in tiles if aggregation == "jax" else tiles[-1:]:
            for q in asked:
                holds = float(tile[q.proposition] == "yes")
                level2.setdefault(q.category, []).append(holds)
                level1.setdefault(q.category.split("-")[0].strip(), []).append(holds)
    if not items:
        raise MlxSfError(
            "DPG-Bench: no item is left to score: " + (next(iter(errors.values())) if errors else "got none")
        )
    return Dpg(_percent(list(items.values())), _means(level1), _means(level2), items, errors)


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def _means(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: _percent(groups[name]) for name in sorted(groups)}
