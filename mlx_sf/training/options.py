"""Every option of a training run, in one place: its default, its help text, its flag and its YAML key.

`mlx-sf train` builds its flags from these fields, `--config FILE.yaml` uses their names, and a run's `config.yaml` is
this record with every open choice made. A default of None leaves the choice to the others (`recipe.decide`).
"""

# ruff: noqa: RUF009 - `_option` is `dataclasses.field` under a shorter name

import contextlib
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ..common.fields import require
from ..data.decode import Decode
from ..data.sources import DataOptions
from ..errors import FieldError, MlxSfError, option
from ..flow import FlowConfig, HybridMode, LossKind, PredParam
from ..models.jit_sizes import SIZES, find_size
from ..spectral import ForcingConfig, ScaleSchedule
from .optimizer import LRSchedule

DTypeName = Literal["float32", "bfloat16", "float16"]
TrainedArchitecture = Literal["jit", "jit_text", "mmjit"]
TrackerName = Literal["wandb", "tensorboard"]
_T = TypeVar("_T")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of a run as they were given; flags are the names with dashes. Sections in the order of the help page.

    Raises `FieldError` for a value that its option cannot hold.
    """

    # the network
    architecture: TrainedArchitecture | None = _option(
        None,
        "Network: jit, conditioned on classes; jit_text, the same on captions; mmjit, that of MiniT2I. [default: the "
        "one to start from; jit_text for captioned-scenes, else jit]",
    )
    size: str = _option("small", "Network size: " + ", ".join(SIZES) + "; B/32 also sets the patch.")
    patch: int | None = _option(None, "Side of the network's patches in pixels. [default: 32]")
    img_size: int | None = _option(None, "Side of the training images in pixels. [default: 8 patches]")
    vanilla: bool | None = _option(
        None, "Train a plain network, without Spectral Forcing. [default: with forcing; mmjit without, as published]"
    )
    text_encoder: str | None = _option(
        None,
        "What a network reads of a caption: a frozen T5 encoder (a folder, or a name on the Hugging Face Hub), or "
        "words, a vocabulary of the captions' own that is trained along. [default: words for captioned-scenes, else "
        "google/flan-t5-large]",
    )
    text_length: int | None = _option(None, "Text places of a network. [default: 256; 24 of words]")
    window_size: int = _option(
        ForcingConfig.window_size, "Side of the windows in pixels that the forcing filters one by one; 0 is the image."
    )
    scale_schedule: ScaleSchedule = _option(
        ForcingConfig.scale_schedule,
        "How the forcing's cutoff frequency opens from noise (t = 0) to data (t = 1); linear is the published one.",
    )
    fixed_scale: float = _option(
        ForcingConfig.fixed_scale, "Opening of the cutoff, 0 to 1, where the schedule is fixed."
    )
    schedule_power: float = _option(
        ForcingConfig.schedule_power, "Exponent p of the opening t^p, where the schedule is power."
    )
    schedule_cutoffs: str | None = _option(
        None, "Cutoff radii at equal steps of t, where the schedule is data: 0.1,0.4,1 or a file (text or JSON)."
    )
    exact_end: bool = _option(
        ForcingConfig.exact_end, "Scale the forcing's filter so that it passes everything at t = 1."
    )
    attn_dropout: float = _option(0.0, "Dropout of attention weights, in the middle half of the blocks.")
    proj_dropout: float = _option(
        0.0, "Dropout of attention outputs and in the feed-forward, in the middle half of the blocks."
    )
    init: str | None = _option(
        None, "Start from the weights of this checkpoint; it may have other classes or another image size."
    )
    init_weights: str | None = _option(
        None, "Weight set of the checkpoint to start from: model, ema1 or ema2. [default: ema1]"
    )
    lora: bool = _option(
        False, "Train a low-rank adapter beside the network of init, which stays as it is, by MiniT2I's recipe."
    )
    lora_rank: int | None = _option(None, "Rank of the adapter: larger learns more. [default: 32]")
    lora_alpha: float | None = _option(None, "The adapter's update is multiplied by alpha / rank. [default: the rank]")
    # the flow
    pred_param: PredParam = _option(
        FlowConfig.pred_param, "What the network predicts: the image (x), the velocity (v), or both (hybrid)."
    )
    hybrid_x_weight_mode: HybridMode = _option(
        FlowConfig.hybrid_x_weight_mode, "How the image's share in a hybrid prediction depends on t."
    )
    hybrid_x_weight_power: float = _option(
        FlowConfig.hybrid_x_weight_power, "Power that the image's share in a hybrid prediction is raised to."
    )
    hybrid_x_weight_min: float = _option(
        FlowConfig.hybrid_x_weight_min, "Lower bound of the image's share in a hybrid prediction."
    )
    hybrid_x_weight_max: float = _option(
        FlowConfig.hybrid_x_weight_max, "Upper bound of the image's share in a hybrid prediction."
    )
    noise_scale: float | None = _option(
        None, "Standard deviation of the noise. [default: 1 up to 256 pixels, above that pixels / 256]"
    )
    p_mean: float = _option(FlowConfig.P_mean, "Training times t are sigmoid(m + s * normal): this is m.")
    p_std: float = _option(FlowConfig.P_std, "Training times t are sigmoid(m + s * normal): this is s.")
    loss: LossKind = _option(
        FlowConfig.loss, "What is compared: velocities, or images (x0). The published losses compare velocities."
    )
    t_eps: float = _option(FlowConfig.t_eps, "Smallest value of 1 - t that velocities are divided by.")
    label_drop_prob: float | None = _option(
        None, "Share of images that train without their class, which guidance needs. [default: 0.1; 0 with lora]"
    )
    # the data
    data: str | None = _option(
        None,
        "Pictures: a folder (with a folder per class, or flat), a data set's file or folder, or a name on the Hugging "
        "Face Hub. [default: built-in scenes]",
    )
    split: str = _option(DataOptions.split, "Which split of a data set to read.")
    image_column: str | None = _option(None, "Column of a data set that holds the images. [default: found by type]")
    label_column: str | None = _option(None, "Column of a data set that holds the classes. [default: found by name]")
    caption_column: str | None = _option(None, "Column of a data set that holds the captions. [default: found by name]")
    streaming: bool = _option(DataOptions.streaming, "Read a Hub data set as it downloads, without storing it.")
    epoch_size: int | None = _option(
        None, "Pictures that count as an epoch, of built-in scenes or a stream. [default: 2560 scenes; all of a stream]"
    )
    num_classes: int | None = _option(None, "Number of classes, for a stream that does not say.")
    decode: Decode = _option(
        DataOptions.decode,
        "upright: turn photos as their camera says and lay transparency over white; reference: ignore both.",
    )
    cache: str | None = _option(
        None, "Folder that keeps the cropped pictures, so that each is decoded only once. [default: none]"
    )
    flip: bool | None = _option(
        None,
        "Mirror half of the pictures, chosen at random; never one whose caption says left or right. [default: on; off "
        "with captions]",
    )
    workers: int | None = _option(None, "Threads that decode pictures. [default: one per core, at most 8]")
    # the optimiser
    batch_size: int | None = _option(
        None,
        "Images in a training step, over all processes and micro-batches. [default: 32; 4 with lora, published: 16]",
    )
    epochs: float | None = _option(
        None, "Length of the run in epochs. [default: 200 for B and larger, 50 for others; 400 steps with lora]"
    )
    steps: int | None = _option(None, "Length of the run in steps, instead of epochs.")
    lr: float | None = _option(
        None, "Peak learning rate. [default: nano, tiny 1e-3; small, lora 5e-4; others from blr]"
    )
    blr: float | None = _option(
        None, "Peak learning rate for a batch of 256; other batches in proportion. [default: 5e-5]"
    )
    warmup_epochs: float | None = _option(
        None, "Epochs in which the learning rate rises from 0. [default: 5, at most a tenth of the run; 0 with lora]"
    )
    warmup_lr: float = _option(0.0, "Learning rate that the warm-up begins at. MiniT2I's code has 1e-6.")
    lr_schedule: LRSchedule = _option("constant", "Learning rate after the warm-up.")
    min_lr: float = _option(0.0, "Learning rate at the end of a cosine schedule.")
    weight_decay: float = _option(0.0, "Decoupled weight decay of AdamW; biases and norm weights never decay.")
    beta1: float = _option(0.9, "AdamW's decay of the gradients' mean.")
    beta2: float | None = _option(None, "AdamW's decay of the gradients' mean square. [default: 0.95; 0.999 with lora]")
    clip_grad: float | None = _option(
        None, "Largest norm of all gradients together; 0 is no bound. [default: 0; 1 with lora]"
    )
    ema_decay1: float | None = _option(
        None,
        "Decay of the first average of the weights, the one that samples are drawn from. [default: 0.9999 for B and "
        "larger, else 0.999]",
    )
    ema_decay2: float | None = _option(
        None, "Decay of the second average of the weights. [default: 0.9996 for B and larger, else 0.9999]"
    )
    ema_warmup: bool | None = _option(
        None, "Average over fewer steps early in the run. [default: off for B and larger, else on]"
    )
    # the machine
    seed: int = _option(0, "Seed of initial weights, picture order, mirroring, noise and times.")
    dtype: DTypeName | None = _option(
        None, "Number format of the matrix products. [default: bfloat16 on a GPU, else float32]"
    )
    compile: bool | None = _option(
        None,
        "Compile the training step. [default: on a GPU; on a CPU from 500 steps on, as compiling first takes a minute]",
    )
    grad_checkpoint: bool = _option(
        False, "Compute activations a second time instead of keeping them: half the memory, a third slower."
    )
    accumulate: int = _option(1, "Micro-batches that a batch is split into, to save memory.")
    # the run
    output: str = _option("runs", "Folder that holds the folders of all runs.")
    name: str | None = _option(
        None, "Name of the run; the same name again continues that run. [default: made from model and data]"
    )
    save_every: int = _option(500, "Steps between checkpoints.")
    save_minutes: float = _option(15.0, "Save also when so many minutes have passed since the last save; 0 is never.")
    keep: int = _option(2, "Checkpoints to keep, the newest ones; 0 keeps all.")
    log_every: int = _option(10, "Steps between lines in metrics.jsonl.")
    preview_every: int = _option(500, "Steps between preview pictures; 0 is never.")
    preview_images: int = _option(10, "Images in a row of a preview.")
    preview_prompts: str | None = _option(
        None, "File of the prompts that previews show, one a line. [default: captions of the data]"
    )
    preview_steps: int = _option(20, "Solver steps of a preview; more are slower and finer.")
    cfg: float = _option(1.0, "Guidance scale of previews, stored as the checkpoint's default for sampling; 1 is off.")
    report_to: TrackerName | None = _option(None, "Send metrics to a tracker, too. [default: none]")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, typed(f.name, getattr(self, f.name)))
        for name, want, ok in _BOUNDS:
            value = getattr(self, name)
            require(value is None or ok(value), name, value, want)
        require(
            self.batch_size is None or self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of {option('batch_size')}",
        )
        if self.steps is not None and self.epochs is not None:
            raise MlxSfError(f"{option('steps')} and {option('epochs')}: both are given, want one of them")
        if self.lora and self.init is None:
            raise MlxSfError(f"{option('lora')}: adapts trained weights: name their checkpoint with {option('init')}")
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) is not None and not self.lora:
                raise MlxSfError(f"{option(name)}: is of an adapter only: add {option('lora')}, or leave it out")
        self.forcing()  # refuses what does not fit together before data is opened
        self.flow()

    def forcing(self, base: ForcingConfig | None = None) -> ForcingConfig:
        """The forcing asked for; what is no option is as in `base`."""
        return part(ForcingConfig, self, base or ForcingConfig(), schedule_cutoffs=read_cutoffs(self.schedule_cutoffs))

    def flow(self, noise_scale: float = 1.0) -> FlowConfig:
        """The flow asked for, with `noise_scale` where none is."""
        try:
            return part(FlowConfig, self, FlowConfig(), noise_scale=self.noise_scale or noise_scale)
        except FieldError as e:
            raise FieldError(e.field.lower(), e.got, e.want) from None  # P_mean is the option p_mean

    def image_geometry(self) -> tuple[int, int]:
        """(patch side, image side) in pixels of a run that does not start from a checkpoint."""
        patch = self.patch or find_size(self.size)[1] or 32
        return patch, self.img_size or 8 * patch


def part(kind: type[_T], options: Options, base: _T | None = None, **decided: Any) -> _T:
    """The fields of a dataclass that options of the same name decide; the others as in `base` or by default.

    An option that is None leaves its field alone. `decided` are fields that more than one option has a say in.
    """
    own = {f.name: getattr(options, f.name.lower(), None) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {**{name: value for name, value in own.items() if value is not None}, **decided}
    return kind(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]


def _bounds() -> list[tuple[str, str, Any]]:
    """(name, what it may hold, test) of each option with bounds."""
    rules: list[tuple[str, str, Any]] = [
        (
            "batch_size accumulate save_every log_every preview_images preview_steps "
            "steps epoch_size num_classes workers patch img_size text_length lora_rank",
            "at least 1",
            lambda v: v >= 1,
        ),
        ("lr blr epochs noise_scale lora_alpha", "above 0", lambda v: v > 0),
        ("keep save_minutes preview_every weight_decay clip_grad min_lr warmup_lr", "0 or more", lambda v: v >= 0),
        ("beta1 beta2 ema_decay1 ema_decay2", "from 0 to below 1", lambda v: 0 <= v < 1),
        ("attn_dropout proj_dropout", "a probability below 1", lambda v: 0 <= v < 1),
        ("seed", "from 0 to 2^31 - 1", lambda v: 0 <= v < 2**31),
    ]
    return [(name, want, ok) for names, want, ok in rules for name in names.split()]


_BOUNDS = _bounds()

# options that may differ when a run is continued: they do not touch what the steps so far have computed
CHANGEABLE = {
    "epochs", "steps", "workers", "cache", "data", "output", "name", "save_every", "save_minutes", "keep", "log_every",
    "preview_every", "preview_images", "preview_prompts", "preview_steps", "cfg", "report_to",
}  # fmt: skip


def typed(name: str, value: Any) -> Any:
    """The value in its option's type. YAML reads 1e-4 as text and 1 as a whole number; both are meant as floats."""
    kinds = KINDS[name]
    if value is None and type(None) in kinds:
        return None
    if name == "schedule_cutoffs":  # kept as numbers, whatever happens to the file
        return ",".join(map(repr, read_cutoffs(value)))
    choices = [c for k in kinds for c in typing.get_args(k)]
    if choices:
        require(value in choices, name, value, "one of " + ", ".join(choices))
        return value
    kind = kinds[0]
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    want = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]
    require(kind in (bool, str) and isinstance(value, kind), name, value, want)
    return value


def read_cutoffs(value: Any) -> tuple[float, ...]:
    """Cutoff radii from "0.1,0.4,1", from a list of numbers, or from a file; none from None.

    A file holds numbers between blanks, commas or line ends, or JSON: a list, or an object whose "schedule_cutoffs"
    is one. Only the numbers' being numbers is checked here; `ForcingConfig` checks what they say.
    """
    if value is None:
        return ()
    where, found = option("schedule_cutoffs"), value
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


KINDS: dict[str, tuple[Any, ...]] = {n: _kinds(a) for n, a in typing.get_type_hints(Options).items()}


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options from a YAML file (dashes or underscores); a run's own config.yaml serves, too."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise MlxSfError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise MlxSfError(f"{path}: holds no options, want lines like 'batch-size: 64'")
    named = {str(key): value for key, value in values.items() if key != "data_fingerprint"}
    return known(named, str(path))


def known(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options by their names, dashes made underscores; an unknown one is an error that names the nearest."""
    for key in values:
        if (name := key.replace("-", "_")) not in KINDS:
            near = difflib.get_close_matches(name, KINDS, 1)
            hint = f": did you mean {near[0]!r}?" if near else ": want an option of mlx-sf train"
            raise MlxSfError(f"{where}: unknown option {key!r}{hint}")
    return {key.replace("-", "_"): value for key, value in values.items()}


def typed_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given (not None), each in its type."""
    return {name: typed(name, value) for name, value in values.items() if value is not None}
