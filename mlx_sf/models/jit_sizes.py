"""JiT's configuration, and its sizes by name: the published ones, and three for one laptop."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..common.fields import check_types, require
from ..errors import MlxSfError
from ..spectral import ForcingConfig


@dataclass(frozen=True)
class JiTConfig:
    """The network: JiT, with Spectral Forcing on its input or (`forcing` None) without.

    Sizes are in pixels (`img_size`, `patch_size`), tokens (`in_context_len`) or channels. Images are square, as the
    published ones are. The in-context tokens enter before block `in_context_start`. Dropout acts in the middle half of
    the blocks. Raises `FieldError` where sizes do not fit together.
    """

    architecture: ClassVar[str] = "jit"
    least_classes: ClassVar[int] = 1

    img_size: int = 256
    patch_size: int = 32
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    bottleneck_dim: int = 128
    in_context_len: int = 32
    in_context_start: int = 4
    num_classes: int = 1000
    out_channels: int = 3
    mlp_ratio: float = 4.0
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0
    forcing: ForcingConfig | None = field(default_factory=ForcingConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("img_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        least = self.least_classes
        require(self.num_classes >= least, "num_classes", self.num_classes, f"at least {least}")
        require(2 <= self.img_size <= 8192, "img_size", self.img_size, "2 to 8192 pixels")
        want = f"a divisor of img_size {self.img_size}"
        require(self.img_size % self.patch_size == 0, "patch_size", self.patch_size, want)
        want = f"a divisor of hidden_size {self.hidden_size}"
        require(self.hidden_size % self.num_heads == 0, "num_heads", self.num_heads, want)
        # the rotary embedding rotates pairs on two axes; the position table has sine and cosine on two axes
        require(self.head_dim % 4 == 0, "hidden_size / num_heads", self.head_dim, "a multiple of 4")
        require(self.out_channels in (3, 6), "out_channels", self.out_channels, "3, or 6 with pred_param hybrid")
        require(self.in_context_len >= 0, "in_context_len", self.in_context_len, "0 or more")
        if self.in_context_len:
            ok = 0 <= self.in_context_start < self.depth
            require(ok, "in_context_start", self.in_context_start, f"a block number from 0 to {self.depth - 1}")
        for name in ("attn_dropout", "proj_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "a probability below 1")
        require(self.mlp_hidden >= 1, "mlp_ratio", self.mlp_ratio, "a ratio that leaves at least one hidden channel")
        if self.forcing is not None:
            require(isinstance(self.forcing, ForcingConfig), "forcing", self.forcing, "a ForcingConfig or None")
            object.__setattr__(self, "forcing", self.forcing.on(self.size))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.img_size, self.img_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.img_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence, in-context tokens included."""
        return self.grid_size**2 + self.in_context_len

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of SwiGLU: two thirds of the plain feed-forward's, both rounded down."""
        return int(int(self.hidden_size * self.mlp_ratio) * 2 / 3)

    @property
    def null_class(self) -> int:
        """The label that means "no class": the row after the last class."""
        return self.num_classes


@dataclass(frozen=True)
class Size:
    """A network size. `patches` are the published patch sizes (any divisor of the image works)."""

    depth: int
    hidden_size: int
    num_heads: int
    bottleneck_dim: int
    in_context_len: int
    in_context_start: int
    patches: tuple[int, ...] = ()


SIZES: dict[str, Size] = {
    # ours, for one laptop
    "nano": Size(4, 128, 2, 64, 8, 1),
    "tiny": Size(6, 192, 3, 64, 16, 2),
    "small": Size(12, 384, 6, 128, 32, 4),
    # published
    "B": Size(12, 768, 12, 128, 32, 4, (8, 16, 32)),
    "L": Size(24, 1024, 16, 128, 32, 8, (16, 32)),
    "H": Size(32, 1280, 16, 256, 32, 10, (16, 32)),
    "700M": Size(36, 1024, 16, 128, 32, 12, (32,)),
    "2B": Size(27, 2048, 32, 256, 32, 9, (32,)),
    "7B": Size(24, 4096, 64, 512, 32, 8, (32,)),
}


_UNSUFFIXED = ("700M", "2B", "7B")  # published under a name without the patch size


def preset_name(size: str, patch_size: int) -> str:
    """Name of a preset as the published code spells it: JiT-B/32, JiT-700M."""
    return f"JiT-{size}" if size in _UNSUFFIXED and patch_size == 32 else f"JiT-{size}/{patch_size}"


def find_size(name: str) -> tuple[str, int | None]:
    """Size and, if the name carries one, patch size: "B/32" or "JiT-B/32" -> ("B", 32); "small" -> ("small", None)."""
    text = name.removeprefix("JiT-").removeprefix("jit-")
    size, _, patch = text.partition("/")
    match = next((s for s in SIZES if s.lower() == size.lower()), None)
    if match is None or (patch and not patch.isdigit()):
        raise MlxSfError(f"size {name!r} is unknown, want one of {', '.join(SIZES)} (with /PATCH if you like)")
    if match in _UNSUFFIXED and not patch and text != name:
        return match, 32
    return match, int(patch) if patch else None


def model_config(size: str, patch_size: int | None = None, img_size: int = 256, **changes: Any) -> JiTConfig:
    """The `JiTConfig` of a size by name ("small", "B/32", "JiT-700M"), with other fields changed as given."""
    found, own_patch = find_size(size)
    s = SIZES[found]
    values = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name != "patches"}
    return JiTConfig(img_size=img_size, patch_size=patch_size or own_patch or 32, **{**values, **changes})
