"""`mlx-sf stats`: reference statistics of a data set."""

from typing import Any

import click

from ..device import defaults as device
from ..metrics.stats import StatsOptions, make_statistics
from .inception_options import inception_options


@click.command(short_help="Make reference statistics for FID from a data set.")
@click.option("--data", help="Folder of pictures, or Hugging Face data set. [default: the built-in scenes]")
@click.option("--img-size", type=int, required=True, help="Side of the square crops in pixels: the samples' size.")
@click.option("--output", "-o", required=True, type=click.Path(), help="The statistics file to write, NAME.npz.")
@click.option("--num-images", "-n", type=int, help="Use the first N pictures. [default: all; 10000 scenes]")
@click.option("--split", default="train", show_default=True, help="Split of a Hugging Face data set.")
@click.option("--image-column", help="Column of pictures in a Hugging Face data set. [default: found]")
@click.option("--label-column", help="Column of labels in a Hugging Face data set. [default: found]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the built-in scenes.")
@click.option("--keep-features", is_flag=True, help="Keep all features: KID and precision/recall need them.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures measured at a time."
)
@inception_options
def command(feature_layer: str, **options: Any) -> None:
    """Reference statistics of a data set, for `mlx-sf eval --ref`.

    Pictures are cropped as the reference crops them (ADM's centre crop). The file holds mu and sigma, the spectrum,
    and where it came from; torch-fidelity's fork reads it too. An interrupted run continues by the same command.
    """
    device.limit_cache()
    result = make_statistics(StatsOptions(tap=feature_layer, **options), click.echo)
    if result is not None:
        size = options["img_size"]
        click.echo(f"{options['output']}: statistics of {result.count} pictures at {size}x{size}")
        if result.count is not None and result.count <= result.features.dims:
            click.echo(f"note: fewer pictures than the {result.features.dims} dimensions: FID against it is unreliable")
