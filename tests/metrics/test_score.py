"""`mlx_sf.evaluate`: the numbers of `mlx-sf eval`, from Python; what cannot be had is refused before drawing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_sf
from mlx_sf import models
from mlx_sf.checkpoints.checkpoint import save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.metrics import extractor
from mlx_sf.metrics.statistics_file import read_statistics
from tests.metrics.fid_recipe import golden, recipe_network, recipe_weights
from tests.models.toy import ToyConfig, ToyNetwork

QUICK: dict[str, Any] = {"feature_layer": "64", "metrics": ["fid", "kid", "prc", "spectral"], "kid_subset_size": 8}


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's network in place of the public file."""
    monkeypatch.setattr(extractor, "load_inception", lambda path: recipe_weights())
    monkeypatch.setattr(extractor, "Inception", lambda weights: recipe_network())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pngs(tmp_path / "pictures", golden("inputs.npz")["setA"][:12])


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_pngs(tmp_path / "reference", golden("inputs.npz")["setB"][:12])


def test_a_folder_scores_as_with_the_command(pictures: Path, reference: Path, tmp_path: Path, cli: Callable) -> None:
    said: list[str] = []
    score = mlx_sf.evaluate(pictures, reference, output=tmp_path / "python", say=said.append, **QUICK)
    status, _, err = cli(
        "eval", "--samples", pictures, "--ref", reference, "--feature-layer", 64, "--metrics", "fid,kid,prc,spectral",
        "--kid-subset-size", 8, "-o", tmp_path / "command",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(next((tmp_path / "command" / "records").iterdir()).read_text())["metrics"]
    assert (score.count, score.fid, score.inception_score) == (12, told["fid"], None)
    assert score.kid is not None
    assert score.spectral is not None
    assert {"mean": score.kid.mean, "std": score.kid.std} == told["kid"]
    assert score.spectral.total == told["spectral"]["total"]
    assert [b.decibels for b in score.spectral.bands] == [b["decibels"] for b in told["spectral"]["bands"]]
    assert (score.precision, score.recall) == tuple(told["precision_recall"][k] for k in ("precision", "recall"))
    assert list(score.notes) == told["notes"]
    assert score.output == tmp_path / "python"
    assert any(line.startswith("  FID") for line in said)


def test_a_pipeline_draws_with_its_own_settings(converted: Path, tmp_path: Path, cli: Callable) -> None:
    """The pictures are those of the pipeline: its weights, steps and guidance, each keyword over them."""
    pipeline = mlx_sf.load(converted / "forced.npz", weights="ema2").with_solver({"steps": 2, "cfg": 2.0})
    k, (side, _) = pipeline.config.model.num_classes, pipeline.config.model.size
    ref = tmp_path / "scenes.npz"
    status, _, err = cli("stats", "--img-size", side, "-n", 12, "-o", ref, "--feature-layer", 64)
    assert status == 0, err
    quick: dict[str, Any] = {
        "num_images": k, "feature_layer": "64", "metrics": ("fid",), "save_samples": True, "seed": 3,
    }  # fmt: skip
    one = mlx_sf.evaluate(pipeline, ref, steps=None, output=tmp_path / "one", **quick)
    same = mlx_sf.evaluate(
        converted / "forced.npz", ref, weights="ema2", steps=2, cfg=2, output=tmp_path / "b", **quick
    )
    other = mlx_sf.evaluate(pipeline, ref, steps=1, cfg=1.0, output=tmp_path / "other", **quick)
    assert one.fid == same.fid != other.fid
    drawn = sorted(next((tmp_path / "one").glob("ema2-cfg2-*")).glob("samples/*.png"))
    for picture, path in zip(pipeline.sample(list(range(k)), seed=3, batch_size=16), drawn, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(path)))
    assert one.count == read_statistics(next((tmp_path / "one").glob("ema2-*/statistics.npz")), "64").count == k


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"stpes": 3}, "no setting of sampling is called 'stpes'"),
        ({"steps": 3}, "steps is about drawing, but .* holds finished pictures"),
        ({"cfg": 2.0}, "cfg is about drawing"),
        ({"weights": "ema1"}, "weights is about drawing"),
        ({"dtype": "float32"}, "dtype is about drawing"),
        ({"feature_layer": "100"}, "feature_layer is '100', want one of 64, 192, 768, 2048"),
        ({"batch_size": 0}, "batch_size is 0, want at least 1"),
        ({"kid_subset_size": 1}, "kid_subset_size is 1, want at least 2"),
        ({"metrics": ["fif"]}, "metrics: 'fif' is unknown, want fid, is, kid, prc, spectral"),
        ({"num_images": 13}, "holds 12 pictures, 13 are asked for with num_images"),
    ],
)
def test_what_cannot_be_had_is_refused(
    pictures: Path, reference: Path, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(mlx_sf.MlxSfError, match=words):
        mlx_sf.evaluate(pictures, reference, **{**QUICK, "output": tmp_path / "out", **asked})
    assert not list(tmp_path.glob("out/records/*"))


def test_a_missing_source_is_one_line(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(mlx_sf.MlxSfError, match="no such file or folder"):
        mlx_sf.evaluate(tmp_path / "gone", reference, output=tmp_path / "out")


def test_a_model_without_classes_is_refused(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally many pictures of each class cannot be drawn where there are only prompts."""
    monkeypatch.setitem(models.ARCHITECTURES, "toy", "tests.models.toy")
    toy = Config(ToyConfig(height=8, width=24), name="toy")
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, {"model": dict(tree_flatten(ToyNetwork(toy.model).parameters()))}, toy)
    with pytest.raises(mlx_sf.MlxSfError, match="toy: draws from prompts, want a model with classes"):
        mlx_sf.evaluate(path, reference, output=tmp_path / "out")
