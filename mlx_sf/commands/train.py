"""`mlx-sf train`: its flags are the fields of `training.options.Options`."""

import dataclasses
import sys
import typing
from collections.abc import Callable
from typing import Any

import click
from tqdm import tqdm

from ..common.world import World
from ..device.defaults import limit_cache
from ..training.dry_run import dry_run
from ..training.options import KINDS, Options
from ..training.train import planned, train


def _flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """One flag per option. All default to None: only what was typed overrides a YAML file or a stored run."""
    for f in reversed(dataclasses.fields(Options)):
        kind, help_text = KINDS[f.name][0], f.metadata["help"]
        if f.default is not None and f.default is not False and "[default" not in help_text:
            help_text += f"  [default: {'on' if f.default is True else f.default}]"
        choices = [c for k in KINDS[f.name] for c in typing.get_args(k)]
        flag = f.name.replace("_", "-")
        names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
        option_type = click.Choice(choices) if choices else None if kind is bool else kind
        function = click.option(names, f.name, type=option_type, default=None, help=help_text)(function)
    return function


@click.command(short_help="Train a model on pictures, or on the built-in scenes.")
@click.option("--config", type=click.Path(), help="YAML file of options; flags win over it.")
@click.option("--resume", type=click.Path(), help="Folder of a run to continue, exactly where it was.")
@click.option("--dry-run", "dry", is_flag=True, help="Only say what the run needs: size, memory, time.")
@_flags
def command(config: str | None, resume: str | None, dry: bool, **options: Any) -> None:
    """Train a model on your pictures (--data), or on the built-in scenes.

    A run lives in the folder runs/NAME: its options (config.yaml), checkpoints, metrics.jsonl, loss.png, previews. The
    same command again, or --resume runs/NAME, continues it to the bit; Ctrl-C saves first. Draw images from it with
    `mlx-sf sample --ckpt runs/NAME`.
    """
    limit_cache()
    if dry:
        click.echo(dry_run(planned(config, resume, options, World())))
        return
    outcome = train(config=config, resume=resume, say=say, **options)
    if not World.join().main:
        return
    where = f"{outcome.run}: step {outcome.step} of {outcome.steps}"
    if not outcome.finished:
        say(f"{where}, stopped and saved: continue with mlx-sf train --resume {outcome.run}")
        sys.exit(130)
    say(f"{where}, finished: mlx-sf sample --ckpt {outcome.run}")


def say(line: str) -> None:
    """A line on stdout that does not tear a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()
