"""Quantised weights: few bits stand for the floats as closely as promised, in files that say so, and only draw."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from PIL import Image

from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.checkpoints.convert.jit import convert
from mlx_sf.checkpoints.export import quantize_checkpoint
from mlx_sf.checkpoints.load import load_model
from mlx_sf.checkpoints.pipeline import load
from mlx_sf.common.pixels import to_uint8
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.tensor_file import TensorFile, write_tensor_file
from mlx_sf.models import parameter_shapes
from mlx_sf.models.jit import ARCHITECTURE, JiT, JiTConfig
from mlx_sf.models.jit_sizes import model_config
from mlx_sf.models.layers import Linear
from mlx_sf.models.quantize import (
    QuantizationConfig,
    QuantizedLinear,
    dequantize,
    is_quantized,
    padded,
    quantize,
    stored,
)
from mlx_sf.sampling.noise import seeded_noise
from tests.helpers import GOLDEN, changed, sample_states

PARITY = GOLDEN / "parity"
EIGHT, FOUR = QuantizationConfig(8), QuantizationConfig(4)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The golden forced network as float32 and with 8 and 4 bits, each made from its .pth."""
    folder = tmp_path_factory.mktemp("quantised")
    for name, q in (("float", None), ("q8", EIGHT), ("q4", FOUR)):
        target, sets = folder / f"{name}.safetensors", ["model", "ema1"]
        convert(PARITY / "forced.pth", target, sets, flags={"in_context_start": 1}, quantization=q)
    return folder


def output(path: Path, **how) -> mx.array:
    model, config = load_model(path, **how)
    x = mx.random.normal((2, 3, config.model.img_size, config.model.img_size), key=mx.random.key(0))
    return model(x, mx.array([0.1, 0.8]), model.condition([1, None]))


def error(a: mx.array, b: mx.array) -> float:
    return mx.sqrt(mx.square(a - b).sum() / mx.square(b).sum()).item()


# ------------------------------------------------------------------------------------------------ numbers


def decoded(weight: mx.array, q: QuantizationConfig) -> tuple[mx.array, mx.array]:
    """What a weight becomes, and the step between neighbouring codes at each of its places."""
    codes, scales, biases = quantize(weight, q)
    step = mx.repeat(mx.abs(scales.astype(mx.float32)), q.group_size, axis=1)[:, : weight.shape[1]]
    return dequantize(codes, scales, biases, weight.shape[1], q), step


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    scale=st.sampled_from([1e-6, 0.02, 3.0, 1e4]),
    shift=st.sampled_from([0.0, 0.5, 40.0]),
    seed=st.integers(0, 99),
)
def test_every_weight_is_within_a_step(rows, width, bits, group, scale, shift, seed):
    weight = scale * (mx.random.normal((rows, width), key=mx.random.key(seed)) + shift)
    got, step = decoded(weight, QuantizationConfig(bits, group))
    assert got.shape == weight.shape
    # half a step; at one end of a group's range, because zero has a code of its own, a whole one; there also what
    # bfloat16 leaves of scale and bias
    assert mx.all(mx.abs(got - weight) <= (1 + 0.004 * 2**bits) * step + 0.004 * mx.abs(weight)).item()


def test_constant_and_empty_weights_stay_what_they_are():
    for value in (0.0, 1.0, -0.25):
        assert mx.array_equal(decoded(mx.full((3, 70), value), FOUR)[0], mx.full((3, 70), value))


@pytest.mark.parametrize("q, most", [(EIGHT, 0.006), (FOUR, 0.1)])
def test_scales_in_bfloat16_cost_next_to_nothing(q, most):
    weight = 0.02 * mx.random.normal((64, 768), key=mx.random.key(0))
    plain = mx.dequantize(
        *mx.quantize(weight, group_size=64, bits=q.bits), group_size=64, bits=q.bits
    )  # float32 scales and biases
    assert error(decoded(weight, q)[0], weight) < min(most, 1.03 * error(plain, weight))


@pytest.mark.parametrize("width", [2730, 3413, 768, 40])
@pytest.mark.parametrize("q", [EIGHT, FOUR, QuantizationConfig(4, 32), QuantizationConfig(8, 128)])
def test_layer_multiplies_with_the_weights_that_it_stands_for(width, q):
    """2730 and 3413, the feed-forward widths of L and H, are multiples of no group size: exact all the same."""
    weight, bias = 0.02 * mx.random.normal((24, width), key=mx.random.key(1)), mx.arange(24) / 24
    codes, scales, biases = quantize(weight, q)
    assert codes.shape == (24, padded(width, q) * q.bits // 32)
    layer, same = QuantizedLinear(width, 24, True, q), Linear(width, 24)
    floats = {"scales": scales.astype(mx.float32), "biases": biases.astype(mx.float32), "bias": bias}
    layer.load_weights([("weight", codes), *floats.items()])
    same.load_weights([("weight", decoded(weight, q)[0]), ("bias", bias)])
    x = mx.random.normal((2, 3, width), key=mx.random.key(2))
    assert mx.abs(layer(x) - same(x)).max().item() < 1e-5
    assert not layer.trainable_parameters()


@pytest.mark.parametrize("name, most", [("q8", 0.01), ("q4", 0.2)])
def test_network_draws_with_the_weights_that_it_stands_for(files, name, most):
    quantised, expanded = (output(files / f"{name}.safetensors", dequantize=d) for d in (False, True))
    assert error(quantised, expanded) < 1e-5
    assert 1e-4 < error(quantised, output(files / "float.safetensors")) < most
    half = output(files / f"{name}.safetensors", dtype=mx.bfloat16)
    assert error(half, quantised) < 0.02


def test_compiled_network_is_the_same(files):
    model, _ = load_model(files / "q4.safetensors")
    x, t, y = mx.random.normal((1, 3, 32, 32), key=mx.random.key(3)), mx.array([0.5]), model.condition([2])
    assert error(mx.compile(model)(x, t, y), model(x, t, y)) < 1e-5


# ------------------------------------------------------------------------------------------------ policy


@pytest.mark.parametrize("size, share", [("tiny/8", 0.85), ("B/32", 0.96), ("L/32", 0.97), ("H/32", 0.97)])
def test_which_layers_are_quantised(size, share):
    shapes = parameter_shapes(model_config(size))
    chosen = {k for k in shapes if is_quantized(k, FOUR, ARCHITECTURE)}
    parts = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    depth = model_config(size).depth
    want = {f"blocks.{i}.{part}.weight" for i in range(depth) for part in parts}
    assert chosen == want | {"final_layer.adaLN_modulation.1.weight"}
    held = sum(np.prod(shapes[k]) for k in chosen)
    assert held > share * sum(map(np.prod, shapes.values()))


def test_every_linear_layer_has_a_kind():
    every = QuantizationConfig(
        8, 64, ("attention", "feed_forward", "modulation", "patch_embedder", "time_embedder", "head")
    )
    model = JiT(JiTConfig(8, 4, 8, 1, 1, 4, 2, 0, 3))
    linear = {f"{k}.weight" for k, m in model.named_modules() if isinstance(m, Linear)}
    assert {k for k, _ in tree_flatten(model.parameters()) if is_quantized(k, every, ARCHITECTURE)} == linear


def test_files_shrink_as_promised():
    """Bytes per weight of JiT-L/32's feed-forward, its padding included: 8.5 and 4.5 bits but for 22 zeros a row."""
    for q in (EIGHT, FOUR):
        parts = stored("blocks.0.mlp.w3.weight", (1024, 2730), q, ARCHITECTURE)
        bits = sum(np.prod(shape) * (32 if "uint32" in types else 16) for types, shape in parts.values())
        assert bits / (1024 * 2730) == pytest.approx((q.bits + 0.5) * 2752 / 2730)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("q", [FOUR, QuantizationConfig(8, 32)])
def test_from_a_pth_and_from_a_checkpoint_it_is_the_same(files, q, suffix, tmp_path):
    convert(PARITY / "forced.pth", tmp_path / f"a{suffix}", "ema1", flags={"in_context_start": 1}, quantization=q)
    quantize_checkpoint(files / "float.safetensors", tmp_path / f"b{suffix}", q)
    a, b = Checkpoint(tmp_path / f"a{suffix}"), Checkpoint(tmp_path / f"b{suffix}")
    assert a.config.quantization == b.config.quantization == q
    assert replace(a.config, provenance={}) == replace(b.config, provenance={})
    one, two = a.tensors(), b.tensors()
    assert set(one) == set(two)
    assert all(mx.array_equal(one[k], two[k]) for k in one)


def test_a_float_file_does_not_mention_quantisation(files):
    config = Checkpoint(files / "float.safetensors").config
    assert "quantization" not in json.loads(config.to_json())
    config = Checkpoint(files / "q4.safetensors").config
    assert json.loads(config.to_json())["quantization"] == {
        "bits": 4, "group_size": 64, "layers": ["attention", "feed_forward", "modulation"],
    }  # fmt: skip
    assert Config.from_json(config.to_json()) == config


def test_what_stays_float_keeps_the_type_asked_for(files, tmp_path, cli):
    target = tmp_path / "x.npz"
    for dtype, want in ((None, "float32"), ("bfloat16", "bfloat16")):
        given = ["--dtype", dtype] if dtype else []
        assert cli("convert", files / "float.safetensors", target, "--quantize", 8, *given)[0] == 0
        entries = TensorFile(target).entries
        assert entries["final_layer.linear.weight"].dtype == want
        assert entries["blocks.0.norm1.weight"].dtype == "float32"


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"bits": 3}, "quantization bits is 3, want 8 or 4"),
        ({"bits": "4"}, "bits is '4', want a whole number"),
        ({"bits": 4, "group_size": 48}, "group_size is 48, want 32, 64 or 128"),
        ({"bits": 4, "layers": []}, "want different kinds of layers, at least one"),
        ({"bits": 4, "layers": ["attention", "attention"]}, "want different kinds of layers"),
        ({"bits": 4, "layers": ["moe"]}, "quantization layers is 'moe', want one of attention, feed_forward"),
        ({"bits": 4, "layers": "attention"}, "want a list of kinds of layers"),
        ({"group_size": 64}, "configuration does not fit"),
        ({"bits": 4, "mode": "mxfp4"}, "unknown configuration entry 'mode'"),
        (8, "configuration is int, want an object"),
        ({"bits": 8}, "w3.weight' has shape (24, 8), its configuration wants (24, 16)"),
        ({"bits": 4, "group_size": 32}, "w3.scales' has shape (24, 1), its configuration wants (24, 2)"),
        ({"bits": 4, "layers": ["attention"]}, "has shape (24, 8), its configuration wants (24, 64)"),
        ({"bits": 4, "layers": ["feed_forward", "head"]}, "is not part of the network"),
        (None, "has shape (24, 8), its configuration wants (24, 64)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(files, tmp_path, entry, words, refused):
    file = TensorFile(files / "q4.safetensors")
    text = json.loads(file.text)
    text["quantization"] = entry
    text["weights"] = ["ema1"]
    entries = [
        type(e)(e.name.removeprefix("ema1/"), e.dtype, e.shape, e.read)
        for e in file.entries.values()
        if e.name.startswith("ema1/")
    ]
    write_tensor_file(tmp_path / "x.safetensors", entries, json.dumps(text))
    refused(words, "sample", "--ckpt", tmp_path / "x.safetensors", "-o", tmp_path / "out")


def test_a_file_of_floats_that_claims_to_be_quantised_is_refused(tmp_path):
    config = Config(JiTConfig(8, 4, 64, 1, 1, 4, 2, 0, 3))
    weights = dict(tree_flatten(JiT(config.model).parameters()))
    save_checkpoint(tmp_path / "x.npz", {"ema1": weights}, replace(config, quantization=EIGHT))
    with pytest.raises(MlxSfError, match=r"w3.weight' has shape \(64, 170\), its configuration wants \(64, 48\)"):
        Checkpoint(tmp_path / "x.npz")


def test_a_missing_scale_is_refused(files, tmp_path, refused):
    file = TensorFile(files / "q4.safetensors")
    entries = [e for e in file.entries.values() if e.name != "ema1/blocks.2.attn.qkv.scales"]
    write_tensor_file(tmp_path / "x.npz", entries, file.text)
    refused("lacks tensor 'ema1/blocks.2.attn.qkv.scales'", "sample", "--ckpt", tmp_path / "x.npz")


# ------------------------------------------------------------------------------------------------ commands


def test_convert_sample_info(cli, files, tmp_path):
    target = tmp_path / "q.npz"
    status, out, _ = cli(
        "convert", PARITY / "vanilla.pth", target, "--quantize", 8, "--q-group-size", 32, "--in-context-start", 1,
        "--verify",
    )  # fmt: skip
    assert status == 0
    assert "8 bits in groups of 32: attention, feed forward, modulation" in out
    assert "verified ema1: " in out
    assert "8 bits in groups of 32" in cli("info", target)[1]

    pictures = []
    for flag, words in (("--dequantize", "expanded to floats first"), ("--no-dequantize", "times slower")):
        where = tmp_path / flag
        status, _, err = cli("sample", "--ckpt", target, "-n", 2, "--steps", 3, "-o", where, flag)
        assert status == 0
        assert words in err or mx.default_device() != mx.Device(mx.cpu)
        with Image.open(where / "00001.png") as png:
            pictures.append(np.asarray(png).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert '"quantized": "8 bits in groups of 32' in cli("info", tmp_path / flag / "00001.png", "--json")[1]


def test_pictures_are_those_of_the_stored_weights(files):
    """Expanded to floats where that is faster."""
    pictures = load(files / "q4.safetensors", weights="ema1").sample([1, 2], seed=5, steps=2)
    model, config = load_model(files / "q4.safetensors")
    *_, last = sample_states(model, changed(config, steps=2), seeded_noise([5, 6], (32, 32)), [1, 2])
    drawn = np.stack([np.asarray(p) for p in pictures]).astype(int)
    assert np.abs(drawn - to_uint8(last.z)).max() <= 1


def test_floats_are_drawn_from_without_a_note(cli, files, tmp_path):
    _, _, err = cli("sample", "--ckpt", files / "float.safetensors", "-n", 1, "--steps", 1, "-o", tmp_path / "x.png")
    assert "note" not in err


def test_several_sets_from_a_checkpoint(cli, files, tmp_path):
    target = tmp_path / "both.npz"
    arguments = ("convert", files / "float.safetensors", target, "--quantize", 4, "--weights", "model,ema1")
    assert cli(*arguments)[0] == 0
    assert Checkpoint(target).config.weights == ("model", "ema1")
    assert mx.array_equal(output(target), output(files / "q4.safetensors"))


def test_what_quantised_weights_cannot_do_is_refused(files, tmp_path, refused):
    q8, floats, run = files / "q8.safetensors", files / "float.safetensors", tmp_path / "run"
    cannot = "holds 8-bit weights, which cannot be trained, exported or quantised again"
    refused(cannot, "export", q8, tmp_path / "x.npz")
    refused(cannot, "train", "--init", q8, "--output", tmp_path / "runs", "--steps", 1)
    refused(cannot, "convert", q8, tmp_path / "x.npz", "--quantize", 4)
    refused("is converted with --quantize only", "convert", floats, tmp_path / "x.npz")
    refused("leave out --noise-scale", "convert", floats, tmp_path / "x.npz", "--quantize", 4, "--noise-scale", 1)
    refused("is the file to convert", "convert", floats, floats, "--quantize", 4)
    refused("holds weights model, ema1, not 'ema2'", "convert", floats, run, "--quantize", 8, "--weights", "ema2")
    refused("--q-group-size: goes with --quantize", "convert", floats, tmp_path / "x.npz", "--q-group-size", 32)
    refused("'3' is not one of", "convert", floats, tmp_path / "x.npz", "--quantize", 3)
    refused("must end in .npz or .safetensors", "convert", floats, tmp_path / "x.bin", "--quantize", 4)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ measurements


def test_bench_says_what_each_choice_of_layers_costs(cli, files):
    status, out, _ = cli("bench", "quantize", "--ckpt", files / "float.safetensors", "--no-speed", "--json")
    assert status == 0
    rows = {r["layers"]: r for r in json.loads(out)["rows"]}
    assert set(rows) == {
        "attention", "feed_forward", "modulation", "patch_embedder", "time_embedder", "head", "default", "all",
    }  # fmt: skip
    for row in rows.values():
        assert 0 < row["velocity_error_8"] < 0.2 * row["velocity_error_4"]
    assert rows["default"]["velocity_error_4"] < rows["all"]["velocity_error_4"]


def test_bench_of_random_weights(cli):
    arguments = ("--size", "nano/8", "--img-size", 16, "--batch-size", 1)
    status, out, _ = cli("bench", "quantize", *arguments)
    assert status == 0
    assert "8 bits over float32" in out
    assert out.count("%") == 8 * 5
