"""Batches: the same at any starting step, for any number of workers and processes; bad pictures replaced and named."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_sf.data.decode import BadPictureError
from mlx_sf.data.loader import Batch, Loader
from mlx_sf.data.numbered import NumberedSource, epoch_flips, epoch_order
from mlx_sf.data.sources import FolderSource, SceneSource, open_source
from mlx_sf.errors import MlxSfError


class Numbers(NumberedSource):
    """Picture i is filled with i, its left column with 255; those in `broken` cannot be read."""

    size, class_names = (4, 4), ("a",)

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.n, self.broken = n, broken

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> tuple[np.ndarray, int]:
        if index in self.broken:
            raise BadPictureError("broken on purpose")
        image = np.full((4, 4, 3), index, np.uint8)
        image[:, 0] = 255
        return image, 0

    def name(self, index: int) -> str:
        return f"picture {index}"

    def describe(self) -> str:
        return "numbers"


def take(loader: Loader, n: int, start: int = 0) -> list[Batch]:
    batches = loader.batches(start)
    try:
        return list(islice(batches, n))
    finally:
        batches.close()


def seen(batches: list[Batch]) -> list[int]:
    return [int(i) for b in batches for i in b.images[:, 0, 1, 0]]


def test_an_epoch_sees_every_picture_once_and_drops_the_rest() -> None:
    loader = Loader(Numbers(10), 3, seed=5)
    assert loader.steps_per_epoch == 3
    first, second = seen(take(loader, 3)), seen(take(loader, 3, start=3))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    assert [b.epoch for b in take(loader, 7)] == [0, 0, 0, 1, 1, 1, 2]


@given(st.integers(1, 50), st.integers(1, 120), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_orders_go_through_the_pictures_evenly(length: int, count: int, seed: int, epoch: int) -> None:
    counts = np.bincount(list(islice(epoch_order(length, seed, epoch), count)), minlength=length)
    assert counts.max() - counts.min() <= 1
    assert (len(counts), counts.sum()) == (length, count)
    assert len(epoch_flips(length, count, seed, epoch)) == count


@pytest.mark.parametrize(
    "length, seed, epoch, order, flips",
    [
        (7, 3, 5, [4, 0, 2, 6, 5, 1, 3, 5, 2, 0, 4, 1, 6, 3, 1, 2], [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0]),
        (9, 0, 2, [8, 2, 1, 0, 5, 6, 7, 4], [1, 1, 1, 1, 0, 0, 0, 1]),
    ],
)
def test_orders_and_flips_are_those_of_version_0_2(
    length: int, seed: int, epoch: int, order: list[int], flips: list[int]
) -> None:
    assert list(islice(epoch_order(length, seed, epoch), len(order))) == order
    assert epoch_flips(length, len(order), seed, epoch).astype(int).tolist() == flips


@pytest.mark.parametrize("start", [1, 3, 4, 11])
def test_resumed_at_any_step_the_batches_are_the_same(start: int) -> None:
    whole = take(Loader(Numbers(10), 3, seed=1), 14)
    rest = take(Loader(Numbers(10), 3, seed=1, workers=1), 14 - start, start)
    for a, b in zip(whole[start:], rest, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert np.array_equal(a.images, b.images)
        assert a.labels == b.labels


def test_flips_are_random_per_picture_and_epoch_and_can_be_off() -> None:
    flipped = [bool(i[0, 3, 0] == 255) for b in take(Loader(Numbers(40), 40), 4) for i in b.images]
    assert 50 < sum(flipped) < 110
    assert flipped[:40] != flipped[40:80]
    assert all((b.images[:, :, 0] == 255).all() for b in take(Loader(Numbers(40), 40, flip=False), 4))


def test_processes_share_the_global_batch() -> None:
    whole = take(Loader(Numbers(20), 6, seed=2), 4)
    parts = [take(Loader(Numbers(20), 6, seed=2, rank=r, world=3), 4) for r in range(3)]
    for i, batch in enumerate(whole):
        assert np.array_equal(batch.images, np.concatenate([p[i].images for p in parts]))
    with pytest.raises(MlxSfError, match="a multiple of the 4 process"):
        Loader(Numbers(20), 6, world=4)


def test_fewer_pictures_than_a_batch_fill_it_in_rounds() -> None:
    loader = Loader(Numbers(5), 8)
    assert loader.steps_per_epoch == 1
    counts = np.bincount(seen(take(loader, 1)), minlength=5)
    assert counts.sum() == 8
    assert counts.min() >= 1


def test_bad_pictures_are_replaced_and_named() -> None:
    loader = Loader(Numbers(9, broken=(2, 3)), 9)
    assert set(seen(take(loader, 1))) == {0, 1, 4, 5, 6, 7, 8}
    assert loader.bad == {"picture 2": "broken on purpose", "picture 3": "broken on purpose"}
    with pytest.raises(MlxSfError, match=r"picture \d: broken on purpose; nor can any"):
        take(Loader(Numbers(3, broken=(0, 1, 2)), 3), 1)


def test_scenes_are_new_in_every_epoch() -> None:
    loader = Loader(SceneSource((8, 8), length=10), 10)
    a, b = take(loader, 2)
    assert sorted(a.labels) == sorted(b.labels) == list(range(10))
    assert not any(np.array_equal(x, y) for x in a.images for y in b.images)


def test_scenes_of_any_shape() -> None:
    wide, square = SceneSource((8, 16)), SceneSource((16, 16))
    assert np.array_equal(wide.load(3)[0], square.load(3)[0][4:12])
    assert take(Loader(wide, 2), 1)[0].images.shape == (2, 8, 16, 3)


def test_a_folder_end_to_end(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), i, np.uint8)).save(tmp_path / f"c{i % 2}" / f"{i}.png")
    (batch,) = take(Loader(FolderSource(tmp_path, (8, 8)), 4), 1)
    assert all(image[0, 0, 0] % 2 == label for image, label in zip(batch.images, batch.labels, strict=True))


def test_streams_resume_too(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [Image.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(10)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    data.save_to_disk(str(tmp_path / "a"))

    def loader() -> Loader:
        source = open_source(str(tmp_path / "a"), 4, streaming=True, epoch_size=10)
        return Loader(source, 3, seed=1)

    whole, rest = take(loader(), 6), take(loader(), 4, start=2)
    assert [b.step for b in whole] == list(range(6))
    assert all(np.array_equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))
    assert len(set(seen(whole[:3]))) == 9


def test_a_stream_takes_the_batchs_next_for_a_bad_picture(tmp_path: Path) -> None:
    import datasets

    png = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(png, "PNG")
    rows = {"image": [{"bytes": png.getvalue(), "path": None}] + 2 * [{"bytes": b"broken", "path": None}]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    data = data.cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "a"))
    loader = Loader(open_source(str(tmp_path / "a"), 4, streaming=True, epoch_size=3), 3)
    assert seen(take(loader, 1)) == [7, 7, 7]
    assert set(loader.bad.values()) == {"not a picture that can be read"}
    assert all("(stream), picture" in name for name in loader.bad)
    data.select([1, 2]).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(MlxSfError, match="none of 2 pictures in a batch could be read"):
        take(Loader(open_source(str(tmp_path / "b"), 4, streaming=True, epoch_size=2), 2), 1)
