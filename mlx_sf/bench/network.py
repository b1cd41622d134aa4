"""One forward pass, against PyTorch in the same process and the machine's product rate."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..config import ModelConfig, model_config
from ..device import compile_by_default, dtype_name
from ..lanes import split_batch
from ..model import JiT, cast_products
from ..report import forward_flops
from ..sample import seeded_noise
from .peer import Peer, compared, find_peer
from .rates import Runs, alternate


def measure_forward(
    size: str, img_size: int, batch: int, dtype: mx.Dtype, peer: bool = True, rounds: int = 7
) -> dict[str, Any]:
    """Seconds of a forward pass (medians) in MLX and, where torch is installed and wanted, in PyTorch, by turns."""
    config = model_config(size, img_size=img_size)
    model = JiT(config)
    model.update(cast_products(model.parameters(), dtype))
    x, t, y = seeded_noise(range(batch), img_size), mx.full((batch,), 0.5), mx.zeros((batch,), dtype=mx.int32)
    mx.eval(model.parameters(), x, t, y)
    network = mx.compile(model) if compile_by_default() else split_batch(model)
    runs: Runs = {"mlx": lambda: mx.eval(network(x, t, y))}
    other = find_peer(dtype, peer)
    if other:
        runs["torch"] = _torch_forward(config, batch, other)
    mx.reset_peak_memory()
    taken = alternate(runs, rounds)
    what = f"forward pass, {size} at {img_size}, batch {batch}, {dtype_name(dtype)}"
    return {"what": what, **compared(taken, batch * forward_flops(config), dtype, other)}


def _torch_forward(config: ModelConfig, batch: int, peer: Peer) -> Any:
    import torch

    from ..peer_torch import TorchJiT

    network = peer.network(TorchJiT(config).eval())
    x = torch.from_numpy(np.array(seeded_noise(range(batch), config.img_size))).to(peer.device)
    t = torch.full((batch,), 0.5, device=peer.device)
    y = torch.zeros(batch, dtype=torch.long, device=peer.device)

    def run() -> None:
        with torch.inference_mode(), peer.autocast():
            network(x, t, y)
        peer.synchronize()

    return run
