"""Captions as labels of pictures: how they are read, what is left out, and folders of captioned pictures.

The rules are the same for every kind of source:

- A caption loses its trailing white space. Of a list of captions the first counts.
- An empty caption stays, as the prompt "", and is counted.
- A picture whose caption is missing (no file, no row, null, no text) or is not UTF-8 is left out, counted and named.
- A source without any caption is refused, with what was looked for.

`caption_notes()` of a source says what was counted. How long a caption may be is the text encoder's business.

A folder of captioned pictures holds NAME.txt beside NAME.png, or a file metadata.jsonl or metadata.csv with a row for
each picture: `file_name`, its path from that file on, and `text`, as Hugging Face's imagefolder has it. The last row of
a file name counts. The folders in it may be of any depth; each has its captions from the files beside its pictures,
else from the nearest metadata in it or above it.
"""

import csv
import io
import json
import posixpath
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MlxSfError, option
from .decode import BadPictureError, Decode, load_picture, short_side
from .numbered import NumberedSource, Picture
from .picture_files import found_only, list_pictures, skipped_note

USUAL_COLUMNS = ("text", "caption", "captions", "prompt", "txt")  # in this order, where none is named
_METADATA = ("metadata.jsonl", "metadata.csv")
_NAMED = 2  # names in a note


class CaptionNotes:
    """Reads captions by the rules of this room and counts what it leaves out."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def read(self, stored: Any, picture: str, file: str = "") -> str | None:
        """The caption of a picture; None where the picture is to be left out.

        Args:
            stored: what was found: text, its bytes, a list of either, or None.
            picture: what a note calls the picture. file: what it calls the caption, where that has a name of its own.
        """
        if isinstance(stored, list | tuple):
            stored = stored[0] if stored else None
        if not isinstance(stored, str | bytes):
            self._left_out("missing", picture)
            return None
        try:
            text = stored.decode("utf-8-sig") if isinstance(stored, bytes) else stored
            text.encode()  # JSON can spell what no UTF-8 text holds: half a surrogate pair
        except UnicodeError:
            self._left_out("not UTF-8", file or picture)
            return None
        text = text.rstrip()
        self._counts["empty"] += not text
        return text

    def unused(self, rows: Iterable[str]) -> None:
        """Count rows of a table whose picture is not there."""
        for name in rows:
            self._left_out("unused", name)

    def lines(self) -> list[str]:
        """One line for each kind of thing that was counted, for the user."""
        kinds = {
            "missing": ("picture without a caption left out", "pictures without a caption left out"),
            "not UTF-8": ("caption that is not UTF-8 left out", "captions that are not UTF-8 left out"),
            "empty": ('empty caption kept as the prompt ""', 'empty captions kept as the prompt ""'),
            "unused": ("caption without a picture left out", "captions without a picture left out"),
        }
        return [f"{n} {kinds[k][n > 1]}{self._listed(k)}" for k in kinds if (n := self._counts[k])]

    def _left_out(self, kind: str, name: str) -> None:
        self._counts[kind] += 1
        names = self._names.setdefault(kind, [])
        if len(names) < _NAMED:
            names.append(name.encode(errors="replace").decode())  # a file's name may be no text

    def _listed(self, kind: str) -> str:
        names = self._names.get(kind, [])
        more = ", ..." if self._counts[kind] > len(names) else ""
        return f" ({', '.join(names)}{more})" if names else ""


class CaptionedSource(NumberedSource):
    """Pictures with random access whose labels are captions; `class_names` is ().

    Args:
        where: what messages call the source. captions: one of each picture, in the order of their numbers.
        notes: what was left out. looked_for: what the error says if there is no caption.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        where: str,
        size: tuple[int, int],
        decode: Decode,
        captions: Sequence[str],
        notes: CaptionNotes,
        looked_for: str,
    ) -> None:
        super().__init__()
        if not captions:
            raise MlxSfError(f"{where}: no captions: " + "; ".join([f"looked for {looked_for}", *notes.lines()]))
        self.where, self.size, self._decode, self._notes = where, size, decode, notes
        numbers: dict[str, int] = {}
        self._numbers = np.array([numbers.setdefault(c, len(numbers)) for c in captions], np.int32)
        self._captions = tuple(numbers)

    @abstractmethod
    def stored(self, index: int) -> Path | str | bytes:
        """The picture's file, or the file's content. Raises `BadPictureError`."""

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, index: int) -> Picture:
        return load_picture(self.stored(index), self.size, self._decode), self._captions[self._numbers[index]]

    def short_side(self, index: int) -> int | None:
        try:
            return short_side(self.stored(index))
        except BadPictureError:
            return None

    def captions(self) -> tuple[str, ...]:
        return self._captions

    def caption_notes(self) -> list[str]:
        return self._notes.lines()

    def listing(self) -> str:
        return "\0".join(self._captions) + self._numbers.astype("<i4").tobytes().hex()

    def describe(self) -> str:
        return f"{self.where}: {len(self)} pictures, {len(self._captions)} different captions"


class CaptionedFolderSource(CaptionedSource):
    """A folder of pictures with captions in text files or a metadata file, as the module says.

    `column` names the metadata's column of captions; "" finds it: `USUAL_COLUMNS`, or the only other one of texts. A
    `train` folder inside is entered, unless metadata lies beside it. Raises `MlxSfError` if there is no picture or no
    caption, and for a folder with two kinds of captions.
    """

    def __init__(self, root: str | Path, size: tuple[int, int], decode: Decode = "upright", column: str = "") -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise MlxSfError(f"{root}: no such folder, want one with captioned pictures")
        if (self.root / "train").is_dir() and not _metadata_files(self.root):
            self.root = self.root / "train"
        skipped: Counter[str] = Counter()
        pictures = list_pictures(self.root, skipped)
        if not pictures:
            raise MlxSfError(f"{self.root}: no picture in this folder or those in it{found_only(skipped)}")
        notes = CaptionNotes()
        self._skipped, self._files, captions = dict(skipped), list[Path](), list[str]()
        for picture, stored, file in _folder_captions(self.root, pictures, column, notes):
            caption = notes.read(stored, self._within(picture), self._within(file) if file else "")
            if caption is not None:
                self._files.append(picture)
                captions.append(caption)
        looked_for = (
            f"NAME.txt beside each of {len(pictures)} picture(s), "
            f"and for metadata.jsonl or metadata.csv with the columns file_name and {column or 'text'}"
        )
        super().__init__(str(self.root), size, decode, captions, notes, looked_for)

    def stored(self, index: int) -> Path:
        return self._files[index]

    def name(self, index: int) -> str:
        return str(self._files[index])

    def listing(self) -> str:
        return "".join(f"{self._within(f)}\0" for f in self._files) + super().listing()

    def describe(self) -> str:
        return super().describe() + skipped_note(self._skipped)

    def _within(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def _folder_captions(
    root: Path, pictures: Sequence[Path], column: str, notes: CaptionNotes
) -> Iterator[tuple[Path, Any, Path | None]]:
    """Each picture with what is stored as its caption, and the text file that this is from, if it is one."""
    present = {p for p in pictures if p.with_suffix(".txt").is_file()}
    beside, known = {p.parent for p in present}, set(pictures)
    tables: dict[Path, Mapping[str, Any]] = {}
    for folder in sorted({f for p in {p.parent for p in pictures} for f in (p, *p.parents) if f.is_relative_to(root)}):
        files = _metadata_files(folder)
        kinds = [f.name for f in files] + [".txt files"] * (folder in beside)
        if len(kinds) > 1:
            raise MlxSfError(f"{folder}: has captions both in {kinds[0]} and in {kinds[1]}: remove one of them")
        if files:
            tables[folder] = _read_table(files[0], column)
            notes.unused(name for name in tables[folder] if folder / name not in known)
    for picture in pictures:
        text = picture.with_suffix(".txt")
        if picture.parent in beside:
            yield picture, _read(text) if picture in present else None, text
        else:
            above = next((f for f in picture.parents if f in tables), root)
            yield picture, tables.get(above, {}).get(picture.relative_to(above).as_posix()), None


def _metadata_files(folder: Path) -> list[Path]:
    return [folder / name for name in _METADATA if (folder / name).is_file()]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise MlxSfError(f"{file}: cannot be read ({e.strerror})") from None


def _read_table(file: Path, column: str) -> dict[str, Any]:
    """What a metadata file stores as the caption of each file name."""
    # what is not UTF-8 stays recognisable, so that one broken caption costs one picture and not all
    text = _read(file).removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    rows = list(_csv_rows(file, text) if file.suffix == ".csv" else _json_rows(file, text))
    for line, row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise MlxSfError(f"{file} line {line}: no 'file_name', want the path of a picture under that name")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    texts = [n for n in names if n != "file_name" and any(_is_text(row.get(n)) for _, row in rows)]
    found = find_caption_column(str(file), names, texts, column)
    return {posixpath.normpath(row["file_name"]): row.get(found) for _, row in rows}


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also split inside captions
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise MlxSfError(f"{file} line {number}: no JSON ({e}), want one object in a line") from None
            if not isinstance(row, dict):
                raise MlxSfError(f"{file} line {number}: is {type(row).__name__}, want an object with 'file_name'")
            yield number, row


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}
    except csv.Error as e:
        raise MlxSfError(f"{file} line {reader.line_num}: no CSV ({e})") from None


def _is_text(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, str)


def find_caption_column(where: str, names: Collection[str], texts: Sequence[str], asked: str) -> str:
    """The column that holds captions: the one asked for, else one of `USUAL_COLUMNS`, else the only one of texts.

    Raises `MlxSfError` where there is none, or more than one. `texts` are those of all `names` that hold texts.
    """
    if asked and asked not in names:
        raise MlxSfError(f"{where}: no column {asked!r}, it has {', '.join(names)}: change {option('caption_column')}")
    if asked and asked not in texts:
        raise MlxSfError(f"{where}: column {asked!r} holds no texts: name another with {option('caption_column')}")
    if not texts:
        raise MlxSfError(f"{where}: no captions: looked for a column of texts, and it has {', '.join(names) or 'none'}")
    usual = [name for name in USUAL_COLUMNS if name in texts]
    if not asked and not usual and len(texts) > 1:
        both = ", ".join(texts)
        raise MlxSfError(f"{where}: {both} could all be the captions: name one with {option('caption_column')}")
    return asked or (usual or list(texts))[0]
