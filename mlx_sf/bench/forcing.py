"""What Spectral Forcing costs: alone, as a share of the forward pass it belongs to, and in the forms it could have.

Three forms of the same operator take turns: this project's (`spectral.SpectralForcing`), the textbook one (the mask as
a sigmoid of every coefficient, as published code has it), and one with half the multiplications (even/odd split).
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..dct import dct2, dct_matrix, idct2, radial_frequency
from ..device.defaults import compile_by_default, dtype_name
from ..device.lanes import split_batch
from ..models.flops import forward_flops
from ..models.jit import JiTConfig
from ..models.jit_sizes import model_config
from ..sampling.noise import seeded_noise
from ..spectral import SpectralForcing, radial_mask
from .network import network
from .rates import Runs, alternate, product_rate

Filter = Callable[[mx.array, mx.array], mx.array]  # images (B, 3, H, H) and times (B,) or (1,) -> images


def textbook(n: int) -> Filter:
    """The published operator, whole image, written down as its formula says."""
    a = mx.array(dct_matrix(n).astype(np.float32))
    radius = mx.array(radial_frequency(n).astype(np.float32))
    return lambda z, t: idct2(dct2(z, a) * radial_mask(t, radius)[:, None], a)


def even_odd(n: int) -> Filter:
    """The published operator with half the multiplications: even rows of the DCT see sums of mirrored pixels, odd rows
    differences, along both axes. For an even side n.
    """
    h, a, r = n // 2, dct_matrix(n), radial_frequency(n)
    half = [mx.array(a[p::2, :h].astype(np.float32)) for p in (0, 1)]
    rise = [[mx.array(np.exp(30 * (r[p::2, q::2] - 1)).astype(np.float32)) for q in (0, 1)] for p in (0, 1)]

    def parts(x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
        x = x.swapaxes(axis, -1)
        first, mirrored = x[..., :h].swapaxes(axis, -1), x[..., : h - 1 : -1].swapaxes(axis, -1)
        return first + mirrored, first - mirrored

    def whole(even: mx.array, odd: mx.array, axis: int) -> mx.array:
        last = (even - odd).swapaxes(axis, -1)[..., ::-1].swapaxes(axis, -1)
        return mx.concatenate([even + odd, last], axis=axis)

    def run(z: mx.array, t: mx.array) -> mx.array:
        q = mx.exp(30 * 0.95 * (1 - t))[:, None, None, None]
        rows: list[tuple[mx.array, mx.array]] = []
        for i, u in enumerate(parts(z, -2)):
            quarter = []
            for j, v in enumerate(parts(half[i] @ u, -1)):
                f = (v @ half[j].T) / (1 + rise[i][j] * q)
                quarter.append(half[i].T @ (f @ half[j]))
            rows.append((quarter[0], quarter[1]))
        (ee, eo), (oe, oo) = rows
        return whole(whole(ee, eo, -1), whole(oe, oo, -1), -2)

    return run


def operator_flops(config: JiTConfig) -> int:
    """Floating-point operations of the forcing's four dense products for one image, a multiply-add counted as two."""
    return forward_flops(config) - forward_flops(dataclasses.replace(config, forcing=None))


def measure_forcing(size: str, img_size: int, batch: int, dtype: mx.Dtype, rounds: int = 9) -> dict[str, Any]:
    """Seconds of the operator on a batch (medians), with a time per image as in training and one time as in sampling.

    The whole image is one window. `share` figures are of a forward pass of the network timed in the same rounds.
    """
    config = model_config(size, img_size=img_size)
    model = network(config, dtype)
    x, y = seeded_noise(range(batch), config.size), model.condition([0] * batch)
    times = {"per_image": mx.linspace(0.02, 0.98, batch), "shared": mx.array([0.4])}
    mx.eval(x, y, *times.values())
    forms: dict[str, Filter] = {"forcing": SpectralForcing(img_size), "textbook": textbook(img_size)}
    if img_size % 2 == 0:
        forms["even_odd"] = even_odd(img_size)

    def runner(function: Callable[..., mx.array], t: mx.array) -> Callable[[], None]:
        run = mx.compile(function) if compile_by_default() else split_batch(function)
        return lambda: mx.eval(run(x, t, y))

    runs: Runs = {"forward": runner(model, times["per_image"])}
    for form, f in forms.items():
        for kind, t in times.items():
            runs[f"{form}_{kind}"] = runner(lambda z, t, y, f=f: f(z, t), t)
    taken = alternate(runs, rounds)
    forward, flops = statistics.median(taken["forward"]), operator_flops(config) * batch
    rate = product_rate(mx.float32)
    return {
        "what": f"{size} at {img_size}, batch {batch}, whole image, {dtype_name(dtype)} network",
        "rounds": rounds,
        "forward_seconds": forward,
        **{f"{name}_seconds": statistics.median(v) for name, v in taken.items() if name != "forward"},
        **{f"share_of_forward_{kind}": statistics.median(taken[f"forcing_{kind}"]) / forward for kind in times},
        "share_of_forward_flops": operator_flops(config) / forward_flops(config),
        "flops": flops,
        "product_rate": rate,
        "share_of_product_rate": flops / statistics.median(taken["forcing_shared"]) / rate,
        "fastest_and_slowest": {name: [min(v), max(v)] for name, v in taken.items()},
    }
