"""What a run is, all of it decided: made from the options once the data is open, and read by everything after that."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from .. import __version__
from ..checkpoints.config import Config
from ..checkpoints.text_encoder import TextFeatures
from ..data.captioned_scenes import CAPTIONED_SCENES
from ..data.loader import steps_per_epoch
from ..data.sources import DataOptions, Source
from ..device import defaults as device
from ..errors import FieldError, MlxSfError, option
from ..flow import FlowConfig, published_noise_scale
from ..models import Architecture, architecture
from ..models.jit_sizes import find_size
from ..models.text import TextConfig, split_words
from ..sampling.solvers import SampleConfig
from ..spectral import ForcingConfig
from .optimizer import OptimizerOptions
from .options import KINDS, DTypeName, Options, TrainedArchitecture, part
from .step import SETS

# the recipe published with MiniT2I's adapters
_LORA_STEPS, _LORA_RATE = 400, 5e-4
_LORA: dict[str, Any] = {
    "lora_rank": 32, "warmup_epochs": 0.0, "beta2": 0.999, "clip_grad": 1.0, "label_drop_prob": 0.0,
}  # fmt: skip
WORDS = "words"  # a vocabulary of the captions' own in place of an encoder
_WORD_WIDTH, _WORD_PLACES = 128, 24
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
    preview_prompts: str = ""


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


def data_options(o: Options) -> DataOptions:
    """Which pictures, and whether their captions are read."""
    return part(DataOptions, o, captions=architecture(architecture_of(o)).reads_text)


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
        data=data_options(o),
        fingerprint=source.fingerprint(),
        optimizer=part(OptimizerOptions, o),
        machine=part(MachineOptions, o),
        reports=part(ReportOptions, o),
        batch_size=batch_size,
        steps=steps,
        steps_per_epoch=per_epoch,
        seed=o.seed,
        flip=bool(o.flip),
    )


def architecture_of(o: Options) -> str:
    """The network that options ask for."""
    return o.architecture or ("jit_text" if o.data == CAPTIONED_SCENES else "jit")


def _open_choices_made(o: Options, batch_size: int, steps: int, per_epoch: int) -> Options:
    """The options with every choice made that they leave open; made twice, they stay the same."""
    size, kind = find_size(o.size)[0], architecture_of(o)
    scenes = o.data == CAPTIONED_SCENES
    rate = _OURS.get(size) if o.blr is None else None
    decays = (0.999, 0.9999) if size in _OURS else (0.9999, 0.9996)
    choices: dict[str, Any] = {
        "architecture": kind,
        "vanilla": kind == "mmjit",
        "flip": kind == "jit",
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
    if architecture(kind).reads_text and not o.init:
        choices["text_encoder"] = WORDS if scenes else TextConfig.encoder
    still_open = {name: value for name, value in choices.items() if getattr(o, name) is None}
    return dataclasses.replace(o, **still_open, steps=steps, epochs=None)


def _new_config(o: Options, source: Source, base: Config | None) -> Config:
    """What the checkpoints of a new run will say about themselves."""
    patch, img_size = o.image_geometry()
    kind, size = architecture(str(o.architecture)), find_size(o.size)[0]
    network = _fitting(
        kind,
        {
            "forcing": None if o.vanilla else o.forcing(base.model.forcing if base else None),
            "attn_dropout": o.attn_dropout,
            "proj_dropout": o.proj_dropout,
            "out_channels": 6 if o.pred_param == "hybrid" else 3,
            "num_classes": len(source.class_names),
        },
    )
    if base is not None:
        model, name = dataclasses.replace(base.model, img_size=img_size, **network), base.name
    else:
        if kind.reads_text:
            network["text"] = text_config(o, source)
        assert kind.model_config is not None  # an option's choices are those that can be trained
        model, name = kind.model_config(size, patch, img_size, **network), kind.preset_name(size, patch)
    # an adapter leaves the network as it is, and prompts are guided at all times
    sample = SampleConfig(cfg=o.cfg, cfg_low=0.0 if kind.reads_text else SampleConfig.cfg_low)
    if base is not None and (o.lora or kind.reads_text):
        sample = base.sample
    return Config(
        model,
        o.flow(published_noise_scale(max(model.size))),
        sample,
        name,
        SETS,
        source.class_names,
        provenance={"trained_by": f"mlx-sf {__version__}", "data": source.describe()},
    )


def _fitting(kind: Architecture, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the network's settings that networks of this kind have; `FieldError` where another one is not usual."""
    usual = {"attn_dropout": 0.0, "proj_dropout": 0.0, "out_channels": 3}
    own = {f.name for f in dataclasses.fields(kind.config)}
    for name, value in wanted.items():
        if name not in own and value != usual.get(name, value):
            name, value = ("pred_param", "hybrid") if name == "out_channels" else (name, value)
            raise FieldError(name, value, f"another value: {kind.title} has no such part")
    return {name: value for name, value in wanted.items() if name in own}


def text_config(o: Options, source: Source) -> TextConfig:
    """What a new network reads of its captions."""
    if o.text_encoder == WORDS:
        words = vocabulary(source)
        return TextConfig("", _WORD_WIDTH, o.text_length or _WORD_PLACES, words)
    width = TextFeatures.width_of(str(o.text_encoder))
    return TextConfig(str(o.text_encoder), width, o.text_length or TextConfig.length)


def vocabulary(source: Any) -> tuple[str, ...]:
    """The words of a source's captions, in order. `MlxSfError` where they are not known beforehand."""
    known = getattr(source, "vocabulary", ()) or {w for c in source.captions() for w in split_words(c)}
    if not known:
        raise MlxSfError(
            f"{option('text_encoder')} {WORDS}: {source.describe()} does not know its captions beforehand: name a T5 "
            "encoder"
        )
    return tuple(sorted(known))


def options_from(base: Config, given: Mapping[str, Any]) -> Options:
    """The options of a run that starts from a checkpoint of configuration `base`: it decides what is not given.

    Its network's size and patch are kept for good.
    """
    m, old = base.model, base.model.forcing or ForcingConfig()
    if given.get("architecture", m.architecture) != m.architecture:
        its = f"{option('init')} holds a network of {m.architecture}"
        raise MlxSfError(f"{option('architecture')} is {given['architecture']}, but {its}: leave it out")
    if m.architecture not in get_args(TrainedArchitecture):
        raise MlxSfError(f"{option('init')}: {architecture(m).title} is distilled, and is not trained here")
    text = getattr(m, "text", None)
    if (
        "text_length" in given
        or (given.get("text_encoder") == WORDS)
        or (text and text.words and "text_encoder" in given)
    ):
        name = "text_length" if "text_length" in given else "text_encoder"
        raise MlxSfError(f"{option(name)}: the network of {option('init')} cannot change what it reads: leave it out")
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
        "architecture": m.architecture,
        "vanilla": m.forcing is None,
        "patch": m.patch_size,
        "img_size": m.img_size,
        **{name: getattr(m, name) for name in ("attn_dropout", "proj_dropout") if hasattr(m, name)},
        "cfg": base.sample.cfg,
    }
    if given.get("lora"):
        kept["label_drop_prob"] = None  # of another recipe
    if given.get("img_size", m.img_size) != m.img_size:
        kept["noise_scale"] = None  # follows the image size
    return Options(**{**kept, **given})
