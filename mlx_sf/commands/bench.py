"""`mlx-sf bench`: how fast, and with how much memory, on this machine."""

import json
import os
from typing import Any

import click

from ..device import DTYPES, describe, limit_cache, pick_dtype


@click.group(short_help="Measure speed and memory on this machine.")
def command() -> None:
    """Measure speed and memory on this machine: ratios against a peer in the same run, where one is installed."""
    limit_cache()


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: a line per figure, or JSON."""
    if as_json:
        click.echo(json.dumps({"machine": describe(), **result}, indent=1))
        return
    click.echo(f"{describe()['device']}, mlx {describe()['mlx']}")
    for name, value in result.items():
        if name.endswith("bytes") or name == "peak_over_interpreter":
            value = f"{value / 1e6:,.0f} MB"
        elif name.endswith("rate") and "share" not in name:
            value = f"{value / 1e9:,.0f} GFLOP/s"
        elif name == "flops":
            value = f"{value / 1e9:,.1f} GFLOP"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        click.echo(f"  {name.replace('_', ' '):<26} {value}")


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_size = click.option("--size", default="B/32", show_default=True, help="Network, such as small/16 or B/32.")
_img = click.option("--img-size", type=int, default=256, show_default=True)
_batch = click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
_dtype = click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: bfloat16 on a GPU, else float32]")


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--peer/--no-peer", default=True, help="Also time PyTorch, where it is installed.")
@_json
def forward(size: str, img_size: int, batch_size: int, dtype: str | None, peer: bool, as_json: bool) -> None:
    """One forward pass, against PyTorch and against the matrix-product rate."""
    from ..bench.network import measure_forward

    show(measure_forward(size, img_size, batch_size, pick_dtype(dtype), peer), as_json)


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--cfg", type=float, default=2.9, show_default=True)
@_json
def sample(size: str, img_size: int, batch_size: int, dtype: str | None, steps: int, cfg: float, as_json: bool) -> None:
    """One batch of whole samples."""
    from ..bench.network import measure_sampling

    show(measure_sampling(size, img_size, batch_size, steps, pick_dtype(dtype), cfg), as_json)


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--grad-checkpoint", is_flag=True, help="Recompute the blocks in the backward pass.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Timed steps; the best counts.")
@click.option("--peer/--no-peer", default=True, help="Also time PyTorch, where it is installed.")
@_json
def train(
    size: str,
    img_size: int,
    batch_size: int,
    dtype: str | None,
    compiled: bool,
    grad_checkpoint: bool,
    steps: int,
    peer: bool,
    as_json: bool,
) -> None:
    """One training step with AdamW and two EMAs, against PyTorch."""
    from ..bench.training import measure_training

    dt = pick_dtype(dtype)
    show(measure_training(size, img_size, batch_size, dt, compiled, grad_checkpoint, steps, peer), as_json)


@command.command()
@click.option("--size", default="B/32", show_default=True)
@click.option("--scratch", type=click.Path(exists=True, file_okay=False), help="Folder with room for 3 GB.")
@_json
def convert(size: str, scratch: str | None, as_json: bool) -> None:
    """Memory and time of converting a checkpoint with model, two EMAs and optimiser state, made from random numbers."""
    from ..bench.convert import measure_conversion

    show(measure_conversion(scratch, size), as_json)


@command.command()
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed batches; the best counts.")
@click.option("--img-size", type=int, default=256, show_default=True)
@click.option("--num-images", "-n", type=int, default=50_000, show_default=True, help="Of the memory measurement.")
@click.option("--peer/--no-peer", default=True, help="Also time torch-fidelity, where it is installed.")
@_json
def fid(batch_size: int, rounds: int, img_size: int, num_images: int, peer: bool, as_json: bool) -> None:
    """Inception features and the Fréchet distance, against torch-fidelity; memory of 50,000 images."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from ..bench.fid import measure_fid

    show(measure_fid(batch_size, rounds, img_size, num_images, peer), as_json)
