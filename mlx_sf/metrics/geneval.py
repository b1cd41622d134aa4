"""GenEval's arithmetic: from metadata and detections to verdicts, and from verdicts to scores.

Rules are those of its published scripts (`evaluate_images.py`, `summary_scores.py`), and so are the words of reasons.
A line of a prompt file is a JSON object: `tag`; `include`, clauses of `class` and `count`, perhaps with `color`, with
`position` as [relation, index of an earlier clause]; perhaps `exclude`, clauses of `class` and `count`; and `prompt`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import MlxSfError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Metadata = dict[str, Any]  # one line of a prompt file, checked by `check_metadata`


@dataclass(frozen=True)
class Detection:
    """One object that a detector found: `name` is its class, `score` its confidence, `colour` None where not known."""

    name: str
    box: Box
    score: float
    colour: str | None = None


@dataclass(frozen=True)
class Rules:
    """The published thresholds.

    A detection counts above the confidence `least`, in counting above `least_counting`; the best `most` of a class do.
    `overlap`: a detection is dropped if its box's intersection over union with a better one's reaches it; 1 drops none.
    `offset`: share of the sum of two boxes' sides by which centres may differ without a relation.
    """

    least: float = 0.3
    least_counting: float = 0.9
    most: int = 16
    overlap: float = 1.0
    offset: float = 0.1


RULES = Rules()


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked for; `reason` says what is wrong, `kept` what counted, by class."""

    correct: bool
    reason: str
    kept: Mapping[str, Sequence[Detection]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- metadata


def read_metadata(line: str, where: str) -> Metadata:
    """One line of a prompt file; `where` names it in messages. Raises `MlxSfError` for what GenEval could not score."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{where}: is no JSON ({e}), want an object with tag, include and prompt") from None
    return check_metadata(values, where)


def check_metadata(values: Any, where: str) -> Metadata:
    """`values` as metadata. Raises `MlxSfError` with `where`, what was found and what is wanted."""

    def require(ok: bool, name: str, got: Any, want: str) -> None:
        if not ok:
            raise MlxSfError(f"{where}: {name} is {json.dumps(got)[:80]}, want {want}")

    require(isinstance(values, dict), "the line", values, "a JSON object with tag, include and prompt")
    tag, include, exclude = values.get("tag"), values.get("include"), values.get("exclude", [])
    require(tag in TAGS, "tag", tag, "one of " + ", ".join(TAGS))
    require(isinstance(values.get("prompt"), str), "prompt", values.get("prompt"), "a text")
    for name, clauses in (("include", include), ("exclude", exclude)):
        require(isinstance(clauses, list), name, clauses, "a list of clauses")
        for i, clause in enumerate(clauses):
            at = f"{name} clause {i}"
            require(isinstance(clause, dict), at, clause, "an object with class and count")
            require(isinstance(clause.get("class"), str), f"{at}: class", clause.get("class"), "a name")
            count = clause.get("count")
            require(type(count) is int and count >= 1, f"{at}: count", count, "a whole number from 1")
            if name == "include" and "color" in clause:
                require(clause["color"] in COLOURS, f"{at}: color", clause["color"], "one of " + ", ".join(COLOURS))
            if name == "include" and "position" in clause:
                position = clause["position"]
                fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
                fits = fits and type(position[1]) is int and 0 <= position[1] < i
                require(fits, f"{at}: position", position, "[relation, index of an earlier clause]")
    require(bool(include or exclude), "include", include, "at least one clause")
    return dict(values)


def line_of(metadata: Metadata) -> str:
    """Metadata as a line of a prompt file. Pictures with the same line are pictures of the same prompt."""
    return json.dumps(metadata)


# ----------------------------------------------------------------------------------------------------- verdict


def relations(a: Box, b: Box, offset: float = RULES.offset) -> tuple[str, ...]:
    """How box a lies to box b: up to two of `RELATIONS`, in their order.

    Each axis of the distance of the centres is shortened by `offset` times the sum of the sides; a relation holds where
    what remains is over half of the unshortened distance.
    """
    boxes = np.array([a, b], np.float64).reshape(2, 2, 2)
    away = np.subtract(*boxes.mean(axis=1))
    sides = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    rest = np.sign(away) * np.maximum(np.abs(away) - offset * sides, 0)
    if (np.abs(rest) < 1e-3).all():
        return ()
    dx, dy = rest / np.linalg.norm(away)
    return tuple(r for r, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, whose sides are counted with one pixel more, as GenEval does."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    either = area(*a) + area(*b) - both
    return both / either if either else 0.0


def kept(detections: Sequence[Detection], tag: str, rules: Rules = RULES) -> dict[str, list[Detection]]:
    """The detections that count, by class and falling confidence."""
    least = np.float32(rules.least_counting if tag == "counting" else rules.least)
    found: dict[str, list[Detection]] = {}
    for name in dict.fromkeys(d.name for d in detections):
        of_class = [d for d in detections if d.name == name]
        scores = np.array([d.score for d in of_class], np.float32)  # as the detector's own
        order = [i for i in np.argsort(scores)[::-1] if scores[i] > least][: rules.most]
        chosen: list[Detection] = []
        for d in (of_class[i] for i in order):
            if rules.overlap >= 1 or all(overlap(c.box, d.box) < rules.overlap for c in chosen):
                chosen.append(d)
        if chosen:
            found[name] = chosen
    return found


def judge(metadata: Metadata, detections: Sequence[Detection], rules: Rules = RULES) -> Verdict:
    """GenEval's verdict on one picture.

    `metadata` is checked (`check_metadata`). Raises `MlxSfError` where a colour is asked for and a detection has none.
    """
    objects = kept(detections, metadata["tag"], rules)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        problem, found = _clause(clause, objects.get(clause["class"], []), groups, rules)
        if problem:
            reasons.append(problem)
        groups.append(None if problem else found)
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], len(objects.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {count}")
    return Verdict(not reasons, "\n".join(reasons), objects)


def _clause(
    clause: Mapping[str, Any], of_class: Sequence[Detection], groups: Sequence[list[Detection] | None], rules: Rules
) -> tuple[str, list[Detection]]:
    """What is wrong with an include clause ("" for nothing), and the detections that it found."""
    name, count = clause["class"], clause["count"]
    found = list(of_class[:count])
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}", found
    if "color" in clause:
        wanted, colours = clause["color"], [d.colour for d in found]
        if None in colours:
            raise MlxSfError(f"a detection of {name} has no color, but the prompt asks for one: add its color")
        if colours.count(wanted) < count:
            others = ", ".join(f"{colours.count(c)} {c}" for c in COLOURS if c in colours)
            return f"expected {wanted} {name}>={count}, found {colours.count(wanted)} {wanted}; and {others}", found
    if "position" in clause:
        wanted, target = clause["position"]
        group = groups[target]
        if group is None:
            return f"no target for {name} to be {wanted}", found
        for true in (relations(d.box, t.box, rules.offset) for d in found for t in group):
            if wanted not in true:
                return f"expected {name} {wanted} target, found {' and '.join(true)} target", found
    return "", found


# ----------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Outcome:
    """The verdict on one picture of a prompt. Pictures with the same `prompt` (a line's text) belong together."""

    tag: str
    prompt: str
    correct: bool


@dataclass(frozen=True)
class Share:
    """`correct` of `count`, with the bounds of its bootstrap interval where there is one."""

    correct: int
    count: int
    low: float | None = None
    high: float | None = None

    @property
    def value(self) -> float:
        return self.correct / self.count


@dataclass(frozen=True)
class Summary:
    """GenEval's summary. `overall` is the unweighted mean over the tags that are present."""

    tags: Mapping[str, Share]
    overall: float
    overall_interval: tuple[float, float] | None
    images: Share
    prompts: Share  # those with any correct picture


def summarise(outcomes: Sequence[Outcome], resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Summary:
    """Scores of all pictures, with percentile bootstrap intervals; `resamples` 0 leaves those out.

    A resample draws as many prompts of each tag, with all of their pictures. Raises `MlxSfError` for no outcome.
    """
    if not outcomes:
        raise MlxSfError("GenEval: got no picture, want one or more")
    by_prompt: dict[tuple[str, str], list[bool]] = {}
    for o in outcomes:
        by_prompt.setdefault((o.tag, o.prompt), []).append(o.correct)
    texts: dict[str, bool] = {}
    for o in outcomes:
        texts[o.prompt] = texts.get(o.prompt, False) or o.correct
    rng = np.random.default_rng(seed)
    # per prompt: correct pictures, pictures, whether any is correct, 1
    table = {
        tag: np.array([(sum(v), len(v), any(v), 1) for (t, _), v in by_prompt.items() if t == tag])
        for tag in dict.fromkeys(o.tag for o in outcomes)
    }
    drawn = {t: rows[rng.integers(len(rows), size=(resamples, len(rows)))].sum(axis=1) for t, rows in table.items()}

    def share(counts: np.ndarray, of: np.ndarray, column: int) -> Share:
        bounds = _interval(of[:, column] / of[:, column + 1], level)
        return Share(int(counts[column]), int(counts[column + 1]), *(bounds or (None, None)))

    totals, together = {t: rows.sum(axis=0) for t, rows in table.items()}, sum(drawn.values(), start=np.zeros((1, 4)))
    tags = {t: share(totals[t], drawn[t], 0) for t in table}
    counts = sum(totals.values(), start=np.zeros(4))
    counts[2:] = sum(texts.values()), len(texts)  # a text under two tags counts once
    per_tag = np.mean([d[:, 0] / d[:, 1] for d in drawn.values()], axis=0)
    return Summary(
        tags,
        float(np.mean([s.value for s in tags.values()])),
        _interval(per_tag, level),
        share(counts, together, 0),
        share(counts, together, 2),
    )


def _interval(values: np.ndarray, level: float) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
