"""How far each solver's pictures are from those of 1,000 Heun steps, over the number of network evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.config import Config
from ..checkpoints.load import demo_checkpoint, load_model
from ..common.files import replacing
from ..common.progress import Progress
from ..data.captioned_scenes import caption, describe
from ..device.defaults import compile_by_default
from ..flow import FlowConfig, PredParam
from ..models import Asked, build
from ..models.jit import JiT
from ..models.jit_sizes import model_config
from ..models.mmjit import model_config as mmjit_config
from ..models.text import TextConfig
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig, evaluations

STEPS = {
    "euler": (4, 6, 8, 12, 16, 25, 36, 50, 100),
    "heun": (2, 3, 4, 6, 8, 12, 18, 25, 50),
    "multistep": (4, 6, 8, 12, 16, 25, 36, 50, 100),
}
RANDOM: dict[str, dict[str, Any]] = {
    "random, x-prediction": {},
    "random, x-prediction, no forcing, noise 2": {"forcing": None, "noise_scale": 2.0},
    "random, v-prediction": {"pred_param": "v"},
    "random, hybrid": {"pred_param": "hybrid"},
}
# name -> (model, guidance scale)
# text to image: an untrained MM-JiT of a laptop's size, without forcing, noise 2, as published
T2I = "random, text to image"
CASES: dict[str, tuple[str, float]] = {
    "demo model, no guidance": ("demo", 1.0),
    "demo model, guidance 2": ("demo", 2.0),
    "random, x-prediction, guidance 2.9": ("random, x-prediction", 2.9),
    "random, no forcing, noise 2, guidance 2.9": ("random, x-prediction, no forcing, noise 2", 2.9),
    "random, v-prediction, guidance 2.9": ("random, v-prediction", 2.9),
    "random, hybrid, guidance 2.9": ("random, hybrid", 2.9),
    "random, text to image, guidance 6": (T2I, 6.0),
}


def random_network(
    pred_param: PredParam = "x", seed: int = 0, noise_scale: float = 1.0, **fields: Any
) -> tuple[JiT, Config]:
    """A small untrained network in which every parameter acts: what the usual start leaves at zero is random, too.

    `fields` are those of `JiTConfig`.
    """
    channels = 6 if pred_param == "hybrid" else 3
    config = Config(
        model_config("nano", 8, 32, depth=2, num_classes=10, out_channels=channels, **fields),
        FlowConfig(pred_param=pred_param, noise_scale=noise_scale),
    )
    model = JiT(config.model, mx.random.key(seed))
    leaves: Any = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed + 1), len(leaves))
    filled = []
    for (name, w), key in zip(leaves, keys, strict=True):
        if "adaLN" in name:
            w = mx.random.normal(w.shape, key=key) * (0.5 if w.ndim == 1 else w.shape[-1] ** -0.5)
        elif name.startswith("final_layer.linear"):
            w = mx.random.normal(w.shape, key=key) * 0.05 * w.shape[-1] ** -0.5  # pictures of the usual contrast
        elif name.startswith(("t_embedder", "y_embedder")):
            w = w * 20  # the usual 0.02 would leave time and class without effect
        elif name.startswith("x_embedder"):
            w = w * 4
        filled.append((name, w))
    model.update(tree_unflatten(filled))
    return model, config


def random_t2i(seed: int = 0) -> tuple[Any, Config]:
    """A small untrained MM-JiT in which every parameter acts, with made-up features of its prompts."""
    config = mmjit_config("nano", 8, 64, text=TextConfig("", 64, 16))
    network = build(config, mx.random.key(seed))
    weight = network.final_layer.linear.weight
    drawn = mx.random.normal(weight.shape, key=mx.random.key(seed + 1))
    network.update({"final_layer": {"linear": {"weight": 0.5 * drawn * weight.shape[1] ** -0.5}}})
    rng = np.random.default_rng(seed)
    features = {str(i): rng.standard_normal((8, 64), dtype=np.float32) for i in range(16)}
    network.features = lambda prompts: [features[p] for p in prompts]
    return network, Config(config, FlowConfig(noise_scale=2.0, t_eps=0.001))


def _case(name: str) -> tuple[Any, Config]:
    """The network of a case: the demo, a checkpoint by its path, an untrained one."""
    if name == T2I:
        return random_t2i()
    if name in RANDOM:
        return random_network(**RANDOM[name])
    return load_model(demo_checkpoint() if name == "demo" else name)


def _asked(config: Config, count: int) -> list[Asked]:
    """Classes in turn; or prompts: of scenes where the network knows their words, else numbers of made-up ones."""
    if config.model.num_classes:
        return [i % config.model.num_classes for i in range(count)]
    if config.model.text.words:
        return [caption(describe(i)) for i in range(count)]
    return [str(i) for i in range(count)]


def measure_solvers(
    cases: Mapping[str, tuple[str, float]] = CASES,
    images: int = 2,
    steps: Mapping[str, Sequence[int]] = STEPS,
    reference: tuple[str, int] = ("heun", 1000),
) -> dict[str, list[dict[str, Any]]]:
    """Root mean square distance, over pixels and images, of each solver's result from that of the `reference`.

    `cases` name a network, "demo", one of `RANDOM`, `T2I` or a checkpoint's path, and a guidance scale. All solve the
    same flow with the same noise, classes and bound of 1 - t. Returns, for each case, a row per solver
    and number of steps: method, steps, evaluations of the network per image, distance (images are in [-1, 1]).
    """
    result: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        name, cfg = cases[case]
        model, config = _case(name)
        low = 0.1 if config.model.num_classes else 0.0  # the published intervals
        noise, asked = seeded_noise(range(images), config.model.size), _asked(config, images)
        runs = [reference, *((method, n) for method, counts in steps.items() for n in counts)]
        with Progress(sum(n for _, n in runs), case, "steps") as bar:
            finished = []
            for method, n in runs:
                sample = SampleConfig(method, n, cfg, low, 1.0)  # type: ignore[arg-type]
                sampler = Sampler(model, config.flow, sample, compile_by_default())
                for state in sampler.states(noise, asked):
                    mx.eval(state.z)
                    bar.update()
                finished.append(np.array(state.z))
        want = finished[0]
        result[case] = [
            {
                "method": method,
                "steps": n,
                "evaluations": evaluations(SampleConfig(method, n, cfg, low, 1.0)),  # type: ignore[arg-type]
                "distance": float(np.sqrt(np.mean((z - want) ** 2))),
            }
            for (method, n), z in zip(runs[1:], finished[1:], strict=True)
        ]
    return result


_STYLE = {"euler": ("#E69F00", "s", ":"), "heun": ("#0072B2", "o", "--"), "multistep": ("#009E73", "^", "-")}


def plot_solvers(path: Path, result: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A panel per case: distance over evaluations per image, both logarithmic. PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    columns = 2 if len(result) == 4 else min(3, len(result))
    rows = -(-len(result) // columns)
    figure = Figure(figsize=(3.7 * columns, 3.1 * rows + 0.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).reshape(-1)
    for axes, (case, measured) in zip(panels, result.items(), strict=False):
        for method, (colour, marker, line) in _STYLE.items():
            points = [(r["evaluations"], r["distance"]) for r in measured if r["method"] == method]
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=5, label=method)
        axes.set(xscale="log", yscale="log", title=case)
        axes.title.set_fontsize(9.5)
        axes.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[len(result) :]:
        axes.set_visible(False)
    panels[0].legend()
    figure.supxlabel("network evaluations per image")
    figure.supylabel("RMS distance to 1,000 Heun steps")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
