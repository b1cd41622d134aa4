"""`mlx-sf selftest`: the golden checks on this device."""

import sys
import time

import click

from ..device.defaults import describe
from ..parity.selftest import run


@click.command(short_help="Check this device against the published code's numbers.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "all"]),
    default="all",
    show_default=True,
    help="Type of the matrix products to check.",
)
def command(dtype: str) -> None:
    """Repeat the golden checks on this machine's device and print each error beside its tolerance.

    The numbers come from the published PyTorch code. Takes seconds; exits with status 1 if a check fails.
    """
    start, failed, total = time.monotonic(), 0, 0
    about = describe()
    click.echo(f"mlx-sf {about['mlx-sf']}, mlx {about['mlx']}, {about['device']}")
    click.echo(f"{'check':<52} {'dtype':<9} {'error':>9} {'tolerance':>9}  share")
    for name in ("float32", "bfloat16") if dtype == "all" else (dtype,):
        for check in run(name):
            total += 1
            failed += not check.passed
            share = check.error / check.tolerance
            verdict = "" if check.passed else "  FAILED"
            click.echo(
                f"{check.name:<52} {check.dtype:<9} {check.error:9.1e} {check.tolerance:9.1e} {share:6.1%}{verdict}"
            )
    click.echo(f"{total - failed} of {total} checks passed in {time.monotonic() - start:.1f} s")
    if failed:
        click.echo("mlx-sf: error: this device does not reproduce the reference within tolerance", err=True)
        sys.exit(1)
