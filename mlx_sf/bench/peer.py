"""Where and how the PyTorch peer runs: at its best on the kind of device that MLX uses.

On a CPU float32 with as many threads as MLX has; on CUDA under `torch.compile`, on a Mac on MPS, there with the
matrix products in the compute type by autocast. Only the CPU's way has been run by the project so far.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..device.defaults import on_gpu
from ..device.lanes import cores
from .rates import product_rate, timing


@dataclass(frozen=True)
class Peer:
    """`device` is torch's name of it; `network` prepares a network; `autocast` opens a forward pass's context."""

    device: str
    network: Callable[[Any], Any]
    autocast: Callable[[], Any]
    synchronize: Callable[[], None]
    described: dict[str, Any]


def find_peer(dtype: mx.Dtype, wanted: bool = True) -> Peer | None:
    """The peer for this compute type, or None: torch is not installed, not wanted, or has no such device."""
    if not wanted or not importlib.util.find_spec("torch"):
        return None
    import torch

    device = "cpu"
    if on_gpu():
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
    if not device or (device == "cpu" and dtype != mx.float32):
        return None
    torch.set_num_threads(cores())
    compiled = device == "cuda"
    half = {mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}.get(dtype)

    def prepare(network: Any) -> Any:
        network = network.to(device)
        return torch.compile(network) if compiled else network

    def autocast() -> Any:
        return torch.autocast(device, dtype=half) if half else contextlib.nullcontext()

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    described = {"torch": torch.__version__, "torch_device": device + (", torch.compile" if compiled else "")}
    if device == "cpu":
        described["torch_threads"] = torch.get_num_threads()
    return Peer(device, prepare, autocast, synchronize, described)


def compared(taken: dict[str, list[float]], flops: int, dtype: mx.Dtype, peer: Peer | None) -> dict[str, Any]:
    """The entries of a record that MLX's runs and the peer's ("mlx" and "torch" in `taken`) have in common.

    `flops` are those of one MLX run; memory is MLX's peak so far.
    """
    peak, mlx, rate = mx.get_peak_memory(), timing("mlx", taken["mlx"]), product_rate(dtype)
    result: dict[str, Any] = {
        "mlx_threads": cores(),
        "rounds": len(taken["mlx"]),
        **mlx,
        "mlx_peak_bytes": peak,
        "flops": flops,
        "product_rate": rate,
        "share_of_product_rate": flops / mlx["mlx_seconds"] / rate,
    }
    if peer:
        result |= timing("torch", taken["torch"]) | peer.described
        result["torch_over_mlx"] = result["torch_seconds"] / result["mlx_seconds"]
    return result
