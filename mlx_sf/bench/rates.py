"""How fast this machine multiplies matrices, and how operations are timed."""

import time
from collections.abc import Callable

import mlx.core as mx

from ..lanes import all_threads_for_products


def best_seconds(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """Shortest of several timed calls after warming up; `run` must finish its work before it returns."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate(dtype: mx.Dtype, n: int | None = None) -> float:
    """FLOP/s of a square matrix product in MLX on the default device."""
    n = n or (2048 if mx.default_device() == mx.Device(mx.cpu) else 8192)
    a, b = (mx.random.normal((n, n), key=mx.random.key(k)).astype(dtype) for k in (0, 1))
    mx.eval(a, b)
    all_threads_for_products()
    return 2 * n**3 / best_seconds(lambda: mx.eval(a @ b))
