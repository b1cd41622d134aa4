"""The public weights of this family: one table of what they are, what they need and how their authors draw with them.

Facts are those of the authors' pages and papers; nothing in this table was measured here. What is tested of
a layout (`VERIFIED`) is tested with a tiny network of the same keys, never with the weights themselves.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..flow import published_noise_scale
from ..models.jit_sizes import SIZES, find_size


@dataclass(frozen=True)
class Known:
    """Public weights.

    `name` is the short one that `--ckpt` takes. `path` is the folder or file inside `repo`; `revision` the commit it is
    pinned to, "" where none has been confirmed. `size` is a preset's name, `image` the pictures' side in pixels, `gb`
    the download in 10^9 bytes. `licence` is as its authors state it, "not stated" otherwise. `fid` is the authors' own
    FID-50K, None where they give none. `sampling` are the recommended settings, by the names of `SampleConfig`.
    `layout` is the tested layout: "diffusers", "fdloss" or "pth".
    """

    name: str
    repo: str
    path: str
    size: str
    image: int
    gb: float
    licence: str
    fid: float | None
    layout: str
    sampling: Mapping[str, Any]
    note: str = ""
    revision: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What its files do not say: settings of the network, the flow and the sampler."""
        size = find_size(self.size)[0]
        start = SIZES[size].in_context_start
        return {"in_context_start": start, "noise_scale": published_noise_scale(self.image), **self.sampling}

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {"settings": self.settings, "verified": VERIFIED[self.layout]}


# layout -> what is tested of it
VERIFIED = {
    "diffusers": "forward pass and pictures equal to golden numbers in this layout, with a tiny network",
    "fdloss": "forward pass and picture equal to golden numbers in this layout, with a tiny network",
    "pth": "the reader and the key table are tested with files of the published trainer's form",
}

_PUBLISHED = {"method": "heun", "steps": 50, "cfg_low": 0.1, "cfg_high": 1.0}
ONE_STEP = {"method": "euler", "steps": 1, "cfg": 1.0}  # FD-Loss


def _jit(size: str, patch: int, image: int, gb: float, cfg: float, fid: float) -> Known:
    folder = f"JiT-{size}-{patch}"
    sampling = {**_PUBLISHED, "cfg": cfg}
    name = f"jit-{size.lower()}/{patch}"
    return Known(
        name, "BiliSakura/JiT-diffusers", folder, f"{size}/{patch}", image, gb, "MIT", fid, "diffusers", sampling
    )


def _fd(size: str, kind: str, gb: float) -> Known:
    path = f"checkpoints/post-trained/JiT-{size}_FD-{kind}.pth"
    name = f"jit-{size.lower()}/16-fd-{kind.lower()}"
    note = "one step; the position table may be trained, and is read"
    return Known(name, "jjiaweiyang/FD-Loss", path, f"{size}/16", 256, gb, "MIT (code)", None, "pth", ONE_STEP, note)


KNOWN = (
    _jit("B", 16, 256, 0.525, 3.0, 3.66),
    _jit("L", 16, 256, 1.837, 2.4, 2.36),
    _jit("H", 16, 256, 3.811, 2.2, 1.86),
    _jit("B", 32, 512, 0.534, 3.0, 4.02),
    _jit("L", 32, 512, 1.847, 2.5, 2.53),
    _jit("H", 32, 512, 3.826, 2.3, 1.94),
    *(_fd(size, kind, gb) for size, gb in (("B", 0.53), ("L", 1.84), ("H", 3.81)) for kind in ("SIM", "Inception")),
    Known(
        "jit-h/16-cafm",
        "ByteDance-Seed/Adversarial-Flow-Models",
        "cafm/jit_h16_cafm.pth",
        "H/16",
        256,
        3.81,
        "not stated",
        1.80,
        "pth",
        {"method": "heun", "steps": 50, "cfg": 1.0},
        "no guidance; its authors' last step is Heun's, here Euler's",
    ),
)


def by_name(text: str) -> Known | None:
    """The known model of a short name, in any case; None where there is none."""
    return next((k for k in KNOWN if k.name == text.lower()), None)


def at(repo: str, path: str) -> Known | None:
    """The known model that lies at this place of a repository."""
    return next((k for k in KNOWN if k.repo.lower() == repo.lower() and k.path == path.strip("/")), None)


def assumed(settings: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Settings of this table as `convert.jit.configure` takes them: each with the place that says it."""
    return {name: (value, "table of known models") for name, value in settings.items()}


def recommended(size: str, patch: int, image: int) -> dict[str, Any]:
    """Recommended sampling of a published network, by its size; {} where nobody recommends any."""
    name = f"{size}/{patch}"
    found = next((k for k in KNOWN if k.layout == "diffusers" and k.size == name and k.image == image), None)
    return dict(found.sampling) if found else {}


def table() -> str:
    """The table of docs/models.md."""
    head = "| short name | where | pixels | download | licence | FID (authors) | drawn with | checked here |"
    lines = [head, "|" + " --- |" * 8]
    for k in KNOWN:
        s = k.sampling
        drawn = f"{s['method']}, {s['steps']} step{'s' * (s['steps'] > 1)}, cfg {s['cfg']:g}"
        drawn += f"; {k.note}" if k.note else ""
        fid = "not stated" if k.fid is None else f"{k.fid:.2f}"
        cells = [f"`{k.name}`", f"`{k.repo}/{k.path}`", str(k.image), f"{k.gb:.2f} GB", k.licence, fid, drawn]
        lines.append("| " + " | ".join([*cells, VERIFIED[k.layout]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
