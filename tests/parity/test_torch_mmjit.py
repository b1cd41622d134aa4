"""The PyTorch MM-JiT and T5 encoder against the authors' code: what oracle and peer stand on."""

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.helpers import GOLDEN

torch = pytest.importorskip("torch")
peer = pytest.importorskip("mlx_sf.parity.torch_mmjit")

FOLDER = GOLDEN / "minit2i"
MODELS = {"small": "hub/minit2i-b-16", "hd52": "hub/minit2i-l-16", "hd64": "hd64", "nopre": "nopre"}
MASK_ROWS = ("all", "first half", "none", "first alone", "all but the second")
UNUSED = ("in_channels", "txt_hidden_size", "cond_vec_size")  # implied by others
T5_SIZES = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")


@cache
def arrays(file):
    with np.load(FOLDER / f"{file}.npz") as z:
        return {name: z[name] for name in z.files}


def tensor(file, name):
    return torch.from_numpy(arrays(file)[name])


def tensors(path: Path):
    return {name: torch.from_numpy(np.array(value)) for name, value in mx.load(str(path)).items()}


def check(file, name, got, row=...):
    """`got` equals a golden array, or some rows of it, within the tolerance that comes with it."""
    tolerance = json.loads((FOLDER / "tolerances.json").read_text())[f"{file}.npz"][name][2]
    want = arrays(file)[name][row]
    assert got.shape == want.shape
    assert float(np.abs(got.numpy().astype(np.float64) - want).max()) <= tolerance


@cache
def network(name, fused=False):
    config = json.loads((FOLDER / "configs.json").read_text())["models"][name]
    sizes = {field: value for field, value in config.items() if field not in UNUSED}
    folder = FOLDER / MODELS[name] / "transformer"
    return peer.TorchMMJiT(**sizes, fused=fused).load_published(tensors(folder / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("row", range(5), ids=MASK_ROWS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_clean_image_is_the_authors(name, row):
    x, context, mask = (tensor("forward", f"{name}/{what}")[row : row + 1] for what in ("x", "context", "mask"))
    explicit, fused = (network(name, fused=fused)(x, context, mask) for fused in (False, True))
    check("forward", f"{name}/out", explicit, slice(row, row + 1))
    check("forward", f"{name}/out", fused, slice(row, row + 1))
    assert (explicit - fused).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["small_03", "small_06", "hd52_00", "nopre_00"])
@torch.no_grad()
def test_guided_samples_are_the_authors(case):
    settings = json.loads((FOLDER / "configs.json").read_text())["sampling"][case]
    name, steps = settings["model"], settings["steps"]
    context, mask = tensor("sample", f"{name}/context"), tensor("sample", f"{name}/mask")
    text = network(name).text(context, mask)
    null = network(name).text(context[:1], torch.zeros_like(mask[:1]))
    noise = tensor("sample", f"{name}/noise")
    z = peer.torch_t2i_sample(network(name), noise, text, null, steps, settings["guidance_scale"], settings["t_floor"])
    check("sample", f"{case}/z_after_{steps}", z)


@cache
def encoder():
    config = json.loads((FOLDER / "t5/config.json").read_text())
    t5 = peer.TorchT5Encoder(**{field: config[field] for field in T5_SIZES})
    return t5.load_published(tensors(FOLDER / "t5/model.safetensors"))


@pytest.mark.parametrize("case", ["prompts", "long"])
@torch.no_grad()
def test_last_hidden_state_is_the_authors(case):
    check("t5", f"{case}/out", encoder()(tensor("t5", f"{case}/ids"), tensor("t5", f"{case}/mask")))


@pytest.mark.parametrize("size", ["B/16", "L/16", "B/32"])
def test_names_and_shapes_are_those_of_the_published_file(size):
    manifest = json.loads((FOLDER / "key_manifest.json").read_text())
    depths = {"txt_preamble_blocks": 2, "double_blocks": 23 if size == "L/16" else 17}
    want = {}
    for key in manifest["keys"]:
        name = key["diffusers"]
        for i in range(next((depth for block, depth in depths.items() if block in name), 1)):
            want[name.replace("{i}", str(i))] = tuple(key["shapes"][size])
    wide = {"hidden_size": 1248, "num_heads": 24, "head_dim": 52, "depth_double": 23, "mlp_ratio": 2.7}
    with torch.device("meta"):  # shapes alone
        own = peer.TorchMMJiT(patch_size=int(size[2:]), **(wide if size == "L/16" else {})).state_dict()
    unread = {name for name in want if ".t_embedder." in name or ".pooled_embedder." in name}
    assert len(unread) == 5
    assert {f"model.net.{name}": tuple(value.shape) for name, value in own.items()} == {
        name: shape for name, shape in want.items() if name not in unread
    }


def test_t5_large_is_as_large_as_published():
    with torch.device("meta"):
        assert sum(p.numel() for p in peer.TorchT5Encoder.large().parameters()) == 341_231_104


def test_every_parameter_that_is_read_must_be_in_the_file():
    few = {name: value for name, value in network("nopre").state_dict().items() if "mask_token" not in name}
    with pytest.raises(RuntimeError, match="mask_token"):
        network("nopre").load_published(few)
