"""`mlx-sf bench`: how fast, and with how much memory, on this machine."""

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import click

from ..config import Method
from ..device import DTYPES, describe, dtype_name, limit_cache, pick_dtype
from ..errors import MlxSfError
from ..files import check_writable, replacing, writable_folder
from ..progress import Progress


@click.group(short_help="Measure speed and memory on this machine.", invoke_without_command=True)
@click.option("--suite", help="Parts with commas, or all. [default: all that takes minutes, not hours]")
@click.option("--output", "-o", default="bench", show_default=True, help="Folder of the suite's results.")
@click.pass_context
def command(context: click.Context, suite: str | None, output: str) -> None:
    """Measure speed and memory on this machine: ratios against a peer in the same run, where one is installed.

    Without a command the whole suite runs, each part in a process of its own: OUTPUT/bench.json, OUTPUT/table.md.
    """
    limit_cache()
    if context.invoked_subcommand is not None:
        return
    from ..bench.suite import DEFAULT, chosen, run_suite, table

    names = chosen(suite) if suite else list(DEFAULT)
    folder = Path(output)
    writable_folder(folder)
    records = {}
    with Progress(len(names), "measuring", "parts") as bar:
        for name, record in run_suite(names, folder):
            records[name] = record
            bar.note(name)
            bar.update()
    lines = [f"{describe()['device']}, mlx {describe()['mlx']}", "", *table(records)]
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for line in lines:
        click.echo(line)
    click.echo(f"all figures: {folder / 'bench.json'}")
    failed = [f"{name} ({r['error']})" for name, r in records.items() if "error" in r]
    if failed:
        raise MlxSfError(f"not measured: {', '.join(failed)}")


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
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Times scale with the steps.")
@click.option("--method", type=click.Choice(get_args(Method)), default="heun", show_default=True)
@click.option("--cfg", type=float, default=2.9, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed samples; medians count.")
@click.option("--peer/--no-peer", default=True, help="Also time PyTorch, where it is installed.")
@_json
def sample(
    size: str,
    img_size: int,
    batch_size: int,
    dtype: str | None,
    steps: int,
    method: str,
    cfg: float,
    rounds: int,
    peer: bool,
    as_json: bool,
) -> None:
    """One batch of whole guided samples, against the published loop in PyTorch."""
    from ..bench.sampling import measure_sampling

    dt = pick_dtype(dtype)
    show(measure_sampling(size, img_size, batch_size, steps, dt, cfg, rounds, peer, method=method), as_json)


@command.command()
@click.option(
    "--output", "-o", default="solvers.png", show_default=True, help="The figure; NAME.json holds the numbers."
)
@click.option("--images", type=click.IntRange(1), default=2, show_default=True, help="Images of each case.")
@_json
def solvers(output: str, images: int, as_json: bool) -> None:
    """Distance of each solver's pictures to those of 1,000 Heun steps, over network evaluations: a figure, a table."""
    from ..bench.solvers import measure_solvers, plot_solvers, solver_lines

    path = Path(output).with_suffix(".png")
    for target in (path, path.with_suffix(".json")):
        check_writable(target)
    result = measure_solvers(images=images)
    plot_solvers(path, result)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    if as_json:
        show(result, True)
        return
    for line in solver_lines(result):
        click.echo(line)
    click.echo(f"figure: {path}")


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Medians count.")
@_json
def forcing(size: str, img_size: int, batch_size: int, dtype: str | None, rounds: int, as_json: bool) -> None:
    """Spectral Forcing alone: its share of a forward pass, and other forms of the same operator."""
    from ..bench.forcing import measure_forcing

    result = measure_forcing(size, img_size, batch_size, pick_dtype(dtype), rounds)
    if not as_json:
        del result["fastest_and_slowest"]
        shares = {k: f"{v:.2%}" for k, v in result.items() if k.startswith("share")}
        seconds = {k: f"{1000 * v:,.2f} ms" for k, v in result.items() if k.endswith("seconds")}
        result |= shares | seconds
    show(result, as_json)


@command.command()
@click.argument("kind", type=click.Choice(["sample", "train"]))
@_size
@_img
@_batch
@_dtype
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Medians count.")
@_json
def profile(
    kind: Literal["sample", "train"],
    size: str,
    img_size: int,
    batch_size: int,
    dtype: str | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Where the time of a guided Heun step or of a training step goes, part by part."""
    from ..bench.profile import profile_lines, profile_step

    result = profile_step(kind, size, img_size, batch_size, pick_dtype(dtype), rounds)
    if as_json:
        click.echo(json.dumps({"machine": describe(), **result}, indent=1))
        return
    for line in [describe()["device"], *profile_lines(result)]:
        click.echo(line)


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--grad-checkpoint", is_flag=True, help="Recompute the blocks in the backward pass.")
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True, help="Timed steps; medians count.")
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
@click.option("--ckpt", help="Checkpoint of floats. [default: a network of --size with random weights]")
@_size
@_img
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Timed passes; the best counts.")
@click.option("--speed/--no-speed", default=True, help="Also time forward passes of --size.")
@_json
def quantize(
    ckpt: str | None,
    size: str,
    img_size: int,
    batch_size: int,
    group_size: str,
    rounds: int,
    speed: bool,
    as_json: bool,
) -> None:
    """What 8 and 4 bits cost in precision, by kinds of layers quantised alone and together; bytes; speed."""
    from ..bench.quantize import measure_quantization, measure_quantized_speed

    result = measure_quantization(ckpt, size, img_size, batch_size, int(group_size))
    timed = measure_quantized_speed(size, img_size, 1, int(group_size), rounds) if speed else {}
    if as_json:
        show({**result, "speed": timed}, True)
        return
    rows, files = result.pop("rows"), result.pop("file_bytes")
    show({**result, **{f"file, {k}": f"{v / 1e6:,.1f} MB" for k, v in files.items()}}, False)
    click.echo(f"  {'relative error with quantised':<30} {'weights':>8} {'output':>17} {'velocity':>19}")
    click.echo(f"  {'':<30} {'':>8} {'8 bits':>8} {'4 bits':>8}   {'8 bits':>8} {'4 bits':>8}")
    for row in rows:
        errors = [row[f"{what}_error_{bits}"] for what in ("output", "velocity") for bits in (8, 4)]
        cells = f"{errors[0]:8.2%} {errors[1]:8.2%}   {errors[2]:8.2%} {errors[3]:8.2%}"
        click.echo(f"  {row['layers'].replace('_', ' '):<30} {row['share']:8.1%} {cells}")
    if timed:
        show(timed, False)


@command.command()
@click.option("--task", type=click.Choice(["sample", "train", "all"]), default="all", show_default=True)
@click.option("--size", default="tiny/32,small/32,B/32,L/32", show_default=True, help="Networks, with commas.")
@_img
@click.option("--batch-size", default="1,8,32", show_default=True, help="Of sampling, with commas.")
@click.option("--train-batch-size", default="8,32", show_default=True, help="Of training, with commas.")
@_dtype
@click.option("--bits", type=click.Choice(["8", "4"]), help="Sample from quantised weights, as they are.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True, help="Heun steps of sampling.")
@_json
def memory(
    task: str,
    size: str,
    img_size: int,
    batch_size: str,
    train_batch_size: str,
    dtype: str | None,
    bits: str | None,
    steps: int,
    as_json: bool,
) -> None:
    """Peak memory of sampling and training, each figure from a process of its own."""
    from ..bench.memory import Cell, measure_memory

    name = dtype_name(pick_dtype(dtype))
    sizes = [s.strip() for s in size.split(",")]
    cells = []
    if task != "train":
        q = int(bits) if bits else None
        cells += [Cell("sample", s, img_size, b, name, steps, q) for s in sizes for b in _numbers(batch_size)]
    if task != "sample":
        trained = [(s, b, c) for s in sizes for b in _numbers(train_batch_size) for c in (False, True)]
        cells += [Cell("train", s, img_size, b, name, grad_checkpoint=c) for s, b, c in trained]
    with Progress(len(cells), "measuring memory", "processes") as bar:
        records = list(measure_memory(cells, bar.update))
    if as_json:
        click.echo(json.dumps({"machine": describe(), "cells": records}, indent=1))
        return
    click.echo(f"{describe()['device']}, mlx {describe()['mlx']}; GB")
    click.echo(f"  {'':<66} {'weights':>8} {'peak':>8} {'process':>8}")
    for r in records:
        figures = [f"{r[k] / 1e9:8.2f}" for k in ("weights", "mlx_peak", "process_peak")] if "error" not in r else []
        click.echo(f"  {r['what']:<66} {' '.join(figures) or r['error']}")


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise MlxSfError(f"batch sizes {text!r}, want whole numbers from 1, with commas between")
    return values


@command.command()
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed batches; medians count.")
@click.option("--img-size", type=int, default=256, show_default=True)
@click.option("--num-images", "-n", type=int, default=50_000, show_default=True, help="Of the memory measurement.")
@click.option("--peer/--no-peer", default=True, help="Also time torch-fidelity, where it is installed.")
@_json
def fid(batch_size: int, rounds: int, img_size: int, num_images: int, peer: bool, as_json: bool) -> None:
    """Inception features and the Fréchet distance, against torch-fidelity; memory of 50,000 images."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from ..bench.fid import measure_fid

    show(measure_fid(batch_size, rounds, img_size, num_images, peer), as_json)
