"""From a .pth to the published pictures, for networks that no golden file holds; settings; every refusal."""

import argparse
import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.checkpoint import Checkpoint
from mlx_sf.checkpoints.config import Config
from mlx_sf.checkpoints.convert.jit import convert
from mlx_sf.checkpoints.load import load_model
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models import parameter_shapes
from mlx_sf.models.jit import JiTConfig
from mlx_sf.models.jit_sizes import model_config
from mlx_sf.spectral import ForcingConfig
from tests.helpers import MODELS, PARITY, classes, sample_states

torch = pytest.importorskip("torch")

# networks unlike the golden ones: other head counts, windows, patches, schedules, heads, widths
NETWORKS = {
    "three heads, windows of 6": {"patch_size": 6, "window_size": 6, "hidden_size": 36, "num_heads": 3, "depth": 3},
    "one patch": {"patch_size": 12, "hidden_size": 32, "num_heads": 2, "depth": 2, "in_context_len": 1},
    "vanilla, no context": {
        "spectral_forcing": False,
        "patch_size": 3,
        "in_context_len": 0,
        "num_heads": 4,
        "depth": 5,
    },
    "late context": {"patch_size": 4, "depth": 4, "in_context_start": 3, "num_heads": 1, "in_context_len": 7},
    "fixed": {"patch_size": 4, "scale_schedule": "fixed", "fixed_scale": 0.6, "window_size": 4, "num_heads": 2},
    "patch of one": {"patch_size": 1, "img_size": 6, "hidden_size": 8, "num_heads": 2, "window_size": 3},
    "v": {"patch_size": 2, "pred_param": "v", "noise_scale": 2.0, "num_heads": 4, "t_eps": 0.02},
    "one class": {"patch_size": 4, "num_classes": 1, "num_heads": 2},
    **{
        f"hybrid {mode}": {
            "patch_size": 4,
            "num_heads": 2,
            "pred_param": "hybrid",
            "hybrid_x_weight_mode": mode,
            "hybrid_x_weight_power": power,
            "hybrid_x_weight_min": 0.05,
            "hybrid_x_weight_max": 0.9,
        }
        for mode, power in (("one_minus_t", 0.5), ("snr", 1.5), ("snr_inverse", 2.0))
    },
}


def make_config(**changes) -> Config:
    base = {
        "img_size": 12,
        "patch_size": 4,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "bottleneck_dim": 10,
        "in_context_len": 5,
        "in_context_start": 1,
        "num_classes": 4,
    }
    values = {**base, **changes}
    forced = values.pop("spectral_forcing", True)
    parts = [
        {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
        for kind in (JiTConfig, ForcingConfig, FlowConfig)
    ]
    model, forcing, flow = parts
    assert set(values) == {name for part in parts for name in part}
    if values.get("pred_param") == "hybrid":
        model["out_channels"] = 6
    return Config(JiTConfig(**model, forcing=ForcingConfig(**forcing) if forced else None), FlowConfig(**flow))


def reference_args(config: Config, **changes) -> argparse.Namespace:
    m, f = config.model, config.flow
    forcing = m.forcing or ForcingConfig()
    values = {
        "model": "custom",
        "img_size": m.img_size,
        "window_size": forcing.window_size or None,
        "disable_dct_patchify": m.forcing is None,
        "disable_dct_scale_schedule": forcing.scale_schedule == "fixed",
        "dct_fixed_scale": forcing.fixed_scale,
        "class_num": m.num_classes,
        "cfg": 1.7,
        "interval_min": 0.2,
        "interval_max": 0.9,
        "sampling_method": "heun",
        "num_sampling_steps": 6,
        "optimizer": "adamw",
        **{k: v for k, v in dataclasses.asdict(f).items()},
        **changes,
    }
    return argparse.Namespace(**values)


def torch_network(config: Config, seed: int = 0):
    from mlx_sf.parity.torch_jit import TorchJiT

    torch.manual_seed(seed)
    network = TorchJiT(config.model)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name != "pos_embed":
                p.copy_(
                    torch.randn_like(p) * (0.3 if p.ndim < 2 else 0.8 / math.sqrt(p[0].numel())) + (p.ndim < 2) * 0.5
                )
    return network.eval()


def state_dict(network, prefix="net."):
    return {prefix + k: v.detach().clone() for k, v in network.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_equal_pytorch(name, tmp_path):
    """.pth -> convert -> forward and guided Heun samples, against the same network in PyTorch."""
    from mlx_sf.parity.torch_jit import torch_sample

    config = make_config(**NETWORKS[name])
    network = torch_network(config)
    sd = state_dict(network)
    other = {k: torch.zeros_like(v) for k, v in sd.items()}
    torch.save({"model": other, "model_ema1": sd, "model_ema2": other, "epoch": 7, "args": reference_args(config)},
               tmp_path / "c.pth")  # fmt: skip
    start = {"in_context_start": config.model.in_context_start} if config.model.in_context_len else {}
    convert(tmp_path / "c.pth", tmp_path / "c.npz", flags=start)
    model, got = load_model(tmp_path / "c.npz")
    assert got.model == dataclasses.replace(config.model, in_context_start=got.model.in_context_start)
    assert got.flow == config.flow
    assert (got.sample.steps, got.sample.cfg, got.sample.cfg_low, got.sample.cfg_high) == (6, 1.7, 0.2, 0.9)

    H = config.model.img_size
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 3, H, H)).astype(np.float32)
    t, y = np.array([0, 0.4, 1], np.float32), np.array([0, config.model.num_classes, 0])
    want = network(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y)).detach().numpy()
    out = np.asarray(model(mx.array(x), mx.array(t), classes(model, y)))
    assert np.abs(out - want).max() <= 2e-5 * np.abs(want).max()

    want = torch_sample(network, got, torch.from_numpy(x), torch.from_numpy(y)).numpy()
    *_, last = sample_states(model, got, mx.array(x), y)
    assert np.abs(np.asarray(last.z) - want).max() <= 5e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_itself_equals_golden(golden, name):
    from mlx_sf.parity.torch_jit import TorchJiT

    root = torch.load(PARITY / f"{name}.pth", map_location="cpu", weights_only=False)
    entry = golden.configs["models"][name]
    flags = {} if name != "head64" else {"noise_scale": 1.0}
    config = _configured(name, {**flags, **({"in_context_start": 1} if name != "head64" else {})})
    network = TorchJiT(config.model)
    network.load_state_dict({k.removeprefix("net."): v for k, v in root.get("model", root).items()})
    case = next(c for c in golden.configs["forward"] if c["model"] == name and c["weights"] == "model")
    arrays = golden.arrays("forward")
    x, t, y = (torch.from_numpy(arrays[f"{case['inputs']}/{what}"]) for what in "xty")
    golden.close("forward", f"{case['case']}/out", network(x, t, y.long()).detach().numpy())
    assert config.model.num_heads == entry["num_heads"]


def _configured(name: str, flags: dict) -> Config:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return convert(PARITY / f"{name}.pth", Path(folder) / "x.npz", flags=flags).config


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_formats_and_types_load_everywhere(suffix, dtype, tmp_path):
    target = tmp_path / f"x{suffix}"
    convert(PARITY / "vanilla.pth", target, "ema2", dtype, {"in_context_start": 1})
    source = torch.load(PARITY / "vanilla.pth", map_location="cpu", weights_only=False)["model_ema2"]
    opened = mx.load(str(target))
    for key, want in source.items():
        got = opened[key.removeprefix("net.")]
        half = got.dtype != mx.float32
        want = want.detach().reshape(got.shape)
        want = want.to(getattr(torch, dtype)).float() if half else want
        np.testing.assert_array_equal(np.asarray(got.astype(mx.float32)), want.numpy(), err_msg=key)
        assert half == (dtype != "float32" and ("blocks" in key or "x_embedder" in key or "final" in key)
                        and "norm" not in key), key  # fmt: skip
    if suffix == ".npz":
        with np.load(target) as z:
            assert set(z.files) - {"__config__"} == {k.removeprefix("net.") for k in source}
    assert load_model(target)[1].weights == ("ema2",)


@pytest.mark.parametrize("name", ["JiT-B/16", "JiT-B/32", "JiT-L/32", "JiT-H/32", "JiT-700M"])
@pytest.mark.parametrize("forced", [True, False])
def test_published_checkpoints_are_accepted(golden, name, forced):
    """Every key and shape of the manifest, as a checkpoint of tensors that are never read."""
    from mlx_sf.checkpoints.convert import jit as module
    from mlx_sf.formats.torch_file.reader import Record

    class Shape:
        def __init__(self, shape):
            self.shape, self.dtype = tuple(shape), "float32"

    vanilla = golden.manifest["presets"][name]["vanilla_shapes"]
    tensors = {k: Shape(s if forced else vanilla.get(k, s)) for k, s, _ in golden.manifest["keys"][name]}
    stripped, ignored = module.strip_wrappers(tensors, "x")
    args = Record("argparse.Namespace", {"model": name, "img_size": 256, "class_num": 1000, "noise_scale": 1.0})
    for given in (args, None):  # with the trainer's args (of before there were dct entries), and bare
        config, _ = module.configure(stripped, given, {"noise_scale": 1.0}, "x")
        preset = model_config(name, **({} if forced else {"forcing": None}))
        assert config.model == preset
        assert config.name == name
        assert not ignored
        assert len(module.jit_entries(stripped, config.model, "float32", "x")) == len(parameter_shapes(preset))


def save(tmp_path, root, name="c.pth"):
    torch.save(root, tmp_path / name)
    return tmp_path / name


@pytest.fixture(scope="module")
def small():
    config = make_config()
    return config, state_dict(torch_network(config))


def full(small, **changes):
    config, sd = small
    return {"model": sd, "model_ema1": sd, "model_ema2": sd, "epoch": 1, "args": reference_args(config, **changes)}


def test_wrappers_prefixes_and_rotary_buffers(small, tmp_path):
    """Saved from a wrapped or compiled model, without "net.", with rotary tables stored beside the weights."""
    _, sd = small
    plain = {k.removeprefix("net."): v for k, v in sd.items()}
    for i, prefix in enumerate(("", "module.net.", "net._orig_mod.")):
        weights = {prefix + k: v for k, v in plain.items()} | {prefix + "feat_rope.freqs_cos": torch.zeros(3)}
        report = convert(save(tmp_path, weights, f"{i}.pth"), tmp_path / f"{i}.npz",
                         flags={"noise_scale": 1.0, "in_context_start": 1})  # fmt: skip
        assert report.ignored == ["feat_rope.freqs_cos"]
    assert (tmp_path / "0.npz").read_bytes()[-2000:] == (tmp_path / "1.npz").read_bytes()[-2000:]


def test_older_layout_and_old_args(small, tmp_path):
    """The layout before PyTorch 1.6, and a JiT checkpoint of before there were dct options."""
    root = full(small)
    for name in ("disable_dct_patchify", "disable_dct_scale_schedule", "dct_fixed_scale", "window_size"):
        delattr(root["args"], name)
    torch.save(root, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    report = convert(tmp_path / "old.pth", tmp_path / "old.npz", flags={"in_context_start": 1})
    assert report.layout == "legacy"
    assert report.config.model.forcing is not None
    assert any("window_size" in s for s in report.origin["published"])


def test_several_weight_sets_in_one_file(small, tmp_path):
    convert(save(tmp_path, full(small)), tmp_path / "c.safetensors", ["ema1", "ema2"], flags={"in_context_start": 1})
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    assert checkpoint.config.weights == ("ema1", "ema2")
    assert checkpoint.pick() == "ema1"
    with pytest.raises(MlxSfError, match="holds weights ema1, ema2, not 'model'"):
        checkpoint.pick("model")


BARE = {"noise_scale": 1.0, "in_context_start": 1}


@pytest.mark.parametrize(
    "change, flags, words",
    [
        (lambda sd: sd.pop("net.blocks.1.attn.qkv.weight"), BARE, "lacks 'blocks.1.attn.qkv.weight'"),
        (lambda sd: sd.pop("net.x_embedder.proj1.weight"), BARE, "lacks 'x_embedder.proj1.weight'"),
        (lambda sd: sd.update({"net.extra.weight": torch.zeros(2)}), BARE, "has 'extra.weight'"),
        (lambda sd: sd.update({"net.blocks.0.attn.proj.bias": torch.zeros(7)}), BARE,
         "tensor 'blocks.0.attn.proj.bias' has shape (7,), want (32,)"),
        (lambda sd: sd.update({"net.blocks.0.attn.proj.bias": torch.zeros(32, dtype=torch.int64)}), BARE, "is int64"),
        (lambda sd: sd["net.blocks.0.attn.proj.bias"].__setitem__(3, float("nan")), BARE,
         "tensor 'blocks.0.attn.proj.bias' holds NaN"),
        (lambda sd: [sd.pop(k) for k in list(sd) if "blocks.1." in k], BARE, "block 1 is missing"),
        (lambda sd: sd.update({"net.pos_embed": torch.zeros(1, 8, 32)}), BARE, "want a square number"),
        (lambda sd: None, {}, "give noise_scale"),
        (lambda sd: None, {"noise_scale": 1.0}, "give in_context_start"),
        (lambda sd: None, {**BARE, "img_size": 64}, "flag img_size says img_size 64, but the file's shapes say 12"),
        (lambda sd: None, {**BARE, "in_context_start": 9}, "in_context_start is 9, want a block number from 0 to 2"),
        (lambda sd: None, {**BARE, "window_size": 5}, "window_size is 5, want a divisor of img_size 12"),
        (lambda sd: None, {**BARE, "scale_schedule": "fixed"}, "give fixed_scale"),
        (lambda sd: None, {**BARE, "scale_schedule": "cosine"}, "PyTorch models were trained with linear or fixed"),
        (lambda sd: None, {**BARE, "exact_end": True}, "no setting of PyTorch models is called 'exact_end'"),
        (lambda sd: None, {**BARE, "spectral_forcing": False}, "flag spectral_forcing says spectral_forcing False"),
    ],
)  # fmt: skip
def test_wrong_state_dicts_are_refused(small, tmp_path, change, flags, words):
    sd = {k: v.clone() for k, v in small[1].items()}
    change(sd)
    (tmp_path / "out.npz").write_bytes(b"precious")
    with pytest.raises(MlxSfError) as e:
        convert(save(tmp_path, sd), tmp_path / "out.npz", flags=flags)
    assert words in str(e.value)
    assert str(tmp_path / "c.pth") in str(e.value)
    assert (tmp_path / "out.npz").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pth", "out.npz"]


@pytest.mark.parametrize(
    "changes, flags, words",
    [
        (
            {"noise_scale": 2.0},
            {"noise_scale": 1.0},
            "flag noise_scale says noise_scale 1.0, but the file's args say 2.0",
        ),
        ({"img_size": 256}, {}, "args say img_size 256, but the file's shapes say 12"),
        ({"class_num": 1000}, {}, "args say num_classes 1000, but the file's shapes say 4"),
        ({"disable_dct_patchify": True}, {}, "args say spectral_forcing False, but the file's shapes say True"),
        ({"pred_param": "hybrid"}, {}, "out_channels is 3, want 6 with pred_param hybrid"),
        ({"pred_param": "eps"}, {}, "pred_param is 'eps', want one of x, v, hybrid"),
        ({"model": "JiT-B/16"}, {}, "args say the model is JiT-B/16, whose depth is 12, but the weights have 3"),
        ({"t_eps": "small"}, {}, "t_eps is 'small', want a finite number"),
    ],
)
def test_contradicting_settings_are_refused(small, tmp_path, changes, flags, words):
    with pytest.raises(MlxSfError) as e:
        convert(save(tmp_path, full(small, **changes)), tmp_path / "o.npz", flags={"in_context_start": 1, **flags})
    assert words in str(e.value)


def test_wrong_weights_and_targets_are_refused(small, tmp_path, refused):
    path = save(tmp_path, full(small))
    del (root := full(small))["model_ema2"]
    short = save(tmp_path, root, "short.pth")
    refused("holds weights model, ema1, not 'ema2'", "convert", short, tmp_path / "o.npz", "--weights", "ema2")
    refused("weights 'ema3' are unknown", "convert", path, tmp_path / "o.npz", "--weights", "ema3")
    refused("must end in .npz or .safetensors", "convert", path, tmp_path / "o.bin")
    refused("no such file", "convert", tmp_path / "none.pth", tmp_path / "o.npz")
    refused("holds no JiT weights", "convert", save(tmp_path, {"a": 1}, "a.pth"), tmp_path / "o.npz")
    refused("--fixed-scale", "convert", path, tmp_path / "o.npz", "--fixed-scale", "wide")
    (tmp_path / "file").write_text("")
    refused("cannot write", "convert", path, tmp_path / "file" / "o.npz", "--in-context-start", 1)
    big = {k: v * 1e6 for k, v in root["model"].items()}
    refused("does not fit float16", "convert", save(tmp_path, big, "big.pth"), tmp_path / "o.npz", "--dtype", "float16",
            "--noise-scale", 1, "--in-context-start", 1)  # fmt: skip


def test_command_line_converts_verifies_and_says_so(cli, tmp_path):
    target = tmp_path / "forced.npz"
    status, out, _ = cli("convert", PARITY / "forced.pth", target, "--in-context-start", 1, "--verify")
    assert status == 0
    for words in ("weights ema1", "60,344 parameters", "noise_scale 1.0", "verified ema1", "assumed"):
        assert words in out
    status, out, _ = cli("info", target)
    assert status == 0
    assert "60,344" in out
    status, out, _ = cli("info", PARITY / "forced.pth")
    assert "model_ema1" in out


@pytest.mark.slow
def test_memory_of_a_large_conversion(tmp_path):
    """A B/32-shaped checkpoint with two EMAs and optimiser state: peak below 1.3 times the output's size."""
    from mlx_sf.bench.convert import measure_conversion

    result = measure_conversion(tmp_path)
    assert result["peak_over_interpreter"] < 1.3 * result["output_bytes"]


def test_inception_weights_are_recognised(cli, tmp_path):
    """The public FID Inception's file layout: a bare state dict from before PyTorch 1.6."""
    from tests.metrics.fid_recipe import recipe_weights

    state = {k: torch.from_numpy(v.copy()) for k, v in recipe_weights().items()}
    torch.save(state, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    status, out, err = cli("convert", tmp_path / "inception.pth", tmp_path / "inception.safetensors")
    assert status == 0, err
    assert "FID Inception" in out
    assert "472 tensors" in out
