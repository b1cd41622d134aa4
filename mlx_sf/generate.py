"""From a request for pictures to files: which class and seed each image has, batches, outputs.

Everything that can be wrong with a request is found before the first step is computed.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import __version__
from .config import Config
from .device import compile_by_default
from .distributed import World
from .errors import MlxSfError
from .files import check_writable, replacing, writable_folder
from .image import grid, image_name, save_png
from .model import JiT
from .quantize import describe
from .sample import Sampler, State, seeded_noise, to_uint8


@dataclass(frozen=True)
class Request:
    """What to draw: image i has class `labels[i]`, and noise from `seeds[i]` or `noise[i]`."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    noise: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


def parse_classes(text: str, config: Config) -> list[int]:
    """Labels from "1,7,7", class names, or "null" for no class; each checked against the model."""
    k, names = config.model.num_classes, [n.lower() for n in config.class_names]
    labels = []
    for part in (p.strip() for p in text.split(",")):
        if part.lower() in names:
            labels.append(names.index(part.lower()))
        elif part.lower() in ("null", "none"):
            labels.append(config.model.null_class)
        elif part.isascii() and part.isdigit() and int(part) < k:
            labels.append(int(part))
        else:
            known = f", or a name such as {config.class_names[0]}" if names else ""
            raise MlxSfError(f"--classes: {part!r} is no class of this model, want 0 to {k - 1}{known}, or null")
    return labels


def make_request(
    config: Config, classes: str | None, num_images: int | None, seed: int, noise: str | os.PathLike[str] | None = None
) -> Request:
    """One image per entry of `classes`; with `num_images` the entries (default: all classes) are gone through in turn.

    Image i takes seed `seed + i`, unless initial noise comes from a file.
    """
    array = load_noise(noise, config.model.img_size) if noise is not None else None
    labels = parse_classes(classes, config) if classes is not None else list(range(config.model.num_classes))
    n = num_images
    if n is None:
        n = len(array) if array is not None else len(labels) if classes is not None else min(8, len(labels))
    if n < 1:
        raise MlxSfError(f"--num-images is {n}, want at least 1")
    if not 0 <= seed < 2**63 - n:
        raise MlxSfError(f"--seed is {seed}, want a number from 0 to 2^63")
    if array is not None and len(array) != n:
        raise MlxSfError(f"{noise}: holds noise for {len(array)} images, but {n} are asked for")
    if classes is not None and len(labels) > n:
        raise MlxSfError(f"--classes names {len(labels)} images, but only {n} are asked for")
    return Request(tuple(labels[i % len(labels)] for i in range(n)), tuple(seed + i for i in range(n)), array)


def load_noise(path: str | os.PathLike[str], img_size: int) -> np.ndarray:
    """Initial noise from an .npy file: standard normal, (N, 3, H, W), before the noise scale."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = getattr(e, "strerror", None) or "not a plain .npy array"
        raise MlxSfError(f"{path}: cannot be read as noise ({reason}), want float32 (N, 3, H, W)") from None
    want = (3, img_size, img_size)
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[1:] != want or array.dtype.kind != "f":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise MlxSfError(f"{path}: is {got}, want float32 noise of shape (N, 3, {img_size}, {img_size})")
    if len(array) == 0 or not np.isfinite(array).all():
        raise MlxSfError(f"{path}: is empty or holds NaN or infinite values, want standard normal noise")
    return array


def batches(n: int, batch_size: int) -> Iterator[range]:
    """Image numbers 0 ... n - 1 in batches."""
    return (range(i, min(i + batch_size, n)) for i in range(0, n, batch_size))


def with_solver(config: Config, changes: Mapping[str, Any]) -> Config:
    """The checkpoint's sampling settings with a command's put over them; None leaves a setting as it is.

    `changes` are fields of `SampleConfig`, or `cfg_interval` for both of its ends. Errors name the command's flags.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    if "sample_t_eps" in given:
        given["t_eps"] = given.pop("sample_t_eps")
    if "cfg_interval" in given:
        given["cfg_low"], given["cfg_high"] = given.pop("cfg_interval")
    try:
        return config.replace(sample=dataclasses.replace(config.sample, **given))
    except MlxSfError as e:
        raise MlxSfError(str(e).replace("config: ", "--").replace("cfg_interval", "cfg-interval")) from None


def my_batches(n: int, batch_size: int, world: World) -> list[range]:
    """The batches of this process: every `world.size`-th, as in the reference's evaluation."""
    return list(batches(n, batch_size))[world.rank :: world.size]


def generate(
    model: JiT, config: Config, request: Request, batch_size: int, world: World | None = None
) -> Iterator[tuple[Sequence[int], State]]:
    """States of this process's batches, one after another, each with the numbers of its images; evaluated."""
    compiled = compile_by_default()
    sampler = Sampler(model, config, compiled)
    for numbers in my_batches(len(request), batch_size, world or World()):
        # a compiled function has one entry per shape: fill the last batch up, and drop what is too much
        padded = list(numbers) + [numbers[-1]] * (min(batch_size, len(request)) - len(numbers)) * compiled
        if request.noise is not None:
            noise = mx.array(np.asarray(request.noise[padded], dtype=np.float32))
        else:
            noise = seeded_noise([request.seeds[i] for i in padded], config.model.img_size)
        labels = mx.array([request.labels[i] for i in padded])
        m = len(numbers)
        for state in ahead(sampler.states(noise, labels)):
            yield numbers, dataclasses.replace(state, z=state.z[:m], x=state.x[:m])


def ahead(states: Iterable[State]) -> Iterator[State]:
    """Evaluated states; while one is looked at, the device already works on the next."""
    waiting: State | None = None
    for state in states:
        mx.async_eval(state.z)
        if waiting is not None:
            mx.eval(waiting.z)
            yield waiting
        waiting = state
    if waiting is not None:
        mx.eval(waiting.z)
        yield waiting


def metadata(config: Config, request: Request, i: int, checkpoint: str, dtype: str) -> dict[str, Any]:
    """Everything needed to draw image i again."""
    s, label = config.sample, request.labels[i]
    names = config.class_names
    return {
        "program": f"mlx-sf {__version__}",
        "model": config.name,
        "checkpoint": Path(checkpoint).name,
        "weights": config.weights[0],
        "class": label if label < config.model.num_classes else "null",
        **({"class_name": names[label]} if label < len(names) else {}),
        **({"seed": request.seeds[i]} if request.noise is None else {"noise": f"image {i} of a file"}),
        "steps": s.steps,
        "method": s.method,
        "cfg": s.cfg,
        "cfg_interval": [s.cfg_low, s.cfg_high],
        "t_eps": s.t_eps if s.t_eps is not None else config.flow.t_eps,
        "noise_scale": config.flow.noise_scale,
        "dtype": dtype,
        **({"quantized": describe(config.quantization)} if config.quantization else {}),
    }


class Output:
    """Where finished images go: a folder of PNGs, one PNG, or an .npy of unclipped float32 (N, 3, H, W).

    Opening it proves that it can be written. `add` takes images as they are finished, `close` completes the files.
    Of several processes each writes its own PNGs; what is one file comes together on rank 0.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        request: Request,
        img_size: int,
        sheet: bool = False,
        world: World | None = None,
    ) -> None:
        self.path, self.request, self.sheet, self.world = Path(path), request, sheet, world or World()
        self.kind = self.path.suffix if self.path.suffix in (".npy", ".png") and not self.path.is_dir() else "folder"
        self.written: list[Path] = []
        self._arrays: dict[int, np.ndarray] = {}
        self._shape = (3, img_size, img_size) if self.kind == ".npy" else (img_size, img_size, 3)
        if self.kind == "folder":
            if self.path.suffix and not self.path.exists() and self.path.suffix.lower() in (".jpg", ".jpeg", ".npz"):
                raise MlxSfError(f"{path}: pictures are written as .png or .npy, or into a folder")
            writable_folder(self.path)
        else:
            check_writable(self.path)

    def add(self, numbers: Sequence[int], z: mx.array, describe: Any) -> None:
        values = np.asarray(z, dtype=np.float32)
        bad = [i for i, v in zip(numbers, values, strict=True) if not np.isfinite(v).all()]
        if bad:
            raise MlxSfError(
                f"image {bad[0]} came out as NaN or infinite: try --dtype float32, or check the checkpoint"
            )
        for i, v in zip(numbers, values, strict=True):
            if self.kind == ".npy":
                self._arrays[i] = v
                continue
            picture = to_uint8(v)
            if self.kind == "folder":
                save_png(self.path / image_name(i), picture, describe(i))
                self.written.append(self.path / image_name(i))
            if self.sheet or self.kind == ".png":
                self._arrays[i] = picture

    def close(self, describe: Any) -> list[Path]:
        ordered = self._gathered()
        if not self.world.main:
            return self.written
        if self.kind == ".npy":
            with replacing(self.path) as temporary, open(temporary, "wb") as f:
                np.save(f, np.stack(ordered))
            self.written.append(self.path)
        elif self.kind == ".png":
            save_png(self.path, grid(ordered), {**describe(0), "images": len(ordered)})
            self.written.append(self.path)
        elif self.sheet:
            save_png(self.path / "grid.png", grid(ordered), {**describe(0), "images": len(ordered)})
            self.written.append(self.path / "grid.png")
        return self.written

    def _gathered(self) -> list[np.ndarray]:
        """The images that go into one file, in order, from all processes."""
        if self.world.size > 1 and (self.kind != "folder" or self.sheet):
            shape, dtype = self._shape, np.float32 if self.kind == ".npy" else np.uint8
            mine = np.zeros((len(self.request), *shape), np.float32)
            for i, array in self._arrays.items():
                mine[i] = array
            return list(np.asarray(mx.distributed.all_sum(mx.array(mine))).astype(dtype))
        return [self._arrays[i] for i in sorted(self._arrays)]


class Stepwise:
    """Strips that show how each image came about: the state z above, the implied finished image below."""

    COLUMNS = 10

    def __init__(self, steps: int) -> None:
        self.shown = {round(s) for s in np.linspace(1, steps, min(steps, self.COLUMNS))}
        self.columns: dict[int, list[np.ndarray]] = {}

    def add(self, numbers: Sequence[int], state: State) -> None:
        if state.step not in self.shown:
            return
        pictures = np.concatenate([to_uint8(state.z), to_uint8(state.x)], axis=1)
        for i, picture in zip(numbers, pictures, strict=True):
            self.columns.setdefault(i, []).append(picture)

    def save(self, folder: Path, describe: Any) -> None:
        for i, columns in self.columns.items():
            save_png(folder / f"{i:05d}_steps.png", grid(columns, columns=len(columns)), describe(i))
        self.columns.clear()
