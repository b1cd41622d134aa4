"""`mlx-sf export`: one weight set of a training run, or of any checkpoint, as a small file to share."""

import dataclasses

import click
import mlx.core as mx

from ..checkpoint import Checkpoint, resolve, save_checkpoint
from ..device import DTYPES
from ..errors import MlxSfError
from ..model import cast_products


def export(source: str, target: str, weights: str | None, dtype: str, cfg: float | None = None) -> int:
    """Write one weight set of `source` to `target`, the large matrices in `dtype`; returns the number of parameters.

    The configuration, class names included, goes along; optimiser state and the other sets stay behind.
    """
    checkpoint = Checkpoint(resolve(source))
    name, config = checkpoint.pick(weights), checkpoint.config
    tensors = cast_products(checkpoint.weights(name), DTYPES[dtype])
    for key, w in tensors.items():
        if not mx.all(mx.isfinite(w)).item():
            raise MlxSfError(f"{checkpoint.path}: tensor {key!r} does not fit {dtype}: use bfloat16 or float32")
    if cfg is not None:
        config = config.replace(sample=dataclasses.replace(config.sample, cfg=cfg))
    save_checkpoint(target, {name: tensors}, config)
    return sum(w.size for w in tensors.values())


@click.command(short_help="One weight set of a run as a small file to share.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--weights", help="Weight set: model, ema1 or ema2. [default: ema1]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float16", show_default=True, help="Of the matrices.")
@click.option("--cfg", type=float, help="Guidance scale that sampling takes by default. [default: as in SOURCE]")
def command(source: str, target: str, weights: str | None, dtype: str, cfg: float | None) -> None:
    """Write one weight set of SOURCE, a run's folder or a checkpoint, to TARGET (.safetensors or .npz)."""
    count = export(source, target, weights, dtype, cfg)
    click.echo(f"{target}: {count:,} parameters, {dtype}")
