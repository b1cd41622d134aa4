"""Where capacity goes: networks whose errors are known in closed form land where they must."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_sf.checkpoints.checkpoint import save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.data.numbered import NumberedSource
from mlx_sf.dct import dct2, dct_matrix, idct2
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models.jit import JiT, JiTConfig
from mlx_sf.spectrum.capacity import (
    band_edges,
    classes_for,
    colour_wiener_error,
    into_bands,
    measure_capacity,
    wiener_error,
)
from mlx_sf.spectrum.meter import Rings, measure

SIDE = 16
TIMES = (0.1, 0.4, 0.7, 0.9)


class Fields(NumberedSource):
    """A source of 8-bit power-law fields of three independent channels, as if they were training pictures."""

    endless, size, class_names = True, (SIDE, SIDE), ("a", "b", "c")

    def __len__(self) -> int:
        return 100

    def load(self, index: int) -> tuple[np.ndarray, int]:
        k = Rings(SIDE).radius.copy()
        k[0, 0] = np.inf
        d = dct_matrix(SIDE)
        e = np.random.default_rng(index).standard_normal((3, SIDE, SIDE))
        x = d.T @ (e * np.sqrt(2.0 * k**-1.5)) @ d
        return np.round(np.clip(127.5 * (x + 1), 0, 255)).astype(np.uint8).transpose(1, 2, 0), index % 3

    def name(self, index: int) -> str:
        return f"field {index}"

    def describe(self) -> str:
        return "fields"


class Computed:
    """A network that is a function of state, time and labels."""

    def __init__(self, function):
        self.function = function

    def condition(self, asked):
        return mx.array([3 if a is None else a for a in asked])

    def parameters(self):
        return {}

    def __call__(self, z, t, condition):
        return self.function(z, t, condition)


def config(pred_param: str = "x", **flow) -> Config:
    channels = 6 if pred_param == "hybrid" else 3
    model = JiTConfig(
        img_size=SIDE, patch_size=4, hidden_size=16, depth=1, num_heads=2, bottleneck_dim=4, in_context_len=0,
        num_classes=3, out_channels=channels,
    )  # fmt: skip
    return Config(model, FlowConfig(pred_param=pred_param, **flow))


@pytest.fixture(scope="module")
def spectrum():
    return measure(Fields(), 400)


def wiener_network(spectrum, noise_scale: float = 1.0):
    """Estimates x from z by the gain S / (S + N) per coefficient, divided by t."""
    rings, a = spectrum.rings, mx.array(dct_matrix(SIDE).astype(np.float32))
    of = np.searchsorted(rings.k, np.floor(rings.radius + 0.5).astype(int))
    power = mx.array(spectrum.power()[of].astype(np.float32))

    def network(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
        noise = mx.square((1 - t) / t * noise_scale).reshape(-1, 1, 1, 1)
        return idct2(dct2(z / t.reshape(-1, 1, 1, 1), a) * power / (power + noise), a)

    return network


def test_bands_hold_every_ring_but_the_mean_once() -> None:
    for n in (8, 16, 64, 256, 512):
        rings = Rings(n)
        edges = band_edges(rings)
        assert (edges[0], edges[-1]) == (1, rings.k[-1] + 1)
        assert np.all(np.diff(edges) >= 1)
        values = np.random.default_rng(n).random(len(rings.k))
        counts = [rings.counts[(rings.k >= a) & (rings.k < b)].sum() for a, b in itertools.pairwise(edges)]
        assert into_bands(rings, values) @ counts == pytest.approx(values[1:] @ rings.counts[1:])


def test_wiener_errors_are_the_closed_form() -> None:
    s, n = np.array([4.0, 1.0, 0.1]), 0.5
    assert wiener_error(s, s, n) == pytest.approx(s * n / (s + n))
    diagonal = s[:, None, None] * np.eye(3)
    assert colour_wiener_error(diagonal, diagonal, n) == pytest.approx(s * n / (s + n))
    grey = s[:, None, None] * np.ones((3, 3))  # three equal channels: three looks at one value
    assert colour_wiener_error(grey, grey, n) == pytest.approx(s * n / (3 * s + n))


def test_an_empty_output_is_useless_everywhere(spectrum) -> None:
    c = measure_capacity(Computed(lambda z, t, y: mx.zeros_like(z)), config(), Fields(), spectrum, 24, TIMES)
    assert np.abs(c.against_zero).max() < 1e-4
    assert c.useless.all()
    assert not c.modelled.any()
    assert (c.error.shape, c.images) == ((4, len(c.low)), 24)
    assert np.all(c.against_wiener > 0)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_a_wiener_filter_ties_with_the_wiener_estimate(spectrum, noise_scale: float) -> None:
    network = wiener_network(spectrum, noise_scale)
    c = measure_capacity(Computed(network), config(noise_scale=noise_scale), Fields(), spectrum, 96, TIMES)
    assert np.all(np.abs(c.against_wiener) < 4 * c.deviation + 0.02)
    assert np.all(np.abs(c.against_wiener[:, 3:]) < 0.5)
    assert c.modelled.mean() < 0.1
    assert not c.useless[2:, :5].any()  # and at late times it is far better than nothing


def test_what_the_network_predicts_does_not_matter(spectrum) -> None:
    x_network = wiener_network(spectrum)

    def v_network(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
        return (x_network(z, t, y) - z) / mx.maximum(1 - t, 0.05).reshape(-1, 1, 1, 1)

    def hybrid(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
        return mx.concatenate([x_network(z, t, y), v_network(z, t, y)], axis=1)

    times = (*TIMES, 0.97)  # beyond t_eps too
    want = measure_capacity(Computed(x_network), config(), Fields(), spectrum, 8, times)
    for network, kind in ((v_network, "v"), (hybrid, "hybrid")):
        got = measure_capacity(Computed(network), config(kind), Fields(), spectrum, 8, times)
        assert got.error == pytest.approx(want.error, rel=1e-3)
        assert got.wiener == pytest.approx(want.wiener)


def test_the_same_seed_gives_the_same_errors_and_labels_reach_the_network(spectrum) -> None:
    seen: list[list[int]] = []

    def network(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
        seen.append(np.array(y).tolist())
        return 0.5 * z

    a, b = (measure_capacity(Computed(network), config(), Fields(), spectrum, 8, TIMES, seed=5) for _ in range(2))
    assert np.array_equal(a.error, b.error)
    assert {y for batch in seen for y in batch} <= {0, 1, 2}
    named = Config(config().model, class_names=("x", "y", "z"))
    assert classes_for(named, Fields(), [0, 2]) == [None, None]  # other classes: "no class"
    assert classes_for(Config(config().model, class_names=("a", "b", "c")), Fields(), [0, 2]) == [0, 2]


def test_refusals(spectrum) -> None:
    def network(z: mx.array, t: mx.array, y: mx.array) -> mx.array:
        return z

    with pytest.raises(MlxSfError, match="want 8 to 1024"):
        measure_capacity(Computed(network), config(), Fields(), spectrum, 4)
    with pytest.raises(MlxSfError, match="above 0 and below 1"):
        measure_capacity(Computed(network), config(), Fields(), spectrum, 8, (0.0, 0.5))
    other = Config(JiTConfig(img_size=32, patch_size=4))
    with pytest.raises(MlxSfError, match="want one size"):
        measure_capacity(Computed(network), other, Fields(), spectrum, 8)


def test_the_command_takes_everything_from_the_checkpoint(tmp_path: Path, cli, refused) -> None:
    c = config(noise_scale=1.5)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, {"model": dict(_flat(JiT(c.model)))}, c)
    status, text, err = cli(
        "spectrum", "-n", 24, "--ckpt", path, "--capacity-images", 8, "-o", tmp_path / "out", "--fit-range", 2, 15
    )
    assert status == 0, err
    assert "capacity of custom (tiny.safetensors): 8 pictures" in text
    record = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert (record["img_size"], record["noise_scale"]) == (SIDE, 1.5)
    assert list(record["schedules"]) == ["linear (the checkpoint's)", "data, δ = 1"]
    assert len(record["capacity"]["error"]) == len(record["capacity"]["t"])
    with Image.open(tmp_path / "out" / "capacity.png") as picture:
        assert picture.width > 800
    refused("--img-size is 32", "spectrum", "--ckpt", path, "--img-size", 32, "-o", tmp_path / "o2")
    refused("was trained with 1.5", "spectrum", "--ckpt", path, "--noise-scale", 1, "-o", tmp_path / "o2")


def _flat(model: JiT):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())
