"""Options that several commands share: how a checkpoint is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..checkpoints.load import demo_checkpoint
from ..checkpoints.resolve import resolve
from ..checkpoints.text_encoder import PRECISIONS


def offline_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--offline", is_flag=True, help="Use what is on this machine; never ask the Hugging Face Hub.")(
        function
    )


def ckpt_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--ckpt`, what the files of a foreign checkpoint may not say, and `--offline`: see `named_checkpoint`."""
    for option in (
        offline_option,
        click.option(
            "--in-context-start",
            type=int,
            help="Block before which the class tokens enter, for a foreign checkpoint that does not say.",
        ),
        click.option(
            "--noise-scale",
            type=float,
            help="Standard deviation of the noise, for a foreign checkpoint that does not say: 1 up to 256 pixels.",
        ),
        click.option(
            "--ckpt",
            help="Checkpoint: a file, a run folder, a name of `mlx-sf models`, or org/name/folder on the Hugging Face "
            "Hub. [default: the built-in demo model]",
        ),
    ):
        function = option(function)
    return function


def text_encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--text-encoder` and `--text-encoder-precision`, for models that draw from prompts."""
    for option in (
        click.option(
            "--text-encoder-precision",
            type=click.Choice(PRECISIONS),
            default="float32",
            show_default=True,
            help="Type of the text encoder's products.",
        ),
        click.option(
            "--text-encoder",
            metavar="DIR|ID",
            help="Text encoder of a model that takes prompts: a folder, or a name on the Hugging Face Hub. [default: "
            "the one that the checkpoint names]",
        ),
    ):
        function = option(function)
    return function


def lora_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--lora-paths` and `--lora-scales`: the adapters that go with a checkpoint."""
    for option in (
        click.option(
            "--lora-scales",
            type=float,
            multiple=True,
            help="What an adapter is multiplied by, in the order of --lora-paths; may be given several times. "
            "[default: 1]",
        ),
        click.option(
            "--lora-paths",
            multiple=True,
            metavar="DIR|ID",
            help="A low-rank adapter: a folder, or a name on the Hugging Face Hub; may be given several times.",
        ),
    ):
        function = option(function)
    return function


def go_offline(offline: bool) -> None:
    """Keep the Hub's client from asking; it reads this when it is imported, which nothing has done yet."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def named_checkpoint(
    ckpt: str | None, noise_scale: float | None = None, in_context_start: int | None = None, offline: bool = False
) -> Path:
    """The checkpoint file that `--ckpt` and its companions mean; the demo model without `--ckpt`."""
    go_offline(offline)
    if ckpt is None:
        return demo_checkpoint()
    return resolve(ckpt, {"noise_scale": noise_scale, "in_context_start": in_context_start})
