"""The whole experiment: what is missing is run, by as many processes as one likes; then tables and figures."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sf import __version__
from mlx_sf.common.files import writable_folder
from mlx_sf.common.progress import tell
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import save_png

from . import results
from .plan import Plan, Run
from .runs import Paused, Stop, Store, execute, never

ROOT = Path(__file__).resolve().parents[2]
Executor = Callable[[Plan, Run, Store, Stop], tuple[dict[str, Any], np.ndarray]]


class Stopper:
    """stop() -> whether to stop: at `until` (`time.time()`), when asked to, or when the process `parent` is gone."""

    def __init__(self, until: float | None = None, parent: int | None = None) -> None:
        self.until, self.parent, self.asked = until, parent, False

    def __call__(self) -> bool:
        late = self.until is not None and time.time() >= self.until
        return self.asked or late or (self.parent is not None and os.getppid() != self.parent)

    def ask(self, *_: object) -> None:
        """As a handler of signals: the step that runs is finished and its state is written."""
        self.asked = True

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether a lock was free and is now held; it goes with the process, however that ends."""
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def work(
    plan: Plan,
    folder: Path,
    stop: Stop = never,
    every: float = 120.0,
    limit: int | None = None,
    execute: Executor = execute,
) -> int:
    """Do runs that are neither finished nor held by another process, in the plan's order, at most `limit`.

    Returns how many were finished. A run that was stopped or killed goes on from its newest checkpoint, which is
    written every `every` seconds.
    """
    state = writable_folder(folder / "state")
    writable_folder(folder / "samples")
    finished = 0
    while not stop() and (limit is None or finished < limit):
        done = results.read(folder, plan)
        for run in plan.runs():
            if run in done:
                continue
            with claimed(state / f"{run.name}.lock") as mine:
                # another process may have finished it since the records were read
                if not mine or results.path_of(folder, run).exists():
                    continue
                try:
                    _one(plan, folder, run, Store(state / f"{run.name}.safetensors", every), stop, execute)
                except Paused:
                    tell(f"captions: {run}: stopped, the same command goes on from here")
                    return finished
                finished += 1
                break
        else:
            break
    return finished


def _one(plan: Plan, folder: Path, run: Run, store: Store, stop: Stop, execute: Executor) -> None:
    tell(f"captions: {run}: begins" if not store.path.exists() else f"captions: {run}: goes on")
    record, strip = execute(plan, run, store, stop)
    if not results.complete(record, plan):
        raise MlxSfError(f"captions: {run} ended with numbers that are not finite: lower the learning rate")
    save_png(folder / "samples" / f"{run.name}.png", strip)  # before the record, which says that all is there
    results.write(folder, plan, run, {**record, "made": made()})
    store.path.unlink(missing_ok=True)
    correct = [np.mean(v["correct"]) for v in record["scores"]["seen"]]
    tell(f"captions: {run}: done, {100 * float(np.mean(correct)):.0f} % of seen prompts right")


def made() -> dict[str, Any]:
    """When, where and with what a result was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "mlx_sf": __version__,
        "mlx": importlib.metadata.version("mlx"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def run_workers(arguments: list[str], workers: int, stop: Stopper) -> None:
    """Run this program with `arguments` in `workers` processes, each with its share of the cores, and wait for them.

    Where this process is asked to stop, so are they. Raises `MlxSfError` where one of them failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // workers))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    command = [sys.executable, "-m", "scripts.captions", "run", *arguments, "--parent", str(os.getpid())]
    processes = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}) for _ in range(workers)]
    told = False
    while any(p.poll() is None for p in processes):
        if stop.asked and not told:
            told = True
            for p in processes:
                p.terminate()
        time.sleep(0.2)
    failed = sum(p.returncode != 0 for p in processes)
    if failed:
        raise MlxSfError(f"captions: {failed} of {workers} workers failed, as they said above")
