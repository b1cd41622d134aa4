"""`mlx-sf models`: which public weights there are, and which of them are on this machine."""

import json
from typing import Any

import click

from ..checkpoints.hub import cached
from ..checkpoints.known import KNOWN, VERIFIED, Known
from ..models import parameter_count


@click.command(short_help="List the public weights that --ckpt takes by a short name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(as_json: bool) -> None:
    """List the public weights: what they are, what they need, what their authors report, and which are here.

    A short name stands for a place on the Hugging Face Hub, wherever a checkpoint is taken:
    `mlx-sf sample --ckpt jit-b/16 --classes otter`. In memory the weights take 4 bytes a parameter, 2 in bfloat16; the
    converted copy takes as much room again on the disk as the download.
    """
    models = [_facts(k) for k in KNOWN]
    if as_json:
        click.echo(json.dumps(models, indent=1))
        return
    for m, k in zip(models, KNOWN, strict=True):
        s = k.sampling
        score = k.score or "no score stated"
        here = f"here: {m['here']}" if m["here"] else f"download {k.gb:.2f} GB"
        click.echo(f"{k.name:<24} {k.image} px, {m['parameters'] / 1e6:.0f} M parameters, {score}, {here}")
        steps = f"{s['steps']} step{'s' * (s['steps'] > 1)}"
        click.echo(f"{'':<24} {k.place}, licence {k.licence}; {s['method']}, {steps}, cfg {s['cfg']:g}")
    click.echo("Scores are the authors' own; FID is of 50,000 pictures. What is checked here of each layout:")
    for layout, text in VERIFIED.items():
        names = ", ".join(k.name for k in KNOWN if k.layout == layout)
        if names:
            click.echo(f"  {layout} ({names}): {text}")


def _facts(k: Known) -> dict[str, Any]:
    here = cached(k.repo, k.path)
    count = parameter_count(k.model_config())
    return {**k.facts(), "parameters": count, "here": str(here or "")}
