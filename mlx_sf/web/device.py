"""The one device and whose turn it is: requests wait in line, each is done by the drawing process.

One at a time draws, in the order of asking. The drawing process is started again after it ended, however it did.
"""

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..errors import MlxSfError
from .worker import Failed, Finished, Loaded, Message, Task, serve

_POLL = 0.05  # seconds between looks at the pipe, and so the delay of a stop
_GRACE = 3.0  # seconds that the process has to end by itself


class Job:
    """A task in line or under way: its newest message, and `stop`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._latest: Message | None = None
        self._count = 0
        self._begun = False

    def stop(self) -> None:
        """End it: in line at once, under way after the step that is being computed."""
        with self._news:
            self._stop.set()
            waits = not self._begun
        if waits:
            self.put(Finished(stopped=True))

    def begin(self) -> bool:
        """Its turn has come; False where it was stopped before."""
        with self._news:
            self._begun = not self.stopped
            return self._begun

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def over(self) -> bool:
        return isinstance(self._latest, Finished | Failed)

    def put(self, message: Message) -> None:
        with self._news:
            if self.over:
                return
            self._latest, self._count = message, self._count + 1
            self._news.notify_all()

    def messages(self, every: float = 0.5) -> Iterator[Message | None]:
        """The newest message each time there is one, to the last; older ones are left out. None: still in line."""
        seen = 0
        while True:
            with self._news:
                if self._count == seen:
                    self._news.wait(every)
                fresh, seen, latest = self._count > seen, self._count, self._latest
            if latest is None or fresh:
                yield latest
            if isinstance(latest, Finished | Failed):
                return


class Device:
    """The line of requests and the process that works them off. `close` ends both."""

    def __init__(self) -> None:
        self._line: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._waiting: list[Job] = []
        self._guard = threading.Lock()
        self._process: Any = None
        self._pipe: Any = None
        self._context = multiprocessing.get_context("spawn")
        self._stop: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> Job:
        """Put a task in line."""
        job = Job(task)
        with self._guard:
            if self._closed:
                raise MlxSfError("the page is being closed")
            self._waiting.append(job)
        self._line.put(partial(self._do, job))
        return job

    def warm(self) -> None:
        """Start the drawing process before the first task wants it."""
        self._line.put(self._begin)

    def before(self, job: Job) -> int:
        """How many requests have their turn before this one."""
        with self._guard:
            return self._waiting.index(job) if job in self._waiting else 0

    @property
    def process_id(self) -> int | None:
        """Of the drawing process, while there is one."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def close(self) -> None:
        """End the drawing process; what is under way or in line fails."""
        with self._guard:
            self._closed = True
            for job in self._waiting:
                job.stop()
        self._line.put(None)
        self._thread.join(_GRACE)
        self._end()

    def _serve(self) -> None:
        while (turn := self._line.get()) is not None:
            turn()

    def _do(self, job: Job) -> None:
        try:
            self._work(job)
        except Exception as e:  # a line that nobody works off would be a dead page
            job.put(Failed(f"drawing failed: {type(e).__name__}: {e}"))
        with self._guard:
            self._waiting.remove(job)

    def _work(self, job: Job) -> None:
        if not job.begin():
            return
        self._begin()
        self._stop.clear()
        try:
            self._pipe.send(job.task)
            loading = True
            while not job.over:
                if self._pipe.poll(_POLL):
                    message = self._pipe.recv()
                    loading = loading and not isinstance(message, Loaded)
                    job.put(message)
                elif not self._process.is_alive():
                    raise EOFError
                if job.stopped and not job.over:
                    if loading:  # a download or a conversion: what is there of it is used the next time
                        self._end()
                        job.put(Finished(stopped=True))
                    else:
                        self._stop.set()
        except (EOFError, OSError):
            job.put(Failed(self._obituary()))
            self._end()

    def _begin(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self._end()
        self._pipe, theirs = self._context.Pipe()
        self._stop = self._context.Event()
        self._process = self._context.Process(
            target=serve, args=(theirs, self._stop), name="mlx-sf drawing", daemon=True
        )
        self._process.start()
        theirs.close()

    def _obituary(self) -> str:
        self._process.join(_GRACE)
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        return (
            f"the drawing process ended ({how}), most likely for want of memory: draw fewer or smaller pictures; "
            "the next request starts it again"
        )

    def _end(self) -> None:
        if self._process is not None:
            if self._process.is_alive():
                self._process.terminate()
                self._process.join(_GRACE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(_GRACE)
            with contextlib.suppress(OSError):
                self._pipe.close()
        self._process = None
