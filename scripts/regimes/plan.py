"""What is run: regimes of data, arms, patch sizes and seeds, and the settings that all runs share."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

from mlx_sf.checkpoints.config import Config
from mlx_sf.data.scenes import SCENE_CLASSES, SceneOptions
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models.jit import JiTConfig
from mlx_sf.sampling.solvers import SampleConfig
from mlx_sf.spectral import ForcingConfig

# smooth: next to no signal at high frequencies, all there is to see is noise. rough: the background carries signal at
# every frequency, but none that a large patch could predict. detail: smooth, and a fine grating inside every shape.
REGIMES: dict[str, SceneOptions] = {
    "smooth": SceneOptions(alpha=3.0, background=0.1, detail=0.0),
    "rough": SceneOptions(alpha=1.0, background=0.15, detail=0.0),
    "detail": SceneOptions(alpha=3.0, background=0.1, detail=0.3, detail_period=2.5),
}
ARMS: dict[str, str] = {
    "vanilla": "no forcing",
    "linear": "published forcing",
    "fixed": "fixed low-pass",
    "data": "cutoffs from the data",
}
BASELINE = "vanilla"


@dataclass(frozen=True)
class Plan:
    """Settings of an experiment. Sizes in pixels; `pool`, `held_out`, `samples` count pictures; `bins` of t are equal.

    `delta` is the data-to-noise ratio at which the "data" arm's cutoffs open. Raises `MlxSfError` for what cannot run.
    """

    img_size: int = 32
    patches: tuple[int, ...] = (16, 8, 4)
    regimes: tuple[str, ...] = tuple(REGIMES)
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    hidden_size: int = 64
    depth: int = 3
    num_heads: int = 2
    bottleneck_dim: int = 32
    steps: int = 250
    batch_size: int = 16
    lr: float = 4e-3
    warmup: int = 25
    ema: float = 0.98
    pool: int = 2000
    held_out: int = 128
    bins: int = 10
    samples: int = 256
    sample_steps: int = 10
    reference: int = 1000
    delta: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("regimes", REGIMES), ("arms", ARMS)):
            for got in getattr(self, name):
                if got not in known:
                    raise MlxSfError(f"regimes: {name} has {got!r}, want some of {', '.join(known)}")
        if BASELINE not in self.arms:
            raise MlxSfError(f"regimes: arms are {', '.join(self.arms)}, want {BASELINE} among them: gains are over it")
        for name in ("patches", "regimes", "arms", "seeds"):
            got = getattr(self, name)
            if not got or len(set(got)) != len(got):
                raise MlxSfError(f"regimes: {name} are {list(got)}, want at least one and each once")
        for name, low in (("steps", 1), ("batch_size", 1), ("pool", self.batch_size), ("held_out", 2), ("bins", 1)):
            if getattr(self, name) < low:
                raise MlxSfError(f"regimes: {name} is {getattr(self, name)}, want {low} or more")
        if min(self.samples, self.reference) < 2:
            raise MlxSfError(
                f"regimes: {self.samples} samples, {self.reference} reference scenes: want 2 or more of both"
            )

    def settings(self, regime: str) -> dict[str, Any]:
        """What a result depends on besides its own run: results with other settings must not be mixed with it."""
        values = dataclasses.asdict(self)
        for part in ("patches", "regimes", "arms", "seeds"):
            del values[part]
        return {**values, "scenes": dataclasses.asdict(REGIMES[regime])}

    def runs(self) -> "Iterator[Run]":
        """All runs, seeds outermost and arms innermost, so that an experiment that was cut short is still balanced."""
        for seed in self.seeds:
            for patch in self.patches:
                for regime in self.regimes:
                    for arm in self.arms:
                        yield Run(regime, patch, arm, seed)

    def times(self) -> np.ndarray:
        """(bins,) middles of the bins of t at which held-out scenes are judged."""
        return (np.arange(self.bins) + 0.5) / self.bins

    def weights(self) -> np.ndarray:
        """(bins,) shares of training spent in each bin, under the logit-normal distribution of t; they sum to 1."""
        flow = FlowConfig()
        edges = ndtr((logit(np.linspace(0, 1, self.bins + 1)) - flow.P_mean) / flow.P_std)
        return np.diff(edges)

    def config(self, run: "Run", cutoffs: tuple[float, ...]) -> Config:
        """The network of a run. Nothing but the treatment of its input differs between arms."""
        forcing = None
        if run.arm == "linear":
            forcing = ForcingConfig()
        elif run.arm == "fixed":
            forcing = ForcingConfig(scale_schedule="fixed", fixed_scale=mean_time(FlowConfig()))
        elif run.arm == "data":
            forcing = ForcingConfig(scale_schedule="data", schedule_cutoffs=cutoffs)
        model = JiTConfig(
            img_size=self.img_size,
            patch_size=run.patch,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            bottleneck_dim=self.bottleneck_dim,
            in_context_len=0,
            num_classes=len(SCENE_CLASSES),
            forcing=forcing,
        )
        return Config(model=model, sample=SampleConfig(steps=self.sample_steps), class_names=SCENE_CLASSES)


@dataclass(frozen=True, order=True)
class Run:
    """One network: a regime of data, a patch size in pixels, an arm and a seed."""

    regime: str
    patch: int
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.regime}, patch {self.patch}, {self.arm}, seed {self.seed}"


def mean_time(flow: FlowConfig) -> float:
    """Mean of t in training, by quadrature over the logit-normal's quantiles, to four digits.

    It is the "fixed" arm's scale: the published cutoff's mean, without its dependence on time.
    """
    quantiles = (np.arange(4001) + 0.5) / 4001
    return round(float(expit(flow.P_mean + flow.P_std * ndtri(quantiles)).mean()), 4)


QUICK = Plan(
    img_size=16,
    patches=(8, 4),
    regimes=("smooth", "detail"),
    seeds=(0, 1),
    hidden_size=32,
    depth=1,
    bottleneck_dim=16,
    steps=12,
    batch_size=8,
    warmup=2,
    pool=32,
    held_out=16,
    bins=4,
    samples=24,
    sample_steps=3,
    reference=48,
)
# sized for one Mac over a night; not run by us
FULL = Plan(
    img_size=64,
    patches=(32, 16, 8, 4),
    seeds=(0, 1, 2, 3, 4),
    hidden_size=192,
    depth=6,
    num_heads=3,
    bottleneck_dim=32,
    steps=10_000,
    batch_size=64,
    lr=1e-3,
    warmup=500,
    ema=0.999,
    pool=20_000,
    held_out=1000,
    bins=20,
    samples=2000,
    sample_steps=50,
    reference=10_000,
)
PRESETS = {"quick": QUICK, "default": Plan(), "full": FULL}
