"""Peak memory of sampling and training, each figure from a process of its own: what fits into a machine?

A sampling process loads a checkpoint file of made-up weights, as `mlx-sf sample` does, and draws one batch with
guidance. A training process takes three steps as `mlx-sf train` does; figures are those of the steps after the first,
when weights, two EMAs, two moments and gradients all exist and nothing else does.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import write_checkpoint
from ..checkpoints.config import Config
from ..checkpoints.load import load_model
from ..device.defaults import DTYPES, compile_by_default, dtype_name, limit_cache, peak_memory
from ..errors import MlxSfError
from ..formats.tensor_file import Entry
from ..models import architecture, parameter_shapes
from ..models.jit_sizes import model_config
from ..models.quantize import QuantizationConfig, quantized_entries
from ..sampling.generate import generate
from ..sampling.request import Request
from ..sampling.solvers import SampleConfig
from ..training.step import StepOptions
from .training import RepeatedStep


@dataclass(frozen=True)
class Cell:
    """One figure: `task` ("sample" or "train") of a network at a batch size.

    Sampling takes `steps` Heun steps in which every evaluation is guided, from a file with weights in float32 or, with
    `bits`, quantised. `grad_checkpoint` belongs to training.
    """

    task: str
    size: str
    img_size: int
    batch: int
    dtype: str = "float32"
    steps: int = 2
    bits: int | None = None
    grad_checkpoint: bool = False

    @property
    def label(self) -> str:
        extra = f", {self.bits} bits" if self.bits else ""
        extra += ", gradient checkpointing" if self.grad_checkpoint else ""
        return f"{self.task} {self.size} at {self.img_size}, batch {self.batch}, {self.dtype}{extra}"


def cells_of(
    tasks: Sequence[str],
    sizes: str,
    img_size: int,
    batches: str,
    train_batches: str,
    dtype: mx.Dtype,
    bits: str | None,
    steps: int,
) -> list[Cell]:
    """The cells of lists with commas: `sizes` of networks, `batches` of sampling, `train_batches` of training.

    Training is measured twice, with and without gradient checkpointing.
    """
    name, names, cells = dtype_name(dtype), [s.strip() for s in sizes.split(",")], []
    if "sample" in tasks:
        q = int(bits) if bits else None
        cells += [Cell("sample", s, img_size, b, name, steps, q) for s in names for b in _numbers(batches)]
    if "train" in tasks:
        trained = [(s, b, c) for s in names for b in _numbers(train_batches) for c in (False, True)]
        cells += [Cell("train", s, img_size, b, name, grad_checkpoint=c) for s, b, c in trained]
    return cells


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise MlxSfError(f"batch sizes {text!r}, want whole numbers from 1, with commas between")
    return values


def measure_memory(cells: Sequence[Cell], on_cell: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """Run each cell in a fresh process, one after another.

    Yields a record per cell: its fields; bytes `mlx_peak` (MLX's buffers, highest total), `process_peak` (resident),
    `weights` (of the network) and, for training, `state`; or `error` where it did not get through.
    """
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            path = _weights_file(Path(folder), cell) if cell.task == "sample" else None
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            command = [sys.executable, "-m", "mlx_sf.bench.memory", json.dumps(dataclasses.asdict(cell)), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            record: dict[str, Any] = {"what": cell.label, **dataclasses.asdict(cell)}
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
                yield record | {"error": lines[-1]}
            else:
                yield record | json.loads(done.stdout.splitlines()[-1])
            if on_cell is not None:
                on_cell()


def _weights_file(folder: Path, cell: Cell) -> Path:
    """A checkpoint of made-up weights, float32 or quantised; the last one is kept for the next cell."""
    path = folder / f"{cell.size.replace('/', '-')}-{cell.img_size}-{cell.bits}.safetensors"
    if path.exists():
        return path
    for old in folder.iterdir():
        old.unlink()
    q = QuantizationConfig(cell.bits) if cell.bits else None
    config = Config(model_config(cell.size, img_size=cell.img_size), weights=("ema1",), quantization=q)
    entries = [
        Entry(name, "float32", shape, partial(np.full, shape, 0.01, np.float32))
        for name, shape in parameter_shapes(config.model).items()
    ]
    write_checkpoint(path, quantized_entries(entries, q, architecture(config.model)) if q else entries, config)
    return path


# ------------------------------------------------------------------------------------- in the child process


def _run(cell: Cell, path: str) -> dict[str, int]:
    if cell.dtype not in DTYPES:
        raise MlxSfError(f"dtype {cell.dtype!r} is unknown, want {', '.join(DTYPES)}")
    limit_cache()
    return _sample(cell, path) if cell.task == "sample" else _train(cell)


def _sample(cell: Cell, path: str) -> dict[str, int]:
    model, config = load_model(path, dtype=DTYPES[cell.dtype])
    loading, weights = mx.get_peak_memory(), mx.get_active_memory()
    # the interval starts at 0, so that each evaluation is guided
    sample = SampleConfig("heun", cell.steps, 2.9, 0.0, 1.0)
    request = Request(tuple(i % 10 for i in range(cell.batch)), tuple(range(cell.batch)))
    for _, state in generate(model, config.flow, sample, request, cell.batch):
        mx.eval(state.z)
    peaks = peak_memory()
    return {"weights": weights, "loading": loading, "mlx_peak": peaks["mlx"], "process_peak": peaks["process"]}


def _train(cell: Cell) -> dict[str, int]:
    config = Config(model_config(cell.size, img_size=cell.img_size))
    options = StepOptions(dtype=DTYPES[cell.dtype], compile=compile_by_default(), grad_checkpoint=cell.grad_checkpoint)
    step = RepeatedStep(config, cell.batch, options)
    for _ in range(3):
        step()
        if step.number == 1:  # the averages begin as the weights themselves, in the same memory: not yet the real state
            first, state = mx.get_peak_memory(), mx.get_active_memory()
            mx.clear_cache()
            mx.reset_peak_memory()
    weights = 4 * sum(map(math.prod, parameter_shapes(config.model).values()))
    peaks = peak_memory()
    return {
        "weights": weights,
        "state": state,
        "first_step": first,
        "mlx_peak": peaks["mlx"],
        "process_peak": peaks["process"],
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(_run(Cell(**json.loads(sys.argv[1])), sys.argv[2])))
