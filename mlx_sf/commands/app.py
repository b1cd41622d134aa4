"""`mlx-sf app`: a page to play with, in the browser."""

import contextlib
import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import click

from ..errors import MlxSfError


@click.command(short_help="Open a page to draw, watch the forcing, compare, and follow runs.")
@click.option("--output", "-o", default="samples/app", show_default=True, help="Folder that keeps drawn pictures.")
@click.option("--runs", default="runs", show_default=True, help="Folder of training runs to draw from and to follow.")
@click.option("--evals", default="evals", show_default=True, help="Folder of evaluations to show.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the page. [default: the first free one from 7860]")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the page. Any other than this machine's own needs a password, in MLX_SF_APP_PASSWORD.",
)
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in the browser.")
def command(output: str, runs: str, evals: str, port: int | None, host: str, browser: bool) -> None:
    """Open a page to play with: draw, watch the forcing, compare checkpoints, follow runs, read evaluations.

    It is reached from this machine alone, at 127.0.0.1, and asks nothing of other machines but the weights that you
    name. Ctrl-C ends it. Needs `pip install 'mlx-sf[app]'`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MlxSfError("the page needs Gradio, which is not installed: pip install 'mlx-sf[app]'")
    from ..web import safety

    password = safety.check_password(host, os.environ.get(safety.PASSWORD_VARIABLE))
    copies = safety.private_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Gradio is imported here: it takes two seconds, and reads the environment
        from ..web.page import Page, Place

        place = Place(host, port or 0, Path(output), Path(runs), Path(evals), password)
        with contextlib.closing(Page(place, copies)) as page:
            url = page.start(browser)
            if not safety.is_local(host):
                click.echo(safety.exposure(host, page.desk.kept.folder, place.runs, place.evals), err=True)
            click.echo(f"The page is at {url} (Ctrl-C ends it); pictures are kept in {page.desk.kept.folder}")
            page.wait()
    except KeyboardInterrupt:
        click.echo("\nclosed")
    finally:
        safety.forget_environment(copies)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
