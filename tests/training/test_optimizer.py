"""Learning rates equal the golden ones; the averages' bookkeeping; AdamW against torch."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_sf.training.optimizer import AdamW, LRSchedule, clip_by_norm, ema_decay, initial_share, learning_rate
from tests.helpers import GOLDEN

SCHEDULE = np.load(GOLDEN / "parity" / "schedule.npz")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates_equal_the_reference(schedule: LRSchedule) -> None:
    rates = [learning_rate(step / 4, 1e-3, 2, 6, schedule, 1e-5) for step in range(24)]
    np.testing.assert_allclose(rates, SCHEDULE[f"lr_{schedule}"], rtol=1e-6)
    assert learning_rate(0.5, 1e-3, 0, 6) == 1e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (5,))]
    params = [torch.nn.Parameter(torch.tensor(v)) for v in values]
    groups = [{"params": params[:1], "weight_decay": weight_decay}, {"params": params[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    adamw = AdamW(weight_decay=weight_decay)
    ours = [(mx.array(v), mx.zeros(v.shape), mx.zeros(v.shape)) for v in values]
    for step in range(1, 31):
        lr = 1e-2 * step / 30
        scalars = mx.array(adamw.scalars(lr, step))
        for i, p in enumerate(params):
            g = rng.standard_normal(p.shape).astype(np.float32)
            p.grad = torch.tensor(g)
            w, m, v = ours[i]
            ours[i] = adamw.update(w, mx.array(g), m, v, scalars)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for p, (w, _, _) in zip(params, ours, strict=True):
        np.testing.assert_allclose(np.array(w), p.detach().numpy(), rtol=2e-6, atol=2e-7)


def test_clipping() -> None:
    g = {"a": mx.array([3.0]), "b": mx.array([4.0])}
    clipped, norm = clip_by_norm(g, 1.0)
    assert float(norm) == 5
    np.testing.assert_allclose([float(clipped["a"]), float(clipped["b"])], [0.6, 0.8], rtol=1e-5)
    assert float(clip_by_norm(g, 10.0)[0]["a"]) == 3
    assert float(clip_by_norm(g, 0.0)[0]["a"]) == 3


def test_share_of_initial_weights() -> None:
    assert abs(initial_share(0.9999, 5000, False) - 0.9999**5000) < 1e-9  # 61 %
    product = np.prod([ema_decay(0.999, n, True) for n in range(1, 501)])
    assert abs(initial_share(0.999, 500, True) - product) < 1e-12
    assert ema_decay(0.999, 1, True) == 2 / 11
    assert ema_decay(0.999, 10**6, True) == 0.999
    assert initial_share(0.5, 0, True) == 1
