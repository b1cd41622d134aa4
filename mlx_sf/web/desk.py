"""What the tabs share: the folders, the device with its line of requests, and who asked for what."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .device import Device, Job
from .files import Kept
from .runs import training_now
from .view import Viewer
from .worker import Frame, Loaded, Message, Task


@dataclass
class Desk:
    """One page's things. `close` ends what runs for it."""

    kept: Kept
    runs: Path
    evals: Path
    device: Device = field(default_factory=Device)
    viewer: Viewer = field(default_factory=Viewer)
    _jobs: dict[str, list[Job]] = field(default_factory=dict)

    def work(self, task: Task, session: str) -> Iterator[tuple[Job, Message | None]]:
        """Have a task done for somebody: the job with each of its messages, None while others have their turn.

        The job is stopped when nobody listens any more.
        """
        job = self.device.submit(task)
        jobs = self._jobs.setdefault(session, [])
        jobs.append(job)
        try:
            for message in job.messages():
                yield job, message
        finally:
            job.stop()
            jobs.remove(job)
            if not jobs:
                self._jobs.pop(session, None)

    def stop(self, session: str) -> int:
        """Stop what somebody asked for; how many tasks that were."""
        jobs = list(self._jobs.get(session, ()))
        for job in jobs:
            job.stop()
        return len(jobs)

    def stage(self, job: Job, message: Message | None) -> str:
        """What a task under way does at the moment, in words."""
        if message is None and (before := self.device.before(job)):
            return f"Waiting: {before} request{'s' * (before > 1)} before this one"
        if message is None:
            return "Opening the checkpoint"
        if isinstance(message, Loaded):
            return f"{message.name} is in memory, drawing begins"
        assert isinstance(message, Frame)
        return f"Step {message.done} of {message.total}, t = {message.t:.2f}"

    def others(self) -> str:
        """A warning where training runs on this machine at the same time."""
        busy = [f"{run.path.name} (process {run.training})" for run in training_now(self.runs)]
        if not busy:
            return ""
        return f"Training on the same device: {', '.join(busy)}. Drawing and training slow each other down."

    def close(self) -> None:
        self.device.close()
        self.viewer.close()
