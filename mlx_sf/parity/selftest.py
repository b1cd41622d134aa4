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
from ..models import architecture, build, cast_products
from ..models.jit import ARCHITECTURE
from ..models.t5 import T5Config, encode
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig
from ..spectral import SpectralForcing
from . import selftest_u1

# bf16 rounds operands to 8 bits: errors relative to the largest magnitude, bounds 3 to 15 times what a CPU measures
HALF_BOUNDS = {"forward": 0.03, "loss": 0.002, "gradient": 0.06, "sample": 0.03, "text": 0.1, "u1,": 0.1}


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
    def __init__(self, file: str = "selftest.npz") -> None:
        with np.load(Path(__file__).parent / file) as z:
            self.arrays = {k: z[k] for k in z.files}
        self.index = json.loads(self.arrays["index"].tobytes())

    def get(self, name: str) -> mx.array:
        return mx.array(self.arrays[name])

    def model(self, name: str, dtype: str) -> tuple[Any, Config]:
        config = Config.from_json(self.index["configs"][name], "selftest")
        model = build(config.model)
        prefix = f"weights/{name}/"
        tensors: Any = {k.removeprefix(prefix): mx.array(v) for k, v in self.arrays.items() if k.startswith(prefix)}
        if dtype != "float32":
            tensors = cast_products(tensors, mx.bfloat16, architecture(config.model))
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

    yield from _text_to_image(dtype)
    yield from selftest_u1.checks(_Golden("selftest_u1.npz"), dtype)


def _text_to_image(dtype: str) -> Iterator[Check]:
    """MM-JiT with head sizes 12 and 52, guided steps of it, and the text encoder."""
    golden = _Golden("selftest_t2i.npz")
    for name, heads in (("small", 12), ("hd52", 52)):
        model, _ = golden.model(name, dtype)
        x, context, mask = (golden.get(f"forward/{name}/{what}") for what in ("x", "context", "mask"))
        out = model(x, mx.array([0.5]), {"context": context, "mask": mask})
        yield golden.check(f"text to image, heads of {heads}", f"forward/{name}/out", out, dtype)
    for case, s in golden.index["sampling"].items():
        model, config = golden.model(s["model"], dtype)
        context, mask, noise = (golden.arrays[f"sample/{s['model']}/{what}"] for what in ("context", "mask", "noise"))
        # the masked places are the last ones, as of shorter prompts
        rows = {str(i): c[: int(m.sum())] for i, (c, m) in enumerate(zip(context, mask, strict=True))}
        model.features = lambda prompts, rows=rows: [rows[p] for p in prompts]
        low, high = s["interval"]
        sample = SampleConfig(
            s["method"], s["steps"], s["guidance_scale"], low, high, t_eps=s["t_floor"], cfg_closed=True
        )
        *_, last = Sampler(model, config.flow, sample).states(mx.array(noise), list(rows))
        label = f"text to image, {s['steps']} steps, cfg {s['guidance_scale']}"
        yield golden.check(label, f"sample/{case}/z_after_{s['steps']}", last.z, dtype)
    names = {f.name for f in dataclasses.fields(T5Config)}
    config_t5 = T5Config(**{k: v for k, v in golden.index["t5"].items() if k in names})
    ids, mask = golden.arrays["t5/long/ids"], golden.arrays["t5/long/mask"]
    texts = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
    got = encode(
        config_t5,
        lambda name: golden.get(f"weights/t5/{name}"),
        lambda rows: golden.get("weights/t5/shared.weight")[mx.array(rows)],
        texts,
        mx.float32 if dtype == "float32" else mx.bfloat16,
    )
    want = golden.arrays["t5/long/out"]
    padded = np.stack([np.concatenate([g, w[len(g) :]]) for g, w in zip(got, want, strict=True)])
    yield golden.check("text encoder", "t5/long/out", mx.array(padded), dtype)


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
