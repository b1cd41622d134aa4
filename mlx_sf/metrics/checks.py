"""What an evaluation is asked for, and what of it is refused before hours of sampling are spent."""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.config import Config
from ..common.fields import require
from ..errors import MlxSfError, option
from ..sampling.request import SETTINGS
from .inception import TAPS
from .scores import check_kid, check_precision_recall

METRICS = ("fid", "is", "kid", "prc", "spectral")
LAYERS = tuple(t for t in TAPS if t.isdigit())  # of features; the logits are for the Inception Score


@dataclass(frozen=True)
class Options:
    """What an evaluation was asked for. Exactly one of `ckpt` and `samples` is set. None means the default.

    `solver` holds what `sampling.request.with_solver` takes: method, steps, cfg_interval, sample_t_eps, ...
    """

    ref: str
    ckpt: str | None = None
    samples: str | None = None
    num_images: int | None = None
    cfg: tuple[float, ...] = ()
    weights: tuple[str, ...] = ()
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None
    batch_size: int = 16
    inception_weights: str | None = None
    tap: str = "2048"
    metrics: tuple[str, ...] | None = None
    splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3
    save_samples: bool = False
    output: str = "evals"
    table: str | None = None


def check_options(o: Options) -> None:
    """Refuse what is wrong whatever the pictures and the reference are."""
    require(o.tap in LAYERS, "feature_layer", o.tap, "one of " + ", ".join(LAYERS))
    for name, got, least in (
        ("batch_size", o.batch_size, 1),
        ("is_splits", o.splits, 1),
        ("kid_subsets", o.kid_subsets, 1),
        ("kid_subset_size", o.kid_subset_size, 2),
        ("neighbours", o.neighbours, 1),
    ):
        require(got >= least, name, got, f"at least {least}")
    if bad := next((m for m in o.metrics or () if m not in METRICS), None):
        raise MlxSfError(f"{option('metrics')}: {bad!r} is unknown, want {', '.join(METRICS)}")
    if bad := next((name for name in o.solver if name not in SETTINGS), None):
        raise MlxSfError(f"no setting of sampling is called {bad!r}, want one of {', '.join(sorted(SETTINGS))}")
    if o.samples is not None:
        drawing = {**o.solver, "cfg": o.cfg or None, "weights": o.weights or None, "dtype": o.dtype}
        if given := next((name for name, value in drawing.items() if value is not None), None):
            raise MlxSfError(f"{option(given)} is about drawing, but {o.samples} holds finished pictures: leave it out")


def settle_count(num_images: int | None, config: Config) -> int:
    """Number of images: 50,000 or what was asked for; it must divide evenly over the classes, as in the reference."""
    n, k = 50_000 if num_images is None else num_images, config.model.num_classes
    if not k:
        raise MlxSfError(f"{config.name}: draws from prompts, want a model with classes, or a folder of its pictures")
    if n < 2:
        raise MlxSfError(f"{option('num_images')} is {n}, want at least 2")
    if n % k:
        lower, upper = n // k * k, (n // k + 1) * k
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise MlxSfError(f"{option('num_images')} {n} does not divide evenly over {k} classes: use {near}")
    return n


def settle_metrics(
    o: Options, count: int, reference_count: int | None, has_rows: bool, has_spectrum: bool
) -> tuple[tuple[str, ...], list[str]]:
    """The metrics to compute, and why others are left out. One that was asked for and cannot be had is an error."""
    reasons: dict[str, str] = {}
    if count < o.splits:
        reasons["is"] = (
            f"Inception Score: {count} images for {o.splits} splits: use more images or fewer {option('is_splits')}"
        )
    if not has_rows:
        need = (
            f"needs the reference's features: give a folder of pictures as {option('ref')}, "
            "or statistics that were made with their features kept"
        )
        reasons["kid"], reasons["prc"] = f"KID {need}", f"precision/recall {need}"
    else:
        for name, check, number in (
            ("kid", check_kid, o.kid_subset_size),
            ("prc", check_precision_recall, o.neighbours),
        ):
            try:
                check(count, reference_count or 0, number)
            except MlxSfError as e:
                reasons[name] = e.message
    if not has_spectrum:
        reasons["spectral"] = "spectral distance needs a reference made by `mlx-sf stats`, or a folder of pictures"
    if o.metrics is not None:
        if failed := next((m for m in o.metrics if m in reasons), None):
            raise MlxSfError(reasons[failed])
        return o.metrics, []
    return tuple(m for m in METRICS if m not in reasons), [f"left out: {r}" for r in reasons.values()]


def check_space(output: Path, need: float) -> None:
    """Refuse a disk that is sure to run full: `need` is in bytes."""
    free = shutil.disk_usage(output).free
    if free < need:
        raise MlxSfError(
            f"{output}: {free / 1e9:.1f} GB are free, about {need / 1e9:.1f} GB are needed: "
            f"choose another place with {option('output')}"
        )
