"""A whole training run in one loop: status, step, log, save, preview; it stops cleanly at any moment."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.adapters import open_base
from ..checkpoints.checkpoint import step_files
from ..checkpoints.load import load_model
from ..checkpoints.text_encoder import TextFeatures
from ..common.progress import Progress
from ..common.world import World
from ..data.loader import Batch, Loader
from ..device.defaults import pick_dtype
from ..errors import MlxSfError, option
from ..models import architecture, build, cast_products, parameter_shapes
from ..models.lora import adapter_parameters, add_adapter, initial_adapter
from .finetune import adapt
from .log import METRICS, RunLog, Speed, plot_loss, read_lines
from .plan import Plan
from .preview import preview_asked, save_preview
from .run_folder import Position
from .step import SETS, Arrays, StepOptions, TrainStep, Weights, draws, initial_arrays, trainable

Say = Callable[[str], None]
_PLOT_SECONDS = 60.0  # between redrawings of the loss
_NAMED_PICTURES = 10  # that could not be read, named at a save


@dataclass(frozen=True)
class Outcome:
    """How a run ended. It stands for the run's folder wherever a path is wanted.

    `step` of `steps` steps are done; `finished` is whether that is all of them. `checkpoint` is the newest one, None
    where a run was stopped before its first save.
    """

    run: Path
    step: int
    steps: int
    finished: bool
    checkpoint: Path | None

    def __fspath__(self) -> str:
        return str(self.run)


def fit(p: Plan, say: Say, world: World | None = None) -> Outcome:
    """Train until the planned number of steps, or until Ctrl-C or SIGTERM, which save first.

    `say` takes lines for the user. Under `mlx.launch` every process calls this with the same plan; rank 0 alone says,
    reads and writes anything. Raises `MlxSfError` where the loss or the weights stop being finite.
    """
    world = world or World()
    r, folder = p.recipe, p.folder
    reports = r.reports
    with contextlib.ExitStack() as stack:
        log, bar = None, None
        if world.main:
            stack.enter_context(folder.locked())
        run = Trainer(p, world)
        notes = [*p.notes, *run.begin()]
        if world.main:
            for note in notes:
                say(note)
            log = stack.enter_context(RunLog(folder.path, run.position.step, reports.report_to, r.options))
            folder.write(r)  # from here on the run has started
            bar = stack.enter_context(Progress(r.steps - run.position.step, f"training {folder.path}", "steps"))
            if run.position.step:
                say(f"{folder.path}: continues at step {run.position.step} of {r.steps}")
        batches = stack.enter_context(contextlib.closing(run.loader.batches(run.position.step)))
        stopped = stack.enter_context(_stop_signals())
        speed, named, saved_at, plotted_at = Speed(), 0, time.monotonic(), time.monotonic()
        stop, step = False, run.position.step

        while step < r.steps and not stop:
            # -- step
            loss, norm = run.take(next(batches))
            step, last = run.position.step, run.position.step == r.steps
            stop = world.any(bool(stopped))
            speed.count(r.batch_size)

            # -- status
            if bar is not None:
                bar.note(f"loss {loss:.4f}")
                bar.update()

            # -- log
            if step % reports.log_every == 0 or last:
                line = run.metrics(norm)
                if log is not None:
                    log.write(line, speed.line(step, run.loader.wait_seconds))

            # -- save: when a run saves never changes its results, so the clock may decide as well
            overdue = 0 < 60 * reports.save_minutes < time.monotonic() - saved_at
            if world.main and (step % reports.save_every == 0 or last or stop or overdue):
                path = folder.save(run.arrays, run.fixed, r.config, run.position, reports.keep)
                saved_at = time.monotonic()
                share = r.optimizer.initial_shares(step)[0]
                lines = read_lines(folder.path / METRICS)
                mean = f"loss {lines[-1]['loss']:.4f}, " if lines else ""
                still = f"ema1 still holds {share:.1%} of the initial weights"
                beside = f"its adapter in {folder.adapter}" if r.config.adapter else still
                say(f"step {step}: {mean}saved {path} ({beside})")
                for name, reason in list(run.loader.bad.items())[named:][:_NAMED_PICTURES]:
                    say(f"could not read {name}: {reason}")
                named = len(run.loader.bad)
                if time.monotonic() - plotted_at > _PLOT_SECONDS:
                    plot_loss(folder.path)
                    plotted_at = time.monotonic()

            # -- preview
            due = reports.preview_every and (step % reports.preview_every == 0 or last)
            if world.main and due and not stop:
                path = folder.path / "previews" / f"{step:08d}.png"
                sets = {name: run.arrays[name] for name in SETS}
                save_preview(path, run.network, r.config, sets, run.preview_asked, reports.preview_steps, r.seed)
                say(f"step {step}: preview {path} (rows: {', '.join(SETS)})")

    if world.main:
        plot_loss(folder.path)
    files = step_files(folder.path) if folder.path.is_dir() else []
    return Outcome(folder.path, step, r.steps, step >= r.steps, files[-1][1] if files else None)


class Trainer:
    """A planned run in memory: the network as a shell, its data, and the state that moves from step to step.

    `arrays` and `position` are all that the next step depends on, and what a checkpoint holds; `fixed` are the
    untrained tensors that belong to every weight set.
    """

    def __init__(self, p: Plan, world: World) -> None:
        r, machine = p.recipe, p.recipe.machine
        parts = machine.accumulate * world.size
        if r.batch_size % parts:
            raise MlxSfError(
                f"{option('batch_size')} is {r.batch_size}, want a multiple of {parts}, micro-batches x processes"
            )
        self.plan, self.recipe, self.world = p, r, world
        self.network, self.fixed = self._network(pick_dtype(machine.dtype))
        if architecture(r.config.model).reads_text and not r.config.model.text.words:
            self.network.features = TextFeatures(
                r.options.text_encoder or r.config.model.text.encoder, r.config.model.text
            )
        self.loader = Loader(p.source, r.batch_size, r.seed, r.flip, machine.workers, world.rank, world.size)
        self.null = self.network.condition([None] * (r.batch_size // world.size))
        options = StepOptions(
            optimizer=r.optimizer.adamw,
            clip_grad=r.optimizer.clip_grad,
            dtype=pick_dtype(machine.dtype),
            accumulate=machine.accumulate,
            grad_checkpoint=machine.grad_checkpoint,
            compile=machine.compile,
            world=world.size,
        )
        self.step = TrainStep(self.network, r.config.flow, options)
        self.arrays: Arrays = {}
        self.position = Position()
        self.preview_asked = preview_asked(r.config, p.source, r.reports, r.seed)

    def _network(self, dtype: mx.Dtype) -> tuple[Any, Weights]:
        """The network as a shell for the weights that are trained, and those that are stored with them.

        An adapter's network holds the weights of its base, its products in `dtype`; nothing is stored with an adapter.
        """
        config, key, adapter = self.recipe.config, mx.random.key(self.recipe.seed), self.recipe.config.adapter
        kind = architecture(config.model)
        if adapter is None:
            network = build(config.model, key)
            tensors: Any = tree_flatten(network.parameters())
            return network, {name: dict(tensors)[name] for name in kind.fixed}
        if self.world.main:
            network = load_model(open_base(adapter, self.plan.folder.path), adapter.weights, dtype)[0]
        else:
            network = build(config.model)
            network.update(cast_products(network.parameters(), dtype, kind))
        network.update(self.world.share_arrays(network.parameters()))
        add_adapter(network, adapter.lora, initial_adapter(adapter.lora, parameter_shapes(config.model), key))
        return network, {}

    def begin(self) -> list[str]:
        """Take the first state: the newest checkpoint's, another run's weights, or random ones. Returns what to say."""
        p, notes = self.plan, self._read_captions()
        adapter = self.recipe.config.adapter
        stored = p.folder.load(self.recipe.config) if p.stored is not None else None
        if stored is not None:
            self.arrays, self.position = stored
        else:
            weights = trainable(self.network) if adapter is None else adapter_parameters(self.network)
            if adapter is not None:
                notes.append(f"lora: {adapter}")
            elif p.base is not None:
                weights, told = adapt(p.base, self.recipe.options.init_weights, weights, self.recipe.config)
                notes += told
            self.arrays, self.position = initial_arrays(weights), Position()
        self.arrays = self.world.share_arrays(self.arrays)
        self.position = Position(**self.world.share(dataclasses.asdict(self.position)))
        return notes

    def _read_captions(self) -> list[str]:
        """Encode the captions that are known beforehand, where an encoder reads them. Returns what to say."""
        features = getattr(self.network, "features", None)
        if features is None or not self.world.main:
            return []
        captions = self.plan.source.captions()
        features.ensure(captions)
        known = f"text: {len(captions)} captions read by {features.encoder}" if captions else "text: read as they come"
        return [known, *features.notes()]

    def take(self, batch: Batch) -> tuple[float, float | None]:
        """One step on a batch: the state moves on. The loss, and the gradients' norm (None unless they are clipped).

        Raises `MlxSfError` where the loss is not finite.
        """
        r, number = self.recipe, batch.step + 1
        numbers = draws(r.seed, batch.step, r.batch_size, self.loader.local, r.config.model.size, r.dropout)
        self.arrays, loss, norm = self.step(
            self.arrays,
            batch.images,
            self.network.condition(batch.labels),
            self.null,
            numbers,
            r.rate(batch.step),
            number,
            r.optimizer.ema_decays(number),
        )
        mx.eval(self.arrays, loss, norm)  # the only evaluation of a step: all of its state
        value: float = loss.item()  # type: ignore[assignment]
        if not math.isfinite(value):
            folder = self.plan.folder
            raise MlxSfError(f"{folder.path}: the loss is {value} at step {number}: stopped; {folder.advice()}")
        self.position.step = number
        self.position.window.append(value)
        return value, None if norm is None else norm.item()  # type: ignore[return-value]

    def metrics(self, norm: float | None) -> dict[str, Any]:
        """The line of metrics.jsonl for the window that ends here; starts the next window."""
        r, n, window = self.recipe, self.position.step, self.position.window
        share1, share2 = r.optimizer.initial_shares(n)
        line = {
            "step": n,
            "epoch": round(r.epoch(n), 4),
            "images": n * r.batch_size,
            "loss": math.fsum(window) / len(window),
            "lr": r.rate(n - 1),
            "ema1_initial_share": share1,
            "ema2_initial_share": share2,
            **({} if norm is None else {"grad_norm": norm}),
        }
        window.clear()
        return line


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM makes non-empty; a second one interrupts at once."""
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
