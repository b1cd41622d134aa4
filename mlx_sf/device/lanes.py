"""One batch on several CPU threads.

On a CPU everything that MLX does but matrix products runs on one thread, so a network that is split by batch over as
many threads as there are cores is faster where much is not products. Several streams in one evaluation would not do:
they are fed nearly one after another. Hence each lane is a thread of its own that evaluates its own graph. On GPUs,
and on macOS, where the BLAS shares its own units among all threads, there are no lanes and nothing changes.
"""

import itertools
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from . import blas

Task = Callable[[], Any]
_tracing = threading.Lock()  # MLX builds one graph at a time; evaluating runs side by side


def cores() -> int:
    """Threads that this process may use: OMP_NUM_THREADS, else the cores it may run on."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count() -> int:
    """The number of lanes: one per core on Linux without a GPU, else 1, which means none."""
    return cores() if sys.platform.startswith("linux") and mx.default_device() == mx.Device(mx.cpu) else 1


def run(tasks: list[Task]) -> list[Any]:
    """The evaluated results of `tasks`, each of which builds a graph of arrays; the first runs in this thread.

    Arrays that tasks share must be evaluated before. The list is emptied, so that arrays that only a task holds on to
    can be reused for its results. Matrix products get an equal share of the cores meanwhile.
    """
    blas.set_threads(max(1, cores() // len(tasks)))
    try:
        others = [_worker(i)(tasks.pop()) for i in range(len(tasks) - 1)]
        own = _evaluated(tasks)
        return [own, *(f.result() for f in reversed(others))]
    finally:
        blas.set_threads(cores())


def _evaluated(task: list[Task]) -> Any:
    with _tracing:
        result = task.pop()()
    mx.eval(result)
    return result


@cache
def _worker(index: int) -> Callable[[Task], "Future[Any]"]:
    """Thread `index`, made on first use. It never ends: MLX's streams belong to a thread and do not survive it."""
    inbox: queue.SimpleQueue[tuple[list[Task], Future[Any]]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            task, future = inbox.get()
            try:
                future.set_result(_evaluated(task))
            except BaseException as e:
                future.set_exception(e)
            del task, future

    def submit(task: Task) -> "Future[Any]":
        future: Future[Any] = Future()
        inbox.put(([task], future))
        return future

    threading.Thread(target=work, name=f"mlx-sf lane {index + 1}", daemon=True).start()
    return submit


def shares(size: int, parts: int) -> list[slice]:
    """`size` positions in at most `parts` slices of nearly equal length, none empty."""
    n = min(parts, size)
    bounds = [round(i * size / n) for i in range(n + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def split_batch(function: Callable[..., Any], uses: Any = ()) -> Callable[..., Any]:
    """function(z, t, *trees) with the batch split over the lanes and evaluated; itself where there are none.

    z is (B, ...); t may be shared by the batch; the trees' arrays have the batch first. The result is an array or a
    tuple of arrays with the batch first. `uses` are the arrays, or a function that gives them, that `function` refers
    to besides its arguments. Each image's result is the function's own, up to the rounding of other product shapes.
    Not for use inside a compiled or differentiated function.
    """
    if count() == 1:
        return function

    def run_split(z: mx.array, t: mx.array, *trees: Any) -> Any:
        mine = shares(len(z), count())
        if len(mine) < 2:
            return function(z, t, *trees)

        def part(s: slice) -> tuple[Any, ...]:
            return z[s], t[s] if t.size > 1 else t, *tree_map(lambda a: a[s], list(trees))

        parts = [part(s) for s in mine]
        mx.eval(parts, uses() if callable(uses) else uses)
        done = run([partial(function, *p) for p in parts])
        if isinstance(done[0], mx.array):
            return mx.concatenate(done)
        return tuple(mx.concatenate(list(results)) for results in zip(*done, strict=True))

    return run_split
