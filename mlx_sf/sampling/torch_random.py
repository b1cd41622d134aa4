"""PyTorch's normal numbers: what `torch.randn` draws for a seed, on a CPU or on a CUDA device.

A CPU generator is a 32-bit Mersenne Twister. Its float32 normals are equal to the bit to PyTorch's on x86-64 with AVX2
(there logarithm, sine and cosine are Cephes polynomials with fused multiply-adds); on ARM, a Mac, PyTorch takes the C
library's and differs in the last bits, by at most 2e-6.

A CUDA generator is Philox4x32-10. Its words are exact, its normals agree to about 2e-6, because a GPU's logarithm and
sine are not correctly rounded. Not verified on a GPU: which number of a thread goes to which element, once a draw has
more elements than the GPU starts threads, and how far a draw moves the stream on. Both follow PyTorch's sources.

Sources: PyTorch's ATen (DistributionTemplates, avx_mathfun, PhiloxRNGEngine) and Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3" (2011).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from ..common.fields import require

Device = Literal["cpu", "cuda"]
# threads that PyTorch starts at most for a draw: multiprocessors x threads each
GPU_THREADS = {"a100": 108 * 2048, "h100": 132 * 2048, "h200": 132 * 2048, "4090": 128 * 1536}


def randn(shape: Sequence[int], seed: int, device: Device = "cpu", threads: int = GPU_THREADS["a100"]) -> np.ndarray:
    """What `torch.randn(shape, device=device)` gives right after `torch.manual_seed(seed)`, float32.

    `threads` (`GPU_THREADS`) matters on "cuda" alone, for more elements than the GPU starts threads: one image of 256
    pixels is the same on all of these.
    """
    require(device in get_args(Device), "device", device, "cpu or cuda")
    return CpuGenerator(seed).randn(shape) if device == "cpu" else cuda_randn(shape, seed, threads)


# ------------------------------------------------------------------------------------------------ CPU


class CpuGenerator:
    """`torch.Generator().manual_seed(seed)`: only the seed's low 32 bits count."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # init_genrand, as PyTorch seeds
        self._kept: float | None = None  # second number of a pair, for the next draw of few

    def words(self, count: int) -> np.ndarray:
        """The next `count` 32-bit words (uint64 array)."""
        return np.asarray(self._bits.random_raw(count))

    def rand(self, count: int) -> np.ndarray:
        """`torch.rand(count)`, float32."""
        return ((self.words(count) & 0xFFFFFF) * 2.0**-24).astype(np.float32)

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """`torch.randn(shape)`, float32: one by one for fewer than 16 numbers, else in blocks of 16."""
        count = math.prod(shape)
        if count < 16:
            return np.array([self._one() for _ in range(count)], np.float32).reshape(tuple(shape))
        values = self.rand(count)
        whole = count // 16 * 16
        out = np.empty(count, np.float32)
        out[:whole] = _blocks(values[:whole])
        if whole < count:  # the last 16 anew, over the end of the block before
            out[-16:] = _blocks(self.rand(16))
        return out.reshape(tuple(shape))

    def skip(self, count: int) -> None:
        """Go past a draw of `count` normals."""
        if count < 16:
            self.randn((count,))
        else:
            self.words(count if count % 16 == 0 else count + 16)

    def _one(self) -> float:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        words = [int(w) for w in self.words(4)]
        u1, u2 = (((words[i] << 32 | words[i + 1]) & (2**53 - 1)) * 2.0**-53 for i in (0, 2))
        r, angle = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._kept = r * math.sin(angle)
        return r * math.cos(angle)


def _blocks(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller of blocks of 16: eight radii, eight angles."""
    u = uniform.reshape(-1, 2, 8)
    r = np.sqrt(np.float32(-2) * _log32(np.float32(1) - u[:, 0]))
    sine, cosine = _sincos32(np.float32(6.2831855) * u[:, 1])
    return np.stack([r * cosine, r * sine], axis=1).reshape(-1)


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """a b + c of float32 numbers, rounded once: the exact product in float64, added with rounding to odd."""
    product, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    # to the odd neighbour on the side of what is missing: magnitudes grow with the bits
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(even, bits + step, bits).view(np.float64).astype(np.float32)


_LOG = [
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
]  # fmt: skip


def _log32(x: np.ndarray) -> np.ndarray:
    """Cephes' logf with fused steps, x in (0, 1]."""
    m, e = np.frexp(x)
    small = m < np.float32(0.707106781186547524)
    e = (e - small).astype(np.float32)
    m = np.where(small, m + m, m) - np.float32(1)
    y: Any = np.full_like(m, np.float32(_LOG[0]))
    for p in _LOG[1:]:
        y = _fma(y, m, np.float32(p))
    y, z = y * m, m * m
    y = _fma(y, z, e * np.float32(-2.12194440e-4))
    y = _fma(z, np.float32(-0.5), y)
    return _fma(e, np.float32(0.693359375), m + y)


def _sincos32(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cephes' sinf and cosf with fused steps, x from 0 to 2 pi."""
    octant = ((x * np.float32(1.27323954473516)).astype(np.int32) + 1) & ~1
    y = octant.astype(np.float32)
    for part in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8):
        x = _fma(y, np.float32(part), x)
    z = x * x
    c = _fma(_fma(np.float32(2.443315711809948e-5), z, np.float32(-1.388731625493765e-3)), z,
             np.float32(4.166664568298827e-2))  # fmt: skip
    c = _fma(c * z, z, -(z * np.float32(0.5))) + np.float32(1)
    s = _fma(_fma(np.float32(-1.9515295891e-4), z, np.float32(8.3321608736e-3)), z, np.float32(-1.6666654611e-1)) * z
    s = _fma(s, x, x)
    swap = octant & 2 != 0
    sine, cosine = np.where(swap, c, s), np.where(swap, s, c)
    return np.where(octant & 4 != 0, -sine, sine), np.where((octant - 2) & 4 == 0, -cosine, cosine)


# ------------------------------------------------------------------------------------------------ CUDA


_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10: words (N, 4) uint32 for counters (N, 4) uint32 and a 64-bit key."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & _LOW,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & _LOW,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32)


def cuda_randn(
    shape: Sequence[int],
    seed: int,
    threads: int = GPU_THREADS["a100"],
    call: int = 0,
    part: slice = slice(None),
) -> np.ndarray:
    """What call number `call` of `torch.randn(shape, device="cuda")` gives after `torch.cuda.manual_seed(seed)`.

    All calls before it had the same shape. `part` takes rows (of the first axis); nothing else is computed then.
    """
    require(threads >= 256 and threads % 256 == 0, "threads", threads, "a multiple of 256")
    count = math.prod(shape)
    T = min(threads, -(-count // 256) * 256)
    rounds = (count - 1) // (4 * T) + 1 if count else 0
    # the four numbers of a thread's round k are elements thread + T (4 k ... 4 k + 3)
    first, last, _ = part.indices(shape[0])
    row = math.prod(shape[1:])
    slot, thread = np.divmod(np.arange(first * row, max(first, last) * row), max(T, 1))
    n = (call * rounds + slot // 4).astype(np.uint64)
    counter = np.stack([n & _LOW, n >> np.uint64(32), thread.astype(np.uint64), np.zeros_like(n)], axis=1)
    words = philox(counter.astype(np.uint32), seed)
    second = (slot & 2 != 0)[:, None]
    pair = np.where(second, words[:, 2:], words[:, :2])
    return _box_muller(pair, slot & 1 == 0).reshape(-1, *shape[1:])


def _box_muller(pair: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """A normal of two words, by sine or by cosine: u = a 2^-32 + 2^-33, v = 2 pi (b 2^-32 + 2^-33)."""
    x, y = pair[:, 0].astype(np.float32), pair[:, 1].astype(np.float32)
    u = _fma(x, np.float32(2.0**-32), np.float32(2.0**-33)).astype(np.float64)
    v = _fma(y, np.float32(2 * math.pi * 2.0**-32), np.float32(math.pi * 2.0**-32)).astype(np.float64)
    return (np.sqrt(-2 * np.log(u)) * np.where(sine, np.sin(v), np.cos(v))).astype(np.float32)
