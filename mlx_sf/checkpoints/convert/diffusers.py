"""JiT in the layouts of the diffusers world: a folder of `.safetensors` and JSON. No file but these is ever read.

Three generations are in use, told apart by their keys (spec: the pages of the repositories named in `known`):

    native   transformer/ with renamed keys, model_index.json with id2label
    wrapped  one folder, the original keys behind "transformer.", the network's size named in `model_type`
    FD-Loss  transformer/ with the original keys and the field names of its trainer; one Euler step

The weights' shapes decide; JSON fills in what they do not say, and `known` what neither says.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ... import __version__
from ...common.files import read_json
from ...errors import MlxSfError
from ...flow import published_noise_scale
from ...formats.shards import check_target, open_foreign
from ...formats.tensor_file import Entry
from ...models.jit_sizes import SIZES, find_size
from ...models.quantize import QuantizationConfig
from ..hub import COMPONENTS
from ..known import ONE_STEP, assumed, recommended
from .jit import jit_entries, strip_wrappers
from .jit_settings import configure
from .report import Report
from .tensors import SafeTensor, write

_STEM = "diffusion_pytorch_model"
_CLASSES = ("JiTTransformer2DModel",)
_FOREIGN_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "image_encoder", "unet", "prior")

# native name -> original name
_RENAMES = (
    (re.compile(r"(blocks\.\d+\.adaLN_modulation)\.(weight|bias)"), r"\1.1.\2"),
    (re.compile(r"norm_final\.weight"), "final_layer.norm_final.weight"),
    (re.compile(r"linear_final\.(weight|bias)"), r"final_layer.linear.\1"),
    (re.compile(r"adaLN_modulation_final\.(weight|bias)"), r"final_layer.adaLN_modulation.1.\1"),
)
# names in config.json, in the order in which they are looked up -> ours
_FIELDS = {
    "sample_size": "img_size",
    "input_size": "img_size",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "depth",
    "depth": "depth",
    "num_attention_heads": "num_heads",
    "num_heads": "num_heads",
    "bottleneck_dim": "bottleneck_dim",
    "in_context_len": "in_context_len",
    "in_context_start": "in_context_start",
    "num_classes": "num_classes",
    "num_class_embeds": "num_classes",
    "attention_dropout": "attn_dropout",
    "attn_dropout": "attn_dropout",
    "attn_drop": "attn_dropout",
    "dropout": "proj_dropout",
    "proj_dropout": "proj_dropout",
    "proj_drop": "proj_dropout",
}
_FLOATS = ("attn_dropout", "proj_dropout")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model in one of these layouts: its weights (a file or the index of shards), and the folders of its JSON."""

    weights: Path
    component: Path
    root: Path

    def files(self) -> Iterator[Path]:
        """Everything that is read of it."""
        yield self.weights
        yield from sorted(self.component.glob(f"{self.weights.name.split('.')[0]}-*-of-*.safetensors"))
        for path in (self.component / "config.json", self.root / "model_index.json"):
            if path.is_file():
                yield path
        yield from (p for p in self._schedulers() if p.is_file())

    def _schedulers(self) -> list[Path]:
        return [self.root / "scheduler" / "scheduler_config.json", self.root / "scheduler_config.json"]

    def json(self, name: str) -> dict[str, Any]:
        """One of "config", "model_index", "scheduler_config"; {} where it is not there."""
        places = {
            "config": [self.component / "config.json"],
            "model_index": [self.root / "model_index.json"],
            "scheduler_config": self._schedulers(),
        }
        return next((read_json(p) for p in places[name] if p.is_file()), {})


def find(place: Path) -> Folder | None:
    """The model at a folder, or of a single `.safetensors`; None where it is in none of these layouts."""
    if place.is_file():
        return Folder(place, place.parent, _around(place.parent))
    for component in (place, *(place / c for c in COMPONENTS)):
        names = sorted(p.name for p in component.iterdir()) if component.is_dir() else []
        index = [n for n in names if n.startswith(_STEM) and n.endswith(".index.json")]
        single = [n for n in names if n.startswith(_STEM) and n.endswith(".safetensors") and "-of-" not in n]
        for name in sorted(index, key=len)[:1] + sorted(single, key=len)[:1]:
            return Folder(component / name, component, _around(component))
    return None


def _around(component: Path) -> Path:
    return component.parent if component.name in COMPONENTS else component


def convert(
    source: Folder,
    target: str | os.PathLike[str],
    dtype: str | None = None,
    flags: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: QuantizationConfig | None = None,
    where: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Report:
    """Convert a model to a checkpoint, holding one tensor at a time.

    `dtype` is that of the matrix products' operands; None is as they are stored. `flags` are settings that the files do
    not say; `where` names the model in messages; `origin` goes into its provenance.

    Raises `MlxSfError` for files that are damaged, a network that is no JiT (named), and settings that contradict.
    """
    check_target(target)
    where = where or str(source.root)
    config_json, index, scheduler = (source.json(n) for n in ("config", "model_index", "scheduler_config"))
    if parts := [p for p in _FOREIGN_PARTS if index.get(p)]:
        raise MlxSfError(f"{where}: is a {_class(index)} with {', '.join(parts)}: {_WE_KNOW}")
    tensors = {name: SafeTensor(e) for name, e in _opened(source, where).items()}
    named, ignored = strip_wrappers(tensors, where)
    named = {_original(name): t for name, t in named.items()}
    try:
        config, report = configure(
            named,
            None,
            dict(flags or {}),
            where,
            said=_said(config_json, scheduler),
            assumed=_assumed(named, config_json, scheduler),
            model_name=_preset(config_json),
        )
        stored = named["blocks.0.attn.qkv.weight"].dtype
        kept = dtype or (stored if stored in ("float16", "bfloat16") else "float32")
        entries = jit_entries(named, config.model, kept, where, quantization)
    except MlxSfError as e:
        kind = _class(config_json)
        if kind in (*_CLASSES, "network") or config_json.get("_class_name") is None:
            raise
        raise MlxSfError(f"{e.message}; it calls itself {kind}: {_WE_KNOW}") from None
    made = {"converted_by": f"mlx-sf {__version__}", "dtype": kept, **(origin or {})}
    config = dataclasses.replace(
        config, class_names=_class_names(index, config_json, config.model.num_classes), provenance=made,
        quantization=quantization,
    )  # fmt: skip
    report.layout, report.ignored = "diffusers", ignored
    if (shift := scheduler.get("shift")) not in (None, 1, 1.0):
        report.notes.append(f"its scheduler's shift {shift} is another time grid than the published one: not taken")
    return write(target, entries, config, report, on_tensor)


_WE_KNOW = "this program knows JiT in pixels (JiTTransformer2DModel and its .pth), see `mlx-sf models`"


def _opened(source: Folder, where: str) -> dict[str, Entry]:
    try:
        return open_foreign(source.weights)
    except MlxSfError as e:
        raise MlxSfError(f"{where}: {e.message}") from None


def _original(name: str) -> str:
    for pattern, original in _RENAMES:
        if pattern.fullmatch(name):
            return pattern.sub(original, name)
    return name


def _class(data: Mapping[str, Any]) -> str:
    """The class that a JSON names: a string, or a pair of module and class."""
    name = data.get("_class_name")
    return str(name[-1] if isinstance(name, list) and name else name or "network")


def _preset(config: Mapping[str, Any]) -> str | None:
    """The published name in `model_type` or `model_name`, "JiT-B/16"."""
    name = config.get("model_type") or config.get("model_name")
    return name if isinstance(name, str) and name.startswith("JiT-") else None


def _said(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What JSON says: our name -> (value, file). A preset in `model_type` wins over fields, as in diffusers."""
    said: dict[str, tuple[Any, str]] = {}
    for name, ours in _FIELDS.items():
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and ours not in said:
            said[ours] = (float(value) if ours in _FLOATS else value, "config.json")
    preset = _preset(config)
    if preset is not None and _is_published(preset):
        said.pop("in_context_start", None)  # the preset's
    t_eps = scheduler.get("t_eps")
    if isinstance(t_eps, int | float) and not isinstance(t_eps, bool):
        said["t_eps"] = (float(t_eps), "scheduler_config.json")
    if scheduler.get("solver") in ("heun", "euler"):
        said["method"] = (scheduler["solver"], "scheduler_config.json")
    return said


def _is_published(name: str) -> bool:
    try:
        return find_size(name)[0] in SIZES
    except MlxSfError:
        return False


def _assumed(
    tensors: Mapping[str, Any], config: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """What neither shapes nor JSON say, from published models: only where the network is said to be one of them."""
    if _class(scheduler) == "FDLossFlowMatchScheduler":
        return assumed({**ONE_STEP, "noise_scale": 1.0})
    image = next((config[n] for n in ("sample_size", "input_size", "image_size") if isinstance(config.get(n), int)), 0)
    name = _preset(config)
    if image < 1 or (name is not None and not _is_published(name)):
        return {}  # a name that nobody knows: its noise scale is asked for
    found: dict[str, Any] = {"noise_scale": published_noise_scale(image)}
    block = tensors.get("x_embedder.proj1.weight")
    hidden = tensors.get("x_embedder.proj2.weight")
    if block is not None and hidden is not None and len(block.shape) == 4:
        size = next((n for n, z in SIZES.items() if z.hidden_size == hidden.shape[0] and z.patches), "")
        found |= recommended(size, block.shape[2], image)
    return assumed(found)


def _class_names(index: Mapping[str, Any], config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The labels of `id2label` in order; none where it is missing or does not fit."""
    labels = index.get("id2label") or config.get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(count)}:
        return ()
    names = tuple(labels[str(i)] for i in range(count))
    return names if all(isinstance(n, str) for n in names) else ()
