"""What an evaluation says: printed lines, a JSON record, a table that grows, figures."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common.files import replacing
from ..errors import MlxSfError, option
from .bands import SpectralDistance, spectral_distance
from .moments import frechet_distance, unreliable
from .scores import MeanStd, PrecisionRecall, kernel_distance, precision_recall
from .statistics_file import Measured

BIASED_BELOW = 10_000


@dataclass(frozen=True)
class Metrics:
    """The numbers of one comparison; None where not computed. `notes` are warnings for people."""

    count: int
    reference_count: int | None
    fid: float | None = None
    inception_score: MeanStd | None = None
    kid: MeanStd | None = None
    precision_recall: PrecisionRecall | None = None
    spectral: SpectralDistance | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choices:
    """Which metrics ("fid", "is", "kid", "prc", "spectral") and their settings, by default the reference's."""

    metrics: tuple[str, ...]
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3


def compare(samples: Measured, reference: Measured, choices: Choices) -> Metrics:
    """Compute the chosen metrics. What they need must be there: `checks.settle_metrics` sees to that."""
    wanted, notes = choices.metrics, []
    count = samples.count or 0
    fid = kid = prc = spectral = None
    if "fid" in wanted:
        fid = frechet_distance(samples.features, reference.features)
        if warning := unreliable(samples.features, reference.features):
            notes.append(f"FID is unreliable: {warning}")
        elif count < BIASED_BELOW:
            notes.append(
                f"FID from {count} images is biased upwards, not comparable with FID-50k: use at least {BIASED_BELOW}"
            )
    if "kid" in wanted and samples.rows is not None and reference.rows is not None:
        kid = kernel_distance(samples.rows, reference.rows, choices.kid_subsets, choices.kid_subset_size, progress=True)
    if "prc" in wanted and samples.rows is not None and reference.rows is not None:
        prc = precision_recall(samples.rows, reference.rows, choices.neighbours, progress=True)
    if "spectral" in wanted and samples.spectrum is not None and reference.spectrum is not None:
        spectral = spectral_distance(samples.spectrum, reference.spectrum)
    score = samples.inception_score if "is" in wanted else None
    return Metrics(count, reference.count, fid, score, kid, prc, spectral, notes)


def fid_name(count: int) -> str:
    """ "FID-50k" is the name of a distance from exactly 50,000 images."""
    return "FID-50k" if count == 50_000 else "FID"


def lines(title: str, m: Metrics) -> list[str]:
    """The result in words, for the console."""
    against = f"{m.reference_count} reference images" if m.reference_count else "a reference of unknown size"
    out = [title]
    if m.fid is not None:
        out.append(f"  {fid_name(m.count):18}{m.fid:.4f}   (N = {m.count}, against {against})")
    if m.inception_score is not None:
        out.append(f"  {'Inception Score':18}{m.inception_score.mean:.4f} ± {m.inception_score.std:.4f}")
    if m.kid is not None:
        out.append(f"  {'KID':18}{m.kid.mean:.6f} ± {m.kid.std:.6f}")
    if m.precision_recall is not None:
        p = m.precision_recall
        out.append(f"  {'precision, recall':18}{p.precision:.4f}, {p.recall:.4f}")
    if m.spectral is not None:
        out.append(f"  {'spectral distance':18}{m.spectral.total:.4f}")
        out += _band_lines(m.spectral)
    return out + [f"  note: {n}" for n in m.notes]


def _band_lines(s: SpectralDistance) -> list[str]:
    rows = ["    frequency      power       distance"]
    rows += [f"    {b.low:.3f}-{b.high:.3f}  {b.decibels:+8.2f} dB  {b.distance:10.4f}" for b in s.bands]
    return rows


def as_dict(m: Metrics) -> dict[str, Any]:
    """For JSON. Precision and recall also under the fork's names for samples as first input."""
    d = asdict(m)
    if m.precision_recall is not None:
        p = m.precision_recall
        d["precision_recall"] = {
            "precision": p.precision,
            "recall": p.recall,
            "f_score": p.f_score,
            "torch_fidelity_fork_input1_samples": {"precision": p.recall, "recall": p.precision},
        }
    if m.fid is not None:
        d["fid_name"] = fid_name(m.count)
    return d


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


COLUMNS = (
    "time", "label", "count", "fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "spectral",
    "cfg", "weights", "method", "steps", "seed", "samples", "reference", "reference_count", "feature_layer", "record",
)  # fmt: skip


def check_table(path: Path) -> None:
    """Refuse, before any work, a file that is not a table of ours."""
    if path.exists() and path.stat().st_size:
        try:
            with open(path, newline="") as f:
                header = next(csv.reader(f), [])
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise MlxSfError(
                f"{path}: cannot be read as a table ({e}): name another file with {option('table')}"
            ) from None
        if tuple(header) != COLUMNS:
            raise MlxSfError(
                f"{path}: is no table of evaluations (its first line differs): name another with {option('table')}"
            )


def append_row(path: Path, m: Metrics, facts: Mapping[str, Any]) -> None:
    """Append one line to the CSV table, with a header if it is new."""
    values: dict[str, Any] = {"count": m.count, "reference_count": m.reference_count, "fid": m.fid, **facts}
    if m.inception_score is not None:
        values |= {"is_mean": m.inception_score.mean, "is_std": m.inception_score.std}
    if m.kid is not None:
        values |= {"kid_mean": m.kid.mean, "kid_std": m.kid.std}
    if m.precision_recall is not None:
        values |= {"precision": m.precision_recall.precision, "recall": m.precision_recall.recall}
    if m.spectral is not None:
        values["spectral"] = m.spectral.total
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as f:  # one write of one line: a kill leaves the table whole
        text = [",".join(COLUMNS) + "\n"] if new else []
        text.append(_csv_line([values.get(c) for c in COLUMNS]))
        f.write("".join(text))
        f.flush()
        os.fsync(f.fileno())


def _csv_line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(["" if v is None else v for v in values])
    return buffer.getvalue()


# ---- figures ---------------------------------------------------------------------------------------------------


def plot_sweep(path: Path, results: Sequence[tuple[float, str, Metrics]], name: str) -> bool:
    """FID and Inception Score over the guidance scale, a line per weight set: (cfg, weights, metrics). PNG."""
    results = [r for r in results if r[2].fid is not None or r[2].inception_score is not None]
    if not results:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    count = results[0][2].count
    for weights in dict.fromkeys(w for _, w, _ in results):
        of_set = [(c, m) for c, w, m in sorted(results, key=lambda r: r[0]) if w == weights]
        fids = [(c, m.fid) for c, m in of_set if m.fid is not None]
        scores = [(c, m.inception_score) for c, m in of_set if m.inception_score is not None]
        if fids:
            left.plot([c for c, _ in fids], [f for _, f in fids], "o-", label=weights)
        if scores:
            right.errorbar(
                [c for c, _ in scores], [s.mean for _, s in scores], [s.std for _, s in scores],
                fmt="o-", capsize=3, label=weights,
            )  # fmt: skip
    for axes, what in ((left, f"{fid_name(count)} (lower is better)"), (right, "Inception Score (higher is better)")):
        axes.set(xlabel="guidance scale cfg", title=what)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(title="weights")
    figure.suptitle(f"{name}, N = {count}")
    _save(figure, path)
    return True


def plot_spectrum(path: Path, results: Sequence[tuple[str, Metrics]]) -> bool:
    """Per band: power against the reference's in decibels, and the distance, beside each run's FID. PNG."""
    shown = [(label, m, m.spectral) for label, m in results if m.spectral is not None]
    if not shown:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, m, s in shown:
        middle = [(b.low + b.high) / 2 for b in s.bands]
        fid = f", {fid_name(m.count)} {m.fid:.2f}" if m.fid is not None else ""
        left.plot(middle, [b.decibels for b in s.bands], "o-", markersize=4, label=f"{label}{fid}")
        right.plot(middle, [b.distance for b in s.bands], "o-", markersize=4, label=f"{label}: total {s.total:.3f}")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="radial frequency (1 = highest)", ylabel="dB", title="power of the samples against the reference")
    right.set(xlabel="radial frequency (1 = highest)", title="spectral distance per band")
    right.set_yscale("symlog", linthresh=1e-3)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
