"""The page: five tabs over one desk, and the server that gives it out."""

import threading
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ..errors import MlxSfError, option
from . import safety
from .compare import compare_tab
from .desk import Desk
from .draw import draw_tab
from .evals import evaluate_tab
from .files import MAX_UPLOAD, Kept
from .follow import follow_tab
from .forcing import forcing_tab

_TITLE = "mlx-sf"
_HEAD = "# mlx-sf\nPictures straight in pixels: draw, see what the network is allowed to see, follow a run."
# system fonts alone: Gradio's own would be asked for elsewhere
_FONT, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
_STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Place:
    """Where the page is given out, and of which folders.

    `host`: an address, 127.0.0.1 for this machine alone. `port`: 0 takes a free one from 7860 on. `output`: folder for
    the pictures. `password`: needed to log in, None where none is.
    """

    host: str = "127.0.0.1"
    port: int = 0
    output: Path = Path("samples/app")
    runs: Path = Path("runs")
    evals: Path = Path("evals")
    password: str | None = None


class Page:
    """A page that is given out from `start` to `close`.

    `copies`: folder of what Gradio takes in and gives out, of `safety.private_environment`; None makes one.
    """

    def __init__(self, place: Place, copies: Path | None = None) -> None:
        self.place = place
        self.copies = copies or safety.private_environment()
        self.desk = Desk(Kept(place.output), place.runs, place.evals)
        self.url = ""
        self._blocks = build(self.desk)

    def start(self, browser: bool = False) -> str:
        """Give the page out; its address. Raises `MlxSfError` where it cannot be had."""
        host, port = self.place.host, self._port()
        served = [str(self.desk.kept.folder)]
        password = self.place.password
        guard = Middleware(safety.Guard, hosts=safety.names_of(host), served=served)
        _, self.url, _ = self._blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, inbrowser=browser, share=False,
            auth=None if password is None else safety.login(password),
            auth_message=f"The user is {safety.USER}." if password is not None else None,
            allowed_paths=served, max_file_size=MAX_UPLOAD, show_error=True, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[], strict_cors=True,
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=gr.themes.Default(font=_FONT, font_mono=_MONO), css_paths=_STYLE,
        )  # fmt: skip
        self.desk.device.warm()
        return self.url

    def _port(self) -> int:
        host, wanted = self.place.host, self.place.port
        if wanted:
            if not safety.port_is_free(host, wanted):
                raise MlxSfError(f"{option('port')} {wanted}: another program uses it: leave it out to take a free one")
            return wanted
        for port in range(7860, 7960):
            if safety.port_is_free(host, port):
                return port
        raise MlxSfError(f"{option('host')} {host}: no port from 7860 to 7959 can be had there: choose another address")

    def wait(self) -> None:
        """Until Ctrl-C."""
        threading.Event().wait()

    def close(self) -> None:
        """End the server and the drawing process, and delete the copies; the kept pictures stay."""
        self._blocks.close(verbose=False)
        self.desk.close()
        safety.forget_environment(self.copies)


def build(desk: Desk) -> gr.Blocks:
    """The page's contents."""
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# mlx-sf\nPictures straight in pixels: draw, see what the network is allowed to see, follow a run."
        )
        with gr.Tabs():
            with gr.Tab("Draw"):
                draw_tab(page, desk)
            with gr.Tab("Forcing"):
                forcing_tab(page, desk)
            with gr.Tab("Compare"):
                compare_tab(page, desk)
            with gr.Tab("Runs") as runs:
                follow_tab(page, runs, desk)
            with gr.Tab("Evaluate") as evals:
                evaluate_tab(page, evals, desk)

        def left(request: gr.Request) -> None:
            desk.stop(str(request.session_hash))

        page.unload(left)
    return page
