"""The process that draws: tasks come in through a pipe, states and results go out.

It is apart from the page because a device can end its process (a GPU out of memory does), and the page must not end
with it. Loaded checkpoints stay for the next task.
"""

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, size_on_disk
from ..checkpoints.load import demo_checkpoint
from ..checkpoints.pipeline import Pipeline, default_batch, load, request_for
from ..checkpoints.resolve import resolve
from ..common.figures import grid
from ..common.files import writable_folder
from ..common.text import first_line
from ..device.defaults import limit_cache, total_memory
from ..errors import MlxSfError
from ..formats.png import save_png
from ..models import Asked
from ..sampling.output import finite_images
from .files import new_name

DEMO = "the demo model"  # what it goes by on the page and in its pictures
_KEPT = 2  # loaded checkpoints: two can be compared without reading either again
_EVERY = 0.1  # seconds between states that are shown


@dataclass(frozen=True)
class Weights:
    """What draws: a checkpoint by name ("" is the demo model), its weight set ("": its own choice), an adapter."""

    checkpoint: str = ""
    weights: str = ""
    adapter: str = ""
    adapter_scale: float = 1.0

    def load(self) -> Pipeline:
        adapters = [self.adapter] if self.adapter else []
        return load(
            self.checkpoint or None,
            weights=self.weights or None,
            lora_paths=adapters,
            lora_scales=[self.adapter_scale] * len(adapters),
        )

    @property
    def told(self) -> str:
        """The name that its pictures carry; of a path on this machine that is not below the working folder, the end."""
        if not self.checkpoint:
            return DEMO
        path = Path(self.checkpoint)
        return path.name if path.is_absolute() or self.checkpoint.startswith("~") else self.checkpoint


@dataclass(frozen=True)
class Drawing:
    """Pictures to draw. `asked`: classes or prompts, () for all classes; `folder`: where they are kept, "" for none."""

    weights: Weights
    asked: tuple[Asked, ...] = ()
    num_images: int | None = None
    seed: int = 0
    solver: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""


@dataclass(frozen=True)
class Opening:
    """A checkpoint to fetch and convert, as far as that is needed."""

    checkpoint: str


Task = Drawing | Opening


@dataclass(frozen=True)
class Loaded:
    """The checkpoint is in memory, drawing begins."""

    name: str


@dataclass(frozen=True)
class Frame:
    """A state: `done` of `total` steps of all pictures; sheets of the batch's states and of what they imply."""

    done: int
    total: int
    left: float
    t: float
    state: np.ndarray
    implied: np.ndarray


@dataclass(frozen=True)
class Finished:
    """The end of a task. What was drawn is in `files` where it is kept, else in `pictures`.

    `stopped`: before all was there. `path`: of a checkpoint that was to be opened.
    """

    pictures: tuple[np.ndarray, ...] = ()
    files: tuple[str, ...] = ()
    stopped: bool = False
    path: str = ""


@dataclass(frozen=True)
class Failed:
    """The end of a task that could not be done, in one line."""

    message: str


Message = Loaded | Frame | Finished | Failed


def serve(pipe: Connection, stop: Any) -> None:
    """Do tasks until the pipe ends. `stop` is an event that ends the task at hand after the step that is under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the page ends it
    limit_cache()
    worker = Worker(stop.is_set)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            pipe.send(_answer(worker, task, pipe.send))


def _answer(worker: "Worker", task: Task, send: Callable[[Message], None]) -> Message:
    try:
        return worker.open(task) if isinstance(task, Opening) else worker.draw(task, send)
    except MlxSfError as e:
        return Failed(str(e))
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            raise
        return Failed(first_line(e))
    except Exception as e:
        traceback.print_exc(file=sys.stderr)
        return Failed(f"drawing failed: {type(e).__name__}: {first_line(e)}")


class Worker:
    """Loaded checkpoints, and what can be done with them."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self._loaded: dict[tuple[Weights, str, int], Pipeline] = {}

    def open(self, task: Opening) -> Finished:
        return Finished(path=str(resolve(task.checkpoint)))

    def pipeline(self, weights: Weights) -> Pipeline:
        """The checkpoint, read again where its file has changed: a run's newest one moves on.

        Two stay loaded, so that a comparison reads neither twice; one alone where both would fill a quarter of memory.
        """
        path = resolve(weights.checkpoint) if weights.checkpoint else demo_checkpoint()
        key = (weights, str(path), path.stat().st_mtime_ns)
        found = self._loaded.pop(key, None)
        if found is None:
            size = size_on_disk(path) + sum(size_on_disk(p.path) for p in self._loaded.values() if p.path.exists())
            if size > total_memory() / 4:
                self._loaded.clear()
            found = weights.load()
        self._loaded[key] = found
        while len(self._loaded) > _KEPT:
            del self._loaded[next(iter(self._loaded))]
        return found

    def draw(self, task: Drawing, send: Callable[[Message], None]) -> Finished:
        # what is wrong with a request is found before the weights are read
        if task.weights.checkpoint:
            config = Checkpoint(resolve(task.weights.checkpoint)).config
            request_for(config, task.asked or None, task.num_images, task.seed)
        pipeline = self.pipeline(task.weights).with_solver(dict(task.solver))
        send(Loaded(pipeline.config.name))
        request = request_for(pipeline.config, task.asked or None, task.num_images, task.seed)
        folder = writable_folder(task.folder) if task.folder else None
        batch = default_batch(pipeline.config)
        steps, stamp = pipeline.config.sample.steps, time.strftime("%Y%m%d-%H%M%S")
        total = steps * -(-len(request) // batch)
        pictures: list[np.ndarray] = []
        files: list[str] = []
        start = sent = time.monotonic()
        for done, (numbers, state) in enumerate(pipeline.generate(request, batch), start=1):
            now, last = time.monotonic(), state.step == state.steps
            if last:
                pictures += list(pipeline.to_uint8(finite_images(state.z, numbers)))
                if folder is not None:
                    for i in numbers:
                        path = new_name(folder, stamp, i)
                        facts = {**pipeline.facts(request, i), "loaded_from": task.weights.told}
                        save_png(path, pictures[i], facts)
                        files.append(str(path))
            if last or done == 1 or now - sent >= _EVERY:
                sent = now
                left = (now - start) / done * (total - done)
                sheets = (grid(list(pipeline.to_uint8(a))) for a in (state.z, state.x))
                send(Frame(done, total, left, state.t, *sheets))
            if self._stopped() and done < total:
                break
        shown = () if folder is not None else tuple(pictures)
        return Finished(shown, tuple(files), stopped=done < total)
