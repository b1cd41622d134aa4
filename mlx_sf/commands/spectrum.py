"""`mlx-sf spectrum`: what a data set's spectrum says about the forcing, and where a network's capacity goes."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.load import load_model
from ..checkpoints.resolve import resolve
from ..common.files import check_writable, writable_folder
from ..data.sources import Source, open_source
from ..device import defaults as device
from ..errors import MlxSfError, option
from ..flow import FlowConfig, published_noise_scale
from ..spectral import ForcingConfig
from ..spectrum import report
from ..spectrum.capacity import Capacity, measure_capacity
from ..spectrum.meter import CHANNELS, Spectrum, check_sizes, measure
from ..spectrum.power_law import fit_power_law
from ..spectrum.ratio import data_schedule
from ..spectrum.verdict import assess, judge

_KINDS = ("linear", "cosine", "power", "fixed", "data")


def _parse_schedules(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> list[tuple[str, float | None]]:
    """("power:2",) -> [("power", 2.0)]."""
    found = []
    for text in texts:
        kind, value = (text.partition(":")[i] for i in (0, 2))
        try:
            number = float(value) if value else None
        except ValueError:
            raise click.BadParameter(f"{text!r}: {value!r} is no number, want power:2 or the like") from None
        if kind not in _KINDS:
            raise click.BadParameter(f"{text!r} is no schedule, want one of {', '.join(_KINDS)}")
        if (kind in ("power", "fixed") and number is None) or (kind in ("linear", "cosine") and value):
            raise click.BadParameter(f"{text!r}: want linear, cosine, power:P, fixed:SCALE or data:DELTA")
        found.append((kind, number))
    return found


@click.command(short_help="Measure a data set's spectrum, and what the forcing does to it.")
@click.argument("data", required=False)
@click.option(
    "--num-images", "-n", type=click.IntRange(1), default=2000, show_default=True, help="Pictures to measure."
)
@click.option("--img-size", type=click.IntRange(8), help="Side of the crops. [default: the checkpoint's, or 256]")
@click.option("--window-size", type=click.IntRange(2), help="Side of the forcing's windows. [default: the image]")
@click.option(
    "--noise-scale",
    type=float,
    help="Scale of the flow's noise. [default: the checkpoint's, or as published for the size]",
)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    callback=_parse_schedules,
    metavar="NAME[:VALUE]",
    help="Schedules to judge: linear, cosine, power:P, fixed:SCALE, data:DELTA; repeat it for several. "
    "[default: the checkpoint's or linear, and data]",
)
@click.option(
    "--fit-range",
    type=int,
    nargs=2,
    metavar="LOW HIGH",
    help="Range of frequencies k that the power law is fitted to. [default: 4, 3/4 of the side]",
)
@click.option("--ckpt", help="Judge this checkpoint: its size, noise and schedule; and where its capacity goes.")
@click.option("--weights", help="Weight set of --ckpt. [default: ema1]")
@click.option(
    "--capacity/--no-capacity",
    default=None,
    help="Whether to measure the network's errors per band. [default: with --ckpt]",
)
@click.option(
    "--capacity-images",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Pictures that the network's errors are measured on.",
)
@click.option("--dtype", type=click.Choice(list(device.DTYPES)), help="Type of the network's products.")
@click.option("--schedule-out", type=click.Path(), help="Write the data-driven schedule, for `mlx-sf train`.")
@click.option(
    "--delta",
    type=float,
    default=1.0,
    show_default=True,
    help="Data-to-noise ratio at the cutoff of data-driven schedules.",
)
@click.option(
    "--schedule-from",
    type=click.Choice(["measured", "fit"]),
    default="measured",
    show_default=True,
    help="Place a data-driven cutoff by the measured bands, or by the fitted power law.",
)
@click.option("--enlarged", is_flag=True, help="Accept pictures smaller than --img-size.")
@click.option("--split", default="train", show_default=True, help="Split of a Hugging Face data set.")
@click.option("--image-column", help="Column of pictures in a Hugging Face data set. [default: found]")
@click.option("--label-column", help="Column of labels in a Hugging Face data set. [default: found]")
@click.option("--streaming", is_flag=True, help="Read a Hugging Face data set as a stream instead of storing it.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Seed of the pictures' order, noise and scenes.",
)
@click.option("--output", "-o", default="spectrum", show_default=True, help="Folder for the record and the figures.")
def command(data: str | None, fit_range: tuple[int, int] | None, **options: Any) -> None:
    """Measure the spectrum of DATA and say what Spectral Forcing does to it.

    DATA is a folder of pictures, a Hugging Face data set, or nothing for the built-in scenes. Printed: the power law
    with its intervals, a table per schedule, a verdict. Written: spectrum.json, spectrum.png, schedules.png, and with
    --ckpt capacity.png, the network's error per band and time against the Wiener estimate.
    """
    o = _Options(**options)
    device.limit_cache()
    folder = writable_folder(o.output)
    if o.schedule_out is not None:
        check_writable(o.schedule_out)
    checkpoint = Checkpoint(resolve(o.ckpt)) if o.ckpt else None
    if o.capacity and checkpoint is None:
        raise click.UsageError("--capacity is about a network: give --ckpt")
    size, forcing, flow = _settle(o, checkpoint.config if checkpoint else None)
    source = _open(data, o, size)
    if not o.enlarged and (note := check_sizes(source, o.seed)):
        click.echo(f"note: {note}")
    window = (o.window_size or size) if forcing is None else forcing.window((size, size))[0]
    spectrum = measure(source, o.num_images, window, o.seed)
    span = {} if fit_range is None else {"low": fit_range[0], "high": fit_range[1]}
    laws = {c: fit_power_law(spectrum, c, **span) for c in CHANNELS}
    _say(report.spectrum_lines(spectrum, laws))
    power = laws["mean"].at(spectrum.k.clip(1)) if o.schedule_from == "fit" else None
    cutoffs = data_schedule(spectrum, flow.noise_scale, o.delta, power)
    shown = _schedules(o, forcing, flow, spectrum, checkpoint is not None)
    tables = {name: _judged(spectrum, f, flow) for name, f in shown.items()}
    for name, (rows, verdict) in tables.items():
        _say(["", *report.table_lines(name, rows, verdict)])
    _say(["", *report.meaning()])
    capacity = _capacity(o, checkpoint, source, spectrum)
    record = report.record(spectrum, laws, tables, flow, capacity, checkpoint.config if checkpoint else None)
    report.write_json(folder / "spectrum.json", record)
    from ..spectrum import figures  # matplotlib takes a second to load: after everything that can go wrong

    figures.plot_spectrum(folder / "spectrum.png", spectrum, laws, shown, flow)
    figures.plot_schedules(folder / "schedules.png", {n: rows for n, (rows, _) in tables.items()}, flow)
    written = ["spectrum.json", "spectrum.png", "schedules.png"]
    if capacity is not None and checkpoint is not None:
        name = f"{checkpoint.config.name} ({checkpoint.path.name})"
        figures.plot_capacity(folder / "capacity.png", capacity, spectrum, checkpoint.config, name)
        written.append("capacity.png")
    if o.schedule_out is not None:
        report.write_json(
            Path(o.schedule_out), report.schedule_record(cutoffs, o.delta, spectrum, flow, o.schedule_from)
        )
        _say(["", f"{o.schedule_out}: mlx-sf train --scale-schedule data --schedule-cutoffs {o.schedule_out}"])
    _say(["", f"{folder}: {', '.join(written)}"])


@dataclasses.dataclass(frozen=True)
class _Options:
    """The flags, typed."""

    num_images: int
    img_size: int | None
    window_size: int | None
    noise_scale: float | None
    schedules: list[tuple[str, float | None]]
    ckpt: str | None
    weights: str | None
    capacity: bool | None
    capacity_images: int
    dtype: str | None
    schedule_out: str | None
    delta: float
    schedule_from: str
    enlarged: bool
    split: str
    image_column: str | None
    label_column: str | None
    streaming: bool
    seed: int
    output: str


def _settle(o: _Options, base: Config | None) -> tuple[int, ForcingConfig | None, FlowConfig]:
    """Image side, forcing and flow that are judged: the checkpoint's, or the published ones for the image size."""
    if base is None:
        size = o.img_size or 256
        flow = FlowConfig(noise_scale=published_noise_scale(size) if o.noise_scale is None else o.noise_scale)
        return size, ForcingConfig(o.window_size or 0).on((size, size)), flow
    forcing, size = base.model.forcing, base.model.size[0]
    window = size if forcing is None else forcing.window(base.model.size)[0]
    for name, asked, own in (("img_size", o.img_size, size), ("window_size", o.window_size, window)):
        if asked not in (None, own):
            raise MlxSfError(f"{option(name)} is {asked}, but {o.ckpt} has {own}: leave it out, or {option('ckpt')}")
    if o.noise_scale not in (None, base.flow.noise_scale) and o.capacity is not False:
        raise MlxSfError(
            f"{option('noise_scale')} is {o.noise_scale:g}, but {o.ckpt} was trained with "
            f"{base.flow.noise_scale:g}: leave it out, or add --no-capacity"
        )
    flow = base.flow if o.noise_scale is None else dataclasses.replace(base.flow, noise_scale=o.noise_scale)
    return size, forcing, flow


def _open(data: str | None, o: _Options, size: int) -> Source:
    return open_source(
        data,
        size,
        split=o.split,
        image_column=o.image_column,
        label_column=o.label_column,
        streaming=o.streaming,
        epoch_size=max(o.num_images, o.capacity_images) if data is None or o.streaming else None,
        seed=o.seed,
    )


def _schedules(
    o: _Options, forcing: ForcingConfig | None, flow: FlowConfig, spectrum: Spectrum, own: bool
) -> dict[str, ForcingConfig | None]:
    """The forcings to judge, by what to call them."""
    plain = dataclasses.replace(
        forcing or ForcingConfig(), scale_schedule="linear", schedule_power=1.0, schedule_cutoffs=(), exact_end=False
    )
    shown: dict[str, ForcingConfig | None] = {}
    if own:
        shown[f"{'no forcing' if forcing is None else forcing.scale_schedule} (the checkpoint's)"] = forcing
    default: list[tuple[str, float | None]] = [("data", None)]
    if not own or forcing is None:
        default.insert(0, ("linear", None))
    for kind, value in o.schedules or default:
        if kind == "data":
            delta = o.delta if value is None else value
            radii = data_schedule(spectrum, flow.noise_scale, delta)
            shown[f"data, δ = {delta:g}"] = dataclasses.replace(plain, scale_schedule="data", schedule_cutoffs=radii)
        elif kind == "power":
            shown[f"power {value:g}"] = dataclasses.replace(plain, scale_schedule="power", schedule_power=value or 0.0)
        elif kind == "fixed":
            shown[f"fixed {value:g}"] = dataclasses.replace(plain, scale_schedule="fixed", fixed_scale=value or 0.0)
        else:
            name = "linear (published)" if kind == "linear" else kind
            shown[name] = dataclasses.replace(plain, scale_schedule=kind)  # type: ignore[arg-type]
    return shown


def _judged(
    spectrum: Spectrum, forcing: ForcingConfig | None, flow: FlowConfig
) -> tuple[list[report.Row], report.Verdict]:
    rows = assess(spectrum, forcing, flow)
    return rows, judge(rows)


def _capacity(o: _Options, checkpoint: Checkpoint | None, source: Source, spectrum: Spectrum) -> Capacity | None:
    if checkpoint is None or o.capacity is False:
        return None
    network, config = load_model(checkpoint, o.weights, device.pick_dtype(o.dtype), device.dequantize_by_default())
    capacity = measure_capacity(network, config, source, spectrum, o.capacity_images, seed=o.seed)
    _say(["", *report.capacity_lines(capacity, f"{config.name} ({checkpoint.path.name})")])
    return capacity


def _say(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
