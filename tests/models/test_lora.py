"""Low-rank adapters: the published ones give the published outputs; they start as nothing, add up, and merge."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sf.checkpoints.adapters import read_adapter
from mlx_sf.checkpoints.load import load_model
from mlx_sf.errors import MlxSfError
from mlx_sf.models import architecture, build, cast_products, parameter_shapes
from mlx_sf.models.jit import JiTConfig
from mlx_sf.models.lora import A, B, LoRAConfig, adapter_parameters, add_adapter, initial_adapter, merge, targets_of
from mlx_sf.models.mmjit import MMJiTConfig
from mlx_sf.models.quantize import QuantizationConfig, dequantize, quantize, quantize_layers
from tests.helpers import GOLDEN

MINIT2I = GOLDEN / "minit2i"
CONFIG = JiTConfig(16, 8, 32, 2, 2, 16, 2, 1, num_classes=3)
SHAPES = parameter_shapes(CONFIG)
KIND = architecture(CONFIG)
X, T = mx.random.normal((2, 3, 16, 16), key=mx.random.key(7)), mx.array([0.2, 0.7])


def weights() -> dict[str, mx.array]:
    """Random weights, those that start as zero included."""
    leaves: Any = tree_flatten(build(CONFIG, mx.random.key(1)).parameters())
    keys = mx.random.split(mx.random.key(2), len(leaves))
    return {name: w + 0.05 * mx.random.normal(w.shape, key=k) for (name, w), k in zip(leaves, keys, strict=True)}


def network(values: dict[str, mx.array]) -> Any:
    built = build(CONFIG)
    built.load_weights(list(values.items()), strict=True)
    return built


def adapter(rank: int, seed: int, config: Any = CONFIG) -> tuple[LoRAConfig, dict[str, mx.array]]:
    """An adapter that does something."""
    shapes = parameter_shapes(config)
    lora = LoRAConfig(rank, 2.0 * rank, targets_of(shapes, architecture(config)))
    key = mx.random.key(seed)
    return lora, {
        k: w + 0.2 * mx.random.normal(w.shape, key=key) for k, w in initial_adapter(lora, shapes, key).items()
    }


def out(of: Any) -> mx.array:
    result: mx.array = of(X, T, of.condition([0, None]))
    return result


def off(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ published


def test_a_published_adapter_gives_the_published_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    tolerance = json.loads((MINIT2I / "tolerances.json").read_text())["lora.npz"]["small/out"][2]
    inputs, want = np.load(MINIT2I / "forward.npz"), np.load(MINIT2I / "lora.npz")["small/out"]
    model, config = load_model(MINIT2I / "hub" / "minit2i-b-16")
    found = read_adapter(MINIT2I / "small_lora", config.model)
    assert (found.lora.rank, found.lora.alpha, found.base) == (3, 6.0, "MiniT2I/MiniT2I")
    x, condition = mx.array(inputs["small/x"]), {k: mx.array(inputs[f"small/{k}"]) for k in ("context", "mask")}
    assert np.abs(np.asarray(model(x, mx.array(0.5), condition)) - want).max() > 1000 * tolerance
    merged = merge(dict(tree_flatten(model.parameters())), found.lora, found.tensors)
    add_adapter(model, found.lora, found.tensors)
    assert np.abs(np.asarray(model(x, mx.array(0.5), condition)) - want).max() <= tolerance
    other = build(config.model)
    other.load_weights(list(merged.items()), strict=True)
    assert np.abs(np.asarray(other(x, mx.array(0.5), condition)) - want).max() <= tolerance


def test_a_second_published_adapter_and_its_merged_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    folder = MINIT2I / "second"
    tolerances = json.loads((folder / "lora" / "golden.json").read_text())["tolerances"]
    inputs, want = np.load(folder / "mmjit" / "c" / "golden.npz"), np.load(folder / "lora" / "golden.npz")
    model, config = load_model(folder / "mmjit" / "c")
    found = read_adapter(folder / "lora", config.model)
    merged = merge(dict(tree_flatten(model.parameters())), found.lora, found.tensors)
    add_adapter(model, found.lora, found.tensors)
    condition = {"context": mx.array(inputs["context"]), "mask": mx.array(inputs["mask_partial"])}
    got = np.asarray(model(mx.array(inputs["img"]), mx.array(inputs["t"]), condition))
    assert np.abs(got - want["out_adapter"]).max() <= tolerances["out_adapter"]
    name = "double_blocks.0.img_qkv.weight"
    assert np.abs(np.asarray(merged[name]) - want[f"merged_{name}"]).max() <= tolerances[f"merged_{name}"]


def test_layers_that_adapters_touch() -> None:
    blocks = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")]
    assert sorted(targets_of(SHAPES, KIND)) == sorted(blocks)
    b16 = MMJiTConfig()
    shapes, targets = parameter_shapes(b16), targets_of(parameter_shapes(b16), architecture(b16))
    assert len(targets) == 181  # 182 published ones but for pooled_embedder
    numbers = sum(a * b for a, b in LoRAConfig(32, 32.0, targets).shapes(shapes).values())
    assert numbers == 15_155_200 - 32 * (1024 + 768)


# ------------------------------------------------------------------------------------------------ arithmetic


def test_a_new_adapter_changes_no_bit() -> None:
    plain, model = network(weights()), network(weights())
    lora = LoRAConfig(4, 8.0, targets_of(SHAPES, KIND))
    add_adapter(model, lora, initial_adapter(lora, SHAPES, mx.random.key(0)))
    assert mx.array_equal(out(plain), out(model))
    found = adapter_parameters(model)
    assert {name: tuple(w.shape) for name, w in found.items()} == lora.shapes(SHAPES)
    assert set(found) == set(dict(tree_flatten(model.trainable_parameters())))  # the base is frozen
    assert all(mx.all(w == 0).item() for name, w in found.items() if name.endswith(B))
    bounds = [(w.max().item(), w.shape[1] ** -0.5) for name, w in found.items() if name.endswith(A)]
    assert all(0.8 * bound < top <= bound for top, bound in bounds)  # type: ignore[operator]


def test_merged_equals_added() -> None:
    lora, tensors = adapter(4, 3)
    model = network(weights())
    add_adapter(model, lora, tensors, 0.7)
    assert off(out(model), out(network(merge(weights(), lora, tensors, 0.7)))) < 1e-5
    assert off(out(model), out(network(weights()))) > 0.01


def test_adapters_add_up_each_with_its_scale() -> None:
    one, two = adapter(4, 3), adapter(2, 4)
    model = network(weights())
    add_adapter(model, *one, 0.5)
    add_adapter(model, *two, -1.5)
    assert set(adapter_parameters(model)) == set(two[0].shapes(SHAPES))
    assert off(out(model), out(network(merge(merge(weights(), *one, 0.5), *two, -1.5)))) < 1e-5
    twice = network(weights())
    add_adapter(twice, *one, 0.25)
    add_adapter(twice, *one, 0.25)
    assert off(out(twice), out(network(merge(weights(), *one, 0.5)))) < 1e-5


def test_products_run_in_the_type_of_the_base() -> None:
    lora, tensors = adapter(4, 3)
    exact, model = network(weights()), network(cast_products(weights(), mx.bfloat16, KIND))
    add_adapter(exact, lora, tensors)
    add_adapter(model, lora, tensors)
    assert {w.dtype for w in adapter_parameters(model).values()} == {mx.float32}
    layer = model.blocks[0].attn.qkv
    assert layer(mx.ones((1, 32))).dtype == mx.bfloat16
    assert off(out(exact), out(model)) < 0.05 * mx.abs(out(exact)).max().item()


def test_beside_quantised_layers() -> None:
    lora, tensors = adapter(4, 3)
    q, floats = QuantizationConfig(8, 32), weights()
    model, parts = build(CONFIG), {}
    quantize_layers(model, q, KIND)
    stored = dict(tree_flatten(model.parameters()))
    for name, w in floats.items():
        codes = [w]
        if stored[name].dtype == mx.uint32:
            codes = list(quantize(w, q))
            floats[name] = dequantize(*codes, w.shape[1], q)
        base = name.removesuffix("weight")
        parts |= dict(zip((name, base + "scales", base + "biases"), codes, strict=False))
    model.load_weights(list(parts.items()), strict=True)
    add_adapter(model, lora, tensors)
    assert off(out(model), out(network(merge(floats, lora, tensors)))) < 0.02


@pytest.mark.parametrize(
    "given, message",
    [
        ((0, 1.0, ("a",)), "rank is 0, want at least 1"),
        ((1, 0.0, ("a",)), "alpha is 0.0, want above 0"),
        ((1, 1.0, ()), "targets is (), want different layers"),
        ((1, 1.0, ("a", "a")), "targets is ('a', 'a'), want different layers"),
    ],
)
def test_impossible_adapters_are_refused(given: Any, message: str) -> None:
    with pytest.raises(MlxSfError) as e:
        LoRAConfig(*given)
    assert str(e.value) == message


@pytest.mark.parametrize("layer", ["blocks.9.attn.qkv", "blocks.0.norm1", "y_embedder.embedding_table"])
def test_only_linear_layers_are_adapted(layer: str) -> None:
    with pytest.raises(MlxSfError, match=f"targets is '{layer}', want linear layers of the network"):
        add_adapter(network(weights()), LoRAConfig(1, 1.0, (layer,)), {layer + A: X, layer + B: X})
