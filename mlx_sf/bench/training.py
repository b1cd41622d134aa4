"""A whole training step — forward, backward, AdamW, two EMAs — against the same in PyTorch, in one process."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .. import lanes
from ..config import Config, ModelConfig, model_config
from ..device import dtype_name
from ..model import JiT
from ..report import forward_flops
from ..train import StepOptions, TrainStep, draws, initial_arrays, trainable
from .peer import Peer, compared, find_peer
from .rates import Runs, alternate

EMA_DECAYS = (0.9999, 0.9996)
LR = 1e-4


def measure_training(
    size: str,
    img_size: int,
    batch: int,
    dtype: mx.Dtype,
    compile: bool,
    grad_checkpoint: bool = False,
    steps: int = 7,
    peer: bool = True,
) -> dict[str, Any]:
    """Seconds of a step (medians) in MLX and, where torch is installed and wanted, in PyTorch, by turns.

    FLOPs count three forward passes' products.
    """
    config = Config(model_config(size, img_size=img_size))
    options = StepOptions(dtype=dtype, compile=compile, grad_checkpoint=grad_checkpoint, lanes=lanes.count())
    runs: Runs = {"mlx": _mlx_step(config, batch, options)}
    other = find_peer(dtype, peer)
    if other:
        runs["torch"] = _torch_step(config.model, batch, other)
    for _ in range(3):  # the first steps still fill memory: initial weights are let go, buffers find their places
        for run in runs.values():
            run()
    mx.reset_peak_memory()
    taken = alternate(runs, steps)
    result: dict[str, Any] = {
        "what": f"training step, {size} at {img_size}, batch {batch}, {dtype_name(dtype)}, "
        + ("compiled" if compile else "eager")
        + (", gradient checkpointing" if grad_checkpoint else ""),
        **compared(taken, 3 * batch * forward_flops(config.model), dtype, other),
    }
    return result | {"images_per_second": batch / result["mlx_seconds"]}


def _batch(config: ModelConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (batch, config.img_size, config.img_size, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, config.num_classes, batch)


def _mlx_step(config: Config, batch: int, options: StepOptions) -> Callable[[], None]:
    model = JiT(config.model)
    step = TrainStep(model, config.flow, options)
    arrays = initial_arrays(trainable(model))
    images, labels = _batch(config.model, batch)
    count = 0

    def run() -> None:
        nonlocal arrays, count
        count += 1
        d = draws(0, count, batch, slice(0, batch), config.model.img_size)
        arrays, loss, _ = step(arrays, images, labels, d, LR, count, EMA_DECAYS)
        mx.eval(arrays, loss)

    return run


def _torch_step(config: ModelConfig, batch: int, peer: Peer) -> Callable[[], None]:
    """The published trainer's step: AdamW in its fused form, EMAs with multi-tensor operations."""
    import torch

    from ..peer_torch import TorchJiT

    bare = TorchJiT(config).to(peer.device)
    network = peer.network(bare)
    parameters = [p for p in bare.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    groups.append({"params": [p for p in parameters if p.ndim >= 2]})
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    emas = [[p.detach().clone() for p in parameters] for _ in EMA_DECAYS]
    pictures, classes = _batch(config, batch)
    images, labels = torch.from_numpy(pictures).to(peer.device), torch.from_numpy(classes).to(peer.device)

    def run() -> None:
        x = (images.permute(0, 3, 1, 2).float() / 255) * 2 - 1
        y = torch.where(torch.rand(batch, device=peer.device) < 0.1, config.null_class, labels)
        t = torch.sigmoid(-0.8 + 0.8 * torch.randn(batch, device=peer.device))
        time_ = t.view(-1, 1, 1, 1)
        z = time_ * x + (1 - time_) * torch.randn_like(x)
        rest = (1 - time_).clamp_min(0.05)
        with peer.autocast():
            guess = network(z, t, y)
        loss = (((x - z) - (guess.float() - z)) / rest).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for ema, decay in zip(emas, EMA_DECAYS, strict=True):
                torch._foreach_mul_(ema, decay)
                torch._foreach_add_(ema, parameters, alpha=1 - decay)
        loss.item()

    return run
