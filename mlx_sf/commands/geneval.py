"""`mlx-sf geneval`: pictures for GenEval, its score of a folder, and DPG-Bench's arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.pipeline import load
from ..checkpoints.text_encoder import EncoderPrecision, text_features
from ..common.world import World
from ..data.captioned_scenes import CAPTIONED_SCENES
from ..device.defaults import DTYPES, limit_cache, pick_dtype
from ..metrics.dpg import Aggregation, Dpg, dpg_score, read_answers, read_questions
from ..metrics.geneval import Share, Summary, summarise
from ..metrics.geneval_export import Export
from ..metrics.geneval_folder import named_prompts, read_detections, score_folder, write_results
from ..sampling.request import with_solver
from ..sampling.solvers import Method
from .options import ckpt_options, lora_options, named_checkpoint, text_encoder_options


@click.group(short_help="Draw GenEval's prompts, score pictures by its rules; DPG-Bench's scores from answers.")
def command() -> None:
    """Text to image, judged by GenEval's rules and by DPG-Bench's arithmetic."""


@command.command(short_help="Draw a prompt file into GenEval's folder layout.")
@click.argument("prompts")
@click.argument("folder", type=click.Path(path_type=Path))
@ckpt_options
@click.option("--weights", help="Weight set of the checkpoint: model, ema1 or ema2. [default: ema1]")
@text_encoder_options
@click.option("--num-images", "-n", type=int, default=4, show_default=True, help="Pictures of each prompt.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Picture k of line i has seed SEED + 1000 i + k (from 0)."
)
@click.option(
    "--per-category",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help=f"Prompts of each category, of {CAPTIONED_SCENES}.",
)
@click.option(
    "--prompt-seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help=f"Seed of the descriptions of {CAPTIONED_SCENES}.",
)
@click.option("--steps", type=int, help="Steps of the solver. [default: the checkpoint's]")
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    help="Solver; multistep evaluates the network once a step, heun twice. [default: the checkpoint's, usually heun]",
)
@click.option("--cfg", type=float, help="Guidance scale; 1 means off. [default: the checkpoint's]")
@click.option(
    "--cfg-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Guide only where LOW < t < HIGH (t = 0 is noise). [default: the checkpoint's]",
)
@click.option("--shift", type=float, help="Above 1: more steps near the noise; 1 is off. [default: the checkpoint's]")
@click.option("--sample-t-eps", type=float, help="Lower bound of 1 - t in the velocity. [default: the training's]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Type of the products. [default: bfloat16 on a GPU]")
@lora_options
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Pictures drawn at a time. [default: 8, fewer where a picture has over 512 tokens]",
)
def export(
    prompts: str,
    folder: Path,
    ckpt: str | None,
    noise_scale: float | None,
    in_context_start: int | None,
    offline: bool,
    weights: str | None,
    text_encoder: str | None,
    text_encoder_precision: EncoderPrecision,
    num_images: int,
    seed: int,
    per_category: int,
    prompt_seed: int,
    dtype: str | None,
    lora_paths: tuple[str, ...],
    lora_scales: tuple[float, ...],
    batch_size: int | None,
    **solver: Any,
) -> None:
    """Draw the prompts of PROMPTS into FOLDER, as GenEval's evaluators want it.

    PROMPTS is a file of GenEval's JSON lines, or captioned-scenes, or captioned-scenes:unseen. An interrupted export is
    continued by the same command: pictures that are there are kept, and other settings are refused.
    """
    limit_cache()
    asked = named_prompts(prompts, per_category, prompt_seed)
    encoder = {"text_encoder": text_encoder, "text_encoder_precision": text_encoder_precision}
    plan = Export(folder, asked, num_images, seed, encoder)
    checkpoint = Checkpoint(named_checkpoint(ckpt, noise_scale, in_context_start, offline))
    with_solver(checkpoint.config.sample, solver)
    checkpoint.pick(weights)
    pick_dtype(dtype)
    world = World.join()
    texts = text_features(getattr(checkpoint.config.model, "text", None), text_encoder, text_encoder_precision)
    if texts is not None:
        texts.ensure([str(m["prompt"]).rstrip() for m in asked.values()])
        for note in texts.notes() if world.main else ():
            click.echo(f"note: {note}", err=True)
    pipeline = load(
        checkpoint, weights=weights, dtype=dtype, text_encoder=texts, lora_paths=lora_paths, lora_scales=lora_scales
    )
    drawn = plan.draw(pipeline.with_solver(solver), batch_size, world)
    if world.main:
        total = len(asked) * num_images
        kept = f", {total - drawn} were there" if drawn < total else ""
        click.echo(f"{folder}: {total} pictures of {len(asked)} prompts, {drawn} drawn{kept}")


@command.command(short_help="Score a folder of pictures by GenEval's rules.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--detections",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Detections made elsewhere, as JSON. [default: found by the detector for captioned scenes]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a verdict a picture, in the form of GenEval's own results.jsonl.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def score(folder: Path, detections: Path | None, results: Path | None, as_json: bool) -> None:
    """Score the pictures of FOLDER, laid out as GenEval's evaluators want it.

    Without --detections the pictures must be captioned scenes: their objects are found by their known colours and
    shapes. The intervals hold 95 % of bootstrap resamples of prompts.
    """
    scored = score_folder(folder, read_detections(detections) if detections is not None else None)
    if results is not None:
        write_results(results, scored, folder)
    summary = summarise([s.outcome for s in scored])
    click.echo(json.dumps(as_dict(summary), indent=1) if as_json else "\n".join(summary_lines(summary)))


@command.command(short_help="DPG-Bench's scores from the answers of a question-answering network.")
@click.argument("questions", type=click.Path(path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.option(
    "--aggregation",
    type=click.Choice(get_args(Aggregation)),
    default="pytorch",
    show_default=True,
    help="Whose way of adding up: pytorch is the published scorer's, jax that of MiniT2I's JAX code.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def dpg(questions: Path, answers: Path, aggregation: Aggregation, as_json: bool) -> None:
    """DPG-Bench's scores: QUESTIONS is its .csv, or JSON with the same fields; ANSWERS is JSON, item -> tiles.

    Each tile is an object of proposition -> answer, of which exactly "yes" holds.
    """
    result = dpg_score(read_questions(questions), read_answers(answers), aggregation)
    click.echo(json.dumps(asdict(result), indent=1) if as_json else "\n".join(dpg_lines(result)))


def summary_lines(s: Summary) -> list[str]:
    """GenEval's summary as a table, shares in percent."""

    def line(name: str, share: Share) -> tuple[str, str, str, str]:
        return name, f"{share.value:.2%}", f"{share.correct} / {share.count}", _between((share.low, share.high))

    rows = [line(name, share) for name, share in s.tags.items()]
    rows += [line("all pictures", s.images), line("prompts with any correct", s.prompts)]
    rows.append(("overall (mean over tags)", f"{s.overall:.5f}", "", _between(s.overall_interval)))
    return _table([("", "correct", "pictures", "95 % interval"), *rows])


def _between(interval: tuple[float | None, float | None] | None) -> str:
    low, high = interval or (None, None)
    return f"{low:.2%} to {high:.2%}" if low is not None and high is not None else ""


def as_dict(s: Summary) -> dict[str, Any]:
    """The summary for JSON, under the names of GenEval's own summary, with intervals."""

    def share(x: Share) -> dict[str, Any]:
        return {"correct": x.correct, "count": x.count, "score": x.value, "interval": [x.low, x.high]}

    return {
        "task_scores": {tag: share(x) for tag, x in s.tags.items()},
        "overall_score": s.overall,
        "overall_interval": s.overall_interval,
        "images": share(s.images),
        "prompts": share(s.prompts),
    }


def dpg_lines(d: Dpg) -> list[str]:
    """DPG-Bench's scores as a table, in percent."""
    rows = [("DPG-Bench", f"{d.score:.4f}"), ("pictures", str(len(d.items)))]
    rows += [(f"level 1: {name}", f"{v:.4f}") for name, v in d.level1.items()]
    rows += [(f"level 2: {name}", f"{v:.4f}") for name, v in d.level2.items()]
    return [*_table(rows), *(f"note: {item} is left out: {reason}" for item, reason in d.errors.items())]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return ["  ".join(cells).rstrip() for cells in aligned]
