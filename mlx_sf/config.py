"""What a checkpoint says about itself: frozen dataclasses, the published sizes, validation with clear errors.

A `Config` travels whole: it is written into every checkpoint as JSON and is all that is needed to rebuild the network
and repeat its sampling. Field names follow the published PyTorch code where it has one.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from .errors import MlxSfError

PredParam = Literal["x", "v", "hybrid"]
HybridMode = Literal["one_minus_t", "snr", "snr_inverse"]
ScaleSchedule = Literal["linear", "fixed", "power", "cosine", "data"]
Method = Literal["heun", "euler", "multistep"]


def _require(ok: bool, where: str, got: Any, want: str) -> None:
    if not ok:
        raise MlxSfError(f"config: {where} is {got!r}, want {want}")


def _choice(where: str, got: Any, kind: Any) -> None:
    _require(got in get_args(kind), where, got, "one of " + ", ".join(get_args(kind)))


def _finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number above 1e308
        return False


def _fields_typed(config: Any) -> None:
    """Refuse values of the wrong kind, so that a hand-edited or foreign config fails here and not inside MLX."""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), f.type
        if kind is float:
            _require(_finite(value), f.name, value, "a finite number")
            object.__setattr__(config, f.name, float(value))
        elif kind is int:
            _require(isinstance(value, int) and not isinstance(value, bool), f.name, value, "a whole number")
        elif kind is bool:
            _require(isinstance(value, bool), f.name, value, "true or false")
        elif kind is str:
            _require(isinstance(value, str), f.name, value, "a string")


def _numbers(where: str, values: Any) -> tuple[float, ...]:
    """A list or tuple (JSON knows lists only) of finite numbers as a tuple of floats."""
    _require(isinstance(values, list | tuple), where, values, "a list of numbers")
    for v in values:
        _require(_finite(v), where, v, "finite numbers")
    return tuple(map(float, values))


@dataclass(frozen=True)
class ModelConfig:
    """The network: JiT with or without Spectral Forcing on its input.

    Sizes are in pixels (`img_size`, `patch_size`, `window_size`), tokens (`in_context_len`) or channels. `window_size`
    0 stands for the whole image and is resolved at construction. Raises `MlxSfError` where sizes do not fit together.

    The forcing's mask passes frequencies below a cutoff radius c(t) (0 is the mean, 1 the highest frequency). Published
    models open it from `min_keep` to `max_keep` with f(t) = t ("linear") or hold it at f = `fixed_scale` ("fixed").
    Ours beside them: "power", f = t**`schedule_power`; "cosine", f = (1 - cos(pi t)) / 2; "data", c(t) itself given as
    `schedule_cutoffs` at equal steps of t from 0 to 1, linear between. `exact_end` renormalises the mask to be exactly
    1 at t = 1 (see `spectral.SpectralForcing`).
    """

    img_size: int = 256
    patch_size: int = 32
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    bottleneck_dim: int = 128
    in_context_len: int = 32
    in_context_start: int = 4
    num_classes: int = 1000
    out_channels: int = 3
    mlp_ratio: float = 4.0
    spectral_forcing: bool = True
    window_size: int = 0
    scale_schedule: ScaleSchedule = "linear"
    fixed_scale: float = 1.0
    mask_sharpness: float = 30.0
    min_keep: float = 0.05
    max_keep: float = 1.0
    schedule_power: float = 1.0
    schedule_cutoffs: tuple[float, ...] = ()
    exact_end: bool = False
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0

    def __post_init__(self) -> None:
        _fields_typed(self)
        for name in ("img_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim", "num_classes"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(2 <= self.img_size <= 8192, "img_size", self.img_size, "2 to 8192 pixels")
        _require(
            self.img_size % self.patch_size == 0,
            "patch_size",
            self.patch_size,
            f"a divisor of img_size {self.img_size}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"a divisor of hidden_size {self.hidden_size}",
        )
        # the rotary embedding rotates pairs on two axes; the position table has sine and cosine on two axes
        _require(self.head_dim % 4 == 0, "hidden_size / num_heads", self.head_dim, "a multiple of 4")
        _require(self.out_channels in (3, 6), "out_channels", self.out_channels, "3, or 6 with pred_param hybrid")
        _require(self.in_context_len >= 0, "in_context_len", self.in_context_len, "0 or more")
        if self.in_context_len:
            ok = 0 <= self.in_context_start < self.depth
            _require(ok, "in_context_start", self.in_context_start, f"a block number from 0 to {self.depth - 1}")
        if self.window_size == 0:
            object.__setattr__(self, "window_size", self.img_size)
        ok = self.window_size >= 2 and self.img_size % self.window_size == 0
        _require(ok, "window_size", self.window_size, f"a divisor of img_size {self.img_size}, at least 2")
        object.__setattr__(self, "schedule_cutoffs", _numbers("schedule_cutoffs", self.schedule_cutoffs))
        self._check_schedule()
        for name in ("attn_dropout", "proj_dropout"):
            _require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "a probability below 1")
        _require(self.mlp_hidden >= 1, "mlp_ratio", self.mlp_ratio, "a ratio that leaves at least one hidden channel")

    def _check_schedule(self) -> None:
        kind, cutoffs = self.scale_schedule, self.schedule_cutoffs
        _choice("scale_schedule", kind, ScaleSchedule)
        _require(0.0 <= self.fixed_scale <= 1.0, "fixed_scale", self.fixed_scale, "a scale from 0 to 1")
        _require(self.schedule_power > 0, "schedule_power", self.schedule_power, "above 0")
        if kind != "power":
            _require(self.schedule_power == 1, "schedule_power", self.schedule_power, f"1 with scale_schedule {kind}")
        if kind != "data":
            _require(not cutoffs, "schedule_cutoffs", cutoffs, f"none with scale_schedule {kind}")
        else:
            _require(len(cutoffs) >= 2, "schedule_cutoffs", cutoffs, "at least 2 radii with scale_schedule data")
            falls = [(a, b) for a, b in itertools.pairwise(cutoffs) if b < a]
            _require(not falls, "schedule_cutoffs", falls[0] if falls else (), "radii that never fall")
            _require(cutoffs[0] >= 0, "schedule_cutoffs", cutoffs[0], "a first radius of 0 or more")
            _require(cutoffs[-1] >= 1, "schedule_cutoffs", cutoffs[-1], "a last radius of at least 1 (all frequencies)")
        if self.exact_end:
            _require(kind != "fixed", "exact_end", True, "false with scale_schedule fixed, whose mask has no end")
            opens = self.min_keep <= self.max_keep and self.mask_sharpness > 0
            ok = kind == "data" or (opens and self.max_keep >= 1)
            want = "false unless max_keep is at least 1, min_keep below it and mask_sharpness above 0"
            _require(ok and self.mask_sharpness > 0, "exact_end", True, want)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.img_size // self.patch_size

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of SwiGLU: two thirds of the plain feed-forward's, both rounded down."""
        return int(int(self.hidden_size * self.mlp_ratio) * 2 / 3)

    @property
    def null_class(self) -> int:
        """The label that means "no class": the row after the last class."""
        return self.num_classes


# the fields of `ModelConfig` that describe the forcing itself
FORCING_FIELDS = (
    "window_size", "scale_schedule", "fixed_scale", "mask_sharpness", "min_keep", "max_keep",
    "schedule_power", "schedule_cutoffs", "exact_end",
)  # fmt: skip


@dataclass(frozen=True)
class FlowConfig:
    """The flow, its loss and the network's parameterisation. Times run from 0 (noise) to 1 (data)."""

    pred_param: PredParam = "x"
    hybrid_x_weight_mode: HybridMode = "one_minus_t"
    hybrid_x_weight_power: float = 1.0
    hybrid_x_weight_min: float = 0.0
    hybrid_x_weight_max: float = 1.0
    noise_scale: float = 1.0
    t_eps: float = 0.05
    P_mean: float = -0.8
    P_std: float = 0.8
    label_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        _fields_typed(self)
        _choice("pred_param", self.pred_param, PredParam)
        _choice("hybrid_x_weight_mode", self.hybrid_x_weight_mode, HybridMode)
        _require(self.noise_scale > 0, "noise_scale", self.noise_scale, "above 0")
        _require(0 < self.t_eps <= 1, "t_eps", self.t_eps, "above 0, at most 1")
        _require(self.P_std >= 0, "P_std", self.P_std, "0 or more")
        _require(0 <= self.label_drop_prob <= 1, "label_drop_prob", self.label_drop_prob, "a probability")
        low, high = self.hybrid_x_weight_min, self.hybrid_x_weight_max
        _require(low <= high, "hybrid_x_weight_min", low, f"at most hybrid_x_weight_max {high}")


@dataclass(frozen=True)
class SampleConfig:
    """How to draw samples. `cfg` 1 means no guidance; it acts for `cfg_low < t < cfg_high` (a low end of 0 included).

    `heun` and `euler` are the published solvers; `multistep` is second order with one evaluation a step. `t_eps` None
    takes the flow's own, as the published sampler does.
    """

    method: Method = "heun"
    steps: int = 50
    cfg: float = 1.0
    cfg_low: float = 0.1
    cfg_high: float = 1.0
    t_eps: float | None = None

    def __post_init__(self) -> None:
        _fields_typed(self)
        _choice("method", self.method, Method)
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.cfg >= 0, "cfg", self.cfg, "0 or more (1 means off)")
        ok = 0 <= self.cfg_low <= self.cfg_high <= 1
        _require(ok, "cfg_interval", (self.cfg_low, self.cfg_high), "LOW HIGH with 0 <= LOW <= HIGH <= 1")
        if self.t_eps is not None:
            ok = isinstance(self.t_eps, (int, float)) and not isinstance(self.t_eps, bool) and 0 < self.t_eps <= 1
            _require(ok, "sample t_eps", self.t_eps, "above 0, at most 1")
            object.__setattr__(self, "t_eps", float(self.t_eps))


LayerKind = Literal["attention", "feed_forward", "modulation", "patch_embedder", "time_embedder", "head"]


@dataclass(frozen=True)
class QuantizationConfig:
    """Linear layers whose weights are held in few `bits` (8 or 4), for inference only.

    Along a row, `group_size` neighbours share a scale and a bias. `layers` are the kinds of layers this applies to; by
    default the blocks' products, 96 % of JiT-B/32. The rest is small and costs more precision than it saves memory.
    """

    bits: int
    group_size: int = 64
    layers: tuple[str, ...] = ("attention", "feed_forward", "modulation")

    def __post_init__(self) -> None:
        _fields_typed(self)
        _require(self.bits in (4, 8), "quantization bits", self.bits, "8 or 4")
        _require(self.group_size in (32, 64, 128), "quantization group_size", self.group_size, "32, 64 or 128")
        _require(
            isinstance(self.layers, (list, tuple)), "quantization layers", self.layers, "a list of kinds of layers"
        )
        object.__setattr__(self, "layers", tuple(self.layers))
        ok = len(self.layers) >= 1 and len(set(map(str, self.layers))) == len(self.layers)
        _require(ok, "quantization layers", self.layers, "different kinds of layers, at least one")
        for kind in self.layers:
            _choice("quantization layers", kind, LayerKind)


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint says about itself.

    `weights` names the weight sets in the file ("model", "ema1", "ema2"); `class_names` may be empty; `provenance`
    is free text for people: where the weights came from. `quantization` is None where all weights are floats.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    name: str = "custom"
    weights: tuple[str, ...] = ("model",)
    class_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        want = 6 if self.flow.pred_param == "hybrid" else 3
        _require(
            self.model.out_channels == want,
            "out_channels",
            self.model.out_channels,
            f"{want} with pred_param {self.flow.pred_param}",
        )
        for part, where in ((self.weights, "weights"), (self.class_names, "class_names")):
            _require(all(isinstance(s, str) for s in part), where, part, "a list of strings")
        _require(len(self.weights) >= 1, "weights", self.weights, "at least one weight set")
        n = len(self.class_names)
        _require(n in (0, self.model.num_classes), "class_names", f"{n} names", f"{self.model.num_classes} or none")

    def replace(self, **changes: Any) -> "Config":
        """A copy with other field values; a name found in a part (`model`, `flow`, `sample`) changes that part.

        Fields that two parts share (`t_eps`) mean the flow's.
        """
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {"model": {}, "flow": {}, "sample": {}}
        for key, value in changes.items():
            if key in {f.name for f in dataclasses.fields(self)}:
                own[key] = value
                continue
            part = next((p for p in parts if key in {f.name for f in dataclasses.fields(getattr(self, p))}), None)
            if part is None:
                raise MlxSfError(f"config: no field is called {key!r}")
            parts[part][key] = value
        if "pred_param" in parts["flow"]:
            parts["model"].setdefault("out_channels", 6 if parts["flow"]["pred_param"] == "hybrid" else 3)
        for part, values in parts.items():
            if values:
                own[part] = dataclasses.replace(own.get(part, getattr(self, part)), **values)
        return dataclasses.replace(self, **own)

    def to_json(self) -> str:
        data = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        if self.quantization is None:
            del data["quantization"]  # programs from before there was any read the file, too
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "config") -> "Config":
        """Parse what `to_json` wrote. Unknown or missing kinds, keys and values are errors that name `where`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise MlxSfError(f"{where}: the configuration inside is not valid JSON ({e})") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise MlxSfError(f"{where}: not an mlx-sf checkpoint (its configuration does not say {FORMAT!r})")
        version = data.pop("version", None)
        if version != FORMAT_VERSION:
            raise MlxSfError(f"{where}: format version {version!r}, this program reads {FORMAT_VERSION}: update mlx-sf")
        for part, kind in (("model", ModelConfig), ("flow", FlowConfig), ("sample", SampleConfig)):
            data[part] = _from_mapping(kind, data.get(part, {}), f"{where}: {part}")
        if data.get("quantization") is not None:
            data["quantization"] = _from_mapping(QuantizationConfig, data["quantization"], f"{where}: quantization")
        for part in ("weights", "class_names"):
            if part in data:
                _require(isinstance(data[part], list), part, data[part], "a list")
                data[part] = tuple(data[part])
        return _from_mapping(cls, data, where)


FORMAT = "mlx-sf checkpoint"
FORMAT_VERSION = 1
_T = TypeVar("_T")


def _from_mapping(kind: type[_T], values: Any, where: str) -> _T:
    if not isinstance(values, dict):
        raise MlxSfError(f"{where}: configuration is {type(values).__name__}, want an object")
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise MlxSfError(f"{where}: unknown configuration entry {unknown[0]!r}: written by a newer mlx-sf?")
    try:
        return kind(**values)
    except TypeError as e:
        raise MlxSfError(f"{where}: configuration does not fit ({e})") from None
    except MlxSfError as e:
        raise MlxSfError(f"{where}: {e}") from None


@dataclass(frozen=True)
class Size:
    """A network size. `patches` are the published patch sizes (any divisor of the image works)."""

    depth: int
    hidden_size: int
    num_heads: int
    bottleneck_dim: int
    in_context_len: int
    in_context_start: int
    patches: tuple[int, ...] = ()


SIZES: dict[str, Size] = {
    # ours, for one laptop
    "nano": Size(4, 128, 2, 64, 8, 1),
    "tiny": Size(6, 192, 3, 64, 16, 2),
    "small": Size(12, 384, 6, 128, 32, 4),
    # published
    "B": Size(12, 768, 12, 128, 32, 4, (8, 16, 32)),
    "L": Size(24, 1024, 16, 128, 32, 8, (16, 32)),
    "H": Size(32, 1280, 16, 256, 32, 10, (16, 32)),
    "700M": Size(36, 1024, 16, 128, 32, 12, (32,)),
    "2B": Size(27, 2048, 32, 256, 32, 9, (32,)),
    "7B": Size(24, 4096, 64, 512, 32, 8, (32,)),
}
_UNSUFFIXED = ("700M", "2B", "7B")  # published under a name without the patch size


def preset_name(size: str, patch_size: int) -> str:
    """Name of a preset as the published code spells it: JiT-B/32, JiT-700M."""
    return f"JiT-{size}" if size in _UNSUFFIXED and patch_size == 32 else f"JiT-{size}/{patch_size}"


def find_size(name: str) -> tuple[str, int | None]:
    """Size and, if the name carries one, patch size: "B/32" or "JiT-B/32" -> ("B", 32); "small" -> ("small", None)."""
    text = name.removeprefix("JiT-").removeprefix("jit-")
    size, _, patch = text.partition("/")
    match = next((s for s in SIZES if s.lower() == size.lower()), None)
    if match is None or (patch and not patch.isdigit()):
        raise MlxSfError(f"size {name!r} is unknown, want one of {', '.join(SIZES)} (with /PATCH if you like)")
    if match in _UNSUFFIXED and not patch and text != name:
        return match, 32
    return match, int(patch) if patch else None


def model_config(size: str, patch_size: int | None = None, img_size: int = 256, **changes: Any) -> ModelConfig:
    """The `ModelConfig` of a size by name ("small", "B/32", "JiT-700M"), with other fields changed as given."""
    found, own_patch = find_size(size)
    s = SIZES[found]
    values = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name != "patches"}
    return ModelConfig(img_size=img_size, patch_size=patch_size or own_patch or 32, **{**values, **changes})
