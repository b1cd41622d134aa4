"""One forward pass, against PyTorch in the same process and the machine's product rate."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..device.defaults import compile_by_default, dtype_name
from ..device.lanes import split_batch
from ..models import architecture, cast_products
from ..models.flops import forward_flops
from ..models.jit import JiT, JiTConfig
from ..models.jit_sizes import model_config
from ..sampling.noise import seeded_noise
from .peer import Peer, compared, find_peer
from .rates import Runs, alternate


def network(config: JiTConfig, dtype: mx.Dtype) -> JiT:
    """The network with initial weights whose products run in `dtype`, evaluated."""
    model = JiT(config)
    model.update(cast_products(model.parameters(), dtype, architecture(config)))
    mx.eval(model.parameters())
    return model


def measure_forward(
    size: str, img_size: int, batch: int, dtype: mx.Dtype, peer: bool = True, rounds: int = 7
) -> dict[str, Any]:
    """Seconds of a forward pass (medians) in MLX and, where torch is installed and wanted, in PyTorch, by turns."""
    config = model_config(size, img_size=img_size)
    model = network(config, dtype)
    x, t, condition = seeded_noise(range(batch), config.size), mx.full((batch,), 0.5), model.condition([0] * batch)
    mx.eval(x, t, condition)
    run = mx.compile(model) if compile_by_default() else split_batch(model)
    runs: Runs = {"mlx": lambda: mx.eval(run(x, t, condition))}
    other = find_peer(dtype, peer)
    if other:
        runs["torch"] = _torch_forward(config, batch, other)
    mx.reset_peak_memory()
    taken = alternate(runs, rounds)
    what = f"forward pass, {size} at {img_size}, batch {batch}, {dtype_name(dtype)}"
    return {"what": what, **compared(taken, batch * forward_flops(config), dtype, other)}


def _torch_forward(config: JiTConfig, batch: int, peer: Peer) -> Any:
    import torch

    from ..parity.torch_jit import TorchJiT

    torch_network = peer.network(TorchJiT(config).eval())
    x = torch.from_numpy(np.array(seeded_noise(range(batch), config.size))).to(peer.device)
    t = torch.full((batch,), 0.5, device=peer.device)
    y = torch.zeros(batch, dtype=torch.long, device=peer.device)

    def run() -> None:
        with torch.inference_mode(), peer.autocast():
            torch_network(x, t, y)
        peer.synchronize()

    return run
