"""Whole guided samples against the published loop in PyTorch, in one process, by turns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.config import Config
from ..device.defaults import compile_by_default, dtype_name
from ..models.flops import forward_flops
from ..models.jit_sizes import model_config
from ..sampling.generate import ahead
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig, evaluations
from .network import network
from .peer import Peer, compared, find_peer
from .rates import Runs, alternate


def measure_sampling(
    size: str,
    img_size: int,
    batch: int,
    steps: int,
    dtype: mx.Dtype,
    cfg: float,
    rounds: int = 3,
    peer: bool = True,
    compile: bool | None = None,
    method: str = "heun",
) -> dict[str, Any]:
    """Seconds of one batch of guided samples in MLX and, where torch is installed and wanted, in PyTorch: medians.

    Guidance acts in the published interval (0.1, 1). PyTorch follows the published loop, Heun with both halves of the
    guidance evaluated at every time, each in a forward pass of its own; MLX runs what `mlx-sf sample` runs. The runs
    take turns after a first of each that does not count. At 5 steps MLX evaluates the network 17 times per image where
    the loop takes 18: the same share as the 187 of 198 at the published 50 steps.
    """
    sample = SampleConfig(method, steps, cfg, 0.1, 1.0)  # type: ignore[arg-type]
    config = Config(model_config(size, img_size=img_size), sample=sample)
    compiled = compile_by_default() if compile is None else compile
    noise, classes = seeded_noise(range(batch), config.model.size), [i % config.model.num_classes for i in range(batch)]
    mx.eval(noise)
    sampler = Sampler(network(config.model, dtype), config.flow, sample, compiled)

    def ours() -> None:
        for _ in ahead(sampler.states(noise, classes)):
            pass

    runs: Runs = {"mlx": ours}
    other = find_peer(dtype, peer)
    if other:
        runs["torch"] = _published_loop(config, batch, other)
    mx.reset_peak_memory()
    taken = alternate(runs, rounds)
    count = evaluations(sample)
    result: dict[str, Any] = {
        "what": f"{size} at {img_size}, {batch} images, {steps} {method} steps, cfg {cfg}, {dtype_name(dtype)}",
        "mlx_evaluations": count,
        **({"torch_evaluations": 2 * (2 * steps - 1)} if other else {}),
        **compared(taken, batch * count * forward_flops(config.model), dtype, other),
    }
    return result | {"mlx_seconds_per_image": result["mlx_seconds"] / batch}


def _published_loop(config: Config, batch: int, peer: Peer) -> Callable[[], None]:
    import torch

    from ..parity.torch_jit import TorchJiT, torch_sample

    torch_network = peer.network(TorchJiT(config.model).eval())
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, method="heun"))
    noise = torch.from_numpy(np.array(seeded_noise(range(batch), config.model.size))).to(peer.device)
    labels = torch.arange(batch, device=peer.device) % config.model.num_classes

    def run() -> None:
        with torch.inference_mode(), peer.autocast():
            torch_sample(torch_network, config, noise, labels)
        peer.synchronize()

    return run
