"""Checkpoints: one file, weights and their configuration inside. The only owner of their names and contents.

A file with one set of weights names its tensors as the network does, "blocks.0.attn.qkv.weight"; one with several
puts the set in front, "ema1/blocks.0...". Tensors with another prefix ("optimizer/...") are a training run's own.
The containers are `tensor_file`'s.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import Config, ModelConfig
from .errors import MlxSfError
from .model import JiT, cast_products
from .tensor_file import SUFFIXES, Entry, TensorFile, write_tensor_file

WEIGHT_SETS = ("model", "ema1", "ema2")
_FLOATS = ("float32", "float16", "bfloat16")


def write_checkpoint(path: str | os.PathLike[str], entries: Sequence[Entry], config: Config) -> None:
    """Write a checkpoint from entries that are read one at a time, atomically. The suffix chooses the container."""
    write_tensor_file(path, entries, config.to_json())


def save_checkpoint(
    path: str | os.PathLike[str],
    weights: Mapping[str, Mapping[str, mx.array]],
    config: Config,
    extra: Mapping[str, mx.array] | None = None,
) -> None:
    """Save weight sets ({"ema1": {name: array}}) and, for a training run, extra arrays under names with a slash.

    `config.weights` is set to the names of the sets.
    """
    config = config.replace(weights=tuple(weights))
    entries = [Entry.of(stored_name(config, s, k), v) for s, tensors in weights.items() for k, v in tensors.items()]
    for name, v in (extra or {}).items():
        if "/" not in name or name.split("/")[0] in WEIGHT_SETS:
            raise MlxSfError(f"checkpoint: extra tensor {name!r} needs a prefix of its own")
        entries.append(Entry.of(name, v))
    write_checkpoint(path, entries, config)


def stored_name(config: Config, weights: str, name: str) -> str:
    """Name in the file of tensor `name` of a weight set."""
    return name if len(config.weights) == 1 else f"{weights}/{name}"


class Checkpoint:
    """An opened checkpoint: its `config` at once, `weights(...)` and `extra()` when asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = TensorFile(path)
        self.path = self.file.path
        self.config = Config.from_json(self.file.text, str(self.path))
        self._check_sizes()

    def _check_sizes(self) -> None:
        """A configuration of absurd size is refused before a network is made of it."""
        c, entries = self.config.model, self.file.entries
        sizes = {
            "pos_embed": (1, c.grid_size**2, c.hidden_size),
            "x_embedder.proj1.weight": (c.bottleneck_dim, 3 * c.patch_size**2),
            f"blocks.{c.depth - 1}.mlp.w3.weight": (c.hidden_size, c.mlp_hidden),
        }
        for key, shape in sizes.items():
            e = entries.get(stored_name(self.config, self.config.weights[0], key))
            if e is None:
                raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
            if e.shape != shape:
                raise MlxSfError(f"{self.path}: tensor {key!r} has shape {e.shape}, its configuration wants {shape}")

    def pick(self, weights: str | None = None) -> str:
        """Name of the weight set to use: the one asked for, else "ema1", else the first."""
        have = self.config.weights
        if weights is None:
            return "ema1" if "ema1" in have else have[0]
        if weights not in have:
            listed = ", ".join(have)
            raise MlxSfError(f"{self.path}: holds weights {listed}, not {weights!r}: choose one or convert again")
        return weights

    def weights(self, weights: str | None = None) -> dict[str, mx.array]:
        """One weight set, checked against the configuration: every tensor, its shape, finite values."""
        name = self.pick(weights)
        shapes = parameter_shapes(self.config.model)
        known = {stored_name(self.config, s, k) for s in self.config.weights for k in shapes}
        for key in self.file.entries:
            if key not in known and ("/" not in key or key.split("/")[0] in WEIGHT_SETS):
                raise MlxSfError(f"{self.path}: tensor {key!r} is not part of the network")
        self.file.verify()
        return {k: self._tensor(stored_name(self.config, name, k), shape) for k, shape in shapes.items()}

    def _tensor(self, key: str, shape: tuple[int, ...]) -> mx.array:
        e = self.file.entries.get(key)
        if e is None:
            raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
        if e.shape != shape or e.dtype not in _FLOATS:
            raise MlxSfError(f"{self.path}: tensor {key!r} is {e.dtype} {e.shape}, its configuration wants {shape}")
        value = e.array()
        if not mx.all(mx.isfinite(value)).item():
            raise MlxSfError(f"{self.path}: tensor {key!r} holds NaN or infinite values: take another checkpoint")
        return value

    def extra(self) -> dict[str, mx.array]:
        """The arrays of a training run beside its weights, by name ("optimizer/...")."""
        self.file.verify()
        named = [e for name, e in self.file.entries.items() if "/" in name and name.split("/")[0] not in WEIGHT_SETS]
        return {e.name: e.array() for e in named}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the network, without allocating any of them."""
    leaves: Any = tree_flatten(JiT(config).parameters())  # lazy: MLX allocates nothing here
    return {k: tuple(v.shape) for k, v in leaves}


def load_model(
    source: "Checkpoint | str | os.PathLike[str]", weights: str | None = None, dtype: mx.Dtype | None = None
) -> tuple[JiT, Config]:
    """The network of a checkpoint (opened, or a path, run folder or Hugging Face repo id) and its configuration.

    `weights` picks a set ("model", "ema1", "ema2"; default ema1 where there is one); the configuration returned names
    just that one. Weights are float32, or with `dtype` the matrix products run in it (`model.cast_products`).
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(resolve(source))
    name = checkpoint.pick(weights)
    model = JiT(checkpoint.config.model)
    tensors = {k: v.astype(mx.float32) for k, v in checkpoint.weights(name).items()}
    if dtype is not None:
        tensors = cast_products(tensors, dtype)
    model.load_weights(list(tensors.items()), strict=True)
    mx.eval(model.parameters())
    return model, checkpoint.config.replace(weights=(name,))


def demo_checkpoint() -> Path:
    """The small trained model that comes with the program."""
    for folder in (Path(__file__).parent / "weights", Path(__file__).parent.parent / "weights"):
        if found := sorted(folder.glob("demo*.safetensors")):
            return found[0]
    raise MlxSfError("no demo model is installed: name a checkpoint with --ckpt")


_STEP_FILE = re.compile(r"checkpoint-(\d+)\.safetensors")


def step_file(step: int) -> str:
    """File name of a run's checkpoint after `step` steps."""
    return f"checkpoint-{step:08d}.safetensors"


def step_files(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder with their steps, oldest first."""
    found = ((_STEP_FILE.fullmatch(p.name), p) for p in Path(folder).iterdir())
    return sorted((int(m[1]), p) for m, p in found if m)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that `path` means: a file, a run folder's newest, or a file of a Hugging Face repo."""
    p, text = Path(path), str(path)
    if p.is_dir():
        steps = step_files(p)
        return steps[-1][1] if steps else _only_checkpoint(p.iterdir(), f"folder {p}")
    if p.exists():
        return p
    # "org/name" or "org/name/file.npz"; "runs/x.npz" is a path that is missing
    looks_local = p.suffix in (*SUFFIXES, ".pth", ".pt") and text.count("/") < 2
    if looks_local or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(/[\w./-]+)?", text):
        raise MlxSfError(f"{p}: no such file or folder (a Hugging Face repo is named org/name)")
    return _from_hub(text)


def _only_checkpoint(paths: Iterable[Path], where: str) -> Path:
    found = sorted(p for p in paths if p.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:5]) or "none"
        raise MlxSfError(f"{where}: want exactly one .npz or .safetensors checkpoint, found {names}: name the file")
    return found[0]


def _from_hub(text: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, name = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
    try:
        if name:
            return Path(hf_hub_download(repo, name))
        folder = snapshot_download(repo, allow_patterns=["*" + s for s in SUFFIXES])
    except Exception as e:
        line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise MlxSfError(f"{text}: not a file here, and not to be had from the Hugging Face hub ({line})") from None
    return _only_checkpoint(Path(folder).rglob("*"), f"repo {repo}")
