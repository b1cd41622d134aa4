"""Hugging Face data sets as sources of training pictures: with random access, or read as a stream."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.text import first_line
from ..errors import MlxSfError, option
from .captions import CaptionedSource, CaptionNotes, find_caption_column
from .decode import BadPictureError, Decode, load_picture, short_side
from .numbered import NumberedSource, Picture, mirrors, square_or

_TEXTS_AT_ONCE = 10_000  # rows of a column of texts in memory at a time


class DatasetSource(NumberedSource):
    """A Hugging Face data set: a hub name, or a local folder or file (save_to_disk, parquet, arrow).

    The image column is the one of image type, or the one named; the label column is the named one, or "label",
    "labels", "class", "fine_label", or the only one of class type; without any, all pictures are one class.
    Columns that are not named are "".
    """

    def __init__(
        self,
        path: str,
        size: tuple[int, int],
        decode: Decode = "upright",
        split: str = "train",
        image_column: str = "",
        label_column: str = "",
    ) -> None:
        import datasets

        super().__init__()
        self.path, self.size, self._decode = path, size, decode
        data = _open_dataset(path, split, streaming=False)
        self._image = _find_image(path, data.features, image_column)
        self._label = _find_label(path, data.features, label_column)
        if not len(data):
            raise MlxSfError(f"{path}: the data set's split {split!r} is empty")
        self.class_names, labels = _dataset_labels(path, data, self._label)
        self._labels = labels if labels is not None else np.zeros(len(data), np.int64)
        self._data = data.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> Picture:
        return _decode_item(self._data[index][self._image], self.size, self._decode), int(self._labels[index])

    def short_side(self, index: int) -> int | None:
        """The stored picture's own shorter side in pixels; None where it cannot be read."""
        return _side_of_item(self._data[index][self._image])

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def describe(self) -> str:
        columns = ", ".join(c for c in (self._image, self._label) if c)
        return f"{self.path}: {len(self)} pictures, {len(self.class_names)} class(es), column(s) {columns}"


class CaptionedDatasetSource(CaptionedSource):
    """A Hugging Face data set, as `DatasetSource`, whose labels are the captions in a column of texts.

    The column is the one named, else one of `captions.USUAL_COLUMNS`, else the only one of texts.
    """

    def __init__(
        self,
        path: str,
        size: tuple[int, int],
        decode: Decode = "upright",
        split: str = "train",
        image_column: str = "",
        column: str = "",
    ) -> None:
        import datasets

        self.path = path
        data = _open_dataset(path, split, streaming=False)
        self._image = _find_image(path, data.features, image_column)
        column = _find_caption(path, data.features, column)
        notes, captions, self._rows = CaptionNotes(), list[str](), list[int]()
        for row, stored in enumerate(_texts(data, column)):
            caption = notes.read(stored, f"row {row}")
            if caption is not None:
                captions.append(caption)
                self._rows.append(row)
        super().__init__(path, size, decode, captions, notes, f"texts in column {column!r} of {len(data)} row(s)")
        self._data = data.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def stored(self, index: int) -> bytes | str:
        return _stored(self._data[self._rows[index]][self._image])

    def name(self, index: int) -> str:
        return f"{self.path} row {self._rows[index]}"

    def listing(self) -> str:
        return repr(self._rows) + super().listing()


def _with_bytes(data: Any, column: str) -> Any:
    """A stream whose column of texts, or of lists of them, is read as bytes: one broken text would end the stream."""
    import datasets

    bytes_, kind = datasets.Value("large_binary"), data.features[column]
    return data.cast_column(column, bytes_ if isinstance(kind, datasets.Value) else datasets.Sequence(bytes_))


def _texts(data: Any, column: str) -> Iterator[Any]:
    """A column of texts, or of lists of them, in bytes: as text, one broken value would cost all."""
    import pyarrow as pa  # type: ignore[import-untyped]

    def as_bytes(kind: Any) -> Any:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return pa.list_(as_bytes(kind.value_type))
        return pa.large_binary()

    for table in data.select_columns([column]).with_format("arrow").iter(_TEXTS_AT_ONCE):
        yield from table[column].cast(as_bytes(table[column].type)).to_pylist()


def _stored(item: Any) -> bytes | str:
    """The content of a row's picture, or its path."""
    if not isinstance(item, dict) or not (item.get("bytes") or item.get("path")):
        raise BadPictureError("the row holds no picture")
    return item.get("bytes") or item["path"]


def _decode_item(item: Any, size: tuple[int, int], decode: Decode) -> np.ndarray:
    return load_picture(_stored(item), size, decode)


def _side_of_item(item: Any) -> int | None:
    try:
        return short_side(_stored(item))
    except BadPictureError:
        return None


def _open_dataset(path: str, split: str, streaming: bool) -> Any:
    """A `datasets.Dataset` (or its streaming kind); every failure is one line."""
    import datasets

    local = Path(path)
    try:
        if local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise MlxSfError(
                        f"{path}: no split {split!r}, it has {', '.join(data)}: choose with {option('split')}"
                    )
                data = data[split]
            return data.to_iterable_dataset() if streaming else data
        if local.exists():
            files = [path] if local.is_file() else sorted(str(p) for p in local.rglob("*.parquet"))
            kind = "arrow" if path.endswith(".arrow") else "parquet"
            return datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=streaming)
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its retries without a network are not for our user: one line says it all
        return datasets.load_dataset(path, split=split, streaming=streaming)
    except MlxSfError:
        raise
    except Exception as e:  # the library's errors have no common base
        reason = first_line(e)[:200]
        raise MlxSfError(
            f"{path}: neither a folder or file here nor a data set on the Hub that can be opened ({reason})"
        ) from None


def _columns(path: str, features: Any, asked: str, name: str) -> dict[str, Any]:
    """Names and types of the columns; refuses one that is asked for (by option `name`) and is not there."""
    columns = dict(features or {})
    if asked and asked not in columns:
        raise MlxSfError(f"{path}: no column {asked!r}, it has {', '.join(columns)}: change {option(name)}")
    return columns


def _find_image(path: str, features: Any, asked: str) -> str:
    """Name of the column of images: the one asked for, else the first of image type."""
    import datasets

    columns = _columns(path, features, asked, "image_column")
    found = asked or next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)), "")
    if not found:
        raise MlxSfError(
            f"{path}: no column of images among {', '.join(columns)}: name it with {option('image_column')}"
        )
    return found


def _find_label(path: str, features: Any, asked: str) -> str:
    """Name of the column of labels: the one asked for, else found by name or by type; "" if there is none."""
    import datasets

    columns = _columns(path, features, asked, "label_column")
    usual = [n for n in ("label", "labels", "class", "fine_label") if n in columns]
    typed = [n for n, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    if not (asked or usual) and len(typed) > 1:
        both = ", ".join(typed)
        raise MlxSfError(f"{path}: {both} could all be the label: name one with {option('label_column')}")
    return asked or (usual + typed + [""])[0]


def _find_caption(path: str, features: Any, asked: str) -> str:
    """Name of the column of captions."""
    columns = dict(features or {})
    # names that start with two underscores are not the data's own: WebDataset's __key__ and __url__
    texts = [name for name, kind in columns.items() if _holds_text(kind) and not name.startswith("__")]
    return find_caption_column(path, columns, texts, asked)


def _holds_text(kind: Any) -> bool:
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _dataset_labels(path: str, data: Any, column: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names, and one label per row (None: all 0). Strings become classes in sorted order."""
    import datasets

    if not column:
        return (Path(path).name,), None
    kind, values = data.features[column], list(data[column])
    if isinstance(kind, datasets.ClassLabel):
        names = tuple(kind.names)
    elif values and all(isinstance(v, str) for v in values):
        names = tuple(sorted(set(values)))
        return names, np.searchsorted(np.array(names), np.array(values))
    elif values and all(isinstance(v, int) for v in values):
        names = tuple(str(i) for i in range(max(values) + 1))
    else:
        raise MlxSfError(
            f"{path}: column {column!r} holds neither class numbers nor names: name another with "
            f"{option('label_column')}"
        )
    labels = np.array(values, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        at = int(np.argmax((labels < 0) | (labels >= len(names))))
        raise MlxSfError(f"{path} row {at}: label {labels[at]}, want 0 to {len(names) - 1} (-1 often marks a test set)")
    return names, labels


class StreamSource:
    """A Hugging Face data set read as a stream, for what does not fit on the disk.

    `length` pictures make an epoch. The order is that of a shuffle buffer seeded by (seed, epoch); a resumed run
    reads and discards what it had seen of its epoch. `num_classes` is for streams whose label column does not say.

    With `captions`, or a `caption_column`, labels are captions. Rows without one are passed over and counted each time
    they are met: `caption_notes` speaks of what was read so far.
    """

    endless = False
    cacheable = False
    _BUFFER = 1000

    def __init__(
        self,
        path: str,
        size: tuple[int, int],
        length: int = 0,
        decode: Decode = "upright",
        split: str = "train",
        image_column: str = "",
        label_column: str = "",
        num_classes: int = 0,
        captions: bool = False,
        caption_column: str = "",
    ) -> None:
        import datasets

        self.path, self.size, self._decode, self.bad = path, size, decode, dict[str, str]()
        data = _open_dataset(path, split, streaming=True)
        self._image, self._label, self._caption = _find_image(path, data.features, image_column), "", ""
        self._notes = CaptionNotes()
        if captions or caption_column:
            self._caption = _find_caption(path, data.features, caption_column)
        else:
            self._label = _find_label(path, data.features, label_column)
        kind = data.features[self._label] if self._label else None
        self.class_names: tuple[str, ...]
        if self._caption:
            self.class_names = ()
        elif isinstance(kind, datasets.ClassLabel):
            self.class_names = tuple(kind.names)
        elif not self._label:
            self.class_names = (Path(path).name,)
        elif num_classes:
            self.class_names = tuple(str(i) for i in range(num_classes))
        else:
            raise MlxSfError(
                f"{path}: how many classes column {self._label!r} has cannot be seen: say it with "
                f"{option('num_classes')}"
            )
        known = getattr((data.info.splits or {}).get(split), "num_examples", None)
        if not (length or known):
            raise MlxSfError(
                f"{path}: how many pictures the stream has is not known: set the length of an epoch with "
                f"{option('epoch_size')}"
            )
        self._length = int(length or known or 0)
        if self._caption:
            data = _with_bytes(data.select_columns([self._image, self._caption]), self._caption)
        self._data = data.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return self._length

    def epoch(self, seed: int, epoch: int) -> Iterator[Callable[[], Picture]]:
        """The pictures of an epoch in its order, not yet decoded; again from the start should the stream end early."""
        for number, (row, caption) in enumerate(self._rows(seed, epoch, self._notes)):
            yield partial(self._decode_row, row, caption, f"{self.path} (stream), picture {number} of epoch {epoch}")

    def _rows(self, seed: int, epoch: int, notes: CaptionNotes) -> Iterator[tuple[Any, str | None]]:
        """Rows with their captions, if there are any; rows that should have one and do not are left out."""
        data = self._data.shuffle(seed=seed, buffer_size=self._BUFFER)
        data.set_epoch(epoch)
        while True:
            empty = True
            for number, row in enumerate(data):
                caption = notes.read(row[self._caption], f"row {number} of epoch {epoch}") if self._caption else None
                if self._caption and caption is None:
                    continue
                empty = False
                yield row, caption
            if empty:
                want = f" with a caption in column {self._caption!r}" if self._caption else ""
                raise MlxSfError(f"{self.path}: the stream holds no row{want}")

    def _decode_row(self, row: Any, caption: str | None, name: str) -> Picture:
        try:
            label = int(row[self._label]) if self._label else 0
            if caption is None and not 0 <= label < len(self.class_names):
                raise BadPictureError(f"label {label}, want 0 to {len(self.class_names) - 1}")
            picture = _decode_item(row[self._image], self.size, self._decode)
            return picture, label if caption is None else caption
        except BadPictureError as e:
            self.bad[name] = str(e)
            raise

    def mirrors(self, label: int | str) -> bool:
        """As of the other sources: not where a caption says left or right."""
        return mirrors(label)

    def captions(self) -> tuple[str, ...]:
        """(): a stream's captions are not known before they are read."""
        return ()

    def caption_notes(self) -> list[str]:
        """Lines for the user: what was left out so far."""
        return self._notes.lines()

    def fingerprint(self) -> str:
        """Identity as far as a resumed run can check it: class names or the column of captions, size and length."""
        labels = self._caption or self.class_names
        identity = repr((labels, square_or(self.size), len(self)))
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def short_sides(self, seed: int, count: int) -> Iterator[int]:
        """The shorter sides in pixels of the first `count` pictures that can be read."""
        sides = (_side_of_item(row[self._image]) for row, _ in self._rows(seed, 0, CaptionNotes()))
        return itertools.islice((s for s in sides if s is not None), count)

    def describe(self) -> str:
        labels = f"captions in column {self._caption}" if self._caption else f"{len(self.class_names)} class(es)"
        return f"{self.path}: stream, {self._length} pictures an epoch, {labels}"
