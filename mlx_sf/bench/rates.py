"""How fast this machine multiplies matrices, and how runs are timed: by turns, with medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..device import blas
from ..device.lanes import cores

Runs = dict[str, Callable[[], object]]


def alternate(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times in turn (A B A B) after one warm-up: slow minutes fall on all alike.

    A run must finish its work before it returns.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                taken[name].append(time.perf_counter() - start)
    return taken


def timing(name: str, seconds: list[float]) -> dict[str, Any]:
    """A figure's entries in a record: the median, and the fastest and slowest run."""
    return {
        f"{name}_seconds": statistics.median(seconds),
        f"{name}_spread": f"{min(seconds):.3g} to {max(seconds):.3g} s",
    }


def product_rate(dtype: mx.Dtype, n: int | None = None, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product in MLX on the default device: the fastest of `rounds`."""
    n = n or (2048 if mx.default_device() == mx.Device(mx.cpu) else 8192)
    a, b = (mx.random.normal((n, n), key=mx.random.key(k)).astype(dtype) for k in (0, 1))
    mx.eval(a, b)
    blas.set_threads(cores())
    return 2 * n**3 / min(alternate({"product": lambda: mx.eval(a @ b)}, rounds)["product"])
