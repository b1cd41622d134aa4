"""The FID Inception-v3 in MLX: pictures in, features out, equal to torch-fidelity's float32 run up to rounding.

This is the TensorFlow graph of 2015-12-05 that defines FID, not torchvision's Inception: average pools that do not
count padding, a max pool in the last block, 1008 outputs, its own weights (`inception_weights`). Maps are channels
last. Three rewritings change rounding only: batch norm is folded into the convolutions, sibling 1x1 convolutions of
one input are a single product, and a 1x1 convolution runs before the average pool it follows (both are linear).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import mlx.core as mx
import numpy as np

from ..device import lanes
from ..errors import MlxSfError
from .inception_weights import CONVS, FC

TAPS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008, "logits": 1008}
SIDE = 299  # the network's input
# images that are in flight together: on a CPU one per lane, whose largest buffers (25 MB) the allocator still recycles
_CHUNK = {"gpu": 32, "cpu": 1}
_MAX_LANES = 8

Pool = Callable[[mx.array], mx.array]


def resize_table(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TensorFlow 1 bilinear taps along one axis of `n` pixels: lo, hi (299,) int32 and the weight of hi, float32.

    Every operation is one float32 rounding, as in the reference: float64 coordinates would move the features by more
    than all other float noise together. No half-pixel offset, no antialiasing; the last taps repeat the edge.
    """
    src = np.arange(SIDE, dtype=np.float32) * np.float32(n / SIDE)
    lo = np.floor(src).astype(np.int32)
    return lo, np.minimum(lo + 1, n - 1).astype(np.int32), src - lo.astype(np.float32)


def preprocess(images: np.ndarray) -> mx.array:
    """Pictures (B, H, W, 3) uint8 -> the network's input (B, 299, 299, 3) float32 in [-1, 127/128]."""
    _check_images(images)
    x = mx.array(images).astype(mx.float32)
    x = _interpolate(x, axis=2)  # horizontal first: the order is part of the definition
    x = _interpolate(x, axis=1)
    return (x - 128) / 128


def _interpolate(x: mx.array, axis: int) -> mx.array:
    if x.shape[axis] == SIDE:
        return x
    lo, hi, t = resize_table(x.shape[axis])
    low, high = mx.take(x, mx.array(lo), axis=axis), mx.take(x, mx.array(hi), axis=axis)
    return low + (high - low) * mx.array(t.reshape((-1,) + (1,) * (3 - axis)))


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise MlxSfError(
            f"inception: pictures are {images.dtype} {images.shape}, want uint8 (B, H, W, 3): "
            "turn floats in [-1, 1] into pixels first (sample.to_uint8)"
        )


# ---- the three kinds of layer ----------------------------------------------------------------------------------


def conv2d(x: mx.array, w: mx.array, stride: int, pad: tuple[int, int]) -> mx.array:
    """Convolution of x (B, H, W, C) with w (O, kh, kw, C), by MLX's own kernel: the way on a GPU."""
    return mx.conv2d(x, w, stride, pad)


def conv2d_patches(x: mx.array, w: mx.array, kernel: tuple[int, int], stride: int, pad: tuple[int, int]) -> mx.array:
    """The same by gathered patches and one product with w (kh kw C, O), contiguous: the way on a CPU, where a BLAS is
    much faster than MLX's convolution."""
    kh, kw = kernel
    if pad != (0, 0):
        x = mx.pad(x, [(0, 0), (pad[0], pad[0]), (pad[1], pad[1]), (0, 0)])
    B, H, W, C = x.shape
    ho, wo = (H - kh) // stride + 1, (W - kw) // stride + 1
    if C < _LONG_RUN:
        # kw pixels of C channels lie side by side in memory: copied in one run
        strides = (H * W * C, stride * W * C, stride * C, W * C, 1)
        patches = mx.as_strided(x, (B, ho, wo, kh, kw * C), strides)
    else:
        patches = mx.take(x.reshape(B * H * W, C), _pixels_of_patches(B, H, W, kernel, stride), axis=0)
    return (patches.reshape(B * ho * wo, kh * kw * C) @ w).reshape(B, ho, wo, -1)


_LONG_RUN = 64  # channels from which looking pixels up one by one, each a block copy, is the faster way to gather


@cache
def _pixels_of_patches(B: int, H: int, W: int, kernel: tuple[int, int], stride: int) -> mx.array:
    """Numbers of the pixels of every patch, image by image and row by row: (B ho wo kh kw,)."""
    rows, columns = (
        np.arange(0, n - k + 1, stride)[:, None] + np.arange(k) for n, k in zip((H, W), kernel, strict=True)
    )
    images = np.arange(B)[:, None, None, None, None] * H * W
    return mx.array((images + rows[:, None, :, None] * W + columns[:, None, :]).reshape(-1).astype(np.uint32))


def max_pool(x: mx.array, stride: int, pad: int = 0) -> mx.array:
    """3x3 maximum. Inputs are at least 0 here, so zero padding never wins."""
    if pad:
        x = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    for axis in (2, 1):
        n = (x.shape[axis] - 3) // stride * stride + 1
        a, b, c = (x[:, :, i : i + n : stride] if axis == 2 else x[:, i : i + n : stride] for i in range(3))
        x = mx.maximum(mx.maximum(a, b), c)
    return x


def avg_pool(x: mx.array) -> mx.array:
    """3x3 average, stride 1, over the cells that exist: 9 inside, 6 on edges, 4 in corners."""
    p = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    p = p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]
    p = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    rows, columns = (np.minimum(np.arange(n) + 2, n) - np.maximum(np.arange(n) - 1, 0) for n in x.shape[1:3])
    return p * mx.array((1.0 / (rows[:, None] * columns))[..., None].astype(np.float32))


def _mean(x: mx.array) -> mx.array:
    return x.mean(axis=2).mean(axis=1)  # in two steps: a running float32 sum of 5329 cells would cost two digits


# ---- the network -----------------------------------------------------------------------------------------------


class Inception:
    """The network with its weights on the default device.

    Args:
        weights: the 472 float32 tensors in PyTorch's names and layout (`inception_weights.load_inception`).
        count: on a CPU, how many images are worked on side by side (`lanes`); default one per available core, at most
            8. Memory is about 0.15 GB for each.
        patches: whether convolutions are gathered patches times a matrix; default: on a CPU.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], count: int | None = None, patches: bool | None = None
    ) -> None:
        self.kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
        self.patches = self.kind == "cpu" if patches is None else patches
        self._params = {name: fold_batch_norm(weights, name) for name in CONVS}
        self._fc = mx.array(weights[FC + ".weight"].T), mx.array(weights[FC + ".bias"])
        for block, names in _SIBLINGS.items():
            parts = [self._params.pop(f"{block}.{n}") for n in names]
            w = mx.concatenate([w.reshape(w.shape[0], -1) for w, _ in parts])
            self._params[block] = mx.contiguous(w.T), mx.concatenate([b for _, b in parts])
        for name, c in CONVS.items():
            if name in self._params and (self.patches or c.kernel == (1, 1)):
                w, b = self._params[name]
                self._params[name] = mx.contiguous(w.reshape(c.out, -1).T), b  # a third faster than the transpose
        self.lanes = min(count or lanes.count(), _MAX_LANES) if self.kind == "cpu" else 1
        mx.eval(self._params, self._fc)

    def features(self, images: np.ndarray, taps: Sequence[str] = ("2048",)) -> dict[str, np.ndarray]:
        """Features of pictures (B, H, W, 3) uint8 of any size: {tap: (B, D) float32}, D as in `TAPS`.

        The batch is worked off in chunks, so memory does not grow with it; the result does not depend on it beyond
        rounding.
        """
        _check_images(images)
        unknown = [t for t in taps if t not in TAPS]
        if unknown:
            raise MlxSfError(f"inception: no features called {unknown[0]!r}, want one of {', '.join(TAPS)}")
        size, n = _CHUNK[self.kind], self.lanes
        chunks = [images[i : i + size] for i in range(0, len(images), size)]
        done: list[dict[str, mx.array]] = []
        for i in range(0, len(chunks), n):
            done += lanes.run([partial(self._chunk, chunk, taps) for chunk in chunks[i : i + n]])
        return {t: np.concatenate([np.asarray(f[t]) for f in done]) for t in taps}

    def _chunk(self, images: np.ndarray, taps: Sequence[str]) -> dict[str, mx.array]:
        return self.forward(preprocess(images), taps)

    def forward(self, x: mx.array, taps: Sequence[str]) -> dict[str, mx.array]:
        """Lazy features of preprocessed images (B, 299, 299, 3); stops after the last tap that is wanted."""
        found: dict[str, mx.array] = {}
        for name, out in self.stages(x):
            tap = _TAP_AFTER.get(name)
            if tap is not None and tap in taps:
                found[tap] = out if name == "AvgPool" else _mean(out)
            if len(found) == len(set(taps)):
                return found
        if {"logits", "logits_unbiased"} & set(taps):
            w, b = self._fc
            unbiased = out @ w
            found["logits_unbiased"], found["logits"] = unbiased, unbiased + b
        return {t: found[t] for t in taps}

    def stages(self, x: mx.array) -> Iterator[tuple[str, mx.array]]:
        """The outputs of the top-level layers, by the names of their weights, for x (B, 299, 299, 3)."""
        for name, layer in (
            ("Conv2d_1a_3x3", self._single),  # (B, 149, 149, 32)
            ("Conv2d_2a_3x3", self._single),  # (B, 147, 147, 32)
            ("Conv2d_2b_3x3", self._single),  # (B, 147, 147, 64)
            ("MaxPool_1", _halve),  # (B, 73, 73, 64)
            ("Conv2d_3b_1x1", self._single),  # (B, 73, 73, 80)
            ("Conv2d_4a_3x3", self._single),  # (B, 71, 71, 192)
            ("MaxPool_2", _halve),  # (B, 35, 35, 192)
            ("Mixed_5b", self._block_a),  # (B, 35, 35, 256)
            ("Mixed_5c", self._block_a),  # (B, 35, 35, 288)
            ("Mixed_5d", self._block_a),  # (B, 35, 35, 288)
            ("Mixed_6a", self._block_b),  # (B, 17, 17, 768)
            ("Mixed_6b", self._block_c),
            ("Mixed_6c", self._block_c),
            ("Mixed_6d", self._block_c),
            ("Mixed_6e", self._block_c),  # (B, 17, 17, 768)
            ("Mixed_7a", self._block_d),  # (B, 8, 8, 1280)
            ("Mixed_7b", self._block_e),  # (B, 8, 8, 2048)
            ("Mixed_7c", self._block_e),  # (B, 8, 8, 2048)
        ):
            x = layer(x, name)
            yield name, x
        yield "AvgPool", _mean(x)

    def _single(self, x: mx.array, name: str) -> mx.array:
        c = CONVS[name]
        w, b = self._params[name]
        if c.kernel == (1, 1):
            y = x @ w
        elif self.patches:
            y = conv2d_patches(x, w, c.kernel, c.stride, c.pad)
        else:
            y = conv2d(x, w, c.stride, c.pad)
        return mx.maximum(y + b, 0)

    def _branch(self, x: mx.array, block: str, *names: str) -> mx.array:
        for name in names:
            x = self._single(x, f"{block}.{name}")
        return x

    def _siblings(self, x: mx.array, block: str) -> list[mx.array]:
        """The block's 1x1 convolutions of its input, as one product."""
        w, b = self._params[block]
        ends = np.cumsum([CONVS[f"{block}.{n}"].out for n in _SIBLINGS[block]])[:-1].tolist()
        return list(mx.split(mx.maximum(x @ w + b, 0), ends, axis=-1))

    def _pooled(self, x: mx.array, block: str) -> mx.array:
        w, b = self._params[f"{block}.branch_pool"]
        return mx.maximum(avg_pool(x @ w) + b, 0)

    def _block_a(self, x: mx.array, name: str) -> mx.array:
        a, b, c = self._siblings(x, name)
        b = self._branch(b, name, "branch5x5_2")
        c = self._branch(c, name, "branch3x3dbl_2", "branch3x3dbl_3")
        return mx.concatenate([a, b, c, self._pooled(x, name)], axis=-1)

    def _block_b(self, x: mx.array, name: str) -> mx.array:
        b = self._branch(x, name, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return mx.concatenate([self._branch(x, name, "branch3x3"), b, max_pool(x, 2)], axis=-1)

    def _block_c(self, x: mx.array, name: str) -> mx.array:
        a, b, c = self._siblings(x, name)
        b = self._branch(b, name, "branch7x7_2", "branch7x7_3")
        c = self._branch(c, name, *(f"branch7x7dbl_{i}" for i in range(2, 6)))
        return mx.concatenate([a, b, c, self._pooled(x, name)], axis=-1)

    def _block_d(self, x: mx.array, name: str) -> mx.array:
        a, b = self._siblings(x, name)
        a = self._branch(a, name, "branch3x3_2")
        b = self._branch(b, name, "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
        return mx.concatenate([a, b, max_pool(x, 2)], axis=-1)

    def _block_e(self, x: mx.array, name: str) -> mx.array:
        a, b, c = self._siblings(x, name)
        c = self._branch(c, name, "branch3x3dbl_2")
        wide = [self._branch(b, name, f"branch3x3_2{s}") for s in "ab"]
        wide += [self._branch(c, name, f"branch3x3dbl_3{s}") for s in "ab"]
        # the two last blocks differ in their pool, and nothing but the graph of 2015 says why
        pool = self._pooled(x, name) if name == "Mixed_7b" else self._branch(max_pool(x, 1, 1), name, "branch_pool")
        return mx.concatenate([a, *wide, pool], axis=-1)


# 1x1 convolutions that share their block's input, in the order in which the block unpacks them
_SIBLINGS = {
    **{f"Mixed_5{c}": ("branch1x1", "branch5x5_1", "branch3x3dbl_1") for c in "bcd"},
    **{f"Mixed_6{c}": ("branch1x1", "branch7x7_1", "branch7x7dbl_1") for c in "bcde"},
    "Mixed_7a": ("branch3x3_1", "branch7x7x3_1"),
    **{f"Mixed_7{c}": ("branch1x1", "branch3x3_1", "branch3x3dbl_1") for c in "bc"},
}
_TAP_AFTER = {"MaxPool_1": "64", "MaxPool_2": "192", "Mixed_6e": "768", "AvgPool": "2048"}


def _halve(x: mx.array, name: str) -> mx.array:
    return max_pool(x, 2)


def fold_batch_norm(weights: Mapping[str, np.ndarray], name: str) -> tuple[mx.array, mx.array]:
    """Weight (O, kh, kw, I) and bias (O,) of a convolution and the batch norm (eps 0.001) behind it, float32."""
    part = {k: weights[f"{name}.bn.{k}"].astype(np.float64) for k in ("weight", "bias", "running_mean", "running_var")}
    scale = part["weight"] / np.sqrt(part["running_var"] + 1e-3)
    w = weights[f"{name}.conv.weight"].astype(np.float64) * scale[:, None, None, None]
    b = part["bias"] - part["running_mean"] * scale
    return mx.array(np.ascontiguousarray(w.transpose(0, 2, 3, 1), dtype=np.float32)), mx.array(b.astype(np.float32))
