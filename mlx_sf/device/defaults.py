"""The machine: which device runs, in which float type, compiled or not. The one owner of those defaults."""

import importlib.metadata
import os
import platform
import re
import resource
import sys
from pathlib import Path

import mlx.core as mx

from .. import __version__
from ..errors import MlxSfError
from . import blas

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_gpu() -> bool:
    """Whether MLX runs on Metal or CUDA."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def default_dtype() -> str:
    """Type of the large matrix products: bfloat16 on a GPU; float32 on a CPU, where half precision is far slower."""
    return "bfloat16" if on_gpu() else "float32"


def dtype_name(dtype: mx.Dtype) -> str:
    """The name that `pick_dtype` takes."""
    return str(dtype).removeprefix("mlx.core.")


def pick_dtype(name: str | None) -> mx.Dtype:
    """The MLX type of a name, or the default."""
    name = name or default_dtype()
    if name not in DTYPES:
        raise MlxSfError(f"dtype {name!r} is unknown, want {', '.join(DTYPES)}")
    return DTYPES[name]


def compile_by_default() -> bool:
    """GPUs gain from `mx.compile` at once; on Linux CPUs each new kernel first costs a second of the C++ compiler."""
    return on_gpu()


def dequantize_by_default() -> bool:
    """On a CPU quantised products take some 50 times as long as float32 ones (`mlx-sf bench quantize`)."""
    return not on_gpu()


def limit_cache() -> None:
    """Bound MLX's cache of freed buffers, which otherwise grows until a laptop swaps. `MLX_SF_CACHE_GB` overrides."""
    gigabytes = os.environ.get("MLX_SF_CACHE_GB")
    try:
        limit = float(gigabytes) * 1e9 if gigabytes else min(8e9, total_memory() / 8)
    except ValueError:
        raise MlxSfError(f"MLX_SF_CACHE_GB is {gigabytes!r}, want a number of gigabytes") from None
    mx.set_cache_limit(int(limit))


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> dict[str, int]:
    """Peak bytes: of MLX's own buffers, and of the whole process."""
    status = Path("/proc/self/status")  # on Linux ru_maxrss starts with the parent's
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        process = int(found[1]) * 1024 if found else 0
    else:
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"mlx": mx.get_peak_memory(), "process": process}


def describe() -> dict[str, str]:
    """This installation in words, for `mlx-sf info` and reports."""
    if not on_gpu():
        device = f"CPU ({platform.machine()}, {os.cpu_count()} cores), BLAS {blas.in_use()}"
    else:
        info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
        device = f"GPU ({info.get('device_name') or info.get('architecture') or 'unknown'})"
    return {
        "mlx-sf": __version__,
        "mlx": importlib.metadata.version("mlx"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": device,
        "memory": f"{total_memory() / 2**30:.0f} GiB",
        "default dtype": default_dtype(),
        "float32 products": "float32"
        if os.environ.get("MLX_ENABLE_TF32") == "0"
        else "the device's default (TF32 on some)",
    }
