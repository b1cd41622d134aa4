"""GenEval's rules, its files, and pictures drawn for it: equal to the published scripts, continued, refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mlx_sf
from mlx_sf.data.captioned_scenes import CATEGORIES, SPLITS, CaptionedSceneSource, Description, SceneObject
from mlx_sf.errors import FieldError, MlxSfError
from mlx_sf.formats.png import read_metadata as settings_of
from mlx_sf.metrics.geneval import (
    COLOURS,
    RELATIONS,
    TAGS,
    Detection,
    Outcome,
    Rules,
    judge,
    line_of,
    overlap,
    read_metadata,
    relations,
    summarise,
)
from mlx_sf.metrics.geneval_export import Export
from mlx_sf.metrics.geneval_folder import named_prompts, read_prompts, score_folder
from mlx_sf.metrics.scene_prompts import metadata, prompts
from tests.minit2i import PLACES, SECOND, T2I

SCORES = json.loads((SECOND / "scores" / "geneval.json").read_text())


def detections(values: list[dict[str, Any]]) -> list[Detection]:
    return [Detection(d["cls"], tuple(d["box"]), d["score"], d["color"]) for d in values]


# ------------------------------------------------------------------------------------------------------- rules


def test_verdicts_are_the_published_ones() -> None:
    for image in SCORES["images"]:
        verdict = judge(read_metadata(json.dumps(image["metadata"]), "golden"), detections(image["detections"]))
        assert (verdict.correct, verdict.reason) == (image["correct"], image["reason"])
        assert {name: len(found) for name, found in verdict.kept.items()} == image["kept"]


def test_relations_and_overlaps_are_the_published_ones() -> None:
    for pair in SCORES["positions"]:
        assert sorted(relations(pair["a"], pair["b"])) == pair["relations"]
        assert abs(overlap(pair["a"], pair["b"]) - pair["iou"]) < 1e-12


def test_summaries_are_the_published_ones() -> None:
    one = [Outcome(i["metadata"]["tag"], line_of(i["metadata"]), i["correct"]) for i in SCORES["images"]]
    several = [Outcome(r["tag"], str(r["prompt"]), r["correct"]) for r in SCORES["several_samples"]["results"]]
    for outcomes, want in ((one, SCORES["summary"]), (several, SCORES["several_samples"]["summary"])):
        got = summarise(outcomes)
        assert abs(got.images.value - want["percent_correct_images"]) < 1e-12
        assert abs(got.prompts.value - want["percent_correct_prompts"]) < 1e-12
        assert abs(got.overall - want["overall_score"]) < 1e-12
        assert list(got.tags) == list(want["task_scores"])
        assert all(abs(got.tags[t].value - v) < 1e-12 for t, v in want["task_scores"].items())
    assert (summarise(one).images.count, summarise(one).prompts.count) == (60, 46)


def test_intervals_are_repeatable_and_hold_the_score() -> None:
    rng = np.random.default_rng(0)
    outcomes = [Outcome("colors", str(i), bool(rng.random() < 0.7)) for i in range(100) for _ in range(4)]
    first, again = summarise(outcomes), summarise(outcomes)
    assert first == again
    share = first.tags["colors"]
    assert share.low is not None
    assert share.high is not None
    assert share.low < share.value < share.high
    assert 0.05 < share.high - share.low < 0.15  # a binomial's would be 0.09
    assert summarise(outcomes, resamples=0).tags["colors"].low is None
    # pictures of one prompt that agree are no more evidence than one picture
    copies = [Outcome("colors", str(i // 4), i // 4 % 2 == 0) for i in range(80)]
    alone = summarise(copies[::4]).overall_interval
    assert summarise(copies).overall_interval == pytest.approx(alone)
    with pytest.raises(MlxSfError, match="got no picture"):
        summarise([])


def test_thresholds_are_strict_and_sixteen_of_a_class_count() -> None:
    one = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    box = (0.0, 0.0, 9.0, 9.0)
    assert not judge(one, [Detection("cat", box, float(np.float32(0.3)))]).correct  # as float32, the detector's type
    assert judge(one, [Detection("cat", box, 0.300001)]).correct
    many = {**one, "include": [{"class": "cat", "count": 17}]}
    verdict = judge(many, [Detection("cat", box, 0.95)] * 20)
    assert verdict.reason == "expected cat>=17, found 16"
    assert judge(one, [Detection("cat", box, 0.9)] * 3, Rules(overlap=0.5)).kept["cat"] == [Detection("cat", box, 0.9)]
    with pytest.raises(MlxSfError, match="a detection of cat has no color"):
        judge({**one, "include": [{"class": "cat", "count": 1, "color": "red"}]}, [Detection("cat", box, 0.9)])


coordinates = st.integers(0, 500).map(float)
boxes = st.tuples(coordinates, coordinates, st.integers(1, 200), st.integers(1, 200)).map(
    lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3])
)


@settings(max_examples=150, deadline=None)
@given(boxes, boxes, st.integers(-64, 64), st.sampled_from([0.25, 2.0, 8.0]))
def test_the_relation_rule(a: Any, b: Any, shift: int, scale: float) -> None:
    found = relations(a, b)
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    assert set(relations(b, a)) == {opposite[r] for r in found}
    assert len(found) <= 2
    assert not any(opposite[r] in found for r in found)
    assert relations(tuple(v + shift for v in a), tuple(v + shift for v in b)) == found
    assert relations(tuple(v * scale for v in a), tuple(v * scale for v in b)) == found
    turned = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    across = relations((a[1], a[0], a[3], a[2]), (b[1], b[0], b[3], b[2]))
    assert set(across) == {turned[r] for r in found}
    assert relations(a, a) == ()


# ---------------------------------------------------------------------------------------------------- metadata


@st.composite
def lines(draw: st.DrawFn) -> dict[str, Any]:
    include = []
    for i in range(draw(st.integers(1, 3))):
        clause: dict[str, Any] = {"class": draw(st.text(min_size=1)), "count": draw(st.integers(1, 5))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(COLOURS))
        if i and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, i - 1))]
        include.append(clause)
    values = {"tag": draw(st.sampled_from(TAGS)), "include": include, "prompt": draw(st.text())}
    return {**values, "exclude": [{"class": "a", "count": 2}]} if draw(st.booleans()) else values


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(lines())
def test_metadata_is_read_as_it_was_written(values: dict[str, Any]) -> None:
    assert read_metadata(line_of(values), "here") == values
    judge(values, [])


@settings(max_examples=150, deadline=None)
@given(
    lines(),
    st.sampled_from(("tag", "include", "exclude", "prompt", "class", "count", "color", "position")),
    json_values,
)
def test_broken_metadata_is_one_line_that_says_where(values: dict[str, Any], name: str, broken: Any) -> None:
    clause = name in ("class", "count", "color", "position")
    (values["include"][0] if clause else values)[name] = broken
    try:
        judge(read_metadata(json.dumps(values), "file line 7"), [])
    except MlxSfError as e:
        assert e.message.startswith("file line 7: ")
        assert "want " in e.message
        assert "\n" not in e.message


def test_metadata_of_captioned_scenes() -> None:
    star, ring = SceneObject("star", "orange"), SceneObject("ring", "blue")
    pair = Description((star, ring), "left of", "mist", "position")
    assert metadata(pair) == {
        "tag": "position",
        "include": [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]}],
        "prompt": "a star left of a ring",
    }
    three = Description((SceneObject("star", "red", 3),), "", "mist", "counting")
    assert metadata(three)["include"] == [{"class": "star", "count": 3}]
    assert metadata(three)["exclude"] == [{"class": "star", "count": 4}]
    both = metadata(Description((star, ring), "above", "mist", "color_attr"))
    assert [c["color"] for c in both["include"]] == ["orange", "blue"]
    assert TAGS == CATEGORIES
    for split in SPLITS:
        source, asked = CaptionedSceneSource((32, 32), seed=3, split=split), prompts(split, 5, 3)
        assert [m["prompt"] for m in asked] == [source.caption(i) for i in range(len(asked))]
        for i, m in enumerate(asked):
            assert read_metadata(line_of(m), "") == m
            true = [Detection(x.shape, x.box, 1.0, x.colour) for x in source.draw(i)[1]]
            assert judge(m, true).correct
            assert not judge(m, true[1:]).correct
    with pytest.raises(MlxSfError, match="split is 'test'"):
        named_prompts("captioned-scenes:test")
    with pytest.raises(MlxSfError, match="got 0 prompts of each category"):
        prompts("seen", 0)


# ----------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two true pictures of each of twelve captioned scenes, at 48 pixels."""
    source = CaptionedSceneSource((48, 48), seed=0, split="seen")
    for i, m in enumerate(prompts("seen", 2)):
        place = tmp_path / "drawn" / f"{i:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(line_of(m) + "\n")
        for k in range(2):
            Image.fromarray(source.draw(i)[0]).save(place / "samples" / f"{k:05d}.png")
    (tmp_path / "drawn" / "notes.txt").write_text("not looked at")
    return tmp_path / "drawn"


def test_a_folder_is_scored_by_the_detector_or_by_given_detections(folder: Path, tmp_path: Path, cli: Any) -> None:
    status, out, err = cli("geneval", "score", folder, "--json", "--results", tmp_path / "results.jsonl")
    assert (status, err) == (0, "")
    summary = json.loads(out)
    assert summary["overall_score"] == 1
    assert summary["overall_interval"] == [1, 1]
    assert summary["images"] == {"correct": 24, "count": 24, "score": 1, "interval": [1, 1]}
    assert {t: v["count"] for t, v in summary["task_scores"].items()} == dict.fromkeys(CATEGORIES, 4)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["correct"] for r in results] == [True] * 24
    assert results[3]["filename"] == f"{folder}/00001/samples/00001.png"
    assert json.loads(results[3]["metadata"]) == prompts("seen", 1)[1]

    names = [s.picture for s in score_folder(folder)]
    given_elsewhere = tmp_path / "detections.json"
    given_elsewhere.write_text(json.dumps({n: [] for n in names}))
    status, out, err = cli("geneval", "score", folder, "--detections", given_elsewhere)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == ["single_object", "0.00%", "0", "/", "4", "0.00%", "to", "0.00%"]
    assert out.splitlines()[-1].split() == ["overall", "(mean", "over", "tags)", "0.00000", "0.00%", "to", "0.00%"]


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / "00003/samples/00001.png").unlink(), "00003/samples/00001.png: is missing: draw it"),
        (lambda f: (f / "00003/samples/00001.png").write_bytes(b"x"), "00003/samples/00001.png: cannot be read as a"),
        (lambda f: (f / "00002/metadata.jsonl").unlink(), "00002/metadata.jsonl: cannot be read (No such file"),
        (lambda f: (f / "00002/metadata.jsonl").write_text('{"tag": '), "00002/metadata.jsonl: is no JSON"),
        (
            lambda f: (f / "00002/metadata.jsonl").write_bytes(b"\xff"),
            "00002/metadata.jsonl: cannot be read (is not UTF-8",
        ),
        (
            lambda f: (f / "00002/metadata.jsonl").write_text('{"tag": "texture", "include": []}'),
            '00002/metadata.jsonl: tag is "texture", want one of single_object, two_object',
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(break_it: Any, message: str, folder: Path, cli: Any) -> None:
    break_it(folder)
    status, out, err = cli("geneval", "score", folder)
    assert (status, out) == (1, "")
    assert err.startswith(f"mlx-sf: error: {folder}/{message}")
    assert err.count("\n") == 1


def test_what_is_wrong_with_files_is_one_line(folder: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "gap.jsonl").write_text("\n" + line_of(prompts("seen", 1)[0]) + "\n{\n")
    (tmp_path / "some.json").write_text(json.dumps({"00000/samples/00000.png": []}))
    box = {"class": "cat", "box": [1, 2, 3], "score": 1}
    (tmp_path / "box.json").write_text(json.dumps({"a.png": [box]}))
    (tmp_path / "colour.json").write_text(json.dumps({"a.png": [{**box, "box": [1, 2, 3, 4], "color": "mauve"}]}))
    (tmp_path / "list.json").write_text("[]")
    for arguments, message in (
        (("score", tmp_path / "none"), f"{tmp_path}/none: no such folder, want one with 00000/metadata.jsonl"),
        (("score", tmp_path / "empty"), f"{tmp_path}/empty: holds no prompt, want folders such as 00000"),
        (("score", folder, "--detections", tmp_path / "some.json"), "has no entry in --detections: add 00000/samples"),
        (("score", folder, "--detections", tmp_path / "box.json"), 'a.png: got {"class": "cat", "box": [1, 2, 3]'),
        (("score", folder, "--detections", tmp_path / "colour.json"), 'a.png: color is "mauve", want one of red'),
        (("score", folder, "--detections", tmp_path / "list.json"), "holds a list, want an object of picture"),
        (("export", tmp_path / "gap.jsonl", tmp_path / "x"), "gap.jsonl line 3: is no JSON"),
        (("export", tmp_path / "none.jsonl", tmp_path / "x"), "none.jsonl: cannot be read (No such file"),
        (("export", "captioned-scenes", tmp_path / "x", "-n", "0"), "--num-images is 0, want 1 to 1000"),
        (("export", "captioned-scenes", tmp_path / "x"), "draws classes, not prompts"),
    ):
        status, out, err = cli("geneval", *arguments)
        assert (status, out) == (1, ""), arguments
        assert message in err
        assert err.count("\n") == 1
    lines = (tmp_path / "gap.jsonl").read_text().splitlines()
    (tmp_path / "gap.jsonl").write_text("\n".join(lines[:2]))
    assert list(read_prompts(tmp_path / "gap.jsonl")) == [1]  # empty lines count


# ------------------------------------------------------------------------------------------------------ export


def test_an_export_is_continued_and_differs_in_nothing(tmp_path: Path, cli: Any) -> None:
    file, asked = tmp_path / "prompts.jsonl", prompts("unseen", 1)
    file.write_text("\n".join(["", *map(line_of, asked)]))
    model = ("--ckpt", PLACES["e2e"], "--text-encoder", T2I / "t5", "--steps", 2, "-n", 2, "--seed", 5)
    status, out, err = cli("geneval", "export", file, tmp_path / "a", *model)
    assert status == 0, err
    assert "8 pictures of 4 prompts, 8 drawn" in out
    pictures = sorted(str(p.relative_to(tmp_path / "a")) for p in tmp_path.glob("a/*/samples/*.png"))
    assert pictures == [f"{i:05d}/samples/{k:05d}.png" for i in range(1, 5) for k in range(2)]
    assert json.loads((tmp_path / "a/00002/metadata.jsonl").read_text()) == asked[1]
    facts = settings_of(tmp_path / "a/00002/samples/00001.png")
    assert (facts["prompt"], facts["seed"]) == (asked[1]["prompt"], 5 + 2 * 1000 + 1)

    whole = {p: (tmp_path / "a" / p).read_bytes() for p in pictures}
    kept = tmp_path / "a" / pictures[0]
    before = kept.stat().st_mtime_ns
    for p in pictures[1::2]:
        (tmp_path / "a" / p).unlink()
    status, out, _ = cli("geneval", "export", file, tmp_path / "a", *model, "--batch-size", 3)
    assert "4 drawn, 4 were there" in out
    assert kept.stat().st_mtime_ns == before
    for p, data in whole.items():
        (tmp_path / "old.png").write_bytes(data)
        with Image.open(tmp_path / "old.png") as old, Image.open(tmp_path / "a" / p) as new:
            assert np.abs(np.asarray(old).astype(int) - np.asarray(new)).max() <= 1

    for changed, message in (
        (("--steps", 3), "was begun with steps 2, not 3: repeat those settings, or name another folder"),
        (("--seed", 6), "was begun with seed 5, not 6"),
        (("-n", 3), "was begun with num_images 2, not 3"),
        (("--text-encoder-precision", "8-bit"), 'was begun with text_encoder_precision "float32", not "8-bit"'),
    ):
        status, _, err = cli("geneval", "export", file, tmp_path / "a", *model, *changed)
        assert status == 1
        assert message in err
    (tmp_path / "b" / "00000").mkdir(parents=True)
    status, _, err = cli("geneval", "export", file, tmp_path / "b", *model)
    assert "b/00000: was not drawn by this command" in err


def test_exports_from_python_refuse_other_models(tmp_path: Path) -> None:
    asked = dict(enumerate(prompts("seen", 1)))
    with pytest.raises(FieldError, match="num_images is 1001, want 1 to 1000"):
        Export(tmp_path, asked, 1001)
    with pytest.raises(MlxSfError, match="draws classes, not prompts"):
        Export(tmp_path / "x", asked).draw(mlx_sf.load())
    assert not (tmp_path / "x").exists()
