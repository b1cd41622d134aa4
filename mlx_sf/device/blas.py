"""A fast BLAS for MLX's CPU back end on Linux, loaded before `mlx.core` is.

The Linux CPU wheel of MLX links a reference BLAS that reaches about 4 GFLOP/s where the machine has 200. Its symbols
are resolved at load time, so a good BLAS that is already in the process with global visibility takes their place.
macOS uses Accelerate and needs nothing.
"""

import ctypes
import os
import sys
import warnings
from pathlib import Path

_loaded: str | None = None
_library: ctypes.CDLL | None = None


def _candidates() -> list[str]:
    named = os.environ.get("MLX_SF_BLAS")
    if named:
        return [named]
    lib = Path(sys.prefix) / "lib"
    mkl = sorted((str(p) for p in lib.glob("libmkl_rt.so*")), reverse=True)
    return ["libopenblas.so.0", *mkl]


def preload() -> None:
    """Load the first BLAS found: `MLX_SF_BLAS`, the system's OpenBLAS, or MKL from the `mkl` package.

    Warns once where the CPU back end would run without one. Does nothing off Linux or after `mlx.core` was imported.
    """
    global _loaded, _library
    if not sys.platform.startswith("linux") or _loaded is not None:
        return
    if "mlx.core" in sys.modules:
        _loaded = "mlx's own (mlx.core was imported before mlx_sf)"
        return
    # MKL reads this when it is loaded: sums in an order that does not depend on the number of threads, so that a run
    # continues to the bit on another number of them
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    for name in _candidates():
        try:
            _library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        return
    _loaded = "mlx's own (slow)"
    if not list(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cublas*")):  # a CUDA install needs no CPU BLAS
        warnings.warn(
            "no fast BLAS found: matrix products on the CPU will run about 50 times slower; "
            "`pip install 'mlx-sf[cpu]'` or install libopenblas0-pthread, or set MLX_SF_BLAS to a library",
            RuntimeWarning,
            stacklevel=3,
        )


def set_threads(count: int) -> None:
    """Threads of one matrix product, where the BLAS is ours to tell."""
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        if _library is not None and hasattr(_library, name):
            getattr(_library, name)(ctypes.c_int(count))


def in_use() -> str:
    """Name of the BLAS behind MLX's CPU back end."""
    if sys.platform == "darwin":
        return "Accelerate"
    return _loaded or "mlx's own"
