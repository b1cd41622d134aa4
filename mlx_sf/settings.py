"""Every option of a training run, in one place: its default, its help text, its flag and its YAML key.

`mlx-sf train` builds its flags from these fields, `--config FILE.yaml` uses their names, and a run's `config.yaml` is
this record with every open choice resolved. A default of None means that `resolve` decides from the others.
"""

# ruff: noqa: RUF009 - `_option` is `dataclasses.field` under a shorter name

import contextlib
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from . import device
from .config import (
    SIZES,
    Config,
    FlowConfig,
    HybridMode,
    ModelConfig,
    PredParam,
    SampleConfig,
    ScaleSchedule,
    find_size,
    model_config,
    preset_name,
)
from .errors import MlxSfError
from .flow import published_noise_scale
from .optim import LRSchedule
from .pictures import Decode

DTypeName = Literal["float32", "bfloat16", "float16"]
Tracker = Literal["wandb", "tensorboard"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Options of a run; flags are the names with dashes. Sections in the order of the help page."""

    # the network
    size: str = _option("small", "Network size: " + ", ".join(SIZES) + "; B/32 also sets the patch.")
    patch: int | None = _option(None, "Patch side in pixels. [default: 32]")
    img_size: int | None = _option(None, "Image side in pixels. [default: 8 patches]")
    vanilla: bool = _option(False, "Plain JiT, without Spectral Forcing.")
    window_size: int = _option(0, "Side of the forcing's windows in pixels; 0 is the whole image.")
    scale_schedule: ScaleSchedule = _option(
        "linear", "How the forcing's cutoff opens with t; linear is the published one."
    )
    fixed_scale: float = _option(1.0, "The schedule's value where it is fixed, 0 to 1.")
    schedule_power: float = _option(1.0, "Exponent of the schedule where it is power: t to this power.")
    schedule_cutoffs: str | None = _option(
        None, "Cutoff radii at equal steps of t, where the schedule is data: 0.1,0.4,1 or a file (text or JSON)."
    )
    exact_end: bool = _option(False, "Renormalise the forcing's mask to be exactly 1 at t = 1.")
    attn_dropout: float = _option(0.0, "Dropout on attention weights, in the middle half of the blocks.")
    proj_dropout: float = _option(0.0, "Dropout on attention outputs and in the feed-forward, in the middle half.")
    init: str | None = _option(None, "Start from this checkpoint's weights (other classes and image sizes are fine).")
    init_weights: str | None = _option(None, "Weight set of --init. [default: ema1]")
    # the flow
    pred_param: PredParam = _option("x", "What the network predicts.")
    hybrid_x_weight_mode: HybridMode = _option("one_minus_t", "Blend of the hybrid's two heads.")
    hybrid_x_weight_power: float = _option(1.0, "Power of that blend.")
    hybrid_x_weight_min: float = _option(0.0, "Lower bound of that blend.")
    hybrid_x_weight_max: float = _option(1.0, "Upper bound of that blend.")
    noise_scale: float | None = _option(None, "Standard deviation of the noise. [default: 1, above 256 pixels H/256]")
    p_mean: float = _option(-0.8, "Mean of the logit of t.")
    p_std: float = _option(0.8, "Standard deviation of the logit of t.")
    t_eps: float = _option(0.05, "Lower bound of 1 - t in velocities.")
    label_drop_prob: float = _option(0.1, "Share of labels replaced by no class, for guidance.")
    # the data
    data: str | None = _option(
        None, "Folder (a folder per class, or flat), data set file, or Hub name. [default: scenes]"
    )
    split: str = _option("train", "Split of a data set.")
    image_column: str | None = _option(None, "Image column of a data set. [default: found]")
    label_column: str | None = _option(None, "Label column of a data set. [default: found]")
    streaming: bool = _option(False, "Read a data set as a stream instead of storing it.")
    epoch_size: int | None = _option(None, "Pictures in an epoch, of scenes or a stream.")
    num_classes: int | None = _option(None, "Classes of a stream that does not say.")
    decode: Decode = _option("upright", "Apply EXIF rotation and lay transparency over white, or ignore both.")
    cache: str | None = _option(None, "Folder for a one-time cache of the cropped pictures.")
    flip: bool = _option(True, "Mirror pictures at random.")
    workers: int | None = _option(None, "Decoding threads. [default: cores, at most 8]")
    # the optimiser
    batch_size: int = _option(32, "Images in a step, over all processes and micro-batches.")
    epochs: float | None = _option(None, "Length of the run in epochs. [default: 200 for published sizes, else 50]")
    steps: int | None = _option(None, "Length of the run in steps, instead of epochs.")
    lr: float | None = _option(None, "Peak learning rate. [default: from --blr; nano, tiny 1e-3, small 5e-4]")
    blr: float | None = _option(None, "Peak rate for a batch of 256; lr = blr * batch / 256. [default: 5e-5]")
    warmup_epochs: float | None = _option(None, "Linear warm-up. [default: 5, at most a tenth of the run]")
    lr_schedule: LRSchedule = _option("constant", "After the warm-up.")
    min_lr: float = _option(0.0, "Floor of the cosine.")
    weight_decay: float = _option(0.0, "Decoupled; biases and vectors never decay.")
    beta1: float = _option(0.9, "AdamW's first beta.")
    beta2: float = _option(0.95, "AdamW's second beta.")
    clip_grad: float = _option(0.0, "Bound of the gradients' norm; 0 is none.")
    ema_decay1: float | None = _option(
        None, "Decay of the first average, the one sampled. [default: 0.9999; ours 0.999]"
    )
    ema_decay2: float | None = _option(None, "Decay of the second average. [default: 0.9996; ours 0.9999]")
    ema_warmup: bool | None = _option(None, "Shorter averages at first. [default: off for published sizes]")
    # the machine
    seed: int = _option(0, "Seed of weights, order, flips, noise, times.")
    dtype: DTypeName | None = _option(None, "Of the matrix products. [default: bfloat16 on a GPU, else float32]")
    compile: bool | None = _option(
        None, "Compile the step. [default: on a GPU; on a CPU from 500 steps on, as the compiler first takes a minute]"
    )
    grad_checkpoint: bool = _option(
        False, "Recompute activations in the backward pass: half the memory, a third slower."
    )
    accumulate: int = _option(1, "Micro-batches that a batch is split into, to save memory.")
    # the run
    output: str = _option("runs", "Folder of all runs.")
    name: str | None = _option(
        None, "Name of the run; the same name again continues it. [default: from model and data]"
    )
    save_every: int = _option(500, "Steps between checkpoints.")
    save_minutes: float = _option(15.0, "Save also when this much time has passed since the last save; 0 is never.")
    keep: int = _option(2, "Checkpoints to keep, newest first; 0 keeps all.")
    log_every: int = _option(10, "Steps between lines in metrics.jsonl.")
    preview_every: int = _option(500, "Steps between preview pictures; 0 is never.")
    preview_images: int = _option(10, "Pictures in a preview.")
    preview_steps: int = _option(20, "Solver steps of a preview.")
    cfg: float = _option(1.0, "Guidance of previews, and the checkpoint's default for sampling; 1 is off.")
    report_to: Tracker | None = _option(None, "Also log to a tracker.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), KINDS[f.name]))
        for name in ("batch_size", "accumulate", "save_every", "log_every", "preview_images", "preview_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "epoch_size", "num_classes", "workers", "patch", "img_size"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "blr", "epochs"):
            _require(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("keep", "save_minutes", "preview_every", "weight_decay", "clip_grad", "min_lr"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("beta1", "beta2", "ema_decay1", "ema_decay2"):
            _require(0 <= (getattr(self, name) or 0) < 1, name, getattr(self, name), "from 0 to below 1")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2^31 - 1")
        _require(self.batch_size % self.accumulate == 0, "accumulate", self.accumulate, "a divisor of batch-size")
        if self.steps is not None and self.epochs is not None:
            raise MlxSfError("--steps and --epochs: both are given, want one of them")
        try:  # before data is opened
            ModelConfig(**self.schedule())
        except MlxSfError as e:
            name, complaint = str(e).removeprefix("config: ").split(" ", 1)
            raise MlxSfError(f"{flag(name)} {complaint.replace('scale_schedule', flag('scale_schedule'))}") from None

    def schedule(self) -> dict[str, Any]:
        """The forcing's schedule as fields of `ModelConfig`."""
        names = ("scale_schedule", "fixed_scale", "schedule_power", "exact_end")
        cutoffs = read_cutoffs(self.schedule_cutoffs or "")
        return {"schedule_cutoffs": cutoffs, **{name: getattr(self, name) for name in names}}

    def replace(self, **changes: Any) -> "Settings":
        return dataclasses.replace(self, **changes)


# options that may differ when a run is continued: they do not touch what the steps so far have computed
CHANGEABLE = {
    "epochs", "steps", "workers", "cache", "data", "output", "name", "save_every", "save_minutes", "keep", "log_every",
    "preview_every", "preview_images", "preview_steps", "cfg", "report_to",
}  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(ok: bool, name: str, got: Any, want: str) -> None:
    if not ok:
        raise MlxSfError(f"{flag(name)} is {got}, want {want}")


def _typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value in its option's type. YAML reads 1e-4 as text and 1 as a whole number; both are meant as floats."""
    if value is None and type(None) in kinds:
        return None
    if name == "schedule_cutoffs":  # kept as numbers, whatever happens to the file
        return ",".join(map(repr, read_cutoffs(value)))
    choices = [c for k in kinds for c in typing.get_args(k)]
    if choices:
        _require(value in choices, name, repr(value), "one of " + ", ".join(choices))
        return value
    kind = kinds[0]
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    ok = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    want = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]
    _require(ok and kind in (bool, str), name, repr(value), want)
    return value


def read_cutoffs(value: Any) -> tuple[float, ...]:
    """Cutoff radii from "0.1,0.4,1", from a list of numbers, or from a file.

    A file holds numbers between blanks, commas or line ends, or JSON: a list, or an object whose "schedule_cutoffs"
    is one. Only the numbers' being numbers is checked here; `config.ModelConfig` checks what they say.
    """
    where, found = flag("schedule_cutoffs"), value
    if isinstance(value, str) and not _CUTOFF_LIST.fullmatch(value):
        where = f"{where} {value}"
        try:
            found = Path(value).expanduser().read_text()
        except (OSError, UnicodeDecodeError, ValueError) as e:
            reason = getattr(e, "strerror", None) or "not text"
            raise MlxSfError(
                f"{where}: is no list of numbers and no readable file ({reason}), want 0.1,0.4,1"
            ) from None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(found)
    if isinstance(found, dict):
        found = found.get("schedule_cutoffs")
    if isinstance(found, str):
        found = found.replace(",", " ").split()
    elif isinstance(found, int | float):
        found = [found]
    try:
        return tuple(float(v) for v in found)
    except (TypeError, ValueError, OverflowError):
        raise MlxSfError(f"{where}: holds something else than numbers, want radii like 0.1,0.4,1") from None


# digits, signs, exponents, "nan" and "inf" (refused later, by name) between commas or blanks: no name of a file
_CUTOFF_LIST = re.compile(r"\s*([-+.\deE]+|nan|[-+]?inf)?([\s,]+([-+.\deE]+|nan|[-+]?inf))*[\s,]*")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


KINDS: dict[str, tuple[Any, ...]] = {n: _kinds(a) for n, a in typing.get_type_hints(Settings).items()}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file (dashes or underscores); an unknown one is an error that names the nearest."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise MlxSfError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise MlxSfError(f"{path}: holds no options, want lines like 'batch-size: 64'")
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name == "data_fingerprint":  # a run's own config.yaml serves as a recipe, too
            continue
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, 1)
            hint = f": did you mean {near[0]!r}?" if near else ": see mlx-sf train --help"
            raise MlxSfError(f"{path}: unknown option {key!r}{hint}")
        found[name] = value
    return found


def typed_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given (not None), each in its type."""
    return {name: _typed(name, value, KINDS[name]) for name, value in values.items() if value is not None}


def resolve(settings: Settings, steps_per_epoch: int) -> Settings:
    """The settings with every open choice of the optimiser, the machine and the run's length made."""
    s = settings
    published = find_size(s.size)[0] not in ("nano", "tiny", "small")
    fill: dict[str, Any] = {}
    if s.steps is None:
        fill["epochs"] = s.epochs or (200.0 if published else 50.0)
        fill["steps"] = max(1, round(fill["epochs"] * steps_per_epoch))
        fill["epochs"] = None
    steps = s.steps or fill["steps"]
    if s.lr is None:
        ours = {"nano": 1e-3, "tiny": 1e-3, "small": 5e-4}.get(find_size(s.size)[0])
        fill["lr"] = (s.blr or 5e-5) * s.batch_size / 256 if s.blr or ours is None else ours
    if s.warmup_epochs is None:
        fill["warmup_epochs"] = min(5.0, 0.1 * steps / steps_per_epoch)
    decays = (0.9999, 0.9996) if published else (0.999, 0.9999)
    for name, value in (("ema_decay1", decays[0]), ("ema_decay2", decays[1]), ("ema_warmup", not published)):
        if getattr(s, name) is None:
            fill[name] = value
    fill["dtype"] = s.dtype or device.default_dtype()
    fill["compile"] = s.compile if s.compile is not None else device.on_gpu() or steps >= 500
    return s.replace(**fill)


def image_geometry(settings: Settings) -> tuple[int, int]:
    """(patch side, image side) of a run that does not start from a checkpoint."""
    patch = settings.patch or find_size(settings.size)[1] or 32
    return patch, settings.img_size or 8 * patch


def checkpoint_config(settings: Settings, class_names: tuple[str, ...], base: Config | None = None) -> Config:
    """What the run's checkpoints will say about themselves; `base` is the configuration of --init's checkpoint."""
    s, k = settings, len(class_names)
    forcing: dict[str, Any] = {
        "spectral_forcing": not s.vanilla,
        "window_size": s.window_size,
        **s.schedule(),
        "attn_dropout": s.attn_dropout,
        "proj_dropout": s.proj_dropout,
        "out_channels": 6 if s.pred_param == "hybrid" else 3,
        "num_classes": k,
    }
    model: ModelConfig
    if base is not None:
        model = dataclasses.replace(base.model, **forcing, img_size=s.img_size or base.model.img_size)
        name = base.name
    else:
        patch, img_size = image_geometry(s)
        model = model_config(s.size, patch, img_size, **forcing)
        name = preset_name(find_size(s.size)[0], patch)
    flow = FlowConfig(
        pred_param=s.pred_param,
        hybrid_x_weight_mode=s.hybrid_x_weight_mode,
        hybrid_x_weight_power=s.hybrid_x_weight_power,
        hybrid_x_weight_min=s.hybrid_x_weight_min,
        hybrid_x_weight_max=s.hybrid_x_weight_max,
        noise_scale=s.noise_scale or published_noise_scale(model.img_size),
        t_eps=s.t_eps,
        P_mean=s.p_mean,
        P_std=s.p_std,
        label_drop_prob=s.label_drop_prob,
    )
    return Config(model, flow, SampleConfig(cfg=s.cfg), name, ("model", "ema1", "ema2"), class_names)


def apply_base(given: Mapping[str, Any], base: Config) -> dict[str, Any]:
    """The options for --init: its checkpoint decides what is not given, and the network's size and patch for good."""
    m, f = base.model, base.flow
    if given.get("patch", m.patch_size) != m.patch_size:
        raise MlxSfError(f"--patch is {given['patch']}, but the network of --init has {m.patch_size}: leave it out")
    if "size" in given:
        raise MlxSfError("--size: the network of --init cannot change its size: leave it out")
    kept = {
        "patch": m.patch_size,
        "img_size": m.img_size,
        "vanilla": not m.spectral_forcing,
        "window_size": 0 if m.window_size == m.img_size else m.window_size,
        "scale_schedule": m.scale_schedule,
        "fixed_scale": m.fixed_scale,
        **_schedule_of_base(given, m),
        "exact_end": m.exact_end,
        "attn_dropout": m.attn_dropout,
        "proj_dropout": m.proj_dropout,
        **{flow.name.lower(): getattr(f, flow.name) for flow in dataclasses.fields(f)},
        "cfg": base.sample.cfg,
    }
    if given.get("img_size", m.img_size) != m.img_size:
        kept["noise_scale"] = None  # follows the image size
    return {**kept, **given}


def _schedule_of_base(given: Mapping[str, Any], m: ModelConfig) -> dict[str, Any]:
    """What belongs to the schedule of --init's checkpoint, and goes with it where another one is asked for."""
    if given.get("scale_schedule", m.scale_schedule) != m.scale_schedule:
        return {"schedule_power": 1.0, "schedule_cutoffs": None}
    listed = ",".join(map(repr, m.schedule_cutoffs))
    return {"schedule_power": m.schedule_power, "schedule_cutoffs": listed or None}
