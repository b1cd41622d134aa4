"""The commands as people type them: outputs, metadata, and one clear line for every wrong input."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from mlx_sf import __version__
from mlx_sf.checkpoints.convert.jit import convert
from mlx_sf.checkpoints.load import load_model
from tests.helpers import PARITY, ROOT, run_cli


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def settings_of(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["mlx-sf"])


@pytest.fixture(scope="module")
def forced(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "forced.npz"
    convert(PARITY / "forced.pth", path, flags={"in_context_start": 1})
    return path


def test_a_cuda_run_is_repeated_to_the_last_digits(golden, tmp_path):
    """.pth -> convert/from_torch.py -> sample --noise --output x.npy, in processes of their own."""
    import subprocess
    import sys

    script = ROOT / "convert" / "from_torch.py"
    converted = tmp_path / "vanilla.safetensors"
    arguments = ["--weights", "model", "--in-context-start", "1"]
    done = subprocess.run(
        [sys.executable, script, PARITY / "vanilla.pth", converted, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arrays = golden.arrays("sample")
    np.save(tmp_path / "noise.npy", arrays["vanilla/noise"])
    classes = ",".join(map(str, arrays["vanilla/labels"]))
    done = run_cli(
        "sample", "--ckpt", converted, "--noise", tmp_path / "noise.npy", "--classes", classes, "--steps", 12,
        "--method", "heun", "--cfg", 2.9, "--cfg-interval", 0.1, 1, "--output", tmp_path / "out.npy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npy")
    assert got.dtype == np.float32
    golden.close("sample", "vanilla_09/z_after_12", got)  # noise scale 2.0, the checkpoint's own


def test_one_image_per_class_entry_in_order(cli, forced, tmp_path):
    out = tmp_path / "pictures"
    status, said, _ = cli("sample", "--ckpt", forced, "--classes", "1,7,7", "--steps", 2, "-o", out, "--seed", 5)
    assert status == 0
    assert "3 images" in said
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    facts = [settings_of(out / f"0000{i}.png") for i in range(3)]
    assert [f["class"] for f in facts] == [1, 7, 7]
    assert [f["seed"] for f in facts] == [5, 6, 7]
    assert facts[0]["program"] == f"mlx-sf {__version__}"
    assert facts[0] | {"class": 0, "seed": 0} == facts[1] | {"class": 0, "seed": 0}
    # the metadata is enough to make one of them again, alone
    f = facts[2]
    again = ("sample", "--ckpt", forced, "--classes", f["class"], "--seed", f["seed"], "--steps", f["steps"])
    assert cli(*again, "--cfg", f["cfg"], "--cfg-interval", *f["cfg_interval"], "-o", tmp_path / "one.png")[0] == 0
    a, b = (picture(p).astype(int) for p in (out / "00002.png", tmp_path / "one.png"))
    assert np.abs(a - b).max() <= 1
    assert cli("info", out / "00001.png")[1].count("\n") >= 10


def test_numbers_seeds_and_batches(cli, forced, tmp_path):
    def draw(*arguments):
        assert cli("sample", "--ckpt", forced, "--steps", 2, "-o", tmp_path / "x.npy", *arguments)[0] == 0
        return np.load(tmp_path / "x.npy")

    five = draw("-n", 5, "--seed", 3, "--batch-size", 2)
    assert five.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(draw("--num-images", 5, "--seed", 3, "--batch-size", 5), five, atol=1e-5)
    np.testing.assert_allclose(draw("-n", 1, "--seed", 6, "--classes", "3"), five[3:4], atol=1e-5)
    assert len(draw()) == 8
    assert len(draw("--classes", "2", "-n", 3)) == 3
    assert np.abs(draw("--classes", "null") - five[:1]).max() > 1e-3


def test_grid_and_stepwise(cli, forced, tmp_path):
    out = tmp_path / "o"
    arguments = ("--classes", "0,1,2", "--steps", 12, "--batch-size", 2, "--grid", "--stepwise")
    assert cli("sample", "--ckpt", forced, "-o", out, *arguments)[0] == 0
    assert picture(out / "grid.png").shape == (66, 66, 3)
    assert picture(out / "00002_steps.png").shape == (64, 10 * 34 - 2, 3)
    # the last column of a strip is the finished image, above as below
    strip = picture(out / "00002_steps.png")
    np.testing.assert_array_equal(strip[:32, -32:], picture(out / "00002.png"))
    assert cli("sample", "--ckpt", forced, "-n", 4, "--steps", 1, "-o", tmp_path / "sheet.png")[0] == 0
    assert picture(tmp_path / "sheet.png").shape == (66, 66, 3)


def test_settings_default_to_the_checkpoints(cli, forced, tmp_path):
    assert cli("sample", "--ckpt", forced, "-n", 1, "-o", tmp_path / "x.png")[0] == 0
    facts = settings_of(tmp_path / "x.png")
    assert (facts["steps"], facts["cfg"], facts["cfg_interval"], facts["method"]) == (12, 2.9, [0.1, 1.0], "heun")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--classes", "5000"), "--classes: '5000' is no class of this model, want 0 to 9, or null"),
        (("--classes", "10"), "'10' is no class"),
        (("--classes", "1,,2"), "'' is no class"),
        (("--classes", "-1"), "'-1' is no class"),
        (("--classes", "cat"), "'cat' is no class"),
        (("--cfg-interval", "1", "0"), "--cfg-interval is (1.0, 0.0), want LOW HIGH with 0 <= LOW <= HIGH <= 1"),
        (("--steps", "0"), "--steps is 0, want at least 1"),
        (("--steps", "many"), "'many' is not a valid integer"),
        (("--cfg", "-2"), "cfg is -2.0"),
        (("--cfg", "nan"), "cfg is nan, want a finite number"),
        (("--sample-t-eps", "0"), "--sample-t-eps is 0.0"),
        (("--shift", "0"), "--shift is 0.0, want above 0"),
        (("--cfg-norm", "local"), "'local' is not one of"),
        (("--num-images", "0"), "--num-images is 0"),
        (("--batch-size", "0"), "0 is not in the range"),
        (("--seed", "-1"), "--seed is -1"),
        (("--weights", "model"), "holds weights ema1, not 'model'"),
        (("--dtype", "int8"), "'int8' is not one of"),
        (("--method", "rk4"), "'rk4' is not one of"),
        (("--classes", "1,2,3", "-n", "2"), "--classes names 3 images, but only 2 are asked for"),
        (("--output", "x.jpg"), "pictures are written as .png or .npy"),
        (("--noise", "none.npy"), "none.npy: cannot be read as noise (No such file"),
    ],
)
def test_wrong_arguments_are_refused(refused, forced, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(words, "sample", "--ckpt", forced, *arguments)
    assert not list(tmp_path.glob("samples/*"))


def test_wrong_noise_is_refused(refused, forced, tmp_path):
    def check(words, array, *arguments):
        np.save(tmp_path / "n.npy", array)
        refused(words, "sample", "--ckpt", forced, "--noise", tmp_path / "n.npy", *arguments)

    want = "want float32 noise of shape (N, 3, 32, 32)"
    check(want, np.zeros((2, 3, 16, 16), np.float32))
    check(want, np.zeros((3, 32, 32), np.float32))
    check(want, np.zeros((2, 3, 32, 32), np.int32))
    check("NaN", np.full((2, 3, 32, 32), np.nan, np.float32))
    check("empty", np.zeros((0, 3, 32, 32), np.float32))
    check("holds noise for 2 images, but 3 are asked for", np.zeros((2, 3, 32, 32), np.float32), "-n", 3)
    (tmp_path / "n.npy").write_bytes(b"\x93NUMPY")
    refused("not a plain .npy array", "sample", "--ckpt", forced, "--noise", tmp_path / "n.npy")


def test_places_that_cannot_be_written_are_refused_first(refused, forced, tmp_path):
    (tmp_path / "file").write_text("kept")
    for output in ("file/out", "file/x.npy", "file/x.png"):
        refused("cannot write", "sample", "--ckpt", forced, "--output", tmp_path / output)
    assert (tmp_path / "file").read_text() == "kept"


def test_checkpoints_that_are_none_are_refused(refused, forced, tmp_path):
    refused("no such file or folder", "sample", "--ckpt", tmp_path / "none.npz")
    refused("give --in-context-start", "sample", "--ckpt", PARITY / "forced.pth")
    whole = forced.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused("damaged", "sample", "--ckpt", tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(4))
    refused("not an mlx-sf checkpoint", "sample", "--ckpt", tmp_path / "other.npz")
    refused("not an mlx-sf checkpoint", "info", tmp_path / "other.npz")
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    refused("cannot be read as a picture", "info", tmp_path / "x.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "plain.png")
    refused("a picture of 4 x 3 pixels without settings", "info", tmp_path / "plain.png")


def test_weights_that_explode_are_noticed(refused, forced, tmp_path):
    """Finite weights, infinite images: nothing is written as if it were a picture."""
    from mlx.utils import tree_flatten

    from mlx_sf.checkpoints.checkpoint import save_checkpoint

    model, config = load_model(forced)
    weights = dict(tree_flatten(model.parameters()))
    weights["final_layer.linear.weight"] = weights["final_layer.linear.weight"] * 3e38
    save_checkpoint(tmp_path / "x.npz", {"ema1": weights}, config)
    refused("came out as NaN or infinite", "sample", "--ckpt", tmp_path / "x.npz", "-n", 2, "-o", tmp_path / "o")
    assert not list((tmp_path / "o").glob("*.png"))


def test_selftest_passes_and_reports(cli):
    status, out, err = cli("selftest")
    assert status == 0, err
    lines = out.strip().splitlines()
    assert lines[-1].startswith(f"{len(lines) - 3} of {len(lines) - 3} checks passed")
    for words in ("spectral forcing, whole image", "gradient", "sample hybrid", "bfloat16"):
        assert words in out


def test_selftest_fails_where_numbers_are_off(cli, monkeypatch):
    from mlx_sf.models import layers

    monkeypatch.setattr(layers, "RMS_EPS", 1e-3)
    status, out, err = cli("selftest", "--dtype", "float32")
    assert status == 1
    assert "FAILED" in out
    assert "does not reproduce the reference" in err


def test_help_names_every_command_without_loading_mlx():
    done = run_cli("--help")
    assert done.returncode == 0
    for name in ("convert", "sample", "train", "info", "selftest"):
        assert name in done.stdout
    done = run_cli("--version")
    assert __version__ in done.stdout
    done = run_cli("paint")
    assert done.returncode == 2
    assert "No such command 'paint'" in done.stderr


def test_info_about_this_installation(cli):
    status, out, _ = cli("info")
    assert status == 0
    for words in ("mlx-sf", "device", "BLAS", "memory"):
        assert words in out
    assert math.isfinite(len(json.loads(cli("info", "--json")[1])))


def test_processes_share_the_work(forced, tmp_path):
    """Two processes over loopback draw what one draws: PNGs, and one .npy from both."""
    import os
    import socket
    import subprocess
    import sys

    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (a, b)]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]))
    root = str(ROOT)

    def draw(output, ranks):
        arguments = ["sample", "--ckpt", str(forced), "-n", "5", "--steps", "2", "--batch-size", "2", "-o", str(output)]
        several = {"MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "mlx_sf.cli", *arguments],
                env={**os.environ, "PYTHONPATH": root, **several, **({"MLX_RANK": str(r)} if several else {})},
                stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
            )
            for r in range(ranks)
        ]  # fmt: skip
        for process in running:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err

    draw(tmp_path / "one.npy", 1)
    draw(tmp_path / "two.npy", 2)
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == two.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(two, one, atol=1e-5)
    draw(tmp_path / "folder", 2)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [f"0000{i}.png" for i in range(5)]
