"""`mlx-sf eval`: FID, Inception Score, KID, precision/recall and spectral distance."""

from typing import Any, get_args

import click

from ..device import defaults as device
from ..errors import MlxSfError, spelt
from ..metrics.checks import METRICS, Options
from ..metrics.evaluate import Evaluation, write_table_of
from ..sampling.solvers import Method
from .inception_options import inception_options
from .options import go_offline, offline_option

_SAMPLING = ("cfg", "weights", "steps", "method", "cfg_interval", "sample_t_eps", "seed", "dtype", "save_samples")


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(p) for p in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 2.6,2.8,3.0") from None


def _names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(p.strip() for p in text.split(",") if p.strip()) if text else ()


@click.command(short_help="Measure FID, IS, KID, precision/recall of a checkpoint or a folder.")
@click.option(
    "--ckpt",
    help="Checkpoint to draw samples from: a file, a run folder, a name of `mlx-sf models`, or org/name on the Hub.",
)
@offline_option
@click.option("--samples", type=click.Path(), help="Folder of finished pictures to judge, instead of --ckpt.")
@click.option(
    "--ref",
    required=True,
    help="Reference: a statistics .npz (of `mlx-sf stats`, or a published one), its URL, hf://org/name/file.npz, "
    "or a folder.",
)
@click.option(
    "--num-images", "-n", type=int, help="Number of images, the same for each class. [default: 50000; all of --samples]"
)
@click.option(
    "--cfg", callback=_numbers, help="Guidance scales to go through: 2.6,2.8,3.0. [default: the checkpoint's]"
)
@click.option("--weights", callback=_names, help="Weight sets to go through: ema1,ema2. [default: ema1]")
@click.option("--steps", type=int, help="Steps of the solver. [default: the checkpoint's, usually 50]")
@click.option(
    "--method", type=click.Choice(get_args(Method)), help="Solver that draws the samples. [default: the checkpoint's]"
)
@click.option(
    "--cfg-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Guide only where LOW < t < HIGH (t = 0 is noise). [default: the checkpoint's]",
)
@click.option("--sample-t-eps", type=float, help="Lower bound of 1 - t in the velocity. [default: the training's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image; image i has seed + i.")
@click.option(
    "--dtype",
    type=click.Choice(list(device.DTYPES)),
    help="Type of the network's matrix products. [default: bfloat16 on a GPU]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures drawn or measured at a time."
)
@click.option("--save-samples", is_flag=True, help="Keep the drawn images as PNG.")
@click.option(
    "--metrics",
    callback=_names,
    help=f"Metrics to compute, of {', '.join(METRICS)}. [default: all that the reference allows]",
)
@inception_options
@click.option(
    "--is-splits", type=click.IntRange(1), default=10, show_default=True, help="Splits of the Inception Score."
)
@click.option("--kid-subsets", type=click.IntRange(1), default=100, show_default=True, help="Number of subsets of KID.")
@click.option(
    "--kid-subset-size", type=click.IntRange(2), default=1000, show_default=True, help="Pictures in a subset of KID."
)
@click.option(
    "--neighbours",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Nearest neighbours that precision and recall look at.",
)
@click.option("--output", "-o", default="evals", show_default=True, help="Folder for records, figures, progress.")
@click.option("--table", type=click.Path(), help="CSV table to append to. [default: OUTPUT/results.csv]")
@click.pass_context
def command(
    context: click.Context,
    feature_layer: str,
    is_splits: int,
    steps: int | None,
    method: str | None,
    cfg_interval: tuple[float, float] | None,
    sample_t_eps: float | None,
    metrics: tuple[str, ...],
    offline: bool,
    **options: Any,
) -> None:
    """Measure samples against a reference, as torch-fidelity would.

    Samples are drawn from --ckpt, equally many of each class, or taken from --samples. An interrupted evaluation is
    continued by the same command; one that is finished is not computed again.
    """
    go_offline(offline)
    if (options["ckpt"] is None) == (options["samples"] is None):
        raise click.UsageError("give either --ckpt or --samples")
    if options["samples"] is not None:
        source = click.core.ParameterSource.DEFAULT
        given = [n for n in _SAMPLING if context.get_parameter_source(n) not in (source, None)]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} is for --ckpt: --samples are finished pictures")
    solver = {"steps": steps, "method": method, "sample_t_eps": sample_t_eps, "cfg_interval": cfg_interval}
    device.limit_cache()
    o = Options(solver=solver, tap=feature_layer, splits=is_splits, metrics=metrics or None, **options)
    evaluation = Evaluation(o, say)
    results = evaluation.execute()
    for line in write_table_of(results):
        click.echo(line)
    if not results and evaluation.world.main:
        raise MlxSfError("nothing was measured")


def say(line: str) -> None:
    """A line of the report, options spelt as flags."""
    click.echo(spelt(line, lambda name: "--" + name.replace("_", "-")))
