"""`mlx-sf sample`: pictures from a checkpoint."""

from typing import Any, get_args

import click

from ..checkpoints import memory_plan
from ..checkpoints.adapters import read_adapters
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.features import ensure, features_of
from ..checkpoints.known import U1S
from ..checkpoints.pipeline import default_batch, drawn_as, load, request_for
from ..checkpoints.resolve import hub_name
from ..checkpoints.text_encoder import EncoderPrecision, TextFeatures
from ..checkpoints.two_phase import Prefixes
from ..checkpoints.u1_files import known_config
from ..common.files import writable_folder
from ..common.progress import Progress
from ..common.world import World
from ..device.defaults import DTYPES, default_dtype, dequantize_by_default, limit_cache, on_gpu, pick_dtype
from ..errors import MlxSfError, spelt
from ..models import architecture
from ..sampling.class_names import ClassNames
from ..sampling.generate import my_batches
from ..sampling.guidance import GuidanceNorm
from ..sampling.noise import RngName, as_rng
from ..sampling.output import Output, Stepwise
from ..sampling.prompts import read_prompts
from ..sampling.request import with_solver
from ..sampling.solvers import Method
from ..sampling.torch_random import GPU_THREADS
from .options import ckpt_options, lora_options, named_checkpoint, text_encoder_options


@click.command(short_help="Draw pictures from a checkpoint.")
@ckpt_options
@click.option("--weights", help="Weight set of the checkpoint: model, ema1 or ema2. [default: ema1]")
@click.option(
    "--classes",
    help="Classes by number or name, one picture each: 207,otter,7; null is no class; see `mlx-sf classes`.",
)
@click.option(
    "--prompt", "-p", multiple=True, help="Text to draw, for a model that takes prompts; may be given several times."
)
@click.option(
    "--prompts",
    type=click.Path(),
    metavar="FILE",
    help='Prompts from a UTF-8 file, one a line; a line of JSON gives its "prompt".',
)
@text_encoder_options
@click.option(
    "--system-message",
    type=click.Path(),
    metavar="FILE",
    help="System message of SenseNova-U1, a UTF-8 file. [default: the published one, read once from its authors' code]",
)
@click.option(
    "--num-images",
    "-n",
    type=int,
    help="Number of pictures; the classes are gone through in turn. With prompts: pictures of each.",
)
@click.option("--height", type=int, help="Height of the pictures in pixels; most models draw their own size only.")
@click.option("--width", type=int, help="Width of the pictures in pixels; most models draw their own size only.")
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
    help="Guide only where LOW < t < HIGH (t = 0 is noise); text to image counts both ends in. "
    "[default: the checkpoint's, usually 0.1 1; text to image 0 1]",
)
@click.option(
    "--cfg-norm",
    type=click.Choice(get_args(GuidanceNorm)),
    help="Bound of the guided velocity: global keeps it no longer than the unguided one, channel so for each token; "
    "cfg_zero_star scales the unconditional one first. [default: the checkpoint's]",
)
@click.option("--shift", type=float, help="Above 1: more steps near the noise; 1 is off. [default: the checkpoint's]")
@click.option(
    "--sample-t-eps",
    type=float,
    help="Lower bound of 1 - t in the velocity. "
    "[default: the training's, 0.05; published MiniT2I 0.001, SenseNova-U1 0.02]",
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
@lora_options
@click.option(
    "--merge-lora",
    is_flag=True,
    help="Work the adapters into the weights, which must be floats: faster steps than beside them.",
)
@click.option(
    "--forcing",
    is_flag=True,
    help="Put Spectral Forcing before a network that was trained without: an untrained ablation.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Pictures drawn at a time. [default: 8, fewer where a picture has over 512 tokens]",
)
@click.option(
    "--output",
    "-o",
    default="samples",
    show_default=True,
    help="Folder for 00000.png, 00001.png ...; or NAME.png (a grid if several); or NAME.npy (float32, unclipped).",
)
@click.option("--grid", is_flag=True, help="Also write all pictures into one grid.png in the folder.")
@click.option("--stepwise", is_flag=True, help="Also write a strip of intermediate states per picture.")
@click.option("--dry-run", is_flag=True, help="Say what SenseNova-U1 takes of memory here, and draw nothing.")
def command(
    ckpt: str | None,
    noise_scale: float | None,
    in_context_start: int | None,
    offline: bool,
    weights: str | None,
    classes: str | None,
    prompt: tuple[str, ...],
    prompts: str | None,
    text_encoder: str | None,
    text_encoder_precision: EncoderPrecision,
    height: int | None,
    width: int | None,
    num_images: int | None,
    seed: int,
    noise: str | None,
    rng: str,
    rng_batch: int,
    rng_threads: str | None,
    rng_world: int,
    dtype: str | None,
    dequantize: bool | None,
    lora_paths: tuple[str, ...],
    lora_scales: tuple[float, ...],
    merge_lora: bool,
    forcing: bool,
    system_message: str | None,
    dry_run: bool,
    batch_size: int | None,
    output: str,
    grid: bool,
    stepwise: bool,
    **solver: Any,
) -> None:
    """Draw pictures from a checkpoint.

    Each picture depends on its own seed alone, not on the batch it is computed in. Settings are stored in each PNG:
    `mlx-sf info FILE.png` shows them.

    A model that takes prompts draws --prompt or --prompts. Its text encoder runs once for each new prompt, before the
    network is loaded; what it gives is kept in the cache. SenseNova-U1 draws any --height and --width that are
    multiples of 32; --dry-run says what it takes.
    """
    limit_cache()
    if dry_run and (known := known_u1(ckpt)) is not None:
        config = drawn_as(known, height, width, forcing)
        say_plan(config, how_drawn(config, solver, dtype, dequantize, batch_size or 1))
        return
    # everything that can be wrong with the request is found before the weights are read
    checkpoint = Checkpoint(named_checkpoint(ckpt, noise_scale, in_context_start, offline))
    checkpoint.config = config = drawn_as(checkpoint.config, height, width, forcing)
    sample = with_solver(config.sample, solver)
    checkpoint.pick(weights)
    pick_dtype(dtype)
    if dry_run:
        say_plan(config, how_drawn(config, solver, dtype, dequantize, batch_size or 1))
        return
    adapters = read_adapters(lora_paths, lora_scales, config.model)
    texts = features_of(checkpoint, text_encoder, text_encoder_precision, system_message, dtype, adapters)
    wanted = asked_for(config, classes, prompt, prompts)
    batch_size = batch_size or default_batch(config)
    random = as_rng(rng, rng_batch, rng_threads, rng_world)
    request = request_for(config, wanted, num_images, seed, noise, random)
    world = World.join()
    pixels = architecture(config.model).to_uint8
    out = Output(output, request, config.model.size, grid, world, pixels)
    steps = Stepwise(sample.steps, pixels) if stepwise else None
    strips = writable_folder(out.path if out.kind == "folder" else out.path.parent)
    dequantize = dequantize_by_default() if dequantize is None else dequantize
    if (note := quantization_note(config, dequantize)) and world.main:
        click.echo(note, err=True)
    if forcing and world.main:
        click.echo(f"note: Spectral Forcing is an ablation here: {config.name} was trained without it", err=True)
    if isinstance(texts, Prefixes):
        at_a_time = min(batch_size, len(request))
        memory_plan.check(config, how_drawn(config, solver, dtype, dequantize, at_a_time))
        say_notes(texts, world)  # before the first phase, which may take minutes
    ensure(texts, [str(a) for a in request.asked], sample.cfg != 1)
    if texts is not None:
        say_notes(texts, world)
    pipeline = load(
        checkpoint,
        weights=weights,
        dtype=dtype,
        dequantize=dequantize,
        text_encoder=texts,
        lora_paths=adapters,
        merge_lora=merge_lora,
    ).with_solver(solver)

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


def asked_for(config: Config, classes: str | None, prompt: tuple[str, ...], prompts: str | None) -> list[str] | None:
    """What the command line asks for: class names, or prompts for a model that takes them."""
    if config.model.num_classes:
        if prompt or prompts is not None:
            raise MlxSfError(f"{config.name}: draws classes, not prompts: use --classes (`mlx-sf classes` lists them)")
        names = ClassNames.of(config.model.num_classes, config.class_names)
        return names.split(classes) if classes is not None else None
    if classes is not None:
        raise MlxSfError(f"{config.name}: draws prompts, not classes: use --prompt")
    return [*prompt, *(read_prompts(prompts) if prompts is not None else [])]


def say_notes(features: TextFeatures | Prefixes, world: World) -> None:
    for note in features.notes() if world.main else ():
        click.echo(f"note: {spelt(note, lambda name: '--' + name.replace('_', '-'))}", err=True)


# ------------------------------------------------------------------------------------------------ memory


def known_u1(ckpt: str | None) -> Config | None:
    """What a SenseNova-U1 on the Hub says of itself, where the table of known models has it; nothing is fetched."""
    place = hub_name(ckpt) if ckpt is not None else None
    found = next((k for k in U1S if place is not None and (k.repo, k.path) == (place.repo, place.path)), None)
    return None if found is None else known_config(found.size)


def how_drawn(
    config: Config, solver: dict[str, Any], dtype: str | None, dequantize: bool | None, at_a_time: int
) -> memory_plan.Drawing:
    """What a memory plan asks of a drawing of so many pictures at a time."""
    expand = config.quantization is not None and (dequantize_by_default() if dequantize is None else dequantize)
    guided = with_solver(config.sample, solver).cfg != 1
    return memory_plan.Drawing(dtype or default_dtype(), expand, at_a_time, guided)


def say_plan(config: Config, how: memory_plan.Drawing) -> None:
    """Print a plan, and refuse what cannot fit."""
    if architecture(config.model).name != "sensenova_u1":
        raise MlxSfError("--dry-run: is about SenseNova-U1, whose two phases need a plan: leave it out")
    for line in memory_plan.plan(config, how).lines():
        click.echo(line)
    memory_plan.check(config, how)


def quantization_note(config: Config, dequantize: bool) -> str | None:
    """What to know about drawing from quantised weights on this device, if anything."""
    if config.quantization is None or on_gpu():
        return None
    slow = "quantised products are slow on a CPU"
    if dequantize:
        return f"note: {slow}: the weights are expanded to floats first, which takes the memory of floats"
    return f"note: {slow}, some 50 times slower than float32: leave out --no-dequantize if there is memory for floats"
