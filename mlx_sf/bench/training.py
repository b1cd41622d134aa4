"""A whole training step — forward, backward, AdamW, two EMAs — against the same in PyTorch, in one process."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.config import Config
from ..device.defaults import dtype_name
from ..models.flops import forward_flops
from ..models.jit import JiT, JiTConfig
from ..models.jit_sizes import model_config
from ..training.step import StepOptions, TrainStep, draws, initial_arrays, trainable
from .peer import Peer, compared, find_peer
from .rates import Runs, alternate

EMA_DECAYS = (0.9999, 0.9996)
LR = 1e-4


class RepeatedStep:
    """A training run of made-up pictures: each call takes one step on the same batch and evaluates it."""

    def __init__(self, config: Config, batch: int, options: StepOptions) -> None:
        network = JiT(config.model)
        self.step = TrainStep(network, config.flow, options)
        self.arrays = initial_arrays(trainable(network))
        self.size, self.number = config.model.size, 0
        self.images, labels = made_up_batch(config.model, batch)
        self.condition = network.condition([int(y) for y in labels])
        self.null = network.condition([None] * batch)

    def __call__(self) -> None:
        self.number += 1
        batch = len(self.images)
        d = draws(0, self.number, batch, slice(0, batch), self.size)
        self.arrays, loss, _ = self.step(
            self.arrays, self.images, self.condition, self.null, d, LR, self.number, EMA_DECAYS
        )
        mx.eval(self.arrays, loss)


def made_up_batch(config: JiTConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures (B, H, W, 3) uint8 and labels (B,)."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, *config.size, 3), dtype=np.uint8), rng.integers(0, config.num_classes, batch)


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
    options = StepOptions(dtype=dtype, compile=compile, grad_checkpoint=grad_checkpoint)
    runs: Runs = {"mlx": RepeatedStep(config, batch, options)}
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


def _torch_step(config: JiTConfig, batch: int, peer: Peer) -> Callable[[], None]:
    """The published trainer's step: AdamW in its fused form, EMAs with multi-tensor operations."""
    import torch

    from ..parity.torch_jit import TorchJiT

    bare = TorchJiT(config).to(peer.device)
    network = peer.network(bare)
    parameters = [p for p in bare.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    groups.append({"params": [p for p in parameters if p.ndim >= 2]})
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    emas = [[p.detach().clone() for p in parameters] for _ in EMA_DECAYS]
    pictures, classes = made_up_batch(config, batch)
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
