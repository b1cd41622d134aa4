"""Checkpoints to choose from, and what the page says of the one that is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import Config
from ..checkpoints.load import demo_checkpoint
from ..checkpoints.resolve import locate
from ..errors import MlxSfError
from ..models import architecture
from ..models.quantize import describe
from ..sampling.class_names import ClassNames
from ..spectral import describe_forcing
from .device import Device
from .runs import find_runs
from .worker import DEMO, Failed, Finished, Opening

_NO_CLASS = ("no class", "null")


def choices(runs: Path) -> list[tuple[str, str]]:
    """(what is shown, name) of the checkpoints at hand: the demo model, and the runs that have saved one."""
    found = [r for r in find_runs(runs) if r.saved]
    return [
        ("The demo model, which comes with the program", DEMO),
        *((f"Run {r.path.name}, step {r.saved}", str(r.path)) for r in found),
    ]


def named(choice: str | None) -> str:
    """The checkpoint that a choice or a typed name means; "" is the demo model."""
    text = (choice or "").strip()
    return "" if text == DEMO else text


def choice_of(facts: Mapping[str, Any], runs: Path) -> str | None:
    """The choice that drew a picture, by its settings; None where it is not at hand, or several could be meant."""
    told = str(facts.get("loaded_from") or "")
    for _, name in choices(runs):
        if told in (name, Path(name).name):
            return name
    if "/" in told:  # a place on the Hub, or a path
        return told
    file = Path(str(facts.get("checkpoint") or "")).name
    if file == demo_checkpoint().name:
        return DEMO
    holding = [r for r in find_runs(runs) if file and (r.path / file).is_file()]
    return str(holding[0].path) if len(holding) == 1 else None


def config_of(name: str, device: Device) -> Config:
    """What a checkpoint says of itself. One that has to be fetched or converted first waits for the device's turn."""
    if not name:
        return Checkpoint(demo_checkpoint()).config
    path = Path(name).expanduser()
    found = locate(name) if path.exists() else None
    if found is not None and found.kind == "own":
        return Checkpoint(found.path).config
    end = None
    for message in device.submit(Opening(name)).messages():
        end = message
    if isinstance(end, Failed):
        raise MlxSfError(end.message)
    assert isinstance(end, Finished)
    if not end.path:
        raise MlxSfError(f"{name}: was stopped before it was here")
    return Checkpoint(end.path).config


@dataclass(frozen=True)
class Described:
    """What the page shows of a checkpoint, and its own settings.

    `classes`: (what is shown, number or "null") of each class, () of a model that draws from prompts.
    """

    rows: tuple[tuple[str, str], ...]
    classes: tuple[tuple[str, str], ...]
    takes_prompts: bool
    weights: tuple[str, ...]
    steps: int
    method: str
    cfg: float
    cfg_interval: tuple[float, float]


def describe_checkpoint(config: Config) -> Described:
    """What its configuration says."""
    m, s = config.model, config.sample
    forcing = getattr(m, "forcing", None)
    prompts = not m.num_classes
    names = ClassNames.of(m.num_classes, config.class_names)
    classes = [(f"{i} {label}".strip(), str(i)) for i, _, label in names.search("")]
    rows = [
        ("Model", f"{config.name}, {m.size[1]} × {m.size[0]} pixels"),
        ("Draws", "from prompts" if prompts else f"{m.num_classes} class{'es' * (m.num_classes > 1)}"),
        ("Forcing", describe_forcing(forcing) if forcing is not None else "none: the network sees all frequencies"),
        ("Noise scale", f"{config.flow.noise_scale:g}"),
        ("Network", architecture(m).title),
    ]
    if config.quantization is not None:
        rows.append(("Weights", describe(config.quantization)))
    if config.adapter is not None:
        rows.append(("Adapter", f"{config.adapter.lora}, of {config.adapter.base_name}"))
    return Described(
        tuple(rows), () if prompts else (*classes, _NO_CLASS), prompts, tuple(config.weights),
        s.steps, s.method, s.cfg, (s.cfg_low, s.cfg_high),
    )  # fmt: skip
