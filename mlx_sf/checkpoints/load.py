"""From what a user names to a network: which file is meant, its weights loaded, whether it runs."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import MlxSfError, option
from ..flow import velocity
from ..formats.shards import index_of
from ..formats.tensor_file import SUFFIXES
from ..models import build, cast_products, parameter_count, parameter_shapes
from ..models.quantize import dequantized, quantize_layers
from ..sampling.noise import seeded_noise
from . import hub
from .checkpoint import Checkpoint, step_files
from .config import Config


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that `path` means: a file, a run folder's newest, shards' index, or a Hugging Face repo's."""
    p, text = Path(path), str(path)
    if p.is_dir():
        steps = step_files(p)
        return steps[-1][1] if steps else _in_folder(p, f"folder {p}")
    if p.exists():
        return p
    # "org/name" or "org/name/file.npz"; "runs/x.npz" is a path that is missing
    looks_local = p.suffix in (*SUFFIXES, ".pth", ".pt") and text.count("/") < 2
    if looks_local or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(/[\w./-]+)?", text):
        raise MlxSfError(f"{p}: no such file or folder (a Hugging Face repo is named org/name)")
    found = hub.fetch(text)
    return found if found.is_file() else _in_folder(found, f"repo {text}")


def _in_folder(folder: Path, where: str) -> Path:
    """The only checkpoint in a folder, or the index of its shards."""
    if (index := index_of(folder)) is not None:
        return index
    found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:5]) or "none"
        raise MlxSfError(f"{where}: want exactly one .npz or .safetensors checkpoint, found {names}: name the file")
    return found[0]


def demo_checkpoint() -> Path:
    """The small trained model that comes with the program."""
    package = Path(__file__).parents[1]
    for folder in (package / "weights", package.parent / "weights"):
        if found := sorted(folder.glob("demo*.safetensors")):
            return found[0]
    raise MlxSfError(f"no demo model is installed: name a checkpoint with {option('ckpt')}")


def load_model(
    source: "Checkpoint | str | os.PathLike[str]",
    weights: str | None = None,
    dtype: mx.Dtype | None = None,
    dequantize: bool = False,
) -> tuple[Any, Config]:
    """The network of a checkpoint (opened, or a path, run folder or Hugging Face repo id) and its configuration.

    `weights` picks a set ("model", "ema1", "ema2"; default ema1 where there is one); the configuration returned names
    just that one. Weights are float32, or with `dtype` the matrix products run in it (`models.cast_products`).
    Quantised weights stay so, unless `dequantize` expands them to floats, as the configuration returned then says.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(resolve(source))
    name, kind = checkpoint.pick(weights), checkpoint.kind
    config = dataclasses.replace(checkpoint.config, weights=(name,))
    model, stream = build(config.model), checkpoint.stream(name)
    if config.quantization is not None and dequantize:
        stream = dequantized(stream, parameter_shapes(config.model), config.quantization, kind)
        config = dataclasses.replace(config, quantization=None)
    elif config.quantization is not None:
        quantize_layers(model, config.quantization, kind)
    loaded = []
    for key, value in stream:
        if value.dtype != mx.uint32:  # codes of quantised weights stay what they are
            value = cast_products({key: value}, dtype or mx.float32, kind)[key]
        mx.eval(value)  # one by one: in bfloat16 a network takes half of its float32 file's size, not one and a half
        loaded.append((key, value))
    model.load_weights(loaded, strict=True)
    return model, config


def verify_checkpoint(path: str | os.PathLike[str]) -> dict[str, str]:
    """Run every weight set of a checkpoint once; returns a line for each. Raises `MlxSfError` where one fails."""
    results = {}
    for name in Checkpoint(resolve(path)).config.weights:
        model, config = load_model(path, name)
        leaves: Any = tree_flatten(model.parameters())
        # of quantised weights every tensor was there, too: `load_model` is strict
        want = parameter_count(config.model)
        count = want if config.quantization is not None else sum(math.prod(v.shape) for _, v in leaves)
        if count != want:
            raise MlxSfError(f"{path}: weights {name!r} are {count:,} numbers, its configuration wants {want:,}")
        z = config.flow.noise_scale * seeded_noise([0, 1], config.model.size)
        t, condition = mx.array([0.0, 0.5]), model.condition([0 if config.model.num_classes else "", None])
        v = velocity(model(z, t, condition), z, t, config.flow)
        if not mx.all(mx.isfinite(v)).item():
            raise MlxSfError(f"{path}: weights {name!r} do not run: their velocity is not finite")
        results[name] = f"{count:,} parameters, forward pass finite, velocity RMS {mx.sqrt(mx.mean(v * v)).item():.3f}"
    return results
