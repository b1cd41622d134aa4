"""`mlx-sf sample`: pictures from a checkpoint."""

from typing import Any, get_args

import click

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.pipeline import load, request_for
from ..common.files import writable_folder
from ..common.progress import Progress
from ..common.world import World
from ..device.defaults import DTYPES, dequantize_by_default, limit_cache, on_gpu, pick_dtype
from ..sampling.class_names import ClassNames
from ..sampling.generate import my_batches
from ..sampling.guidance import GuidanceNorm
from ..sampling.noise import RngName, as_rng
from ..sampling.output import Output, Stepwise
from ..sampling.request import with_solver
from ..sampling.solvers import Method
from ..sampling.torch_random import GPU_THREADS
from .options import ckpt_options, named_checkpoint


@click.command(short_help="Draw pictures from a checkpoint.")
@ckpt_options
@click.option("--weights", help="Weight set of the checkpoint: model, ema1 or ema2. [default: ema1]")
@click.option(
    "--classes",
    help="Classes by number or name, one picture each: 207,otter,7; null is no class; see `mlx-sf classes`.",
)
@click.option("--num-images", "-n", type=int, help="Number of pictures; the classes are gone through in turn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of picture 0; picture i has seed + i.")
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
    "--cfg-norm",
    type=click.Choice(get_args(GuidanceNorm)),
    help="Bound of the guided velocity; global keeps it no longer than the unguided one. [default: the checkpoint's]",
)
@click.option("--shift", type=float, help="Above 1: more steps near the noise; 1 is off. [default: the checkpoint's]")
@click.option(
    "--sample-t-eps", type=float, help="Lower bound of 1 - t in the velocity. [default: the training's, 0.05]"
)
@click.option("--noise", type=click.Path(), help="Initial noise: an .npy file, float32 (N, 3, H, W), standard normal.")
@click.option(
    "--rng",
    type=click.Choice(get_args(RngName)),
    default="mlx",
    show_default=True,
    help="Whose random numbers a seed stands for; torch-*: those of torch.randn on that device.",
)
@click.option(
    "--rng-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pictures in one draw of torch.randn. 1: each is drawn alone, from seed + i; "
    "B: all are rows of draws of B from one seed, as the published script makes them.",
)
@click.option(
    "--rng-threads",
    metavar="GPU",
    help=f"GPU that torch-cuda follows, {', '.join(GPU_THREADS)} or a number of threads; "
    "needed for draws of more than 196608 numbers.",
)
@click.option(
    "--rng-world",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes of the published script, with --rng-batch: number r draws from seed + r.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Type of the products. [default: bfloat16 on a GPU]")
@click.option(
    "--dequantize/--no-dequantize",
    default=None,
    help="Expand quantised weights before drawing: faster, more memory. [default: on a CPU]",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Pictures drawn at a time.")
@click.option(
    "--output",
    "-o",
    default="samples",
    show_default=True,
    help="Folder for 00000.png, 00001.png ...; or NAME.png (a grid if several); or NAME.npy (float32, unclipped).",
)
@click.option("--grid", is_flag=True, help="Also write all pictures into one grid.png in the folder.")
@click.option("--stepwise", is_flag=True, help="Also write a strip of intermediate states per picture.")
def command(
    ckpt: str | None,
    noise_scale: float | None,
    in_context_start: int | None,
    offline: bool,
    weights: str | None,
    classes: str | None,
    num_images: int | None,
    seed: int,
    noise: str | None,
    rng: str,
    rng_batch: int,
    rng_threads: str | None,
    rng_world: int,
    dtype: str | None,
    dequantize: bool | None,
    batch_size: int,
    output: str,
    grid: bool,
    stepwise: bool,
    **solver: Any,
) -> None:
    """Draw pictures from a checkpoint.

    Each picture depends on its own seed alone, not on the batch it is computed in. Settings are stored in each PNG:
    `mlx-sf info FILE.png` shows them.
    """
    limit_cache()
    # everything that can be wrong with the request is found before the weights are read
    checkpoint = Checkpoint(named_checkpoint(ckpt, noise_scale, in_context_start, offline))
    config = checkpoint.config
    sample = with_solver(config.sample, solver)
    checkpoint.pick(weights)
    pick_dtype(dtype)
    names = ClassNames.of(config.model.num_classes or 0, config.class_names)
    wanted = names.split(classes) if classes is not None else None
    random = as_rng(rng, rng_batch, rng_threads, rng_world)
    request = request_for(config, wanted, num_images, seed, noise, random)
    world = World.join()
    out = Output(output, request, config.model.size, grid, world)
    steps = Stepwise(sample.steps) if stepwise else None
    strips = writable_folder(out.path if out.kind == "folder" else out.path.parent)
    dequantize = dequantize_by_default() if dequantize is None else dequantize
    if (note := quantization_note(config, dequantize)) and world.main:
        click.echo(note, err=True)
    pipeline = load(checkpoint, weights=weights, dtype=dtype, dequantize=dequantize).with_solver(solver)

    def facts(i: int) -> dict[str, Any]:
        return pipeline.facts(request, i)

    total = len(my_batches(len(request), batch_size, world)) * sample.steps
    with Progress(total, f"sampling {len(request)} images", "steps") as bar:
        for numbers, state in pipeline.generate(request, batch_size, world):
            bar.update()
            if steps is not None:
                steps.add(numbers, state)
            if state.step == state.steps:
                out.add(numbers, state.z, facts)
                if steps is not None:
                    steps.save(strips, facts)
    written = out.close(facts)
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
