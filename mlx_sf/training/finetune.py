"""Starting a run from a checkpoint of another one: what is kept, what is made anew, and saying so."""

import dataclasses

import mlx.core as mx

from ..checkpoints.adapters import named_base
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import AdapterInfo, Config
from ..errors import MlxSfError, option
from ..models import parameter_shapes
from ..models.lora import LoRAConfig, targets_of
from ..spectral import describe_forcing
from .options import Options
from .step import Weights


def adapter_config(checkpoint: Checkpoint, o: Options, config: Config) -> Config:
    """What the checkpoints of a run say that trains an adapter of `checkpoint`; `config` is that of a whole network.

    Raises `MlxSfError` where the network would have to change, in its classes, too.
    """
    base, kind, name = checkpoint.config, checkpoint.kind, checkpoint.pick(o.init_weights)
    if not _same_classes(base, config):
        was, now = base.model.num_classes, config.model.num_classes
        raise MlxSfError(
            f"{option('lora')}: keeps the {was} classes of {checkpoint.path}, and the data has {now}, or others: "
            f"name them alike, or leave out {option('lora')}"
        )
    for f in dataclasses.fields(config.model):
        was, now = getattr(base.model, f.name), getattr(config.model, f.name)
        if was != now:
            differs = (
                f"{option(f.name)} is {was}, not {now}" if isinstance(was, int | float) else f"{f.name} is another"
            )
            raise MlxSfError(
                f"{option('lora')}: keeps the network of {checkpoint.path}, whose {differs}: "
                f"take the same, or leave out {option('lora')}"
            )
    targets = targets_of(parameter_shapes(base.model), kind)
    if not targets or o.lora_rank is None or o.lora_alpha is None:
        raise MlxSfError(f"{checkpoint.path}: {kind.title} has no layers for adapters")
    info = AdapterInfo(
        LoRAConfig(o.lora_rank, o.lora_alpha, targets),
        named_base(str(o.init), checkpoint),
        name,
        checkpoint.fingerprint(name),
    )
    return dataclasses.replace(config, adapter=info, class_names=base.class_names)


def adapt(checkpoint: Checkpoint, weights: str | None, fresh: Weights, config: Config) -> tuple[Weights, list[str]]:
    """Weights for the network of `config` from weight set `weights` of a checkpoint, and what was done, in words.

    `fresh` are the new network's initial weights. The class table is made anew where the classes differ (its "no
    class" row is kept), the head where the number of output channels does; what is not trained follows the image size
    by itself. Everything else must fit. Raises `MlxSfError` where it does not.
    """
    kind, base, name = checkpoint.kind, checkpoint.config, checkpoint.pick(weights)
    if base.model.architecture != config.model.architecture:
        raise MlxSfError(
            f"{checkpoint.path}: is of architecture {kind.name}, this run's is {config.model.architecture}"
        )
    old = {k: w.astype(mx.float32) for k, w in checkpoint.weights(name).items() if k not in kind.fixed}
    new, notes = dict(fresh), [f"init: {checkpoint.path} ({name})"]
    for key, w in fresh.items():
        if key == kind.class_table and not _same_classes(base, config):
            new[key] = mx.concatenate([w[:-1], old[key][-1:]])
            notes.append(
                f"init: class table made anew for {len(w) - 1} class(es), it had {len(old[key]) - 1}; "
                "the row for no class is kept"
            )
        elif kind.head is not None and key.startswith(kind.head) and old[key].shape != w.shape:
            if key.endswith("weight"):
                notes.append(f"init: head made anew for {config.model.out_channels} output channels")
        elif key not in old or old[key].shape != w.shape:
            got = old[key].shape if key in old else "nothing"
            raise MlxSfError(
                f"{option('init')} {checkpoint.path}: holds {got} for {key}, this network wants {w.shape}: "
                "start from a checkpoint of the same size"
            )
        else:
            new[key] = old[key]
    return new, notes + _other_changes(base, config)


def _other_changes(base: Config, config: Config) -> list[str]:
    """What differs besides the weights, in words."""
    notes = []
    was, now = base.model.size, config.model.size
    if was != now:
        notes.append(f"init: positions made anew for {now[0]} x {now[1]} pixels, it had {was[0]} x {was[1]}")
    before, after = base.model.forcing, config.model.forcing
    if (before is None) != (after is None):
        notes.append(f"init: Spectral Forcing is {'on' if after else 'off'} now")
    elif before and after and describe_forcing(before) != describe_forcing(after):
        trained = describe_forcing(before)
        notes.append(f"init: the forcing is {describe_forcing(after)} now, the weights were trained with {trained}")
    return notes


def _same_classes(base: Config, config: Config) -> bool:
    """Equal numbers of classes, and equal names where both have them."""
    named = base.class_names and config.class_names
    return base.model.num_classes == config.model.num_classes and (not named or base.class_names == config.class_names)
