"""`mlx-sf sample`: pictures from a checkpoint."""

from typing import Any, get_args

import click

from .. import generate as g
from ..checkpoint import Checkpoint, demo_checkpoint, load_model, resolve
from ..config import Config, Method
from ..device import DTYPES, default_dtype, dequantize_by_default, limit_cache, on_gpu, pick_dtype
from ..distributed import World
from ..files import writable_folder
from ..progress import Progress


@click.command(short_help="Draw images from a checkpoint.")
@click.option("--ckpt", help="Checkpoint file, run folder, or Hugging Face repo id. [default: the built-in demo model]")
@click.option("--weights", help="Weight set of the checkpoint: model, ema1, ema2. [default: ema1]")
@click.option("--classes", help="Labels or class names, one image each, in this order: 1,7,7; null means no class.")
@click.option("--num-images", "-n", type=int, help="Number of images; classes are gone through in turn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image; image i has seed + i.")
@click.option("--steps", type=int, help="Steps of the solver. [default: the checkpoint's, usually 50]")
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    help="Solver; multistep evaluates the network once a step, heun twice. [default: the checkpoint's, usually heun]",
)
@click.option("--cfg", type=float, help="Guidance scale; 1 means off. [default: the checkpoint's]")
@click.option(
    "--cfg-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Guide only where LOW < t < HIGH (t = 0 is noise). [default: the checkpoint's, usually 0.1 1]",
)
@click.option(
    "--sample-t-eps", type=float, help="Lower bound of 1 - t in the velocity. [default: the training's, 0.05]"
)
@click.option("--noise", type=click.Path(), help="Initial noise: .npy, float32 (N, 3, H, W), standard normal.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the matrix products. [default: bfloat16 on a GPU]")
@click.option(
    "--dequantize/--no-dequantize",
    default=None,
    help="Expand quantised weights before drawing: faster, more memory. [default: on a CPU]",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images at a time.")
@click.option(
    "--output",
    "-o",
    default="samples",
    show_default=True,
    help="Folder for 00000.png, 00001.png ...; or NAME.png (a grid if several); or NAME.npy (float32, unclipped).",
)
@click.option("--grid", is_flag=True, help="Also write grid.png into the folder.")
@click.option("--stepwise", is_flag=True, help="Also write a strip of intermediate states per image.")
def command(
    ckpt: str | None,
    weights: str | None,
    classes: str | None,
    num_images: int | None,
    seed: int,
    noise: str | None,
    dtype: str | None,
    dequantize: bool | None,
    batch_size: int,
    output: str,
    grid: bool,
    stepwise: bool,
    **solver: Any,
) -> None:
    """Draw images from a checkpoint.

    Each image depends on its own seed alone, not on the batch it is computed in. Settings are stored in each PNG:
    `mlx-sf info FILE.png` shows them.
    """
    limit_cache()
    checkpoint = Checkpoint(resolve(ckpt) if ckpt is not None else demo_checkpoint())
    config = g.with_solver(checkpoint.config, solver)
    checkpoint.pick(weights)
    request = g.make_request(config, classes, num_images, seed, noise)
    world = World.join()
    out = g.Output(output, request, config.model.img_size, grid, world)
    steps = g.Stepwise(config.sample.steps) if stepwise else None
    strips = writable_folder(out.path if out.kind == "folder" else out.path.parent)
    dequantize = dequantize_by_default() if dequantize is None else dequantize
    if (note := quantization_note(config, dequantize)) and world.main:
        click.echo(note, err=True)
    model, loaded = load_model(checkpoint, weights, pick_dtype(dtype), dequantize)
    config = config.replace(weights=loaded.weights)

    def describe(i: int) -> dict[str, Any]:
        return g.metadata(config, request, i, str(checkpoint.path), dtype or default_dtype())

    batch_count = len(g.my_batches(len(request), batch_size, world))
    with Progress(batch_count * config.sample.steps, f"sampling {len(request)} images", "steps") as bar:
        for numbers, state in g.generate(model, config, request, batch_size, world):
            bar.update()
            if steps is not None:
                steps.add(numbers, state)
            if state.step == state.steps:
                out.add(numbers, state.z, describe)
                if steps is not None:
                    steps.save(strips, describe)
    written = out.close(describe)
    share = "" if world.size == 1 else f" (process {world.rank + 1} of {world.size} wrote {len(written)})"
    if written:
        through = f" ... {written[-1]}" if len(written) > 1 else ""
        click.echo(f"{len(request)} images: {written[0]}{through}{share}")


def quantization_note(config: Config, dequantize: bool) -> str | None:
    """What to know about drawing from quantised weights on this device, if anything."""
    if config.quantization is None or on_gpu():
        return None
    slow = "quantised products are slow on a CPU"
    if dequantize:
        return f"note: {slow}: the weights are expanded to floats first, which takes the memory of floats"
    return f"note: {slow}, some 50 times slower than float32: leave out --no-dequantize if there is memory for floats"
