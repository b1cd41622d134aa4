"""MM-JiT and T5's encoder in PyTorch: an oracle for tests and a peer for `mlx-sf bench`. Nothing else imports it.

Written from the same description as `models/mmjit.py` and `models/t5.py`, with the published parameter names, layouts
and arithmetic; the tables are computed here once more, so that the two share no mistake.

B batch, H image side, p patch side, S = H/p, N = S*S image tokens, L text places, E width of the text features,
D hidden size, h heads of size d.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-6
NOISE_SCALE = 2.0
# what the hub's files carry beside the parameters here: modules whose results nothing reads, T5's decoder and head
UNREAD = ("t_embedder.", "pooled_embedder.")
T5_UNREAD = ("decoder.", "lm_head.")
# distances at which T5's buckets 8, 9 ... 15 of a side begin; shorter ones have a bucket each
T5_LONG_BUCKETS = (8, 12, 16, 23, 32, 46, 64, 91)


class RMSNorm(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        # in x's own type, as published
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS) * self.weight).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, h, T, d), heads joined: (B, T, h*d)."""
    if fused:
        x = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        x = scores.softmax(-1).to(v.dtype) @ v
    return x.transpose(1, 2).flatten(2)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (j, j + d/2) of x (B, h, T, d); angles (2, T, d) are cosines and sines, both halves of a row equal."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.to(x.dtype)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _cos_sin(angles: Tensor) -> Tensor:
    """Angles (T, d/2) -> float32 cosines and sines (2, T, d)."""
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).float()


def _text_angles(places: int, head_dim: int) -> Tensor:
    j = torch.arange(head_dim // 2, dtype=torch.float64)
    return torch.arange(places)[:, None] * 10000 ** (-2 * j / head_dim)


def _image_angles(grid: int, head_dim: int) -> Tensor:
    """(N, d/2): a quarter of the head's size by row, then as much by column."""
    j = torch.arange(head_dim // 4, dtype=torch.float64)
    axis = torch.arange(grid)[:, None] * 10000 ** (-4 * j / head_dim)  # (S, d/4)
    row, column = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat((row, column), dim=-1).flatten(0, 1)


def _positions(grid: int, dims: int) -> Tensor:
    """(N, D) float32: the column's sines and cosines in the first half, the row's in the second."""
    i = torch.arange(dims // 4, dtype=torch.float64)
    angles = torch.arange(grid)[:, None] * 10000 ** (-4 * i / dims)  # (S, D/4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)
    row, column = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat((column, row), dim=-1).flatten(0, 1).float()


class SwiGLU(nn.Module):
    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dims, hidden, bias=False), nn.Linear(dims, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3*h*d) -> (3, B, h, T, d)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class TextBlock(nn.Module):
    """A transformer block on the text (B, L, D) alone."""

    def __init__(self, dims: int, heads: int, head_dim: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = RMSNorm(dims), RMSNorm(dims)
        self.qkv, self.attn_proj = nn.Linear(dims, 3 * heads * head_dim), nn.Linear(heads * head_dim, dims)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.mlp = SwiGLU(dims, hidden)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = _heads(self.qkv(self.norm1(x)), self.heads)
        q, k = _rotate(self.q_norm(q), angles), _rotate(self.k_norm(k), angles)
        x = x + self.attn_proj(attention(q, k, v, self.fused))
        return x + self.mlp(self.norm2(x))


class DoubleBlock(nn.Module):
    """Text (B, L, D) and image (B, N, D) with weights of their own, one pair of q and k norms, one attention."""

    def __init__(self, dims: int, heads: int, head_dim: int, hidden: int, fused: bool, last: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.last = heads, fused, last
        inner = heads * head_dim
        self.img_norm1, self.img_norm2 = RMSNorm(dims), RMSNorm(dims)
        self.txt_norm1, self.txt_norm2 = RMSNorm(dims), RMSNorm(dims)
        self.img_qkv, self.img_attn_proj = nn.Linear(dims, 3 * inner), nn.Linear(inner, dims)
        self.txt_qkv, self.txt_attn_proj = nn.Linear(dims, 3 * inner), nn.Linear(inner, dims)
        self.img_mlp, self.txt_mlp = SwiGLU(dims, hidden), SwiGLU(dims, hidden)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)

    def forward(self, txt: Tensor, img: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """`angles` are of L + N tokens, text first."""
        text = _heads(self.txt_qkv(self.txt_norm1(txt)), self.heads)
        image = _heads(self.img_qkv(self.img_norm1(img)), self.heads)
        q, k, v = torch.cat((text, image), dim=3)
        L = txt.shape[1]
        if self.last:  # nothing reads this block's text: neither its queries nor what follows them are computed
            q, L = image[0], 0
        q, k = _rotate(self.q_norm(q), angles[:, -q.shape[2] :]), _rotate(self.k_norm(k), angles)
        x = attention(q, k, v, self.fused)
        img = img + self.img_attn_proj(x[:, L:])
        img = img + self.img_mlp(self.img_norm2(img))
        if not self.last:
            txt = txt + self.txt_attn_proj(x[:, :L])
            txt = txt + self.txt_mlp(self.txt_norm2(txt))
        return txt, img


class _Embed(nn.Module):
    def __init__(self, patch: int, bottleneck: int, dims: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(3, bottleneck, patch, patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, H) -> (B, N, D)."""
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class _Final(nn.Module):
    def __init__(self, dims: int, out: int) -> None:
        super().__init__()
        self.norm_final, self.linear = RMSNorm(dims), nn.Linear(dims, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class TorchMMJiT(nn.Module):
    """MM-JiT in PyTorch; its state dict, with "model.net." in front of every key, is the hub's less what nothing reads.

    Arguments have the names of the published `config.json`, and the values of B/16. The feed-forward's width is
    `mlp_hidden` or, where that is None, follows from `mlp_ratio`. `fused`: attention by
    `F.scaled_dot_product_attention` instead of scores, softmax and product, as published.
    """

    def __init__(
        self,
        *,
        image_size: int = 512,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_heads: int = 12,
        head_dim: int = 64,
        depth_double: int = 17,
        txt_preamble_depth: int = 2,
        txt_input_size: int = 1024,
        prompt_length: int = 256,
        pca_channels: int = 128,
        mlp_ratio: float = 8 / 3,
        mlp_hidden: int | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if mlp_hidden is None:
            mlp_hidden = -(-int(hidden_size * mlp_ratio) // 8) * 8
        self.patch_size, self.grid_size = patch_size, image_size // patch_size
        sizes = (hidden_size, num_heads, head_dim, mlp_hidden, fused)
        self.mask_token = nn.Parameter(torch.randn(1, 1, txt_input_size) * 0.02)
        self.img_embedder = _Embed(patch_size, pca_channels, hidden_size)
        self.txt_embedder = nn.Linear(txt_input_size, hidden_size, bias=False)
        self.txt_preamble_blocks = nn.ModuleList(TextBlock(*sizes) for _ in range(txt_preamble_depth))
        self.double_blocks = nn.ModuleList(DoubleBlock(*sizes, i == depth_double - 1) for i in range(depth_double))
        self.final_layer = _Final(hidden_size, 3 * patch_size**2)
        text, image = _text_angles(prompt_length, head_dim), _image_angles(self.grid_size, head_dim)
        self.register_buffer("positions", _positions(self.grid_size, hidden_size), persistent=False)
        self.register_buffer("text_rotary", _cos_sin(text), persistent=False)
        self.register_buffer("joint_rotary", _cos_sin(torch.cat((text, image))), persistent=False)

    def load_published(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take the tensors of the hub's file, with its prefix or without; all that is read must be there."""
        own = {name.removeprefix("model.").removeprefix("net."): value for name, value in tensors.items()}
        self.load_state_dict({name: value for name, value in own.items() if not name.startswith(UNREAD)})
        return self

    def text(self, context: Tensor, mask: Tensor) -> Tensor:
        """Features (B, L, E) and the places (B, L) that hold one -> text (B, L, D) as the double blocks take it.

        No step of sampling changes it. A mask of zeros is no prompt.
        """
        x = self.txt_embedder(torch.where(mask[..., None] > 0.5, context, self.mask_token))
        for block in self.txt_preamble_blocks:
            x = block(x, self.text_rotary)
        return x

    def image(self, x: Tensor, text: Tensor) -> Tensor:
        """Noisy images (B, 3, H, H) and `text` of them (B, L, D) -> clean images (B, 3, H, H)."""
        h = self.img_embedder(x) + self.positions
        for block in self.double_blocks:
            text, h = block(text, h, self.joint_rotary)
        S, p = self.grid_size, self.patch_size
        h = self.final_layer(h).unflatten(1, (S, S)).unflatten(-1, (p, p, 3))  # (B, S, S, p, p, 3)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.image(x, self.text(context, mask))


@torch.no_grad()
def torch_t2i_sample(
    network: TorchMMJiT, noise: Tensor, text: Tensor, null_text: Tensor, steps: int, cfg: float, floor: float
) -> Tensor:
    """The end (B, 3, H, H) of guided Euler from standard normal noise, both branches in one batch, as published.

    `text` and `null_text` (B or 1, L, D) are `network.text` of the prompts and of no prompt; 1 - t is held at `floor`
    or above.
    """
    both = torch.cat([c.expand(len(noise), -1, -1) for c in (text, null_text)])
    times = torch.linspace(0, 1, steps + 1, device=noise.device)
    z = NOISE_SCALE * noise
    for t, t_next in pairwise(times):
        zz = torch.cat((z, z))
        given, without = ((network.image(zz, both) - zz) / (1 - t).clamp_min(floor)).chunk(2)
        z = z + (t_next - t) * (without + cfg * (given - without))
    return z


# ------------------------------------------------------------------------------------------------ T5


class _T5Attention(nn.Module):
    def __init__(self, dims: int, heads: int, head_dim: int, first: bool) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.q, self.k, self.v = (nn.Linear(dims, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, dims, bias=False)
        if first:  # every layer's bias
            self.relative_attention_bias = nn.Embedding(4 * len(T5_LONG_BUCKETS), heads)

    def bias(self, length: int) -> Tensor:
        """(1, h, L, L), of the distance from each query to each key."""
        places = torch.arange(length, device=self.q.weight.device)
        r = places[None, :] - places[:, None]
        starts = torch.tensor((*range(1, 8), *T5_LONG_BUCKETS), device=r.device)
        buckets = torch.bucketize(r.abs(), starts, right=True) + 16 * (r > 0)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)).float() + bias  # no 1/sqrt(d)
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class _T5FeedForward(nn.Module):
    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(dims, hidden, bias=False), nn.Linear(dims, hidden, bias=False)
        self.wo = nn.Linear(hidden, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _T5Part(nn.Module):
    """One of a block's two halves, x + f(norm(x)), under the file's name for f."""

    def __init__(self, dims: int, name: str, function: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, function)
        self.layer_norm = RMSNorm(dims)

    def forward(self, x: Tensor, *bias: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(self.layer_norm(x), *bias)


class _T5Block(nn.Module):
    def __init__(self, dims: int, heads: int, head_dim: int, hidden: int, first: bool) -> None:
        super().__init__()
        attended = _T5Part(dims, "SelfAttention", _T5Attention(dims, heads, head_dim, first))
        self.layer = nn.ModuleList((attended, _T5Part(dims, "DenseReluDense", _T5FeedForward(dims, hidden))))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attended, fed = self.layer
        return fed(attended(x, bias))


class _T5Stack(nn.Module):
    def __init__(self, dims: int, layers: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(_T5Block(dims, heads, head_dim, hidden, i == 0) for i in range(layers))
        self.final_layer_norm = RMSNorm(dims)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.bias(x.shape[1]).float()
        bias = bias.masked_fill(mask[:, None, None, :] < 0.5, torch.finfo(torch.float32).min)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class TorchT5Encoder(nn.Module):
    """T5's encoder, version 1.1, in PyTorch; its state dict is that of FLAN-T5's file less decoder and head.

    Arguments have the names of the published `config.json`.
    """

    def __init__(self, *, vocab_size: int, d_model: int, num_layers: int, num_heads: int, d_kv: int, d_ff: int) -> None:
        super().__init__()
        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = _T5Stack(d_model, num_layers, num_heads, d_kv, d_ff)

    @classmethod
    def large(cls) -> Self:
        """The sizes of FLAN-T5-Large, with random weights."""
        return cls(vocab_size=32128, d_model=1024, num_layers=24, num_heads=16, d_kv=64, d_ff=2816)

    def load_published(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take the encoder's tensors of the hub's file; all of them must be there."""
        self.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(T5_UNREAD)})
        return self

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L), mask (B, L) 0 at padding -> the last hidden state (B, L, E)."""
        return self.encoder(self.shared(ids), mask)
