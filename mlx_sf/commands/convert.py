"""`mlx-sf convert`: a PyTorch checkpoint becomes one self-describing file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ..checkpoints.checkpoint import size_on_disk
from ..checkpoints.conversion import convert
from ..checkpoints.convert import minit2i
from ..checkpoints.convert.jit_settings import FLAG_TYPES, PUBLISHED_SCHEDULES
from ..checkpoints.convert.report import Report
from ..checkpoints.load import verify_checkpoint
from ..common.progress import Progress
from ..errors import MlxSfError
from ..formats.tensor_file import SUFFIXES
from ..metrics.inception_weights import convert_inception_file, is_inception_file
from ..models import architecture
from ..models.quantize import describe
from .options import go_offline, offline_option

_HELP = {
    "img_size": "Side of the images in pixels.",
    "patch_size": "Side of the patches in pixels.",
    "hidden_size": "Width of the transformer.",
    "depth": "Number of blocks.",
    "num_heads": "Number of attention heads.",
    "bottleneck_dim": "Width between the two layers of the patch embedder.",
    "in_context_len": "Number of in-context class tokens.",
    "in_context_start": "Block before which the in-context tokens enter (asked for with sizes that are no preset).",
    "num_classes": "Number of classes, without the one for no class.",
    "mlp_ratio": "Width of the feed-forward before SwiGLU's two thirds, as a multiple of the transformer's.",
    "attn_dropout": "Dropout on attention weights in training.",
    "proj_dropout": "Dropout on attention outputs and in the feed-forward in training.",
    "spectral_forcing": "Whether Spectral Forcing is in front of the network.",
    "window_size": "Side of the windows that are filtered on their own; 0 for the whole image.",
    "scale_schedule": "How the forcing's cutoff opens with t.",
    "fixed_scale": "The schedule's value where it is fixed, 0 to 1.",
    "mask_sharpness": "Slope of the forcing's soft mask.",
    "min_keep": "Cutoff radius of the forcing at t = 0.",
    "max_keep": "Cutoff radius of the forcing at t = 1.",
    "pred_param": "What the network predicts: the picture, the velocity, or a blend of both.",
    "hybrid_x_weight_mode": "How the hybrid blends its two heads over t.",
    "hybrid_x_weight_power": "Exponent of the weight of the hybrid's picture head.",
    "hybrid_x_weight_min": "Smallest weight of the hybrid's picture head.",
    "hybrid_x_weight_max": "Largest weight of the hybrid's picture head.",
    "noise_scale": "Scale of the noise: 1.0 for models at 256 pixels, 2.0 at 512 (asked for with a bare state dict).",
    "t_eps": "Lower bound of 1 - t in the velocity.",
    "P_mean": "Mean of the logit of the training times.",
    "P_std": "Standard deviation of the logit of the training times.",
    "label_drop_prob": "Share of the labels that training dropped.",
}


# settings of text to image, for an Orbax folder, which says neither
_TEXT_HELP = {
    "text_length": "Number of text places.",
    "text_encoder": "Text encoder that the network reads, a name on the Hugging Face Hub.",
}


def _config_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option per setting, all unset by default: they only fill in what the file does not say."""
    for name, text in reversed(_TEXT_HELP.items()):
        flag = "--" + name.replace("_", "-")
        function = click.option(flag, name, type=minit2i.SETTINGS[name], default=None, help=text)(function)
    for name, kind in reversed(FLAG_TYPES.items()):
        flag = name.lower().replace("_", "-")
        if kind is bool:
            option = click.option(f"--{flag}/--no-{flag}", name.lower(), default=None, help=_HELP[name])
        else:
            choices = PUBLISHED_SCHEDULES if name == "scale_schedule" else get_args(kind)
            choice = click.Choice(choices) if choices else kind
            option = click.option(f"--{flag}", name.lower(), type=choice, default=None, help=_HELP[name])
        function = option(function)
    return function


_LABELS = {
    "published": "assumed, as in all published models",
    "table": "not in its files, from the table of known models",
    "config.json": "from config.json",
    "scheduler_config.json": "from scheduler_config.json",
}


@click.command(short_help="Turn a PyTorch checkpoint into one self-describing file.")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    help="Weight set: model, ema1 or ema2; several with commas. [default: ema1, or the only one there is]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the large matrices; norms, embeddings and positions stay float32. "
    "[default: float32; with --quantize of a checkpoint of mlx-sf, as there]",
)
@click.option(
    "--quantize", type=click.Choice(["8", "4"]), help="Bits per weight of the blocks' products, for inference only."
)
@click.option(
    "--q-group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale and a bias. [default: 64]",
)
@click.option("--verify", is_flag=True, help="Load the result, run it once, check finiteness and the parameter count.")
@offline_option
@_config_flags
def command(
    source: str,
    target: Path,
    weights: str | None,
    dtype: str | None,
    quantize: str | None,
    q_group_size: str | None,
    verify: bool,
    offline: bool,
    **fields: Any,
) -> None:
    """Turn SOURCE into TARGET, an .npz or .safetensors file with its configuration.

    SOURCE is a JiT, MiniT2I or SenseNova-U1 checkpoint. SenseNova-U1 becomes 8 bits unless --dtype or --quantize says
    otherwise.

    SOURCE is a PyTorch checkpoint (.pth, .pt), a folder in a diffusers layout, an Orbax folder of JAX, a name of
    `mlx-sf models`, or a place on the Hugging Face Hub, org/name/folder.

    A TARGET without suffix becomes a folder of .safetensors shards with an index.

    Reads full training checkpoints and bare state dicts, the zip layout of torch.save and the older one, without
    PyTorch and without running anything in the file. Memory stays near that of one tensor.

    Settings come from the weights' shapes and the trainer's options in the file; the flags below are for what neither
    says. A flag that contradicts the file is an error. The public FID Inception weights are recognised, too.

    With --quantize, SOURCE may also be a checkpoint of mlx-sf (file, run folder, Hugging Face repo id), not yet
    quantised. The result draws pictures and can be evaluated; it cannot be trained or exported.
    """
    go_offline(offline)
    names = {name.lower(): name for name in (*FLAG_TYPES, *_TEXT_HELP)}
    settings = {names[k]: v for k, v in fields.items() if v is not None}
    if q_group_size is not None and quantize is None:
        raise click.UsageError("--q-group-size: goes with --quantize 8 or 4")
    path = Path(source)
    if path.is_file() and path.suffix not in SUFFIXES and is_inception_file(path):
        if quantize is not None:
            raise MlxSfError(f"{source}: holds Inception weights, which are not quantised: leave out --quantize")
        click.echo(convert_inception_file(source, target))
        return
    with Progress(0, f"converting {path.name}", "tensors") as bar:

        def tick(done: int, total: int) -> None:
            bar.set_total(total)
            bar.update()

        sets = [w.strip() for w in weights.split(",")] if weights else None
        bits, group = None if quantize is None else int(quantize), int(q_group_size or 64)
        report = convert(
            source, target, weights=sets, dtype=dtype, quantize=bits, group_size=group, on_tensor=tick, **settings
        )
    if report.layout == "mlx-sf":
        click.echo(f"{source}: {report.config.name}, weights {', '.join(report.config.weights)}")
    else:
        _print(source, report)
    if report.config.quantization is not None:
        click.echo(f"  {describe(report.config.quantization)}; all else as it was")
    click.echo(f"{target}: {size_on_disk(target) / 1e6:.1f} MB")
    if verify:
        for name, result in verify_checkpoint(target).items():
            click.echo(f"  verified {name}: {result}")


def _print(source: str, report: Report) -> None:
    c = report.config
    m = c.model
    text = getattr(m, "text", None)
    reads = f"{m.num_classes} classes" if text is None else f"text places {text.length} of {text.width}"
    size = f"{m.size[0]} px"
    if architecture(m).resized is not None:
        size, reads = "any size", "prompts by its understanding side"
    kind = "vanilla" if m.forcing is None else "forced"
    click.echo(f"{source}: {report.layout} layout, weights {', '.join(c.weights)}")
    click.echo(
        f"  {c.name}, {kind}: {size}, patch {m.patch_size}, depth {m.depth}, width {m.hidden_size}, "
        f"{m.num_heads} heads, {reads}, {report.parameters:,} parameters"
    )
    for origin, settings in report.origin.items():
        label = _LABELS.get(origin, f"from the {origin}")
        click.echo(f"  {label}: {', '.join(settings)}")
    for note in report.notes:
        click.echo(f"  {note}")
    if report.ignored:
        click.echo(f"  ignored on purpose (not learned): {', '.join(report.ignored)}")
