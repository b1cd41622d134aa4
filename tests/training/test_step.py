"""The training step against the reference's golden loss, gradients and ten-step trajectories, and against itself."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.checkpoint import Checkpoint
from mlx_sf.common.pixels import from_uint8
from mlx_sf.flow import FlowConfig
from mlx_sf.formats.torch_file.reader import open_torch_file
from mlx_sf.models.jit import JiT, JiTConfig
from mlx_sf.training.optimizer import AdamW
from mlx_sf.training.step import Arrays, Draws, StepOptions, TrainStep, bound, draws, initial_arrays, trainable
from tests.helpers import PARITY, Golden, changed, classes


def trained(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {k: v for k, v in weights.items() if k != "pos_embed"}


def golden_batch(file: Any, prefix: str, step: int | None = None) -> tuple[np.ndarray, np.ndarray, Draws]:
    def get(name: str) -> np.ndarray:
        a: np.ndarray = file[f"{prefix}/{name}"]
        return a if step is None else a[step]

    d = Draws(mx.array(get("drop_uniform")), mx.array(get("t_normal")), mx.array(get("noise")))
    return get("x_uint8").transpose(0, 2, 3, 1), get("labels"), d


def run_golden(case: str, golden: Golden, converted: Path, **options: Any) -> tuple[Arrays, list[float]]:
    c = next(entry for entry in golden.configs["train"] if entry["case"] == case)
    file = golden.arrays("train")
    checkpoint = Checkpoint(converted / f"{c['model']}.npz")
    arrays, number = initial_arrays(trained(checkpoint.weights("model"))), 0
    if case == "resume":
        arrays["ema1"], arrays["ema2"] = (trained(checkpoint.weights(s)) for s in ("ema1", "ema2"))
        number = load_moments(arrays, golden.configs["models"][c["model"]])
    flow = changed(checkpoint.config, label_drop_prob=c["label_drop_prob"]).flow
    adamw = AdamW(*c["betas"], c["eps"], c["weight_decay"])
    network = JiT(checkpoint.config.model)
    step = TrainStep(network, flow, StepOptions(optimizer=adamw, **options))
    losses = []
    for i, lr in enumerate(file[f"{case}/lr"]):
        images, labels, d = golden_batch(file, case, i)
        decays = (c["ema_decay1"], c["ema_decay2"])
        conditions = classes(network, labels), network.condition([None] * len(labels))
        arrays, loss, _ = step(arrays, images, *conditions, d, float(lr), number + i + 1, decays)
        mx.eval(arrays, loss)
        losses.append(loss.item())
    return arrays, losses


def load_moments(arrays: Arrays, entry: dict[str, Any]) -> int:
    """Adam's state from the reference's checkpoint; returns how many steps it had taken."""
    order = entry["optimizer_no_decay_order"] + entry["optimizer_decay_order"]
    with open_torch_file(PARITY / entry["file"]) as file:
        state = file.root["optimizer"]["state"]
        for i, key in enumerate(order):
            name = key.removeprefix("net.")
            for kind, theirs in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                value = state[i][theirs].read()
                arrays[kind][name] = mx.array(np.asarray(value).reshape(arrays["model"][name].shape))
        return int(np.asarray(state[0]["step"].read()))


# On Linux each new compiled kernel costs about a second of g++, hence only some of the compiled cases by default.
@pytest.mark.parametrize(
    "case, compile",
    [
        ("wd0", False),
        ("wd01", False),
        ("resume", False),
        ("wd01", True),
        ("resume", True),
        pytest.param("wd0", True, marks=pytest.mark.slow),
    ],
)
def test_golden_trajectories(case: str, compile: bool, golden: Golden, converted: Path) -> None:
    arrays, losses = run_golden(case, golden, converted, compile=compile)
    golden.close("train", f"{case}/loss", losses)
    file = golden.arrays("train")
    compared = 0
    for kind, ours in (("final", "model"), ("ema1", "ema1"), ("ema2", "ema2")):
        for name in (n for n in file if n.startswith(f"{case}/{kind}/net.")):
            got = arrays[ours][name.split("/net.")[1]]
            golden.close("train", name, got.reshape(file[name].shape))
            compared += 1
    assert compared >= (2 if case == "resume" else 60)


def test_golden_gradients(golden: Golden, converted: Path) -> None:
    checkpoint, file = Checkpoint(converted / "forced.npz"), golden.arrays("loss")
    flow = changed(checkpoint.config, label_drop_prob=0.5).flow
    network = JiT(checkpoint.config.model)
    step = TrainStep(network, flow, StepOptions(optimizer=AdamW(beta1=0.0)))  # whose first moment is the gradient
    images, labels, d = golden_batch(file, "forced_x")
    conditions = classes(network, labels), network.condition([None] * len(labels))
    arrays, loss, _ = step(
        initial_arrays(trained(checkpoint.weights("model"))), images, *conditions, d, 0.0, 1, (0.9, 0.9)
    )
    golden.close("loss", "forced_x/loss", loss)
    names = [n for n in file if n.startswith("forced_x/grad/net.")]
    assert len(names) == len(arrays["m"]) == 70
    for name in names:
        golden.close("loss", name, arrays["m"][name.split("/net.")[1]].reshape(file[name].shape))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"grad_checkpoint": True},
        {"clip_grad": 1e9},
        pytest.param({"accumulate": 2, "compile": True}, marks=pytest.mark.slow),
        pytest.param({"grad_checkpoint": True, "compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_accumulation_checkpointing_and_a_loose_bound_change_rounding_only(
    options: dict[str, Any], golden: Golden, converted: Path
) -> None:
    plain, losses = run_golden("wd01", golden, converted)
    other, other_losses = run_golden("wd01", golden, converted, **options)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for k, w in plain["model"].items():
        assert mx.abs(other["model"][k] - w).max().item() < 2e-5, k


SIZE = (16, 16)
Batch = tuple[np.ndarray, Any, Any, Draws]  # images, their condition, the unconditional one, draws


def small_step(**options: Any) -> tuple[TrainStep, Arrays]:
    network = JiT(JiTConfig(16, 8, 16, 2, 2, 8, 2, 1, num_classes=3))
    return TrainStep(network, FlowConfig(), StepOptions(**options)), initial_arrays(trainable(network))


def one_batch(network: JiT, step: int = 0, b: int = 4) -> Batch:
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (b, *SIZE, 3), dtype=np.uint8)
    condition = classes(network, rng.integers(0, 3, b))
    return images, condition, network.condition([None] * b), draws(0, step, b, slice(0, b), SIZE)


def test_draws_depend_on_the_position_in_the_global_batch_alone() -> None:
    size = (8, 12)
    whole = draws(3, 7, 6, slice(0, 6), size)
    part = draws(3, 7, 6, slice(2, 4), size)
    assert whole.noise.shape == (6, 3, 8, 12)
    assert mx.array_equal(whole.noise[2:4], part.noise)
    assert mx.array_equal(whole.t_normal[2:4], part.t_normal)
    assert mx.array_equal(whole.drop_uniform[2:4], part.drop_uniform)
    for other in (draws(3, 8, 6, slice(0, 6), size), draws(4, 7, 6, slice(0, 6), size)):
        assert not mx.any(other.noise == whole.noise).item()
    many = draws(0, 0, 512, slice(0, 512), size)
    assert abs(many.noise.mean().item()) < 0.02
    assert abs(mx.var(many.noise).item() - 1) < 0.02
    assert abs(many.drop_uniform.mean().item() - 0.5) < 0.05


def test_the_first_steps_learn_and_the_shell_keeps_no_weights() -> None:
    step, arrays = small_step()
    batch = images, condition, _, d = one_batch(step.network)
    losses = []
    for i in range(30):
        arrays, loss, norm = step(arrays, *batch, 3e-3, i + 1, (0.9, 0.99))
        mx.eval(arrays, loss)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert norm is None
    assert all(w.size == 1 for w in trainable(step.network).values())
    with bound(step.network, arrays["ema1"]) as network:
        assert network(from_uint8(mx.array(images)), d.t_normal, condition).shape == (4, 3, *SIZE)


def test_memory_stays_flat() -> None:
    step, arrays = small_step()
    used = []
    for i in range(60):
        arrays, loss, _ = step(arrays, *one_batch(step.network, i), 1e-3, i + 1, (0.9, 0.99))
        mx.eval(arrays, loss)
        used.append(mx.get_active_memory())
    assert max(used[30:]) < 1.02 * max(used[5:30])


def test_bfloat16_computes_in_it_but_keeps_float32_state() -> None:
    results = {}
    for dtype in (mx.float32, mx.bfloat16):
        step, arrays = small_step(dtype=dtype)
        batch = one_batch(step.network)
        for i in range(5):
            arrays, loss, _ = step(arrays, *batch, 1e-3, i + 1, (0.9999, 0.9996))
            mx.eval(arrays, loss)
        assert {w.dtype for kind in arrays.values() for w in kind.values()} == {mx.float32}
        results[dtype] = loss.item()
        start = small_step()[1]["model"]
        moved = [mx.any(arrays["ema1"][k] != w).item() for k, w in start.items()]
        assert sum(moved) > 0.9 * len(moved)  # a bfloat16 average would not have moved at all
    assert results[mx.float32] != results[mx.bfloat16]
    assert abs(results[mx.float32] / results[mx.bfloat16] - 1) < 0.02


def test_clipping_bounds_the_gradient() -> None:
    step, arrays = small_step(clip_grad=1e-3)
    arrays, _, norm = step(arrays, *one_batch(step.network), 1e-3, 1, (0.9, 0.9))
    assert norm is not None
    assert norm.item() > 1e-3
    moment = sum(mx.square(m).sum().item() for m in arrays["m"].values()) ** 0.5  # (1 - beta1) of the gradient
    assert moment == pytest.approx(1e-4, rel=1e-3)


def test_micro_batches_of_unequal_length_average_over_images() -> None:
    results = []
    for accumulate in (1, 2, 3):
        step, arrays = small_step(accumulate=accumulate)
        batch = one_batch(step.network, b=5)
        for i in range(3):
            arrays, loss, _ = step(arrays, *batch, 1e-3, i + 1, (0.9, 0.99))
        results.append((loss.item(), arrays["model"]))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for k, w in results[0][1].items():
            assert mx.abs(weights[k] - w).max().item() < 2e-5, k


def test_dropout_acts_and_is_repeatable() -> None:
    config = JiTConfig(16, 8, 16, 4, 2, 8, 2, 1, num_classes=3, attn_dropout=0.2, proj_dropout=0.2)
    network = JiT(config)
    weights = {k: w + 0.1 for k, w in trainable(network).items()}
    images, condition, null, base = one_batch(network)
    losses = []
    for n in (0, 0, 1):
        key = draws(0, n, 4, slice(0, 4), SIZE, dropout=True).dropout
        d = Draws(base.drop_uniform, base.t_normal, base.noise, key)
        step = TrainStep(network, FlowConfig(), StepOptions())
        _, loss, _ = step(initial_arrays(weights), images, condition, null, d, 0.0, 1, (0.9, 0.9))
        losses.append(loss.item())
    assert losses[0] == losses[1] != losses[2]
