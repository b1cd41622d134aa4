"""The Forcing tab: a picture, its noisy state at a time t, and what a schedule's mask lets through."""

from typing import Any

import gradio as gr

from ..data.scenes import SCENE_CLASSES
from ..errors import MlxSfError
from ..flow import published_noise_scale
from . import words
from .desk import Desk
from .pictures import picture, row
from .view import SCHEDULES, SIZES, Look, View

_WINDOWS = [("the whole picture", 0), *((f"patches of {n} pixels", n) for n in (8, 16, 32, 64, 128))]


def forcing_tab(page: gr.Blocks, desk: Desk) -> None:
    """Build it. Endpoints: /look, /measure."""
    t = gr.Slider(0, 1, 0.3, step=0.01, label="Flow time t: 0 is noise, 1 is the picture", elem_id="t")
    pictures = gr.HTML(label="The pictures", elem_id="forcing-pictures")
    said = gr.HTML(label="What is seen", elem_id="forcing-said")
    figure = gr.HTML(label="Spectrum, cutoff, and where the data equal the noise", elem_id="forcing-figure")
    with gr.Row():
        schedule = gr.Dropdown(list(SCHEDULES), value="linear", label="Schedule", min_width=140)
        power = gr.Slider(0.1, 5, 2, step=0.1, label="Exponent of the power schedule", min_width=160)
        fixed = gr.Slider(0, 1, 0.5, step=0.01, label="Scale of the fixed schedule", min_width=160)
        window = gr.Dropdown(_WINDOWS, value=0, label="Filter", min_width=160)
        noise = gr.Slider(0.1, 8, 1, step=0.1, label="Noise scale", min_width=140)
    with gr.Row():
        with gr.Column(min_width=260):
            kind = gr.Dropdown(list(SCENE_CLASSES), value="house", label="Built-in scene")
            number = gr.Number(0, label="Number of the scene", precision=0, minimum=0, maximum=10**6)
        with gr.Column(min_width=260):
            size = gr.Dropdown(list(SIZES), value=256, label="Side in pixels")
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
        file = gr.File(
            label="Drop a picture here to look at it instead", height=170, min_width=260, file_types=["image"],
            elem_id="picture",
        )  # fmt: skip
        with gr.Column(min_width=260):
            folder = gr.Textbox(
                label="Folder of pictures for the data's line", info="On this machine. Empty: the picture's own line."
            )
            measure = gr.Button("Measure the folder")
    measured = gr.State("")
    inputs = [t, schedule, power, fixed, window, noise, kind, number, size, seed, file, measured]
    outputs = [pictures, figure, said]

    def asked(*values: Any) -> Look:
        t, schedule, power, fixed, window, noise, kind, number, size, seed, file, folder = values
        return Look(
            str(file or ""), str(kind), int(number or 0), int(size), str(schedule), float(power), float(fixed),
            int(window), float(noise), int(seed or 0), float(t), str(folder or ""),
        )  # fmt: skip

    def look(
        t: float, schedule: str, power: float, fixed: float, window: int, noise: float, kind: str, number: float,
        size: int, seed: float, file: str | None, folder: str,
    ) -> list[Any]:  # fmt: skip
        try:
            view = desk.viewer.look(
                asked(t, schedule, power, fixed, window, noise, kind, number, size, seed, file, folder)
            )
        except MlxSfError as e:
            return [gr.skip(), gr.skip(), words.alarm(str(e))]
        return [*_shown(view), words.note(view.sentence)]

    def look_at_folder(folder: str, window: int, size: int) -> list[Any]:
        folder = (folder or "").strip()
        if not folder:
            return ["", words.note("The lines are the picture's own.")]
        try:
            return [
                folder,
                words.note(desk.viewer.measure_folder(Look(size=int(size), window=int(window), folder=folder))),
            ]
        except MlxSfError as e:
            return ["", words.alarm(str(e))]

    # while one answer is computed the newest wish waits, those between are left out; the viewer takes one at a time,
    # so that Gradio's queue, which looks around twenty times a second, is not needed
    quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", "queue": False}
    moved = [t.input, power.input, fixed.input, noise.input, number.change, seed.change]
    chosen = [schedule.input, window.input, kind.input, file.change]
    gr.on([*moved, *chosen], look, inputs, outputs, api_name="look", **quick)
    resized = size.input(
        lambda side: published_noise_scale(int(side)), [size], [noise], api_visibility="private", show_progress="hidden"
    )
    shown: dict[str, Any] = {"api_visibility": "private", **quick}
    resized.then(look, inputs, outputs, **shown)
    done = gr.on(
        [measure.click, folder.submit], look_at_folder, [folder, window, size], [measured, said], api_name="measure"
    )
    done.success(look, inputs, [pictures, figure, gr.State()], **shown)
    page.load(look, inputs, outputs, **shown)


def _shown(view: View) -> list[str]:
    """The pictures in a row, and the figure."""
    four = (
        (view.picture, "The picture", "The clean picture"),
        (view.noisy, "Its noisy state", "The picture with the noise of time t"),
        (view.passed, "What the network sees", "The noisy state behind the mask"),
        (view.mask, "The mask: white passes", "The mask over frequencies, the mean brightness at the upper left"),
    )
    alt = "Left the power of data, of noise and of what passes over frequency; right the cutoffs over time. "
    figure = picture(view.figure, "Spectrum, cutoff, and where the data equal the noise", alt + view.sentence)
    return [row([picture(*p, 256) for p in four]), row([figure])]
