"""Runs that train an adapter alone: the published recipe, exact resume, and an adapter folder that others can use."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

import mlx_sf
from mlx_sf.checkpoints.adapters import read_adapter
from mlx_sf.checkpoints.checkpoint import Checkpoint, save_checkpoint, step_files
from mlx_sf.data.sources import SceneSource
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models import architecture, build, parameter_shapes
from mlx_sf.models.lora import LoRAConfig, adapter_parameters, add_adapter, initial_adapter, targets_of
from mlx_sf.models.mmjit import MMJiTConfig
from mlx_sf.models.text import TextConfig
from mlx_sf.training.options import Options
from mlx_sf.training.recipe import decide, options_from
from mlx_sf.training.step import StepOptions, TrainStep, draws, initial_arrays
from tests.training.runs import assert_equal_runs, flags, options, run, run_until
from tests.training.test_trainer import killed
from tests.training.test_world import launched

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def lora(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return options(base, output, lora=True, lora_rank=2, lr=0.01, **changes)


@pytest.fixture(scope="module")
def base(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as if it were trained: in a new one the blocks do nothing yet."""
    plain, file = Checkpoint(micro), tmp_path_factory.mktemp("base") / "base.safetensors"
    weights = {k: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(3)) for k, w in plain.weights().items()}
    save_checkpoint(file, {"model": weights}, plain.config)
    return file


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run. Not to be written to."""
    return run(lora(base, tmp_path_factory.mktemp("adapted"))).run


# ------------------------------------------------------------------------------------------------ the recipe


def test_the_published_recipe_is_the_default(base: Path) -> None:
    config, source = Checkpoint(base).config, SceneSource((16, 16), 320)
    given = options_from(config, {"init": str(base), "lora": True})
    r = decide(given, source, config)
    o = r.optimizer
    assert (r.options.lora_rank, r.options.lora_alpha, r.batch_size, r.steps) == (32, 32.0, 4, 400)
    assert (o.lr, o.lr_schedule, o.warmup_epochs, o.clip_grad) == (5e-4, "constant", 0.0, 1.0)
    assert (o.beta1, o.beta2, o.weight_decay) == (0.9, 0.999, 0.0)
    assert r.config.flow.label_drop_prob == 0
    assert decide(r.options, source, config) == r
    more = options_from(config, {"init": str(base), "lora": True, "lora_rank": 8, "batch_size": 16, "clip_grad": 0.0})
    r = decide(more, source, config)
    assert (r.options.lora_alpha, r.batch_size, r.optimizer.clip_grad) == (8.0, 16, 0.0)
    whole = decide(options_from(config, {"init": str(base)}), source, config)
    assert (whole.batch_size, whole.optimizer.beta2, whole.optimizer.clip_grad) == (32, 0.95, 0.0)
    assert whole.config.flow.label_drop_prob == 0.1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lora": True}, "lora: adapts trained weights: name their checkpoint with init"),
        ({"lora_rank": 4}, "lora_rank: is of an adapter only: add lora, or leave it out"),
        ({"lora": True, "init": "x", "lora_rank": 0}, "lora_rank is 0, want at least 1"),
        ({"lora": True, "init": "x", "lora_alpha": -1}, "lora_alpha is -1.0, want above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MlxSfError) as e:
        Options(**given)
    assert str(e.value) == message


def test_the_network_stays_as_it_is(base: Path, adapted: Path, tmp_path: Path, refused: Refused) -> None:
    own = ["--init", base, "--lora", "--output", tmp_path]
    refused("--lora: adapts trained weights: name their checkpoint with --init", "train", "--lora")
    refused("--img-size is 16, not 24: take the same, or leave out --lora", "train", *own, "--img-size", "24")
    refused("whose forcing is another", "train", *own, "--vanilla")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "1.png")
    refused("keeps the 10 classes of", "train", *own, "--data", tmp_path / "data")
    refused("is an adapter, want a whole network: merge it first", "train", "--init", adapted, "--output", tmp_path)
    named = tmp_path / "named.safetensors"
    config = replace(Checkpoint(base).config, class_names=tuple("abcdefghij"))
    save_checkpoint(named, {"model": Checkpoint(base).weights()}, config)
    refused("and the data has 10, or others: name them alike", "train", "--init", named, "--lora", "--output", tmp_path)
    assert not list(tmp_path.rglob("config.yaml"))


# ------------------------------------------------------------------------------------------------ the run


def test_what_a_run_leaves(base: Path, tmp_path: Path, cli: Cli) -> None:
    given = lora(base, tmp_path, preview_every=8, preview_images=2, preview_steps=1)
    status, shown, err = cli("train", *flags(given))
    assert status == 0, err
    assert f"lora: rank 2, alpha 2, 8 layers, of {base} (model)" in shown
    assert f"(its adapter in {tmp_path / 'run' / 'adapter'})" in shown
    checkpoint = Checkpoint(step_files(tmp_path / "run")[-1][1])
    info = checkpoint.config.adapter
    assert info is not None
    assert (info.base, info.weights) == (str(base), "model")
    shapes = info.lora.shapes(parameter_shapes(checkpoint.config.model))
    for name in ("model", "ema1", "ema2"):
        assert {k: w.shape for k, w in checkpoint.weights(name).items()} == shapes
    assert checkpoint.pick() == "model"
    assert (tmp_path / "run" / "previews" / "00000008.png").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lora_rank"] == 2
    assert "grad_norm" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def test_it_learns_and_the_folder_holds_what_the_run_draws(base: Path, adapted: Path) -> None:
    found = read_adapter(adapted, Checkpoint(base).config.model)
    assert all(mx.any(w != 0).item() for w in found.tensors.values())
    newest = Checkpoint(step_files(adapted)[-1][1]).weights("model")
    assert all(mx.array_equal(w, newest[k]) for k, w in found.tensors.items())
    a = mlx_sf.load(adapted).sample([1, 2], steps=3, seed=5)
    b = mlx_sf.load(base, lora_paths=[adapted / "adapter"]).sample([1, 2], steps=3, seed=5)
    c = mlx_sf.load(base).sample([1, 2], steps=3, seed=5)
    for drawn, again, plain in zip(a, b, c, strict=True):
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(again))
        assert not np.array_equal(np.asarray(drawn), np.asarray(plain))


def test_ended_between_saves_it_continues_to_the_bit(base: Path, adapted: Path, tmp_path: Path) -> None:
    given = lora(base, tmp_path)
    run_until(given, 5)
    assert run(given).finished
    assert_equal_runs(adapted, tmp_path / "run", 8)
    for file in (adapted / "adapter").iterdir():
        assert file.read_bytes() == (tmp_path / "run" / "adapter" / file.name).read_bytes()


@pytest.mark.parametrize(
    "file, where", [("adapter_model", "half"), ("checkpoint-", "before"), ("checkpoint-", "after")]
)
def test_killed_in_a_save_it_continues_to_the_bit(
    file: str, where: str, base: Path, adapted: Path, tmp_path: Path
) -> None:
    given = lora(base, tmp_path)
    assert killed(file, 2, where, given) == -signal.SIGKILL
    assert read_adapter(tmp_path / "run", Checkpoint(base).config.model)  # the old one or the new one, whole
    assert run(given).finished
    assert_equal_runs(adapted, tmp_path / "run", 8)


def test_a_base_that_is_gone_is_said(base: Path, tmp_path: Path, refused: Refused) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(base.read_bytes())
    folder = run(lora(copy, tmp_path, steps=1)).run
    copy.unlink()
    line = "its base model cannot be used: "
    refused(line, "train", "--resume", folder, "--steps", "2")
    refused(line, "sample", "--ckpt", folder, "-o", tmp_path / "x.png")


def test_a_runs_newest_checkpoint_is_named_for_good(whole: Path, tmp_path: Path) -> None:
    config = Checkpoint(step_files(run(lora(whole, tmp_path, steps=1)).run)[-1][1]).config
    assert config.adapter is not None
    assert (config.adapter.base, config.adapter.weights) == (str(step_files(whole)[-1][1]), "ema1")


def weights_of(folder: Path, name: str = "model") -> dict[str, mx.array]:
    return Checkpoint(step_files(folder)[-1][1]).weights(name)


@pytest.mark.parametrize("change", [{"grad_checkpoint": True}, {"accumulate": 2}, {"accumulate": 4}])
def test_ways_to_save_memory_change_nothing_but_rounding(
    change: dict[str, Any], base: Path, adapted: Path, tmp_path: Path
) -> None:
    got, want = weights_of(run(lora(base, tmp_path, **change)).run), weights_of(adapted)
    # a step of AdamW moves by the sign of tiny gradients, too
    assert max(mx.abs(got[k] - w).mean().item() for k, w in want.items()) < 1e-4


def test_lower_precision(base: Path, adapted: Path, tmp_path: Path) -> None:
    folder = run(lora(base, tmp_path, dtype="bfloat16")).run
    assert {w.dtype for w in weights_of(folder).values()} == {mx.float32}
    lines = [(d / "metrics.jsonl").read_text().splitlines()[-1] for d in (folder, adapted)]
    got, want = (json.loads(line)["loss"] for line in lines)
    assert got != want
    assert got == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_step_moves_the_adapter_of_a_network_that_takes_text(grad_checkpoint: bool) -> None:
    config = MMJiTConfig(16, 8, 16, 2, 1, 2, 8, 24, 8, TextConfig("", 12, 4, ("red", "fish")))
    network, shapes = build(config, mx.random.key(1)), parameter_shapes(config)
    leaves: Any = tree_flatten(network.parameters())
    network.update(tree_unflatten([(k, w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(2))) for k, w in leaves]))
    before = dict(tree_flatten(network.parameters()))
    shape = LoRAConfig(2, 2.0, targets_of(shapes, architecture(config)))
    add_adapter(network, shape, initial_adapter(shape, shapes, mx.random.key(0)))
    step = TrainStep(network, FlowConfig(), StepOptions(grad_checkpoint=grad_checkpoint))
    arrays, images = initial_arrays(adapter_parameters(network)), np.zeros((2, 16, 16, 3), np.uint8)
    condition, null = network.condition(["red fish", "red"]), network.condition([None, None])
    for n in (1, 2):
        numbers = draws(0, n, 2, slice(0, 2), (16, 16))
        arrays, loss, _ = step(arrays, images, condition, null, numbers, 0.01, n, (0.9, 0.9))
    assert mx.isfinite(loss).item()
    moved = {k for k, w in arrays["model"].items() if k.endswith(".lora_B.weight") and mx.any(w != 0).item()}
    unread = ("double_blocks.1.txt_attn_proj", "double_blocks.1.txt_mlp")  # nothing reads the last block's text
    assert moved == {f"{t}.lora_B.weight" for t in shape.targets if not t.startswith(unread)}
    after = {k.replace(".base.", "."): w for k, w in tree_flatten(network.parameters()) if ".lora_" not in k}
    assert all(mx.array_equal(w, after[k]) for k, w in before.items())


@pytest.mark.slow  # a minute of g++
def test_a_compiled_step(base: Path, adapted: Path, tmp_path: Path) -> None:
    got, want = weights_of(run(lora(base, tmp_path, compile=True)).run), weights_of(adapted)
    assert max(mx.abs(got[k] - w).mean().item() for k, w in want.items()) < 1e-4


def test_dry_run_says_what_is_trained(base: Path, tmp_path: Path, cli: Cli) -> None:
    status, shown, _ = cli("train", "--init", base, "--lora", "--dry-run", "--output", tmp_path / "r")
    assert status == 0
    assert "trained" in shown
    assert f"million, an adapter: rank 32, alpha 32, 8 layers, of {base} (model)" in shown
    assert "400 steps" in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_two_processes_equal_one(base: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, *flags(lora(base, tmp_path / "two", steps=2)))
    assert (tmp_path / "two" / "run").exists(), done.stdout + done.stderr
    one = weights_of(run(lora(base, tmp_path / "one", steps=2)).run)
    two = weights_of(tmp_path / "two" / "run")
    assert max(mx.abs(one[k] - two[k]).mean().item() for k in one) < 1e-4
