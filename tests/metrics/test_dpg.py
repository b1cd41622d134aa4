"""DPG-Bench's arithmetic: equal to the published scorer's and to the JAX code's, oddities included."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.metrics.dpg import Question, dpg_score, read_answers, read_questions, tile_score
from tests.minit2i import SECOND

GOLDEN = json.loads((SECOND / "scores" / "dpg.json").read_text())
ROWS = GOLDEN["rows"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    with open(tmp_path / "questions.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path / "questions.csv"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    given = {
        i["item_id"]: [dict(zip(map(str, i["proposition_ids"]), tile, strict=True)) for tile in i["answers"]]
        for i in GOLDEN["items"]
    }
    (tmp_path / "answers.json").write_text(json.dumps(given))
    return tmp_path / "answers.json"


def test_scores_are_the_published_ones(questions: Path, answers: Path) -> None:
    asked, given = read_questions(questions), read_answers(answers)
    assert {item: [q.proposition for q in qs] for item, qs in asked.items()} == GOLDEN["propositions_kept"]
    got = dpg_score(asked, given)
    assert abs(got.score - GOLDEN["score"]) < 1e-12
    for mine, want in ((got.level1, GOLDEN["l1"]), (got.level2, GOLDEN["l2"])):
        assert set(mine) == set(want)
        assert all(abs(mine[name] - value) < 1e-12 for name, value in want.items())
    for item in GOLDEN["items"]:
        name = item["item_id"]
        if item["error"]:
            assert (name in got.errors, name in got.items) == (True, False)
            continue
        assert abs(got.items[name] - item["score"]) < 1e-12
        tiles = [tile_score(asked[name], tile) for tile in given[name]]
        assert tiles == pytest.approx(item["crop_scores"], abs=1e-12)
    assert got.errors == {"item0": "parent 1 is no question"}


def test_the_jax_way_of_adding_up(questions: Path, answers: Path) -> None:
    got, want = dpg_score(read_questions(questions), read_answers(answers), "jax"), GOLDEN["jax"]
    assert abs(got.score - 100 * want["score"]) < 1e-12
    assert got.items == pytest.approx(want["item_scores"], abs=1e-12)
    assert got.level2 == pytest.approx({k: 100 * v for k, v in want["category_scores"].items()}, abs=1e-11)
    assert not got.errors


def test_parents_are_looked_at_in_the_files_order() -> None:
    chain = [Question(1, (0,), "a"), Question(2, (1,), "a"), Question(3, (2,), "a")]
    answers = {1: "no", 2: "yes", 3: "yes"}
    assert tile_score(chain, answers) == 0
    assert tile_score(chain[::-1], answers) == pytest.approx(1 / 3)  # 3 sees its parent before that falls
    assert tile_score(chain, {1: "yes", 2: "Yes", 3: "yes"}) == pytest.approx(1 / 3)  # to the letter
    with pytest.raises(KeyError):
        tile_score(chain[1:], answers)
    assert tile_score(chain[1:], answers, missing_parents=True) == 0


def test_questions_as_json_lose_no_row(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    fields = ("proposition_id", "dependency", "category_broad", "category_detailed", "question_natural_language")
    nested: dict[str, Any] = {}
    for row in ROWS:
        item = nested.setdefault(row["item_id"], {"item_id": row["item_id"], "text": row["text"], "questions": []})
        item["questions"].append({name: row[name] for name in fields})
    (tmp_path / "nested.json").write_text(json.dumps(list(nested.values())))
    flat = read_questions(tmp_path / "rows.json")
    assert {item: [q.proposition for q in qs] for item, qs in flat.items()} == GOLDEN["propositions_all"]
    assert read_questions(tmp_path / "rows.jsonl") == flat == read_questions(tmp_path / "nested.json")


def test_the_command_prints_a_table_or_json(questions: Path, answers: Path, cli: Any) -> None:
    status, out, err = cli("geneval", "dpg", questions, answers)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].split() == ["DPG-Bench", f"{GOLDEN['score']:.4f}"]
    assert out.splitlines()[-1] == "note: item0 is left out: parent 1 is no question"
    status, out, _ = cli("geneval", "dpg", questions, answers, "--aggregation", "jax", "--json")
    assert abs(json.loads(out)["score"] - 100 * GOLDEN["jax"]["score"]) < 1e-12


@pytest.mark.parametrize(
    "rows, given, message",
    [
        ("[{]", "{}", "questions.json: is no JSON"),
        ("[]", "{}", "questions.json: holds no question, want rows with item_id"),
        ('[{"item_id": "a"}]', "{}", "questions.json: row 1 of data: has no dependency, want item_id"),
        (
            '[{"item_id": "a", "dependency": "x"}]',
            "{}",
            "questions.json: row 1 of data: cannot be read (invalid literal",
        ),
        ("[7]", "{}", "questions.json: row 1 of data: cannot be read"),
        (None, "[1", "answers.json: is no JSON"),
        (None, "[]", "answers.json: holds a list, want an object of item"),
        (
            None,
            '{"item1": []}',
            'answers.json: item item1: want one object of proposition -> answer a tile, {"1": "yes"}',
        ),
        (None, '{"item1": [["yes"]]}', "answers.json: item item1: want one object"),
        (None, '{"item1": [{"1": "yes"}]}', "item item1, tile 0: proposition 2 has no answer"),
        (None, '{"other": [{"1": "yes"}]}', "item other: has answers but no question"),
        (
            None,
            '{"item0": [{"2": "no", "3": "no", "4": "no", "5": "no", "6": "no"}]}',
            "no item is left to score: parent 1",
        ),
    ],
)
def test_what_is_wrong_is_one_line(rows: str | None, given: str, message: str, questions: Path, cli: Any) -> None:
    folder = questions.parent
    if rows is not None:
        questions = folder / "questions.json"
        questions.write_text(rows)
    (folder / "answers.json").write_text(given)
    status, out, err = cli("geneval", "dpg", questions, folder / "answers.json")
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    with pytest.raises(MlxSfError):
        dpg_score(read_questions(questions), read_answers(folder / "answers.json"))
