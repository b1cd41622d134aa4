"""The page by its HTTP client: draw, stop, wait in line, compare, and what a crash leaves."""

import os
import signal
import time

import numpy as np
import pytest
from gradio_client import Client, handle_file
from mlx.utils import tree_flatten
from PIL import Image

import mlx_sf
from mlx_sf.checkpoints.checkpoint import save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.formats.png import read_metadata, save_png
from mlx_sf.models import build, mmjit
from mlx_sf.models.text import TextConfig
from tests.web.conftest import QUIET

DEMO, OWN = "the demo model", "the checkpoint's own choice"
pytestmark = QUIET


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return Client(page.url, verbose=False, download_files=tmp_path_factory.mktemp("client"))


def form(**changes):
    """The Draw tab's values, in its order."""
    values = {
        "checkpoint": DEMO, "weights": OWN, "adapter": "", "scale": 1, "classes": ["house"], "prompts": "", "num": 2,
        "seed": 5, "steps": 4, "method": "heun", "cfg": 1.5, "low": 0.1, "high": 1.0,
    }  # fmt: skip
    return [*{**values, **changes}.values()]


def begin(client, **changes):
    """Start a long drawing and wait for its first state."""
    job = client.submit(*form(num=64, steps=1000, classes=[], **changes), api_name="/draw")
    for _ in range(600):
        if any("Step" in o[0] for o in job.outputs()):
            return job
        time.sleep(0.05)
    raise AssertionError("no state came")


def test_pictures_are_drawn_kept_and_still_there_after_a_reload(page, client, tmp_path):
    outputs = list(client.submit(*form(), api_name="/draw"))
    assert "2 pictures drawn" in outputs[-1][0]
    assert any("<progress" in o[0] and "data:image/webp" in str(o[1]) for o in outputs)
    files = page.desk.kept.files()[:2]
    facts = [read_metadata(f) for f in files]
    assert {f["seed"] for f in facts} == {5, 6}
    assert {(f["class_name"], f["steps"], f["cfg"], f["loaded_from"]) for f in facts} == {("house", 4, 1.5, DEMO)}
    # the page draws what the library draws
    own = mlx_sf.load().sample(["house"], num_images=2, seed=5, steps=4, cfg=1.5)
    drawn = {f["seed"]: np.asarray(Image.open(p)).astype(int) for f, p in zip(facts, files, strict=True)}
    for seed, picture in zip((5, 6), own, strict=True):
        assert np.abs(drawn[seed] - np.asarray(picture)).max() <= 1
    # somebody who opens the page later sees them, with their settings inside
    gallery = Client(page.url, verbose=False, download_files=tmp_path).predict(api_name="/kept")[1]
    assert {p["caption"] for p in gallery} >= {"house, seed 5", "house, seed 6"}
    assert read_metadata(gallery[0]["image"])["steps"] == 4


def test_a_dropped_picture_fills_the_form(client, place, tmp_path):
    picture = mlx_sf.load().sample(["fish"], seed=9, steps=3, method="euler", cfg=2.5, cfg_interval=(0.2, 0.8))[0]
    picture.save(tmp_path / "fish.png")
    said, checkpoint, number, seed, _, weights, classes, prompts, *solver = client.predict(
        handle_file(tmp_path / "fish.png"), api_name="/fill"
    )
    assert "filled in" in said
    assert (checkpoint, number, seed, weights["value"], classes["value"]) == (DEMO, 1, 9, "model", ["8"])
    assert solver == [3, "euler", 2.5, 0.2, 0.8]
    assert not prompts["visible"]
    save_png(tmp_path / "other.png", np.zeros((8, 8, 3), np.uint8), {"checkpoint": "elsewhere.npz", "seed": 1})
    assert "elsewhere.npz: is not at hand" in client.predict(handle_file(tmp_path / "other.png"), api_name="/fill")[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    said = client.predict(handle_file(tmp_path / "plain.png"), api_name="/fill")[0]
    assert "plain.png: a picture of 4 x 4 pixels without settings" in said


def test_the_stop_button_stops_within_a_step(client):
    job = begin(client)
    start = time.monotonic()
    client.predict(api_name="/stop")
    assert "Stopped" in job.result(timeout=20)[0]
    assert time.monotonic() - start < 5


def test_a_second_request_waits_for_its_turn(page, client, tmp_path):
    first = begin(client)
    other = Client(page.url, verbose=False, download_files=tmp_path)
    second = other.submit(*form(num=1, steps=1), api_name="/draw")
    for _ in range(200):
        if any("Waiting: 1 request before this one" in o[0] for o in second.outputs()):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it did not wait")
    other.predict(api_name="/stop")  # one's own request, not the other's
    assert "Stopped" in second.result(timeout=20)[0]
    assert not first.done()
    third = other.submit(*form(num=1, steps=1), api_name="/draw")
    client.predict(api_name="/stop")
    assert "Stopped" in first.result(timeout=20)[0]
    assert "1 picture drawn" in third.result(timeout=20)[0]


def test_a_crash_while_drawing_is_a_message(page, client):
    job = begin(client)
    os.kill(page.desk.device.process_id, signal.SIGKILL)
    assert "the drawing process ended (signal 9)" in job.result(timeout=20)[0]
    assert "1 picture drawn" in client.submit(*form(num=1, steps=1), api_name="/draw").result(timeout=60)[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"classes": ["unicorn"]}, "is no class of this model"),
        ({"checkpoint": "nowhere.npz"}, "no such file or folder"),
        ({"low": 0.9, "high": 0.2}, "cfg_interval is (0.9, 0.2)"),
        ({"adapter": "./none"}, "none: no such file or folder"),
    ],
)
def test_what_cannot_be_drawn_is_said(client, changes, words):
    said = client.submit(*form(**changes), api_name="/draw").result(timeout=30)[0]
    assert "alert" in said
    assert words in said
    assert "Traceback" not in said


def test_a_run_is_a_checkpoint_to_choose(client, place):
    choices = client.predict(api_name="/kept")[0]["choices"]
    run = str(place.runs / "tiny")
    assert ["Run tiny, step 8", run] in choices
    facts, sets, classes, prompts, *solver = client.predict(run, api_name="/describe")
    assert "16 × 16 pixels" in facts
    assert "Forcing" in facts
    assert [c[0] for c in sets["choices"]] == [OWN, "model", "ema1", "ema2"]
    assert ["8 fish", "8"] in classes["choices"]
    assert (prompts["visible"], solver[:2]) == (False, [50, "heun"])
    assert "1 picture drawn" in client.submit(*form(checkpoint=run, num=1), api_name="/draw").result(timeout=30)[0]
    assert "no such file" in client.predict("missing.safetensors", api_name="/describe")[0]


def compared(client, a, b, cfg=""):
    values = [a, "", 1, b, "", 1, "fish\nhouse", 2, 0, 3, "the checkpoint's own", cfg]
    said, pair = client.submit(*values, api_name="/compare").result(timeout=60)
    return said, pair, client.predict(True, api_name="/difference")


def test_two_checkpoints_are_compared_from_the_same_seeds(client, place):
    said, pair, apart = compared(client, DEMO, DEMO)
    assert "The same seeds" in said
    assert pair.count("<img") == 2
    assert "differ by 0.00 on average" in apart
    apart = compared(client, DEMO, "weights/vanilla.safetensors")[2]
    assert "differ by" in apart
    assert "differ by 0.00 on average" not in apart
    assert "different sizes" in compared(client, DEMO, str(place.runs / "tiny"))[2]
    assert "B: nowhere.npz" in compared(client, DEMO, "nowhere.npz")[0]
    assert "guidance scale is &#x27;two&#x27;, want a number, or nothing" in compared(client, DEMO, DEMO, "two")[0]


def test_every_control_has_a_name(page):
    """What a screen reader calls each control that takes something in."""
    kinds = {"dropdown", "textbox", "slider", "number", "checkbox", "file", "dataframe", "gallery"}
    config = page._blocks.get_config_file()
    named = [c["props"].get("label") for c in config["components"] if c["type"] in kinds]
    assert len(named) > 40
    assert all(named)
    buttons = [c["props"]["value"] for c in config["components"] if c["type"] == "button"]
    assert all(buttons)
    tabs = [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]
    assert tabs == ["Draw", "Forcing", "Compare", "Runs", "Evaluate"]


def test_a_model_of_prompts_draws_what_a_line_says(page, place, client):
    config = Config(mmjit.model_config("nano", 8, 16, text=TextConfig("", 8, 4, ("a", "red", "star"))), name="words")
    weights = dict(tree_flatten(build(config.model).parameters()))
    save_checkpoint(place.runs / "words.safetensors", {"model": weights}, config)
    name = str(place.runs / "words.safetensors")
    outputs = list(
        client.submit(*form(checkpoint=name, classes=[], prompts="a red star\na star", num=2), api_name="/draw")
    )
    assert "4 pictures drawn" in outputs[-1][0]
    facts = [read_metadata(f) for f in page.desk.kept.files()[:4]]
    assert sorted(f["prompt"] for f in facts) == ["a red star", "a red star", "a star", "a star"]
    refused = list(client.submit(*form(checkpoint=name, classes=[], prompts="a blue star"), api_name="/draw"))
    assert "is none of the 3 words" in refused[-1][0]
