"""Folders, data sets and the cache: the right pictures with the right labels, and clear refusals."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sf.data.cache import CachedSource
from mlx_sf.data.decode import BadPictureError
from mlx_sf.data.hub import DatasetSource
from mlx_sf.data.sources import FolderSource, open_source
from mlx_sf.errors import MlxSfError

SIZE = (8, 8)


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((*SIZE, 3), value, np.uint8))


def folder(root: Path, files: list[str]) -> Path:
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith((".png", ".JPG")):
            picture(i).save(root / file, "PNG")
        else:
            (root / file).write_bytes(b"text")
    return root


def contents(source: FolderSource | DatasetSource | CachedSource) -> list[tuple[int, int]]:
    return [(int(image[0, 0, 0]), label) for image, label in (source.load(i) for i in range(len(source)))]


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    root = folder(tmp_path, ["b/1.png", "a/2.JPG", "a/1.png", "a/sub/0.png", "a/.DS_Store", "a/._1.png", "notes.txt"])
    (root / ".git").mkdir()
    source = FolderSource(root, SIZE)
    assert source.class_names == ("a", "b")
    assert contents(source) == [(2, 0), (1, 0), (3, 0), (0, 1)]  # files of a class, then of its subfolders
    assert "4 pictures, 2 class(es)" in source.describe()


def test_train_inside_is_found_and_flat_is_one_class(tmp_path: Path) -> None:
    nested = FolderSource(folder(tmp_path / "x", ["train/a/1.png", "val/a/2.png"]), SIZE)
    assert (len(nested), nested.class_names) == (1, ("a",))
    flat = FolderSource(folder(tmp_path / "cats", ["1.png", "2.png", "3.heic"]), SIZE)
    assert (contents(flat), flat.class_names) == ([(0, 0), (1, 0)], ("cats",))
    assert "1 .heic files skipped" in flat.describe()


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "no picture in this folder"),
        (["a/x.txt"], "no picture in this folder"),
        (["a/x.heic"], "found only 1 .heic"),
        (["a/1.png", "2.png"], "has 1 pictures beside class folders"),
        (["a/1.png", "b/x.txt"], "b: a class folder without a picture"),
    ],
)
def test_layouts_refused_at_once(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(MlxSfError, match=message):
        FolderSource(folder(tmp_path, files), SIZE)


def test_what_data_names(tmp_path: Path) -> None:
    assert open_source(None, 16).endless
    assert isinstance(open_source(str(folder(tmp_path / "f", ["1.png"])), SIZE), FolderSource)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(MlxSfError, match="is a file, want a folder"):
        open_source(str(tmp_path / "x.zip"), SIZE)
    with pytest.raises(MlxSfError, match="no such folder"):
        open_source(str(tmp_path / "gone"), SIZE)
    with pytest.raises(MlxSfError, match="cache: only"):
        open_source(None, SIZE, cache=str(tmp_path))


def test_cache_holds_the_same_and_is_made_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", ["a/1.png", "a/2.png", "b/1.png"])
    (root / "b" / "2.png").write_bytes(b"broken")
    source = open_source(str(root), SIZE, cache=str(tmp_path / "cache"))
    for f in root.rglob("*.png"):
        f.write_bytes(b"")  # only the cache is left to read from
    again = open_source(str(root), SIZE, cache=str(tmp_path / "cache"))
    for s in (source, again):
        assert [s.load(i)[1] for i in range(3)] == [0, 0, 1]
        assert [int(s.load(i)[0][0, 0, 0]) for i in range(3)] == [0, 1, 2]
        with pytest.raises(BadPictureError, match="when the cache was made"):
            s.load(3)
    assert not list((tmp_path / "cache").glob("*partial*"))


# ------------------------------------------------------------------------------------ Hugging Face data sets


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    root = tmp_path_factory.mktemp("hf")
    images = [picture(i) for i in range(6)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "word": datasets.Value("string")}
    )
    rows = {"img": images, "label": [0, 1, 0, 1, 0, 1], "word": ["x", "z", "y", "x", "z", "y"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(root / "disk"))
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(str(root / "dict"))
    (root / "parquet").mkdir()
    data.to_parquet(str(root / "parquet" / "part-0.parquet"))
    return root


@pytest.mark.parametrize("name", ["disk", "dict", "parquet", "parquet/part-0.parquet"])
def test_saved_data_sets(saved: Path, name: str) -> None:
    source = open_source(str(saved / name), SIZE)
    assert source.class_names == ("cat", "dog")
    assert [int(source.load(i)[0][0, 0, 0]) for i in range(6)] == list(range(6))
    assert [source.load(i)[1] for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_named_columns_and_splits(saved: Path) -> None:
    source = open_source(str(saved / "disk"), SIZE, image_column="img", label_column="word")
    assert source.class_names == ("x", "y", "z")
    assert [source.load(i)[1] for i in range(6)] == [0, 2, 1, 0, 2, 1]
    assert len(open_source(str(saved / "dict"), SIZE, split="test")) == 2
    with pytest.raises(MlxSfError, match="no split 'val', it has train, test"):
        open_source(str(saved / "dict"), SIZE, split="val")
    with pytest.raises(MlxSfError, match="no column 'picture', it has img, label, word"):
        open_source(str(saved / "disk"), SIZE, image_column="picture")


def test_streams(saved: Path) -> None:
    assert len(open_source(str(saved / "parquet"), SIZE, streaming=True)) == 6
    with pytest.raises(MlxSfError, match="say it with num_classes"):
        open_source(str(saved / "disk"), SIZE, streaming=True, label_column="word")
    with pytest.raises(MlxSfError, match="set the length of an epoch with epoch_size"):
        open_source(str(saved / "disk"), SIZE, streaming=True)
    source = open_source(str(saved / "disk"), SIZE, streaming=True, epoch_size=6)
    assert source.class_names == ("cat", "dog")
    first = [load() for load in islice(source.epoch(seed=1, epoch=0), 6)]
    assert sorted(int(image[0, 0, 0]) for image, _ in first) == list(range(6))
    assert all(int(image[0, 0, 0]) % 2 == label for image, label in first)
