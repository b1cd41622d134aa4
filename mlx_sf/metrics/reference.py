"""The reference side of a comparison: a folder of pictures, or a statistics file, here or by its address."""

import hashlib
from pathlib import Path

from ..common.files import sha256
from ..common.world import World
from ..errors import MlxSfError
from .checks import Options
from .extractor import Extractor
from .fetch import folder_fetch
from .picture_folder import PictureFolder
from .remote import Place, fetch_reference, is_address
from .statistics_file import Measured, check_comparable, read_statistics, write_statistics
from .stream import What, measure


def find_reference(ref: str) -> Place:
    """The file or folder that `ref` means: a path, or an address (`remote`)."""
    if is_address(ref):
        return fetch_reference(ref)
    path = Path(ref)
    if not path.exists():
        raise MlxSfError(f"{ref}: no such file or folder, want reference statistics or a folder of pictures")
    return Place(path.resolve(), None, sha256(path) if path.is_file() else None)


class Reference:
    """The reference side: opened and checked at once, measured (if it is a folder) when asked for, once."""

    def __init__(self, place: Place, o: Options, extractor: Extractor, img_size: tuple[int, int], output: Path) -> None:
        self.extractor, self.output, self.batch_size = extractor, output, o.batch_size
        self.place = place
        self.folder: PictureFolder | None = None
        self.statistics: Measured | None = None
        self.notes: list[str] = []
        if place.path.is_dir():
            self.folder = PictureFolder(o.ref)
            size = self.folder.check()
            if size != img_size:
                raise MlxSfError(
                    f"{o.ref}: reference pictures are {size[1]}x{size[0]}, the samples {img_size[1]}x{img_size[0]}: "
                    "make statistics of crops of that size with `mlx-sf stats` and use their file"
                )
            self.count: int | None = len(self.folder)
            if self.count < 2:
                raise MlxSfError(f"{o.ref}: holds one picture, want at least 2 for a covariance")
            self.has_rows = self.has_spectrum = True
        else:
            self.statistics = read_statistics(place.path, extractor.tap, keep_rows=True)
            facts = {"img_size": img_size, "tap": extractor.tap, "inception_sha256": extractor.sha256}
            self.notes = check_comparable(facts, self.statistics)
            self.count = self.statistics.count
            self.has_rows, self.has_spectrum = self.statistics.rows is not None, self.statistics.spectrum is not None
            if self.has_rows:
                self.count = len(self.statistics.rows)  # type: ignore[arg-type]

    def measured(self, keep_rows: bool, world: World) -> Measured | None:
        """The reference's statistics on rank 0; a folder's are kept in the output folder and found again there."""
        if self.folder is None:
            return self.statistics
        assert self.folder.size is not None
        key = f"{self.folder.fingerprint()}{self.extractor.sha256}{self.extractor.tap}{keep_rows}"
        place = self.output / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        file = place / "statistics.npz"
        if world.share(file.exists()):
            return read_statistics(file, self.extractor.tap, keep_rows) if world.main else None
        what = What(len(self.folder), self.folder.size, self.extractor.tap, keep_rows=keep_rows)
        facts = {
            **self.extractor.describe(),
            "img_size": list(self.folder.size),
            "source": str(self.folder.root),
        }
        fetch = folder_fetch(self.folder, self.batch_size)
        result = measure(self.extractor.network, what, fetch, "reference", world, place, facts)
        return keep(result, file, place, keep_rows)


def keep(result: Measured | None, file: Path, place: Path, keep_rows: bool) -> Measured | None:
    """Write what was measured, drop the state it was built up in, and go on with what the file says.

    So a run that finds the file computes to the bit what the run computed that wrote it.
    """
    if result is None:
        return None
    write_statistics(file, result)
    for p in [*place.glob("state-*.npz"), *place.glob("features-*.npy")]:
        p.unlink(missing_ok=True)
    return read_statistics(file, result.provenance["tap"], keep_rows)
