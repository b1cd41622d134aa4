"""A whole training run: build or continue it, step, log, save, preview; stop cleanly at any moment."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import mlx.core as mx

from . import __version__, device, lanes, report
from .checkpoint import Checkpoint, resolve, step_files
from .config import Config
from .data import Source, fingerprint, open_source
from .distributed import World
from .ema import ema_decay, initial_share
from .errors import MlxSfError
from .init import adapt
from .loader import Batch, Loader, steps_per_epoch
from .model import JiT
from .optim import AdamW, learning_rate
from .progress import Progress
from .run import Position, RunFolder
from .settings import Settings, apply_base, checkpoint_config, image_geometry, typed_options
from .settings import resolve as resolve_settings
from .train import SETS, Arrays, StepOptions, TrainStep, draws, initial_arrays, trainable

Say = Callable[[str], None]
T = TypeVar("T")
_PLOT_SECONDS = 60.0  # between redrawings of the loss


@dataclass
class Plan:
    """Everything decided before the first step."""

    settings: Settings
    folder: RunFolder
    source: Source
    config: Config
    continuing: bool
    notes: list[str]


@dataclass(frozen=True)
class Outcome:
    step: int
    finished: bool
    checkpoint: Path | None


def _known(value: T | None) -> T:
    """An option that `resolve` has filled in."""
    assert value is not None
    return value


def plan(given: Mapping[str, Any], resume: str | None = None) -> Plan:
    """From the options that were given to everything a run needs; nothing is written yet.

    `resume` names the run to continue; without it the run of the given (or derived) name is continued if it exists.
    """
    given = typed_options(given)
    folder = RunFolder.existing(resume) if resume is not None else RunFolder(_run_path(given))
    continuing = folder.started()
    config, stored = (folder.read_model_config(), folder.read_config()[1]) if continuing else (None, "")
    base = None
    if continuing:
        settings = folder.continued(given)
    elif "init" in given:
        base = Checkpoint(resolve(given["init"]))
        base.require_floats()
        settings = Settings(**apply_base(given, base.config))
    else:
        settings = Settings(**given)
    size = image_geometry(settings)[1]
    source = _open(settings, size)
    if continuing and fingerprint(source) != stored:
        raise MlxSfError(
            f"{folder.path}: its data has changed ({source.describe()}): restore it, or start a new run with --name"
        )
    settings = resolve_settings(settings, steps_per_epoch(len(source), settings.batch_size))
    settings = settings.replace(img_size=size, data=_absolute(settings.data))
    notes = [f"data: {source.describe()}"]
    if len(source) < settings.batch_size:
        notes.append(f"note: {len(source)} pictures fill a batch of {settings.batch_size} only by repeating")
    if config is None:
        config = checkpoint_config(settings, source.class_names, base.config if base else None)
        config = config.replace(provenance={"trained_by": f"mlx-sf {__version__}", "data": source.describe()})
    return Plan(settings, folder, source, config.replace(cfg=settings.cfg), continuing, notes)


def shared_plan(given: Mapping[str, Any], resume: str | None, world: World) -> Plan:
    """`plan` on rank 0, its decisions on every rank; each opens the data, which must be the same, by itself."""
    if world.size == 1:
        return plan(given, resume)
    if world.main:
        try:
            p = plan(given, resume)
        except (MlxSfError, OSError):
            world.share(None)  # the others must not wait for a plan that never comes
            raise
        decisions = [dataclasses.asdict(p.settings), p.config.to_json(), p.continuing, str(p.folder.path)]
        world.share([*decisions, fingerprint(p.source)])
        return p
    decided = world.share(None)
    if decided is None:
        sys.exit(1)  # rank 0 says why
    s, config = Settings(**decided[0]), Config.from_json(decided[1])
    source = _open(s, config.model.img_size)
    if fingerprint(source) != decided[4]:
        raise MlxSfError(f"process {world.rank}: {source.describe()} is not the data of process 0: copy it over")
    return Plan(s, RunFolder(decided[3]), source, config, decided[2], [])


def _run_path(given: Mapping[str, Any]) -> Path:
    """The folder of a run that is not named by --resume: --name, or a name from the model and the data."""
    name = given.get("name")
    if name is None:
        network = Path(given["init"]).stem if "init" in given else str(given.get("size", "small")).replace("/", "-")
        patch = f"-{given['patch']}" if "patch" in given else ""
        data = Path(given["data"]).name if "data" in given else "scenes"
        name = f"{network}{patch}-{data or 'data'}" + ("-vanilla" if given.get("vanilla") else "")
    elif not name or Path(name).name != name:
        raise MlxSfError(f"--name is {name!r}, want a plain name: the folder it lies in is --output")
    return Path(given.get("output", "runs")) / name


def _absolute(data: str | None) -> str | None:
    """Paths are stored absolute, so that a run can be continued from elsewhere; Hub names stay."""
    return str(Path(data).expanduser().resolve()) if data and Path(data).expanduser().exists() else data


def _open(s: Settings, size: int) -> Source:
    return open_source(
        s.data,
        size,
        decode=s.decode,
        split=s.split,
        image_column=s.image_column,
        label_column=s.label_column,
        streaming=s.streaming,
        epoch_size=s.epoch_size,
        num_classes=s.num_classes,
        cache=s.cache,
        seed=s.seed,
    )


class Trainer:
    """A planned run in memory: network, state, data, step. `fit` trains it, `dry_run` only measures."""

    def __init__(self, p: Plan, world: World) -> None:
        s = self.settings = p.settings
        self.plan, self.world, self.config = p, world, p.config
        parts = s.accumulate * world.size
        if s.batch_size % parts:
            raise MlxSfError(f"--batch-size is {s.batch_size}, want a multiple of {parts}, micro-batches x processes")
        self.model = JiT(p.config.model, mx.random.key(s.seed))
        self.fixed = {"pos_embed": self.model.pos_embed}
        self.loader = Loader(p.source, s.batch_size, s.seed, s.flip, s.workers, world.rank, world.size)
        options = StepOptions(
            optimizer=AdamW(s.beta1, s.beta2, weight_decay=s.weight_decay),
            clip_grad=s.clip_grad,
            dtype=device.pick_dtype(s.dtype),
            accumulate=s.accumulate,
            grad_checkpoint=s.grad_checkpoint,
            compile=bool(s.compile),
            world=world.size,
            lanes=lanes.count(),
        )
        self.step = TrainStep(self.model, p.config.flow, options)
        self.dropout = s.attn_dropout > 0 or s.proj_dropout > 0
        self.arrays: Arrays = {}
        self.position = Position()

    def start(self) -> None:
        """Initial state: random weights, or those of --init."""
        s = self.settings
        weights = trainable(self.model)
        if s.init and self.world.main:  # the others get their state from rank 0
            weights, told = adapt(Checkpoint(resolve(s.init)), s.init_weights, weights, self.config)
            self.plan.notes += told
        self.arrays, self.position = initial_arrays(weights), Position()

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        s, per_epoch = self.settings, self.loader.steps_per_epoch
        peak, warmup, epochs = _known(s.lr), _known(s.warmup_epochs), _known(s.steps) / per_epoch
        return learning_rate(step / per_epoch, peak, warmup, epochs, s.lr_schedule, s.min_lr)

    def decays(self) -> tuple[float, float]:
        return _known(self.settings.ema_decay1), _known(self.settings.ema_decay2)

    def take(self, batch: Batch) -> tuple[float, float | None]:
        """One step on a batch: the state moves on; loss and gradient norm. `MlxSfError` if the loss is not finite."""
        s, number = self.settings, batch.step + 1
        local = self.loader.local
        numbers = draws(s.seed, batch.step, s.batch_size, local, self.config.model.img_size, self.dropout)
        d1, d2 = (ema_decay(d, number, bool(s.ema_warmup)) for d in self.decays())
        self.arrays, loss, norm = self.step(
            self.arrays, batch.images, batch.labels, numbers, self.rate(batch.step), number, (d1, d2)
        )
        mx.eval(self.arrays, loss, norm)  # the only evaluation of a step: all of its state
        value: float = loss.item()  # type: ignore[assignment]
        if not math.isfinite(value):
            raise MlxSfError(
                f"{self.plan.folder.path}: the loss is {value} at step {number}: stopped; {self.plan.folder.advice()}"
            )
        self.position.step = number
        self.position.window.append(value)
        return value, None if norm is None else norm.item()  # type: ignore[return-value]

    def metrics(self, norm: float | None) -> dict[str, Any]:
        """The line of metrics.jsonl for the window that ends here; starts the next window."""
        s, n, window = self.settings, self.position.step, self.position.window
        shares = [initial_share(d, n, bool(s.ema_warmup)) for d in self.decays()]
        line: dict[str, Any] = {
            "step": n,
            "epoch": round(n / self.loader.steps_per_epoch, 4),
            "images": n * s.batch_size,
            "loss": math.fsum(window) / len(window),
            "lr": self.rate(n - 1),
            "ema1_initial_share": shares[0],
            "ema2_initial_share": shares[1],
        }
        if norm is not None:
            line["grad_norm"] = norm
        window.clear()
        return line


def fit(p: Plan, say: Say, world: World | None = None) -> Outcome:
    """Train until the planned number of steps, or until Ctrl-C or SIGTERM, which save first.

    Under `mlx.launch` every process calls this with the same plan; rank 0 alone reads and writes the run's folder.
    """
    world = world or World()
    with p.folder.locked() if world.main else contextlib.nullcontext():
        trainer = Trainer(p, world)
        loaded = p.folder.load(p.config) if p.continuing and world.main else None
        if loaded is None:
            trainer.start()
        else:
            trainer.arrays, trainer.position = loaded
        trainer.arrays = world.share_arrays(trainer.arrays)
        trainer.position = Position(**world.share(dataclasses.asdict(trainer.position)))
        if world.main:
            p.folder.write_config(p.settings, p.config, fingerprint(p.source))
        return _Run(trainer, say).train()


class _Run:
    """The loop of a run and, on rank 0, everything that it writes."""

    def __init__(self, trainer: Trainer, say: Say) -> None:
        self.trainer, self.say = trainer, say
        self.settings, self.folder = trainer.settings, trainer.plan.folder
        self.named_bad = 0
        self.saved = self.plotted = time.monotonic()

    def train(self) -> Outcome:
        t, s, path = self.trainer, self.settings, self.folder.path
        steps, main = _known(s.steps), t.world.main
        for note in t.plan.notes if main else []:
            self.say(note)
        if t.position.step and main:
            self.say(f"{path}: continues at step {t.position.step} of {steps}")
        log = _Log(self.folder.path, t.position.step, s) if main else None
        speed, stop = report.Speed(), False
        batches = t.loader.batches(t.position.step)
        progress = Progress(steps - t.position.step, f"training {path}", "steps") if main else None
        try:
            with _signals() as stopped, progress or contextlib.nullcontext():
                while t.position.step < steps and not stop:
                    loss, norm = t.take(next(batches))
                    n = t.position.step
                    speed.count(s.batch_size)
                    if progress:
                        progress.note(f"loss {loss:.4f}")
                        progress.update()
                    if n % s.log_every == 0 or n == steps:
                        line = t.metrics(norm)
                        if log:
                            log.write(line, speed.line(n, t.loader.wait_seconds))
                    stop = t.world.any(bool(stopped))
                    if main and (n % s.save_every == 0 or n == steps or stop or self.overdue()):
                        self.save()
                    if main and s.preview_every and (n % s.preview_every == 0 or n == steps) and not stop:
                        self.preview()
        finally:
            batches.close()
            if log:
                log.close()
        if main:
            self.plot()
        return self.outcome()

    def overdue(self) -> bool:
        """Whether the last save is so long ago that a crash would hurt. When a run saves never changes its results."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved

    def save(self) -> None:
        t = self.trainer
        path = self.folder.save(t.arrays, t.fixed, t.config, t.position, self.settings.keep)
        self.saved = time.monotonic()
        lines = report.read_lines(self.folder.path / "metrics.jsonl")
        loss = f"loss {lines[-1]['loss']:.4f}, " if lines else ""
        share = initial_share(t.decays()[0], t.position.step, bool(self.settings.ema_warmup))
        self.say(f"step {t.position.step}: {loss}saved {path} (ema1 still holds {share:.1%} of the initial weights)")
        for index, reason in list(t.loader.bad.items())[self.named_bad :][:10]:
            self.say(f"could not read {t.loader.source.name(index)}: {reason}")
        self.named_bad = len(t.loader.bad)
        if time.monotonic() - self.plotted > _PLOT_SECONDS:
            self.plot()

    def plot(self) -> None:
        report.plot_loss(self.folder.path)
        self.plotted = time.monotonic()

    def preview(self) -> None:
        t, s = self.trainer, self.settings
        path = self.folder.path / "previews" / f"{t.position.step:08d}.png"
        sets = {name: t.arrays[name] for name in SETS}
        report.preview(path, t.model, t.config, sets, s.preview_images, s.preview_steps, s.seed)
        self.say(f"step {t.position.step}: preview {path} (rows: {', '.join(SETS)})")

    def outcome(self) -> Outcome:
        files = step_files(self.folder.path)
        return Outcome(
            self.trainer.position.step,
            self.trainer.position.step >= _known(self.settings.steps),
            files[-1][1] if files else None,
        )


class _Log:
    """The run's two files of metrics and the tracker."""

    def __init__(self, run: Path, step: int, s: Settings) -> None:
        self.tracker = report.tracker(s.report_to, run, dataclasses.asdict(s))
        self.metrics, self.system = (report.JsonLines(run / f, step) for f in ("metrics.jsonl", "system.jsonl"))

    def write(self, metrics: dict[str, Any], system: dict[str, Any]) -> None:
        self.metrics.write(metrics)
        self.system.write(system)
        if self.tracker:
            self.tracker.log(metrics["step"], {**metrics, **system})

    def close(self) -> None:
        self.metrics.close()
        self.system.close()
        if self.tracker:
            self.tracker.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM makes non-empty; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = [(n, signal.signal(n, note)) for n in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # not the main thread: signals belong to someone else
        yield received
        return
    try:
        yield received
    finally:
        for n, handler in before:
            signal.signal(n, handler)


def dry_run(p: Plan) -> str:
    """What the run would need, from a few real steps; nothing is written."""
    trainer = Trainer(p, World())
    trainer.start()
    s, c = p.settings, p.config.model
    mx.reset_peak_memory()
    batches = trainer.loader.batches(0)
    times = []
    for _ in range(4 if s.compile else 3):  # the first step warms up
        started = time.perf_counter()
        trainer.take(next(batches))
        times.append(time.perf_counter() - started)
    batches.close()
    step = min(times[1:])
    steps = _known(s.steps)
    epochs = steps / trainer.loader.steps_per_epoch
    parameters = sum(w.size for w in trainer.arrays["model"].values()) + c.grid_size**2 * c.hidden_size
    flops = report.forward_flops(c)
    return report.columns(
        [
            ("network", f"{p.config.name}, {c.img_size} x {c.img_size} pixels, {len(p.source.class_names)} class(es)"),
            ("data", p.source.describe()),
            ("parameters", f"{parameters / 1e6:.2f} million"),
            ("forward pass", f"{flops / 1e9:.2f} GFLOP an image"),
            (
                "training step",
                f"{step:.3f} s for {s.batch_size} images ({s.dtype}), {s.batch_size / step:.1f} images/s",
            ),
            ("rate", f"{3 * flops * s.batch_size / step / 1e9:.0f} GFLOP/s, counting a step as three forward passes"),
            ("peak memory", f"{mx.get_peak_memory() / 1e9:.2f} GB of {device.total_memory() / 1e9:.0f} GB"),
            ("run", f"{steps} steps, {epochs:.1f} epochs: {report.duration(step * steps)}"),
            ("checkpoint", f"{5 * parameters * 4 / 1e9:.2f} GB, {s.keep or 'all'} kept"),
        ]
    )
