"""MiniT2I in every layout that its authors write: their names, their files, what they leave unsaid.

    hub       transformer/ with config.json and keys "model.net...."
    trainer   checkpoint_N.pt with sets "model" and "ema" and keys of its own
    export    a .pt of "config" and "state_dict", keys "net...."
    JAX       an Orbax folder, or one .safetensors with the tree's paths: matrices transposed, images channels last

The four-step student exists in JAX alone. Weights' shapes decide; files' settings and flags fill in what they do not
say, and what neither says is the published model's.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...errors import MlxSfError, option
from ...flow import FlowConfig
from ...formats.orbax import OrbaxFile
from ...formats.shards import check_target, open_foreign
from ...formats.torch_file.reader import TensorRef, open_torch_file
from ...models import architecture
from ...models.mmjit import MMJiTConfig, size_name
from ...models.mmjit_mf import PUBLISHED_GUIDANCE, PUBLISHED_STEPS, MMJiTMFConfig
from ...models.quantize import QuantizationConfig
from ...models.text import TextConfig
from ...sampling.solvers import SampleConfig
from ..checkpoint import stored_name
from ..config import Config
from .diffusers import Folder
from .origins import Origins
from .report import Report
from .tensors import SafeTensor, Tensor, Tensors, network_entries, write

# names in the authors' files -> ours
_FIELDS = {
    "image_size": "img_size",
    "img_input_size": "img_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "depth_double": "depth",
    "txt_preamble_depth": "text_depth",
    "text_preamble_depth": "text_depth",
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "pca_channels": "bottleneck_dim",
    "txt_input_size": "text_width",
    "t5_hidden_size": "text_width",
    "prompt_length": "text_length",
    "llm": "text_encoder",
    "t5_name": "text_encoder",
    "n_T": "steps",
    "noise_scale": "noise_scale",
    "label_drop_rate": "label_drop_prob",
    "t_lognorm_mu": "P_mean",
    "t_lognorm_sigma": "P_std",
}
_FLOATS = ("noise_scale", "label_drop_prob", "P_mean", "P_std", "t_eps")
# what a flag may say, for files that do not
SETTINGS: dict[str, Any] = {
    "img_size": int,
    "text_length": int,
    "text_encoder": str,
    "noise_scale": float,
    "t_eps": float,
    "P_mean": float,
    "P_std": float,
    "label_drop_prob": float,
}
_PUBLISHED: dict[str, Any] = {
    "img_size": 512,
    "text_length": 256,
    "text_encoder": "google/flan-t5-large",
    "steps": 100,
    "noise_scale": 2.0,
    "label_drop_prob": 0.1,
    "P_mean": -0.8,
    "P_std": 0.8,
}
# floors of 1 - t: in training, by code; and in the pipeline on the Hub, whose pictures have no visible floor
_TRAINED_FLOOR = {"PyTorch": 0.05, "JAX": 0.01}
_HUB_FLOOR = 0.001
_GUIDANCE = {"B": 2.5, "L": 6.0}  # the authors' recommendation; 6 is their code's default

_PIPELINE, _DEFAULT = "MiniT2IPipeline", "minit2i-b-16"

# results of these layers are thrown away by the published code
_UNUSED = re.compile(r"(t_embed|t_embedder|pooled_embed|pooled_embedder)\..*")
_TRAINER = (
    (re.compile(r"img_embed\."), "img_embedder."),
    (re.compile(r"txt_embed\."), "txt_embedder."),
    (re.compile(r"txt_blocks\.(\d+)\.proj\."), r"txt_preamble_blocks.\1.attn_proj."),
    (re.compile(r"txt_blocks\."), "txt_preamble_blocks."),
    (re.compile(r"blocks\.(\d+)\.(img|txt)_proj\."), r"double_blocks.\1.\2_attn_proj."),
    (re.compile(r"blocks\."), "double_blocks."),
    (re.compile(r"final_norm\."), "final_layer.norm_final."),
    (re.compile(r"final\."), "final_layer.linear."),
)
_PREFIXES = ("_orig_mod.", "module.", "model.", "net.")
_EMA = re.compile(r"ema_params_dict\.([\d.]+?)\.((?:params\.)?(?:net\.)?[A-Za-z_].*)")


class _Turned:
    """A tensor of JAX in PyTorch's order of axes."""

    def __init__(self, tensor: Tensor, axes: tuple[int, ...]) -> None:
        self._tensor, self._axes = tensor, axes
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape[a] for a in axes)

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self._tensor.read().transpose(self._axes))


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Weight sets by our names for them, in PyTorch's layout; what the files say; the code that trained them."""

    layout: str
    sets: Mapping[str, Tensors]
    said: Mapping[str, tuple[Any, str]]
    code: str


def recognises(names: Sequence[str]) -> bool:
    """Whether tensors of these names, of any layout, are a MiniT2I's."""
    return any(re.search(r"blocks[./](layers_)?0[./]img_qkv[./]", name) for name in names)


def describe(names: Sequence[str]) -> str:
    """Which MiniT2I tensors of these names are, in words."""
    student = any("omega_tokens" in name for name in names)
    return "MiniT2I, the student of four steps" if student else "MiniT2I"


def default_folder(folder: Path) -> str:
    """The model that the published pipeline takes of a folder of several unless told otherwise; "" in other folders."""
    index = folder / "model_index.json"
    if not index.is_file():
        return ""
    return _DEFAULT if Folder(index, folder, folder).json("model_index").get("_class_name") == _PIPELINE else ""


def is_minit2i(path: Path, folder: Folder | None) -> bool:
    """Whether a foreign checkpoint is a MiniT2I. One that cannot be read is nobody's."""
    try:
        if folder is not None:
            return recognises(list(open_foreign(folder.weights)))
        with open_torch_file(path) as file:
            root = file.root
            parts = [root, *(root.get(k) for k in ("state_dict", "model", "ema"))] if isinstance(root, dict) else []
            return any(recognises([k for k in p if isinstance(k, str)]) for p in parts if isinstance(p, dict))
    except (MlxSfError, OSError):
        return False


def convert(
    path: Path,
    folder: Folder | None,
    target: str | os.PathLike[str],
    weights: Sequence[str] | None = None,
    dtype: str | None = None,
    flags: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: QuantizationConfig | None = None,
    where: str | None = None,
    origin: Mapping[str, Any] | None = None,
    assumed: Mapping[str, tuple[Any, str]] | None = None,
) -> Report:
    """Convert a MiniT2I to a checkpoint, holding one tensor at a time; the arguments are those of `diffusers.convert`.

    `path` is a `.pt`, an Orbax folder or the weights of `folder`. `weights` choose among the trainer's "model" and
    "ema1". Raises `MlxSfError` for files that are damaged, incomplete or of an older network, and for settings that
    contradict.
    """
    check_target(target)
    where = where or str(path)
    with contextlib.ExitStack() as stack:
        opened = _open(path, folder, where, stack)
        chosen = _chosen(opened.sets, weights, where)
        named = {name: _without_unused(opened.sets[name]) for name in chosen}
        first, ignored = named[chosen[0]]
        s = _settings(first, opened, dict(flags or {}), assumed or {}, where)
        config = _config(s, opened, "omega_tokens" in first)
        kind = architecture(config.model)
        quantization = quantization.of(kind) if quantization is not None else None
        stored = first["double_blocks.0.img_qkv.weight"].dtype
        kept = dtype or (stored if stored in ("float16", "bfloat16") else "float32")
        made = {"converted_from": path.name, "converted_by": f"mlx-sf {__version__}", "dtype": kept, **(origin or {})}
        config = dataclasses.replace(config, weights=tuple(chosen), quantization=quantization, provenance=made)
        entries = []
        for name, (tensors, _) in named.items():
            of_set = network_entries(tensors, config.model, kept, where, quantization, _stored_as)
            entries += [dataclasses.replace(e, name=stored_name(config, name, e.name)) for e in of_set]
        report = Report(config, opened.layout, s.told(), ignored)
        return write(target, entries, config, report, on_tensor)


def _stored_as(key: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of a tensor in PyTorch files: the patch embedder's layers are convolutions there."""
    if key == "img_embedder.proj1.weight":
        p = round((shape[1] // 3) ** 0.5)
        return [shape, (shape[0], 3, p, p)]
    return [shape, (*shape, 1, 1)] if key == "img_embedder.proj2.weight" else [shape]


# ------------------------------------------------------------------------------------------------ layouts


def _open(path: Path, folder: Folder | None, where: str, stack: contextlib.ExitStack) -> _Opened:
    if folder is not None:
        tensors: dict[str, Tensor] = {name: SafeTensor(e) for name, e in open_foreign(folder.weights).items()}
        if any("_flax_" in name for name in tensors):
            return _Opened("JAX", {"model": _from_jax(tensors)}, {}, "JAX")
        said = _said(folder.json("config"), "config.json") | _said(folder.json("scheduler_config"), "scheduler_config")
        return _Opened("hub", {"model": _stripped(tensors)}, said, "PyTorch")
    if path.is_dir():
        return _Opened("JAX", _orbax_sets(OrbaxFile(path), where), {}, "JAX")
    return _torch_sets(stack.enter_context(open_torch_file(path)).root, where)


def _torch_sets(root: Any, where: str) -> _Opened:
    """The sets of the trainer's file, or the one of an export."""
    settings = root.get("config")
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("compat_checkpoint_arch"):
        raise MlxSfError(f"{where}: is an older network than the published one (compat_checkpoint_arch): not supported")
    found = {"model": root.get("state_dict", root.get("model", root)), "ema1": root.get("ema")}
    sets = {name: _stripped(_tensors(s)) for name, s in found.items() if isinstance(s, dict) and _tensors(s)}
    return _Opened("export" if "state_dict" in root else "trainer", sets, _said(settings, "config"), "PyTorch")


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, TensorRef)}


def _stripped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the hub's names, without what is in front of all of them."""
    named = dict(tensors)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in named)), None):
        named = {k.removeprefix(prefix): v for k, v in named.items()}
    if "img_embed.proj1.weight" in named:
        named = {_from_trainer(k): v for k, v in named.items()}
    return named


def _from_trainer(name: str) -> str:
    for pattern, ours in _TRAINER:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return name


def _orbax_sets(file: OrbaxFile, where: str) -> dict[str, Tensors]:
    """The parameters, and the average of them that a training's state holds beside them."""
    model, average = {}, {}
    for name, tensor in file.tensors.items():
        if ema := _EMA.fullmatch(name):
            average[ema[2]] = tensor
        elif name.startswith(("params.", "net.")) and ".pt_net." not in f".{name}":
            model[name] = tensor
    sets: dict[str, Tensors] = {
        name: _from_jax(tensors) for name, tensors in (("model", model), ("ema1", average)) if tensors
    }
    if not sets:
        raise MlxSfError(f"{where}: an Orbax checkpoint without params, found {', '.join(list(file.tensors)[:3])}")
    return sets


def _from_jax(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the JAX tree, paths with dots or slashes, by the hub's names and in PyTorch's layout."""
    named: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        name = re.sub(r"^(params\.)?(net\.)?", "", path.replace("/", "."))
        name = re.sub(r"layers_(\d+)", r"\1", name).replace("._flax_param.param_tensor", "")
        if name.endswith("._flax_linear.kernel"):
            tensor = _Turned(tensor, (1, 0))
        elif re.fullmatch(r"img_embedder\.proj[12]\.kernel", name):
            tensor = _Turned(tensor, (3, 2, 0, 1))
        named[re.sub(r"(\._flax_(linear|rmsnorm))?\.kernel$", ".weight", name).replace("._flax_linear", "")] = tensor
    return named


def _chosen(sets: Mapping[str, Tensors], weights: Sequence[str] | None, where: str) -> list[str]:
    chosen = list(weights) if weights else ["ema1" if "ema1" in sets else "model"]
    for name in chosen:
        if name not in sets:
            raise MlxSfError(
                f"{where}: holds weights {', '.join(sets) or 'none'}, not {name!r}: choose with {option('weights')}"
            )
    return chosen


def _without_unused(tensors: Tensors) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that the network has, and those that the published code computes with for nothing."""
    unused = [k for k in tensors if _UNUSED.fullmatch(k)]
    return {k: v for k, v in tensors.items() if k not in unused}, unused


# ------------------------------------------------------------------------------------------------ settings


def _said(values: Mapping[str, Any], origin: str) -> dict[str, tuple[Any, str]]:
    """What a file's settings say, by our names."""
    said: dict[str, tuple[Any, str]] = {}
    for name, ours in _FIELDS.items():
        value = values.get(name)
        if isinstance(value, str) and ours == "text_encoder":
            said[ours] = value, origin
        elif isinstance(value, int | float) and not isinstance(value, bool) and ours != "text_encoder":
            said[ours] = float(value) if ours in _FLOATS else value, origin
    low_high = values.get("cfg_interval")
    if isinstance(low_high, list | tuple) and len(low_high) == 2:
        said |= {name: (float(v), origin) for name, v in zip(("cfg_low", "cfg_high"), low_high, strict=True)}
    cfg = values.get("cfg_scale")
    if isinstance(cfg, int | float) and not isinstance(cfg, bool):
        said["cfg"] = (float(cfg), origin)
    return said


def _settings(
    tensors: Tensors,
    opened: _Opened,
    flags: dict[str, Any],
    assumed: Mapping[str, tuple[Any, str]],
    where: str,
) -> Origins:
    s = Origins(where)
    for name, value in _from_shapes(tensors, where).items():
        s.put(name, value, "shapes")
    for name, (value, origin) in opened.said.items():
        s.put(name, value, origin)
    for name, value in flags.items():
        if name not in SETTINGS:
            raise MlxSfError(
                f"{where}: {option(name.lower())} is no setting of MiniT2I, want none but {_settings_told()}"
            )
        s.put(name, value, f"flag {option(name.lower())}")
    for name, (value, origin) in {**assumed, **{k: (v, "published") for k, v in _PUBLISHED.items()}}.items():
        if name not in s.values:
            s.put(name, value, origin)
    return s


def _settings_told() -> str:
    return ", ".join(option(name.lower()) for name in SETTINGS)


def _from_shapes(tensors: Tensors, where: str) -> dict[str, int]:
    """What the weights' shapes say: all but the image's side and the number of text places."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise MlxSfError(f"{where}: lacks tensor {name!r}: no complete MiniT2I")
        found = tuple(tensors[name].shape)
        if len(found) < axes or not all(found):
            raise MlxSfError(f"{where}: tensor {name!r} has shape {found}, want {axes} axes")
        return found

    def count(blocks: str) -> int:
        numbers = {int(m[1]) for k in tensors if (m := re.match(rf"{blocks}\.(\d{{1,4}})\.", k))}
        return max(numbers) + 1 if numbers else 0

    proj1, qkv = shape("img_embedder.proj1.weight", 2), shape("double_blocks.0.img_qkv.weight", 2)
    head_dim = shape("double_blocks.0.q_norm.weight", 1)[0]
    width = shape("txt_embedder.weight", 2)
    patch = proj1[2] if len(proj1) == 4 else round((proj1[1] / 3) ** 0.5)
    return {
        "patch_size": patch,
        "hidden_size": width[0],
        "depth": count("double_blocks"),
        "text_depth": count("txt_preamble_blocks"),
        "num_heads": qkv[0] // (3 * head_dim),
        "head_dim": head_dim,
        "mlp_hidden": shape("double_blocks.0.img_mlp.w1.weight", 2)[0],
        "bottleneck_dim": proj1[0],
        "text_width": width[1],
    }


def _config(s: Origins, opened: _Opened, student: bool) -> Config:
    values = {name: value for name, (value, _) in s.values.items()}
    text = TextConfig(values["text_encoder"], values["text_width"], values["text_length"])
    fields = [f.name for f in dataclasses.fields(MMJiTConfig) if f.name in values]
    model = (MMJiTMFConfig if student else MMJiTConfig)(**{n: values[n] for n in fields}, text=text)
    size = size_name(model)
    trained_floor = values.get("t_eps", 0.05 if student else _TRAINED_FLOOR[opened.code])
    flow = FlowConfig(
        noise_scale=values["noise_scale"],
        t_eps=trained_floor,
        P_mean=values["P_mean"],
        P_std=values["P_std"],
        label_drop_prob=values["label_drop_prob"],
    )
    name = f"MiniT2I-{size}/{model.patch_size}" if size in _GUIDANCE else "MiniT2I"
    if student:
        omega, low, high = PUBLISHED_GUIDANCE
        sample = SampleConfig("euler", PUBLISHED_STEPS, omega, low, high)
        return Config(model, flow, sample, name + "-MF")
    # the floor is a training's own in the trainer's files; published weights are drawn without a visible one
    published = opened.layout in ("hub", "JAX")
    cfg = values.get("cfg", _GUIDANCE.get(size or "", 6.0))
    interval = values.get("cfg_low", 0.0), values.get("cfg_high", 1.0)
    floor = values.get("sample_t_eps", _HUB_FLOOR if published and "t_eps" not in values else None)
    sample = SampleConfig("euler", values["steps"], cfg, *interval, t_eps=floor, cfg_closed=True)
    return Config(model, flow, sample, name)
