#!/usr/bin/env python3
"""On which data, and at which patch sizes, does Spectral Forcing help? Trains small networks on built-in scenes.

    scripts/synthetic_regimes.py                     # the experiment of the README
    scripts/synthetic_regimes.py --preset quick      # seconds: does it run?
    scripts/synthetic_regimes.py --preset full       # larger networks and pictures, for a Mac over a few nights

Every finished run is a line of OUTPUT/results.jsonl. Kill it at any time; the same command goes on. Tables and figures
are made of what is there.
"""

import sys
from dataclasses import replace
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_sf.errors import MlxSfError  # noqa: E402
from scripts.regimes.experiment import experiment, report  # noqa: E402
from scripts.regimes.plan import PRESETS  # noqa: E402


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--preset", type=click.Choice(list(PRESETS)), default="default", help="How large an experiment.")
@click.option("--seeds", type=click.IntRange(1, 1000), help="Number of seeds. Default: the preset's.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the results. Default: scripts/regimes, or runs/regimes-PRESET.",
)
@click.option("--report-only", is_flag=True, help="Train nothing: tables and figures of what is there.")
def main(preset: str, seeds: int | None, output: Path | None, report_only: bool) -> None:
    """Train and judge every network of the experiment that is still missing, then write tables and figures."""
    plan = PRESETS[preset]
    if seeds is not None:
        plan = replace(plan, seeds=tuple(range(seeds)))
    folder = output or (ROOT / "scripts" / "regimes" if preset == "default" else Path("runs") / f"regimes-{preset}")
    try:
        if not report_only:
            experiment(plan, folder)
        for path in report(plan, folder):
            click.echo(path)
    except MlxSfError as e:
        click.echo(f"synthetic_regimes: error: {e}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("synthetic_regimes: interrupted; the same command goes on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
