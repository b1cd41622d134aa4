"""What the tabs show, by their own functions: the forcing, runs, evaluations; and the command that opens the page."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gradio_client import Client

import mlx_sf
from mlx_sf.common.pixels import from_uint8, to_uint8
from mlx_sf.data.scenes import SCENE_CLASSES, scene
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import save_png
from mlx_sf.metrics.report import COLUMNS
from mlx_sf.sampling.noise import seeded_noise
from mlx_sf.spectral import masks
from mlx_sf.training.run_folder import RunFolder
from mlx_sf.web import evals, runs
from mlx_sf.web.view import SCHEDULES, Look, Viewer, forcing_of
from tests.helpers import ROOT
from tests.web.conftest import QUIET

pytestmark = QUIET


@pytest.fixture(scope="module")
def viewer():
    viewer = Viewer()
    yield viewer
    viewer.close()


def test_the_view_is_what_the_operator_does(viewer):
    view = viewer.look(Look(kind="fish", number=2, size=64, t=0.4, noise_scale=1.5, seed=3))
    picture = scene(2 * len(SCENE_CLASSES) + SCENE_CLASSES.index("fish"), 64)[0]
    np.testing.assert_array_equal(view.picture, picture)
    z = 0.4 * from_uint8(mx.array(picture[None])) + (1 - 0.4) * 1.5 * seeded_noise([3], (64, 64))
    assert np.abs(view.noisy.astype(int) - to_uint8(z)[0]).max() <= 1
    passed = mlx_sf.SpectralForcing(64)(z, mx.array([0.4]))
    assert np.abs(view.passed.astype(int) - to_uint8(passed)[0]).max() <= 1
    mask = masks(mlx_sf.ForcingConfig(), (64, 64), 0.4)[0]
    assert np.abs(view.mask[..., 0] - 255 * mask).max() <= 0.51
    assert "At t = 0.4 the mask lets through what is coarser than k = 38" in view.sentence


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [0, 16])
def test_every_schedule_and_window_can_be_looked_at(viewer, schedule, window):
    for t in (0.0, 0.5, 1.0):
        view = viewer.look(Look(size=64, schedule=schedule, window=window, t=t))
        assert np.isfinite(np.asarray(view.figure)).all()
        assert view.mask.shape[0] == (64 if schedule == "none" else window or 64)
        assert f"At t = {t:g}" in view.sentence
    if schedule == "none":
        np.testing.assert_array_equal(view.noisy, view.passed)


def test_the_datas_line_is_the_pictures_or_a_folders(viewer, tmp_path):
    for i in range(12):
        save_png(tmp_path / f"{i}.png", scene(i, 64)[0])
    assert "12 of its pictures" in viewer.measure_folder(Look(size=64, folder=str(tmp_path)))
    own = viewer.look(Look(size=64, schedule="data", t=0.5))
    of_folder = viewer.look(Look(size=64, schedule="data", t=0.5, folder=str(tmp_path)))
    assert own.sentence != of_folder.sentence
    with pytest.raises(MlxSfError, match="no such folder on this machine"):
        viewer.measure_folder(Look(size=64, folder=str(tmp_path / "none")))
    with pytest.raises(MlxSfError, match="do not fit into 64"):
        viewer.look(Look(size=64, window=128))
    assert forcing_of("none", Look(), None) is None


def test_a_run_is_followed_while_another_process_trains_it(page, place, tmp_path):
    client = Client(page.url, verbose=False, download_files=tmp_path)
    table, name, facts, resume, figure, slider, preview = client.predict("tiny", 1, api_name="/follow")
    assert table["data"][0][:4] == ["tiny", "finished", 8, 8]
    assert name["value"] == "tiny"
    assert "EMA share" in facts
    assert resume == f"mlx-sf train --resume {place.runs / 'tiny'}"
    assert "<img" in figure
    assert (slider["maximum"], slider["visible"]) == (2, True)
    assert "Preview after step 8" in preview
    assert "Preview after step 4" in client.predict("tiny", 1, api_name="/preview")
    assert client.predict("../other", 1, api_name="/preview").count("holds no run")
    run = RunFolder(place.runs / "tiny")
    assert run.held_by() is None
    with run.locked():
        assert run.held_by() == os.getpid()
        assert "Training on the same device: tiny" in page.desk.others()
        with open(run.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": 10, "images": 40, "loss": 0.5, "ema1_initial_share": 0.5}) + "\n{cut")
        told = client.predict("tiny", 2, api_name="/follow")[2]
        assert f"training now by process {os.getpid()}" in told
        assert "10 of 8" in told
    assert run.held_by() is None
    assert page.desk.others() == ""


def test_runs_that_are_none_of_this_folders_are_left_out(place, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "elsewhere").symlink_to(place.runs / "tiny")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("a: [")
    assert [r.path.name for r in runs.find_runs(folder)] == ["broken"]
    assert runs.overview(folder)[0][:2] == ["broken", "cannot be read"]
    assert runs.find_runs(tmp_path / "none") == []


def table(path: Path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(str(r.get(c, "")) for c in COLUMNS) for r in rows]
    path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")


def test_evaluations_are_sorted_by_fid(page, place, tmp_path):
    table(place.evals / "results.csv", {"label": "a", "fid": "12.5", "cfg": "2"}, {"label": "b"})
    table(place.evals / "other" / "results.csv", {"label": "c", "fid": "3.25", "count": "50000"})
    table(tmp_path / "results.csv", {"label": "hidden", "fid": "1"})
    (place.evals / "linked").symlink_to(tmp_path)
    (place.evals / "broken").mkdir()
    (place.evals / "broken" / "results.csv").write_text("x,y\n")
    save_png(place.evals / "spectrum.png", np.zeros((8, 8, 3), np.uint8))
    rows, remarks = evals.read_tables(place.evals)
    assert [r[:3] for r in rows] == [["c", 3.25, 50000], ["a", 12.5, None], ["b", None, None]]
    assert len(remarks) == 1
    assert "is no table of evaluations" in remarks[0]
    said, shown, figures = Client(page.url, verbose=False, download_files=tmp_path).predict(api_name="/evaluations")
    assert "is no table" in said
    assert [r[0] for r in shown["data"]] == ["c", "a", "b"]
    assert [f["caption"] for f in figures] == ["spectrum.png"]


def test_the_command_says_what_is_missing(refused, monkeypatch):
    monkeypatch.delenv("MLX_SF_APP_PASSWORD", raising=False)
    refused("--host 0.0.0.0: others can reach this address, so it needs a password", "app", "--host", "0.0.0.0")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    refused("the page needs Gradio, which is not installed: pip install 'mlx-sf[app]'", "app")


def test_nothing_but_the_page_knows_gradio():
    """And nothing but its command knows the page, which it opens when it is called."""
    for path in (ROOT / "mlx_sf").rglob("*.py"):
        text = path.read_text()
        assert path.parent.name == "web" or not re.search(r"^\s*(import|from) gradio", text, re.M), path
        users = re.search(r"^(\s*)from \.+web\b", text, re.M)
        assert users is None or (path.name == "app.py" and users[1]), path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it(number, tmp_path):
    copies = {p.name for p in Path("/tmp").glob("mlx-sf-app-*")}
    command = [sys.executable, "-m", "mlx_sf.cli", "app", "--no-browser", "--output", str(tmp_path / "kept")]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "The page is at http://127.0.0.1:" in page.stdout.readline()
    time.sleep(0.5)
    page.send_signal(number)
    out, err = page.communicate(timeout=20)
    assert (page.returncode, out.strip(), err) == (0, "closed", "")
    assert {p.name for p in Path("/tmp").glob("mlx-sf-app-*")} <= copies
