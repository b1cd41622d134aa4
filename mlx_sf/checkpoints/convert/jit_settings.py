"""The configuration of foreign JiT weights: what each setting is, and which place says so.

Settings come from three places, in this order: the shapes of the weights, what the files beside them say (the
trainer's `args`, JSON), and flags. A flag that contradicts the file is an error. Where all published models agree on a
value that nobody says, it is taken and reported; where they differ (noise scale, the block before which in-context
tokens enter), it is asked for.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ...errors import MlxSfError, option
from ...flow import FlowConfig
from ...formats.torch_file.reader import Record
from ...models.jit import JiTConfig
from ...models.jit_sizes import SIZES, find_size, preset_name
from ...sampling.solvers import SampleConfig
from ...spectral import ForcingConfig
from ..config import Config
from .origins import Origins
from .report import Report
from .tensors import Tensors

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
_NO_FLAG = ("loss", "out_channels", "forcing", "schedule_power", "schedule_cutoffs", "exact_end")
_FORCING = tuple(f.name for f in dataclasses.fields(ForcingConfig))
FLAG_TYPES: dict[str, Any] = {
    f.name: f.type
    for part in (JiTConfig, ForcingConfig, FlowConfig)
    for f in dataclasses.fields(part)
    if f.name not in _NO_FLAG
} | {"spectral_forcing": bool}
PUBLISHED_SCHEDULES = ("linear", "fixed")


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
