"""What a run says about itself: lines of JSON, a plot of the loss, previews, trackers.

`metrics.jsonl` holds what the steps computed, equal to the last digit however often the run was interrupted;
`system.jsonl` what the machine did meanwhile (speed, memory, waiting).
"""

import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .config import Config, ModelConfig
from .errors import MlxSfError
from .files import replacing
from .image import grid, save_png
from .model import JiT
from .sample import sample_states, seeded_noise, to_uint8
from .train import Weights, bound


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

    lines = read_lines(run / "metrics.jsonl")
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


def preview(
    path: Path, model: JiT, config: Config, sets: Mapping[str, Weights], count: int, steps: int, seed: int
) -> None:
    """A grid with one row of samples per weight set, from the same noise and classes every time."""
    labels = mx.array([i % config.model.num_classes for i in range(count)])
    noise = seeded_noise([seed + i for i in range(count)], config.model.img_size)
    config = config.replace(steps=steps)
    pictures: list[np.ndarray] = []
    for weights in sets.values():
        with bound(model, weights):
            z = noise
            for state in sample_states(model, config, noise, labels):
                z = state.z
                mx.eval(z)
        pictures += list(to_uint8(z))
    metadata = {"rows": list(sets), "steps": steps, "cfg": config.sample.cfg, "seed": seed}
    save_png(path, grid(pictures, columns=count), metadata)


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


def tracker(name: str | None, run: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of `--report-to`; `MlxSfError` with the remedy where its package is missing."""
    if name is None:
        return None
    package = {"wandb": "wandb", "tensorboard": "tensorboardX"}[name]
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise MlxSfError(f"--report-to {name}: needs the package {package}: pip install {package}") from None
    return _Wandb(module, run, settings) if name == "wandb" else _TensorBoard(module, run)


def forward_flops(c: ModelConfig) -> int:
    """Floating-point operations of one forward pass for one image: matrix products, a multiply-add counted as two."""
    N, L, D = c.grid_size**2, c.in_context_len, c.hidden_size
    tokens = [N + (L if L and i >= c.in_context_start else 0) for i in range(c.depth)]
    per_token = 3 * D * D + D * D + 3 * D * c.mlp_hidden
    blocks = sum(T * per_token + 2 * T * T * D for T in tokens) + c.depth * 6 * D * D
    ends = N * (3 * c.patch_size**2 * c.bottleneck_dim + c.bottleneck_dim * D + D * c.patch_size**2 * c.out_channels)
    conditioning = 256 * D + D * D + 2 * D * D
    forcing = 3 * 4 * c.img_size**2 * c.window_size if c.spectral_forcing else 0
    return 2 * (blocks + ends + conditioning + forcing)


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


def duration(seconds: float) -> str:
    """5400 -> "1 h 30 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def columns(rows: Sequence[tuple[str, str]]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
