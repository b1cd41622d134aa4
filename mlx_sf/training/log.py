"""What a run says about itself: lines of JSON, a plot of the loss, trackers.

`metrics.jsonl` holds what the steps computed, equal to the last digit however often the run was interrupted;
`system.jsonl` what the machine did meanwhile (speed, memory, waiting).
"""

import importlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..common.files import replacing
from ..errors import MlxSfError, option

METRICS = "metrics.jsonl"


class JsonLines:
    """An append-only file of JSON objects with a "step"; opening it cuts off what came after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_loss(run: Path) -> None:
    """`loss.png` from `metrics.jsonl`."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    lines = read_lines(run / METRICS)
    if len(lines) < 2:
        return
    steps, losses = ([line[k] for line in lines] for k in ("step", "loss"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    width = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"mean of {width} lines")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=run.name)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(run / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class Tracker(Protocol):
    """Where metrics can go besides the run's folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    def __init__(self, wandb: Any, run: Path, settings: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project="mlx-sf", name=run.name, dir=str(run), id=run.name, resume="allow", config=settings
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, module: Any, run: Path) -> None:
        self._writer = module.SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def tracker(name: str, run: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of this name, None for ""; `MlxSfError` with the remedy where its package is missing."""
    if not name:
        return None
    package = {"wandb": "wandb", "tensorboard": "tensorboardX"}[name]
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise MlxSfError(f"{option('report_to')} {name}: needs the package {package}: pip install {package}") from None
    return _Wandb(module, run, settings) if name == "wandb" else _TensorBoard(module, run)


class RunLog:
    """The run's two files of metrics and its tracker, cut off after `step`; a context manager."""

    def __init__(self, run: Path, step: int, report_to: str, options: Any) -> None:
        self._tracker = tracker(report_to, run, asdict(options))
        self._metrics, self._system = (JsonLines(run / f, step) for f in (METRICS, "system.jsonl"))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self._metrics, self._system, self._tracker):
            if part is not None:
                part.close()

    def write(self, metrics: Mapping[str, Any], system: Mapping[str, Any]) -> None:
        self._metrics.write(metrics)
        self._system.write(system)
        if self._tracker is not None:
            self._tracker.log(metrics["step"], {**metrics, **system})


class Speed:
    """Throughput, share of time spent waiting for data, and memory, since the last `line`."""

    def __init__(self) -> None:
        self._start, self._wait, self._images = time.perf_counter(), 0.0, 0

    def count(self, images: int) -> None:
        self._images += images

    def line(self, step: int, wait_seconds: float) -> dict[str, Any]:
        now = time.perf_counter()
        seconds, waited, images = now - self._start, wait_seconds - self._wait, self._images
        self._start, self._wait, self._images = now, wait_seconds, 0
        return {
            "step": step,
            "images_per_second": round(images / seconds, 3),
            "data_wait_share": round(waited / seconds, 4),
            "active_gb": round(mx.get_active_memory() / 1e9, 3),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 3),
            "cache_gb": round(mx.get_cache_memory() / 1e9, 3),
            "time": round(time.time(), 1),
        }
