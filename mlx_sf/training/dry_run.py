"""What a run would need, from a few real steps; nothing is written."""

import time

import mlx.core as mx

from ..common.text import columns, duration
from ..common.world import World
from ..device.defaults import total_memory
from ..models import parameter_count
from ..models.flops import forward_flops
from .plan import Plan
from .trainer import Trainer


def _conditions(p: Plan) -> str:
    text = getattr(p.recipe.config.model, "text", None)
    return f"{len(p.source.class_names)} class(es)" if text is None else f"captions of up to {text.length} tokens"


def dry_run(p: Plan) -> str:
    """Size, speed, memory and length of a planned run, as lines of text."""
    r, trainer = p.recipe, Trainer(p, World())
    trainer.begin()
    mx.reset_peak_memory()
    batches = trainer.loader.batches(trainer.position.step)
    times = []
    for _ in range(4 if r.machine.compile else 3):  # the first step warms up
        started = time.perf_counter()
        trainer.take(next(batches))
        times.append(time.perf_counter() - started)
    batches.close()
    step, c, adapter = min(times[1:]), r.config.model, r.config.adapter
    parameters, flops = parameter_count(c), forward_flops(c)
    trained = sum(w.size for w in trainer.arrays["model"].values())
    rate = 3 * flops * r.batch_size / step / 1e9
    images = f"{r.batch_size} images ({r.machine.dtype}), {r.batch_size / step:.1f} images/s"
    return columns(
        [
            ("network", f"{r.config.name}, {c.size[0]} x {c.size[1]} pixels, {_conditions(p)}"),
            ("data", p.source.describe()),
            ("parameters", f"{parameters / 1e6:.2f} million"),
            *([("trained", f"{trained / 1e6:.2f} million, an adapter: {adapter}")] if adapter else []),
            ("forward pass", f"{flops / 1e9:.2f} GFLOP an image"),
            ("training step", f"{step:.3f} s for {images}"),
            ("rate", f"{rate:.0f} GFLOP/s, counting a step as three forward passes"),
            ("peak memory", f"{mx.get_peak_memory() / 1e9:.2f} GB of {total_memory() / 1e9:.0f} GB"),
            ("run", f"{r.steps} steps, {r.epoch(r.steps):.1f} epochs: {duration(step * r.steps)}"),
            (
                "checkpoint",
                f"{5 * (trained if adapter else parameters) * 4 / 1e9:.2f} GB, {r.reports.keep or 'all'} kept",
            ),
        ]
    )
