"""Evaluations from start to end: everything that can be wrong is found first, then measured, compared, recorded.

A run (one checkpoint, weight set and guidance scale; or one folder of pictures) has a folder named after its
settings. What was measured is kept there, so a run that was interrupted goes on, and one that is finished is not
computed again, whatever it is compared with.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import device
from ..checkpoint import Checkpoint, resolve
from ..config import Config
from ..errors import MlxSfError
from ..files import check_writable, sha256, writable_folder
from ..generate import with_solver
from . import report
from .folder import PictureFolder
from .measure import What, agreed, measure
from .report import Choices, Metrics
from .scores import check_kid, check_precision_recall
from .sources import Extractor, class_labels, describe_extractor, folder_fetch, sample_fetch
from .statistics import Measured, check_comparable, read_statistics, write_statistics

METRICS = ("fid", "is", "kid", "prc", "spectral")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `mlx-sf eval` was asked for. Exactly one of `ckpt` and `samples` is set. None means the default."""

    ref: str
    ckpt: str | None = None
    samples: str | None = None
    num_images: int | None = None
    cfg: tuple[float, ...] = ()
    weights: tuple[str, ...] = ()
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # method, steps, cfg_low, cfg_high, t_eps
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


@dataclass(frozen=True)
class Run:
    """One set of samples: what makes it (`settings`, which name its folder) and a short label."""

    label: str
    settings: Mapping[str, Any]
    config: Config | None = None

    def folder(self, output: Path, **changes: Any) -> Path:
        """Its folder, or that of the run with other settings."""
        text = json.dumps({**self.settings, **changes}, sort_keys=True)
        return output / f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def settle_count(num_images: int | None, config: Config) -> int:
    """Number of images: 50,000 or what was asked for; it must divide evenly over the classes, as in the reference."""
    n, k = 50_000 if num_images is None else num_images, config.model.num_classes
    if n < 2:
        raise MlxSfError(f"--num-images is {n}, want at least 2")
    if n % k:
        lower, upper = n // k * k, (n // k + 1) * k
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise MlxSfError(f"--num-images {n} does not divide evenly over {k} classes: use {near}")
    return n


def settle_metrics(
    o: Options, count: int, reference_count: int | None, has_rows: bool, has_spectrum: bool
) -> tuple[tuple[str, ...], list[str]]:
    """The metrics to compute, and why others are left out. One that was asked for and cannot be had is an error."""
    reasons: dict[str, str] = {}
    if count < o.splits:
        reasons["is"] = f"Inception Score: {count} images for {o.splits} splits: use more images or fewer --is-splits"
    if not has_rows:
        need = "needs the reference's features: give a folder of pictures, or `mlx-sf stats --keep-features`, as --ref"
        reasons["kid"], reasons["prc"] = f"KID {need}", f"precision/recall {need}"
    else:
        for name, check, number in (
            ("kid", check_kid, o.kid_subset_size),
            ("prc", check_precision_recall, o.neighbours),
        ):
            try:
                check(count, reference_count or 0, number)
            except MlxSfError as e:
                reasons[name] = str(e)
    if not has_spectrum:
        reasons["spectral"] = "spectral distance needs a reference made by `mlx-sf stats`, or a folder of pictures"
    if o.metrics is not None:
        if bad := next((m for m in o.metrics if m not in METRICS), None):
            raise MlxSfError(f"--metrics: {bad!r} is unknown, want {', '.join(METRICS)}")
        if failed := next((m for m in o.metrics if m in reasons), None):
            raise MlxSfError(reasons[failed])
        return o.metrics, []
    return tuple(m for m in METRICS if m not in reasons), [f"left out: {r}" for r in reasons.values()]


# ---- the two sides ---------------------------------------------------------------------------------------------


class Reference:
    """The reference side: opened and checked at once, measured (if it is a folder) when asked for, once."""

    def __init__(self, o: Options, extractor: Extractor, img_size: tuple[int, int], output: Path) -> None:
        self.extractor, self.output, self.batch_size = extractor, output, o.batch_size
        self.path = Path(o.ref).resolve()
        self.folder: PictureFolder | None = None
        self.statistics: Measured | None = None
        self.notes: list[str] = []
        if Path(o.ref).is_dir():
            self.folder = PictureFolder(o.ref)
            size = self.folder.check()
            if size != img_size:
                raise MlxSfError(
                    f"{o.ref}: reference pictures are {size[1]}x{size[0]}, the samples {img_size[1]}x{img_size[0]}: "
                    "crop them with `mlx-sf stats --data ... --img-size` and use its file"
                )
            self.count: int | None = len(self.folder)
            if self.count < 2:
                raise MlxSfError(f"{o.ref}: holds one picture, want at least 2 for a covariance")
            self.has_rows = self.has_spectrum = True
        else:
            self.statistics = read_statistics(o.ref, extractor.tap, keep_rows=True)
            facts = {"img_size": img_size, "tap": extractor.tap, "inception_sha256": extractor.sha256}
            self.notes = check_comparable(facts, self.statistics)
            self.count = self.statistics.count
            self.has_rows, self.has_spectrum = self.statistics.rows is not None, self.statistics.spectrum is not None
            if self.has_rows:
                self.count = len(self.statistics.rows)  # type: ignore[arg-type]

    def measured(self, keep_rows: bool, group: Any) -> Measured | None:
        """The reference's statistics on rank 0; a folder's are kept in the output folder and found again there."""
        if self.folder is None:
            return self.statistics
        assert self.folder.size is not None
        key = f"{self.folder.fingerprint()}{self.extractor.sha256}{self.extractor.tap}{keep_rows}"
        place = self.output / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        file = place / "statistics.npz"
        if agreed(file.exists(), group):
            return read_statistics(file, self.extractor.tap, keep_rows) if group.rank() == 0 else None
        what = What(len(self.folder), self.folder.size, self.extractor.tap, keep_rows=keep_rows)
        facts = {
            **describe_extractor(self.extractor),
            "img_size": list(self.folder.size),
            "source": str(self.folder.root),
        }
        fetch = folder_fetch(self.folder, self.batch_size)
        result = measure(self.extractor.network, what, fetch, "reference", group, place, facts)
        return _keep(result, file, place, keep_rows)


def _keep(result: Measured | None, file: Path, place: Path, keep_rows: bool) -> Measured | None:
    """Write what was measured, drop the state it was built up in, and go on with what the file says.

    So a run that finds the file computes to the bit what the run computed that wrote it.
    """
    if result is None:
        return None
    write_statistics(file, result)
    for p in [*place.glob("state-*.npz"), *place.glob("features-*.npy")]:
        p.unlink(missing_ok=True)
    return read_statistics(file, result.provenance["tap"], keep_rows)


# ---- an evaluation ---------------------------------------------------------------------------------------------


class Evaluation:
    """Everything checked, nothing computed yet. `execute` does the work; `results` then holds what came out."""

    def __init__(self, o: Options, say: Say = print) -> None:
        self.o, self.say = o, say
        self.group: Any = mx.distributed.init()
        self.leader = self.group.rank() == 0
        self.output = writable_folder(o.output)
        self.table = Path(o.table) if o.table else self.output / "results.csv"
        check_writable(self.table)
        report.check_table(self.table)
        self.folder: PictureFolder | None = None
        self.checkpoint: Checkpoint | None = None
        configs = self._open_checkpoint() if o.ckpt is not None else self._open_samples()
        self._check_reference_exists()
        self.extractor = Extractor(o.inception_weights, o.tap)
        self.reference = Reference(o, self.extractor, self.img_size, self.output)
        r = self.reference
        chosen, notes = settle_metrics(o, self.count, r.count, r.has_rows, r.has_spectrum)
        self.choices = Choices(chosen, o.kid_subsets, o.kid_subset_size, o.neighbours)
        self.notes = [*r.notes, *notes]
        self.keep_rows = bool({"kid", "prc"} & set(chosen))
        self.runs = [self._run(c) for c in configs]
        self._check_space()
        self.results: list[tuple[Run, Metrics]] = []

    def _open_samples(self) -> list[Config | None]:
        self.folder = PictureFolder(self.o.samples or "", self.o.num_images)
        self.count = len(self.folder)
        if self.count < 2:
            raise MlxSfError(f"{self.folder.root}: holds one picture, want at least 2 for a covariance")
        self.img_size = self.folder.check()
        return [None]

    def _open_checkpoint(self) -> list[Config | None]:
        o, ckpt = self.o, Checkpoint(resolve(self.o.ckpt or ""))
        self.checkpoint = ckpt
        self.count = settle_count(o.num_images, ckpt.config)
        if not 0 <= o.seed < 2**63 - self.count:
            raise MlxSfError(f"--seed is {o.seed}, want a number from 0 to 2^63")
        self.img_size = (ckpt.config.model.img_size,) * 2
        sets = [ckpt.pick(w) for w in (o.weights or (None,))]
        device.pick_dtype(o.dtype)
        configs = []
        for name in dict.fromkeys(sets):
            for cfg in dict.fromkeys(o.cfg or (ckpt.config.sample.cfg,)):
                solved = with_solver(ckpt.config, {**o.solver, "cfg": float(cfg)})
                configs.append(solved.replace(weights=(name,)))
        for name in dict.fromkeys(sets):
            ckpt.tensors(name)  # complete and finite, before the first of hours is spent
        return list(configs)

    def _check_reference_exists(self) -> None:
        if not Path(self.o.ref).exists():
            raise MlxSfError(f"{self.o.ref}: no such file or folder, want reference statistics or a folder of pictures")

    def _run(self, config: Config | None) -> Run:
        o = self.o
        settings: dict[str, Any] = {
            "count": self.count, "tap": o.tap, "inception": self.extractor.sha256,
            "splits": self._splits, "rows": self.keep_rows,
        }  # fmt: skip
        if config is None:
            assert self.folder is not None
            settings |= {"samples": str(self.folder.root.resolve()), "fingerprint": self.folder.fingerprint()}
            return Run(self.folder.root.resolve().name or "samples", settings)
        assert self.checkpoint is not None
        stat = self.checkpoint.path.stat()
        settings |= {
            "checkpoint": str(self.checkpoint.path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns,
            "config": json.loads(config.to_json()), "seed": o.seed, "dtype": o.dtype or device.default_dtype(),
            "png": o.save_samples,
        }  # fmt: skip
        return Run(f"{config.weights[0]}-cfg{config.sample.cfg:g}-n{self.count}", settings, config)

    @property
    def _splits(self) -> int:
        return self.o.splits if "is" in self.choices.metrics else 0

    def _check_space(self) -> None:
        """Refuse a disk that is sure to run full."""
        each = 60e6 + (8192 * self.count if self.keep_rows else 0)
        if self.o.save_samples:
            each += self.count * self.img_size[0] * self.img_size[1] * 1.5  # a PNG takes about half of its pixels
        free, need = shutil.disk_usage(self.output).free, each * len(self.runs)
        if free < need:
            raise MlxSfError(
                f"{self.output}: {free / 1e9:.1f} GB are free, about {need / 1e9:.1f} GB are needed: "
                "choose another place with --output"
            )

    def execute(self) -> list[tuple[Run, Metrics]]:
        """Measure the reference, then run by run: measure, compare, print, record. Rank 0 has the results."""
        for note in self.notes:
            self._say(f"note: {note}")
        reference = self.reference.measured(self.keep_rows, self.group)
        for run in self.runs:
            start = time.time()
            measured = self._measure(run)
            if measured is None or reference is None:
                continue  # not the leader
            metrics = report.compare(measured, reference, self.choices)
            self.results.append((run, metrics))
            self._record(run, metrics, reference, time.time() - start)
        if self.leader:
            self._plot()
        return self.results

    def _say(self, line: str) -> None:
        if self.leader:
            self.say(line)

    def _measure(self, run: Run) -> Measured | None:
        place = run.folder(self.output)
        file = place / "statistics.npz"
        # what an earlier run measured serves, too, if it kept more than is needed now
        kinds = [(s, r) for s in (self._splits, self.o.splits) for r in (self.keep_rows, True)]
        places = [run.folder(self.output, splits=s, rows=r) for s, r in kinds]
        enough = [p for p in places if (p / file.name).exists()]
        if agreed(bool(enough), self.group):
            if not self.leader:
                return None
            self._say(f"{run.label}: measured before, in {enough[0]}")
            return read_statistics(enough[0] / file.name, self.o.tap, self.keep_rows)
        what = What(self.count, self.img_size, self.o.tap, self._splits, self.keep_rows)
        if run.config is None:
            assert self.folder is not None
            fetch, source = folder_fetch(self.folder, self.o.batch_size), str(self.folder.root)
        else:
            assert self.checkpoint is not None
            png_folder = writable_folder(place / "samples") if self.o.save_samples else None
            labels = class_labels(self.count, run.config)
            fetch, source = (
                sample_fetch(
                    run.config, self.checkpoint, labels, self.o.seed, self.o.dtype, self.o.batch_size, png_folder
                ),
                "samples",
            )
        facts = {**describe_extractor(self.extractor), "img_size": list(self.img_size), "source": source}
        result = measure(self.extractor.network, what, fetch, run.label, self.group, place, facts)
        return _keep(result, file, place, self.keep_rows)

    def _record(self, run: Run, metrics: Metrics, reference: Measured, seconds: float) -> None:
        record = run.folder(
            self.output / "records", ref=str(self.reference.path), choices=dataclasses.asdict(self.choices)
        )
        record = record.with_name(record.name + ".json")
        title = f"{run.label}: {self.count} images"
        config = run.config
        if config is not None:
            s = config.sample
            title += (
                f", {config.name}, {s.method} {s.steps} steps, cfg {s.cfg:g} for t in ({s.cfg_low:g}, {s.cfg_high:g})"
            )
            title += f", seed {self.o.seed}"
        for line in report.lines(title, metrics):
            self._say(line)
        sampler = {} if config is None else {
            "cfg": config.sample.cfg, "weights": config.weights[0], "method": config.sample.method,
            "steps": config.sample.steps, "seed": self.o.seed,
        }  # fmt: skip
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        report.write_json(record, {
            "time": now, "label": run.label, "metrics": report.as_dict(metrics),
            "options": dataclasses.asdict(self.o), "settings": run.settings,
            "choices": dataclasses.asdict(self.choices),
            "reference": {"where": str(self.reference.path), "sha256": _sha256_of(self.o.ref),
                          "count": reference.count, "provenance": dict(reference.provenance)},
            "inception": {"path": self.extractor.path, "sha256": self.extractor.sha256},
            "checkpoint_sha256": _sha256_of(self.checkpoint.path) if self.checkpoint is not None else None,
            "class_order": "in class order, equally many each; image i has seed + i",
            "processes": self.group.size(), "seconds": round(seconds, 1), "machine": device.describe(),
            "tf32": os.environ.get("MLX_ENABLE_TF32", "1") != "0",
        })  # fmt: skip
        samples = str(self.checkpoint.path) if self.checkpoint is not None else self.o.samples
        report.append_row(self.table, metrics, {
            **sampler, "time": now, "label": run.label, "samples": samples, "reference": self.o.ref,
            "feature_layer": self.o.tap, "record": str(record),
        })  # fmt: skip
        self._say(f"  record: {record}, table: {self.table}")

    def _plot(self) -> None:
        sweep = [(r.config.sample.cfg, r.config.weights[0], m) for r, m in self.results if r.config is not None]
        name = self.checkpoint.config.name if self.checkpoint is not None else ""
        if report.plot_sweep(self.output / "fid_is_over_cfg.png", sweep, name):
            self._say(f"figure: {self.output / 'fid_is_over_cfg.png'}")
        if report.plot_spectrum(self.output / "spectrum.png", [(r.label, m) for r, m in self.results]):
            self._say(f"figure: {self.output / 'spectrum.png'}")


def _sha256_of(path: str | Path) -> str | None:
    return sha256(Path(path)) if Path(path).is_file() else None


def write_table_of(results: Sequence[tuple[Run, Metrics]]) -> list[str]:
    """A sweep's results side by side, for the console."""
    rows = [f"{'weights':10}{'cfg':>6}{'FID':>12}{'IS':>10}{'spectral':>10}"]
    for run, m in results:
        if run.config is None:
            return []
        score = f"{m.inception_score.mean:.3f}" if m.inception_score else "-"
        fid = f"{m.fid:.4f}" if m.fid is not None else "-"
        spectral = f"{m.spectral.total:.4f}" if m.spectral else "-"
        rows.append(f"{run.config.weights[0]:10}{run.config.sample.cfg:>6g}{fid:>12}{score:>10}{spectral:>10}")
    return rows if len(rows) > 2 else []
