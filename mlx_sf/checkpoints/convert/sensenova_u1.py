"""SenseNova-U1 written again, smaller: one tensor at a time, from the authors' shards to ours.

The generation side's matrices become 8 bits in groups of 64 unless told otherwise. Norms, embedders, head and the
understanding side, which is read layer by layer anyway, keep their types. Two ports by others report that 4 bits harm
pictures visibly.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import MlxSfError, option
from ...formats.shards import check_target
from ...models import architecture, parameter_shapes
from ...models.quantize import QuantizationConfig
from ..u1_files import PublishedFile, text_entries
from .report import Report
from .tensors import SafeTensor, network_entries, write

_DEFAULT = QuantizationConfig(8)


def convert(
    path: Path,
    target: str | os.PathLike[str],
    weights: Sequence[str] | None = None,
    dtype: str | None = None,
    flags: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: QuantizationConfig | None = None,
    where: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Report:
    """Convert the authors' files at `path`, an index or a single file.

    `dtype` None and no `quantization` is 8 bits; a `dtype` alone is floats of that type. Raises `MlxSfError` where the
    files are incomplete or of another network, and for flags: these files say everything.
    """
    where = where or str(path)
    if weights and list(weights) != ["model"]:
        raise MlxSfError(f"{where}: holds one weight set: leave out {option('weights')}")
    if flags:
        raise MlxSfError(f"{where}: says its settings itself: leave out {option(next(iter(flags)).lower())}")
    check_target(target)
    file = PublishedFile(path)
    model, kind = file.config.model, architecture(file.config.model)
    notes = []
    if quantization is None and dtype is None:
        quantization = _DEFAULT
        notes.append(f"8 bits, the default for this network: {option('dtype')} bfloat16 keeps floats")
    q = None if quantization is None else quantization.of(kind)
    if q is not None and q.bits == 4:
        notes.append("4 bits: two ports by others report visible damage to pictures; 8 bits are the default")
    own = {name: SafeTensor(file.entries[name]) for name in parameter_shapes(model)}
    entries = network_entries(own, model, dtype or "bfloat16", where, q) + text_entries(file.entries)
    made = {"converted_by": f"mlx-sf {__version__}", "source": path.parent.name, **(origin or {})}
    config = dataclasses.replace(file.config, quantization=q, provenance=made)
    report = Report(config, "SenseNova-U1", ignored=file.ignored, notes=notes)
    return write(target, entries, config, report, on_tensor)
