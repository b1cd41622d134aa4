"""What a checkpoint says about itself: one envelope around the configurations of network, flow and sampling.

A `Config` travels whole: it is written into every checkpoint as JSON and is all that is needed to rebuild the network
and repeat its sampling. Each part lies beside what it configures; this file owns the JSON and its versions.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.fields import check_types, from_mapping, require
from ..errors import MlxSfError, option
from ..flow import FlowConfig
from ..models import architecture
from ..models.lora import LoRAConfig
from ..models.quantize import QuantizationConfig
from ..sampling.solvers import SampleConfig
from ..spectral import ForcingConfig

FORMAT = "mlx-sf checkpoint"
VERSION = 2


@dataclass(frozen=True)
class AdapterInfo:
    """The adapter that a checkpoint holds instead of a network's weights, and the weights that it belongs to.

    `base` names their checkpoint, `weights` the set in it; `fingerprint` (`Checkpoint.fingerprint`) tells them from
    others.
    """

    lora: LoRAConfig
    base: str
    weights: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_types(self)

    def __str__(self) -> str:
        return f"{self.lora}, of {self.base} ({self.weights})"

    @property
    def base_name(self) -> str:
        """`base` without the folders that it lies in on this machine."""
        path = Path(self.base)
        return path.name if path.is_absolute() else self.base


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint says about itself.

    `model` is the configuration of a network of `models.ARCHITECTURES`. `weights` names the weight sets in the file
    ("model", "ema1", "ema2"); `class_names` may be empty; `provenance` is free text for people: where the weights came
    from. `quantization` is None where all weights are floats, `adapter` where they are a whole network's. Raises
    `FieldError` where the parts do not fit together.
    """

    model: Any
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    name: str = "custom"
    weights: tuple[str, ...] = ("model",)
    class_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    adapter: AdapterInfo | None = None

    def __post_init__(self) -> None:
        want, channels = 6 if self.flow.pred_param == "hybrid" else 3, self.model.out_channels
        require(channels == want, "out_channels", channels, f"{want} with pred_param {self.flow.pred_param}")
        for part, where in ((self.weights, "weights"), (self.class_names, "class_names")):
            require(all(isinstance(s, str) for s in part), where, part, "a list of strings")
        require(len(self.weights) >= 1, "weights", self.weights, "at least one weight set")
        n, k = len(self.class_names), self.model.num_classes
        require(n in (0, k), "class_names", f"{n} names", f"{k} or none")
        if self.quantization is not None:
            self.quantization.check(architecture(self.model))
            require(self.adapter is None, "quantization", self.quantization, "none of an adapter")

    def at(self, height: int | None = None, width: int | None = None) -> "Config":
        """The same for pictures of another size, with the noise that goes with it; None leaves a side as it is.

        Raises `MlxSfError` where the network draws its own size only.
        """
        kind, own = architecture(self.model), self.model.size
        size = own[0] if height is None else height, own[1] if width is None else width
        if size == own:
            return self
        if kind.resized is None:
            raise MlxSfError(
                f"{option('height')}, {option('width')}: {size[0]} x {size[1]} pixels, but {self.name} draws "
                f"{own[0]} x {own[1]} only: leave them out"
            )
        model = kind.resized(self.model, size)
        scale = self.flow.noise_scale if kind.noise_at is None else kind.noise_at(model)
        return dataclasses.replace(self, model=model, flow=dataclasses.replace(self.flow, noise_scale=scale))

    def forced(self) -> "Config":
        """The same network with the published Spectral Forcing put in front of it, which it was not trained with."""
        if self.model.forcing is not None:
            raise MlxSfError(f"{self.name}: has Spectral Forcing already: leave out {option('forcing')}")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, forcing=ForcingConfig()))

    def to_json(self) -> str:
        """The text that `from_json` reads, version 2."""
        data = {"format": FORMAT, "version": VERSION, "architecture": self.model.architecture}
        data |= dataclasses.asdict(self)
        for part in ("quantization", "adapter"):
            if data[part] is None:
                del data[part]
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "config") -> "Config":
        """Parse what `to_json` wrote, or version 1. Unknown kinds, keys and values are errors that name `where`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise MlxSfError(f"{where}: the configuration inside is not valid JSON ({e})") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise MlxSfError(f"{where}: not an mlx-sf checkpoint (its configuration does not say {FORMAT!r})")
        version = data.pop("version", None)
        if version == 1:
            data = _from_version_1(data)
        elif version != VERSION:
            raise MlxSfError(f"{where}: format version {version!r}, this program reads 1 and {VERSION}: update mlx-sf")
        try:
            kind = architecture(str(data.pop("architecture", None)))
        except MlxSfError as e:
            raise MlxSfError(f"{where}: {e.message}") from None
        data["model"] = from_mapping(kind.config, data.get("model", {}), f"{where}: model")
        for part in ("weights", "class_names"):
            if part in data:
                require(isinstance(data[part], list), part, data[part], "a list")
                data[part] = tuple(data[part])
        return from_mapping(cls, data, where)


# fields of the forcing, which version 1 held among the network's
_FORCING_1 = (
    "window_size", "scale_schedule", "fixed_scale", "mask_sharpness", "min_keep", "max_keep",
    "schedule_power", "schedule_cutoffs", "exact_end",
)  # fmt: skip


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Version 1 (mlx-sf 0.1 and 0.2) as version 2: one network, its forcing among its own fields.

    A vanilla network had a schedule, too, which meant nothing.
    """
    model = data.get("model", {})
    if isinstance(model, dict):
        model = dict(model)
        forcing = {name: model.pop(name) for name in _FORCING_1 if name in model}
        forced = model.pop("spectral_forcing", True)
        if not isinstance(forced, bool):
            model["spectral_forcing"] = forced  # refused by name
        else:
            model["forcing"] = forcing if forced else None
    return {**data, "architecture": "jit", "model": model}
