"""SenseNova-U1 against golden numbers: every stage of both sides, forcing, objective, adapter; sizes and refusals."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_sf.checkpoints.adapters import merged_updates, read_adapter
from mlx_sf.checkpoints.load import load_model
from mlx_sf.checkpoints.u1_files import TEXT, our_name, published_name
from mlx_sf.errors import FieldError, MlxSfError
from mlx_sf.flow import FlowConfig, add_noise, training_times, velocity
from mlx_sf.models import parameter_shapes
from mlx_sf.models.flops import forward_flops
from mlx_sf.models.layers import attention
from mlx_sf.models.lora import LoRAConfig, add_adapter, initial_adapter
from mlx_sf.models.sensenova_u1 import U1
from mlx_sf.models.u1_config import PUBLISHED, U1Config
from mlx_sf.models.u1_layers import Layer, Places, patches, time_angles
from mlx_sf.models.u1_text import text_shapes
from mlx_sf.spectral import ForcingConfig, SpectralForcing, masks
from mlx_sf.training.u1_objective import pictures_loss, token_losses
from tests.u1 import FIRST, NETWORKS, OFFICIAL, PROMPTS, arrays, checkpoint, close, condition, network, prefixes, tokens

SAMPLED = FlowConfig(t_eps=0.02)


def times(t):
    return mx.array([t], dtype=mx.float32)


# ------------------------------------------------------------------------------------------------ first set


@pytest.mark.parametrize("name", NETWORKS)
def test_prefixes(name):
    for branch, prefix in prefixes(name).items():
        for i, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            close(f"{name}_parts", f"prefix_{branch}/k_{i}", k)
            close(f"{name}_parts", f"prefix_{branch}/v_{i}", v)


@pytest.mark.parametrize("name", NETWORKS)
def test_understanding_layer(name):
    a, opened = arrays(f"{name}_parts"), checkpoint(name)
    c, ids = opened.config.model, a["in/cond_ids"]
    layer, shapes = Layer(c), text_shapes(c)
    names = [k for k in shapes if k.startswith("layers.0.")]
    tensors = [(k.removeprefix("layers.0."), opened.tensor("text/" + k, ("bfloat16",), shapes[k])) for k in names]
    layer.load_weights([(k, w.astype(mx.float32)) for k, w in tensors])
    x = opened.file.entries["text/embed_tokens.weight"].rows(ids).astype(mx.float32)[None]
    close(f"{name}_parts", "prefix_cond/hidden_0", x)
    angles = time_angles(c, np.arange(len(ids)))[:, None]
    where = Places((mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)))
    h = layer.input_layernorm(x)
    close(f"{name}_parts", "und0/normed", h)
    close(f"{name}_parts", "und0/q", layer.self_attn.queries(h, where))
    mask = mx.arange(len(ids))[None, :] <= mx.arange(len(ids))[:, None]
    y = layer.self_attn.attend(
        h,
        where,
        lambda q, k, v, attention: attention(q, k, v, mask=mask[None, None]),
        *layer.self_attn.keys_values(h, where),
    )
    close(f"{name}_parts", "und0/attn", y)
    y = layer.mlp(layer.post_attention_layernorm(x + y))
    close(f"{name}_parts", "und0/mlp", y)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward(name):
    file, a = f"{name}_parts", arrays(f"{name}_parts")
    x = mx.array(a["in/fwd_image"])
    size = x.shape[2:]
    for case, t, forced in (
        ("fwd", 0.3, False),
        ("fwd_sf", 0.3, True),
        ("fwd_late", 0.99, False),
        ("fwd_late_sf", 0.99, True),
    ):
        model = network(name, size, forced)
        side = model.config.token_size
        given, without = model.guided(x, times(t), condition(name, model), condition(name, model, "uncond"))
        alone = model(x, times(t), condition(name, model))
        np.testing.assert_allclose(np.asarray(given), np.asarray(alone), atol=2e-5)
        seen = {
            "tokens_in": model.tokens_in(x, times(t)),
            "x_pred": tokens(given, side),
            "v_cond": tokens(velocity(given, x, times(t), SAMPLED), side),
            "v_uncond": tokens(velocity(without, x, times(t), SAMPLED), side),
        }
        for what, got in seen.items():
            if f"{case}/{what}" in a:
                close(file, f"{case}/{what}", got)


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_of_a_forward(name):
    file, a = f"{name}_parts", arrays(f"{name}_parts")
    x, t = mx.array(a["in/fwd_image"]), times(0.3)
    model = network(name, x.shape[2:])
    c, (H, W) = model.config, x.shape[2:]
    cut = patches(x, c.patch_size)
    close(file, "embed/patches", cut)
    y = model.patch_embedding(cut)
    close(file, "embed/conv", y)
    close(file, "embed/gelu", nn.gelu(y))
    close(file, "embed/time", model.timestep_embedder(t))
    s = c.noise_at((H, W))
    assert s == pytest.approx(PROMPTS[name]["noise_scale"][f"{H}x{W}"])
    close(file, "embed/noise_scale", model.noise_scale_embedder(mx.array([s / c.noise_max])))
    if "embed/z_tokens" in a:
        close(file, "embed/z_tokens", tokens(x, c.token_size))
    h = model.tokens_in(x, t)
    found, seen = condition(name, model), {}

    def watching(layer):
        def run(x, places, branches):
            i = next(i for i, known in enumerate(model.layers) if known is layer)
            out = layer(x, places, branches)
            seen[i] = out
            if i == 0:
                n = layer.input_layernorm(x)
                seen["q"], (seen["k"], seen["v"]) = (
                    layer.self_attn.queries(n, places),
                    layer.self_attn.keys_values(n, places),
                )
                seen["normed"] = n
                seen["attn"] = _attn(layer, n, branches, seen)
                seen["mlp"] = layer.mlp(layer.post_attention_layernorm(x + seen["attn"]))
            return out

        return run

    model(x, t, found, block_wrapper=watching)
    for what in ("normed", "q", "k", "v", "attn", "mlp"):
        close(file, f"gen0/{what}", seen[what])
    close(file, "fwd/tokens_in", h)
    for i in range(c.depth):
        close(file, f"fwd/hidden_{i + 1}", seen[i])
    close(file, "fwd/final", model.norm(seen[c.depth - 1]))
    # an image token's place: its own branch's length, its row, its column
    for branch in ("cond", "uncond"):
        index = a[f"fwd/index_{branch}"]
        cos = condition(name, model, branch)["cos"]
        np.testing.assert_allclose(np.cos(time_angles(c, index[0, :1])), np.asarray(cos)[0, 0], atol=1e-6)
        np.testing.assert_array_equal(index[1], np.repeat(np.arange(H // c.token_size), W // c.token_size))


def _attn(layer, n, branches, seen):
    (before, values, _), k, v = branches[0], seen["k"], seen["v"]
    y = attention(seen["q"], mx.concatenate([before, k], axis=2), mx.concatenate([values, v], axis=2))
    return layer.self_attn.o_proj(y.swapaxes(1, 2).reshape(*n.shape[:2], -1))


@pytest.mark.parametrize("name", NETWORKS)
def test_forcing_alone(name):
    a = arrays(f"{name}_parts")
    for i, (image, t) in enumerate((("sf_sq", 0.0), ("sf_sq", 0.4), ("sf_wide", 0.4), ("sf_wide", 1.0))):
        if f"sf/filtered_{i}" in a:
            x = mx.array(a[f"in/{image}"])
            close(f"{name}_parts", f"sf/filtered_{i}", SpectralForcing.of(ForcingConfig(), x.shape[2:])(x, times(t)))
        if f"sf/mask_{i}" in a:
            close(f"{name}_parts", f"sf/mask_{i}", masks(ForcingConfig(), a[f"sf/mask_{i}"].shape, t)[0])


# ------------------------------------------------------------------------------------------------ objective


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("forced", [False, True])
def test_objective(name, forced):
    file, a, flow = f"{name}_parts", arrays(f"{name}_parts"), checkpoint(name).config.flow
    suffix = "_sf" if forced else ""
    pictures = []
    for part in ("sq", "wide"):
        x, noise = (mx.array(a[f"in/train_{part}_{what}"]) for what in ("x", "noise"))
        model = network(name, x.shape[2:], forced)
        t, s = (
            training_times(mx.array(a[f"in/train_{part}_u"]), flow),
            model.config.noise_at(x.shape[2:], bounded=False),
        )
        close(file, f"train_{part}/t", t)
        close(file, f"train_{part}/scale", np.array([s]))
        found = condition(name, model)
        close(file, f"train_{part}/token_mse{suffix}", token_losses(model, x, found, t, noise, flow))
        if f"train_{part}/z_tokens" in a and not forced:
            z = add_noise(x, noise, t, s)
            side = model.config.token_size
            close(file, f"train_{part}/z_tokens", tokens(z, side))
            close(file, f"train_{part}/v_target", tokens((x - z) / mx.maximum(1 - t, flow.t_eps), side))
            v = velocity(model(z, t, found, noise_scale=s), z, t, flow)
            close(file, f"train_{part}/v_pred", tokens(v, side))
        pictures.append((x, found, t, noise))
    close(file, f"train/loss{suffix}", pictures_loss(model, pictures, flow))


@pytest.mark.parametrize("name", NETWORKS)
def test_objective_official(name):
    a, opened = arrays("official/train"), checkpoint(f"official/{name}")
    flow = opened.config.flow
    for forced in (False, True):
        pictures, sf = [], "sf_" if forced else ""
        for i, branch in enumerate(("cond", "uncond")):
            x = mx.array(a[f"{name}/u{i}"].astype(np.float32) / 127.5 - 1)
            model = network(f"official/{name}", x.shape[2:], forced)
            t = training_times(mx.array(a[f"{name}/normal"][i : i + 1]), flow)
            pictures.append((x, condition(f"official/{name}", model, branch), t, mx.array(a[f"{name}/noise{i}"])))
        close("official/train", f"{name}/{sf}loss", pictures_loss(model, pictures, flow))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_an_adapter_by_finite_differences(name):
    a, flow = arrays(f"{name}_parts"), checkpoint(name).config.flow
    x, noise = (mx.array(a[f"in/train_wide_{what}"]) for what in ("x", "noise"))
    t = training_times(mx.array(a["in/train_wide_u"]), flow)
    base = network(name, x.shape[2:])
    model = U1(base.config)
    model.update(tree_map(lambda w: w, base.parameters()))
    shapes = parameter_shapes(model.config)
    layers = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.self_attn.k_proj")
    lora = LoRAConfig(2, 4.0, layers)
    start = {k: 0.3 * mx.random.normal(w.shape, key=mx.random.key(i)) for i, (k, w) in enumerate(
        initial_adapter(lora, shapes, mx.random.key(1)).items())}  # fmt: skip
    add_adapter(model, lora, start)
    found = condition(name, model)

    def loss(parameters, wrapper=None):
        model.update(parameters)
        return pictures_loss(model, [(x, found, t, noise)], flow, wrapper)

    parameters = tree_map(lambda w: w, model.trainable_parameters())
    value, gradients = mx.value_and_grad(loss)(parameters)
    # with checkpointing the same
    again, recomputed = mx.value_and_grad(lambda p: loss(p, nn.utils.checkpoint))(parameters)
    assert value.item() == pytest.approx(again.item(), rel=1e-6)
    for (k, g), (_, h) in zip(tree_flatten(gradients), tree_flatten(recomputed), strict=True):
        assert k.endswith(("lora_A.weight", "lora_B.weight"))
        np.testing.assert_allclose(np.asarray(g), np.asarray(h), atol=1e-5)
    rng, step = np.random.default_rng(0), 1e-2
    for _ in range(3):
        way = tree_map(lambda w: mx.array(rng.standard_normal(w.shape), mx.float32) / w.size**0.5, parameters)
        slope = sum(
            (g * d).sum().item() for (_, g), (_, d) in zip(tree_flatten(gradients), tree_flatten(way), strict=True)
        )
        up, down = (loss(tree_map(lambda w, d, s=s: w + s * step * d, parameters, way)).item() for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=2e-4)


def test_conditions_of_one_shape_for_training():
    model = network("mlp", (32, 64))
    x = mx.array(arrays("mlp_parts")["in/fwd_image"])
    plain = model(x, times(0.3), condition("mlp", model, "uncond"))
    try:
        model.places = 60
        padded = condition("mlp", model, "uncond")
        assert padded["k"][0].shape[2] == 60
        np.testing.assert_allclose(np.asarray(model(x, times(0.3), padded)), np.asarray(plain), atol=2e-5)
    finally:
        model.places = None
    # and prompts of different length in one batch
    both = model.condition_of([prefixes("mlp")["cond"], prefixes("mlp")["uncond"]])
    out = model(mx.concatenate([x, x]), times(0.3), both)
    np.testing.assert_allclose(np.asarray(out[1:]), np.asarray(plain), atol=2e-5)


# ------------------------------------------------------------------------------------------------ official set


@pytest.mark.parametrize("name", NETWORKS)
def test_prefixes_official(name):
    a = arrays("official/model")
    for branch, prefix in prefixes(f"official/{name}").items():
        for i, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            if f"{name}/{branch}/k_{i}" in a:
                close("official/model", f"{name}/{branch}/k_{i}", k)
                close("official/model", f"{name}/{branch}/v_{i}", v)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_official(name):
    place, a = f"official/{name}", arrays("official/model")
    cases = [("rect", "cond", 0.35, False), ("rect_uncond", "uncond", 0.35, False), ("rect_sf", "cond", 0.35, True)]
    cases += [("sq_t0", "cond", 0.0, False), ("sq_t0.7", "cond", 0.7, False), ("sq_t0.99", "cond", 0.99, False)]
    for case, branch, t, forced in [*cases, ("sq_sf", "cond", 0.7, True)]:
        x = mx.array(a[f"{name}/x_{case[:4] if case.startswith('rect') else 'sq'}"])
        model = network(place, x.shape[2:], forced)
        out, side = model(x, times(t), condition(place, model, branch)), model.config.token_size
        seen = {"tokens": model.tokens_in(x, times(t)), "x_pred": tokens(out, side)}
        seen["v"] = tokens(velocity(out, x, times(t), SAMPLED), side)
        for what, got in seen.items():
            if f"{name}/{case}/{what}" in a:
                close("official/model", f"{name}/{case}/{what}", got)


@pytest.mark.parametrize("merged", [False, True])
def test_published_adapter(merged):
    place, a = "official/mlp", arrays("official/model")
    x = mx.array(a["mlp/x_rect"])
    opened = checkpoint(place)
    opened.config = opened.config.at(*x.shape[2:])
    adapter = read_adapter(OFFICIAL / "mlp" / "lora.safetensors", opened.config.model)
    model = load_model(opened, updates=merged_updates([adapter]) if merged else None)[0]
    if not merged:
        add_adapter(model, adapter.lora, adapter.tensors, adapter.scale)
    out = model(x, times(0.35), condition(place, model))
    close("official/model", "mlp/rect_lora/v", tokens(velocity(out, x, times(0.35), SAMPLED), model.config.token_size))


def test_tables_official():
    a = arrays("official/tables")
    for kind, config in (("u1", PUBLISHED["U1-8B"]), ("u15", PUBLISHED["U1.5-8B"])):
        for (w, h), count, scale in zip(a["sizes_wh"], a["tokens"], a[f"noise_scale_{kind}"], strict=True):
            at = config.at((int(h), int(w)))
            assert at.tokens == count
            assert at.noise_at(at.size) == pytest.approx(scale, rel=1e-6)
    np.testing.assert_array_equal(tokens(a["pack_image"], 32), a["pack_32"])
    packed = np.asarray(patches(mx.array(a["pack_image"]), 16)).reshape(1, -1, 3, 16, 16)
    np.testing.assert_array_equal(np.sort(packed.reshape(1, 24, -1)), np.sort(a["pack_16"]))


# ------------------------------------------------------------------------------------------------ sizes


def test_all_published_keys():
    told = json.loads((FIRST / "published_keys.json").read_text())
    for config, (kind, keys) in zip(PUBLISHED.values(), told.items(), strict=True):
        everything = {k.replace("{i}", str(i)): s for i in range(42) for k, s in keys["per_layer"].items()} | keys[
            "once"
        ]
        assert len(everything) == 1116, kind
        ours = parameter_shapes(config) | {TEXT + k: s for k, s in text_shapes(config).items()}
        for name, shape in ours.items():
            assert np.prod(everything.pop(published_name(name))) == np.prod(shape), name
            assert our_name(published_name(name)) == name or "embed_tokens" in name
        assert len(everything) == 14  # vision_model, lm_head, the last norm; what the last layer does not need
    assert sum(int(np.prod(s)) for s in parameter_shapes(PUBLISHED["U1-8B"]).values()) == 8_186_358_272
    # operations at 1024 pixels, against the spec's 17.5e12, which counts the attention to a prompt, too
    assert forward_flops(PUBLISHED["U1-8B"].at((1024, 1024))) == pytest.approx(17.5e12, rel=0.02)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 64), "height is 0, want a multiple of 32, from 32 to 8192"),
        ((33, 64), "height is 33"),
        ((64, 100_000), "width is 100000"),
        ((-32, 64), "height is -32"),
    ],
)
def test_sizes_that_cannot_be(size, message):
    with pytest.raises(FieldError, match=message):
        U1Config().at(size)


def test_what_a_network_refuses():
    model = network("mlp", (32, 64))
    with pytest.raises(MlxSfError, match="images are 24 x 32, want sides that are multiples of 16"):
        model(mx.zeros((1, 3, 24, 32)), times(0.5), condition("mlp", model))
    with pytest.raises(FieldError, match="prompt is 3, want a text"):
        model.condition([3])
    with pytest.raises(MlxSfError, match="was loaded without"):
        U1(model.config).condition(["x"])
    for field, value in (("head_dim", 12), ("num_kv_heads", 3), ("noise_mode", "x"), ("head", "deep")):
        with pytest.raises(FieldError, match=field):
            U1Config(**{field: value})
    with pytest.raises(FieldError, match="patch_size is 8, want 16 with a convolutional head"):
        U1Config(patch_size=8, head="conv")
