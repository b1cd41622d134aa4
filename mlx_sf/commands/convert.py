"""`mlx-sf convert`: a PyTorch checkpoint becomes one self-describing file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ..checkpoint import quantize_checkpoint
from ..config import FlowConfig, ModelConfig, QuantizationConfig
from ..convert import FLAG_FIELDS, PUBLISHED_SCHEDULES, Report, convert, flag_name
from ..errors import MlxSfError
from ..metrics.inception_weights import convert_inception_file, is_inception_file
from ..progress import Progress
from ..quantize import describe
from ..tensor_file import SUFFIXES

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
@_config_flags
def command(
    source: Path,
    target: Path,
    weights: str | None,
    dtype: str | None,
    quantize: str | None,
    q_group_size: str | None,
    verify: bool,
    **fields: Any,
) -> None:
    """Turn SOURCE, a PyTorch JiT checkpoint (.pth), into TARGET, an .npz or .safetensors file with its configuration.

    Reads full training checkpoints and bare state dicts, the zip layout of torch.save and the older one, without
    PyTorch and without running anything in the file. Memory stays near that of one tensor.

    Settings come from the weights' shapes and the trainer's options in the file; the flags below are for what neither
    says. A flag that contradicts the file is an error. The public FID Inception weights are recognised, too.

    With --quantize, SOURCE may also be a checkpoint of mlx-sf (file, run folder, Hugging Face repo id), not yet
    quantised. The result draws pictures and can be evaluated; it cannot be trained or exported.
    """
    names = {name.lower(): name for name in FLAG_FIELDS}
    flags = {names[k]: v for k, v in fields.items() if v is not None}
    if q_group_size is not None and quantize is None:
        raise click.UsageError("--q-group-size: goes with --quantize 8 or 4")
    q = None if quantize is None else QuantizationConfig(int(quantize), int(q_group_size or 64))
    own = _is_own(source, q)
    if own and flags:
        raise MlxSfError(f"{source}: says its settings itself: leave out {flag_name(next(iter(flags)))}")
    if not own and is_inception_file(source):
        if q is not None:
            raise MlxSfError(f"{source}: holds Inception weights, which are not quantised: leave out --quantize")
        click.echo(convert_inception_file(source, target))
        return
    with Progress(0, f"converting {source.name}", "tensors") as bar:

        def tick(done: int, total: int) -> None:
            bar.set_total(total)
            bar.update()

        sets = [w.strip() for w in weights.split(",")] if weights else None
        if own:
            assert q is not None
            config = quantize_checkpoint(source, target, q, sets, dtype, tick)
        else:
            report = convert(source, target, sets, dtype or "float32", flags, tick, q)
    if own:
        click.echo(f"{source}: {config.name}, weights {', '.join(config.weights)}")
    else:
        _print(source, report)
    if q is not None:
        click.echo(f"  {describe(q)}; all else as it was")
    click.echo(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    if verify:
        _verify(target)


def _is_own(source: Path, q: QuantizationConfig | None) -> bool:
    """Whether SOURCE is a checkpoint of mlx-sf, which only --quantize has use for."""
    if source.suffix in SUFFIXES or source.is_dir():
        if q is None:
            raise MlxSfError(f"{source}: is no PyTorch file; a checkpoint of mlx-sf is converted with --quantize only")
        return True
    return q is not None and not source.exists() and source.suffix not in (".pth", ".pt", ".ckpt", ".bin")


def _print(source: Path, report: Report) -> None:
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


def _verify(target: Path) -> None:
    from ..verify import verify_checkpoint

    for name, result in verify_checkpoint(target).items():
        click.echo(f"  verified {name}: {result}")
