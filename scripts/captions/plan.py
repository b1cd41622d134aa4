"""What is run: scenes, arms, patch sizes and seeds, and the settings that all runs share."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import logit, ndtr

from mlx_sf.checkpoints.config import Config
from mlx_sf.data.captioned_scenes import BACKGROUNDS, COLOURS, PHRASINGS, SHAPES, VOCABULARY, lab
from mlx_sf.data.scenes import SceneOptions
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models.jit_text import JiTTextConfig
from mlx_sf.models.text import TextConfig
from mlx_sf.sampling.solvers import SampleConfig
from mlx_sf.spectral import ForcingConfig
from scripts.regimes.plan import mean_time

ARMS: dict[str, str] = {"none": "no forcing", "linear": "published forcing", "fixed": "fixed low-pass"}
BASELINE = "none"
_MOST_WORDS = 10  # of a caption
_CONTRAST = 43  # least CIELAB distance between an object and what lies behind it, as in the library's own scenes
_FEWEST_PHRASINGS = min(map(len, PHRASINGS.values()))


@dataclass(frozen=True)
class Scenes:
    """What captioned scenes are drawn of: these shapes and colours alone, on one of these backgrounds.

    All shapes, all colours and no `backgrounds` are the library's own scenes. Captions take turns through the first
    `phrasings` ways of saying it. What is held out stays the library's choice.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = ()
    phrasings: int = _FEWEST_PHRASINGS
    options: SceneOptions = field(default_factory=SceneOptions)

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("colours", COLOURS), ("backgrounds", BACKGROUNDS)):
            for got in getattr(self, name):
                if got not in known:
                    raise MlxSfError(f"captions: {name} has {got!r}, want some of {', '.join(known)}")
        if min(len(self.shapes), len(self.colours)) < 3:
            raise MlxSfError("captions: want 3 or more shapes and colours, so that some combinations can be held out")
        if not 1 <= self.phrasings <= _FEWEST_PHRASINGS:
            raise MlxSfError(f"captions: phrasings is {self.phrasings}, want 1 to {_FEWEST_PHRASINGS}")
        if not self.backgrounds and (set(self.shapes), set(self.colours)) != (set(SHAPES), set(COLOURS)):
            raise MlxSfError("captions: chosen shapes or colours need backgrounds, want 1 or more of them")
        for b in self.backgrounds:
            ends = lab(np.array(BACKGROUNDS[b]))
            for c in self.colours:
                if np.linalg.norm(ends - lab(np.array(COLOURS[c])), axis=-1).min() < _CONTRAST:
                    raise MlxSfError(f"captions: {c} does not stand out from the background {b}: leave out one of them")


# every shape lacks exactly one of the colours, and 6 of the 48 relations are held out
FEW = Scenes(("square", "triangle", "ring", "cross"), ("yellow", "green", "blue", "pink"), ("slate",), 3)
# every shape lacks one of three colours, and 4 of the 24 relations are held out
FEWEST = Scenes(("square", "triangle", "ring"), ("yellow", "green", "blue"), ("slate",), 3)


@dataclass(frozen=True)
class Plan:
    """Settings of an experiment. Sizes in pixels; `pool`, `held_out`, `reference` count pictures.

    `prompts` are drawn of each category and split, each `pictures` times; the first `sheet` of them are kept to be
    looked at. `bins` of t are equal. The rate `lr` rises over `warmup` steps and falls to 0 over the last `cooldown`.
    Raises `MlxSfError` for what cannot run.
    """

    img_size: int = 32
    patches: tuple[int, ...] = (8, 4)
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    scenes: Scenes = FEW
    hidden_size: int = 96
    depth: int = 4
    num_heads: int = 4
    bottleneck_dim: int = 48
    in_context_start: int = 1
    text_width: int = 64
    steps: int = 9000
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 100
    cooldown: int = 5000
    ema: float = 0.99
    pool: int = 16_000
    held_out: int = 120
    bins: int = 10
    prompts: int = 48
    pictures: int = 1
    sheet: int = 2
    sample_steps: int = 12
    cfg: float = 3.0
    reference: int = 1200

    def __post_init__(self) -> None:
        for got in self.arms:
            if got not in ARMS:
                raise MlxSfError(f"captions: arms has {got!r}, want some of {', '.join(ARMS)}")
        if BASELINE not in self.arms:
            raise MlxSfError(
                f"captions: arms are {', '.join(self.arms)}, want {BASELINE} among them: differences are to it"
            )
        for name in ("patches", "arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise MlxSfError(f"captions: {name} are {list(values)}, want at least one and each once")
        least = {"steps": 1, "batch_size": 1, "pool": self.batch_size, "held_out": 2, "bins": 1, "prompts": 1}
        least |= {"pictures": 1, "sheet": 0, "reference": 2, "warmup": 0, "cooldown": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise MlxSfError(f"captions: {name} is {getattr(self, name)}, want {low} or more")
        if self.sheet > self.prompts:
            raise MlxSfError(
                f"captions: sheet is {self.sheet}, want {self.prompts} or fewer: there are no more prompts"
            )

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides its own run, as JSON has it: results of other settings must not be mixed."""
        values = dataclasses.asdict(self)
        for part in ("patches", "arms", "seeds"):
            del values[part]
        return dict(json.loads(json.dumps(values)))

    def runs(self) -> "Iterator[Run]":
        """All runs, seeds outermost and arms innermost, so that an experiment that was cut short is still balanced."""
        for seed in self.seeds:
            for patch in self.patches:
                for arm in self.arms:
                    yield Run(patch, arm, seed)

    def times(self) -> np.ndarray:
        """(bins,) middles of the bins of t at which held-out scenes are judged."""
        return (np.arange(self.bins) + 0.5) / self.bins

    def weights(self) -> np.ndarray:
        """(bins,) shares of training spent in each bin, under the logit-normal distribution of t; they sum to 1."""
        flow = FlowConfig()
        edges = ndtr((logit(np.linspace(0, 1, self.bins + 1)) - flow.P_mean) / flow.P_std)
        return np.diff(edges)

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...; never 0."""
        rise = min(1.0, step / max(self.warmup, 1))
        return self.lr * rise * min(1.0, (self.steps + 1 - step) / max(self.cooldown, 1))

    def decay(self, step: int) -> float:
        """Decay of the averaged weights at step 1, 2, ...: at first the average is over the steps so far."""
        return min(self.ema, step / (step + 10))

    def config(self, run: "Run") -> Config:
        """The network of a run. Nothing but the treatment of its input differs between arms."""
        forcing = None
        if run.arm == "linear":
            forcing = ForcingConfig()
        elif run.arm == "fixed":
            forcing = ForcingConfig(scale_schedule="fixed", fixed_scale=mean_time(FlowConfig()))
        model = JiTTextConfig(
            img_size=self.img_size,
            patch_size=run.patch,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            bottleneck_dim=self.bottleneck_dim,
            in_context_start=self.in_context_start,
            text=TextConfig("", self.text_width, _MOST_WORDS, VOCABULARY),
            forcing=forcing,
        )
        return Config(model=model, sample=SampleConfig("multistep", self.sample_steps, self.cfg, cfg_low=0.0))


@dataclass(frozen=True, order=True)
class Run:
    """One network: a patch size in pixels, an arm and a seed."""

    patch: int
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}, patch {self.patch}, {ARMS[self.arm]}"

    @property
    def name(self) -> str:
        """For files."""
        return f"seed{self.seed}-patch{self.patch}-{self.arm}"


MICRO = Plan(
    patches=(16, 8),
    seeds=(0, 1),
    hidden_size=16,
    depth=1,
    num_heads=2,
    bottleneck_dim=8,
    in_context_start=0,
    text_width=8,
    steps=6,
    batch_size=6,
    warmup=2,
    cooldown=2,
    pool=18,
    held_out=8,
    bins=4,
    prompts=2,
    sheet=1,
    sample_steps=3,
    reference=24,
)
# sized for one GPU, or a Mac over nights; not run by us
LONG = Plan(
    img_size=64,
    patches=(16, 8),
    scenes=Scenes(),
    hidden_size=256,
    depth=8,
    bottleneck_dim=96,
    in_context_start=2,
    text_width=128,
    steps=30_000,
    batch_size=64,
    lr=1e-3,
    warmup=500,
    cooldown=10_000,
    ema=0.999,
    pool=60_000,
    held_out=600,
    bins=20,
    prompts=100,
    pictures=4,
    sample_steps=20,
    reference=6000,
)
SIMPLEST = dataclasses.replace(Plan(), scenes=FEWEST)
PRESETS = {"micro": MICRO, "small": Plan(), "simplest": SIMPLEST, "long": LONG}
