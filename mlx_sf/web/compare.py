"""The Compare tab: two checkpoints from the same seeds, side by side, and what differs."""

from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr
import numpy as np

from ..common.figures import grid
from ..common.pixels import difference
from ..errors import MlxSfError
from ..sampling.solvers import Method
from . import words
from .checkpoints import choices, named
from .desk import Desk
from .pictures import Shown, picture, row
from .worker import DEMO, Drawing, Failed, Finished, Frame, Weights

MOST_PICTURES = 16
_TIMES = 4  # how much brighter differences are shown
_OWN = "the checkpoint's own"


def compare_tab(page: gr.Blocks, desk: Desk) -> None:
    """Build it. Endpoints: /compare, /difference."""
    with gr.Row():
        a, b = (_side(desk, name) for name in ("A", "B"))
    with gr.Row():
        asked = gr.Textbox(
            label="Classes or prompts, one a line", lines=2, info="Empty: all classes in turn.", scale=2, min_width=220
        )
        num_images = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", min_width=130)
        seed = gr.Number(0, label="Seed of the first picture", precision=0, minimum=0, min_width=130)
    with gr.Row():
        steps = gr.Slider(1, 200, 20, step=1, label="Steps of both", min_width=130)
        method = gr.Dropdown([_OWN, *get_args(Method)], value=_OWN, label="Solver of both", min_width=130)
        # a number field without a value shows and sends 0
        cfg = gr.Textbox("", label="Guidance scale of both", info="Empty: each one's own.", min_width=130)
    with gr.Row():
        go = gr.Button("Compare", variant="primary")
        halt = gr.Button("Stop", variant="stop")
        show = gr.Checkbox(False, label="Show the difference")
    said = gr.HTML(words.note("Choose two checkpoints and press Compare."), label="Progress", elem_id="compare-said")
    pair = gr.HTML(_pair(None, None), label="A and B", elem_id="pair")
    apart = gr.HTML(label="Difference", elem_id="apart")
    results = gr.State(())

    def compare(
        name_a: str, adapter_a: str, scale_a: float, name_b: str, adapter_b: str, scale_b: float, asked: str,
        num_images: float, seed: float, steps: float, method: str, cfg: str, request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        sides = [
            Weights(named(name), "", (adapter or "").strip(), float(scale))
            for name, adapter, scale in ((name_a, adapter_a, scale_a), (name_b, adapter_b, scale_b))
        ]
        wanted = tuple(line.strip() for line in (asked or "").splitlines() if line.strip())
        sheets: list[Shown] = [None, None]
        ends: list[tuple[np.ndarray, ...]] = []
        others = desk.others()
        try:
            solver = {
                "steps": int(steps),
                "method": None if method == _OWN else method,
                "cfg": _number(cfg, "the guidance scale"),
            }
            for i, weights in enumerate(sides):
                task = Drawing(weights, wanted, int(num_images), int(seed), solver)
                for job, message in desk.work(task, str(request.session_hash)):
                    if isinstance(message, Failed):
                        raise MlxSfError(f"{'AB'[i]}: {message.message}")
                    if isinstance(message, Finished) and message.stopped:
                        yield [words.note("Stopped."), gr.skip(), ()]
                        return
                    if isinstance(message, Finished):
                        ends.append(message.pictures)
                        sheets[i] = grid(list(message.pictures))
                    elif isinstance(message, Frame):
                        sheets[i] = message.implied
                    done, total = (message.done, message.total) if isinstance(message, Frame) else (0, 1)
                    if not isinstance(message, Finished):
                        text = f"{'AB'[i]}: {desk.stage(job, message)}"
                        yield [words.bar(done, total, text) + words.note(others), _pair(*sheets), ()]
        except MlxSfError as e:
            yield [words.alarm(str(e)), gr.skip(), ()]
            return
        yield [words.note("The same seeds, drawn by both."), _pair(*sheets), tuple(ends)]

    def show_difference(shown: bool, ends: tuple[tuple[np.ndarray, ...], ...]) -> str:
        if not shown:
            return ""
        if len(ends) != 2:
            return words.note("Press Compare first: there is nothing to subtract yet.")
        a, b = (np.stack(pictures) for pictures in ends)
        if a.shape != b.shape:
            return words.alarm("The two draw pictures of different sizes: there is nothing to subtract.")
        apart = difference(a, b)
        text = f"8-bit values differ by {apart.mean():.2f} on average, by {apart.max()} of 255 at most"
        sheet = grid(list(difference(a, b, _TIMES)))
        return row([picture(sheet, f"The difference, {_TIMES} times as bright: {text}", "Difference of A and B", 420)])

    def stop(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    def opened() -> list[Any]:
        return [gr.update(choices=choices(desk.runs))] * 2

    inputs = [*a, *b, asked, num_images, seed, steps, method, cfg]
    drawn = go.click(
        compare, inputs, [said, pair, results], api_name="compare", concurrency_limit=16, show_progress="hidden"
    )
    drawn.then(show_difference, [show, results], [apart], api_visibility="private", show_progress="hidden")
    show.change(show_difference, [show, results], [apart], api_name="difference", show_progress="hidden")
    halt.click(stop, [], [], api_visibility="private", queue=False)
    page.load(opened, [], [a[0], b[0]], api_visibility="private")


def _number(text: str | float | None, what: str) -> float | None:
    """The number in a field that may be empty."""
    if text is None or not str(text).strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise MlxSfError(f"{what} is {text!r}, want a number, or nothing") from None


def _pair(a: Shown, b: Shown) -> str:
    return row([picture(a, "A", "Pictures of checkpoint A", 420), picture(b, "B", "Pictures of checkpoint B", 420)])


def _side(desk: Desk, name: str) -> tuple[gr.Dropdown, gr.Textbox, gr.Number]:
    with gr.Column(min_width=300):
        checkpoint = gr.Dropdown(
            choices(desk.runs), value=DEMO, label=f"Checkpoint {name}", allow_custom_value=True,
            info="Choose one, or type a file or a name.",
        )  # fmt: skip
        with gr.Row():
            adapter = gr.Textbox(label=f"Adapter of {name}", placeholder="none", scale=2, min_width=140)
            scale = gr.Number(1.0, label=f"Adapter scale of {name}", step=0.1, min_width=100)
    return checkpoint, adapter, scale
