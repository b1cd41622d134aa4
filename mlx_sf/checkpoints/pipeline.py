"""A checkpoint ready to draw: what `mlx_sf.load` gives, and what the commands draw with."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..common.progress import tell
from ..common.world import World
from ..device.defaults import dequantize_by_default, dtype_name, pick_dtype
from ..errors import MlxSfError
from ..formats.png import Picture
from ..models import Asked, architecture
from ..models.lora import add_adapter
from ..models.quantize import describe
from ..sampling.class_names import ClassNames
from ..sampling.generate import generate
from ..sampling.noise import MLX, Rng, as_rng
from ..sampling.output import finite_images
from ..sampling.request import Request, make_request, prompt_request, with_solver
from ..sampling.sampler import Sampler
from ..sampling.solvers import State
from .adapters import Adapter, merged_updates, read_adapters
from .checkpoint import Checkpoint
from .config import Config
from .features import features_of
from .load import demo_checkpoint, load_model
from .resolve import resolve
from .text_encoder import EncoderPrecision, TextFeatures
from .two_phase import Prefixes


def load(
    path: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    dequantize: bool | None = None,
    text_encoder: str | os.PathLike[str] | TextFeatures | Prefixes | None = None,
    text_encoder_precision: EncoderPrecision = "float32",
    lora_paths: Sequence[str | os.PathLike[str] | Adapter] = (),
    lora_scales: Sequence[float] = (),
    merge_lora: bool = False,
    height: int | None = None,
    width: int | None = None,
    forcing: bool = False,
    system_message: str | os.PathLike[str] | None = None,
) -> "Pipeline":
    """Load a checkpoint to draw from.

    Args:
        path: a file, a run's folder (its newest checkpoint), a short name of `mlx-sf models` ("jit-b/16"), or a place
            on the Hugging Face Hub ("org/name", "org/name@revision/folder"); None is the demo model that comes with the
            program. Foreign weights are converted once, into the cache.
        weights: the weight set, "model", "ema1" or "ema2"; None is ema1 where there is one.
        dtype: of the matrix products, "float32", "bfloat16" or "float16"; None is the device's default.
        dequantize: expand quantised weights to floats; None does so on a CPU, where their products are slow.
        text_encoder: of a model that draws from prompts: a folder or a name on the Hub; None is the one that its
            checkpoint names. It is read when a prompt is new; what it makes of prompts is kept in the cache.
        text_encoder_precision: "float32", as published, "bfloat16" or "8-bit".
        lora_paths: low-rank adapters for it, folders or places on the Hub. lora_scales: what each is multiplied by; 1
            where there is none.
        merge_lora: work the adapters into the weights, which must be floats, instead of keeping them apart.
        height, width: of the pictures in pixels, for a model that draws any size; None is the checkpoint's own.
        forcing: put the published Spectral Forcing before a network that was trained without: an ablation.
        system_message: of SenseNova-U1, a file; None is the published one.

    Raises `MlxSfError` for anything that is not a complete checkpoint, and for adapters of another network.
    """
    checkpoint = (
        path if isinstance(path, Checkpoint) else Checkpoint(demo_checkpoint() if path is None else resolve(path))
    )
    checkpoint.config = drawn_as(checkpoint.config, height, width, forcing)
    adapters = read_adapters(lora_paths, lora_scales, checkpoint.config.model)
    features = text_encoder if isinstance(text_encoder, TextFeatures | Prefixes) else features_of(
        checkpoint, text_encoder, text_encoder_precision, system_message, dtype, adapters
    )  # fmt: skip
    for note in features.notes() if isinstance(features, Prefixes) else ():
        tell(note)
    expand = dequantize_by_default() if dequantize is None else dequantize
    updates = merged_updates(adapters) if merge_lora else None
    network, config = load_model(checkpoint, weights, pick_dtype(dtype), expand, updates)
    if features is not None:
        network.features = features
    # what is drawn is what the file holds, expanded or not: pictures say how it was quantised
    config = dataclasses.replace(config, quantization=checkpoint.config.quantization)
    for adapter in adapters if not merge_lora else ():
        add_adapter(network, adapter.lora, adapter.tensors, adapter.scale)
    return Pipeline(network, config, checkpoint.path, dtype_name(pick_dtype(dtype)), tuple(map(str, adapters)))


def drawn_as(config: Config, height: int | None = None, width: int | None = None, forcing: bool = False) -> Config:
    """The configuration for pictures of this size, with Spectral Forcing in front where it was not."""
    config = config.at(height, width)
    return config.forced() if forcing else config


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A loaded network with its configuration, drawing pictures.

    Args:
        network: the network (`models.Network`). config: what its checkpoint says. path: the checkpoint's file.
        dtype: the type of its matrix products, by name. adapters: those added to it, each with its scale, in words.
    """

    network: Any
    config: Config
    path: Path
    dtype: str
    adapters: tuple[str, ...] = ()

    def sample(
        self,
        classes: Sequence[Asked] | Asked = None,
        *,
        num_images: int | None = None,
        seed: int = 0,
        noise: np.ndarray | str | None = None,
        rng: str | Rng = "mlx",
        rng_batch: int = 1,
        rng_threads: str | int | None = None,
        rng_world: int = 1,
        batch_size: int | None = None,
        **solver: Any,
    ) -> list[Picture]:
        """Draw pictures: PIL images that carry their settings, also into the PNG files they are saved to.

        Args:
            classes: class numbers or names, or prompts for a model that takes them, one picture each; the string
                "null" is no class; None goes through all classes.
            num_images: number of pictures; `classes` are gone through in turn. None: one for each of `classes`. Of a
                model that takes prompts it is the number for each of them.
            seed: picture i has seed `seed` + i and depends on that alone.
            noise: instead of seeds, initial noise: float32 (N, 3, H, W), standard normal, or the name of an .npy file.
            rng: whose random numbers a seed stands for: "mlx", "torch-cpu" or "torch-cuda" (`torch.randn`);
                or an `Rng` with its settings. rng_batch, rng_threads, rng_world: its `batch`, `threads` and `world`.
            batch_size: pictures at a time; None is 8, and fewer where a picture is a long sequence.
            solver: steps, method ("heun", "euler", "multistep"), cfg (guidance scale, 1 is off), cfg_interval
                (low, high), sample_t_eps, shift, cfg_norm; what is left out is the checkpoint's own.

        Raises `MlxSfError` for a class that the model does not have, and for settings out of range.
        """
        random = as_rng(rng, rng_batch, rng_threads, rng_world)
        request = request_for(self.config, classes, num_images, seed, noise, random)
        config = self.with_solver(solver).config
        pictures: list[Picture] = []
        for numbers, state in generate(
            self.network, config.flow, config.sample, request, batch_size or default_batch(config)
        ):
            if state.step == state.steps:
                for i, picture in zip(numbers, self.to_uint8(finite_images(state.z, numbers)), strict=True):
                    told = facts(config, request, i, self.path, self.dtype, self.adapters)
                    pictures.append(Picture.of(picture, told))
        return pictures

    def states(
        self,
        classes: Sequence[Asked] | Asked = None,
        *,
        num_images: int | None = None,
        seed: int = 0,
        noise: np.ndarray | str | None = None,
        rng: str | Rng = "mlx",
        rng_batch: int = 1,
        rng_threads: str | int | None = None,
        rng_world: int = 1,
        **solver: Any,
    ) -> Iterator[State]:
        """Watch one batch being drawn: the states after each step, not yet evaluated (`mx.eval(state.z)`).

        Takes what `sample` takes. `state.z` (N, 3, H, W) is the state at time `state.t`, `state.x` the finished picture
        that it implies, both in [-1, 1] for finished pictures; `mlx_sf.to_uint8` makes pixels of either.
        """
        random = as_rng(rng, rng_batch, rng_threads, rng_world)
        request = request_for(self.config, classes, num_images, seed, noise, random)
        config = self.with_solver(solver).config
        sampler = Sampler(self.network, config.flow, config.sample)
        return sampler.states(request.initial_noise(config.model.size), request.asked)

    def to_uint8(self, x: Any) -> np.ndarray:
        """Images (..., 3, H, W) in [-1, 1] -> pictures (..., H, W, 3) uint8, by the network's published rule."""
        return architecture(self.config.model).to_uint8(x)

    def with_solver(self, solver: dict[str, Any]) -> "Pipeline":
        """The same network drawing with other settings; None leaves the checkpoint's own."""
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, sample=with_solver(self.config.sample, solver))
        )

    def generate(
        self, request: Request, batch_size: int, world: World | None = None
    ) -> Iterator[tuple[Sequence[int], State]]:
        """States of this process's batches, each with the numbers of its images; evaluated."""
        return generate(self.network, self.config.flow, self.config.sample, request, batch_size, world)

    def facts(self, request: Request, i: int) -> dict[str, Any]:
        """Everything needed to draw image i again."""
        return facts(self.config, request, i, self.path, self.dtype, self.adapters)


def request_for(
    config: Config,
    classes: Sequence[Asked] | Asked = None,
    num_images: int | None = None,
    seed: int = 0,
    noise: np.ndarray | str | os.PathLike[str] | None = None,
    rng: Rng = MLX,
) -> Request:
    """A request checked against a checkpoint's configuration, before its weights are read."""
    k, size = config.model.num_classes, config.model.size
    wanted = None if classes is None else [classes] if isinstance(classes, int | str) else list(classes)
    if k:
        names = ClassNames.of(k, config.class_names)
        asked = None if wanted is None else [names.find(w) for w in wanted]
        return make_request(asked, range(k), num_images, seed, size, noise, rng)
    for w in wanted or ():
        if not isinstance(w, str):
            raise MlxSfError(f"{config.name}: draws from prompts, want texts, got {w!r}")
    verbatim = architecture(config.model).verbatim
    return prompt_request([str(w) for w in wanted or ()], num_images, seed, size, noise, rng, verbatim)


def default_batch(config: Config) -> int:
    """Pictures drawn at a time unless asked otherwise: 8, or as many as 4096 tokens hold."""
    return max(1, min(8, 4096 // config.model.tokens))


def facts(
    config: Config, request: Request, i: int, path: Path, dtype: str, adapters: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything needed to draw image i again, for its PNG."""
    s, asked = config.sample, request.asked[i]
    named = isinstance(asked, int) and ClassNames.of(config.model.num_classes, config.class_names).short(asked)
    return {
        "program": f"mlx-sf {__version__}",
        "model": config.name,
        "checkpoint": path.name,
        **_source(config),
        "weights": config.weights[0],
        **({"prompt": asked} if isinstance(asked, str) else {"class": "null" if asked is None else asked}),
        **({"class_name": named} if named else {}),
        **request.noise_facts(i),
        "steps": s.steps,
        "method": s.method,
        "cfg": s.cfg,
        "cfg_interval": [s.cfg_low, s.cfg_high],
        **({"last_step": s.last_step} if s.last_step else {}),
        "t_eps": s.t_eps if s.t_eps is not None else config.flow.t_eps,
        **({"shift": s.shift} if s.shift != 1 else {}),
        **({"cfg_norm": s.cfg_norm} if s.cfg_norm != "none" else {}),
        "noise_scale": config.flow.noise_scale,
        "dtype": dtype,
        **({"quantized": describe(config.quantization)} if config.quantization else {}),
        **({"adapter": f"{config.adapter.lora}, of {config.adapter.base_name}"} if config.adapter else {}),
        **({"adapters": ", ".join(adapters)} if adapters else {}),
    }


def _source(config: Config) -> dict[str, str]:
    """The place on the Hub, with its commit, that weights were converted from."""
    repo, commit = (config.provenance.get(k) for k in ("repo", "commit"))
    return {"source": f"{repo} at commit {commit}"} if repo and commit else {}
