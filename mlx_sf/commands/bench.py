"""`mlx-sf bench`: how fast, and with how much memory, on this machine."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import click
from click.core import ParameterSource

from ..common.files import check_writable, replacing, writable_folder
from ..common.progress import Progress
from ..device.defaults import DTYPES, describe, limit_cache, pick_dtype
from ..errors import MlxSfError
from ..sampling.solvers import Method

_docs = click.option("--write-docs", metavar="DIR", help="Keep the result in DIR as a record, and write DIR's pages.")
_size = click.option("--size", default="B/32", show_default=True, help="Network, such as small/16 or B/32.")
_img = click.option("--img-size", type=int, default=256, show_default=True, help="Side of the images in pixels.")
_batch = click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images in a batch.")
_dtype = click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Type of the matrix products. [default: bfloat16 on a GPU, else float32]",
)
_peer = click.option("--peer/--no-peer", default=True, help="Also time PyTorch, where it is installed.")

Measured = tuple[dict[str, Any], Callable[[Any], list[str]]]  # a result, and how it is printed


@click.group(short_help="Measure speed and memory on this machine.", invoke_without_command=True)
@click.option("--suite", help="Parts with commas, or all. [default: all that takes minutes, not hours]")
@click.option("--output", "-o", default="bench", show_default=True, help="Folder of the suite's results.")
@_docs
@click.pass_context
def command(context: click.Context, suite: str | None, output: str, write_docs: str | None) -> None:
    """Measure speed and memory on this machine: ratios against a peer in the same run, where one is installed.

    Without a command the whole suite runs, each part in a process of its own: OUTPUT/bench.json, OUTPUT/table.md.
    """
    limit_cache()
    if context.invoked_subcommand is not None:
        return
    from ..bench.report import machine_line
    from ..bench.suite import chosen, failures, run_suite, table

    parts, folder = chosen(suite), writable_folder(output)
    docs = None if write_docs is None else writable_folder(write_docs)
    records = {}
    with Progress(len(parts), "measuring", "parts") as bar:
        for name, record in run_suite(parts, folder, docs):
            records[name] = record
            bar.note(name)
            bar.update()
    lines = [machine_line(), "", *table(records)]
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for line in lines:
        click.echo(line)
    click.echo(f"all figures: {folder / 'bench.json'}")
    if failed := failures(records):
        raise MlxSfError(f"not measured: {', '.join(failed)}")


def measurement(function: Callable[..., Measured]) -> Callable[..., None]:
    """A subcommand that prints, and with --write-docs publishes, what `function` measures; adds both options."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
    @_docs
    @functools.wraps(function)
    def run(as_json: bool, write_docs: str | None, **arguments: Any) -> None:
        context = click.get_current_context()
        docs = _pages_folder(context, write_docs)
        result, lines = function(**arguments)
        if docs is not None:
            from ..bench.pages import MEASUREMENTS, publish
            from ..bench.records import new_record

            kind = str(context.info_name)
            publish(docs, new_record(kind, _command_line(context), MEASUREMENTS[kind].runs(result), result))
        if as_json:
            click.echo(json.dumps({"machine": describe(), **result}, indent=1))
            return
        from ..bench.report import machine_line

        for line in [machine_line(), *lines(result)]:
            click.echo(line)

    return run


def _pages_folder(context: click.Context, write_docs: str | None) -> Path | None:
    """Where to publish: --write-docs of the subcommand, or the one given before it."""
    if write_docs is None and context.parent is not None:
        write_docs = context.parent.params["write_docs"]
    return None if write_docs is None else writable_folder(write_docs)


def _command_line(context: click.Context) -> str:
    """The command as typed, but for options that say where to write."""
    words = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    words.append(f"mlx-sf bench {context.info_name}")
    for p in context.command.params:
        name, value = p.name or "", context.params.get(p.name or "")
        if context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            continue
        if isinstance(p, click.Argument):
            words.append(str(value))
        elif name not in ("output", "scratch", "as_json", "write_docs"):
            flag = p.opts[0] if value or not p.secondary_opts else p.secondary_opts[0]
            words.append(flag if isinstance(value, bool) else f"{flag} {value}")
    return " ".join(words)


_t2i_size = click.option("--size", default="B/16", show_default=True, help="Text-to-image network, such as B/16.")
_t2i_img = click.option("--img-size", type=int, default=512, show_default=True, help="Side of the pictures in pixels.")


@command.command()
@_t2i_size
@_t2i_img
@_dtype
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each, by turns.")
@click.option("--pictures", is_flag=True, help="Also draw whole pictures, 100 Euler steps among them.")
@_peer
@measurement
def t2i(size: str, img_size: int, dtype: str | None, rounds: int, pictures: bool, peer: bool) -> Measured:
    """Text to image: a guided evaluation and the encoder, against PyTorch and the product rate."""
    from ..bench.report import table_lines
    from ..bench.t2i import measure_t2i
    from ..bench.tables import t2i as tables

    result = measure_t2i(size, img_size, pick_dtype(dtype), rounds, peer, pictures)
    return result, lambda r: table_lines(tables(r))


@command.command("t2i-memory")
@_t2i_size
@_t2i_img
@measurement
def t2i_memory(size: str, img_size: int) -> Measured:
    """Text to image: peak memory of the encoder, of the network, and of an adapter in training."""
    from ..bench.report import table_lines
    from ..bench.t2i import PHASES, measure_t2i_memory
    from ..bench.tables import t2i_memory as tables

    with Progress(len(PHASES), "measuring", "phases") as bar:
        phases = list(measure_t2i_memory(size, img_size, bar.update))
    result = {"what": f"MM-JiT {size} at {img_size} pixels with FLAN-T5-Large, made-up weights", "phases": phases}
    return result, lambda r: table_lines(tables(r))


@command.command()
@_size
@_img
@_batch
@_dtype
@_peer
@measurement
def forward(size: str, img_size: int, batch_size: int, dtype: str | None, peer: bool) -> Measured:
    """One forward pass, against PyTorch and against the matrix-product rate."""
    from ..bench.network import measure_forward
    from ..bench.report import figure_lines

    return measure_forward(size, img_size, batch_size, pick_dtype(dtype), peer), figure_lines


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Times scale with the steps.")
@click.option(
    "--method", type=click.Choice(get_args(Method)), default="heun", show_default=True, help="Solver to time."
)
@click.option("--cfg", type=float, default=2.9, show_default=True, help="Guidance scale; 1 is off.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed samples; medians count.")
@_peer
@measurement
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
) -> Measured:
    """One batch of whole guided samples, against the published loop in PyTorch."""
    from ..bench.report import figure_lines
    from ..bench.sampling import measure_sampling

    dt = pick_dtype(dtype)
    return measure_sampling(size, img_size, batch_size, steps, dt, cfg, rounds, peer, method=method), figure_lines


@command.command()
@click.option(
    "--output", "-o", default="solvers.png", show_default=True, help="The figure; NAME.json holds the numbers."
)
@click.option("--images", type=click.IntRange(1), default=2, show_default=True, help="Images of each case.")
@click.option("--ckpt", help="Measure this file or run folder alone. [default: the demo and untrained networks]")
@click.option("--cfg", type=float, default=1.0, show_default=True, help="Guidance scale for --ckpt.")
@measurement
def solvers(output: str, images: int, ckpt: str | None, cfg: float) -> Measured:
    """Distance of each solver's pictures to those of 1,000 Heun steps, over network evaluations: a figure, a table."""
    from ..bench.report import solver_lines
    from ..bench.solvers import CASES, measure_solvers, plot_solvers

    path = Path(output).with_suffix(".png")
    for target in (path, path.with_suffix(".json")):
        check_writable(target)
    result = measure_solvers(CASES if ckpt is None else {f"{ckpt}, guidance {cfg:g}": (ckpt, cfg)}, images)
    plot_solvers(path, result)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result, lambda r: [*solver_lines(r), f"figure: {path}"]


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Medians count.")
@measurement
def forcing(size: str, img_size: int, batch_size: int, dtype: str | None, rounds: int) -> Measured:
    """Spectral Forcing alone: its share of a forward pass, and other forms of the same operator."""
    from ..bench.forcing import measure_forcing
    from ..bench.report import forcing_lines

    return measure_forcing(size, img_size, batch_size, pick_dtype(dtype), rounds), forcing_lines


@command.command()
@click.argument("kind", type=click.Choice(["sample", "train"]))
@_size
@_img
@_batch
@_dtype
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Medians count.")
@measurement
def profile(
    kind: Literal["sample", "train"], size: str, img_size: int, batch_size: int, dtype: str | None, rounds: int
) -> Measured:
    """Where the time of a guided Heun step or of a training step goes, part by part."""
    from ..bench.profile import profile_step
    from ..bench.report import profile_lines

    return profile_step(kind, size, img_size, batch_size, pick_dtype(dtype), rounds), profile_lines


@command.command()
@_size
@_img
@_batch
@_dtype
@click.option(
    "--compile/--no-compile", "compiled", default=True, show_default=True, help="Whether the step is compiled."
)
@click.option("--grad-checkpoint", is_flag=True, help="Recompute the blocks in the backward pass.")
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True, help="Timed steps; medians count.")
@_peer
@measurement
def train(
    size: str,
    img_size: int,
    batch_size: int,
    dtype: str | None,
    compiled: bool,
    grad_checkpoint: bool,
    steps: int,
    peer: bool,
) -> Measured:
    """One training step with AdamW and two EMAs, against PyTorch."""
    from ..bench.report import figure_lines
    from ..bench.training import measure_training

    dt = pick_dtype(dtype)
    return measure_training(size, img_size, batch_size, dt, compiled, grad_checkpoint, steps, peer), figure_lines


@command.command()
@click.option("--size", default="B/32", show_default=True, help="Network, such as small/16 or B/32.")
@click.option("--scratch", type=click.Path(exists=True, file_okay=False), help="Folder with room for 3 GB.")
@measurement
def convert(size: str, scratch: str | None) -> Measured:
    """Memory and time of converting a checkpoint with model, two EMAs and optimiser state, made from random numbers."""
    from ..bench.convert import measure_conversion
    from ..bench.report import figure_lines

    return measure_conversion(scratch, size), figure_lines


@command.command()
@click.option("--ckpt", help="Checkpoint of floats, or demo. [default: a network of --size with random weights]")
@_size
@_img
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Images in a batch.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale and a bias.",
)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Timed passes; the best counts.")
@click.option("--speed/--no-speed", default=True, help="Also time forward passes of --size.")
@measurement
def quantize(
    ckpt: str | None, size: str, img_size: int, batch_size: int, group_size: str, rounds: int, speed: bool
) -> Measured:
    """What 8 and 4 bits cost in precision, by kinds of layers quantised alone and together; bytes; speed."""
    from ..bench.quantize import measure_quantization, measure_quantized_speed
    from ..bench.report import quantization_lines

    result = measure_quantization(ckpt, size, img_size, batch_size, int(group_size))
    timed = measure_quantized_speed(size, img_size, 1, int(group_size), rounds) if speed else {}
    return {**result, "speed": timed}, quantization_lines


@command.command()
@click.option(
    "--task",
    type=click.Choice(["sample", "train", "all"]),
    default="all",
    show_default=True,
    help="What is measured: drawing, training, or both.",
)
@click.option("--size", default="tiny/32,small/32,B/32,L/32", show_default=True, help="Networks, with commas.")
@_img
@click.option("--batch-size", default="1,8,32", show_default=True, help="Of sampling, with commas.")
@click.option("--train-batch-size", default="8,32", show_default=True, help="Of training, with commas.")
@_dtype
@click.option("--bits", type=click.Choice(["8", "4"]), help="Sample from quantised weights, as they are.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True, help="Heun steps of sampling.")
@measurement
def memory(
    task: str,
    size: str,
    img_size: int,
    batch_size: str,
    train_batch_size: str,
    dtype: str | None,
    bits: str | None,
    steps: int,
) -> Measured:
    """Peak memory of sampling and training, each figure from a process of its own."""
    from ..bench.memory import cells_of, measure_memory
    from ..bench.report import memory_lines

    kinds = ("sample", "train") if task == "all" else (task,)
    cells = cells_of(kinds, size, img_size, batch_size, train_batch_size, pick_dtype(dtype), bits, steps)
    with Progress(len(cells), "measuring memory", "processes") as bar:
        return {"cells": list(measure_memory(cells, bar.update))}, memory_lines


@command.command()
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures in a batch.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed batches; medians count.")
@click.option("--img-size", type=int, default=256, show_default=True, help="Side of the pictures in pixels.")
@click.option("--num-images", "-n", type=int, default=50_000, show_default=True, help="Of the memory measurement.")
@click.option("--peer/--no-peer", default=True, help="Also time torch-fidelity, where it is installed.")
@measurement
def fid(batch_size: int, rounds: int, img_size: int, num_images: int, peer: bool) -> Measured:
    """Inception features and the Fréchet distance, against torch-fidelity; memory of 50,000 images."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from ..bench.fid import measure_fid
    from ..bench.report import figure_lines

    return measure_fid(batch_size, rounds, img_size, num_images, peer), figure_lines


@command.command()
@click.argument("record", type=click.Path(exists=True, dir_okay=False))
@_docs
@click.pass_context
def parity(context: click.Context, record: str, write_docs: str | None) -> None:
    """The parity table of RECORD, which a run of the tests wrote (MLX_SF_PARITY_RECORD=RECORD python -m pytest)."""
    from ..bench.pages import MEASUREMENTS, publish
    from ..bench.records import read

    docs, found = _pages_folder(context, write_docs), read(Path(record))
    if found.measurement != "parity":
        raise MlxSfError(f"{record}: is a record of {found.measurement}, want one of the parity")
    for table in MEASUREMENTS[found.measurement].tables(found.result):
        for line in table.markdown():
            click.echo(line)
    if docs is not None:
        publish(docs, found)
