"""Networks, each a file of its own behind one door.

`ARCHITECTURES` names them; `architecture(name)` imports one. Samplers, losses, checkpoints and training know a network
by the protocol below and by what its `Architecture` says of its parameters, never by its class.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..common.pixels import to_uint8
from ..errors import MlxSfError

# What a picture is asked for by: a class label, a prompt, or None for "anything" (the unconditional branch of guidance)
Asked = int | str | None
# A tree (dict, list, tuple) of arrays whose first axis is the batch; what is in it is the network's business
Condition = Any
Shapes = dict[str, tuple[int, ...]]


class ModelConfig(Protocol):
    """The configuration of a network: a frozen dataclass whose fields travel in checkpoints."""

    @property
    def architecture(self) -> str:
        """Its name in `ARCHITECTURES`."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""

    @property
    def out_channels(self) -> int:
        """Channels of its output: 3, or 6 where a flow's hybrid parameterisation has two heads."""

    @property
    def tokens(self) -> int:
        """Length of the longest sequence that it attends over."""

    @property
    def num_classes(self) -> int:
        """Number of classes it draws; 0 where it takes something else than labels."""


@dataclass(frozen=True)
class Step:
    """What a sampler knows when it asks for a velocity.

    Args:
        t: the time, (1,), shared by the batch. length: of the step that begins there.
        cfg, cfg_low, cfg_high: guidance scale and interval, for networks that take guidance as an input.
    """

    t: mx.array
    length: float
    cfg: float = 1.0
    cfg_low: float = 0.0
    cfg_high: float = 1.0


class Network(Protocol):
    """What samplers and losses see of a network.

    States z are (B, 3, H, W), times t a scalar, (1,) or (B,) from 0 (noise) to 1 (data); outputs (B, C, H, W) float32.
    Networks that train also take `key`, a random key for dropout, and `block_wrapper`, which turns a block into the
    callable that runs it (gradient checkpointing).
    """

    @property
    def config(self) -> Any: ...

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of it, so that one evaluation a step does."""

    def condition(self, asked: Sequence[Asked]) -> Condition:
        """The condition of a batch. Raises `MlxSfError` where one of `asked` cannot be had."""

    def precompute(self, condition: Condition) -> Condition:
        """The condition with all that it alone decides, whatever the time.

        A sampler calls it once for each batch, training never. Networks whose conditions decide nothing alone give back
        what they got.
        """

    def prepare(self, step: Step, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
        """Both conditions with all that they and one step decide: valid for that step only.

        A sampler calls it once for each time that it visits. `null` may be None. Networks to which time and condition
        alone decide nothing give back what they got.
        """

    def __call__(self, z: mx.array, t: mx.array, condition: Condition, /) -> mx.array: ...

    def guided(self, z: mx.array, t: mx.array, condition: Condition, null: Condition, /) -> tuple[mx.array, mx.array]:
        """Outputs for both conditions, in one batch or in two passes; what the halves share is computed once."""

    def parameters(self) -> Any: ...


@dataclass(frozen=True)
class Architecture:
    """A kind of network, and the roles of its parameters by name.

    Args:
        name: as in checkpoints. title: for people.
        config: the class of its configurations. network: makes one from a configuration and a random key (None: key 0).
        is_product_operand: whether a parameter enters the large matrix products, which may run in half precision.
        layer_kind: the kind of linear layer that a parameter belongs to, for quantisation; None for all else.
        layer_kinds: all of these kinds.
        fixed: parameters that are stored with the weights and never trained.
        landmarks: name -> shape of a few parameters that show whether a file holds what its configuration says.
        forward_flops: floating-point operations of a forward pass for one image.
        class_table: parameter with a row per class and a last one for no class, if any.
        head: prefix of the output layer's parameters.
        lora_target: whether low-rank adapters touch a linear layer, by its path, unless they say so themselves.
        lora_prefix: what stands before that path in published adapters.
        sees_time: whether t is an input of the network itself, and not of the forcing alone.
        citation: the paper that it is from, for cards.
        sizes: names of its sizes, the smallest first.
        model_config: (size, patch side, image side, changes by name) -> configuration.
        preset_name: (size, patch side) -> the name that models of this size go by.
        reads_text: whether it is conditioned on prompts; its configuration then has a `text` (`text.TextConfig`).
        to_uint8: images (..., 3, H, W) in [-1, 1] -> pictures (..., H, W, 3) uint8, by the network's published rule.
        resized: (configuration, (height, width)) -> the same network's for pictures of that size; None where it draws
            one size only.
        noise_at: configuration -> scale of the noise of pictures of its size; None where the flow alone says it.
        verbatim: whether prompts count as they are, white space at their ends included.
        companions: prefixes of the tensors that a checkpoint holds beside the network, and keeps when it is rewritten.
    """

    name: str
    title: str
    config: type
    network: Callable[..., Any]
    is_product_operand: Callable[[str], bool]
    layer_kind: Callable[[str], str | None]
    layer_kinds: tuple[str, ...]
    fixed: tuple[str, ...]
    landmarks: Callable[[Any], Shapes]
    forward_flops: Callable[[Any], int]
    class_table: str | None = None
    head: str | None = None
    lora_target: Callable[[str], bool] = lambda layer: False
    lora_prefix: str = "base_model.model.net."
    sees_time: bool = True
    citation: str = ""
    sizes: tuple[str, ...] = ()
    model_config: Callable[..., Any] | None = None
    preset_name: Callable[[str, int], str] = "{}/{}".format
    reads_text: bool = False
    to_uint8: Callable[[Any], np.ndarray] = to_uint8
    resized: Callable[[Any, tuple[int, int]], Any] | None = None
    noise_at: Callable[[Any], float] | None = None
    verbatim: bool = False
    companions: tuple[str, ...] = ()


# name -> module whose `ARCHITECTURE` it is
ARCHITECTURES: dict[str, str] = {
    "jit": "mlx_sf.models.jit",
    "jit_text": "mlx_sf.models.jit_text",
    "mmjit": "mlx_sf.models.mmjit",
    "mmjit_mf": "mlx_sf.models.mmjit_mf",
    "sensenova_u1": "mlx_sf.models.sensenova_u1",
}


def architecture(of: str | ModelConfig) -> Architecture:
    """The architecture of this name, or of a configuration. `MlxSfError` names those that there are."""
    name = of if isinstance(of, str) else of.architecture
    if name not in ARCHITECTURES:
        raise MlxSfError(f"architecture {name!r} is unknown, want one of {', '.join(ARCHITECTURES)}: update mlx-sf")
    found: Architecture = importlib.import_module(ARCHITECTURES[name]).ARCHITECTURE
    return found


def token_side(config: Any) -> int:
    """Pixels along the side of a token of the picture: its configuration's `token_size`, else a patch."""
    return int(getattr(config, "token_size", getattr(config, "patch_size", 1)))


def build(config: ModelConfig, key: mx.array | None = None) -> Any:
    """The network of a configuration, with initial weights from `key`; lazy, so nothing is allocated yet."""
    return architecture(config).network(config, key)


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor of the network, without allocating any of them."""
    leaves: Any = tree_flatten(build(config).parameters())
    return {k: tuple(v.shape) for k, v in leaves}


def parameter_count(config: ModelConfig) -> int:
    return sum(map(math.prod, parameter_shapes(config).values()))


def cast_products(parameters: Any, dtype: mx.Dtype, kind: Architecture) -> Any:
    """The compute-type policy: operands of the matrix products become `dtype`, as under autocast; all else float32.

    Takes and returns a tree (or flat mapping) of parameters. With these the residual stream, norm statistics,
    attention scores, DCT and loss stay float32 too.
    """
    if isinstance(parameters, Mapping) and all(isinstance(w, mx.array) for w in parameters.values()):
        return {k: w.astype(dtype if kind.is_product_operand(k) else mx.float32) for k, w in parameters.items()}
    return tree_map_with_path(lambda k, w: w.astype(dtype if kind.is_product_operand(k) else mx.float32), parameters)
