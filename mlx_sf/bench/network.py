"""One forward pass, against PyTorch in the same process and the machine's product rate."""

import importlib.util
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import ModelConfig, model_config
from ..device import compile_by_default
from ..lanes import split_batch
from ..model import JiT, cast_products
from ..report import forward_flops
from ..sample import seeded_noise
from .rates import best_seconds, product_rate


def measure_forward(size: str, img_size: int, batch: int, dtype: mx.Dtype, peer: bool = True) -> dict[str, Any]:
    """Seconds of a forward pass in MLX and, where torch is installed and wanted, in PyTorch (best settings of both)."""
    config = model_config(size, img_size=img_size)
    model = JiT(config)
    model.update(cast_products(model.parameters(), dtype))
    x, t, y = seeded_noise(range(batch), img_size), mx.full((batch,), 0.5), mx.zeros((batch,), dtype=mx.int32)
    mx.eval(model.parameters(), x, t, y)
    network = split_batch(model)
    run = mx.compile(network) if compile_by_default() else network
    mx.reset_peak_memory()
    seconds = best_seconds(lambda: mx.eval(run(x, t, y)))
    flops = forward_flops(config) * batch
    rate = product_rate(dtype)
    result: dict[str, Any] = {
        "what": f"{size} at {img_size}, batch {batch}, {str(dtype).removeprefix('mlx.core.')}",
        "mlx_seconds": seconds,
        "mlx_peak_bytes": mx.get_peak_memory(),
        "flops": flops,
        "product_rate": rate,
        "share_of_product_rate": flops / seconds / rate,
    }
    if peer and dtype == mx.float32 and importlib.util.find_spec("torch"):
        result |= _torch_forward(config, batch)
        result["torch_over_mlx"] = result["torch_seconds"] / seconds
    return result


def _torch_forward(config: ModelConfig, batch: int) -> dict[str, Any]:
    import torch

    from ..peer_torch import TorchJiT

    network = TorchJiT(config).eval()
    x = torch.from_numpy(np.asarray(seeded_noise(range(batch), config.img_size)))
    t, y = torch.full((batch,), 0.5), torch.zeros(batch, dtype=torch.long)
    with torch.inference_mode():
        seconds = best_seconds(lambda: network(x, t, y))
    return {"torch_seconds": seconds, "torch_threads": torch.get_num_threads(), "torch": torch.__version__}
