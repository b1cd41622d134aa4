"""A second network behind the door, as different from JiT as can be: prompts, rectangles, two passes, no labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_sf.models import Architecture, Asked, Step


@dataclass(frozen=True)
class ToyConfig:
    architecture: ClassVar[str] = "toy"
    num_classes: ClassVar[int] = 0
    out_channels: ClassVar[int] = 3

    height: int = 12
    width: int = 20
    dims: int = 8

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


class ToyNetwork(nn.Module):
    """Pixels and a mean over the prompt's letters, mixed by one layer; no prompt is a single learned token."""

    takes_guidance = False

    def __init__(self, config: ToyConfig, key: mx.array | None = None) -> None:
        super().__init__()
        self._config = config
        k1, k2, k3 = mx.random.split(mx.random.key(0) if key is None else key, 3)
        self.letters = 0.5 * mx.random.normal((128, config.dims), key=k1)
        self.nothing = 0.5 * mx.random.normal((1, config.dims), key=k2)
        self.mix = {"weight": 0.3 * mx.random.normal((3, 3 + config.dims + 1), key=k3)}

    @property
    def config(self) -> ToyConfig:
        return self._config

    def condition(self, asked: Sequence[Asked]) -> Any:
        """Tokens (B, L, D) and how many count (B,): L is the longest prompt, and 1 where nothing is asked for."""
        rows = [self.letters[mx.array([ord(c) % 128 for c in a])] if a else self.nothing for a in map(_text, asked)]
        longest = max(map(len, rows))
        padded = [mx.pad(r, [(0, longest - len(r)), (0, 0)]) for r in rows]
        return {"tokens": mx.stack(padded), "counts": mx.array([[float(len(r))] for r in rows])}

    def precompute(self, condition: Any) -> Any:
        return condition

    def prepare(self, step: Step, condition: Any, null: Any) -> tuple[Any, Any]:
        return condition, null

    def __call__(
        self, z: mx.array, t: mx.array, condition: Any, key: mx.array | None = None, block_wrapper: Any = None
    ) -> mx.array:
        B, _, H, W = z.shape
        text = (condition["tokens"].sum(axis=1) / condition["counts"])[:, :, None, None]
        time = mx.broadcast_to(mx.reshape(t, (-1, 1, 1, 1)), (B, 1, H, W))
        x = mx.concatenate([z, mx.broadcast_to(text, (B, text.shape[1], H, W)), time], axis=1)
        return mx.tanh(mx.einsum("oc,bchw->bohw", self.mix["weight"], x))

    def guided(self, z: mx.array, t: mx.array, condition: Any, null: Any) -> tuple[mx.array, mx.array]:
        return self(z, t, condition), self(z, t, null)


def _text(asked: Asked) -> str:
    assert not isinstance(asked, int)
    return asked or ""


ARCHITECTURE = Architecture(
    name="toy",
    title="Toy",
    config=ToyConfig,
    network=ToyNetwork,
    is_product_operand=lambda name: name.startswith("mix"),
    layer_kind=lambda name: "mix" if name.startswith("mix") else None,
    layer_kinds=("mix",),
    fixed=(),
    landmarks=lambda c: {"letters": (128, c.dims)},
    forward_flops=lambda c: 2 * 3 * (4 + c.dims) * c.height * c.width,
)
