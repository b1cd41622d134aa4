"""PyTorch JiT checkpoints -> mlx-sf checkpoints: the key table, the layout changes, and where each setting comes from.

Settings come from three places, in this order: the shapes of the weights, the trainer's `args` in the file, and flags.
A flag that contradicts the file is an error. Where all published models agree on a value that neither says, it is
taken and reported; where they differ (noise scale, the block before which in-context tokens enter), it is asked for.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ... import __version__
from ...errors import MlxSfError, option
from ...flow import FlowConfig
from ...formats.shards import check_target
from ...formats.tensor_file import Entry, bits_of
from ...formats.torch_file.reader import Record, TensorRef, open_torch_file
from ...models import parameter_shapes
from ...models.jit import ARCHITECTURE, JiTConfig
from ...models.jit_sizes import SIZES, find_size, preset_name
from ...models.quantize import QuantizationConfig, is_quantized, quantized_entries
from ...sampling.solvers import SampleConfig
from ...spectral import ForcingConfig
from ..checkpoint import WEIGHT_SETS, counted, size_on_disk, stored_name, write_checkpoint
from ..config import Config
from .origins import Origins


class Tensor(Protocol):
    """A tensor in a file: float types by name, read when asked for (bfloat16 as float32)."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


Tensors = Mapping[str, Tensor]

# weight set -> its key in the reference trainer's checkpoint
_SET_KEYS = {"model": "model", "ema1": "model_ema1", "ema2": "model_ema2"}
# prefixes that wrappers put in front of the network's own keys; the longest chain first
_PREFIXES = ("net.", "module.", "_orig_mod.", "transformer.")
# keys that hold nothing learned: rotary tables, which some versions of the reference store with the weights
_IGNORED = re.compile(r"(.+\.)?(feat_)?rope(_incontext)?\.freqs_(cos|sin)")

# config field -> name in the reference trainer's args
ARGS = {
    "img_size": "img_size",
    "num_classes": "class_num",
    "window_size": "window_size",
    "fixed_scale": "dct_fixed_scale",
    "attn_dropout": "attn_dropout",
    "proj_dropout": "proj_dropout",
    "pred_param": "pred_param",
    "hybrid_x_weight_mode": "hybrid_x_weight_mode",
    "hybrid_x_weight_power": "hybrid_x_weight_power",
    "hybrid_x_weight_min": "hybrid_x_weight_min",
    "hybrid_x_weight_max": "hybrid_x_weight_max",
    "noise_scale": "noise_scale",
    "t_eps": "t_eps",
    "P_mean": "P_mean",
    "P_std": "P_std",
    "label_drop_prob": "label_drop_prob",
    "method": "sampling_method",
    "steps": "num_sampling_steps",
    "cfg": "cfg",
    "cfg_low": "interval_min",
    "cfg_high": "interval_max",
}
# what all published models have in common, said when it is assumed
_PUBLISHED: dict[str, Any] = {
    "window_size": 0,
    "scale_schedule": "linear",
    "fixed_scale": 1.0,
    "mask_sharpness": 30.0,
    "min_keep": 0.05,
    "max_keep": 1.0,
    "mlp_ratio": 4.0,
    "pred_param": "x",
    "t_eps": 0.05,
    "P_mean": -0.8,
    "P_std": 0.8,
    "label_drop_prob": 0.1,
}
_HINTS = {
    "noise_scale": "1.0 for models at 256 pixels, 2.0 at 512",
    "in_context_start": "the block before which the in-context tokens enter",
    "hybrid_x_weight_mode": "one_minus_t, snr or snr_inverse",
    "fixed_scale": "the constant that replaces t in the schedule, 0 to 1",
}
# every setting that a flag may give, with its type; the schedules beside the published ones are ours
_NO_FLAG = ("out_channels", "forcing", "schedule_power", "schedule_cutoffs", "exact_end")
_FORCING = tuple(f.name for f in dataclasses.fields(ForcingConfig))
FLAG_TYPES: dict[str, Any] = {
    f.name: f.type
    for part in (JiTConfig, ForcingConfig, FlowConfig)
    for f in dataclasses.fields(part)
    if f.name not in _NO_FLAG
} | {"spectral_forcing": bool}
PUBLISHED_SCHEDULES = ("linear", "fixed")


@dataclass
class Report:
    """What a conversion did, for people: settings by origin, keys left out, counts."""

    config: Config
    layout: str
    origin: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0


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
        report.config, report.layout = config, file.layout
        entries = []
        for name, (tensors, ignored) in stripped.items():
            entries += [
                dataclasses.replace(e, name=stored_name(config, name, e.name))
                for e in network_entries(tensors, config.model, dtype, f"{where}: {name}", quantization)
            ]
            report.ignored += ignored
        report.parameters = sum(math.prod(s) for s in parameter_shapes(config.model).values())
        write_checkpoint(target, counted(entries, on_tensor), config)
        report.bytes = size_on_disk(target)
    return report


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


def network_entries(
    tensors: Tensors, config: JiTConfig, dtype: str, where: str, q: QuantizationConfig | None = None
) -> list[Entry]:
    """The network's tensors as lazy entries in its own layout; every key is accounted for."""
    shapes = parameter_shapes(config)
    missing = [k for k in shapes if k not in tensors]
    extra = [k for k in tensors if k not in shapes]
    if missing or extra:
        parts = [f"lacks {missing[0]!r}" + _more(missing)] if missing else []
        parts += [f"has {extra[0]!r}" + _more(extra) + ", which is not part of the network"] if extra else []
        raise MlxSfError(f"{where}: {'; '.join(parts)}: not a JiT this program knows")
    entries = []
    for key, shape in shapes.items():
        ref = tensors[key]
        if not any(ref.shape == s for s in _source_shapes(key, shape, config)):
            raise MlxSfError(f"{where}: tensor {key!r} has shape {ref.shape}, want {shape}")
        if not ref.dtype.startswith(("float", "bfloat")):
            raise MlxSfError(f"{where}: tensor {key!r} is {ref.dtype}, want a float type")
        rounded = ARCHITECTURE.is_product_operand(key) and not is_quantized(key, q, ARCHITECTURE)
        entries.append(_entry(key, shape, ref, dtype if rounded else "float32", where))
    return entries if q is None else quantized_entries(entries, q, ARCHITECTURE)


def _source_shapes(key: str, shape: tuple[int, ...], config: JiTConfig) -> list[tuple[int, ...]]:
    """Shapes in which PyTorch files store a tensor: linear, or the convolution that does the same."""
    if key == "x_embedder.proj1.weight":
        # (channel, row, column) is also the order of a convolution's weight: a plain reshape
        p = config.patch_size
        return [shape] if config.forcing is not None else [(shape[0], 3, p, p)]
    if key == "x_embedder.proj2.weight":
        return [shape, (*shape, 1, 1)]
    return [shape]


def _entry(key: str, shape: tuple[int, ...], ref: Tensor, dtype: str, where: str) -> Entry:
    def read() -> np.ndarray:
        values = ref.read().reshape(shape)
        if not np.isfinite(values).all():
            raise MlxSfError(f"{where}: tensor {key!r} holds NaN or infinite values: take another checkpoint")
        with np.errstate(over="ignore"):
            bits = bits_of(values, dtype)
        if dtype == "float16" and not np.isfinite(bits).all():
            raise MlxSfError(f"{where}: tensor {key!r} does not fit float16: use {option('dtype')} bfloat16 or float32")
        return bits

    return Entry(key, dtype, shape, read)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ------------------------------------------------------------------------------------------------ settings


def configure(
    tensors: Tensors,
    args: Record | None,
    flags: dict[str, Any],
    where: str,
    said: Mapping[str, tuple[Any, str]] | None = None,
    assumed: Mapping[str, tuple[Any, str]] | None = None,
    model_name: str | None = None,
) -> tuple[Config, Report]:
    """The configuration of named weights, and where each setting came from.

    `said` is what files beside the weights say, `assumed` what is taken where nobody says anything: setting -> (value,
    origin). `model_name` is the published name that such a file gives the network.
    """
    s = Origins(where)
    for name, value in _from_shapes(tensors, where).items():
        s.put(name, value, "shapes")
    if args is not None:
        _from_args(args, s)
    for name, (value, origin) in (said or {}).items():
        s.put(name, value, origin)
    for name, value in flags.items():
        if name not in FLAG_TYPES:
            raise MlxSfError(f"{where}: no setting of PyTorch models is called {name!r}")
        if name == "window_size" and value == 0:
            value = s.get("img_size")  # 0: the whole image
        if name == "scale_schedule" and value not in PUBLISHED_SCHEDULES:
            raise MlxSfError(
                f"{where}: {option('scale_schedule')} says {value!r}, but PyTorch models were trained with "
                f"{' or '.join(PUBLISHED_SCHEDULES)}: convert it as it is, then train on from it"
            )
        s.put(name, value, f"flag {option(name.lower())}")
    name = _name(s, args.values.get("model") if args is not None else model_name)
    for setting, (value, origin) in (assumed or {}).items():
        if setting not in s.values:
            s.put(setting, value, origin)
    _complete(s)
    values = {n: v for n, (v, _) in s.values.items()}

    def part(kind: Any, *skip: str, **given: Any) -> Any:
        return kind(
            **{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in set(values) - set(skip)}, **given
        )

    try:
        forcing = part(ForcingConfig) if values["spectral_forcing"] else None
        # the sampler's own t_eps stays unset: it follows the flow's, as published
        config = Config(part(JiTConfig, forcing=forcing), part(FlowConfig), part(SampleConfig, "t_eps"), name=name)
    except MlxSfError as e:
        raise MlxSfError(f"{where}: {e.message}") from None
    return config, Report(config, "", s.told())


def _from_shapes(tensors: Tensors, where: str) -> dict[str, Any]:
    """Everything that the weights' shapes say."""

    def shape(key: str, *ranks: int) -> tuple[int, ...]:
        if key not in tensors:
            raise MlxSfError(f"{where}: lacks {key!r}: not the weights of a JiT")
        got = tensors[key].shape
        if len(got) not in ranks or 0 in got:
            raise MlxSfError(f"{where}: tensor {key!r} has shape {got}, want {' or '.join(map(str, ranks))} dimensions")
        return got

    proj1 = shape("x_embedder.proj1.weight", 2, 4)
    patch = proj1[2] if len(proj1) == 4 else math.isqrt(proj1[1] // 3)
    if math.prod(proj1[1:]) != 3 * patch**2:
        raise MlxSfError(f"{where}: tensor 'x_embedder.proj1.weight' has shape {proj1}, want 3 * patch * patch inputs")
    hidden = shape("x_embedder.proj2.weight", 2, 4)[0]
    tokens = shape("pos_embed", 3)[1]
    grid = math.isqrt(tokens)
    if grid**2 != tokens:
        raise MlxSfError(f"{where}: 'pos_embed' is for {tokens} tokens, want a square number")
    head_dim = shape("blocks.0.attn.q_norm.weight", 1)[0]
    if hidden % head_dim:
        raise MlxSfError(f"{where}: head size {head_dim} (attn.q_norm) does not divide hidden size {hidden}")
    blocks = {int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d{1,6})\.", k))}
    out = shape("final_layer.linear.weight", 2)[0]
    mlp_hidden = shape("blocks.0.mlp.w3.weight", 2)[1]
    values: dict[str, Any] = {
        "img_size": grid * patch,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": len(blocks),
        "num_heads": hidden // head_dim,
        "bottleneck_dim": proj1[0],
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "in_context_len": shape("in_context_posemb", 3)[1] if "in_context_posemb" in tensors else 0,
        "out_channels": out // patch**2,
        "spectral_forcing": len(proj1) == 2,
    }
    if blocks != set(range(len(blocks))):
        raise MlxSfError(f"{where}: block {min(set(range(len(blocks))) - blocks)} is missing")
    if mlp_hidden != int(int(hidden * 4.0) * 2 / 3):
        # the smallest ratio that gives this width; any other that does is the same network
        values["mlp_ratio"] = math.ceil(mlp_hidden * 1.5) / hidden
    if values["out_channels"] == 6:
        values["pred_param"] = "hybrid"
    return values


def _from_args(args: Record, s: Origins) -> None:
    """What the reference trainer's options say, where they are there at all (older ones lack some)."""
    for name, key in ARGS.items():
        value = args.values.get(key)
        if value is None:
            if name == "window_size" and key in args.values:
                s.put("window_size", s.get("img_size"), "args")  # None: the whole image
            continue
        s.put(name, float(value) if isinstance(value, int) and name in _FLOAT_FIELDS else value, "args")
    if isinstance(args.values.get("disable_dct_patchify"), bool):
        s.put("spectral_forcing", not args.values["disable_dct_patchify"], "args")
    if isinstance(args.values.get("disable_dct_scale_schedule"), bool):
        s.put("scale_schedule", "fixed" if args.values["disable_dct_scale_schedule"] else "linear", "args")


_FLOAT_FIELDS = {
    f.name
    for part in (JiTConfig, ForcingConfig, FlowConfig, SampleConfig)
    for f in dataclasses.fields(part)
    if f.type is float
}
_ARCHITECTURE = ("depth", "hidden_size", "num_heads", "bottleneck_dim", "in_context_len")


def _name(s: Origins, named: Any) -> str:
    """The preset that these weights are: by the name in the args, which must fit, or by their shapes."""
    by_shape = next((n for n, z in SIZES.items() if all(getattr(z, f) == s.get(f) for f in _ARCHITECTURE)), None)
    size = by_shape
    if isinstance(named, str) and named.startswith("JiT-"):
        try:
            size, patch = find_size(named)
        except MlxSfError:
            return named  # a name of its own; nothing follows from it
        for f in _ARCHITECTURE:
            if getattr(SIZES[size], f) != s.get(f):
                raise MlxSfError(
                    f"{s.where}: args say the model is {named}, whose {f} is {getattr(SIZES[size], f)}, "
                    f"but the weights have {s.get(f)}"
                )
        if patch is not None:
            s.put("patch_size", patch, "args")
        if s.get("in_context_len"):
            s.put("in_context_start", SIZES[size].in_context_start, "args")
    if size is None:
        return named if isinstance(named, str) else "custom"
    # the shapes of a preset without its name: only a flag may say that the tokens enter elsewhere
    if "in_context_start" not in s.values and s.get("in_context_len"):
        s.put("in_context_start", SIZES[size].in_context_start, "preset " + size)
    return preset_name(size, s.get("patch_size"))


def _complete(s: Origins) -> None:
    """Fill in what all published models share; ask for what they do not."""
    if "in_context_start" not in s.values and (not s.get("in_context_len") or s.get("depth") == 1):
        s.put("in_context_start", 0, "shapes")  # nothing to choose
    wanted = ["noise_scale", "in_context_start"]
    if s.get("pred_param") == "hybrid":
        wanted.append("hybrid_x_weight_mode")
    if s.get("scale_schedule") == "fixed":
        wanted.append("fixed_scale")
    missing = [n for n in wanted if n not in s.values]
    if missing:
        asked = "; ".join(f"{option(n)} ({_HINTS[n]})" for n in missing)
        raise MlxSfError(f"{s.where}: neither its weights nor its args say {', '.join(missing)}: give {asked}")
    for field_name, value in _PUBLISHED.items():
        if field_name not in s.values and (s.get("spectral_forcing") or field_name not in _FORCING):
            value = s.get("img_size") if field_name == "window_size" else value
            s.put(field_name, value, "published")
