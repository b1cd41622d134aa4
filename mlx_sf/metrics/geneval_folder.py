"""GenEval's files: prompt files, the folder of pictures that its evaluators read, detections, results.

The folder holds, for line i of the prompt file (from 0, empty lines count), `{i:05d}/metadata.jsonl`, that line, and
its pictures `{i:05d}/samples/00000.png`, `00001.png` and so on. Other names in it are not looked at.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.files import replacing
from ..common.progress import Progress
from ..data.captioned_scenes import CAPTIONED_SCENES
from ..errors import MlxSfError, option
from ..formats.png import image_name
from .geneval import COLOURS, Detection, Metadata, Outcome, Rules, Verdict, judge, line_of, read_metadata
from .scene_detector import detect
from .scene_prompts import prompts as scene_prompts

METADATA = "metadata.jsonl"
Detections = Mapping[str, Sequence[Detection]]  # by a picture's path in the folder: "00000/samples/00000.png"


# ----------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: Path) -> dict[int, Metadata]:
    """A prompt file: line number (from 0) -> its metadata. Raises `MlxSfError` naming the line that is broken."""
    lines = _text(path, "a prompt file of GenEval, a JSON object a line").split("\n")
    found = {i: read_metadata(line, f"{path} line {i + 1}") for i, line in enumerate(lines) if line.strip()}
    if not found:
        raise MlxSfError(f"{path}: holds no prompt, want a JSON object with tag, include and prompt a line")
    return found


def named_prompts(name: str, per_category: int = 100, seed: int = 0) -> dict[int, Metadata]:
    """The prompts of a file, or of "captioned-scenes", "captioned-scenes:unseen" (see `scene_prompts.prompts`)."""
    source, _, split = name.partition(":")
    if source != CAPTIONED_SCENES:
        return read_prompts(Path(name).expanduser())
    return dict(enumerate(scene_prompts(split or "seen", per_category, seed)))


# ------------------------------------------------------------------------------------------------------ folder


@dataclass(frozen=True)
class Prompted:
    """Prompt `index` in a folder of GenEval, and the names of its pictures, relative to that folder."""

    root: Path
    index: int
    metadata: Metadata
    pictures: tuple[str, ...]


def prompt_folder(root: Path, index: int) -> Path:
    return root / f"{index:05d}"


def picture_name(index: int, k: int) -> str:
    """Picture k of prompt `index`, relative to the folder."""
    return f"{index:05d}/samples/{image_name(k)}"


def open_folder(root: Path) -> list[Prompted]:
    """The prompts of a folder, in order, each with its pictures.

    Raises `MlxSfError` for what is no such folder, for broken metadata, and for a prompt that lacks a picture which the
    others have.
    """
    if not root.is_dir():
        raise MlxSfError(f"{root}: no such folder, want one with 00000/{METADATA} and 00000/samples/00000.png")
    folders = sorted((p for p in root.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name))
    if not folders:
        raise MlxSfError(f"{root}: holds no prompt, want folders such as 00000 with {METADATA} and samples/00000.png")
    prompted = []
    for folder in folders:
        path = folder / METADATA
        metadata = read_metadata(_text(path, "the prompt's line of JSON"), str(path))
        names = [p.name for p in (folder / "samples").glob("*.png") if p.stem.isdigit()]
        pictures = tuple(f"{folder.name}/samples/{n}" for n in sorted(names))
        prompted.append(Prompted(root, int(folder.name), metadata, pictures))
    most = max(len(p.pictures) for p in prompted)
    for p, folder in zip(prompted, folders, strict=True):
        wanted = [f"{folder.name}/samples/{image_name(k)}" for k in range(max(most, 1))]
        if missing := next((name for name in wanted if name not in p.pictures), None):
            raise MlxSfError(f"{root / missing}: is missing: draw it, or take away its prompt {folder}")
    return prompted


def _read_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as e:  # Pillow raises many kinds
        raise MlxSfError(f"{path}: cannot be read as a picture ({e}): draw it again") from None


def _text(path: Path, want: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror or str(e) if isinstance(e, OSError) else f"is not UTF-8, byte {e.start}"
        raise MlxSfError(f"{path}: cannot be read ({reason}), want {want}") from None


# -------------------------------------------------------------------------------------------------- detections


def read_detections(path: Path) -> Detections:
    """Detections made elsewhere: a JSON object, picture -> list of {"class", "box", "score", "color"}.

    Pictures are named by their path in the folder. Boxes are [left, top, right, bottom] in pixels. "color" may be left
    out where no prompt asks for it. Raises `MlxSfError` naming the picture whose entry is broken.
    """
    try:
        values = json.loads(_text(path, "detections as JSON"))
    except (ValueError, RecursionError) as e:
        raise MlxSfError(f"{path}: is no JSON ({e}), want an object of picture -> detections") from None
    if not isinstance(values, dict):
        raise MlxSfError(f"{path}: holds a {type(values).__name__}, want an object of picture -> detections")
    return {name: [_detection(d, f"{path}: {name}") for d in _list(v, f"{path}: {name}")] for name, v in values.items()}


def _list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise MlxSfError(f"{where}: got {json.dumps(values)[:60]}, want a list of detections")
    return values


def _detection(values: Any, where: str) -> Detection:
    try:
        box, score, colour = [float(v) for v in values["box"]], float(values["score"]), values.get("color")
        if len(box) != 4 or not np.isfinite([*box, score]).all() or not isinstance(values["class"], str):
            raise ValueError
        if colour is not None and colour not in COLOURS:
            raise MlxSfError(f"{where}: color is {json.dumps(colour)[:60]}, want one of {', '.join(COLOURS)}")
    except (KeyError, TypeError, ValueError, AttributeError):
        want = '{"class": a name, "box": [left, top, right, bottom], "score": 0 to 1, "color": optional}'
        raise MlxSfError(f"{where}: got {json.dumps(values)[:60]}, want {want}") from None
    return Detection(values["class"], (box[0], box[1], box[2], box[3]), score, colour)


# ----------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scored:
    """The verdict on one picture, named by its path in the folder."""

    picture: str
    metadata: Metadata
    verdict: Verdict

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.metadata["tag"], line_of(self.metadata), self.verdict.correct)


def score_folder(root: Path, detections: Detections | None = None, rules: Rules | None = None) -> list[Scored]:
    """Verdicts on all pictures of a folder, in order; without `detections` by `scene_detector.detect`.

    Raises `MlxSfError` for what is no such folder, and for a picture that is missing, damaged, or without detections.
    """
    return list(_scores(open_folder(root), detections, rules or Rules()))


def _scores(prompted: Sequence[Prompted], detections: Detections | None, rules: Rules) -> Iterator[Scored]:
    with Progress(sum(len(p.pictures) for p in prompted), "scoring", "pictures") as bar:
        for p in prompted:
            for name in p.pictures:
                if detections is None:
                    found: Sequence[Detection] = _detected(p.root / name)
                elif name in detections:
                    found = detections[name]
                else:
                    raise MlxSfError(
                        f"{p.root / name}: has no entry in {option('detections')}: add {name}, [] for none"
                    )
                try:
                    yield Scored(name, p.metadata, judge(p.metadata, found, rules))
                except MlxSfError as e:
                    raise MlxSfError(f"{p.root / name}: {e.message}") from None
                bar.update()


def _detected(path: Path) -> list[Detection]:
    picture = _read_picture(path)
    try:
        return detect(picture)
    except MlxSfError as e:
        raise MlxSfError(f"{path}: {e.message}") from None


def write_results(path: Path, scored: Sequence[Scored], root: Path) -> None:
    """The file that GenEval's evaluator writes and its summary reads: a JSON object a picture."""
    lines = [
        json.dumps(
            {
                "filename": str(root / s.picture),
                "tag": s.metadata["tag"],
                "prompt": s.metadata["prompt"],
                "correct": s.verdict.correct,
                "reason": s.verdict.reason,
                "metadata": line_of(s.metadata),
                "details": json.dumps({n: [[*d.box, d.score] for d in ds] for n, ds in s.verdict.kept.items()}),
            }
        )
        for s in scored
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
