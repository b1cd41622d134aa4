"""mlx-sf: pictures straight in pixels, JiT diffusion transformers with Spectral Forcing, in MLX.

The public names below are imported on first use (PEP 562), so that `mlx-sf --help` need not wait for MLX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .device.blas import preload as _preload

_preload()  # must come before the first import of mlx.core, wherever that is

__version__ = "0.4.0"

# public name -> module that defines it
_PUBLIC = {
    "MlxSfError": "errors",
    "load": "checkpoints.pipeline",
    "Pipeline": "checkpoints.pipeline",
    "convert": "checkpoints.conversion",
    "train": "training.train",
    "evaluate": "metrics.evaluate",
    "SpectralForcing": "spectral",
    "ForcingConfig": "spectral",
    "to_uint8": "common.pixels",
}
__all__ = [
    "ForcingConfig",
    "MlxSfError",
    "Pipeline",
    "SpectralForcing",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "to_uint8",
    "train",
]

if TYPE_CHECKING:
    from .checkpoints.conversion import convert
    from .checkpoints.pipeline import Pipeline, load
    from .common.pixels import to_uint8
    from .errors import MlxSfError
    from .metrics.evaluate import evaluate
    from .spectral import ForcingConfig, SpectralForcing
    from .training.train import train


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
