"""Evaluations from start to end: everything that can be wrong is found first, then measured, compared, recorded.

A run (one checkpoint, weight set and guidance scale; or one folder of pictures) has a folder named after its
settings. What was measured is kept there, so a run that was interrupted goes on, and one that is finished is not
computed again, whatever it is compared with.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.pipeline import Pipeline
from ..checkpoints.resolve import resolve
from ..common.files import check_writable, sha256, writable_folder
from ..common.world import World
from ..device import defaults as device
from ..errors import MlxSfError, option
from ..sampling.request import with_solver
from . import report
from .bands import Band, SpectralDistance
from .checks import Options, check_options, check_space, settle_count, settle_metrics
from .extractor import Extractor
from .fetch import folder_fetch, in_class_order, sample_fetch
from .picture_folder import EXTENSIONS, PictureFolder
from .reference import Reference, find_reference, keep
from .report import Choices, Metrics
from .scores import MeanStd
from .statistics_file import Measured, read_statistics
from .stream import What, measure

Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """What `evaluate` measured; a metric that was not asked for, or that the reference does not allow, is None.

    Args:
        count: number of pictures. fid: Frechet Inception distance. kid, inception_score: mean and deviation.
        precision, recall: shares from 0 to 1. spectral: Frechet distance of log band powers, in all and per band.
        notes: warnings for people. output: the folder with record, table and figures.
    """

    count: int
    fid: float | None
    kid: MeanStd | None
    inception_score: MeanStd | None
    precision: float | None
    recall: float | None
    spectral: SpectralDistance | None
    notes: tuple[str, ...]
    output: Path


def evaluate(
    source: str | os.PathLike[str] | Pipeline,
    ref: str | os.PathLike[str],
    *,
    num_images: int | None = None,
    cfg: float | None = None,
    weights: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    batch_size: int = 16,
    metrics: Sequence[str] | None = None,
    inception_weights: str | os.PathLike[str] | None = None,
    feature_layer: str = "2048",
    kid_subset_size: int = 1000,
    save_samples: bool = False,
    output: str | os.PathLike[str] = "evals",
    say: Say | None = None,
    **solver: Any,
) -> Score:
    """Measure pictures against a reference, as torch-fidelity would.

    Args:
        source: a checkpoint, a run's folder, a Hugging Face repo id or a `Pipeline`, from which pictures are drawn in
            class order, picture i with seed `seed` + i; or a folder of finished pictures. Of a `Pipeline` the
            settings count, and the weights in its file: they are read again.
        ref: a statistics file (.npz, of `mlx-sf stats` or a published one), here, by URL or on the Hub
            ("hf://org/name/file.npz"), optionally with "#sha256=HEX" behind it; or a folder of pictures.
        num_images: number of pictures, the same for each class; None is 50,000, or all of a folder.
        cfg: guidance scale, weights: weight set, solver: the settings that `Pipeline.sample` takes; None and what is
            left out are the checkpoint's (the `Pipeline`'s) own. None of them goes with finished pictures.
        metrics: of "fid", "is", "kid", "prc", "spectral"; None is all that the reference allows.
        inception_weights: the network's file, where it cannot be downloaded. feature_layer: "64", "192", "768" or
            "2048". kid_subset_size: pictures in each subset of KID.
        output: folder for the record, the table, figures and progress. A call that was interrupted goes on there.
        say: called with each line of the report.

    Under `mlx.launch` all processes call this with the same arguments, share the pictures, and get the same score.

    Raises `MlxSfError` before anything is drawn where something asked for cannot be had.
    """
    o = _asked_for(
        source, weights, cfg, dtype, solver,
        ref=str(ref), num_images=num_images, seed=seed, batch_size=batch_size,
        inception_weights=None if inception_weights is None else str(inception_weights), tap=feature_layer,
        metrics=None if metrics is None else tuple(metrics), kid_subset_size=kid_subset_size,
        save_samples=save_samples, output=str(output),
    )  # fmt: skip
    world = World.join()
    with world.together():
        evaluation = Evaluation(o, say or (lambda line: None))
        results = evaluation.execute()
        return _shared(_score(results[0][1], evaluation.output) if world.main else None, world)


def _asked_for(
    source: str | os.PathLike[str] | Pipeline,
    weights: str | None,
    cfg: float | None,
    dtype: str | None,
    solver: Mapping[str, Any],
    **rest: Any,
) -> Options:
    """Options of one run: of a `Pipeline` its settings and its file, of a folder its pictures if it holds any."""
    drawn: dict[str, Any] = {}
    if isinstance(source, Pipeline):
        s = source.config.sample
        own = {"method": s.method, "steps": s.steps, "cfg_interval": (s.cfg_low, s.cfg_high), "sample_t_eps": s.t_eps}
        weights, cfg = weights or source.config.weights[0], s.cfg if cfg is None else cfg
        drawn, dtype = {**own, "shift": s.shift, "cfg_norm": s.cfg_norm}, dtype or source.dtype
        source = source.path
    pictures = Path(source).is_dir() and any(p.suffix.lower() in EXTENSIONS for p in Path(source).iterdir())
    pictures = pictures and not any(p.suffix in (".safetensors", ".npz") for p in Path(source).iterdir())
    return Options(
        ckpt=None if pictures else str(source), samples=str(source) if pictures else None,
        cfg=() if cfg is None else (cfg,), weights=() if weights is None else (weights,), dtype=dtype,
        solver={**drawn, **{k: v for k, v in solver.items() if v is not None}}, **rest,
    )  # fmt: skip


def _score(m: Metrics, output: Path) -> Score:
    p = m.precision_recall
    precision, recall = (p.precision, p.recall) if p else (None, None)
    return Score(m.count, m.fid, m.kid, m.inception_score, precision, recall, m.spectral, tuple(m.notes), output)


def _shared(score: Score | None, world: World) -> Score:
    """Rank 0's score on every rank."""
    told = world.share(None if score is None else {**dataclasses.asdict(score), "output": str(score.output)})
    for name in ("kid", "inception_score"):
        told[name] = told[name] and MeanStd(**told[name])
    if spectral := told["spectral"]:
        told["spectral"] = SpectralDistance(spectral["total"], [Band(**b) for b in spectral["bands"]])
    return Score(**{**told, "notes": tuple(told["notes"]), "output": Path(told["output"])})


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


class Evaluation:
    """Everything checked, nothing computed yet. `execute` does the work; `results` then holds what came out."""

    def __init__(self, o: Options, say: Say = print) -> None:
        check_options(o)
        self.o, self.say = o, say
        self.world = World.join()
        self.output = writable_folder(o.output)
        self.table = Path(o.table) if o.table else self.output / "results.csv"
        check_writable(self.table)
        report.check_table(self.table)
        self.folder: PictureFolder | None = None
        self.checkpoint: Checkpoint | None = None
        configs = self._open_checkpoint() if o.ckpt is not None else self._open_samples()
        place = find_reference(o.ref)
        self.extractor = Extractor(o.inception_weights, o.tap)
        self.reference = Reference(place, o, self.extractor, self.img_size, self.output)
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
            raise MlxSfError(f"{option('seed')} is {o.seed}, want a number from 0 to 2^63")
        self.img_size = ckpt.config.model.size
        sets = [ckpt.pick(w) for w in (o.weights or (None,))]
        device.pick_dtype(o.dtype)
        configs = []
        for name in dict.fromkeys(sets):
            for cfg in dict.fromkeys(o.cfg or (ckpt.config.sample.cfg,)):
                sample = with_solver(ckpt.config.sample, {**o.solver, "cfg": float(cfg)})
                configs.append(dataclasses.replace(ckpt.config, sample=sample, weights=(name,)))
        for name in dict.fromkeys(sets):
            ckpt.tensors(name)  # complete and finite, before the first of hours is spent
        return list(configs)

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
        each = 60e6 + (8192 * self.count if self.keep_rows else 0)
        if self.o.save_samples:
            each += self.count * self.img_size[0] * self.img_size[1] * 1.5  # a PNG takes about half of its pixels
        check_space(self.output, each * len(self.runs))

    def execute(self) -> list[tuple[Run, Metrics]]:
        """Measure the reference, then run by run: measure, compare, print, record. Rank 0 has the results."""
        for note in self.notes:
            self._say(f"note: {note}")
        reference = self.reference.measured(self.keep_rows, self.world)
        for run in self.runs:
            start = time.time()
            measured = self._measure(run)
            if measured is None or reference is None:
                continue  # not the leader
            metrics = report.compare(measured, reference, self.choices)
            self.results.append((run, metrics))
            self._record(run, metrics, reference, time.time() - start)
        if self.world.main:
            self._plot()
        return self.results

    def _say(self, line: str) -> None:
        if self.world.main:
            self.say(line)

    def _measure(self, run: Run) -> Measured | None:
        place = run.folder(self.output)
        file = place / "statistics.npz"
        # what an earlier run measured serves, too, if it kept more than is needed now
        kinds = [(s, r) for s in (self._splits, self.o.splits) for r in (self.keep_rows, True)]
        places = [run.folder(self.output, splits=s, rows=r) for s, r in kinds]
        enough = [p for p in places if (p / file.name).exists()]
        if self.world.share(bool(enough)):
            if not self.world.main:
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
            asked, o = in_class_order(self.count, run.config.model.num_classes), self.o
            fetch = sample_fetch(self.checkpoint, run.config, asked, o.seed, o.dtype, o.batch_size, png_folder)
            source = "samples"
        facts = {**self.extractor.describe(), "img_size": list(self.img_size), "source": source}
        result = measure(self.extractor.network, what, fetch, run.label, self.world, place, facts)
        return keep(result, file, place, self.keep_rows)

    def _record(self, run: Run, metrics: Metrics, reference: Measured, seconds: float) -> None:
        place = self.reference.place
        record = run.folder(self.output / "records", ref=str(place.path), choices=dataclasses.asdict(self.choices))
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
            "reference": {"where": str(place.path), "url": place.url, "sha256": place.sha256,
                          "count": reference.count, "provenance": dict(reference.provenance)},
            "inception": {"path": self.extractor.path, "sha256": self.extractor.sha256},
            "checkpoint_sha256": _sha256_of(self.checkpoint.path) if self.checkpoint is not None else None,
            "class_order": "in class order, equally many each; image i has seed + i",
            "processes": self.world.size, "seconds": round(seconds, 1), "machine": device.describe(),
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
