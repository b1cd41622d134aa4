"""Where the time goes: a guided Heun step, or a training step, part by part.

Each part is run alone, at the shapes that it has within the whole, as often as it occurs there. The whole is timed in
the same way; what the parts do not add up to is named "other". Where a compiled whole fuses across parts, "other" can
be negative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..device.defaults import compile_by_default, dtype_name
from ..models.jit_sizes import model_config
from .parts import Parts
from .rates import Runs, alternate
from .sampling_parts import sampling_parts
from .training_parts import training_parts


def profile_step(
    kind: Literal["sample", "train"],
    size: str = "B/32",
    img_size: int = 256,
    batch: int = 8,
    dtype: mx.Dtype = mx.float32,
    rounds: int = 5,
    compile: bool | None = None,
) -> dict[str, Any]:
    """Seconds of each part of a step and of the whole: medians of `rounds` turns in which all take part.

    "sample" is a Heun step of `batch` images, guided at both of its evaluations; "train" a step with AdamW and two
    EMAs. Compiled or not as the program does it by default: on a CPU it samples eagerly and trains compiled.
    """
    compiled = (kind == "train" or compile_by_default()) if compile is None else compile
    make: Callable[..., Parts] = sampling_parts if kind == "sample" else training_parts
    whole, parts = make(model_config(size, img_size=img_size), batch, dtype, compiled)
    runs: Runs = {name: partial(_evaluate, run) for name, run in [("whole step", whole), *parts]}
    seconds = alternate(runs, rounds)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    total = medians.pop("whole step")
    return {
        "what": f"{kind} step, {size} at {img_size}, batch {batch}, {dtype_name(dtype)}, "
        + ("compiled" if compiled else "eager"),
        "rounds": rounds,
        "seconds": total,
        "spread": [min(seconds["whole step"]), max(seconds["whole step"])],
        "parts": {**medians, "other": total - sum(medians.values())},
    }


def _evaluate(run: Callable[[], Any]) -> None:
    mx.eval(run())
