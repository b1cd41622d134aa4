"""The Draw tab: what to draw and how, the states while it is drawn, and the pictures that are kept."""

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from ..errors import MlxSfError
from ..sampling.solvers import Method
from . import words
from .checkpoints import Described, choice_of, choices, config_of, describe_checkpoint, named
from .desk import Desk
from .files import uploaded_settings
from .pictures import picture, row
from .worker import DEMO, Drawing, Failed, Finished, Frame, Weights

MOST_PICTURES = 64
MOST_STEPS = 1000
_OWN = "the checkpoint's own choice"


def draw_tab(page: gr.Blocks, desk: Desk) -> None:
    """Build it. Endpoints: /draw, /stop, /describe, /fill, /kept."""
    demo = describe_checkpoint(config_of("", desk.device))
    with gr.Row():
        with gr.Column(scale=2, min_width=380):
            checkpoint = gr.Dropdown(
                choices(desk.runs), value=DEMO, label="Checkpoint", allow_custom_value=True,
                info="Choose one, or type a file, a short name of mlx-sf models, or org/name on the Hub.",
            )  # fmt: skip
            about = gr.HTML(words.facts(demo.rows), label="About the checkpoint")
            classes = gr.Dropdown(
                list(demo.classes), multiselect=True, label="Classes", allow_custom_value=True,
                info="Type to search. None: all classes in turn.",
            )  # fmt: skip
            prompts = gr.Textbox(label="Prompts, one a line", lines=3, visible=False)
            with gr.Row():
                num_images = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", min_width=140)
                with gr.Column(min_width=140):
                    seed = gr.Number(0, label="Seed of the first picture", precision=0, minimum=0)
                    new_seed = gr.Button("New seed", size="sm")
            with gr.Row():
                steps = gr.Slider(1, MOST_STEPS, demo.steps, step=1, label="Steps", min_width=140)
                method = gr.Dropdown(list(get_args(Method)), value=demo.method, label="Solver", min_width=140)
            with gr.Row():
                cfg = gr.Number(demo.cfg, label="Guidance scale (1 is off)", minimum=0, step=0.1, min_width=120)
                low = gr.Slider(0, 1, demo.cfg_interval[0], step=0.01, label="Guide from t", min_width=150)
                high = gr.Slider(0, 1, demo.cfg_interval[1], step=0.01, label="Guide to t", min_width=150)
            with gr.Accordion("Weights and adapter", open=False):
                weights = gr.Dropdown(_sets(demo), value=_OWN, label="Weight set")
                adapter = gr.Textbox(label="Adapter", info="A folder, or org/name on the Hub. Empty: none.")
                scale = gr.Number(1.0, label="Adapter scale", step=0.1)
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                halt = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Column(scale=3, min_width=420):
            said = gr.HTML(words.note("Press Draw."), label="Progress", elem_id="drawing-said")
            states = gr.HTML(_states(None), label="States", elem_id="states")
            gallery = gr.Gallery(
                label=f"Kept pictures, newest first ({desk.kept.folder.name})", columns=6,
                height="auto", object_fit="contain", allow_preview=True, interactive=False, elem_id="kept",
                format="png", buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=2, min_width=220):
                    chosen = gr.HTML(label="Settings of the chosen picture", elem_id="chosen")
                    use = gr.Button("Use these settings", visible=False)
                dropped = gr.File(
                    label="Drop a PNG of mlx-sf here: its settings are filled in", file_types=[".png"], height=140,
                    scale=1, min_width=220, elem_id="dropped",
                )  # fmt: skip
    settings = gr.State({})
    described = [about, weights, classes, prompts, steps, method, cfg, low, high]
    form = [checkpoint, weights, adapter, scale, classes, prompts, num_images, seed, steps, method, cfg, low, high]

    def describe(name: str) -> list[Any]:
        try:
            return _described(describe_checkpoint(config_of(named(name), desk.device)))
        except MlxSfError as e:
            return [words.alarm(str(e)), *[gr.skip()] * (len(described) - 1)]

    def opened() -> list[Any]:
        return [gr.update(choices=choices(desk.runs)), desk.kept.gallery()]

    def draw(
        name: str, weight_set: str, adapter: str, scale: float, classes: list[str], prompts: str, num_images: float,
        seed: float, steps: float, method: str, cfg: float, low: float, high: float, request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        solver = {"steps": int(steps), "method": method, "cfg": float(cfg), "cfg_interval": (float(low), float(high))}
        asked = tuple(classes or ()) or tuple(line for line in (prompts or "").splitlines() if line.strip())
        task = Drawing(
            Weights(named(name), "" if weight_set == _OWN else weight_set, (adapter or "").strip(), float(scale)),
            asked, int(num_images), int(seed), solver, str(desk.kept.folder),
        )  # fmt: skip
        others = desk.others()
        try:
            for job, message in desk.work(task, str(request.session_hash)):
                if isinstance(message, Failed):
                    yield [words.alarm(message.message), gr.skip(), desk.kept.gallery()]
                elif isinstance(message, Finished):
                    yield [words.note(_ending(message)), gr.skip(), desk.kept.gallery()]
                elif isinstance(message, Frame):
                    text = f"{desk.stage(job, message)}, {words.left(message.left)}"
                    bar = words.bar(message.done, message.total, text) + words.note(others)
                    yield [bar, _states(message), gr.skip()]
                else:
                    bar = words.bar(0, 1, desk.stage(job, message)) + words.note(others)
                    yield [bar, gr.skip(), gr.skip()]
        except MlxSfError as e:
            yield [words.alarm(str(e)), gr.skip(), gr.skip()]

    def stop(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    def fill(found: dict[str, Any] | None) -> list[Any]:
        """The form as a picture's settings say; what they do not say is the checkpoint's own."""
        none = [gr.skip()] * (len(described) + 3)
        if not found:
            return [gr.skip(), *none]
        try:
            choice = choice_of(found, desk.runs)
            config = config_of(named(choice), desk.device) if choice is not None else None
        except MlxSfError as e:
            return [words.alarm(str(e)), *none]
        if config is None:
            missing = found.get("loaded_from") or found.get("checkpoint")
            return [words.alarm(f"{missing}: is not at hand: choose it as the checkpoint first"), *none]
        values, remarks = filled(describe_checkpoint(config), found)
        said = " ".join(["The settings of the picture are filled in: press Draw to draw it again.", *remarks])
        return [words.note(said), choice, 1, found.get("seed", gr.skip()), *values]

    def drop(path: str | None) -> list[Any]:
        if not path:
            return fill(None)
        try:
            return fill(uploaded_settings(path))
        except MlxSfError as e:
            return [words.alarm(str(e)), *[gr.skip()] * (len(described) + 3)]

    def select(event: gr.SelectData) -> list[Any]:
        try:
            name = str(event.value["image"].get("orig_name") or "") if isinstance(event.value, dict) else ""
            path, found = desk.kept.settings(int(event.index), name)
        except MlxSfError as e:
            return [words.alarm(str(e)), gr.update(visible=False), {}]
        rows = [("file", path.name), *((k.replace("_", " "), str(v)) for k, v in found.items())]
        return [words.facts(rows), gr.update(visible=True), found]

    outputs = [said, checkpoint, num_images, seed, *described]
    checkpoint.input(describe, [checkpoint], described, api_name="describe")
    page.load(opened, [], [checkpoint, gallery], api_name="kept")
    new_seed.click(lambda: secrets.randbelow(2**31), [], [seed], api_visibility="private")
    go.click(draw, form, [said, states, gallery], api_name="draw", concurrency_limit=16, show_progress="hidden")
    halt.click(stop, [], [], api_name="stop", queue=False)
    dropped.upload(drop, [dropped], outputs, api_name="fill", show_progress="hidden")
    gallery.select(select, [], [chosen, use, settings], api_visibility="private", show_progress="hidden")
    use.click(fill, [settings], outputs, api_visibility="private", show_progress="hidden")


def _states(frame: Frame | None) -> str:
    state, implied = (None, None) if frame is None else (frame.state, frame.implied)
    return row([
        picture(state, "The state at this time", "The noisy state of the pictures being drawn"),
        picture(implied, "The finished picture that it implies", "The finished pictures that the state implies"),
    ])  # fmt: skip


def _sets(d: Described) -> list[str]:
    return [_OWN, *d.weights]


def _described(d: Described) -> list[Any]:
    """What the page shows of a checkpoint: facts, and its own settings in the form."""
    return [
        words.facts(d.rows),
        gr.update(choices=_sets(d), value=_OWN),
        gr.update(choices=list(d.classes), value=[], visible=not d.takes_prompts),
        gr.update(visible=d.takes_prompts),
        d.steps, d.method, d.cfg, d.cfg_interval[0], d.cfg_interval[1],
    ]  # fmt: skip


def filled(d: Described, found: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """The form's values as a picture's settings say, and what they cannot say, in sentences."""
    low, high = found.get("cfg_interval", d.cfg_interval)
    asked = str(found.get("class", ""))
    known = any(value == asked for _, value in d.classes)
    weights = str(found.get("weights", ""))
    remarks = []
    if "seed" not in found or "rng" in found:
        remarks.append("Its noise is not one of this page's seeds, so the picture will be another one.")
    if "adapters" in found:
        remarks.append(f"It was drawn with {found['adapters']}: name the adapter below.")
    values = [
        words.facts(d.rows),
        gr.update(choices=_sets(d), value=weights if weights in d.weights else _OWN),
        gr.update(choices=list(d.classes), value=[asked] if known else [], visible=not d.takes_prompts),
        gr.update(value=str(found.get("prompt", "")), visible=d.takes_prompts),
        min(int(found.get("steps", d.steps)), MOST_STEPS), str(found.get("method", d.method)),
        float(found.get("cfg", d.cfg)), float(low), float(high),
    ]  # fmt: skip
    return values, remarks


def _ending(end: Finished) -> str:
    count = len(end.files)
    if end.stopped:
        kept = f"{count} finished picture{'s' * (count != 1)} kept" if count else "no picture was finished"
        return f"Stopped, {kept}."
    where = Path(end.files[0]).parent.name if end.files else ""
    return f"{count} picture{'s' * (count != 1)} drawn, kept in {where}."
