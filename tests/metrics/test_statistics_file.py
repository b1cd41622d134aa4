"""Statistics files: of every kind that is in use, and of `mlx-sf stats` after the reference's crop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sf.data.decode import load_picture
from mlx_sf.metrics import extractor
from mlx_sf.metrics.moments import gaussian_of
from mlx_sf.metrics.picture_folder import PictureFolder
from mlx_sf.metrics.scores import MeanStd
from mlx_sf.metrics.statistics_file import Measured, check_comparable, read_statistics, write_statistics
from tests.helpers import GOLDEN
from tests.metrics.fid_recipe import SEED, golden_json, recipe_network, recipe_weights

FID = GOLDEN / "fid"


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "load_inception", lambda path: recipe_weights(SEED))
    monkeypatch.setattr(extractor, "Inception", lambda weights: recipe_network())


def test_published_kind_is_read_as_is() -> None:
    got = read_statistics(FID / "stats_192.npz", "192")
    with np.load(FID / "stats_192.npz") as z:
        assert np.array_equal(got.features.mu, z["mu"].astype(np.float64))
        assert np.allclose(got.features.sigma, z["sigma"], rtol=1e-15)
    assert got.count is None
    notes = check_comparable({"img_size": (32, 32), "tap": "192", "inception_sha256": "x"}, got)
    assert "does not say the image size" in notes[0]


@pytest.mark.parametrize("types", [("f8", "f8"), ("f4", "f4"), ("f8", "f4")])
def test_other_number_types_are_cast(tmp_path: Path, types: tuple[str, str]) -> None:
    """pytorch-fid writes a float64 mean, which stops the reference on a bare assertion."""
    g = gaussian_of(np.random.default_rng(0).standard_normal((200, 64)))
    np.savez(tmp_path / "s.npz", mu=g.mu.astype(types[0]), sigma=g.sigma.astype(types[1]), mu_s=np.zeros(3))
    got = read_statistics(tmp_path / "s.npz", "64")
    assert got.features.sigma.dtype == np.float64
    assert np.allclose(got.features.mu, g.mu, atol=1e-7)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((30, 64)).astype(np.float32)
    facts = {"img_size": [8, 8], "tap": "64"}
    spectrum = gaussian_of(rng.standard_normal((30, 7)))
    measured = Measured(gaussian_of(rows), spectrum, rows, MeanStd(2.0, 0.5), facts)
    write_statistics(tmp_path / "s.npz", measured)
    got = read_statistics(tmp_path / "s.npz", "64", keep_rows=True)
    assert np.array_equal(got.features.mu, measured.features.mu)
    assert np.array_equal(got.rows, rows)
    assert np.array_equal(got.spectrum.mu, spectrum.mu)
    assert got.inception_score == measured.inception_score
    assert (got.count, got.provenance["img_size"]) == (30, [8, 8])
    assert read_statistics(tmp_path / "s.npz", "64").rows is None
    with np.load(tmp_path / "s.npz") as z:  # the types that torch-fidelity's fork insists on
        assert (z["mu"].dtype, z["sigma"].dtype) == (np.float32, np.float64)


def test_stats_of_a_folder_use_the_references_crop(ready: None, tmp_path: Path, cli: Callable) -> None:
    rng = np.random.default_rng(2)
    sides = [(40, 70), (16, 16), (33, 20), (90, 64)]
    for i, (h, w) in enumerate(sides):
        folder = tmp_path / "data" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "data" / "class1" / "bad.png").write_bytes(b"not a picture")
    out = tmp_path / "s.npz"
    status, text, err = cli(
        "stats", "--data", tmp_path / "data", "--img-size", 16, "-o", out, "--feature-layer", 64, "--keep-features"
    )
    assert status == 0, err
    assert "statistics of 4 pictures at 16x16" in text
    assert "1 of 5 pictures could not be read" in text
    assert "bad.png" in text
    assert "fewer pictures than the 64 dimensions" in text
    got = read_statistics(out, "64", keep_rows=True)
    crops = [load_picture(p, 16, "reference") for p in sorted(tmp_path.glob("data/*/[0-9].png"))]
    want = recipe_network().features(np.stack(crops), ["64"])["64"]
    assert np.allclose(got.rows, want, atol=1e-5)
    assert got.provenance["img_size"] == [16, 16]
    assert got.provenance["inception_sha256"] == golden_json("expected.json")["weights"]["sha256_of_all"]
    assert got.provenance["skipped"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "s.npz"]  # nothing half-done is left


def test_bad_requests_for_stats_are_refused(ready: None, tmp_path: Path, refused: Any) -> None:
    base = ["stats", "--img-size", 16, "--feature-layer", 64]
    refused("must end in .npz", *base, "-o", tmp_path / "s.txt")
    refused("no such folder", *base, "-o", tmp_path / "s.npz", "--data", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    refused("no picture in this folder", *base, "-o", tmp_path / "s.npz", "--data", tmp_path / "empty")
    refused("--num-images is 1, want from 2", *base, "-o", tmp_path / "s.npz", "-n", 1)
    refused("--img-size is 1, want", "stats", "--img-size", 1, "-o", tmp_path / "s.npz")
    (tmp_path / "empty" / "a.png").write_bytes(b"x")
    (tmp_path / "empty" / "b.png").write_bytes(b"x")
    refused("0 samples, want at least 2", *base, "-o", tmp_path / "s.npz", "--data", tmp_path / "empty")


# ---- folders of pictures ---------------------------------------------------------------------------------------


def test_folder_is_listed_and_decoded_as_the_reference_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rgba = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "10.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "2.PNG")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "3.jpeg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "sub").mkdir()
    folder = PictureFolder(tmp_path)
    assert [Path(f).name for f in folder.files] == ["10.png", "2.PNG", "3.jpeg"]  # plain strings: 10 before 2
    assert folder.check() == (6, 5)
    batches = list(folder.batches(range(3), 2))
    assert [n for n, _ in batches] == [2, 1]
    assert np.array_equal(batches[0][1][0], rgba[..., :3])  # alpha dropped, not blended
    assert np.array_equal(batches[0][1][1], rgba[..., :1].repeat(3, 2))
    before = folder.fingerprint()
    Image.fromarray(rgba[..., 1]).save(tmp_path / "2.PNG")
    assert PictureFolder(tmp_path).fingerprint() != before
