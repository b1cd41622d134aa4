"""`mlx-sf classes`: the classes that a checkpoint can draw, by number, WordNet id and name."""

import json

import click

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MlxSfError
from ..sampling.class_names import ClassNames
from .options import ckpt_options, named_checkpoint


@click.command(short_help="List the classes of a checkpoint, or find some by a word.")
@ckpt_options
@click.option("--find", help="List only the classes whose name, number or WordNet id holds this.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(
    ckpt: str | None,
    noise_scale: float | None,
    in_context_start: int | None,
    offline: bool,
    find: str | None,
    as_json: bool,
) -> None:
    """List the classes that a checkpoint can draw.

    `mlx-sf sample --classes` takes the number, the WordNet id, the whole name, or one of its synonyms if no other class
    has it.
    """
    checkpoint = Checkpoint(named_checkpoint(ckpt, noise_scale, in_context_start, offline))
    config = checkpoint.config
    if not config.model.num_classes:
        raise MlxSfError(f"{checkpoint.path}: draws from prompts, it has no classes: say what to draw in words")
    names = ClassNames.of(config.model.num_classes, config.class_names)
    rows = names.search(find or "")
    if not rows:
        names.find(find)  # says what is near
    if as_json:
        click.echo(json.dumps([{"class": i, "wnid": w, "name": n} for i, w, n in rows], indent=1, ensure_ascii=False))
        return
    for i, wnid, name in rows:
        click.echo("  ".join(filter(None, [f"{i:>4}", wnid, name])))
    if names.assumed:
        click.echo("The checkpoint names no classes: these are ImageNet's 1,000, in their usual order.", err=True)
