"""The same network and sampler in PyTorch: an oracle for tests and a peer for `mlx-sf bench`. Nothing else imports it.

Written from the same description as `models/jit.py`, with the reference's parameter names, layouts and arithmetic
(float32 scores, explicit softmax, complex-free rotary pairs), so that its state dict is a reference checkpoint.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.config import Config
from ..dct import dct_matrix, radial_frequency
from ..errors import MlxSfError
from ..models.jit import JiTConfig
from ..models.layers import RMS_EPS, TIME_FREQUENCIES, sincos_position_table


class RMSNorm(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + RMS_EPS)
        return (self.weight * h).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
        super().__init__()
        self.heads = c.num_heads
        self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (_rotate(norm(u), cos, sin) for norm, u in ((self.q_norm, q), (self.k_norm, k)))
        scores = (q.float() @ k.float().transpose(-2, -1)) / math.sqrt(q.shape[-1])
        x = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return x * cos + turned * sin


class SwiGLU(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(c.hidden_size, 2 * c.mlp_hidden)
        self.w3 = nn.Linear(c.mlp_hidden, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden_size), RMSNorm(c.hidden_size)
        self.attn, self.mlp = Attention(c), SwiGLU(c)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 6 * c.hidden_size))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s1, m1, g1, s2, m2, g2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + g1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), s1, m1), cos, sin)
        return x + g2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), s2, m2))


class _Embed(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
        super().__init__()
        p = c.patch_size
        self.p, self.forced = p, c.forcing is not None
        self.proj1 = (
            nn.Linear(3 * p * p, c.bottleneck_dim, bias=False)
            if self.forced
            else nn.Conv2d(3, c.bottleneck_dim, p, p, bias=False)
        )
        self.proj2 = nn.Conv2d(c.bottleneck_dim, c.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        S = x.shape[-1] // self.p
        if self.forced:
            x = self.proj1(F.unfold(x, self.p, stride=self.p).transpose(1, 2))
            x = x.transpose(1, 2).reshape(len(x), -1, S, S)
        else:
            x = self.proj1(x)
        return self.proj2(x).flatten(2).transpose(1, 2)


class _Time(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, dims), nn.SiLU(), nn.Linear(dims, dims))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * f
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class _Label(nn.Module):
    def __init__(self, classes: int, dims: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dims)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Final(nn.Module):
    def __init__(self, c: JiTConfig) -> None:
        super().__init__()
        self.norm_final = RMSNorm(c.hidden_size)
        self.linear = nn.Linear(c.hidden_size, c.patch_size**2 * c.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 2 * c.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class TorchJiT(nn.Module):
    """JiT in PyTorch; its state dict, with "net." in front of every key, is a reference one."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        c = self.c = config
        f = c.forcing
        if f is not None and (f.scale_schedule not in ("linear", "fixed") or f.exact_end):
            raise MlxSfError(
                f"PyTorch peer: scale_schedule is {f.scale_schedule!r}, want a published one, exact_end off"
            )
        self.pos_embed = nn.Parameter(torch.from_numpy(sincos_position_table(c.hidden_size, c.grid_size)), False)
        if c.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, c.in_context_len, c.hidden_size))
        self.t_embedder, self.y_embedder = _Time(c.hidden_size), _Label(c.num_classes, c.hidden_size)
        self.x_embedder = _Embed(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_layer = _Final(c)
        tables = dict(zip(("cos", "sin"), _rotary(c), strict=True))
        if f is not None:
            w = f.window(c.size)[0]
            tables |= {"dct": dct_matrix(w), "radius": radial_frequency(w)}
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table.astype(np.float32)), persistent=False)

    def _force(self, x: Tensor, t: Tensor) -> Tensor:
        c, f = self.c, self.c.forcing
        if f is None:
            return x
        w = len(self.dct)
        S = c.img_size // w
        scale = t.float() if f.scale_schedule == "linear" else torch.full_like(t, f.fixed_scale, dtype=torch.float32)
        cut = f.min_keep + (f.max_keep - f.min_keep) * scale.clamp(0, 1)
        mask = torch.sigmoid(f.mask_sharpness * (cut[:, None, None] - self.radius))[:, None, None, None]
        x = x.reshape(len(x), 3, S, w, S, w).transpose(3, 4)
        x = self.dct.T @ ((self.dct @ x @ self.dct.T) * mask) @ self.dct
        return x.transpose(3, 4).reshape(len(x), 3, c.img_size, c.img_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, L = self.c, self.c.in_context_len
        y_emb = self.y_embedder(y)
        cond = self.t_embedder(t) + y_emb
        h = self.x_embedder(self._force(x, t)) + self.pos_embed
        cos, sin = self.cos[L:], self.sin[L:]
        for i, block in enumerate(self.blocks):
            if L and i == c.in_context_start:
                h = torch.cat([y_emb.unsqueeze(1) + self.in_context_posemb, h], dim=1)
                cos, sin = self.cos, self.sin
            h = block(h, cond, cos, sin)
        h = self.final_layer(h[:, -(c.grid_size**2) :], cond)
        S, p = c.grid_size, c.patch_size
        h = h.reshape(len(h), S, S, p, p, c.out_channels).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(len(h), c.out_channels, c.img_size, c.img_size)


def _rotary(c: JiTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (L + N, d), each value for both members of its pair; ones and zeros for in-context tokens."""
    half = c.head_dim // 2
    freqs = 1 / 10000 ** (np.arange(0, half, 2)[: half // 2] / half)
    axis = np.repeat(np.arange(c.grid_size)[:, None] * freqs, 2, axis=1)  # (S, d/2)
    S = c.grid_size
    grid = np.concatenate(
        [np.broadcast_to(axis[:, None], (S, S, half)), np.broadcast_to(axis[None], (S, S, half))], axis=2
    ).reshape(S * S, c.head_dim)
    grid = np.concatenate([np.zeros((c.in_context_len, c.head_dim)), grid])
    return np.cos(grid), np.sin(grid)


@torch.no_grad()
def torch_sample(model: Any, config: Config, noise: Tensor, labels: Tensor) -> Tensor:
    """Finished samples from standard normal noise, by `config.sample`, in PyTorch."""
    flow, s = config.flow, config.sample
    times = torch.linspace(0, 1, s.steps + 1)
    null = torch.full_like(labels, config.model.null_class)
    eps = flow.t_eps if s.t_eps is None else s.t_eps

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = model(z, t.expand(len(z)), y)
        rest = (1 - t).clamp_min(eps)
        if flow.pred_param == "x":
            return (out - z) / rest
        if flow.pred_param == "v":
            return out
        bounded = (1 - t).clamp_min(flow.t_eps)
        snr = (t.clamp_min(flow.t_eps) / bounded) ** 2
        w = {"one_minus_t": bounded, "snr": snr / (1 + snr), "snr_inverse": 1 / (1 + snr)}[flow.hybrid_x_weight_mode]
        w = (w**flow.hybrid_x_weight_power).clamp(flow.hybrid_x_weight_min, flow.hybrid_x_weight_max)
        out_x, out_v = out.chunk(2, dim=1)
        return w * (out_x - z) / rest + (1 - w) * out_v

    def guided(z: Tensor, t: Tensor) -> Tensor:
        on = t < s.cfg_high and (s.cfg_low == 0 or t > s.cfg_low)
        cond, uncond = velocity(z, t, labels), velocity(z, t, null)
        return uncond + (s.cfg if on else 1.0) * (cond - uncond)

    z = flow.noise_scale * noise
    for i in range(s.steps):
        t, t_next = times[i], times[i + 1]
        v = guided(z, t)
        if s.method == "heun" and i < s.steps - 1:
            v = 0.5 * (v + guided(z + (t_next - t) * v, t_next))
        z = z + (t_next - t) * v
    return z
