"""`mlx-sf stats`: reference statistics of a data set after the reference's crop."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..common.files import check_writable
from ..common.world import World
from ..data.numbered import NumberedSource
from ..data.sources import open_source
from ..errors import MlxSfError, option
from .extractor import Extractor
from .fetch import source_fetch
from .statistics_file import Measured, write_statistics
from .stream import What, measure


@dataclass(frozen=True)
class StatsOptions:
    """What `mlx-sf stats` was asked for. `data` None means the built-in scenes."""

    data: str | None
    img_size: int
    output: str
    num_images: int | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    seed: int = 0
    inception_weights: str | None = None
    tap: str = "2048"
    batch_size: int = 16
    keep_features: bool = False


def make_statistics(o: StatsOptions, say: Callable[[str], None] = print) -> Measured | None:
    """Measure a data set after the reference's crop and write a statistics file; resumes where it was interrupted."""
    output = Path(o.output)
    if output.suffix != ".npz":
        raise MlxSfError(f"{output}: the name of a statistics file must end in .npz")
    check_writable(output)
    if o.img_size < 2:
        raise MlxSfError(f"{option('img_size')} is {o.img_size}, want at least 2")
    scenes = 10_000 if o.num_images is None else o.num_images
    opened = open_source(
        o.data, o.img_size, decode="reference", split=o.split, image_column=o.image_column,
        label_column=o.label_column, epoch_size=scenes, seed=o.seed,
    )  # fmt: skip
    source = cast(NumberedSource, opened)  # a stream is never asked for
    count = len(source) if o.num_images is None else o.num_images
    if not 2 <= count <= len(source):
        raise MlxSfError(
            f"{option('num_images')} is {count}, want from 2 to the {len(source)} pictures of {source.describe()}"
        )
    extractor, world = Extractor(o.inception_weights, o.tap), World.join()
    facts = {
        **extractor.describe(), "img_size": [o.img_size] * 2, "source": o.data or f"scenes, seed {o.seed}",
        "crop": "ADM: halved by a box filter, bicubic, centre", "split": o.split, "asked_for": count,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps([facts, o.keep_features, len(source)]).encode()).hexdigest()[:8]
    place = output.with_name(f".{output.stem}-{key}.partial")
    skipped: list[str] = []
    what = What(count, (o.img_size, o.img_size), o.tap, keep_rows=o.keep_features)
    fetch = source_fetch(source, o.batch_size, skipped)
    result = measure(extractor.network, what, fetch, source.describe(), world, place, facts)
    if result is None:
        return None
    missing = count - (result.count or 0)
    result = dataclasses.replace(result, provenance={**facts, "skipped": missing})
    write_statistics(output, result)
    shutil.rmtree(place, ignore_errors=True)
    if missing:
        named = "; ".join(skipped[:3])
        say(f"note: {missing} of {count} pictures could not be read and are left out ({named or 'see the first run'})")
    return result
