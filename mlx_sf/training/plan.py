"""From the options that were given to everything that a run needs: new, continued, or started from a checkpoint."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, step_files
from ..checkpoints.config import Config
from ..checkpoints.resolve import resolve
from ..common.world import World
from ..data.captioned_scenes import CAPTIONED_SCENES
from ..data.sources import Source
from ..errors import MlxSfError, option
from ..models import architecture
from .finetune import adapter_config
from .options import Options, typed_options
from .recipe import WORDS, Recipe, data_options, decide, options_from
from .run_folder import RunFolder, Stored


@dataclass(frozen=True)
class Plan:
    """A run before its first step; nothing is written yet.

    `stored` is what the folder of a run that is continued says; `base` the checkpoint whose weights a run without a
    checkpoint of its own starts from. `notes` are lines for the user.
    """

    recipe: Recipe
    folder: RunFolder
    source: Source
    stored: Stored | None
    base: Checkpoint | None
    notes: tuple[str, ...]


def plan(given: Mapping[str, Any], resume: str | None = None) -> Plan:
    """The run that options ask for, by their names; `MlxSfError` where there can be none.

    `resume` names the folder of a run to continue; without it the run of the given (or derived) name is continued if
    it exists, else a new one is planned.
    """
    given = typed_options(given)
    if resume is not None and ("name" in given or "output" in given):
        names = f"{option('name')} and {option('output')}"
        raise MlxSfError(f"{option('resume')}: names the run already: leave {names} out")
    folder = RunFolder.existing(resume) if resume is not None else RunFolder(_run_path(given))
    stored, base = None, None
    if folder.started():
        stored = folder.read()
        options = folder.changed(stored.options, given)
        if options.init and not step_files(folder.path):  # it ended before its first save
            base = _base(options.init)
    elif "init" in given:
        base = _base(given["init"])
        options = options_from(base.config, given)
    else:
        options = Options(**given)
    source = _open(options)
    if stored and source.fingerprint() != stored.fingerprint:
        restore = f"restore it, or start a new run with {option('name')}"
        raise MlxSfError(f"{folder.path}: its data has changed ({source.describe()}): {restore}")
    options = dataclasses.replace(options, data=_absolute(options.data), text_encoder=_absolute(options.text_encoder))
    recipe = decide(options, source, base.config if base else None, stored.config if stored else None)
    if options.lora and base is not None and stored is None:
        recipe = dataclasses.replace(recipe, config=adapter_config(base, recipe.options, recipe.config))
    notes = [f"data: {source.describe()}", *getattr(source, "caption_notes", list)()]
    if not architecture(recipe.config.model).sees_time and recipe.config.model.forcing is not None:
        notes.append(
            "note: this network does not see t; forcing tells it the noise level, which it has to guess without"
        )
    if len(source) < recipe.batch_size:
        notes.append(f"note: {len(source)} pictures fill a batch of {recipe.batch_size} only by repeating")
    return Plan(recipe, folder, source, stored, base, tuple(notes))


def shared_plan(given: Mapping[str, Any], resume: str | None, world: World) -> Plan:
    """`plan` on rank 0, its decisions on every rank; each opens the data, which must be the same, by itself."""
    if world.main:
        try:
            p = plan(given, resume)
        except (MlxSfError, OSError):
            world.share(None)  # the others must not wait for a plan that never comes
            raise
        r = p.recipe
        world.share([dataclasses.asdict(r.options), r.config.to_json(), r.fingerprint, str(p.folder.path)])
        return p
    decided = world.share(None)
    if decided is None:
        sys.exit(1)  # rank 0 says why
    options, config = Options(**decided[0]), Config.from_json(decided[1])
    source = _open(options)
    if source.fingerprint() != decided[2]:
        raise MlxSfError(f"process {world.rank}: {source.describe()} is not the data of process 0: copy it over")
    return Plan(decide(options, source, stored=config), RunFolder(decided[3]), source, None, None, ())


def _base(init: str) -> Checkpoint:
    checkpoint = Checkpoint(resolve(init))
    checkpoint.require_network()
    checkpoint.require_floats()
    return checkpoint


def _open(options: Options) -> Source:
    side = options.image_geometry()[1]
    return data_options(options).open((side, side), options.seed)


def _run_path(given: Mapping[str, Any]) -> Path:
    """The folder of a run that is not named by `resume`: `name`, or a name from the model and the data."""
    name = given.get("name")
    if name is None:
        network = Path(given["init"]).stem if "init" in given else str(given.get("size", "small")).replace("/", "-")
        patch = f"-{given['patch']}" if "patch" in given else ""
        data = Path(given["data"]).name if "data" in given else "scenes"
        marks = "".join(f"-{mark}" for mark in ("vanilla", "lora") if given.get(mark))
        name = f"{network}{patch}-{data or 'data'}{marks}"
    elif not name or Path(name).name != name:
        where = f"the folder it lies in is {option('output')}"
        raise MlxSfError(f"{option('name')} is {name!r}, want a plain name: {where}")
    return Path(given.get("output", "runs")) / name


def _absolute(data: str | None) -> str | None:
    """Paths are stored absolute, so that a run can be continued from elsewhere; Hub names and our own stay."""
    if not data or data in (CAPTIONED_SCENES, WORDS) or not Path(data).expanduser().exists():
        return data
    return str(Path(data).expanduser().resolve())
