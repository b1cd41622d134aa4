"""Training from Python: `train(data="~/Pictures/birds", size="small", patch=16, steps=5000)`."""

import os
from collections.abc import Mapping
from typing import Any

from ..common.world import World
from .options import known, read_yaml
from .plan import Plan, shared_plan
from .trainer import Outcome, Say, fit

Path = str | os.PathLike[str]


def train(
    *,
    config: Path | None = None,
    resume: Path | None = None,
    say: Say | None = None,
    **options: Any,
) -> Outcome:
    """Train a network on pictures, or continue a run exactly where it was.

    Args:
        config: YAML file of options; those given by keyword win over it. A run's own `config.yaml` serves, too.
        resume: folder of a run to continue, to the bit. Without it the run that `output` and `name` stand for is
            continued if it exists, so the same call again goes on where the last one stopped.
        say: takes lines of progress, as `print` does; by default nothing is said. Progress itself goes to stderr.
        options: the options of a run by their YAML keys, such as `data` (folder, data set or Hub name; built-in scenes
            by default), `size` ("nano" to "7B"), `patch` and `img_size` in pixels, `batch_size` in images, `steps` or
            `epochs`, `lr`, `init` (a checkpoint to start from), `vanilla=True` for a network without forcing.
            `training.options.Options` lists and explains them all; None stands for not given.

    Returns an `Outcome`: `step` of `steps` done, whether the run `finished`, its newest `checkpoint`. It serves as the
    path of the run's folder, which holds config.yaml, checkpoints, metrics.jsonl, loss.png and previews:
    `mlx_sf.load(mlx_sf.train(...))`.

    Ctrl-C or SIGTERM end a run early; it saves first, and returns with `finished` False. Under `mlx.launch` all
    processes call this with the same arguments and share each batch.

    Raises `MlxSfError` for options that are unknown or do not fit together, data that cannot be used, a run that cannot
    be continued with these options, and a loss that is no longer finite (the last good checkpoint stays).

    >>> run = train(data="~/Pictures/birds", size="small", patch=16, steps=5000, say=print)
    """
    world = World.join()
    with world.together():
        return fit(planned(config, resume, options, world), say or (lambda line: None), world)


def planned(config: Path | None, resume: Path | None, options: Mapping[str, Any], world: World) -> Plan:
    """The plan of a run from the arguments of `train`."""
    given = {**(read_yaml(config) if config is not None else {}), **_given(options)}
    return shared_plan(given, None if resume is None else os.fspath(resume), world)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known(options, "train").items() if value is not None}
