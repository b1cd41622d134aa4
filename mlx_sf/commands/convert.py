"""`mlx-sf convert`: a PyTorch checkpoint becomes one self-describing file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ..config import FlowConfig, ModelConfig
from ..convert import FLAG_FIELDS, PUBLISHED_SCHEDULES, Report, convert, flag_name
from ..metrics.inception_weights import convert_inception_file, is_inception_file
from ..progress import Progress

_HELP = {
    "in_context_start": "Block before which the in-context tokens enter (asked for with sizes that are no preset).",
    "noise_scale": "Scale of the noise: 1.0 for models at 256 pixels, 2.0 at 512 (asked for with a bare state dict).",
    "window_size": "Side of the windows that are filtered on their own; 0 for the whole image.",
    "pred_param": "What the network predicts.",
}


def _config_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option per configuration field, all unset by default: they only fill in what the file does not say."""
    types = {f.name: f.type for part in (ModelConfig, FlowConfig) for f in dataclasses.fields(part)}
    for name in reversed(FLAG_FIELDS):
        kind: Any = types[name]
        flag = flag_name(name)
        if kind is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", name.lower(), default=None, help=_HELP.get(name))
        else:
            choices = PUBLISHED_SCHEDULES if name == "scale_schedule" else get_args(kind)
            choice = click.Choice(choices) if choices else kind
            option = click.option(flag, name.lower(), type=choice, default=None, help=_HELP.get(name))
        function = option(function)
    return function


@click.command(short_help="Turn a PyTorch checkpoint into one self-describing file.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    help="Weight set: model, ema1 or ema2; several with commas. [default: ema1, or the only one there is]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="Type of the large matrices; norms, embeddings and positions stay float32.",
)
@click.option("--verify", is_flag=True, help="Load the result, run it once, check finiteness and the parameter count.")
@_config_flags
def command(source: Path, target: Path, weights: str | None, dtype: str, verify: bool, **fields: Any) -> None:
    """Turn SOURCE, a PyTorch JiT checkpoint (.pth), into TARGET, an .npz or .safetensors file with its configuration.

    Reads full training checkpoints and bare state dicts, the zip layout of torch.save and the older one, without
    PyTorch and without running anything in the file. Memory stays near that of one tensor.

    Settings come from the weights' shapes and the trainer's options in the file; the flags below are for what neither
    says. A flag that contradicts the file is an error. The public FID Inception weights are recognised, too.
    """
    if is_inception_file(source):
        click.echo(convert_inception_file(source, target))
        return
    names = {name.lower(): name for name in FLAG_FIELDS}
    flags = {names[k]: v for k, v in fields.items() if v is not None}
    with Progress(0, f"converting {source.name}", "tensors") as bar:

        def tick(done: int, total: int) -> None:
            bar.set_total(total)
            bar.update()

        sets = [w.strip() for w in weights.split(",")] if weights else None
        report = convert(source, target, sets, dtype, flags, tick)
    _print(source, target, report)
    if verify:
        _verify(target)


def _print(source: Path, target: Path, report: Report) -> None:
    c = report.config
    m = c.model
    kind = "vanilla" if not m.spectral_forcing else "forced"
    click.echo(f"{source}: {report.layout} layout, weights {', '.join(c.weights)}")
    click.echo(
        f"  {c.name}, {kind}: {m.img_size} px, patch {m.patch_size}, depth {m.depth}, width {m.hidden_size}, "
        f"{m.num_heads} heads, {m.num_classes} classes, {report.parameters:,} parameters"
    )
    for origin, settings in report.origin.items():
        label = "assumed, as in all published models" if origin == "published" else f"from the {origin}"
        click.echo(f"  {label}: {', '.join(settings)}")
    if report.ignored:
        click.echo(f"  ignored on purpose (not learned): {', '.join(report.ignored)}")
    click.echo(f"{target}: {report.bytes / 1e6:.1f} MB")


def _verify(target: Path) -> None:
    from ..verify import verify_checkpoint

    for name, result in verify_checkpoint(target).items():
        click.echo(f"  verified {name}: {result}")
