"""The page in a real browser: `scripts/test.sh -m browser`.

Takes Debian's Chromium, or the one that MLX_SF_CHROMIUM names. Screenshots of every tab go to the folder
MLX_SF_SCREENSHOTS, where that is set.
"""

import json
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import mlx_sf
from mlx_sf.training.run_folder import RunFolder
from tests.web.conftest import QUIET

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect

pytestmark = [*QUIET, pytest.mark.browser]
TABS = ("Draw", "Forcing", "Compare", "Runs", "Evaluate")


@pytest.fixture(scope="module")
def browser():
    names = (os.environ.get("MLX_SF_CHROMIUM") or "chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in MLX_SF_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def view(browser, page):
    """The page, opened; it must ask nothing of other places, and no script of it may fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    view = context.new_page()
    asked, failed = [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("pageerror", lambda error: failed.append(str(error)))
    view.goto(page.url)
    expect(view.get_by_role("button", name="Draw", exact=True)).to_be_visible(timeout=30_000)
    yield view
    context.close()
    hosts = {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
    assert not failed


def number(view, label: str, value: float) -> None:
    box = view.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Tab")


def test_draw_watch_and_reload(view):
    number(view, "Steps", 300)
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.locator("#drawing-said progress")).to_be_visible(timeout=30_000)
    expect(view.locator("#states img")).to_have_count(2, timeout=30_000)
    first = view.locator("#states img").first.get_attribute("src")
    view.wait_for_function("s => document.querySelector('#states img').src !== s", arg=first, timeout=30_000)
    expect(view.locator("#drawing-said")).to_contain_text("4 pictures drawn", timeout=60_000)
    expect(view.locator("#kept img").first).to_be_visible()
    view.reload()
    expect(view.locator("#kept img").first).to_be_visible(timeout=30_000)


def test_stop(view):
    number(view, "Steps", 1000)
    number(view, "Pictures", 64)
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.locator("#states img")).to_have_count(2, timeout=30_000)
    view.get_by_role("button", name="Stop", exact=True).first.click()
    expect(view.locator("#drawing-said")).to_contain_text("Stopped", timeout=5_000)


def test_drop_a_picture(view, tmp_path):
    mlx_sf.load().sample(["fish"], seed=9, steps=3)[0].save(tmp_path / "fish.png")
    view.locator("#dropped input[type=file]").set_input_files(tmp_path / "fish.png")
    expect(view.locator("#drawing-said")).to_contain_text("filled in", timeout=10_000)
    expect(view.get_by_label("number input for Steps", exact=True)).to_have_value("3")


def test_move_t_by_keyboard(view):
    view.get_by_role("tab", name="Forcing").click()
    expect(view.locator("#forcing-pictures img")).to_have_count(4, timeout=20_000)
    expect(view.locator("#forcing-said")).to_contain_text("At t = 0.3 ")
    t = view.locator("#t input[type=range]")
    t.focus()
    t.press("ArrowRight")
    expect(view.locator("#forcing-said")).to_contain_text("At t = 0.31 ", timeout=5_000)


def test_follow_a_live_run(view, place):
    run = RunFolder(place.runs / "tiny")
    with run.locked():
        view.get_by_role("tab", name="Runs").click()
        expect(view.locator("#run-facts")).to_contain_text("training now", timeout=15_000)
        for step in (20, 30):
            with open(run.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": step, "images": 4 * step, "loss": 0.5, "ema1_initial_share": 0.5}) + "\n")
            expect(view.locator("#run-facts")).to_contain_text(f"{step} of 8", timeout=10_000)
    expect(view.locator("#resume textarea, #resume input")).to_have_value(f"mlx-sf train --resume {run.path}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
def test_every_tab_fits_its_window(browser, page, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view = context.new_page()
    view.goto(page.url)
    for tab in TABS:
        view.get_by_role("tab", name=tab, exact=True).click(timeout=30_000)
        view.wait_for_timeout(1500)
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        if folder := os.environ.get("MLX_SF_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            view.screenshot(path=Path(folder) / f"{tab.lower()}-{width}-{scheme}.png", full_page=True)
    context.close()
