"""The public weights of this family: one table of what they are, what they need and how their authors draw with them.

Facts are those of the authors' pages and papers; nothing in this table was measured here. What is tested of
a layout (`VERIFIED`) is tested with a tiny network of the same keys, never with the weights themselves.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..flow import published_noise_scale
from ..models import mmjit, mmjit_mf, u1_config
from ..models.jit_sizes import SIZES, find_size, model_config


@dataclass(frozen=True)
class Known:
    """Public weights.

    `name` is the short one that `--ckpt` takes. `path` is the folder or file inside `repo`; `revision` the commit it is
    pinned to, "" where none has been confirmed. `size` is a preset's name, `image` the pictures' side in pixels, `gb`
    the download in 10^9 bytes. `licence` is as its authors state it, "not stated" otherwise. `score` is the authors'
    own, FID of 50,000 pictures or GenEval, "" where they give none. `sampling` are the recommended settings, by the
    names of `SampleConfig`. `layout` is the tested layout: a key of `VERIFIED`. `architecture` is the network's.
    `default`: this is meant where a repository of several models is named alone.
    """

    name: str
    repo: str
    path: str
    size: str
    image: int
    gb: float
    licence: str
    score: str
    layout: str
    sampling: Mapping[str, Any]
    note: str = ""
    revision: str = ""
    architecture: str = "jit"
    default: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What its files do not say: settings of the network, the flow and the sampler."""
        if self.architecture != "jit":
            return {}  # its converter knows the published settings
        size = find_size(self.size)[0]
        start = SIZES[size].in_context_start
        return {"in_context_start": start, "noise_scale": published_noise_scale(self.image), **self.sampling}

    @property
    def place(self) -> str:
        """Where it lies on the Hub."""
        return f"{self.repo}/{self.path}".rstrip("/")

    def model_config(self) -> Any:
        """The configuration of its network, with the published sizes."""
        size, _, patch = self.size.partition("/")
        if self.architecture == "jit":
            return model_config(self.size, img_size=self.image, num_classes=1000, forcing=None)
        if self.architecture == "sensenova_u1":
            return u1_config.PUBLISHED[self.size]
        config = mmjit.model_config(size, int(patch), self.image)
        return config if self.architecture == "mmjit" else mmjit_mf.MMJiTMFConfig(**vars(config))

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {"settings": self.settings, "verified": VERIFIED[self.layout]}


# layout -> what is tested of it
VERIFIED = {
    "diffusers": "forward pass and pictures equal to golden numbers in this layout, with a tiny network",
    "fdloss": "forward pass and picture equal to golden numbers in this layout, with a tiny network",
    "minit2i": "forward pass and pictures equal to golden numbers in this layout, with a tiny network",
    "orbax": "forward pass equal to golden numbers in this layout, with a tiny network; needs `tensorstore`",
    "u1": "layers, pictures, token ids and all keys equal to golden numbers in this layout, with tiny networks",
    "student": "forward pass and four steps equal to golden numbers, with a tiny network; the file's tree was not seen",
    "pth": "the reader and the key table are tested with files of the published trainer's form",
}

_PUBLISHED = {"method": "heun", "steps": 50, "cfg_low": 0.1, "cfg_high": 1.0}
ONE_STEP = {"method": "euler", "steps": 1, "cfg": 1.0}  # FD-Loss
_T2I = {"method": "euler", "steps": 100}


def _jit(size: str, patch: int, image: int, gb: float, cfg: float, fid: float) -> Known:
    folder = f"JiT-{size}-{patch}"
    sampling = {**_PUBLISHED, "cfg": cfg}
    name = f"jit-{size.lower()}/{patch}"
    return Known(
        name,
        "BiliSakura/JiT-diffusers",
        folder,
        f"{size}/{patch}",
        image,
        gb,
        "MIT",
        f"FID {fid:.2f}",
        "diffusers",
        sampling,
    )


def _fd(size: str, kind: str, gb: float) -> Known:
    path = f"checkpoints/post-trained/JiT-{size}_FD-{kind}.pth"
    name = f"jit-{size.lower()}/16-fd-{kind.lower()}"
    note = "one step; the position table may be trained, and is read"
    return Known(name, "jjiaweiyang/FD-Loss", path, f"{size}/16", 256, gb, "MIT (code)", "", "pth", ONE_STEP, note)


def _t2i(
    kind: str, size: str, repo: str, path: str, gb: float, score: str, layout: str, cfg: float, default: bool = False
) -> Known:
    name, sampling = f"minit2i-{size.lower()}{kind}", {**_T2I, "cfg": cfg}
    return Known(
        name, repo, path, size, 512, gb, "not stated", score, layout, sampling, architecture="mmjit", default=default
    )


def _u1(name: str, repo: str, size: str, gb: float, note: str = "") -> Known:
    sampling = {"method": "euler", "steps": 50, "cfg": 4.0, "shift": 3.0}
    licence, architecture = "Apache-2.0 (code)", "sensenova_u1"
    return Known(name, f"sensenova/{repo}", "", size, 2048, gb, licence, "", "u1", sampling, note, "", architecture)


U1S = (
    _u1("sensenova-u1", "SenseNova-U1-8B-MoT", "U1-8B", 35.1),
    _u1("sensenova-u1-sft", "SenseNova-U1-8B-MoT-SFT", "U1-8B", 35.1),
    _u1("sensenova-u1.5", "SenseNova-U1.5-8B-MoT", "U1.5-8B", 35.1, "an earlier upload took 50 GB"),
)

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
        "FID 1.80",
        "pth",
        {"method": "heun", "steps": 50, "cfg": 1.0},
        "no guidance; its authors' last step is Heun's, here Euler's",
    ),
    _t2i("", "B/16", "MiniT2I/MiniT2I", "minit2i-b-16", 1.03, "GenEval 0.873", "minit2i", 2.5, default=True),
    _t2i("", "L/16", "MiniT2I/MiniT2I", "minit2i-l-16", 3.65, "GenEval 0.878", "minit2i", 6.0),
    _t2i("-jax", "B/16", "MiniT2I/MiniT2I-B-16-jax", "", 1.03, "GenEval 0.873", "orbax", 2.5),
    _t2i("-jax", "L/16", "MiniT2I/MiniT2I-L-16-jax", "", 3.63, "GenEval 0.883", "orbax", 6.0),
    _t2i("-pretrain", "B/16", "MiniT2I/MiniT2I-B-16-pretrain-jax", "", 1.03, "", "orbax", 2.5),
    Known(
        "minit2i-b/16-mf",
        "MiniT2I/MiniT2I-B-16-MF-jax",
        "",
        "B/16",
        512,
        1.05,
        "not stated",
        "",
        "student",
        {"method": "euler", "steps": 4, "cfg": 12.0},
        "four steps, one evaluation each",
        architecture="mmjit_mf",
    ),
    *U1S,
)


def by_name(text: str) -> Known | None:
    """The known model of a short name, in any case; None where there is none."""
    return next((k for k in KNOWN if k.name == text.lower()), None)


def at(repo: str, path: str) -> Known | None:
    """The known model that lies at this place of a repository."""
    return next((k for k in KNOWN if k.repo.lower() == repo.lower() and k.path == path.strip("/")), None)


def default_in(repo: str) -> Known | None:
    """The model that is meant where this repository of several is named alone; None where there is none such."""
    return next((k for k in KNOWN if k.repo.lower() == repo.lower() and k.default), None)


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
    head = "| short name | where | pixels | download | licence | score (authors) | drawn with | checked here |"
    lines = [head, "|" + " --- |" * 8]
    for k in KNOWN:
        s = k.sampling
        drawn = f"{s['method']}, {s['steps']} step{'s' * (s['steps'] > 1)}, cfg {s['cfg']:g}"
        drawn += f"; {k.note}" if k.note else ""
        score = k.score or "not stated"
        cells = [f"`{k.name}`", f"`{k.place}`", str(k.image), f"{k.gb:.2f} GB", k.licence, score, drawn]
        lines.append("| " + " | ".join([*cells, VERIFIED[k.layout]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
