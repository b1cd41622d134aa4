"""What a network reads of prompts: a text encoder's features, or SenseNova-U1's prefixes. One door for both."""

import os
from collections.abc import Sequence

import mlx.core as mx

from ..device.defaults import pick_dtype
from ..errors import MlxSfError, option
from ..models.u1_config import U1Config
from .adapters import Adapter
from .checkpoint import Checkpoint
from .system_message import system_message
from .text_encoder import EncoderPrecision, TextFeatures, text_features
from .two_phase import Prefixes


def features_of(
    checkpoint: Checkpoint,
    text_encoder: str | os.PathLike[str] | None = None,
    precision: EncoderPrecision = "float32",
    message: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    adapters: Sequence[Adapter] = (),
) -> TextFeatures | Prefixes | None:
    """What the network of a checkpoint reads of prompts; None where it reads none. Nothing is computed yet.

    `text_encoder` and its `precision` are those of a network with a frozen encoder, the system message and the
    `adapters` of its understanding side SenseNova-U1's, which runs in `dtype`.
    """
    model = checkpoint.config.model
    if not isinstance(model, U1Config):
        if message is not None:
            raise MlxSfError(f"{option('system_message')}: {checkpoint.config.name} has none: leave it out")
        return text_features(getattr(model, "text", None), text_encoder, precision)
    if text_encoder is not None:
        raise MlxSfError(f"{option('text_encoder')}: SenseNova-U1 reads prompts itself: leave it out")
    updates: dict[str, list[tuple[mx.array, mx.array]]] = {}
    for adapter in adapters:
        for name, (b, a) in adapter.beside.items():
            updates.setdefault(name, []).append((adapter.scale * b, a))
    text, notes = system_message(message)
    return Prefixes(checkpoint, text, pick_dtype(dtype), updates, notes)


def ensure(features: TextFeatures | Prefixes | None, prompts: Sequence[str], guided: bool) -> None:
    """Compute what these prompts lack, and the empty branch where `guided`, before the network takes its memory."""
    if isinstance(features, Prefixes):
        features.ensure([*prompts, None] if guided else prompts)
    elif features is not None:
        features.ensure(prompts)
