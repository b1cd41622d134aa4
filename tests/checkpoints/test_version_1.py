"""Files that version 0.2 wrote load and draw what 0.2 drew from them; see golden/v0_2/README.md."""

import numpy as np
import pytest

import mlx_sf
from mlx_sf.checkpoints.checkpoint import Checkpoint
from tests.helpers import GOLDEN

V0_2 = GOLDEN / "v0_2"
FILES = {"noctx": "noctx.npz", "forced": "forced.safetensors", "quantised": "quantised.safetensors", "run": "run"}


@pytest.mark.parametrize("name", FILES)
def test_old_files_draw_the_same_pictures(name, tmp_path, cli):
    out = tmp_path / "x.npy"
    arguments = ("--classes", "1,7,null", "--seed", 3, "--steps", 6, "-o", out)
    status, _, err = cli("sample", "--ckpt", V0_2 / FILES[name], *arguments)
    assert status == 0, err
    with np.load(V0_2 / "samples.npz") as z:
        np.testing.assert_allclose(np.load(out), z[name], atol=2e-5)


@pytest.mark.parametrize("method", ["heun", "multistep"])
def test_the_demo_model_draws_the_same_pictures(method):
    demo = mlx_sf.load()
    name, settings = ("demo", {}) if method == "heun" else ("demo_multistep", {"method": method, "cfg": 2.0})
    with np.load(V0_2 / "samples.npz") as z:
        want = z[name]
    classes = [1, 7, "null"][: len(want)]
    *_, last = demo.states(classes, seed=3, steps=6, **settings)
    np.testing.assert_allclose(np.asarray(last.z), want, atol=5e-5)


def test_a_file_written_today_is_version_2_and_reads_back(tmp_path, cli):
    assert cli("export", V0_2 / "run", tmp_path / "x.safetensors", "--dtype", "float32")[0] == 0
    old, new = Checkpoint(V0_2 / "run" / "checkpoint-00000004.safetensors"), Checkpoint(tmp_path / "x.safetensors")
    assert '"version": 2' in new.file.text
    assert '"architecture": "jit"' in new.file.text
    assert (old.config.model, old.config.flow, old.config.sample) == (
        new.config.model, new.config.flow, new.config.sample,
    )  # fmt: skip
