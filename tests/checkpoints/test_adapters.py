"""Adapters in the published layout: what goes in comes out; what does not fit is refused in a line; export merges."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_sf
from mlx_sf.checkpoints.adapters import read_adapter, read_adapters, write_adapter
from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint
from mlx_sf.checkpoints.config import AdapterInfo, Config
from mlx_sf.checkpoints.export import export, quantize_checkpoint
from mlx_sf.checkpoints.load import load_model, verify_checkpoint
from mlx_sf.checkpoints.publish import Words, write_repository
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import read_metadata
from mlx_sf.formats.tensor_file import Entry, write_tensor_file
from mlx_sf.models import parameter_shapes
from mlx_sf.models.lora import LoRAConfig, merge, targets_of
from mlx_sf.models.quantize import QuantizationConfig
from tests.helpers import run_cli
from tests.hub_server import HubServer
from tests.models.test_lora import CONFIG, KIND, MINIT2I, SHAPES, T, X, adapter, off, out, weights

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
LORA, TENSORS = adapter(4, 3)
ENVELOPE = Config(CONFIG, class_names=("ant", "bee", "cat"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint with two weight sets, of which "model" is adapted."""
    sets = {"model": weights(), "ema1": {k: 1.1 * w for k, w in weights().items()}}
    save_checkpoint(tmp_path / "base.safetensors", sets, ENVELOPE)
    return tmp_path / "base.safetensors"


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "birds", info(base), TENSORS, CONFIG)
    return tmp_path / "birds"


@pytest.fixture
def alone(base: Path, tmp_path: Path) -> Path:
    """A checkpoint that holds an adapter alone."""
    sets = {"model": TENSORS, "ema1": {k: 0.5 * w for k, w in TENSORS.items()}}
    config = replace(ENVELOPE, adapter=info(base))
    save_checkpoint(tmp_path / "alone.safetensors", sets, config, {"optimizer/m/x": mx.zeros((1,))})
    return tmp_path / "alone.safetensors"


def info(base: Path) -> AdapterInfo:
    return AdapterInfo(LORA, str(base), "model", Checkpoint(base).fingerprint("model"))


def changed(folder: Path, **changes: Any) -> None:
    """Rewrite tensors (by the end of their name; None leaves one out) or settings of an adapter."""
    opened: dict[str, mx.array] = mx.load(str(folder / "adapter_model.safetensors"))  # type: ignore[assignment]
    tensors = changes.pop("tensors", lambda t: t)(dict(opened))
    write_tensor_file(folder / "adapter_model.safetensors", [Entry.of(k, v) for k, v in tensors.items()], "")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------------------ the folder


def test_what_is_written_is_read(folder: Path, base: Path) -> None:
    found = read_adapter(folder, CONFIG)
    assert (found.lora, found.base) == (LORA, str(base))
    assert all(mx.array_equal(found.tensors[k], w) for k, w in TENSORS.items())
    assert found.tensors.keys() == TENSORS.keys()
    keys = set(mx.load(str(folder / "adapter_model.safetensors")))
    assert "base_model.model.net.blocks.0.attn.qkv.lora_A.weight" in keys
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8.0, "LORA")
    assert "net.blocks.0.attn.qkv" in settings["target_modules"]
    assert json.loads((folder / "training_args.json").read_text())["base_model"] == str(base)


def test_a_published_adapter_is_written_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    model = load_model(MINIT2I / "hub" / "minit2i-b-16")[1].model
    found = read_adapter(MINIT2I / "small_lora", model)
    write_adapter(tmp_path / "again", AdapterInfo(found.lora, found.base, "model", ""), found.tensors, model)
    a, b = (dict(mx.load(str(d / "adapter_model.safetensors"))) for d in (MINIT2I / "small_lora", tmp_path / "again"))
    assert {k for k in a if "pooled_embedder" not in k} == set(b)
    assert all(mx.array_equal(a[k], w) for k, w in b.items())


@pytest.mark.parametrize("prefix", ["", "net.", "model.net.", "base_model.model.model.net."])
def test_any_of_the_known_prefixes(prefix: str, folder: Path) -> None:
    own = "base_model.model.net."
    changed(folder, tensors=lambda t: {prefix + k.removeprefix(own): w for k, w in t.items()})
    assert read_adapter(folder, CONFIG).lora == LORA


def test_layers_without_effect_are_left_out(folder: Path) -> None:
    more = {f"net.pooled_embedder.lora_{part}.weight": mx.zeros((4, 4)) for part in "AB"}
    changed(folder, tensors=lambda t: t | more)
    assert read_adapter(folder, CONFIG).lora == LORA


def test_its_file_or_a_run_name_it_too(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "adapter")
    for path in (run, run / "adapter", run / "adapter" / "adapter_model.safetensors"):
        assert read_adapter(path, CONFIG).path == run / "adapter"


QKV = "base_model.model.net.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"tensors": lambda t: {k.replace("blocks.0", "blocks.7"): w for k, w in t.items() if "blocks.0" in k}},
            "is of another model: JiT has no linear layer 'blocks.7.attn.",
        ),
        (
            {"tensors": lambda t: {**t, f"{QKV}.lora_B.weight": mx.zeros((5, 4))}},
            "blocks.0.attn.qkv.lora_B.weight is float32 (5, 4), its model wants (96, 4): is of another model",
        ),
        (
            {"tensors": lambda t: {**t, f"{QKV}.lora_A.weight": mx.zeros((3, 32))}},
            "blocks.0.attn.qkv.lora_A.weight is float32 (3, 32), adapter_config.json says rank 4: one rank",
        ),
        ({"r": 8}, "adapter_config.json says rank 8: one rank for all layers is wanted"),
        (
            {"tensors": lambda t: {k: w for k, w in t.items() if k != f"{QKV}.lora_B.weight"}},
            "has one of 'blocks.0.attn.qkv''s lora_A and lora_B without the other",
        ),
        (
            {"tensors": lambda t: {**t, f"{QKV}.lora_A.weight": mx.full((4, 32), mx.nan)}},
            "blocks.0.attn.qkv.lora_A.weight holds NaN or infinite values",
        ),
        ({"tensors": lambda t: {**t, f"{QKV}.bias": mx.zeros((3,))}}, "attn.qkv.bias' is no lora_A or lora_B"),
        ({"tensors": lambda t: {}}, "adapts no layer of JiT"),
        ({"use_dora": True}, "use_dora is True, want False: this program reads plain LoRA only"),
        ({"rank_pattern": {"w12": 8}}, "rank_pattern is {'w12': 8}, want {}"),
        ({"lora_alpha": None}, "r is 4, lora_alpha None, want numbers above 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    changed(folder, **changes)
    with pytest.raises(MlxSfError) as e:
        read_adapter(folder, CONFIG)
    assert message in str(e.value)


def test_what_is_incomplete_is_refused(folder: Path) -> None:
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    for remove, message in (
        (None, "does not match its SHA-256"),
        ("adapter_model.safetensors", "birds: lacks adapter_model.safetensors: give the folder of an adapter"),
        ("adapter_config.json", "birds: lacks adapter_config.json"),
    ):
        if remove:
            (folder / remove).unlink()
        with pytest.raises(MlxSfError, match=message):
            read_adapter(folder, CONFIG)
    with pytest.raises(MlxSfError, match=r"nowhere: no such file or folder"):
        read_adapter(folder / "nowhere", CONFIG)


def test_scales(folder: Path) -> None:
    assert [a.scale for a in read_adapters([folder, folder], [0.5], CONFIG)] == [0.5, 1.0]
    with pytest.raises(MlxSfError, match="^lora_scales: 2 for 1 of lora_paths, want at most one each$"):
        read_adapters([folder], [1.0, 2.0], CONFIG)
    with pytest.raises(MlxSfError, match="^lora_scales is nan, want a finite number$"):
        read_adapters([folder], [float("nan")], CONFIG)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_of_an_adapter_comes_with_its_base(alone: Path, base: Path, cli: Cli) -> None:
    model, config = load_model(alone)
    assert config.weights == ("model",)  # not the average
    want = load_model(base, "model")[0]
    want.load_weights(list(merge(weights(), LORA, TENSORS).items()))
    assert off(out(model), out(want)) < 1e-5
    half = load_model(alone, "ema1")[0]
    assert off(out(half), out(model)) > 1e-3
    assert Config.from_json(config.to_json()) == config
    assert "forward pass finite" in verify_checkpoint(alone)["ema1"]
    shown = cli("info", alone)[1]
    assert f"rank 4, alpha 8, 8 layers, of {base} (model)" in shown


def test_a_base_that_is_missing_or_has_changed(alone: Path, base: Path) -> None:
    other = {k: w + 1e-6 for k, w in weights().items()}
    save_checkpoint(base, {"model": other, "ema1": other}, ENVELOPE)
    with pytest.raises(
        MlxSfError, match=r"alone.safetensors: was trained on other weights than .*base.safetensors \(m"
    ):
        load_model(alone)
    save_checkpoint(base, {"ema1": other}, ENVELOPE)
    with pytest.raises(MlxSfError, match="its base model cannot be used: .*holds weights ema1, not 'model'"):
        load_model(alone)
    base.unlink()
    with pytest.raises(MlxSfError, match="its base model cannot be used: .*base.safetensors: no such file"):
        load_model(alone)


def test_a_checkpoint_of_an_adapter_is_checked(alone: Path, base: Path, tmp_path: Path) -> None:
    config = replace(ENVELOPE, adapter=info(base))
    for lora, message in (
        (replace(LORA, rank=5), r"has shape \(4, 85\), its configuration wants \(5, 85\)"),
        (replace(LORA, targets=(*LORA.targets, "blocks.0.norm1")), "targets is 'blocks.0.norm1', want linear layers"),
        (replace(LORA, targets=LORA.targets[1:]), "is not part of the network"),
    ):
        wrong = replace(config, adapter=replace(info(base), lora=lora))
        save_checkpoint(tmp_path / "wrong.npz", {"model": TENSORS}, wrong)
        with pytest.raises(MlxSfError, match=message):
            Checkpoint(tmp_path / "wrong.npz").weights()
    with pytest.raises(MlxSfError, match="is an adapter, want a whole network: merge it first with `mlx-sf export`"):
        quantize_checkpoint(alone, tmp_path / "q.safetensors", QuantizationConfig(8, 32))
    with pytest.raises(MlxSfError, match="is an adapter, want a whole network"):
        write_repository(Checkpoint(alone), tmp_path / "repo", "a/b", Words("mit", lambda classes: ""))


# ------------------------------------------------------------------------------------------------ merging, drawing


def test_export_merges_an_adapters_run(alone: Path, tmp_path: Path) -> None:
    count = export(alone, tmp_path / "whole.safetensors", None, "float32")
    whole = Checkpoint(tmp_path / "whole.safetensors")
    assert count == sum(int(np.prod(s)) for s in parameter_shapes(CONFIG).values())
    assert (whole.config.adapter, whole.config.weights) == (None, ("model",))
    assert whole.config.provenance["base"] == "base.safetensors"
    assert off(out(load_model(whole)[0]), out(load_model(alone)[0])) < 1e-5


def test_export_merges_folders(base: Path, folder: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    target = tmp_path / "both.safetensors"
    paths, scales = ["--lora-paths", folder, "--lora-paths", folder], ["--lora-scales", "0.5"]
    status, _, err = cli("export", base, target, "--weights", "model", "--dtype", "float32", *paths, *scales)
    assert (status, err) == (0, "")
    assert Checkpoint(target).config.provenance["adapters"] == [f"{tmp_path.name}/birds x {s}" for s in ("0.5", "1")]
    want = merge(weights(), LORA, TENSORS, 1.5)
    assert all(mx.allclose(w, want[k], atol=1e-6).item() for k, w in Checkpoint(target).weights().items())
    quantize_checkpoint(base, tmp_path / "q.safetensors", QuantizationConfig(8, 32))
    line = refused("holds 8-bit weights", "export", tmp_path / "q.safetensors", target, "--lora-paths", folder)
    assert "take the float checkpoint" in line
    refused("--lora-scales: 2 for 1 of --lora-paths", "export", base, target, "--lora-paths", folder, *scales, *scales)


def test_drawing_with_adapters(
    base: Path, alone: Path, folder: Path, tmp_path: Path, cli: Cli, refused: Refused
) -> None:
    def pixels(*arguments: Any) -> np.ndarray:
        status, _, err = cli("sample", *arguments, "--classes", "1", "--steps", "2", "-o", tmp_path / "x.npy")
        assert status == 0, err
        return np.load(tmp_path / "x.npy")

    own = ["--ckpt", base, "--weights", "model"]
    from_run, from_folder = pixels("--ckpt", alone), pixels(*own, "--lora-paths", folder)
    np.testing.assert_array_equal(from_run, from_folder)
    assert np.abs(from_run - pixels(*own)).max() > 1e-3
    off_again = pixels(*own, "--lora-paths", folder, "--lora-scales", "0")
    np.testing.assert_array_equal(off_again, pixels(*own))
    drawn = mlx_sf.load(base, weights="model", lora_paths=[folder], lora_scales=[0.5]).sample([1], steps=2)[0]
    assert drawn.settings["adapters"] == f"{tmp_path.name}/birds x 0.5"
    run = mlx_sf.load(alone).sample([1], steps=2)[0]
    run.save(tmp_path / "x.png")
    assert read_metadata(tmp_path / "x.png")["adapter"] == "rank 4, alpha 8, 8 layers, of base.safetensors"
    refused("birds: is an adapter: name its model, and the adapter with --lora-paths", "sample", "--ckpt", folder)
    refused(
        "--lora-scales: 1 for 0 of --lora-paths",
        "sample",
        "--ckpt",
        base,
        "--lora-scales",
        "2",
        "-o",
        tmp_path / "y.png",
    )


def test_drawing_with_an_adapter_beside_quantised_weights(base: Path, folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(base, tmp_path / "q.safetensors", QuantizationConfig(8, 32), ["model"])
    few = mlx_sf.load(tmp_path / "q.safetensors", dequantize=False, lora_paths=[folder]).network
    floats = mlx_sf.load(base, weights="model", lora_paths=[folder]).network
    condition = floats.condition([0, 1])
    assert off(few(X, T, condition), floats(X, T, condition)) < 0.05


def test_an_adapter_on_the_hub(base: Path, folder: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        commit = hub.add("someone/birds", {f"lora/{p.name}": p.read_bytes() for p in folder.iterdir()})
        env = {**hub.env(tmp_path / "hf"), "MLX_SF_CACHE": str(tmp_path / "cache")}
        own = ["--ckpt", base, "--weights", "model", "--classes", "1", "--steps", "1"]
        place = ["--lora-paths", "someone/birds/lora", "--lora-scales", "0.5"]
        done = run_cli("sample", *own, *place, "-o", tmp_path / "x.png", env=env)
    assert done.returncode == 0, done.stderr
    assert read_metadata(tmp_path / "x.png")["adapters"] == f"someone/birds/lora at commit {commit} x 0.5"
    here = mlx_sf.load(base, weights="model", lora_paths=[folder], lora_scales=[0.5]).sample([1], steps=1)[0]
    np.testing.assert_array_equal(np.asarray(here), np.asarray(Image.open(tmp_path / "x.png")))


def test_targets_need_not_be_the_default(folder: Path, base: Path) -> None:
    one = LoRAConfig(4, 8.0, ("blocks.1.mlp.w3", "x_embedder.proj2"))
    assert one.targets[0] in targets_of(SHAPES, KIND)
    assert one.targets[1] not in targets_of(SHAPES, KIND)
    tensors = {k: 0.1 * mx.ones(shape) for k, shape in one.shapes(SHAPES).items()}
    write_adapter(folder, replace(info(base), lora=one), tensors, CONFIG)
    model = mlx_sf.load(base, weights="model", lora_paths=[folder]).network
    want = load_model(base, "model")[0]
    want.load_weights(list(merge(weights(), one, tensors).items()))
    assert off(out(model), out(want)) < 1e-5
    assert dict(tree_flatten(model.trainable_parameters())).keys() == tensors.keys()
