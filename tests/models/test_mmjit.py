"""MM-JiT against the authors' numbers: forward passes, inner states, tables, losses, gradients, training, forcing."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sf.checkpoints.conversion import convert
from mlx_sf.checkpoints.load import load_model
from mlx_sf.common.pixels import to_uint8_half_up
from mlx_sf.errors import FieldError, MlxSfError
from mlx_sf.flow import FlowConfig, training_loss, training_times
from mlx_sf.models import architecture, parameter_count, parameter_shapes
from mlx_sf.models.flops import forward_flops
from mlx_sf.models.layers import sincos_position_table
from mlx_sf.models.mmjit import MMJiT, MMJiTConfig, image_angles, model_config, text_angles
from mlx_sf.models.mmjit_mf import MMJiTMFConfig
from mlx_sf.models.text import TextConfig
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig
from mlx_sf.spectral import ForcingConfig
from mlx_sf.training.optimizer import AdamW
from mlx_sf.training.step import Draws, StepOptions, TrainStep, initial_arrays, trainable
from tests.minit2i import SETTINGS, T2I, arrays, close, given_prompts, network, text

HALF = mx.array([0.5])


@pytest.mark.parametrize("name", ["small", "hd52", "hd64", "nopre", "e2e"])
def test_forward(name):
    model, _ = network(name)
    a = arrays("forward.npz")
    x, condition = mx.array(a[f"{name}/x"]), text(a[f"{name}/context"], a[f"{name}/mask"])
    close("forward.npz", f"{name}/out", model(x, HALF, condition))
    # what a sampler does: the text once, both branches in one batch
    ready = model.precompute(condition)
    close("forward.npz", f"{name}/out", model(x, HALF, ready))
    given, without = model.guided(
        x, HALF, ready, model.precompute(text(0 * a[f"{name}/context"], 0 * a[f"{name}/mask"]))
    )
    close("forward.npz", f"{name}/out", given)
    np.testing.assert_allclose(without[2], a[f"{name}/out"][2], atol=1e-4)  # row 2 has no prompt at all


@pytest.mark.parametrize("name", "abcd")
def test_forward_second_set(name):
    model, _ = network(name)
    file = f"second/mmjit/{name}/golden.npz"
    a = arrays(file)
    for mask in ("full", "partial", "holes", "empty"):
        close(file, f"out_{mask}", model(mx.array(a["img"]), mx.array(a["t"]), text(a["context"], a[f"mask_{mask}"])))
    np.testing.assert_allclose(sincos_position_table(*_table(model)), a["pos_table"][None], atol=1e-6)


def _table(model):
    return model.config.hidden_size, model.config.grid_size


def test_inner_states():
    model, _ = network("small")
    a = arrays("forward.npz")
    x, context, mask = (mx.array(a[f"small/{n}"][:2]) for n in ("x", "context", "mask"))
    c = model.config
    txt = model.txt_embedder(mx.where(mask[..., None] > 0, context, model.mask_token))
    close("stages.npz", "small/txt_embedded", txt)
    cos, sin = _rotary(text_angles(c.head_dim, c.text.length))
    txt = model.txt_preamble_blocks[0](txt, cos, sin)
    close("stages.npz", "small/preamble_0", txt)
    img = model.img_embedder(x)
    close("stages.npz", "small/img_embedded_without_pos", img)
    img = img + mx.array(sincos_position_table(c.hidden_size, c.grid_size))
    joint = _rotary(np.concatenate([text_angles(c.head_dim, c.text.length), image_angles(c.head_dim, c.grid_size)]))
    for i, block in enumerate(model.double_blocks):
        last, block.last = block.last, False  # the text that the last block need not compute is among the numbers
        close("stages.npz", f"small/double_{i}_in_img", img)
        q = block.img_qkv(block.img_norm1(img)).reshape(2, -1, 3, c.num_heads, c.head_dim)[:, :, 0]
        close("stages.npz", f"small/double_{i}_q_img_normed", block.q_norm(q))
        txt, img = block(txt, img, *joint)
        block.last = last
        close("stages.npz", f"small/double_{i}_img", img)
        close("stages.npz", f"small/double_{i}_txt", txt)
    both = mx.concatenate([txt, img], axis=1)
    close("stages.npz", "small/final_normed", model.final_layer.norm_final(both))
    close("stages.npz", "small/final_tokens", model.final_layer(both))


def _rotary(angles):
    return mx.array(np.cos(angles)[:, None].astype(np.float32)), mx.array(np.sin(angles)[:, None].astype(np.float32))


def test_tables():
    a = arrays("tables.npz")
    for name, want in a.items():
        if name.startswith("pos_embed"):
            dims, side = (int(part[1:]) for part in name.split("_")[2:])
            close("tables.npz", name, sincos_position_table(dims, side)[0])
        elif "_cos_" in name or "_sin_" in name:
            kind, function, d, n = name.split("_")
            angles = (text_angles if kind == "text" else image_angles)(int(d[1:]), int(n[1:]))
            table = getattr(np, function)(np.concatenate([angles, angles], axis=1))
            rows = a["image_rows_d64_S32"] if n == "S32" else slice(None)
            close("tables.npz", name, table[rows, : want.shape[1]])


@pytest.mark.parametrize("case", list(SETTINGS["loss"]))
def test_loss_and_gradients(case):
    s = SETTINGS["loss"][case]
    name, a = s["inputs"], arrays("loss.npz")
    model, config = network(s["model"])
    flow = FlowConfig(noise_scale=s["noise_scale"], t_eps=s["t_floor"], P_mean=s["t_mu"], P_std=s["t_sigma"])
    t = training_times(mx.array(a[f"{name}/t_normal"]), flow)
    close("loss.npz", f"{name}/t", t)
    x, noise = mx.array(a[f"{name}/x"]), mx.array(a[f"{name}/noise"])
    condition = text(a[f"{name}/context"], a[f"{name}/mask_after_drop"])

    def loss(parameters):
        other.update(parameters)
        return training_loss(other, x, condition, t, noise, flow)

    other = MMJiT(config.model)
    value, gradients = mx.value_and_grad(loss)(model.parameters())
    close("loss.npz", f"{case}/loss", value)
    found = dict(tree_flatten(gradients))
    for key in (k for k in a if k.startswith(f"{case}/grad/")):
        close("loss.npz", key, found[key.split("/net.")[1]].reshape(a[key].shape))
    for key in s.get("zero_gradients", ()):
        assert not np.any(np.asarray(found[key.removeprefix("net.")])), key


@pytest.mark.parametrize("name", "abcd")
def test_loss_and_gradients_second_set(name):
    model, config = network(name)
    file = f"second/mmjit/{name}/golden.npz"
    a, info = arrays(file), json.loads((T2I / file).with_name("golden.json").read_text())
    mask = a["train_mask"] * (a["train_drop_u"] >= 0.1)[:, None]
    flow = FlowConfig(noise_scale=2.0, t_eps=0.05)
    # PyTorch's trainer keeps t from the ends by 1e-5; the original, and this program, do not
    t = mx.clip(training_times(mx.array(a["train_z"]), flow), 1e-5, 1 - 1e-5)
    np.testing.assert_allclose(np.asarray(t), a["train_t"], atol=1e-6)
    x, noise = mx.array(a["train_images"]), mx.array(a["train_noise"])

    def loss(parameters):
        other.update(parameters)
        return training_loss(other, x, text(a["train_context"], mask), t, noise, flow)

    other = MMJiT(config.model)
    value, gradients = mx.value_and_grad(loss)(model.parameters())
    close(file, "train_loss", value)
    found = dict(tree_flatten(gradients))
    for key in (k for k in a if k.startswith("grad_") and k != "grad_norm"):
        close(file, key, found[key.removeprefix("grad_")].reshape(a[key].shape))
    close(file, "grad_norm", mx.sqrt(sum(mx.square(g).sum() for g in found.values())))
    for key in info["grad_zero"]:
        assert not np.any(np.asarray(found[key])), key
    assert not set(info["grad_absent"]) & set(found)


@pytest.mark.parametrize("name", "abcd")
def test_both_losses_of_the_adapters_trainer(name):
    """Without dropping prompts, at given times."""
    model, _ = network(name)
    file = f"second/mmjit/{name}/golden.npz"
    a = arrays(file)
    x, noise, t = (mx.array(a[k]) for k in ("train_images", "train_noise", "lora_t"))
    condition = text(a["train_context"], a["train_mask"])
    flow = FlowConfig(noise_scale=2.0, t_eps=0.05)
    losses = [training_loss(model, x, condition, t, noise, replace(flow, loss=loss)) for loss in ("velocity", "x0")]
    close(file, "lora_losses_velocity_x0", mx.stack(losses))


def test_six_training_steps():
    model, config = network("nopre")
    s, a = SETTINGS["train"], arrays("train.npz")
    flow = FlowConfig(noise_scale=s["noise_scale"], t_eps=s["t_floor"], label_drop_prob=s["label_drop_rate"])
    shell = MMJiT(config.model)
    state = initial_arrays(trainable(model))
    step = TrainStep(shell, flow, StepOptions(AdamW(*s["betas"], eps=s["eps"])))
    losses = []
    for i in range(s["steps"]):
        images = a["x_uint8"][i].transpose(0, 2, 3, 1)
        condition = text(a["context"][i], a["mask"][i].astype(bool))
        null = text(np.zeros_like(a["context"][i]), np.zeros_like(a["mask"][i], bool))
        noise = mx.array(a["noise"][i])
        draws = Draws(mx.array(a["drop_uniform"][i]), mx.array(a["t_normal"][i]), noise)
        state, loss, _ = step(state, images, condition, null, draws, float(a["lr"][i]), i + 1, (s["ema"], s["ema"]))
        losses.append(np.asarray(loss))
    close("train.npz", "loss", np.stack(losses).reshape(-1))
    for key, want in a.items():
        where, _, name = key.partition("/net.")
        if where in ("final", "ema"):
            close("train.npz", key, state["model" if where == "final" else "ema1"][name].reshape(want.shape))


def test_forced_network():
    model, config = network("small")
    forced = MMJiT(MMJiTConfig(**{**config.model.__dict__, "forcing": ForcingConfig()}))
    forced.update(model.parameters())
    a, f = arrays("forward.npz"), arrays("forced.npz")
    condition = text(a["small/context"], a["small/mask"])
    close("forced.npz", "small/out", forced(mx.array(a["small/x"]), mx.array(f["small/t"]), condition))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The four-step student, converted from a file of the JAX tree, and its configuration."""
    folder = tmp_path_factory.mktemp("student")
    a, info = arrays("meanflow.npz"), json.loads((T2I / "meanflow.json").read_text())
    mx.save_safetensors(str(folder / "jax.safetensors"), {k[2:]: mx.array(v) for k, v in a.items() if k[:2] == "w/"})
    settings = {"img_size": info["img_input_size"], "text_length": info["prompt_length"]}
    convert(folder / "jax.safetensors", folder / "student.npz", **settings)
    return load_model(folder / "student.npz")


def test_student_forward(student):
    model, _ = student
    a = arrays("meanflow.npz")
    settings = np.stack([a[f"forward/{n}"] for n in ("h", "omega", "t_min", "t_max")], axis=1)
    condition = {**text(a["forward/context"], a["forward/mask"]), "settings": mx.array(settings)}
    close("meanflow.npz", "forward/out", model(mx.array(a["forward/x"]), HALF, condition))


def test_student_takes_four_steps(student, monkeypatch):
    model, config = student
    a = arrays("meanflow.npz")
    prompts = given_prompts(model, a["forward/context"], a["forward/mask"], monkeypatch)
    assert (config.sample.steps, config.sample.cfg, config.sample.cfg_low, config.sample.cfg_high) == (4, 12, 0.2, 0.8)
    for state in Sampler(model, config.flow, config.sample).states(mx.array(a["sample/noise"]), prompts[:2]):
        close("meanflow.npz", f"sample/z_after_{state.step}", state.z)
    with pytest.raises(MlxSfError, match="method is 'heun', want euler"):
        Sampler(model, config.flow, replace(config.sample, method="heun"))


def test_student_second_set(tmp_path, monkeypatch):
    file = "second/meanflow/golden.npz"
    a, info = arrays(file), json.loads((T2I / file).with_name("golden.json").read_text())
    source = (T2I / file).with_name("student_jax_tree_bf16.safetensors")
    settings = {"img_size": info["config"]["image_size"], "text_length": info["config"]["prompt_length"]}
    convert(source, tmp_path / "student.safetensors", dtype="float32", **settings)
    model, config = load_model(tmp_path / "student.safetensors")
    for name, factor in (("x_pred", 1), ("x_pred_other_h", 2)):
        numbers = [factor * a["h"], a["omega"], a["t_min"], a["t_max"]]
        condition = {**text(a["context"], a["mask"]), "settings": mx.array(np.stack(numbers, axis=1))}
        close(file, name, model(mx.array(a["img"]), HALF, condition))
    prompts = given_prompts(model, a["context"], a["mask"], monkeypatch)
    for run in info["runs"]:
        sample = SampleConfig("euler", run["steps"], run["omega"], run["t_min"], run["t_max"])
        states = [2 * a["noise"]]
        for state in Sampler(model, config.flow, sample).states(mx.array(a["noise"]), prompts):
            states.append(np.asarray(state.z))
        close(file, f"states_{run['name']}", np.stack(states))
        pixels = architecture(config.model).to_uint8(states[-1])
        assert np.abs(pixels.astype(int) - a[f"uint8_{run['name']}"]).max() <= 1


def test_published_sizes():
    rows = json.loads((T2I / "key_manifest.json").read_text())["keys"]
    counts = {"B/16": 256548480, "L/16": 908609256, "B/32": 258615168}
    for name, count in counts.items():
        size, patch = name.split("/")
        config = model_config(size, int(patch), 512)
        assert parameter_count(config) == count
        hub = {
            row["diffusers"].removeprefix("model.net.").replace("{i}", str(i)): row["shapes"][name]
            for row in rows
            for i in range(1 if "{i}" not in row["diffusers"] else _blocks(config, row["diffusers"]))
        }
        shapes = parameter_shapes(config)
        assert {k for k in hub if not k.startswith(("t_embedder", "pooled_embedder"))} == set(shapes)
        assert all(np.prod(hub[k]) == np.prod(s) for k, s in shapes.items())
    assert parameter_count(MMJiTMFConfig()) == 262076544 - 1574400
    # the specification counts 0.403e12, 0.008e12 of them for the text alone
    assert forward_flops(model_config("B", 16, 512)) == pytest.approx(0.392e12, rel=0.02)


def _blocks(config, key):
    return config.depth if "double" in key else config.text_depth


def test_pixels_by_the_published_rule():
    a = arrays("sample.npz")
    values = a["quantise_in"].reshape(1, 1, -1)
    np.testing.assert_array_equal(to_uint8_half_up(np.repeat(values, 3, 0))[..., 0].ravel(), a["quantise_out"].ravel())


def test_words_of_its_own():
    c = MMJiTConfig(16, 4, 24, 1, 1, 2, 12, 64, 8, TextConfig("", 16, 6, ("a", "red", "star")))
    model = MMJiT(c)
    condition = model.condition(["A red, red star!", "", None])
    np.testing.assert_array_equal(np.asarray(condition["mask"]).sum(axis=1), [4, 0, 0])
    model.update({"final_layer": {"linear": {"weight": mx.random.normal((48, 24))}}})
    out = model(mx.zeros((3, 3, 16, 16)), HALF, condition)
    assert mx.abs(out[0] - out[1]).max().item() > 1e-4
    with pytest.raises(MlxSfError, match="'blue' is none of the 3 words that this model was trained with"):
        model.condition(["a blue star"])
    with pytest.raises(FieldError, match="prompt is 3, want a text"):
        model.condition([3])


def test_prompts_without_an_encoder():
    model = MMJiT(MMJiTConfig(16, 4, 24, 1, 1, 2, 12, 64, 8, TextConfig("x", 16, 6)))
    assert not model.condition([None])["mask"].any().item()
    with pytest.raises(MlxSfError, match="prompts need a text encoder"):
        model.condition(["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 6}, "head_dim is 6, want a multiple of 4"),
        ({"img_size": 510}, "patch_size is 16, want a divisor of img_size 510"),
        ({"text": TextConfig}, "want a TextConfig"),
        ({"depth": 0}, "depth is 0, want at least 1"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(FieldError, match=message):
        MMJiTConfig(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small", "full"])
def test_b16_itself(case):
    info = json.loads((T2I / "fullsize.json").read_text())
    s, file = info["inputs"][case], "fullsize.npz"
    tensors = {}
    for key, shape, centre, halfwidth, seed in info["rule"]:
        u = np.random.RandomState(seed).random_sample(shape)
        tensors[key.removeprefix("model.net.")] = (centre + halfwidth * (2 * u - 1)).astype(np.float32)
    side, places = s["x_shape"][2], s["context_shape"][1]
    config = model_config("B", 16, side, text=TextConfig("", 1024, places))
    model = MMJiT(config)
    model.load_weights([(k, mx.array(tensors[k]).reshape(shape)) for k, shape in parameter_shapes(config).items()])
    x = np.random.RandomState(s["x_seed"]).standard_normal(s["x_shape"]).astype(np.float32)
    c = s["context_factor"] * np.random.RandomState(s["context_seed"]).standard_normal(s["context_shape"])
    out = np.asarray(model(mx.array(x), HALF, text(c.astype(np.float32), arrays(file)[f"{case}/mask"])))
    every = 16 if case == "full" else 4
    close(file, f"{case}/out_every{every}", out[:, :, ::every, ::every])
    rows = slice(256, 288) if case == "full" else slice(64, 96)
    columns = slice(96, 128) if case == "full" else slice(32, 64)
    close(file, f"{case}/out_corner", out[:, :, rows, columns])
    close(file, f"{case}/out_mean_abs", np.abs(out.astype(np.float64)).mean(axis=(2, 3)))
