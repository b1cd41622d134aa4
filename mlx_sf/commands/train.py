"""`mlx-sf train`: its flags are the fields of `settings.Settings`."""

import dataclasses
import sys
import typing
from collections.abc import Callable
from typing import Any

import click
from tqdm import tqdm

from ..device import limit_cache
from ..distributed import World
from ..errors import MlxSfError
from ..fit import dry_run, fit, shared_plan
from ..settings import KINDS, Settings, flag, read_yaml


def _settings_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """One flag per field. All default to None: only what was typed overrides a YAML file or a stored run."""
    for f in reversed(dataclasses.fields(Settings)):
        kind = KINDS[f.name][0]
        help_text = f.metadata["help"]
        if f.default is not None and f.default is not False and "[default" not in help_text:
            shown = {True: "on"}.get(f.default, f.default) if isinstance(f.default, bool) else f.default
            help_text += f"  [default: {shown}]"
        choices = [c for k in KINDS[f.name] for c in typing.get_args(k)]
        names = f"{flag(f.name)}/--no-{f.name.replace('_', '-')}" if kind is bool else flag(f.name)
        option_type = click.Choice(choices) if choices else None if kind is bool else kind
        function = click.option(names, f.name, type=option_type, default=None, help=help_text)(function)
    return function


@click.command(short_help="Train a model on pictures, or on the built-in scenes.")
@click.option("--config", "config_file", type=click.Path(), help="Options from a YAML file; flags win over it.")
@click.option("--resume", type=click.Path(), help="Continue the run in this folder, exactly where it was.")
@click.option("--dry-run", "dry", is_flag=True, help="Only say what the run needs: size, memory, time.")
@_settings_flags
def command(config_file: str | None, resume: str | None, dry: bool, **options: Any) -> None:
    """Train a model on pictures (--data), or on the built-in scenes.

    The run lives in runs/NAME: config.yaml, checkpoints with weights, averages and optimiser, metrics.jsonl, loss.png,
    previews. The same command again, or --resume runs/NAME, continues it to the bit; Ctrl-C saves first. Draw from it
    with `mlx-sf sample --ckpt runs/NAME`.
    """
    limit_cache()
    given = {**(read_yaml(config_file) if config_file else {}), **{k: v for k, v in options.items() if v is not None}}
    if resume is not None and ("name" in given or "output" in given):
        raise MlxSfError("--resume: names the run already: leave --name and --output out")
    world = World.join()
    with world.together():
        p = shared_plan(given, resume, world)
        if dry:
            click.echo(dry_run(p))
            return
        outcome = fit(p, say, world)
    if not world.main:
        return
    where = f"{p.folder.path}: step {outcome.step} of {p.settings.steps}"
    if not outcome.finished:
        say(f"{where}, stopped and saved: continue with mlx-sf train --resume {p.folder.path}")
        sys.exit(130)
    say(f"{where}, finished: mlx-sf sample --ckpt {p.folder.path}")


def say(line: str) -> None:
    """A line on stdout that does not tear a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()
