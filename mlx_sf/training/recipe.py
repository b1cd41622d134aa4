"""What a run is, all of it decided: made from the options once the data is open, and read by everything after that."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..checkpoints.config import Config
from ..data.loader import steps_per_epoch
from ..data.sources import DataOptions, Source
from ..device import defaults as device
from ..errors import MlxSfError, option
from ..flow import FlowConfig, published_noise_scale
from ..models.jit_sizes import find_size, model_config, preset_name
from ..sampling.solvers import SampleConfig
from ..spectral import ForcingConfig
from .optimizer import OptimizerOptions
from .options import KINDS, DTypeName, Options, part
from .step import SETS

# the recipe published with MiniT2I's adapters
_LORA_STEPS, _LORA_RATE = 400, 5e-4
_LORA: dict[str, Any] = {
    "lora_rank": 32, "warmup_epochs": 0.0, "beta2": 0.999, "clip_grad": 1.0, "label_drop_prob": 0.0,
}  # fmt: skip
_OURS = {"nano": 1e-3, "tiny": 1e-3, "small": 5e-4}  # sizes that were never published -> their learning rate


@dataclass(frozen=True)
class MachineOptions:
    """How a step is computed: these change results by rounding at most. `workers` 0 is one per core, at most 8."""

    dtype: DTypeName
    compile: bool
    grad_checkpoint: bool = False
    accumulate: int = 1
    workers: int = 0


@dataclass(frozen=True)
class ReportOptions:
    """What a run writes and when; never what it computes. 0 is never; `keep` 0 keeps all; `report_to` "" is nowhere."""

    save_every: int
    save_minutes: float
    keep: int
    log_every: int
    preview_every: int
    preview_images: int
    preview_steps: int
    report_to: str = ""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    `config` is what its checkpoints say about themselves: the network with its `ForcingConfig`, the `FlowConfig`, the
    class names. `fingerprint` identifies the data. `options` are the options with every open choice made, which
    `config.yaml` keeps: the same data and `decide` give the same recipe from them.
    """

    options: Options
    config: Config
    data: DataOptions
    fingerprint: str
    optimizer: OptimizerOptions
    machine: MachineOptions
    reports: ReportOptions
    batch_size: int
    steps: int
    steps_per_epoch: int
    seed: int
    flip: bool

    @property
    def dropout(self) -> bool:
        """Whether steps draw keys for dropout."""
        return self.options.attn_dropout > 0 or self.options.proj_dropout > 0

    def epoch(self, step: int) -> float:
        """Epochs that `step` steps are."""
        return step / self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        return self.optimizer.rate(self.epoch(step), self.epoch(self.steps))


def decide(options: Options, source: Source, base: Config | None = None, stored: Config | None = None) -> Recipe:
    """The recipe of a run on `source`, whose pictures have the size that the options ask for.

    `base` is the configuration of the checkpoint that a run starts from; `stored` that of a run which is continued,
    whose network and flow stay as they are.
    """
    batch_size = options.batch_size or (4 if options.lora else 32)
    per_epoch = steps_per_epoch(len(source), batch_size)
    default_epochs = 50.0 if find_size(options.size)[0] in _OURS else 200.0
    if options.lora:
        default_epochs = _LORA_STEPS / per_epoch
    steps = options.steps or max(1, round((options.epochs or default_epochs) * per_epoch))
    o = _open_choices_made(dataclasses.replace(options, batch_size=batch_size), batch_size, steps, per_epoch)
    config = stored or _new_config(o, source, base)
    return Recipe(
        options=o,
        config=dataclasses.replace(config, sample=dataclasses.replace(config.sample, cfg=o.cfg)),
        data=part(DataOptions, o),
        fingerprint=source.fingerprint(),
        optimizer=part(OptimizerOptions, o),
        machine=part(MachineOptions, o),
        reports=part(ReportOptions, o),
        batch_size=batch_size,
        steps=steps,
        steps_per_epoch=per_epoch,
        seed=o.seed,
        flip=o.flip,
    )


def _open_choices_made(o: Options, batch_size: int, steps: int, per_epoch: int) -> Options:
    """The options with every choice made that they leave open; made twice, they stay the same."""
    size = find_size(o.size)[0]
    rate = _OURS.get(size) if o.blr is None else None
    decays = (0.999, 0.9999) if size in _OURS else (0.9999, 0.9996)
    choices: dict[str, Any] = {
        "lr": (o.blr or 5e-5) * batch_size / 256 if rate is None else rate,
        "warmup_epochs": min(5.0, 0.1 * steps / per_epoch),
        "beta2": OptimizerOptions.beta2,
        "clip_grad": OptimizerOptions.clip_grad,
        "label_drop_prob": FlowConfig.label_drop_prob,
        "ema_decay1": decays[0],
        "ema_decay2": decays[1],
        "ema_warmup": size in _OURS,
        "dtype": device.default_dtype(),
        "compile": device.on_gpu() or steps >= 500,
        "img_size": o.image_geometry()[1],
    }
    if o.lora:
        choices |= (
            _LORA | ({} if o.blr else {"lr": _LORA_RATE}) | {"lora_alpha": float(o.lora_rank or _LORA["lora_rank"])}
        )
    still_open = {name: value for name, value in choices.items() if getattr(o, name) is None}
    return dataclasses.replace(o, **still_open, steps=steps, epochs=None)


def _new_config(o: Options, source: Source, base: Config | None) -> Config:
    """What the checkpoints of a new run will say about themselves."""
    patch, img_size = o.image_geometry()
    network = {
        "forcing": None if o.vanilla else o.forcing(base.model.forcing if base else None),
        "attn_dropout": o.attn_dropout,
        "proj_dropout": o.proj_dropout,
        "out_channels": 6 if o.pred_param == "hybrid" else 3,
        "num_classes": len(source.class_names),
    }
    if base is not None:
        model, name = dataclasses.replace(base.model, img_size=img_size, **network), base.name
    else:
        model, name = model_config(o.size, patch, img_size, **network), preset_name(find_size(o.size)[0], patch)
    return Config(
        model,
        o.flow(published_noise_scale(max(model.size))),
        SampleConfig(cfg=o.cfg),
        name,
        SETS,
        source.class_names,
        provenance={"trained_by": f"mlx-sf {__version__}", "data": source.describe()},
    )


def options_from(base: Config, given: Mapping[str, Any]) -> Options:
    """The options of a run that starts from a checkpoint of configuration `base`: it decides what is not given.

    Its network's size and patch are kept for good.
    """
    m, old = base.model, base.model.forcing or ForcingConfig()
    if given.get("patch", m.patch_size) != m.patch_size:
        its = f"the network of {option('init')} has {m.patch_size}"
        raise MlxSfError(f"{option('patch')} is {given['patch']}, but {its}: leave it out")
    if "size" in given:
        raise MlxSfError(f"{option('size')}: the network of {option('init')} cannot change its size: leave it out")
    if given.get("scale_schedule", old.scale_schedule) != old.scale_schedule:
        # what belongs to the old schedule goes with it
        old = dataclasses.replace(old, scale_schedule="linear", schedule_power=1.0, schedule_cutoffs=())
    kept = {
        **{f.name: getattr(old, f.name) for f in dataclasses.fields(old) if f.name in KINDS},
        **{f.name.lower(): getattr(base.flow, f.name) for f in dataclasses.fields(base.flow)},
        "schedule_cutoffs": old.schedule_cutoffs or None,
        "vanilla": m.forcing is None,
        "patch": m.patch_size,
        "img_size": m.img_size,
        "attn_dropout": m.attn_dropout,
        "proj_dropout": m.proj_dropout,
        "cfg": base.sample.cfg,
    }
    if given.get("lora"):
        kept["label_drop_prob"] = None  # of another recipe
    if given.get("img_size", m.img_size) != m.img_size:
        kept["noise_scale"] = None  # follows the image size
    return Options(**{**kept, **given})
