"""Options of the commands that measure with Inception. Apart from `options`: they load the network's code."""

from collections.abc import Callable
from typing import Any

import click

from ..metrics.checks import LAYERS


def inception_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where the weights of Inception are, and which of its layers features come from."""
    weights = click.option(
        "--inception-weights", type=click.Path(), help="File of the Inception weights, where they cannot be downloaded."
    )
    layer = click.option(
        "--feature-layer",
        type=click.Choice(LAYERS),
        default="2048",
        show_default=True,
        help="Inception layer that features are taken from; 2048 is the one of published FIDs.",
    )
    return weights(layer(function))
