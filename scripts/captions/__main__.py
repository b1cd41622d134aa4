"""Does Spectral Forcing help text to image? Trains small networks on captioned scenes, scores them, and reports.

    python -m scripts.captions run --preset small --minutes 130 --workers 2
    python -m scripts.captions report --preset small

`run` can be killed at any time; the same command goes on.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_sf.errors import MlxSfError

from .plan import PRESETS

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--output",
            type=click.Path(path_type=Path),
            help="Folder of the results. Default: scripts/captions/PRESET; runs/captions-micro for micro.",
        ),
        click.option("--preset", type=click.Choice(list(PRESETS)), default="small", help="How large an experiment."),
    ):
        command = option(command)
    return command


def _folder(preset: str, output: Path | None) -> Path:
    if output is not None:
        return output.absolute()
    return _ROOT / "runs" / "captions-micro" if preset == "micro" else _HERE / preset


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True}, help=__doc__)
def main() -> None:
    pass


@main.command()
@_common
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after so many minutes. Default: when all is done.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Processes, which share out the cores.")
@click.option("--every", type=click.FloatRange(min=0), default=120.0, help="Seconds between checkpoints.")
@click.option("--parent", type=int, hidden=True, help="Stop when this process is gone.")
def run(
    preset: str, output: Path | None, minutes: float | None, workers: int, every: float, parent: int | None
) -> None:
    """Train and score every network that is still missing, or as many as there is time for."""
    until = None if minutes is None else time.time() + 60 * minutes
    from .experiment import Stopper, run_workers, work

    folder, stop = _folder(preset, output), Stopper(until, parent)
    with stop.heeding_signals():
        if workers == 1:
            work(PRESETS[preset], folder, stop, every)
            return
        arguments: list[Any] = ["--preset", preset, "--output", folder, "--every", every]
        arguments += [] if minutes is None else ["--minutes", minutes]
        run_workers([str(a) for a in arguments], workers, stop)


@main.command()
@_common
def report(preset: str, output: Path | None) -> None:
    """Write tables and figures of what is there. Of the default folder, into this program's README."""
    from .report import report as write

    folder = _folder(preset, output)
    readme = _HERE / "README.md" if folder == _HERE / preset else folder / "README.md"
    for path in write(preset, PRESETS[preset], folder, readme):
        click.echo(os.path.relpath(path))


if __name__ == "__main__":
    try:
        main(prog_name="python -m scripts.captions")
    except MlxSfError as e:
        click.echo(f"captions: error: {e}", err=True)
        sys.exit(1)
