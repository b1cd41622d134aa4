"""`mlx-sf upload`: a checkpoint as a repository on the Hugging Face Hub."""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.publish import Words, check_repo, check_token, send, write_repository
from ..checkpoints.resolve import resolve
from ..device.defaults import limit_cache
from ..errors import MlxSfError, option


@click.command(short_help="Publish a checkpoint on the Hugging Face Hub.")
@click.argument("source")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--weights", help="Weight set to publish: model, ema1 or ema2. [default: ema1]")
@click.option("--license", "licence", help="Licence of the weights, as the Hub spells it: mit, apache-2.0. Required.")
@click.option("--base-model", help="Repository that the weights were made from. [default: the one in the checkpoint]")
@click.option(
    "--base-model-relation",
    type=click.Choice(["finetune", "quantized", "adapter", "merge"]),
    help="How they were made from it. [default: quantized where they are]",
)
@click.option("--record", type=click.Path(exists=True, dir_okay=False), help="Record of `mlx-sf eval` for the card.")
@click.option("--demo/--no-demo", default=True, show_default=True, help="Draw a row of pictures for the card.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", help="Branch to upload to. [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Write the folder and upload nothing.")
@click.option("--output", "-o", type=click.Path(), help="Folder to write and keep. [default: a temporary one; NAME]")
def command(
    source: str,
    repo: str,
    weights: str | None,
    licence: str | None,
    base_model: str | None,
    base_model_relation: str | None,
    record: str | None,
    demo: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    output: str | None,
) -> None:
    """Publish SOURCE, a checkpoint or a run's folder, as the repository ORG/NAME on the Hugging Face Hub.

    The repository holds one weight set as .safetensors, config.json, a card and a row of pictures: nothing of the
    training run. With --dry-run it is written into a folder (NAME, or --output) and stays here.
    """
    limit_cache()
    check_repo(repo)
    if not licence:
        raise MlxSfError(f"{option('licence')} is not given, want that of the weights, such as mit or apache-2.0")
    told = None if record is None else _read(Path(record))
    if not dry_run:
        check_token()
    checkpoint = Checkpoint(resolve(source))
    base = base_model or "/".join(str(checkpoint.config.provenance.get("repo", "")).split("/")[:2])
    words = Words(licence, partial(_draws, repo), base, base_model_relation or "", told)
    with tempfile.TemporaryDirectory() as temporary:
        name = repo.split("/")[1]
        folder = Path(output) if output else Path(name) if dry_run else Path(temporary) / name
        files = write_repository(checkpoint, folder, repo, words, weights, demo)
        for file in files:
            click.echo(f"{file if dry_run or output else file.name}: {file.stat().st_size / 1e6:.1f} MB")
        if not dry_run:
            click.echo(send(folder, repo, private, revision, create_pr))


def _draws(repo: str, classes: Sequence[str], prompt: str = "") -> str:
    """The command line that draws from a repository, for its card."""
    given = f" --classes {','.join(classes)} --seed 0 -o demo.png" if classes else ""
    given = f' --prompt "{prompt}"' if prompt else given
    return f"mlx-sf sample --ckpt {repo}{given}"


def _read(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise MlxSfError(f"{path}: is no record that `mlx-sf eval` wrote: name one of its records/*.json")
    return data
