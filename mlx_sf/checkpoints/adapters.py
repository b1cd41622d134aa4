"""Low-rank adapters in the published layout (PEFT's), and the networks that they belong to.

    adapter_model.safetensors   ....LAYER.lora_A.weight (rank, in) and ....LAYER.lora_B.weight (out, rank)
    adapter_config.json         r, lora_alpha          training_args.json   base_model

The tensors' names alone say which layers are adapted: adapter_config.json may shorten them to their last parts. What
stands before LAYER differs from program to program.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..common.fields import finite
from ..common.files import read_json, replacing
from ..errors import MlxSfError, option
from ..formats.tensor_file import Entry, TensorFile, write_tensor_file
from ..models import ModelConfig, architecture, parameter_shapes
from ..models.lora import A, B, LoRAConfig, is_layer, merge
from ..models.quantize import FLOATS
from .checkpoint import Checkpoint
from .config import AdapterInfo
from .hub import fetch
from .lora_files import is_down_up, read_down_up
from .resolve import hub_name, resolve

MODEL, CONFIG, ARGUMENTS = "adapter_model.safetensors", "adapter_config.json", "training_args.json"
_KEY = re.compile(r"(?:(?:base_model|model|net)\.)*(?P<layer>.+)(?P<part>\.lora_[AB])(?:\.default)?\.weight")
# layers of published networks whose outputs nothing reads, which ours therefore lack
_WITHOUT_EFFECT = ("pooled_embedder", "t_embedder")
# settings of PEFT under which B A would mean something else: name -> what they must hold
_PLAIN = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none",
          "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: `tensors` by the names of `models.lora`, float32; `base` names its model, "" if unknown.

    `name` is for people, `scale` what it is multiplied by. `beside` are pairs (B, A) for matrices that the network is
    loaded without, as the understanding side of SenseNova-U1.
    """

    path: Path
    name: str
    lora: LoRAConfig
    tensors: Mapping[str, mx.array]
    base: str
    scale: float = 1.0
    beside: Mapping[str, tuple[mx.array, mx.array]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} x {self.scale:g}"


def read_adapters(
    paths: Sequence[str | os.PathLike[str] | Adapter], scales: Sequence[float], model: ModelConfig
) -> list[Adapter]:
    """The adapters of these folders for a network, each with its scale: 1 where there are fewer scales than paths.

    Those that are read already are taken as they are.
    """
    if len(scales) > len(paths):
        raise MlxSfError(
            f"{option('lora_scales')}: {len(scales)} for {len(paths)} of {option('lora_paths')}, want at most one each"
        )
    for s in scales:
        if not finite(s):
            raise MlxSfError(f"{option('lora_scales')} is {s}, want a finite number")
    padded = [*scales, *[1.0] * (len(paths) - len(scales))]
    return [
        path if isinstance(path, Adapter) else read_adapter(path, model, scale)
        for path, scale in zip(paths, padded, strict=True)
    ]


def merged_updates(adapters: Sequence[Adapter]) -> dict[str, list[tuple[mx.array, mx.array]]]:
    """Pairs (B, A) by parameter, whose products work these adapters into a network's weights."""
    updates: dict[str, list[tuple[mx.array, mx.array]]] = {}
    for adapter in adapters:
        for layer in adapter.lora.targets:
            b = adapter.scale * adapter.lora.strength * adapter.tensors[layer + B]
            updates.setdefault(f"{layer}.weight", []).append((b, adapter.tensors[layer + A]))
    return updates


def read_adapter(path: str | os.PathLike[str], model: ModelConfig, scale: float = 1.0) -> Adapter:
    """The adapter of a folder, of a run's folder or a place on the Hub, for the network of a configuration.

    Pairs for layers of published networks that have no effect are left out. Raises `MlxSfError` for what is incomplete,
    not finite, or of another network.
    """
    if (single := _single_file(path)) is not None:
        file_path, name = single
        found_in = read_down_up(file_path, model)
        return Adapter(file_path, name, found_in.lora, found_in.tensors, "", scale, found_in.beside)
    folder, name = _found(path)
    settings = read_json(folder / CONFIG)
    for setting, want in _PLAIN.items():
        if (got := settings.get(setting)) not in (None, want):
            raise MlxSfError(
                f"{folder / CONFIG}: {setting} is {got!r}, want {want!r}: this program reads plain LoRA only"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not finite(alpha) or alpha <= 0:  # type: ignore[operator]
        raise MlxSfError(f"{folder / CONFIG}: r is {rank!r}, lora_alpha {alpha!r}, want numbers above 0")
    file = TensorFile(folder / MODEL, foreign=True)
    file.verify()
    kind, shapes = architecture(model), parameter_shapes(model)
    found: dict[str, Entry] = {}
    for key, e in file.entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise MlxSfError(f"{file.path}: tensor {key!r} is no lora_A or lora_B, want plain LoRA")
        layer, part = match["layer"], match["part"] + ".weight"
        if is_layer(f"{layer}.weight", kind) and f"{layer}.weight" in shapes:
            found[layer + part] = e
        elif layer.split(".")[0] not in _WITHOUT_EFFECT:
            raise MlxSfError(f"{file.path}: is of another model: {kind.title} has no linear layer {layer!r}")
    layers = tuple(layer for key in shapes if (layer := key.removesuffix(".weight")) + A in found)
    if not layers:
        raise MlxSfError(f"{file.path}: adapts no layer of {kind.title}")
    lora = LoRAConfig(rank, float(alpha), layers)  # type: ignore[arg-type]
    wanted = lora.shapes(shapes)
    if odd := sorted(set(found) ^ set(wanted)):
        raise MlxSfError(f"{file.path}: has one of {odd[0].split('.lora_')[0]!r}'s lora_A and lora_B without the other")
    tensors = {key: _tensor(file.path, key, found[key], shape, rank) for key, shape in wanted.items()}
    arguments = read_json(folder / ARGUMENTS) if (folder / ARGUMENTS).is_file() else {}
    base = arguments.get("base_model") or settings.get("base_model_name_or_path")
    return Adapter(folder, name, lora, tensors, base if isinstance(base, str) else "", scale)


def adapter_facts(named: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter's folder holds, by its files alone, for people."""
    folder, _ = _found(named)
    settings, file = read_json(folder / CONFIG), TensorFile(folder / MODEL, foreign=True)
    layers = {m["layer"] for key in file.entries if (m := _KEY.fullmatch(key))}
    arguments = read_json(folder / ARGUMENTS) if (folder / ARGUMENTS).is_file() else {}
    return {
        "file": f"{file.path} (adapter, {file.size / 1e6:.1f} MB)",
        "adapter": f"rank {settings.get('r')}, alpha {settings.get('lora_alpha') or 0:g}, {len(layers)} layers",
        "parameters": f"{sum(math.prod(e.shape) for e in file.entries.values()):,}",
        "base": arguments.get("base_model") or settings.get("base_model_name_or_path") or "not stated",
    }


def _single_file(named: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """The one file of an adapter with lora_down and lora_up, and what to call it; None where it has a folder's form."""
    path = Path(named).expanduser()
    if not path.exists() and str(named).endswith(".safetensors") and not str(named).endswith(MODEL):
        place = hub_name(named)
        if place is None:
            return None
        fetched = fetch(place)
        return (fetched.path, f"{place} at commit {fetched.commit}") if is_down_up(fetched.path) else None
    if path.is_dir() and not (path / CONFIG).is_file():
        files = sorted(path.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else path
    return (path, path.name) if path.name != MODEL and is_down_up(path) else None


def _found(named: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder of an adapter, which holds both files, and what to call it."""
    place = hub_name(named)
    if place is not None:
        fetched = fetch(place, (CONFIG, ARGUMENTS))
        folder = fetched.path.parent
    else:
        path = Path(named).expanduser()
        folder = path.parent if path.name == MODEL else path
    if not (folder / CONFIG).is_file() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise MlxSfError(f"{folder}: lacks {name}: give the folder of an adapter")
    return folder, "/".join(folder.parts[-2:]) if place is None else f"{place} at commit {fetched.commit}"


def _tensor(path: Path, name: str, e: Entry, shape: tuple[int, ...], rank: int) -> mx.array:
    if e.shape != shape or e.dtype not in FLOATS:
        ranked = (rank, *e.shape[1:]) if name.endswith(A) else (*e.shape[:1], rank)
        reason = f"its model wants {shape}: is of another model"
        if e.shape != ranked and len(e.shape) == 2:
            reason = f"{CONFIG} says rank {rank}: one rank for all layers is wanted"
        raise MlxSfError(f"{path}: {name} is {e.dtype} {e.shape}, {reason}")
    value = e.array().astype(mx.float32)
    if not mx.all(mx.isfinite(value)).item():
        raise MlxSfError(f"{path}: {name} holds NaN or infinite values: take another copy")
    return value


def write_adapter(
    folder: str | os.PathLike[str], info: AdapterInfo, tensors: Mapping[str, mx.array], model: ModelConfig
) -> None:
    """Write an adapter of the network of `model` in the published layout.

    Each file takes its place when it is complete, the tensors last: what stood there before stays whole until then.
    """
    folder, prefix, lora = Path(folder), architecture(model).lora_prefix, info.lora
    inside = prefix.removeprefix("base_model.model.")
    names = [inside + layer for layer in lora.targets]
    settings: dict[str, Any] = {
        **_PLAIN,
        "base_model_name_or_path": info.base,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "r": lora.rank,
        "target_modules": names,
        "task_type": None,
    }
    arguments: dict[str, Any] = {
        "format": "peft",
        "base_model": info.base,
        "base_weights": info.weights,
        "model_type": model.architecture,
        "rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "loss_type": "velocity",
        "trained_by": f"mlx-sf {__version__}",
    }
    for name, values in ((CONFIG, settings), (ARGUMENTS, arguments)):
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    write_tensor_file(folder / MODEL, [Entry.of(prefix + name, w) for name, w in tensors.items()], "")


# ------------------------------------------------------------------------------------------------ their networks


def named_base(named: str, checkpoint: Checkpoint) -> str:
    """What an adapter says of its base: a place here absolute, and exact where a run's folder would move on."""
    path = Path(named).expanduser()
    if not path.exists():
        return named
    inside = path.is_dir() and checkpoint.path.parent.samefile(path)
    return str((checkpoint.path if inside else path).resolve())


def open_base(adapter: AdapterInfo, where: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that an adapter belongs to; `MlxSfError` says of `where` that it is missing or has changed."""
    try:
        base = Checkpoint(resolve(adapter.base))
        same = base.fingerprint(adapter.weights) == adapter.fingerprint
    except MlxSfError as e:
        raise MlxSfError(f"{where}: its base model cannot be used: {e.message}") from None
    if not same:
        raise MlxSfError(
            f"{where}: was trained on other weights than {adapter.base} ({adapter.weights}) holds now: restore them"
        )
    return base


def whole_weights(checkpoint: Checkpoint, weights: str | None = None) -> dict[str, mx.array]:
    """A weight set of a network in floats; of an adapter, its base's with the adapter worked in."""
    adapter = checkpoint.config.adapter
    if adapter is None:
        return checkpoint.weights(weights)
    base = open_base(adapter, checkpoint.path).weights(adapter.weights)
    return merge(base, adapter.lora, checkpoint.weights(weights))
