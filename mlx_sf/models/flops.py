"""Floating-point operations of one forward pass for one image: matrix products, a multiply-add counted as two."""

from typing import Any

from . import ModelConfig, architecture


def forward_flops(config: ModelConfig) -> int:
    """Operations of the network of this configuration."""
    return architecture(config).forward_flops(config)


def jit_flops(c: Any) -> int:
    """JiT of a `JiTConfig`."""
    N, L, D = c.grid_size**2, c.in_context_len, c.hidden_size
    tokens = [N + (L if L and i >= c.in_context_start else 0) for i in range(c.depth)]
    per_token = 3 * D * D + D * D + 3 * D * c.mlp_hidden
    blocks = sum(T * per_token + 2 * T * T * D for T in tokens) + c.depth * 6 * D * D
    ends = N * (3 * c.patch_size**2 * c.bottleneck_dim + c.bottleneck_dim * D + D * c.patch_size**2 * c.out_channels)
    conditioning = 256 * D + D * D + 2 * D * D
    forcing = 0
    if c.forcing is not None:  # four products per pixel and channel, two of them as long as a window is high or wide
        forcing = 3 * 2 * c.img_size**2 * sum(c.forcing.window(c.size))
    return 2 * (blocks + ends + conditioning + forcing)
