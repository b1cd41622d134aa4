"""The golden checks on this machine's own device: the published PyTorch code's numbers against ours, in seconds.

The numbers ship with the package (made from tests/golden by scripts/make_selftest.py). Tolerances for float32 are 20
times the difference between float32 and float64 runs of the reference, at least 2e-5 of an array's largest magnitude.
They hold for true float32 products only: MLX_ENABLE_TF32=0 must be set before MLX starts.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..checkpoints.config import Config
from ..flow import training_loss
from ..models import cast_products
from ..models.jit import ARCHITECTURE, JiT
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig
from ..spectral import SpectralForcing

# bf16 rounds operands to 8 bits: errors relative to the largest magnitude, bounds 3 to 15 times what a CPU measures
HALF_BOUNDS = {"forward": 0.03, "loss": 0.002, "gradient": 0.06, "sample": 0.03}


@dataclass(frozen=True)
class Check:
    """One comparison: largest absolute error against its tolerance."""

    name: str
    dtype: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # False for NaN


class _Golden:
    def __init__(self) -> None:
        with np.load(Path(__file__).parent / "selftest.npz") as z:
            self.arrays = {k: z[k] for k in z.files}
        self.index = json.loads(self.arrays["index"].tobytes())

    def get(self, name: str) -> mx.array:
        return mx.array(self.arrays[name])

    def model(self, name: str, dtype: str) -> tuple[JiT, Config]:
        config = Config.from_json(self.index["configs"][name], "selftest")
        model = JiT(config.model)
        prefix = f"weights/{name}/"
        tensors: Any = {k.removeprefix(prefix): mx.array(v) for k, v in self.arrays.items() if k.startswith(prefix)}
        if dtype != "float32":
            tensors = cast_products(tensors, mx.bfloat16, ARCHITECTURE)
        model.load_weights(list(tensors.items()), strict=True)
        return model, config

    def check(self, label: str, name: str, got: mx.array, dtype: str) -> Check:
        want = self.arrays[name].astype(np.float64)
        error = float(np.abs(np.asarray(got.astype(mx.float32), dtype=np.float64) - want).max())
        tolerance = self.index["tolerance"][name]
        if dtype != "float32":
            tolerance = HALF_BOUNDS[label.split(" ")[0]] * float(np.abs(want).max())
        return Check(label, dtype, error, tolerance)


def run(dtype: str) -> Iterator[Check]:
    """All checks with matrix products in `dtype`, "float32" or "bfloat16"."""
    golden = _Golden()
    if dtype == "float32":
        yield from _operator(golden)
    for case in ("forced", "vanilla", "noctx"):
        model, _ = golden.model(case, dtype)
        x, t, y = (golden.get(f"forward/{case}/{what}") for what in "xty")
        out = model(x, t, _labels(y))
        yield golden.check(f"forward {case}", f"forward/{case}/out", out, dtype)
    yield from _loss(golden, dtype)
    for case in golden.index["sampling"]:
        model, config = golden.model(case["model"], dtype)
        low, high = case["interval"]
        sample = SampleConfig(case["method"], case["steps"], case["cfg"], low, high)
        flow = dataclasses.replace(config.flow, noise_scale=case["noise_scale"], **case["overrides"])
        noise, labels = (golden.get(f"sample/{case['inputs']}/{what}") for what in ("noise", "labels"))
        *_, last = Sampler(model, flow, sample).states(noise, [int(y) for y in np.array(labels)])
        label = f"sample {case['model']}, {case['steps']} {case['method']} steps, cfg {case['cfg']}"
        yield golden.check(label, f"sample/{case['case']}/z_after_{case['steps']}", last.z, dtype)


def _labels(y: mx.array) -> dict[str, mx.array]:
    """The condition of labels that are in an array already."""
    return {"labels": y}


def _operator(golden: _Golden) -> Iterator[Check]:
    x, t = golden.get("operator/filter_x"), golden.get("operator/filter_t")
    for label, name, forcing in (
        ("spectral forcing, whole image", "filter_window16", SpectralForcing(16)),
        ("spectral forcing, windows of 4", "filter_window4", SpectralForcing(16, 4)),
        ("spectral forcing, fixed scale", "filter_fixed0.3", SpectralForcing(16, None, "fixed", 0.3)),
    ):
        yield golden.check(label, f"operator/{name}", forcing(x, t), "float32")


def _loss(golden: _Golden, dtype: str) -> Iterator[Check]:
    model, config = golden.model("forced", "float32")  # gradients belong to the float32 master weights
    x, t, y, noise = (golden.get(f"loss/forced_x/{what}") for what in ("x", "t", "labels_dropped", "noise"))

    def loss(parameters: Any) -> mx.array:
        model.update(parameters if dtype == "float32" else cast_products(parameters, mx.bfloat16, ARCHITECTURE))
        return training_loss(model, x, _labels(y), t, noise, config.flow)

    parameters = tree_map(lambda w: w, model.trainable_parameters())
    value, gradients = mx.value_and_grad(loss)(parameters)
    yield golden.check("loss forced", "loss/forced_x/loss", value, dtype)
    by_name: Any = dict(tree_flatten(gradients))
    prefix = "loss/forced_x/grad/"
    for name in (n for n in golden.arrays if n.startswith(prefix)):
        key = name.removeprefix(prefix + "net.")
        yield golden.check(f"gradient {key}", name, by_name[key].reshape(golden.arrays[name].shape), dtype)
