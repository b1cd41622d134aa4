"""`mlx-sf eval` from PNGs and from a checkpoint: the reference's numbers, exact resume, shards, clear refusals."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sf.metrics import extractor, fetch
from mlx_sf.metrics import stream as measure_module
from mlx_sf.metrics.inception_weights import save_inception
from mlx_sf.metrics.moments import gaussian_of
from mlx_sf.metrics.report import Choices, compare, fid_name, lines
from mlx_sf.metrics.statistics_file import Measured, write_statistics
from tests.helpers import GOLDEN, ROOT
from tests.metrics.fid_recipe import golden, golden_json, recipe_network, recipe_weights

EXPECTED = golden_json("expected.json")
LIMIT = EXPECTED["tolerances"]["end_to_end"]


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name in ("setA", "setB"):
        write_pngs(root / name, golden("inputs.npz")[name])
    write_pngs(root / "small", golden("inputs.npz")["setB"][:12])
    return root


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "recipe.safetensors"
    save_inception(path, recipe_weights(), "recipe")
    return path


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's network in place of reading a file again and again."""
    monkeypatch.setattr(extractor, "load_inception", lambda path: recipe_weights())
    monkeypatch.setattr(extractor, "Inception", lambda weights: recipe_network())


def record_of(output: Path, label: str) -> dict[str, Any]:
    found = sorted(output.glob(f"records/{label}-*.json"), key=lambda p: p.stat().st_mtime_ns)
    return json.loads(found[-1].read_text())


@pytest.fixture(scope="module")
def golden_run(sets: Path, weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Set A against set B through the command, as a process of its own: output folder and its options."""
    output = tmp_path_factory.mktemp("golden")
    options = [
        "eval", "--samples", sets / "setA", "--inception-weights", weights_file, "--kid-subset-size", 50, "-o", output,
    ]  # fmt: skip
    command = [sys.executable, "-m", "mlx_sf.cli", *map(str, options), "--ref", str(sets / "setB")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "FID " in done.stdout
    assert "FID-50k  " not in done.stdout
    assert "N = 96" in done.stdout
    assert "unreliable: 96 samples for 2048 dimensions" in done.stdout
    return output, [str(x) for x in options]


def test_png_folders_give_the_references_numbers(golden_run: tuple[Path, list[str]]) -> None:
    output, _ = golden_run
    got, want = record_of(output, "setA")["metrics"], EXPECTED["end_to_end"]
    for value in want["fid_2048"].values():
        assert got["fid"] == pytest.approx(value, abs=LIMIT["fid_2048_abs"])
    score = want["inception_score.setA.splits10_shuffled"]
    assert got["inception_score"]["mean"] == pytest.approx(score["mean"], abs=LIMIT["inception_score_mean_abs"])
    assert got["inception_score"]["std"] == pytest.approx(score["std"], abs=LIMIT["inception_score_std_abs"])
    kid = want["kid.setA.setB.subsets100.size50"]
    assert got["kid"]["mean"] == pytest.approx(kid["mean"], abs=LIMIT["kid_abs"])
    assert got["kid"]["std"] == pytest.approx(kid["std"], abs=LIMIT["kid_abs"])
    k3 = want["precision_recall.k3"]
    assert got["precision_recall"]["precision"] == k3["fraction_of_A_inside_B"]
    assert got["precision_recall"]["recall"] == k3["fraction_of_B_inside_A"]
    fork = got["precision_recall"]["torch_fidelity_fork_input1_samples"]
    assert fork == {k: k3["fork_input1A_input2B"][k] for k in ("precision", "recall")}


def test_record_and_table_say_how_to_repeat_it(golden_run: tuple[Path, list[str]], sets: Path) -> None:
    output, _ = golden_run
    record = record_of(output, "setA")
    assert record["inception"]["sha256"] == EXPECTED["weights"]["sha256_of_all"]
    assert record["options"]["samples"] == str(sets / "setA")
    assert record["reference"]["count"] == 72
    assert record["metrics"]["count"] == 96
    assert record["tf32"] is False
    with open(output / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert float(rows[0]["fid"]) == record["metrics"]["fid"]
    with Image.open(output / "spectrum.png") as figure:
        assert figure.size[0] > 500


def test_published_statistics_file(golden_run: tuple[Path, list[str]], tmp_path: Path, cli: Callable) -> None:
    """2048 dimensions, mu float32 and sigma float64, no provenance; the samples are not measured again."""
    output, options = golden_run
    z = golden("stats_2048_factors.npz")
    factor = z["U"].astype(np.float64)
    np.savez(tmp_path / "jit_like.npz", mu=z["mu"], sigma=np.diag(z["d"].astype(np.float64)) + factor.T @ factor)
    status, out, err = cli(*options, "--ref", tmp_path / "jit_like.npz")
    assert status == 0, err
    assert "measured before" in out
    assert "against a reference of unknown size" in out
    assert "left out: KID needs the reference's features" in out
    got = record_of(output, "setA")["metrics"]
    assert got["kid"] is None
    want = EXPECTED["stats_file_2048"]
    for name in ("fid_setA", "exact_float32", "exact_float64_network"):
        assert got["fid"] == pytest.approx(want[name], abs=LIMIT["fid_2048_abs"])


def test_other_feature_layer(ready: None, sets: Path, tmp_path: Path, cli: Callable) -> None:
    stats = GOLDEN / "fid" / "stats_192.npz"
    arguments = ["--samples", sets / "setA", "--feature-layer", 192, "--metrics", "fid", "-o", tmp_path / "out"]
    status, _, err = cli("eval", *arguments, "--ref", stats)
    assert status == 0, err
    fid = record_of(tmp_path / "out", "setA")["metrics"]["fid"]
    assert fid == pytest.approx(EXPECTED["stats_file_192"]["fid_setA"], abs=LIMIT["fid_192_abs"])


@pytest.mark.slow
@pytest.mark.parametrize("tap", ["64", "192", "768"])
def test_distances_of_every_layer(ready: None, sets: Path, tmp_path: Path, cli: Callable, tap: str) -> None:
    arguments = ["--samples", sets / "setA", "--ref", sets / "setB", "--feature-layer", tap, "--metrics", "fid"]
    status, _, err = cli("eval", *arguments, "-o", tmp_path)
    assert status == 0, err
    for want in EXPECTED["end_to_end"][f"fid_{tap}"].values():
        assert record_of(tmp_path, "setA")["metrics"]["fid"] == pytest.approx(want, abs=LIMIT[f"fid_{tap}_abs"])


@pytest.mark.slow
def test_live_agreement_with_torch_fidelity(
    golden_run: tuple[Path, list[str]], sets: Path, weights_file: Path, tmp_path: Path
) -> None:
    torch_peer = pytest.importorskip("mlx_sf.parity.torch_fidelity")
    peer = torch_peer.fidelity_metrics(sets / "setA", sets / "setB", recipe_weights(), kid_subset_size=50)
    got = record_of(golden_run[0], "setA")["metrics"]
    fid = peer["frechet_inception_distance"]
    assert abs(got["fid"] - fid) <= 1e-3 * fid
    assert got["fid"] == pytest.approx(fid, abs=LIMIT["fid_2048_abs"])
    assert got["inception_score"]["mean"] == pytest.approx(peer["inception_score_mean"], abs=1e-4)
    assert got["inception_score"]["std"] == pytest.approx(peer["inception_score_std"], abs=1e-4)
    assert got["kid"]["mean"] == pytest.approx(peer["kernel_inception_distance_mean"], abs=2e-6)
    assert got["kid"]["std"] == pytest.approx(peer["kernel_inception_distance_std"], abs=2e-6)


# ---- from a checkpoint -----------------------------------------------------------------------------------------

QUICK = ("--feature-layer", 64, "--metrics", "fid,spectral", "--steps", 2)


@pytest.fixture
def scenes_stats(ready: None, tmp_path: Path, cli: Callable, converted: Path) -> Path:
    from mlx_sf.checkpoints.checkpoint import Checkpoint

    side = Checkpoint(converted / "forced.npz").config.model.img_size
    path = tmp_path / "scenes.npz"
    status, out, err = cli("stats", "--img-size", side, "-n", 12, "-o", path, "--feature-layer", 64)
    assert status == 0, err
    assert "statistics of 12 pictures" in out
    return path


def test_sweep_over_a_checkpoint(scenes_stats: Path, converted: Path, tmp_path: Path, cli: Callable) -> None:
    out_folder = tmp_path / "out"
    ckpt = converted / "forced.npz"
    from mlx_sf.checkpoints.checkpoint import Checkpoint

    classes = Checkpoint(ckpt).config.model.num_classes
    n = 2 * classes
    sweep = ["eval", "--ckpt", ckpt, "--ref", scenes_stats, *QUICK, "-o", out_folder, "-n", n, "--batch-size", 3]
    status, out, err = cli(*sweep, "--cfg", "1,2.5", "--weights", "ema1,ema2", "--save-samples", "--seed", 5)
    assert status == 0, err
    for label in (f"{w}-cfg{c}-n{n}" for w in ("ema1", "ema2") for c in ("1", "2.5")):
        record = record_of(out_folder, label)
        assert record["metrics"]["count"] == n
        assert record["options"]["seed"] == 5
        assert record["checkpoint_sha256"]
        assert len(record["metrics"]["spectral"]["bands"]) >= 8
    with open(out_folder / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["weights"], float(r["cfg"])) for r in rows] == [("ema1", 1), ("ema1", 2.5), ("ema2", 1), ("ema2", 2.5)]
    assert len({r["fid"] for r in rows}) == 4
    assert (out_folder / "fid_is_over_cfg.png").exists()
    assert "weights      cfg" in out
    # the reference's order: all of class 0 first; the pictures are those of `mlx-sf sample`
    folder = next(out_folder.glob(f"ema2-cfg2.5-n{n}-*")) / "samples"
    drawn = sorted(folder.iterdir())
    assert [p.name for p in drawn] == [f"{i:05d}.png" for i in range(n)]
    order = ",".join(str(i // 2) for i in range(n))
    status, _, err = cli(
        "sample", "--ckpt", ckpt, "--weights", "ema2", "--cfg", 2.5, "--steps", 2, "--classes", order, "--seed", 5,
        "-o", tmp_path / "again", "--batch-size", 3,
    )  # fmt: skip
    assert status == 0, err
    for p in drawn:
        assert np.array_equal(np.asarray(Image.open(p)), np.asarray(Image.open(tmp_path / "again" / p.name)))
    # finished runs are found again
    status, out, err = cli(*sweep, "--cfg", "1", "--weights", "ema1", "--save-samples", "--seed", 5)
    assert status == 0, err
    assert "measured before" in out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keep", [False, True])
def test_resume_is_exact(
    ready: None, sets: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Interrupted twice, then finished: the same statistics to the bit as in one go."""
    metrics = "fid,kid,prc" if keep else "fid,spectral"
    arguments = ["eval", "--samples", sets / "setA", "-n", 24, "--ref", sets / "small", "--feature-layer", 64]
    arguments += ["--metrics", metrics, "--batch-size", 5, "--kid-subset-size", 10]
    assert cli(*arguments, "-o", tmp_path / "whole")[0] == 0
    add, left = measure_module.Measure.add, [0]

    def add_then_die(self: Any, *a: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        add(self, *a)

    monkeypatch.setattr(measure_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(measure_module.Measure, "add", add_then_die)
    for batches in (2, 1, 2):
        left[0] = batches
        with pytest.raises(Killed):
            cli(*arguments, "-o", tmp_path / "parts")
    left[0] = 1000
    status, _, err = cli(*arguments, "-o", tmp_path / "parts")
    assert status == 0, err
    whole, parts = (record_of(tmp_path / p, "setA") for p in ("whole", "parts"))
    assert whole["metrics"] == parts["metrics"]
    a, b = (dict(np.load(next((tmp_path / p).glob("setA-*/statistics.npz")))) for p in ("whole", "parts"))
    assert set(a) == set(b)
    assert all(np.array_equal(a[k], b[k]) for k in a if k != "provenance")
    assert not list((tmp_path / "parts").glob("setA-*/state-*"))


def free_ports(n: int) -> Iterator[int]:
    import socket

    held = [socket.socket() for _ in range(n)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    yield from ports


def in_two_processes(arguments: list[Any], hosts: Path) -> list[str]:
    """Python with these arguments as two processes of a ring: what each printed."""
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in free_ports(2)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "MLX_RANK": str(r), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=200) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outputs
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    ready: None, sets: Path, weights_file: Path, tmp_path: Path, cli: Callable
) -> None:
    arguments = ["--samples", sets / "setA", "-n", 13, "--ref", sets / "small", "--feature-layer", 64]
    arguments += ["--metrics", "fid,kid,prc,spectral", "--kid-subset-size", 10]
    assert cli("eval", *arguments, "-o", tmp_path / "one")[0] == 0
    script = ROOT / "scripts" / "eval_fid.py"
    outputs = in_two_processes(
        [script, *arguments, "--inception-weights", weights_file, "-o", tmp_path / "two"], tmp_path / "hosts.json"
    )
    assert "FID" in outputs[0]
    assert outputs[1] == ""
    one, two = (record_of(tmp_path / p, "setA") for p in ("one", "two"))
    assert two["processes"] == 2
    assert two["metrics"]["fid"] == pytest.approx(one["metrics"]["fid"], rel=1e-4)
    assert two["metrics"]["kid"]["mean"] == pytest.approx(one["metrics"]["kid"]["mean"], abs=1e-5)
    assert two["metrics"]["precision_recall"] == one["metrics"]["precision_recall"]
    assert two["metrics"]["spectral"]["total"] == pytest.approx(one["metrics"]["spectral"]["total"], rel=1e-6)
    assert len(list((tmp_path / "two").glob("setA-*/statistics.npz"))) == 1
    # from Python every process has the score
    code = (
        "import sys, mlx_sf; a = sys.argv; s = mlx_sf.evaluate(a[1], a[2], num_images=13, feature_layer='64', "
        "metrics=['fid', 'kid', 'prc', 'spectral'], kid_subset_size=10, inception_weights=a[3], output=a[4]); "
        "print(repr((s.fid, s.kid.mean, s.recall, s.spectral.total, len(s.spectral.bands), s.output.name)))"
    )
    told = in_two_processes(
        ["-c", code, sets / "setA", sets / "small", weights_file, tmp_path / "two"], tmp_path / "hosts.json"
    )
    assert told[0] == told[1]
    assert told[0].startswith(f"({two['metrics']['fid']!r}, {two['metrics']['kid']['mean']!r}, ")


def test_fid_50k_is_only_the_name_for_50000() -> None:
    g = gaussian_of(np.random.default_rng(0).standard_normal((100, 4)))
    for count, name in ((50_000, "FID-50k"), (49_999, "FID"), (50_001, "FID"), (5_000, "FID")):
        assert fid_name(count) == name
        measured = Measured(type(g)(g.mu, g.sigma, count))
        m = compare(measured, Measured(g), Choices(("fid",)))
        text = "\n".join(lines("x", m))
        assert f"N = {count}" in text
        assert ("FID-50k   " in text) == (count == 50_000)
        assert any("biased upwards" in n for n in m.notes) == (count < 10_000)


# ---- refused, before anything is computed ----------------------------------------------------------------------


@pytest.fixture
def nothing_computed(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("computed something before all was checked")

    monkeypatch.setattr(extractor, "Inception", lambda weights: type("Never", (), {"features": never}))
    monkeypatch.setattr(fetch, "load", never)


@pytest.fixture
def few(sets: Path, tmp_path: Path) -> Path:
    """Six good PNGs of 32x32."""
    return write_pngs(tmp_path / "few", golden("inputs.npz")["setA"][:6])


def test_bad_samples_are_refused(nothing_computed: None, sets: Path, few: Path, tmp_path: Path, refused: Any) -> None:
    def check(words: str, *more: Any) -> None:
        refused(words, "eval", "--samples", few, "--ref", sets / "setB", "-o", tmp_path / "out", *more)

    check("few: holds 6 pictures, 7 are asked for", "-n", 7)
    good = (few / "00003.png").read_bytes()
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(few / "00003.png")
    check("00003.png: is 40x32 pixels, 00000.png is 32x32: all pictures of a folder must have one size")
    (few / "00003.png").write_bytes(good[: len(good) // 2])
    check("00003.png: cannot be read as a picture")
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 0x55
    (few / "00003.png").write_bytes(bytes(damaged))
    check("00003.png: cannot be read as a picture")
    (few / "00003.png").write_bytes(b"<html>")
    check("00003.png: cannot be read as a picture (not a picture, or damaged)")
    for p in few.iterdir():
        p.unlink()
    check("few: no picture in this folder")
    (few / "class0").mkdir()
    check("no picture in this folder; its folder 'class0' is not looked into")
    refused("no such folder", "eval", "--samples", tmp_path / "gone", "--ref", sets / "setB", "-o", tmp_path / "out")


def test_bad_references_are_refused(nothing_computed: None, few: Path, tmp_path: Path, refused: Any) -> None:
    def check(words: str, ref: Path, *more: Any) -> None:
        refused(words, "eval", "--samples", few, "--ref", ref, "-o", tmp_path / "out", *more)

    path = tmp_path / "stats.npz"
    check("stats.npz: no such file or folder", path)
    path.write_bytes(b"not a zip")
    check("stats.npz: not a statistics file", path)
    np.savez(path, a=np.zeros(3))
    check("holds no array 'mu' (it holds a)", path)
    mu, sigma = np.zeros(2048, np.float32), np.eye(2048)
    np.savez(path, mu=mu, sigma=np.eye(2047))
    check("mu has shape (2048,) and sigma (2047, 2047), want (D,) and (D, D)", path)
    np.savez(path, mu=mu[:192], sigma=np.eye(192))
    check("statistics have 192 dimensions, features of layer 2048 have 2048: use --feature-layer 192", path)
    sigma[3, 5] = np.nan
    np.savez(path, mu=mu, sigma=sigma)
    check("array 'sigma' holds NaN or infinite values", path)
    sigma[3, 5] = 0.5
    np.savez(path, mu=mu, sigma=sigma)
    check("sigma is not symmetric", path)
    sigma[5, 3] = sigma[3, 5] = 9.0
    np.savez(path, mu=mu, sigma=sigma)
    check("negative eigenvalues: not a covariance", path)
    np.savez(path, mu=mu, sigma=np.array([[None]], dtype=object))
    check("not a statistics file", path)
    np.savez(path, mu=mu, sigma=np.eye(2048), provenance=np.frombuffer(b"{", np.uint8))
    check("its provenance cannot be read", path)
    good = gaussian_of(np.random.default_rng(0).standard_normal((100, 64)))
    facts = {"img_size": [64, 64], "tap": "64", "inception_sha256": EXPECTED["weights"]["sha256_of_all"]}
    write_statistics(path, Measured(good, provenance=facts))
    check("statistics of 64x64 pictures, the samples are 32x32", path, "--feature-layer", 64)
    write_statistics(path, Measured(good, provenance={**facts, "img_size": [32, 32], "inception_sha256": "00" * 32}))
    check("was made with other Inception weights", path, "--feature-layer", 64)
    other = write_pngs(tmp_path / "other", np.zeros((3, 16, 16, 3), np.uint8))
    check("reference pictures are 16x16, the samples 32x32", other)


def test_metrics_that_cannot_be_had_are_refused(
    nothing_computed: None, few: Path, sets: Path, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(64, np.float32), sigma=np.eye(64))
    base = ["eval", "--samples", few, "--feature-layer", 64, "-o", tmp_path / "out"]
    refused("KID needs the reference's features", *base, "--ref", path, "--metrics", "kid")
    refused("spectral distance needs a reference made by", *base, "--ref", path, "--metrics", "fid,spectral")
    refused("6 images for 10 splits", *base, "--ref", path, "--metrics", "is")
    refused("'fif' is unknown, want fid, is, kid", *base, "--ref", path, "--metrics", "fif")
    refused("subsets of 1000 from sets of 6 and 72", *base, "--ref", sets / "setB", "--metrics", "kid")
    refused("neighbour 6 in sets of 6", *base, "--ref", sets / "setB", "--metrics", "prc", "--neighbours", 6)


def test_bad_sampling_requests_are_refused(
    nothing_computed: None, sets: Path, converted: Path, tmp_path: Path, refused: Any
) -> None:
    def check(words: str, *more: Any, ref: Path | None = None) -> None:
        refused(words, "eval", "--ckpt", converted / "forced.npz", "--ref", ref or sets / "setB", "-o", out, *more)

    from mlx_sf.checkpoints.checkpoint import Checkpoint

    out = tmp_path / "out"
    k = Checkpoint(converted / "forced.npz").config.model.num_classes
    check(f"--num-images {2 * k + 1} does not divide evenly over {k} classes: use {2 * k} or {3 * k}", "-n", 2 * k + 1)
    check("--num-images is 0", "-n", 0)
    check("holds weights", "-n", k, "--weights", "ema3")
    check("'2.6;3' is no list of numbers", "-n", k, "--cfg", "2.6;3")
    check("--cfg is -1.0", "-n", k, "--cfg", "-1")
    check("cfg-interval", "-n", k, "--cfg-interval", 1, 0)
    check("--steps is 0", "-n", k, "--steps", 0)
    check("no such file", "-n", k, ref=tmp_path / "gone.npz")
    other = write_pngs(tmp_path / "other", np.zeros((3, 17, 17, 3), np.uint8))
    check("reference pictures are 17x17", "-n", k, ref=other)
    refused("give either --ckpt or --samples", "eval", "--ref", sets / "setB", "-o", out)
    both = ["--samples", sets / "setA", "--ckpt", converted / "forced.npz"]
    refused("give either --ckpt or --samples", "eval", *both, "--ref", sets / "setB", "-o", out)
    refused("--cfg is for --ckpt", "eval", "--samples", sets / "setA", "--ref", sets / "setB", "--cfg", "2", "-o", out)


def test_places_that_cannot_be_written_are_refused(
    nothing_computed: None, few: Path, sets: Path, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / "file").write_text("x")
    base = ["eval", "--samples", few, "--ref", sets / "setB"]
    refused("cannot write in this folder", *base, "-o", tmp_path / "file" / "out")
    (tmp_path / "table.csv").write_text("name,age\n")
    refused("is no table of evaluations", *base, "-o", tmp_path / "out", "--table", tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == "name,age\n"


def test_bad_inception_weights_are_refused_before_sampling(
    few: Path, sets: Path, converted: Path, tmp_path: Path, refused: Any
) -> None:
    base = ["eval", "--samples", few, "--ref", sets / "setB", "-o", tmp_path / "out", "--inception-weights"]
    refused("no such file, want Inception weights: download https://", *base, tmp_path / "gone.pth")
    refused("lacks tensor", *base, converted / "forced.npz")
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    refused("junk.pth", *base, tmp_path / "junk.pth")


def test_state_of_another_number_of_processes_is_refused(
    ready: None, few: Path, tmp_path: Path, refused: Any, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["eval", "--samples", few, "--ref", few, "--feature-layer", 64, "--metrics", "fid", "-o", tmp_path / "out"]
    assert cli(*base)[0] == 0
    place = next((tmp_path / "out").glob("few-*"))
    (place / "statistics.npz").unlink()
    (place / "state-0of3.npz").write_bytes(b"")
    refused("was begun by 3 processes, this run has 1", *base)
    (place / "state-0of3.npz").rename(place / "state-0of1.npz")
    refused("state-0of1.npz: damaged", *base)
