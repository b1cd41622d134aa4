"""Checkpoints: one file, weights and their configuration inside. The only owner of their names and contents.

A file with one set of weights names its tensors as the network does, "blocks.0.attn.qkv.weight"; one with several
puts the set in front, "ema1/blocks.0...". Tensors with another prefix ("optimizer/...") are a training run's own.
The containers are `tensor_file`'s.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from . import __version__
from .config import Config, ModelConfig, QuantizationConfig
from .errors import MlxSfError
from .model import JiT, cast_products, is_product_operand
from .quantize import FLOATS, dequantized, is_quantized, quantize_layers, quantized_entries, stored
from .tensor_file import SUFFIXES, Entry, TensorFile, bits_of, write_tensor_file

WEIGHT_SETS = ("model", "ema1", "ema2")


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
        first = self.config.weights[0]
        wanted = [stand_in for key, shape in sizes.items() for stand_in in self._stored(key, shape).items()]
        for key, (_, shape) in wanted:
            e = entries.get(stored_name(self.config, first, key))
            if e is None:
                raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
            if e.shape != shape:
                raise MlxSfError(f"{self.path}: tensor {key!r} has shape {e.shape}, its configuration wants {shape}")

    def _stored(self, key: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        return stored(key, shape, self.config.quantization)

    def pick(self, weights: str | None = None) -> str:
        """Name of the weight set to use: the one asked for, else "ema1", else the first."""
        have = self.config.weights
        if weights is None:
            return "ema1" if "ema1" in have else have[0]
        if weights not in have:
            listed = ", ".join(have)
            raise MlxSfError(f"{self.path}: holds weights {listed}, not {weights!r}: choose one or convert again")
        return weights

    def require_floats(self) -> None:
        """Refuse quantised weights, which are for drawing and judging pictures only."""
        if (q := self.config.quantization) is not None:
            raise MlxSfError(
                f"{self.path}: holds {q.bits}-bit weights, which cannot be trained, exported or quantised again: "
                "take the float checkpoint they were made from"
            )

    def weights(self, weights: str | None = None) -> dict[str, mx.array]:
        """One weight set of floats, checked against the configuration: every tensor, its shape, finite values."""
        self.require_floats()
        return self.tensors(weights)

    def tensors(self, weights: str | None = None) -> dict[str, mx.array]:
        """`weights` as they are stored: of quantised layers, the codes, scales and biases."""
        return dict(self.stream(weights))

    def stream(self, weights: str | None = None) -> Iterator[tuple[str, mx.array]]:
        """`tensors` one after another: none but the last need stay in memory."""
        name = self.pick(weights)
        shapes: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for key, shape in parameter_shapes(self.config.model).items():
            shapes |= self._stored(key, shape)
        known = {stored_name(self.config, s, k) for s in self.config.weights for k in shapes}
        for key in self.file.entries:
            if key not in known and ("/" not in key or key.split("/")[0] in WEIGHT_SETS):
                raise MlxSfError(f"{self.path}: tensor {key!r} is not part of the network")
        self.file.verify()
        for key, want in shapes.items():
            yield key, self._tensor(stored_name(self.config, name, key), *want)

    def _tensor(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> mx.array:
        e = self.file.entries.get(key)
        if e is None:
            raise MlxSfError(f"{self.path}: lacks tensor {key!r}: not a complete checkpoint")
        if e.shape != shape or e.dtype not in dtypes:
            kind = "" if e.dtype in dtypes else f"{dtypes[0]} "
            raise MlxSfError(
                f"{self.path}: tensor {key!r} is {e.dtype} {e.shape}, its configuration wants {kind}{shape}"
            )
        value = e.array()
        if e.dtype in FLOATS and not mx.all(mx.isfinite(value)).item():
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
    source: "Checkpoint | str | os.PathLike[str]",
    weights: str | None = None,
    dtype: mx.Dtype | None = None,
    dequantize: bool = False,
) -> tuple[JiT, Config]:
    """The network of a checkpoint (opened, or a path, run folder or Hugging Face repo id) and its configuration.

    `weights` picks a set ("model", "ema1", "ema2"; default ema1 where there is one); the configuration returned names
    just that one. Weights are float32, or with `dtype` the matrix products run in it (`model.cast_products`).
    Quantised weights stay so, unless `dequantize` expands them to floats, as the configuration returned then says.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(resolve(source))
    name = checkpoint.pick(weights)
    config = checkpoint.config.replace(weights=(name,))
    model, stream = JiT(config.model), checkpoint.stream(name)
    if config.quantization is not None and dequantize:
        stream = dequantized(stream, parameter_shapes(config.model), config.quantization)
        config = config.replace(quantization=None)
    elif config.quantization is not None:
        quantize_layers(model, config.quantization)
    loaded = []
    for key, value in stream:
        if value.dtype != mx.uint32:  # codes of quantised weights stay what they are
            value = cast_products({key: value}, dtype or mx.float32)[key]
        mx.eval(value)  # one by one: in bfloat16 a network takes half of its float32 file's size, not one and a half
        loaded.append((key, value))
    model.load_weights(loaded, strict=True)
    return model, config


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    q: QuantizationConfig,
    weights: Iterable[str] | None = None,
    dtype: str | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Config:
    """Write a checkpoint of floats with its linear layers quantised by `q`, holding one tensor at a time.

    `weights` names sets (default: as `Checkpoint.pick`); `dtype` is that of the products' operands that stay floats
    (default: as in `source`). `on_tensor(done, total)` is called after each tensor. Returns the new configuration.
    """
    checkpoint = Checkpoint(resolve(source))
    checkpoint.require_floats()
    checkpoint.file.verify()
    if Path(target).exists() and Path(target).samefile(checkpoint.path):
        raise MlxSfError(f"{target}: is the file to convert: choose another name for the result")
    chosen = [checkpoint.pick(w) for w in weights] if weights else [checkpoint.pick()]
    shapes = parameter_shapes(checkpoint.config.model)
    made = {"quantized_from": checkpoint.path.name, "quantized_by": f"mlx-sf {__version__}"}
    config = checkpoint.config.replace(
        weights=tuple(chosen), quantization=q, provenance={**checkpoint.config.provenance, **made}
    )
    entries: list[Entry] = []
    for name in chosen:
        floats = [_float_entry(checkpoint, name, key, shape, dtype, q) for key, shape in shapes.items()]
        entries += [
            dataclasses.replace(e, name=stored_name(config, name, e.name)) for e in quantized_entries(floats, q)
        ]
    write_checkpoint(target, counted(entries, on_tensor), config)
    return config


def _float_entry(
    checkpoint: Checkpoint, weights: str, key: str, shape: tuple[int, ...], dtype: str | None, q: QuantizationConfig
) -> Entry:
    """A tensor of a checkpoint, read when asked for; as float32 where it is going to be quantised."""
    name = stored_name(checkpoint.config, weights, key)
    entry = checkpoint.file.entries.get(name)
    kept = entry.dtype if entry is not None else "float32"
    kept = dtype if dtype is not None and is_product_operand(key) else kept
    kind = "float32" if is_quantized(key, q) else kept

    def read() -> np.ndarray:
        return bits_of(np.asarray(checkpoint._tensor(name, FLOATS, shape).astype(mx.float32)), kind)

    return Entry(key, kind, shape, read)


def counted(entries: list[Entry], on_tensor: Callable[[int, int], None] | None) -> list[Entry]:
    """The entries, each telling `on_tensor(done, total)` when it has been read."""
    if on_tensor is None:
        return entries

    def one(i: int, e: Entry) -> Entry:
        def read() -> np.ndarray:
            bits = e.read()
            on_tensor(i + 1, len(entries))
            return bits

        return dataclasses.replace(e, read=read)

    return [one(i, e) for i, e in enumerate(entries)]


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
