"""`mlx-sf export`: one weight set of a training run, or of any checkpoint, as a small file to share."""

import click

from ..checkpoints.export import export
from ..device.defaults import DTYPES
from .options import lora_options


@click.command(short_help="Write one weight set of a run as a small file to share.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--weights", help="Weight set: model, ema1 or ema2. [default: ema1; model of an adapter]")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="float16",
    show_default=True,
    help="Type of the large matrices.",
)
@lora_options
@click.option("--cfg", type=float, help="Guidance scale that sampling takes by default. [default: as in SOURCE]")
def command(
    source: str,
    target: str,
    weights: str | None,
    dtype: str,
    lora_paths: tuple[str, ...],
    lora_scales: tuple[float, ...],
    cfg: float | None,
) -> None:
    """Write one weight set of SOURCE, a run's folder or a checkpoint, to TARGET (.safetensors or .npz).

    Of a run with --lora it is the whole network, the adapter worked in.
    """
    count = export(source, target, weights, dtype, cfg, lora_paths, lora_scales)
    click.echo(f"{target}: {count:,} parameters, {dtype}")
