"""The sizes of JiT by name: the published ones, and three for one laptop."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import MlxSfError
from .jit import JiTConfig


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
