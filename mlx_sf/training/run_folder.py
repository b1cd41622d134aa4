"""The folder of a training run: `config.yaml`, checkpoints, metrics, previews; its lock, and how it is resumed.

A checkpoint holds everything that the next step depends on: the weights, both EMAs, Adam's moments, and the position
(step and unfinished log window). Of a run that trains an adapter these are the adapter's alone: the base is read again.
All files are written beside and renamed, so a kill at any moment leaves a folder that continues exactly from its newest
checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from ..checkpoints.adapters import write_adapter
from ..checkpoints.checkpoint import Checkpoint, save_checkpoint, step_file, step_files
from ..checkpoints.config import Config
from ..common.files import replacing, writable_folder
from ..errors import FieldError, MlxSfError, option
from .options import CHANGEABLE, Options, read_yaml
from .recipe import Recipe
from .step import SETS, Arrays, Weights

_POSITION = "run/position"
_MOMENTS = {"m": "optimizer/m/", "v": "optimizer/v/"}


@dataclass
class Position:
    """Where a run is: steps taken, and the losses since the last line of metrics."""

    step: int = 0
    window: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Stored:
    """What a run's folder says: its options, what its checkpoints say of themselves, its data's fingerprint."""

    options: Options
    config: Config
    fingerprint: str


class RunFolder:
    """One run's folder. Only one process at a time holds it (`locked`)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.model_file = self.path / "model.json"
        self.adapter = self.path / "adapter"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """The folder of a run to resume; anything that is not a run is refused with what was found there."""
        p, resume = Path(path), option("resume")
        if p.is_file():
            run = p.parent if (p.parent / "config.yaml").exists() else "the run's folder"
            raise MlxSfError(f"{resume} {path}: is a file, want a run's folder: give {run}")
        if not p.is_dir():
            near = sorted(c.parent.name for c in p.parent.glob("*/config.yaml")) if p.parent.is_dir() else []
            there = f" ({p.parent} holds {', '.join(near[:5])})" if near else ""
            raise MlxSfError(f"{resume} {path}: no such folder{there}: give the folder of a run")
        folder = cls(p)
        if not folder.config_file.exists():
            inside = ", ".join(sorted(c.name for c in p.iterdir())[:5]) or "nothing"
            runs = sorted(str(c.parent) for c in p.glob("*/config.yaml"))
            hint = f": did you mean {runs[0]}?" if runs else ": give the folder that training made"
            raise MlxSfError(f"{resume} {path}: is not a run, it has no config.yaml but {inside}{hint}")
        return folder

    def started(self) -> bool:
        return self.config_file.exists()

    def held_by(self) -> int | None:
        """The process that trains this run right now, None where there is none. Holds nobody up."""
        lock = self.path / ".lock"
        try:
            process = int(lock.read_text())
            os.kill(process, 0)  # of a process that is gone the number stays behind
            with open(lock) as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return process
        except (OSError, ValueError):
            return None
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the lock goes with the process, however it ends."""
        writable_folder(self.path)
        with open(self.path / ".lock", "a+") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                f.seek(0)
                raise MlxSfError(
                    f"{self.path}: process {f.read().strip() or '(unknown)'} is training this run already: "
                    f"wait for it, or choose another {option('name')}"
                ) from None
            f.truncate(0)
            f.write(str(os.getpid()))
            f.flush()
            for leftover in self.path.glob(".*.tmp"):  # of a save that was killed
                leftover.unlink(missing_ok=True)
            yield

    # -- configuration

    def write(self, recipe: Recipe) -> None:
        """Store what the run is; `config.yaml` comes last, as the sign that it has started."""
        with replacing(self.model_file) as temporary:
            temporary.write_text(recipe.config.to_json())
        values = {k: v for k, v in dataclasses.asdict(recipe.options).items() if v is not None}
        if "init" in values:
            del values["size"]  # of the checkpoint that it starts from; asking for one would be refused
        text = yaml.safe_dump({**values, "data_fingerprint": recipe.fingerprint}, sort_keys=False)
        with replacing(self.config_file) as temporary:
            temporary.write_text(text)

    def read(self) -> Stored:
        """What `write` stored. Raises `MlxSfError` where it is missing or damaged."""
        if not self.model_file.exists():
            raise MlxSfError(f"{self.model_file}: is missing: restore it, or start a new run with {option('name')}")
        try:
            values = yaml.safe_load(self.config_file.read_text())
            fingerprint = str(values.pop("data_fingerprint"))
            options = Options(**values)
        except FieldError as e:
            raise e.within(str(self.config_file)) from None
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
            read_yaml(self.config_file)  # says which line or option is wrong, where it can
            raise MlxSfError(f"{self.config_file}: is not the configuration of a run: restore it") from None
        return Stored(options, Config.from_json(self.model_file.read_text(), str(self.model_file)), fingerprint)

    def changed(self, options: Options, given: Mapping[str, Any]) -> Options:
        """The run's options with those `given` now; one that would change the steps so far is refused."""
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(options, name):
                raise MlxSfError(
                    f"{self.path}: was started with {option(name)} {getattr(options, name)}, got {value}: "
                    f"leave it out to continue that run, or choose another {option('name')} for a new one"
                )
        changes = {k: v for k, v in given.items() if k in CHANGEABLE and k not in ("output", "name")}
        if "epochs" in changes:
            changes.setdefault("steps", None)
        return dataclasses.replace(options, **changes)

    # -- checkpoints

    def save(self, arrays: Arrays, fixed: Weights, config: Config, position: Position, keep: int) -> Path:
        """Write the checkpoint of `position` and prune older ones to `keep` (0: all stay).

        `fixed` are the untrained tensors that belong to every weight set. State that is not finite is never written.
        The folder "adapter" holds the newest adapter of a run that trains one, in the published layout.
        """
        finite = mx.stack([mx.all(mx.isfinite(w)) for kind in arrays.values() for w in kind.values()])
        if not mx.all(finite).item():
            raise MlxSfError(f"{self.path}: the weights after step {position.step} are not finite: {self.advice()}")
        sets = {name: {**arrays[name], **fixed} for name in SETS}
        extra = {prefix + k: w for kind, prefix in _MOMENTS.items() for k, w in arrays[kind].items()}
        text = json.dumps(dataclasses.asdict(position)).encode()
        extra[_POSITION] = mx.array(np.frombuffer(text, np.uint8))
        if config.adapter is not None:  # first: a run that ends in between writes it again when it continues
            write_adapter(self.adapter, config.adapter, arrays["model"], config.model)
        path = self.path / step_file(position.step)
        provenance = {**config.provenance, "step": position.step}
        save_checkpoint(path, sets, dataclasses.replace(config, provenance=provenance), extra)
        for _, old in step_files(self.path)[:-keep] if keep else []:
            old.unlink()
        return path

    def load(self, config: Config) -> tuple[Arrays, Position] | None:
        """State of the newest checkpoint, or None before the first. A damaged one is an error, never skipped."""
        files = step_files(self.path)
        if not files:
            return None
        path = files[-1][1]
        try:
            checkpoint = Checkpoint(path)
            parts = ("model", "flow", "adapter")
            if any(getattr(checkpoint.config, part) != getattr(config, part) for part in parts):
                raise MlxSfError(f"{path}: is of another network than {self.config_file} says")
            arrays: Arrays = {name: checkpoint.weights(name) for name in SETS}
            extra = checkpoint.extra()
            position = Position(**json.loads(bytes(np.array(extra[_POSITION]))))
        except (KeyError, TypeError, ValueError):
            raise MlxSfError(
                f"{path}: holds no training state, only weights: start from it with {option('init')}"
            ) from None
        except MlxSfError as e:
            older = f": delete it to continue from {files[-2][1].name}" if len(files) > 1 else ""
            raise MlxSfError(f"{e.message}{older}") from None
        for kind, prefix in _MOMENTS.items():
            arrays[kind] = {k.removeprefix(prefix): w for k, w in extra.items() if k.startswith(prefix)}
        for name in SETS:
            arrays[name] = {k: arrays[name][k] for k in arrays["m"]}
        mx.eval(arrays)
        return arrays, position

    def advice(self) -> str:
        """What to do after a divergence."""
        files = step_files(self.path)
        last = f"the last good checkpoint is {files[-1][1]}" if files else "there is no checkpoint yet"
        lower = f"a lower {option('lr')}, {option('clip_grad')} 1 or {option('dtype')} float32"
        return f"{last}; try {lower} under a new {option('name')}"
