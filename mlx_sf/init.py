"""Starting a run from a checkpoint of another one: what is kept, what is made anew, and saying so."""

import mlx.core as mx

from .checkpoint import Checkpoint
from .config import Config
from .errors import MlxSfError
from .spectral import describe_forcing
from .train import Weights

_TABLE = "y_embedder.embedding_table.weight"
_HEAD = "final_layer.linear."


def adapt(checkpoint: Checkpoint, weights: str | None, fresh: Weights, config: Config) -> tuple[Weights, list[str]]:
    """Weights for the network of `config` from a checkpoint, and what was done, in words.

    `fresh` are the new network's initial weights. The class table is made anew where the classes differ (its "no
    class" row is kept), the head where the number of output channels does; position tables are not trained and follow
    the image size by themselves. Everything else must fit.
    """
    base, name = checkpoint.config, checkpoint.pick(weights)
    old = {k: w.astype(mx.float32) for k, w in checkpoint.weights(name).items()}
    new, notes = dict(fresh), [f"init: {checkpoint.path} ({name})"]
    for key, w in fresh.items():
        if key == _TABLE and not _same_classes(base, config):
            row = config.model.null_class
            new[key] = mx.concatenate([w[:row], old[key][-1:]])
            notes.append(
                f"init: class table made anew for {row} class(es), it had {base.model.num_classes}; "
                "the row for no class is kept"
            )
        elif key.startswith(_HEAD) and old[key].shape != w.shape:
            if key.endswith("weight"):
                notes.append(f"init: head made anew for {config.model.out_channels} output channels")
        elif key not in old or old[key].shape != w.shape:
            got = old[key].shape if key in old else "nothing"
            raise MlxSfError(f"--init {checkpoint.path}: holds {got} for {key}, this network wants {w.shape}")
        else:
            new[key] = old[key]
    if base.model.img_size != config.model.img_size:
        notes.append(f"init: positions made anew for {config.model.img_size} pixels, it had {base.model.img_size}")
    if base.model.spectral_forcing != config.model.spectral_forcing:
        notes.append(f"init: Spectral Forcing is {'on' if config.model.spectral_forcing else 'off'} now")
    elif config.model.spectral_forcing:
        was, now = describe_forcing(base.model), describe_forcing(config.model)
        notes += [f"init: the forcing is {now} now, the weights were trained with {was}"] if was != now else []
    return new, notes


def _same_classes(base: Config, config: Config) -> bool:
    """Equal numbers of classes, and equal names where both have them."""
    named = base.class_names and config.class_names
    return base.model.num_classes == config.model.num_classes and (not named or base.class_names == config.class_names)
