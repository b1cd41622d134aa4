"""Captions as labels: which picture gets which, what is left out and said, and clear refusals."""

import csv
import io
import json
import tarfile
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_sf.data.decode import BadPictureError
from mlx_sf.data.loader import Loader
from mlx_sf.data.numbered import NumberedSource
from mlx_sf.data.sources import DataOptions, Source, open_source
from mlx_sf.errors import MlxSfError
from mlx_sf.training.options import Options, part

SIZE = (8, 8)
Files = dict[str, Any]  # name -> content: text, bytes, or a number, which is a picture filled with it


def png(value: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(content) if isinstance(content, int) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tar(path: Path, files: Files, mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            content = png(content) if isinstance(content, int) else content
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def captioned(data: Path, **options: Any) -> NumberedSource:
    source = open_source(str(data), SIZE, captions=True, **options)
    assert isinstance(source, NumberedSource)
    assert source.class_names == ()
    return source


def contents(source: NumberedSource) -> list[tuple[int, int | str]]:
    return [(int(image[0, 0, 0]), label) for image, label in map(source.load, range(len(source)))]


# ------------------------------------------------------------------------------------------------------- folders


def test_text_files_beside_pictures_at_any_depth(tmp_path: Path) -> None:
    files = {
        "a.png": 1, "a.txt": "two words \n", "b.png": 2, "b.txt": "\n", "c.png": 3, "c.txt": b"\xff\xfe", "d.png": 4,
        "e.f.png": 5, "e.f.txt": b"\xef\xbb\xbftwo words", "sub/deep/a.png": 6, "sub/deep/a.txt": "in\nlines\r\n",
        "sub/no.png": 7, "stray.txt": "no picture", "skipped.heic": b"",
    }  # fmt: skip
    source = captioned(write(tmp_path, files))
    assert contents(source) == [(1, "two words"), (2, ""), (5, "two words"), (6, "in\nlines")]
    assert source.captions() == ("two words", "", "in\nlines")
    assert source.caption_notes() == [
        "2 pictures without a caption left out (d.png, sub/no.png)",
        "1 caption that is not UTF-8 left out (c.txt)",
        '1 empty caption kept as the prompt ""',
    ]
    assert "4 pictures, 3 different captions, 1 .heic files skipped" in source.describe()
    assert list(source.short_sides(0, 9)) == [8] * 4


def test_notes_name_the_first_and_count_all(tmp_path: Path) -> None:
    source = captioned(write(tmp_path, {"a.txt": "x", **{f"{c}.png": 0 for c in "abcd"}}))
    assert source.caption_notes() == ["3 pictures without a caption left out (b.png, c.png, ...)"]


ROWS = [
    {"file_name": "a.png", "text": "über alles \t", "other": "o1"},
    {"file_name": "./sub/b.png", "text": ["first", "second"], "other": "o2"},
    {"file_name": "c.png", "text": None, "other": "o3"},
    {"file_name": "gone.png", "text": "x", "other": "o4"},
    {"file_name": "../secret.png", "text": "x", "other": "o5"},
    {"file_name": "d.png", "text": "line\u2028separator", "other": "o6"},
]


def test_metadata_as_of_an_imagefolder(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    pictures = {"a.png": 1, "sub/b.png": 2, "c.png": 3, "d.png": 4, "e.png": 5}
    root = write(tmp_path, {"metadata.jsonl": lines, **pictures})
    source = captioned(root)
    assert contents(source) == [(1, "über alles"), (4, "line\u2028separator"), (2, "first")]
    assert source.caption_notes() == [
        "2 pictures without a caption left out (c.png, e.png)",
        "2 captions without a picture left out (gone.png, ../secret.png)",
    ]
    named = open_source(str(root), SIZE, caption_column="other")  # a column is enough to ask for captions
    assert named.captions() == ("o1", "o3", "o6", "o2")


def test_metadata_of_the_nearest_folder_counts(tmp_path: Path) -> None:
    files = {
        "metadata.csv": "file_name,caption\r\ntop.png,top\r\nsub/a.png,far\r\nother/b.png,\"comma, and\nline\"\r\n",
        "sub/metadata.csv": "file_name,caption\r\na.png,near\r\n",
        "top.png": 1, "sub/a.png": 2, "other/b.png": 3, "texts/c.png": 4, "texts/c.txt": "from a text file",
    }  # fmt: skip
    source = captioned(write(tmp_path, files))
    assert contents(source) == [(1, "top"), (3, "comma, and\nline"), (2, "near"), (4, "from a text file")]
    assert source.caption_notes() == []


def test_a_train_folder_is_entered_unless_metadata_lies_beside_it(tmp_path: Path) -> None:
    files = {"train/a.png": 1, "train/a.txt": "one", "val/b.png": 2, "val/b.txt": "two"}
    assert captioned(write(tmp_path / "x", files)).captions() == ("one",)
    files = {"train/a.png": 1, "metadata.csv": "file_name,text\ntrain/a.png,one\n"}
    assert captioned(write(tmp_path / "y", files)).captions() == ("one",)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no picture in this folder or those in it: want files ending in .jpg"),
        ({"a.png": 1, "b.txt": "x"}, r"no captions: looked for NAME.txt beside each of 1 picture.*without a caption"),
        ({"a.png": 1, "a.txt": "x", "metadata.csv": "file_name,text\na.png,x"}, "both in metadata.csv and in .txt"),
        ({"a.png": 1, "metadata.csv": "x", "metadata.jsonl": "{}"}, "both in metadata.jsonl and in metadata.csv"),
        ({"a.png": 1, "metadata.csv": "name,text\na.png,x"}, "line 2: no 'file_name'"),
        ({"a.png": 1, "metadata.csv": "file_name,x,y\na.png,1,2"}, "x, y could all be the captions: name one with"),
        (
            {"a.png": 1, "metadata.jsonl": '{"file_name": "a.png"}'},
            "looked for a column of texts, and it has file_name",
        ),
        ({"a.png": 1, "metadata.jsonl": "{\n"}, "metadata.jsonl line 1: no JSON"),
        ({"a.png": 1, "metadata.jsonl": "\n[1]\n"}, "metadata.jsonl line 2: is list, want an object"),
    ],
)
def test_folders_refused(tmp_path: Path, files: Files, message: str) -> None:
    with pytest.raises(MlxSfError, match=message):
        captioned(write(tmp_path, files))


def test_columns_refused(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.png": 1, "metadata.jsonl": '{"file_name": "a.png", "text": "x", "n": 5}'})
    with pytest.raises(MlxSfError, match="no column 'y', it has file_name, text, n: change caption_column"):
        captioned(root, caption_column="y")
    with pytest.raises(MlxSfError, match="column 'n' holds no texts: name another with caption_column"):
        captioned(root, caption_column="n")


# ---------------------------------------------------------------------------------------------------- WebDataset


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    first = {
        "0001.jpg": 1, "0001.txt": "one\n", "0002.PNG": 2, "0002.json": '{"caption": "two", "text": "no"}',
        "0003.webp": 3, "0003.txt": "", "0004.png": 4, "0005.png": 5, "0005.txt": b"\xff", "0006.txt": "no picture",
    }  # fmt: skip
    second = {
        "../../up/a.jpeg": 6, "../../up/a.txt": "up", "/etc/b.png": 7, "/etc/b.json": '{"text": ["one", "x"]}',
        "dir.x/c.png": 8, "dir.x/c.cls": "7", "dir.x/c.txt": "dotted folder", "._c.png": 9, "._c.txt": "of a Mac",
        "d.png": 10, "d.json": "{", "e.png": 11, "e.json": '{"caption": "\\ud800"}', "f.seg.png": 12, "f.txt": "mask",
    }  # fmt: skip
    root = tmp_path / "set"
    tar(root / "a-0.tar", first)
    tar(root / "a-1.tar", second)
    with tarfile.open(root / "a-1.tar", "a") as archive:
        for name, kind in (("g.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("i", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    source = captioned(root)
    assert contents(source) == [(1, "one"), (2, "two"), (3, ""), (6, "up"), (7, "one"), (8, "dotted folder")]
    assert source.captions() == ("one", "two", "", "up", "dotted folder")
    assert source.name(3) == "a-1.tar: ../../up/a.jpeg"
    assert source.caption_notes() == [
        "2 pictures without a caption left out (a-0.tar: 0004.png, a-1.tar: d.png)",
        "2 captions that are not UTF-8 left out (a-0.tar: 0005.txt, a-1.tar: e.json)",
        '1 empty caption kept as the prompt ""',
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert len(captioned(root / "a-0.tar")) == 3
    backup = tar(write(tmp_path / "f", {"a.png": 1, "a.txt": "a picture beside a tar"}) / "b.tar", first)
    assert captioned(backup.parent).captions() == ("a picture beside a tar",)
    assert captioned(root, caption_column="text").captions() == ("no", "one")
    (root / "a-0.tar").unlink()
    with pytest.raises(BadPictureError, match="cannot be read"):
        source.load(0)


def test_tars_refused(tmp_path: Path) -> None:
    whole = tar(tmp_path / "x.tar", {f"{i}.{kind}": b"0" * 600 for i in range(4) for kind in ("png", "txt")})
    content = bytearray(whole.read_bytes())
    with pytest.raises(MlxSfError, match="is a file, want a folder of pictures"):
        open_source(str(whole), SIZE)  # only captions make sense of it
    for damaged in (content[:4000], b"", b"no tar" * 200, content[:3072] + b"\1" * 512 + content[3584:]):
        whole.write_bytes(damaged)
        with pytest.raises(MlxSfError, match=r"x.tar: cannot be read \(.*want a whole tar file, not compressed"):
            captioned(whole)
    with pytest.raises(MlxSfError, match="want a whole tar file"):
        captioned(tar(tmp_path / "y.tar", {"a.png": 1}, "w:gz"))
    with pytest.raises(MlxSfError, match=r"no picture in 1 tar file\(s\), want KEY.jpg"):
        captioned(tar(tmp_path / "z.tar", {"a.txt": "x"}))
    with pytest.raises(MlxSfError, match="no captions: looked for KEY.txt, or KEY.json with .caption. or .text., for"):
        captioned(tar(tmp_path / "w.tar", {"a.png": 1}))


# any caption: none, text (half surrogate pairs included), or bytes
STORED = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.none() | st.text(max_size=20) | st.binary(max_size=20), max_size=6
)


def expected(stored: Mapping[str, str | bytes | None]) -> dict[str, str]:
    found = {}
    for key, value in stored.items():
        try:
            text = value.decode() if isinstance(value, bytes) else value
            assert text is not None
            found[key] = text.encode().removeprefix(b"\xef\xbb\xbf" * isinstance(value, bytes)).decode().rstrip()
        except (UnicodeError, AssertionError):
            continue
    return found


def same(root: Path, stored: Mapping[str, str | bytes | None]) -> None:
    """The source below `root`, whose picture of key number i is filled with i, has the captions of the rules."""
    want = expected(stored)
    if not want:
        with pytest.raises(MlxSfError, match="no captions: looked for"):
            captioned(root)
        return
    source = captioned(root)
    numbers = {i: key for i, key in enumerate(stored)}
    assert {numbers[value]: label for value, label in contents(source)} == want
    assert set(source.captions()) == set(want.values())
    left_out = sum(int(line.split()[0]) for line in source.caption_notes() if "left out" in line)
    assert left_out == len(stored) - len(want)


@settings(max_examples=40, deadline=None)
@given(STORED.filter(bool))
def test_any_tar(stored: dict[str, str | bytes | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files: Files = {}
        for i, (key, value) in enumerate(stored.items()):
            files[f"{key}.png"] = i
            if isinstance(value, bytes):
                files[f"{key}.txt"] = value
            elif value is not None:
                files[f"{key}.json"] = json.dumps({"caption": value})
        same(tar(Path(folder) / "a.tar", files), stored)


@settings(max_examples=40, deadline=None)
@given(STORED.filter(bool))
def test_any_metadata(stored: dict[str, str | bytes | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = {k: v if isinstance(v, str) else None for k, v in stored.items()}
        rows = [json.dumps({"file_name": f"{key}.png", "text": value}) for key, value in stored.items()]
        files: Files = {f"{key}.png": i for i, key in enumerate(stored)}
        same(write(Path(folder), {"metadata.jsonl": "\n".join(rows), **files}), stored)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=4))
def test_any_csv(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("file_name", "text"), *((f"{i}.png", t) for i, t in enumerate(texts))])
        files: Files = {f"{i}.png": i for i in range(len(texts))}
        source = captioned(write(Path(folder), {"metadata.csv": table.getvalue(), **files}))
        assert contents(source) == [(i, t.rstrip()) for i, t in enumerate(texts)]


def test_a_broken_caption_in_metadata_costs_one_picture(tmp_path: Path) -> None:
    table = b'{"file_name": "a.png", "text": "\xff"}\n{"file_name": "b.png", "text": "\xc3\xbc"}\n'
    source = captioned(write(tmp_path, {"a.png": 1, "b.png": 2, "metadata.jsonl": table}))
    assert contents(source) == [(2, "ü")]
    assert source.caption_notes() == ["1 caption that is not UTF-8 left out (a.png)"]


# ------------------------------------------------------------------------------------ Hugging Face data sets

TEXTS = ["one ", None, "", "one", "four"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    root = tmp_path_factory.mktemp("hf")
    text, image = datasets.Value("string"), datasets.Image()
    features = {"img": image, "caption": text, "many": datasets.Sequence(text), "label": datasets.Value("int64")}
    many = [["a", "b"], [], None, ["c"], ["a"]]
    rows = {"img": [Image.open(io.BytesIO(png(i))) for i in range(5)], "caption": TEXTS, "many": many, "label": [0] * 5}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data.save_to_disk(str(root / "disk"))
    (root / "parquet").mkdir()
    data.to_parquet(str(root / "parquet" / "part-0.parquet"))
    data.remove_columns(["caption", "many"]).save_to_disk(str(root / "without"))
    data.select([1]).save_to_disk(str(root / "none"))
    return root


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a text that is not UTF-8."""
    import datasets
    import pyarrow as pa

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    texts = pa.array([b"good", b"\xff\xfe", "ü".encode()], pa.binary())
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    columns = [pa.array(images, features.arrow_schema.field("image").type), texts.view(pa.string())]
    table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
    path = tmp_path_factory.mktemp("hf")
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["disk", "parquet"])
def test_saved_data_sets(saved: Path, name: str) -> None:
    source = captioned(saved / name)
    assert contents(source) == [(0, "one"), (2, ""), (3, "one"), (4, "four")]
    assert source.captions() == ("one", "", "four")
    assert source.caption_notes() == [
        "1 picture without a caption left out (row 1)",
        '1 empty caption kept as the prompt ""',
    ]
    assert source.name(3).endswith("row 4")
    assert contents(captioned(saved / name, caption_column="many")) == [(0, "a"), (3, "c"), (4, "a")]


def test_saved_data_sets_refused(saved: Path) -> None:
    with pytest.raises(MlxSfError, match="no column 'x', it has img, caption, many, label: change caption_column"):
        captioned(saved / "disk", caption_column="x")
    with pytest.raises(MlxSfError, match="column 'label' holds no texts: name another with caption_column"):
        captioned(saved / "disk", caption_column="label")
    with pytest.raises(MlxSfError, match="no captions: looked for a column of texts, and it has img, label"):
        captioned(saved / "without")
    with pytest.raises(MlxSfError, match=r"no captions: looked for texts in column 'caption' of 1 row"):
        captioned(saved / "none")
    stream = open_source(str(saved / "none"), SIZE, captions=True, streaming=True, epoch_size=1)
    with pytest.raises(MlxSfError, match="the stream holds no row with a caption in column 'caption'"):
        next(stream.epoch(0, 0))


def test_streams(saved: Path, broken: Path) -> None:
    def labels(source: Source, count: int) -> list[tuple[int, int | str]]:
        pictures = [load() for load in islice(source.epoch(seed=1, epoch=0), count)]
        return sorted((int(image[0, 0, 0]), label) for image, label in pictures)

    source = open_source(str(saved / "disk"), SIZE, captions=True, streaming=True, epoch_size=3)
    assert (source.class_names, source.captions(), source.caption_notes()) == ((), (), [])
    assert labels(source, 4) == [(0, "one"), (2, ""), (3, "one"), (4, "four")]
    assert "captions in column caption" in source.describe()
    many = open_source(str(saved / "disk"), SIZE, caption_column="many", streaming=True, epoch_size=3)
    assert labels(many, 3) == [(0, "a"), (3, "c"), (4, "a")]
    assert many.fingerprint() != source.fingerprint()
    torn = open_source(str(broken), SIZE, captions=True, streaming=True, epoch_size=2)
    assert labels(torn, 4) == [(0, "good"), (0, "good"), (2, "ü"), (2, "ü")]  # two rounds
    (note,) = torn.caption_notes()
    assert note.startswith(("1 caption that is not UTF-8", "2 captions that are not UTF-8"))


def test_a_broken_text_costs_one_picture(broken: Path) -> None:
    source = captioned(broken)
    assert contents(source) == [(0, "good"), (2, "ü")]
    assert source.caption_notes() == ["1 caption that is not UTF-8 left out (row 1)"]


# -------------------------------------------------------------------------------------------- around the sources


def test_cache_keeps_captions(tmp_path: Path) -> None:
    root = write(tmp_path / "f", {"a.png": 1, "a.txt": "x", "b.png": b"broken", "b.txt": "y", "c.png": 3, "c.txt": "x"})
    for _ in range(2):
        source = captioned(root, cache=str(tmp_path / "cache"))
        assert (source.captions(), source.caption_notes()) == (("x", "y"), [])
        assert [source.load(i)[1] for i in (0, 2)] == ["x", "x"]
        assert [int(source.load(i)[0][0, 0, 0]) for i in (0, 2)] == [1, 3]
        with pytest.raises(BadPictureError, match="when the cache was made"):
            source.load(1)
    (root / "a.txt").write_text("new")
    assert captioned(root, cache=str(tmp_path / "cache")).load(0)[1] == "new"  # not from the old cache
    labels = [np.load(p) for p in (tmp_path / "cache").glob("*.labels.npy")]
    assert len(labels) == 2
    assert all(a.dtype == np.int32 for a in labels)  # as of classes


def test_fingerprint_covers_captions_and_pictures(tmp_path: Path) -> None:
    def fingerprint(files: Files, tarred: bool) -> str:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return captioned(tar(path / "a.tar", files) if tarred else write(path, files)).fingerprint()

    base: Files = {"a.png": 1, "a.txt": "x", "b.png": 2, "b.txt": "y"}
    changes: list[Files] = [{"a.txt": "y", "b.txt": "x"}, {"b.txt": "x"}, {"b.txt": b"\xff"}]
    for tarred in (False, True):
        prints = [fingerprint({**base, **change}, tarred) for change in changes]
        assert len({fingerprint(base, tarred), fingerprint(base, tarred), *prints}) == 4


def test_pictures_whose_caption_says_a_side_are_not_mirrored(tmp_path: Path) -> None:
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[:, :4] = 255
    captions = ["a cat", "bright", "a cat Left of a dog", "the rightmost"]
    for i, text in enumerate(captions):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    batches = Loader(captioned(tmp_path), 4).batches()
    twelve = list(islice(batches, 12))
    seen = [(label, image[0, 0, 0] == 0) for b in twelve for image, label in zip(b.images, b.labels, strict=True)]
    batches.close()
    assert {label for label, flipped in seen if flipped} == set(captions[:2])
    assert {label for label, _ in seen} == set(captions)


def test_classes_are_as_they_were(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, {"a/1.png": 1, "a/1.txt": "x"})), SIZE)
    assert (source.class_names, source.captions(), source.caption_notes()) == (("a",), (), [])
    assert source.mirrors(0)


def test_what_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MlxSfError, match=r"data: the built-in scenes have classes and no captions, want 'captioned-sc"):
        open_source(None, SIZE, captions=True)
    with pytest.raises(MlxSfError, match="no such folder"):
        captioned(tmp_path / "gone")
    text = Options(data=str(write(tmp_path, {"a.png": 1, "a.txt": "x"})), caption_column="text")
    assert part(DataOptions, text).open(SIZE).captions() == ("x",)
