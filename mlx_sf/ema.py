"""Exponential moving averages of the weights, in float32: in bfloat16 a decay of 0.9999 would never move them."""

import numpy as np


def ema_decay(decay: float, step: int, warmup: bool) -> float:
    """The decay of step `step` (from 1). With warm-up it grows as (1 + n) / (10 + n), so early averages are short."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def initial_share(decay: float, steps: int, warmup: bool) -> float:
    """Share of the initial weights that is still in the average after `steps` steps: 0.9999^5000 is 0.61."""
    if not warmup:
        return float(decay**steps)
    n = np.arange(1, steps + 1)
    return float(np.exp(np.log(np.minimum(decay, (1 + n) / (10 + n))).sum()))
