"""SenseNova-U1 in the layout of its authors, opened as a checkpoint of ours: nothing is copied or converted.

    config.json   model.safetensors.index.json   model-0000i-of-0000N.safetensors
    vocab.json   merges.txt   added_tokens.json

Every key is accounted for. The generation side gets this program's names. The understanding side that a picture
depends on follows behind "text/", the tokenizer's files behind "tokenizer/". What no picture depends on is left where
it is.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import MAX_JSON, read_json
from ..errors import FieldError, MlxSfError
from ..flow import FlowConfig
from ..formats.shards import open_foreign
from ..formats.tensor_file import Entry
from ..models import Shapes, parameter_shapes
from ..models.bpe import FILES
from ..models.quantize import FLOATS
from ..models.u1_config import U1Config, size_name
from ..models.u1_text import text_shapes
from ..sampling.solvers import SampleConfig
from .config import Config

MODEL_TYPE = "neo_chat"
TEXT, TOKENIZER = "text/", "tokenizer/"

_LAYER = "language_model.model.layers."
# what stands before our names in the published ones
_PLACES = {
    "norm.weight": "language_model.model.norm_mot_gen.weight",
    "patch_embedding.": "fm_modules.vision_model_mot_gen.embeddings.patch_embedding.",
    "dense_embedding.": "fm_modules.vision_model_mot_gen.embeddings.dense_embedding.",
    "timestep_embedder.": "fm_modules.timestep_embedder.",
    "noise_scale_embedder.": "fm_modules.noise_scale_embedder.",
    "head.": "fm_modules.fm_head.",
}
# known, and of no consequence for a picture
_UNUSED = re.compile(r"vision_model\.embeddings\..*|language_model\.(lm_head|model\.norm)\.weight")
# settings with which the network would be another one: where -> {name: what it must hold, or be without}
_PLAIN: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "use_adaLN": (False,),
        "concat_time_token_num": (0,),
        "extra_num_layers_post": (0,),
        "fm_head_layers": (2,),
        "downsample_ratio": (0.5,),
    },
    "llm_config": {
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
        "rms_norm_eps": (1e-6,),
        "hidden_act": ("silu",),
    },
    "vision_config": {"num_channels": (3,), "downsample_ratio": (0.5, [0.5])},
}
_NOISE = {
    "noise_scale": "noise_scale",
    "noise_scale_base_image_seq_len": "noise_base",
    "noise_scale_max_value": "noise_max",
    "add_noise_scale_embedding": "noise_embedding",
}
_BACKBONE = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_hidden",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rope_theta_hw": "rope_theta_hw",
}

SAMPLE = SampleConfig("euler", 50, 4.0, 0.0, 1.0, t_eps=0.02, shift=3.0, cfg_closed=True)


def is_published(path: Path) -> bool:
    """Whether a file of weights, or an index, lies beside the configuration of a SenseNova-U1 of its authors."""
    place = path.parent / "config.json"
    try:
        return place.is_file() and place.stat().st_size < MAX_JSON and read_json(place).get("model_type") == MODEL_TYPE
    except (MlxSfError, OSError):
        return False


def published_name(name: str) -> str:
    """The authors' key of a tensor of ours."""
    if name.startswith(TEXT):
        return "language_model.model." + name.removeprefix(TEXT)
    if match := re.fullmatch(r"layers\.(\d+)\.(self_attn\.\w+|mlp|\w+)\.(.+)", name):
        return f"{_LAYER}{match[1]}.{match[2]}_mot_gen.{match[3]}"
    ours = next(p for p in _PLACES if name.startswith(p))
    return _PLACES[ours] + name.removeprefix(ours)


def our_name(published: str) -> str:
    """Our name of the authors' key, or of its beginning; the key itself where it is none of a network's."""
    if match := re.match(rf"{re.escape(_LAYER)}(\d+)\.(.*)", published):
        generation = "_mot_gen" in match[2]
        return ("" if generation else TEXT) + f"layers.{match[1]}.{match[2].replace('_mot_gen', '')}"
    for ours, theirs in _PLACES.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


class PublishedFile:
    """The authors' folder as `formats` opens a checkpoint: `text`, the configuration, and `entries` by our names.

    `ignored` are the keys that no picture depends on. Raises `MlxSfError` for a key too many or missing, a shape or
    type that does not fit, and settings of a network that this is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = read_json(path.parent / "config.json")
        check_kind(settings, str(path.parent / "config.json"))
        found = open_foreign(path)
        model = u1_config(settings, {k: e.shape for k, e in found.items()}, str(path.parent))
        self.config = published_config(model, settings, str(path.parent))
        self.text = self.config.to_json()
        self.size = sum(e.nbytes for e in found.values())
        shards = len(list(path.parent.glob("*-of-*.safetensors"))) if path.name.endswith(".index.json") else 1
        self.container = f"the authors' safetensors, {shards} file{'s' * (shards > 1)}"
        self.entries = self._entries(found, model)
        self.ignored = [k for k in found if _UNUSED.fullmatch(k)]

    def _entries(self, found: Mapping[str, Entry], model: U1Config) -> dict[str, Entry]:
        wanted = parameter_shapes(model) | {TEXT + k: s for k, s in text_shapes(model).items()}
        keys = {published_name(name): name for name in wanted}
        # the understanding side's last layer gives keys and values; the rest of it is there for text
        last = re.compile(rf"{re.escape(_LAYER)}{model.depth - 1}\.(?!.*_mot_gen).*")
        where = self.path.parent
        for key in keys:
            if key not in found:
                raise MlxSfError(f"{where}: lacks {key!r}: no complete SenseNova-U1, download it again")
        for key in found:
            if key not in keys and not _UNUSED.fullmatch(key) and not last.fullmatch(key):
                raise MlxSfError(f"{where}: holds {key!r}, which is not part of a SenseNova-U1 that this program knows")
        entries = {name: _as_ours(found[key], name, wanted[name], where) for key, name in keys.items()}
        for name in FILES:
            if (where / name).is_file():
                data = np.frombuffer((where / name).read_bytes(), np.uint8)
                entries[TOKENIZER + name] = Entry.of(TOKENIZER + name, data)
        return entries

    def verify(self) -> None:
        """Nothing: these files carry no digest of their own; the Hub's were compared when they were fetched."""


def _as_ours(e: Entry, name: str, shape: tuple[int, ...], where: Path) -> Entry:
    """An entry under our name, in our order of axes."""
    convolution = name.startswith("head.conv") and len(shape) == 4
    published = (shape[0], shape[3], *shape[1:3]) if convolution else shape
    # a patch embedder's kernel (out, in, p, p) is a matrix, row by row
    flat = name.endswith("_embedding.weight") and len(e.shape) == 4 and e.shape[2] == e.shape[3]
    got = (e.shape[0], math.prod(e.shape[1:])) if flat else e.shape
    if got != published or e.dtype not in FLOATS:
        kind = "" if e.dtype in FLOATS else f"{e.dtype} "
        raise MlxSfError(f"{where}: {published_name(name)!r} is {kind}{e.shape}, want floats of shape {published}")

    def read() -> np.ndarray:
        bits = e.read()
        return np.ascontiguousarray(bits.transpose(0, 2, 3, 1)) if convolution else bits.reshape(shape)

    return Entry(name, e.dtype, shape, read, None if convolution or flat else e.read_rows)


# ------------------------------------------------------------------------------------------------ config.json


def check_kind(settings: Mapping[str, Any], where: str) -> None:
    """Refuse, by its name, what would make it another network."""
    backbone = settings.get("llm_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    if "num_experts" in backbone or "moe" in str(backbone.get("model_type", "")).lower():
        raise MlxSfError(
            f"{where}: is a sparse mixture of experts (A3B), which this program does not draw: take an 8B model"
        )
    for part, wanted in _PLAIN.items():
        held = settings.get(part, {}) if part else settings
        for name, values in wanted.items():
            got = held.get(name, values[0]) if isinstance(held, dict) else values[0]
            if got not in values:
                inside = f"{part}.{name}" if part else name
                raise MlxSfError(f"{where}: {inside} is {got!r}, want {values[0]!r}: this network is not supported")


def u1_config(settings: Mapping[str, Any], shapes: Shapes, where: str) -> U1Config:
    """The network of a config.json, its head and inner width by the weights' shapes."""
    said: dict[str, Any] = {}
    for part, names in (("llm_config", _BACKBONE), ("", _NOISE)):
        held = settings.get(part) if part else settings
        for theirs, ours in names.items():
            if not isinstance(held, dict) or theirs not in held:
                inside = f"{part}.{theirs}" if part else theirs
                raise MlxSfError(f"{where}: config.json does not say {inside}: take a complete copy")
            said[ours] = held[theirs]
    vision = settings.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    mode = settings.get("noise_scale_mode")
    if mode is None:
        raise MlxSfError(f"{where}: config.json does not say noise_scale_mode: take a complete copy")
    said["noise_mode"] = mode if mode in ("resolution", "dynamic", "dynamic_sqrt") else "fixed"
    said["patch_size"] = settings.get("patch_size", vision.get("patch_size"))
    said["embed_width"] = vision.get("hidden_size")
    said["rope_theta_vision"] = vision.get("rope_theta_vision", 1e4)
    conv = "fm_modules.fm_head.conv1.weight" in shapes
    first = "fm_modules.fm_head." + ("conv1" if conv else "0") + ".weight"
    if first not in shapes or not shapes[first]:
        raise MlxSfError(f"{where}: lacks {first!r}: no complete SenseNova-U1, download it again")
    if bool(settings.get("use_pixel_head", conv)) != conv:
        kind = "convolutional" if conv else "linear"
        raise MlxSfError(f"{where}: config.json says use_pixel_head {not conv}, its weights have a {kind} head")
    said |= {"head": "conv" if conv else "linear", "head_width": shapes[first][0]}
    try:
        P = 2 * int(said["patch_size"])
        side = max(P, 2048 // P * P)
        return U1Config(height=side, width=side, **said)
    except FieldError as e:
        raise e.within(f"{where}: config.json") from None
    except (TypeError, ValueError):
        raise MlxSfError(f"{where}: config.json: patch_size is {said['patch_size']!r}, want a whole number") from None


def published_config(model: U1Config, settings: Mapping[str, Any], where: str) -> Config:
    """All that a checkpoint says: the training's flow, and the settings that the authors' scripts draw with."""
    trained = {name: settings[name] for name in ("t_eps", "P_mean", "P_std") if name in settings}
    try:
        flow = FlowConfig(noise_scale=model.noise_at(model.size), **trained)
    except FieldError as e:
        raise e.within(f"{where}: config.json") from None
    name = size_name(model)
    return Config(model, flow, SAMPLE, f"SenseNova-{name}" if name else "SenseNova-U1")


def without_effect(published: str, model: U1Config) -> bool:
    """Whether a layer of the authors', by its path, has nothing to do with pictures."""
    last = f"{_LAYER}{model.depth - 1}."
    return bool(_UNUSED.fullmatch(published + ".weight")) or (
        published.startswith(last) and "_mot_gen" not in published
    )


# ------------------------------------------------------------------------------------------------ companions


def text_entries(entries: Mapping[str, Entry]) -> list[Entry]:
    """What a checkpoint holds beside the generation side: the understanding side and the tokenizer's files."""
    return [e for name, e in entries.items() if name.startswith((TEXT, TOKENIZER))]


def tokenizer_files(entries: Mapping[str, Entry]) -> dict[str, bytes]:
    """The contents of the tokenizer's files."""
    return {n: entries[TOKENIZER + n].read().tobytes() for n in FILES if TOKENIZER + n in entries}


@cache
def known_config(name: str) -> Config:
    """What a published checkpoint says, without its files, by a name of `u1_config.PUBLISHED`."""
    from ..models.u1_config import PUBLISHED

    return published_config(PUBLISHED[name], {}, name)


def renamed(entries: Iterable[Entry], to: Callable[[str], str]) -> list[Entry]:
    """Entries under other names."""
    return [dataclasses.replace(e, name=to(e.name)) for e in entries]
