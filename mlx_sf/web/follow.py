"""The Runs tab: every run at a glance, one of them in detail, followed while it trains in another process."""

from typing import Any

import gradio as gr
import numpy as np

from ..data.decode import BadPictureError, decode_picture
from ..errors import MlxSfError
from . import words
from .desk import Desk
from .figures import run_figure
from .pictures import picture, row
from .runs import HEADERS, Progress, find_run, find_runs, overview, preview_step, progress, rows_of

_EVERY = 2.0  # seconds between looks at the files of a run


def follow_tab(page: gr.Blocks, tab: gr.Tab, desk: Desk) -> None:
    """Build it. Endpoints: /follow, /preview."""
    table = gr.Dataframe(
        headers=list(HEADERS), datatype=["str", "str", "number", "number", "str", "str", "str"], interactive=False,
        label=f"Runs in {desk.runs}, the one that changed last first", max_height=260, buttons=["copy"],
    )  # fmt: skip
    name = gr.Dropdown(
        [], label="Run", info="Its files are looked at every two seconds.", allow_custom_value=True, elem_id="run"
    )
    with gr.Row():
        facts = gr.HTML(label="The run", min_width=260, elem_id="run-facts")
        with gr.Column(min_width=320):
            resume = gr.Textbox(
                label="This command continues it", interactive=False, buttons=["copy"], elem_id="resume"
            )
    figure = gr.HTML(label="Loss, speed and EMA share", elem_id="run-figure")
    place = gr.Slider(1, 2, 1, step=1, label="Preview", visible=False, elem_id="preview-place")
    preview = gr.HTML(label="Preview", elem_id="preview")
    seen = gr.State(())
    timer = gr.Timer(_EVERY, active=False)

    def follow(name: str | None, place: float, seen: tuple[Any, ...]) -> list[Any]:
        """Everything of a run that changed since `seen`; the newest run where none is chosen."""
        names = [run.path.name for run in find_runs(desk.runs)]
        chosen = name if name in names else names[0] if names else None
        if chosen is None:
            nothing = words.note(f"No run in {desk.runs} yet: mlx-sf train starts one.")
            return [[], gr.update(choices=[], value=None), nothing, "", "", gr.skip(), "", ()]
        rows = overview(desk.runs)
        try:
            p = progress(find_run(desk.runs, chosen))
        except MlxSfError as e:
            told = gr.update(choices=names, value=chosen)
            return [rows, told, words.alarm(str(e)), "", "", gr.update(visible=False), "", ()]
        now = (chosen, len(p.metrics), len(p.previews), p.run.saved, p.run.training)
        if now == seen:
            return [gr.skip()] * 8
        last = not seen or seen[0] != chosen or int(place) >= seen[2]
        at = len(p.previews) if last else int(place)
        return [
            rows, gr.update(choices=names, value=chosen), words.facts(rows_of(p)), p.resume,
            _figure(p),
            gr.update(minimum=1, maximum=max(2, len(p.previews)), value=max(1, at), visible=len(p.previews) > 1),
            _preview(p, at), now,
        ]  # fmt: skip

    def move(name: str | None, place: float) -> str:
        try:
            return _preview(progress(find_run(desk.runs, name or "")), int(place))
        except MlxSfError as e:
            return words.alarm(str(e))

    def pick(event: gr.SelectData) -> Any:
        row = event.row_value
        return row[0] if row else gr.skip()

    outputs = [table, name, facts, resume, figure, place, preview, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    name.input(follow, [name, place, seen], outputs, api_name="follow", show_progress="hidden")
    timer.tick(follow, [name, place, seen], outputs, **quiet)
    place.input(move, [name, place], [preview], api_name="preview", show_progress="hidden", trigger_mode="always_last")
    table.select(pick, [], [name], **quiet).then(follow, [name, place, seen], outputs, **quiet)
    tab.select(lambda: gr.Timer(active=True), [], [timer], **quiet).then(follow, [name, place, seen], outputs, **quiet)
    page.load(follow, [name, place, seen], outputs, **quiet)


def _figure(p: Progress) -> str:
    if not p.metrics:
        return words.note("No line of metrics yet.")
    alt = "Loss, images a second and the share of the initial weights over the steps"
    return row([picture(run_figure(p.metrics, p.system), "Loss, speed and EMA share", alt)])


def _preview(p: Progress, at: int) -> str:
    """The preview number `at`, from 1."""
    if not p.previews:
        return words.note("No preview yet.")
    path = p.previews[min(max(at, 1), len(p.previews)) - 1]
    step = preview_step(path)
    try:
        shown = np.asarray(decode_picture(path))
    except BadPictureError as e:
        return words.alarm(f"{path.name}: {e}")
    return row([picture(shown, f"Preview after step {step}, a row for each weight set", f"Preview, step {step}", 900)])
