"""SenseNova-U1's configuration: its sizes, the pictures it draws, and the noise that goes with their size."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..common.fields import check_types, choice, require
from ..spectral import ForcingConfig

HeadKind = Literal["linear", "conv"]
NoiseMode = Literal["resolution", "dynamic", "dynamic_sqrt", "fixed"]

MERGE = 2  # patches along one side of a token
_LARGEST = 8192  # pixels along a side


@dataclass(frozen=True)
class U1Config:
    """The network, and the height and width of the pictures it is asked for: any multiples of `token_size`.

    `num_heads` query heads of `head_dim` share `num_kv_heads` key heads. `head` is "linear" (U1) or "conv" (U1.5), of
    inner width `head_width`. `embed_width` is the picture embedder's. `noise_scale`, `noise_mode`, `noise_base` and
    `noise_max` say how much noise a picture of some size starts with (`noise_at`); `noise_embedding`, whether the
    network is told. `prompt_length` bounds a prompt's tokens, its template included. `forcing` puts Spectral Forcing
    on the copy of the state that the embedder sees; None as published.

    Raises `FieldError` where sizes do not fit together.
    """

    architecture: ClassVar[str] = "sensenova_u1"
    num_classes: ClassVar[int] = 0
    out_channels: ClassVar[int] = 3

    height: int = 2048
    width: int = 2048
    patch_size: int = 16
    hidden_size: int = 4096
    depth: int = 42
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_hidden: int = 12288
    vocab_size: int = 151936
    embed_width: int = 1024
    head: HeadKind = "linear"
    head_width: int = 4096
    rope_theta: float = 5e6
    rope_theta_hw: float = 1e4
    rope_theta_vision: float = 1e4
    noise_scale: float = 1.0
    noise_mode: NoiseMode = "resolution"
    noise_base: int = 64
    noise_max: float = 8.0
    noise_embedding: bool = True
    prompt_length: int = 4096
    forcing: ForcingConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("patch_size", "hidden_size", "depth", "num_heads", "num_kv_heads", "mlp_hidden", "vocab_size")
        for name in (*counts, "embed_width", "head_width", "noise_base", "prompt_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("rope_theta", "rope_theta_hw", "rope_theta_vision", "noise_scale", "noise_max"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        choice("head", self.head, HeadKind)
        choice("noise_mode", self.noise_mode, NoiseMode)
        ok = self.num_heads % self.num_kv_heads == 0
        require(ok, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads {self.num_heads}")
        require(self.head_dim >= 8 and self.head_dim % 8 == 0, "head_dim", self.head_dim, "a multiple of 8")
        require(self.embed_width % 4 == 0, "embed_width", self.embed_width, "a multiple of 4")
        P = self.token_size
        require(self.head == "linear" or P == 32, "patch_size", self.patch_size, "16 with a convolutional head")
        for name in ("height", "width"):
            side = getattr(self, name)
            require(0 < side <= _LARGEST and side % P == 0, name, side, f"a multiple of {P}, from {P} to {_LARGEST}")
        if self.forcing is not None:
            require(isinstance(self.forcing, ForcingConfig), "forcing", self.forcing, "a ForcingConfig or None")
            self.forcing.on(self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.height, self.width

    @property
    def token_size(self) -> int:
        """Pixels along a token's side."""
        return MERGE * self.patch_size

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return self.height * self.width // self.token_size**2

    def at(self, size: tuple[int, int]) -> "U1Config":
        """The same network for pictures of another (height, width)."""
        return dataclasses.replace(self, height=size[0], width=size[1])

    def noise_at(self, size: tuple[int, int], bounded: bool = True) -> float:
        """Standard deviation of the noise of a picture of (height, width); training leaves out the upper bound."""
        if self.noise_mode == "fixed":
            return self.noise_scale
        s = self.noise_scale * math.sqrt(size[0] * size[1] / self.token_size**2 / self.noise_base)
        s = math.sqrt(s) if self.noise_mode == "dynamic_sqrt" else s
        return min(s, self.noise_max) if bounded else s


# the two generations; all checkpoints of one differ in their weights only
PUBLISHED: dict[str, U1Config] = {
    "U1-8B": U1Config(),
    "U1.5-8B": U1Config(head="conv", head_width=1024, noise_max=16.0),
}


def size_name(c: U1Config) -> str | None:
    """The name of a published network; None where it is none, whatever pictures it is asked for."""
    plain = dataclasses.replace(c.at((2048, 2048)), forcing=None) if 2048 % c.token_size == 0 else c
    return next((name for name, known in PUBLISHED.items() if known == plain), None)
