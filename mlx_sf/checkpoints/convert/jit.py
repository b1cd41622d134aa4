"""PyTorch JiT checkpoints -> mlx-sf checkpoints: the weight sets of a file, the key table, the layout changes.

Where the settings come from is `jit_settings`' business.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import MlxSfError, option
from ...formats.shards import check_target
from ...formats.tensor_file import Entry
from ...formats.torch_file.reader import Record, TensorRef, open_torch_file
from ...models.jit import JiTConfig
from ...models.quantize import QuantizationConfig
from ..checkpoint import WEIGHT_SETS, stored_name
from .jit_settings import configure
from .report import Report
from .tensors import Tensor, Tensors, network_entries, write

# weight set -> its key in the reference trainer's checkpoint
_SET_KEYS = {"model": "model", "ema1": "model_ema1", "ema2": "model_ema2"}
# prefixes that wrappers put in front of the network's own keys; the longest chain first
_PREFIXES = ("net.", "module.", "_orig_mod.", "transformer.")
# keys that hold nothing learned: rotary tables, which some versions of the reference store with the weights
_IGNORED = re.compile(r"(.+\.)?(feat_)?rope(_incontext)?\.freqs_(cos|sin)")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weights: str | Iterable[str] | None = None,
    dtype: str = "float32",
    flags: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: QuantizationConfig | None = None,
    assumed: Mapping[str, tuple[Any, str]] | None = None,
    where: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Report:
    """Convert a `torch.save` file to a checkpoint, holding one tensor at a time.

    `weights` names one set or several ("ema1" by default; a bare state dict has just one, called "model"); `dtype`
    ("float32", "float16", "bfloat16") is that of the matrix products' operands, all else stays float32; `flags` are
    config fields that the file does not say; `on_tensor(done, total)` is called after each tensor. With `quantization`
    the layers that it names are quantised, from float32. `assumed` are settings that are taken where nobody says them
    (`configure`), `where` names the file in messages, `origin` goes into the checkpoint's provenance.

    Raises `MlxSfError` for unreadable files, missing, extra, misshapen or non-finite tensors, and settings that
    contradict each other or are said nowhere.
    """
    check_target(target)
    if Path(target).exists() and Path(target).samefile(source):
        raise MlxSfError(f"{target}: is the file to convert: choose another name for the result")
    where = where or str(source)
    with open_torch_file(source) as file:
        sets, args = _find_sets(file.root, where)
        chosen = _choose(sets, weights, where)
        stripped = {name: strip_wrappers(sets[name], where) for name in chosen}
        first = stripped[chosen[0]]
        config, report = configure(first[0], args, dict(flags or {}), where, assumed=assumed)
        epoch = file.root.get("epoch") if isinstance(file.root.get("epoch"), int) else None
        made = {"converted_from": Path(source).name, "converted_by": f"mlx-sf {__version__}", "dtype": dtype}
        provenance: dict[str, Any] = {**made, **(origin or {})}
        if epoch is not None:
            provenance["epoch"] = epoch
        config = dataclasses.replace(config, weights=tuple(chosen), provenance=provenance, quantization=quantization)
        report.layout = file.layout
        entries = []
        for name, (tensors, ignored) in stripped.items():
            entries += [
                dataclasses.replace(e, name=stored_name(config, name, e.name))
                for e in jit_entries(tensors, config.model, dtype, f"{where}: {name}", quantization)
            ]
            report.ignored += ignored
        return write(target, entries, config, report, on_tensor)


# ------------------------------------------------------------------------------------------------ weight sets


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, TensorRef) for v in value.values())


def _find_sets(root: Any, where: str) -> tuple[dict[str, Tensors], Record | None]:
    """Weight sets by name and the trainer's args of a full checkpoint, or the only set of a bare state dict."""
    if _is_state_dict(root):
        return {"model": root}, None
    if isinstance(root, dict):
        sets = {name: root[key] for name, key in _SET_KEYS.items() if _is_state_dict(root.get(key))}
        args = root.get("args")
        if sets:
            return sets, args if isinstance(args, Record) else None
    found = ", ".join(map(str, list(root)[:6])) if isinstance(root, dict) else type(root).__name__
    raise MlxSfError(
        f"{where}: holds no JiT weights (want a state dict, or a checkpoint with model, model_ema1, model_ema2); "
        f"found {found or 'nothing'}"
    )


def _choose(sets: Mapping[str, Tensors], weights: str | Iterable[str] | None, where: str) -> list[str]:
    if weights is None:
        return ["ema1" if "ema1" in sets else next(iter(sets))]
    chosen = [weights] if isinstance(weights, str) else list(weights)
    for name in chosen:
        if name not in WEIGHT_SETS:
            raise MlxSfError(f"weights {name!r} are unknown, want {', '.join(WEIGHT_SETS)}")
        if name not in sets:
            raise MlxSfError(
                f"{where}: holds weights {', '.join(sets)}, not {name!r}: choose one with {option('weights')}"
            )
    return chosen


def strip_wrappers(tensors: Tensors, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the network's own names, without wrappers' prefixes; and the keys ignored on purpose."""
    named = dict(tensors)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in named)), None):
        named = {k.removeprefix(prefix): v for k, v in named.items()}
    ignored = [k for k in named if _IGNORED.fullmatch(k)]
    for k in ignored:
        del named[k]
    return named, ignored


# ------------------------------------------------------------------------------------------------ tensors


def jit_entries(
    tensors: Tensors, config: JiTConfig, dtype: str, where: str, q: QuantizationConfig | None = None
) -> list[Entry]:
    """A JiT's tensors as lazy entries in the network's own layout."""
    return network_entries(tensors, config, dtype, where, q, lambda key, shape: _source_shapes(key, shape, config))


def _source_shapes(key: str, shape: tuple[int, ...], config: JiTConfig) -> list[tuple[int, ...]]:
    """Shapes in which PyTorch files store a tensor: linear, or the convolution that does the same."""
    if key == "x_embedder.proj1.weight":
        # (channel, row, column) is also the order of a convolution's weight: a plain reshape
        p = config.patch_size
        return [shape] if config.forcing is not None else [(shape[0], 3, p, p)]
    if key == "x_embedder.proj2.weight":
        return [shape, (*shape, 1, 1)]
    return [shape]
