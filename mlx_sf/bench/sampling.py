"""Whole guided samples against the published loop in PyTorch, in one process, by turns."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Config, SampleConfig, model_config
from ..device import compile_by_default
from ..generate import ahead
from ..lanes import cores
from ..model import JiT, cast_products
from ..sample import Sampler, evaluations, seeded_noise


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
    model = JiT(config.model)
    model.update(cast_products(model.parameters(), dtype))
    noise, labels = seeded_noise(range(batch), img_size), mx.arange(batch) % config.model.num_classes
    mx.eval(model.parameters(), noise)
    sampler = Sampler(model, config, compiled)

    def ours() -> None:
        for _ in ahead(sampler.states(noise, labels)):
            pass

    runs: dict[str, Callable[[], None]] = {"mlx": ours}
    if peer and dtype == mx.float32 and importlib.util.find_spec("torch"):
        runs["torch"] = _published_loop(config, batch)
    mx.reset_peak_memory()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    name = str(dtype).removeprefix("mlx.core.")
    result: dict[str, Any] = {
        "what": f"{size} at {img_size}, {batch} images, {steps} {method} steps, cfg {cfg}, {name}",
        "mlx_threads": cores(),
        "mlx_evaluations": evaluations(sample),
        **_statistics("mlx", seconds["mlx"]),
        "mlx_seconds_per_image": float(np.median(seconds["mlx"])) / batch,
        "mlx_peak_bytes": mx.get_peak_memory(),
    }
    if "torch" in seconds:
        import torch

        result |= {"torch_evaluations": 2 * (2 * steps - 1), **_statistics("torch", seconds["torch"])}
        result |= {"torch_threads": torch.get_num_threads(), "torch": torch.__version__}
        result["torch_over_mlx"] = result["torch_seconds"] / result["mlx_seconds"]
    return result


def _statistics(name: str, seconds: list[float]) -> dict[str, Any]:
    low, high = min(seconds), max(seconds)
    return {f"{name}_seconds": float(np.median(seconds)), f"{name}_spread": f"{low:.2f} to {high:.2f}"}


def _published_loop(config: Config, batch: int) -> Callable[[], None]:
    import torch

    from ..peer_torch import TorchJiT, torch_sample

    torch.set_num_threads(cores())
    network = TorchJiT(config.model).eval()
    config = config.replace(method="heun")
    noise = torch.from_numpy(np.array(seeded_noise(range(batch), config.model.img_size)))
    labels = torch.arange(batch) % config.model.num_classes

    def run() -> None:
        with torch.inference_mode():
            torch_sample(network, config, noise, labels)

    return run
