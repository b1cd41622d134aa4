"""mlx-sf: JiT pixel-space diffusion transformers with Spectral Forcing, in MLX."""

from . import _blas

_blas.preload()  # must come before the first import of mlx.core, wherever that is

__version__ = "0.2.0"
