"""What the forcing does to one picture at one time: the pictures of the Forcing tab, computed with the library's parts.

Everything but the time is kept from call to call, so that moving t costs one transform and the drawing.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image

from ..common.pixels import from_uint8, to_uint8
from ..data.scenes import SCENE_CLASSES, scene
from ..data.sources import open_source
from ..errors import MlxSfError
from ..flow import add_noise
from ..sampling.noise import seeded_noise
from ..spectral import ForcingConfig, SpectralForcing, masks
from ..spectrum import Meter, Spectrum, data_schedule, measure
from ..spectrum.state import bands
from .figures import StateFigure
from .files import uploaded_picture

SIZES = (64, 128, 256, 512)
SCHEDULES = ("linear", "cosine", "power", "fixed", "data", "none")
_MEASURED = 256  # pictures of a folder that its spectrum is taken from
_KEPT = 24  # results of each kind that are kept

_T = TypeVar("_T")


@dataclass(frozen=True)
class Look:
    """What to look at.

    Args:
        file: a picture's file, "" for the scene `number` of `kind`. size: side in pixels.
        schedule: one of `SCHEDULES`. power, fixed: of the schedules of those names. window: side of the windows that
            are filtered on their own, 0 for the whole picture.
        noise_scale: standard deviation of the noise. seed: of the noise. t: the time.
        folder: pictures whose spectrum is taken instead of the picture's own, "" for none.
    """

    file: str = ""
    kind: str = SCENE_CLASSES[0]
    number: int = 0
    size: int = 256
    schedule: str = "linear"
    power: float = 2.0
    fixed: float = 0.5
    window: int = 0
    noise_scale: float = 1.0
    seed: int = 0
    t: float = 0.3
    folder: str = ""


@dataclass(frozen=True)
class View:
    """The picture, its noisy state, what the mask lets through, the mask, the bands, and a sentence."""

    picture: np.ndarray
    noisy: np.ndarray
    passed: np.ndarray
    mask: np.ndarray
    figure: Image.Image
    sentence: str


class Viewer:
    """Looks, one at a time, in a thread of their own: MLX's arrays stay with the thread that made them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "forcing")
        self._kept: dict[Hashable, Any] = {}
        self._shown: Hashable = None  # what the lines of the figure drawn last are of

    def look(self, look: Look) -> View:
        return self._thread.submit(self._look, look).result()

    def measure_folder(self, look: Look) -> str:
        """Measure the spectrum of `look.folder` and say of what it is."""
        spectrum = self._thread.submit(self._spectrum, look).result()
        return f"{spectrum.source}: the lines are of {spectrum.count} of its pictures"

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self, look: Look) -> View:
        size = (look.size, look.size)
        picture = self._picture(look)
        x = self._once(("x", *_source(look)), lambda: from_uint8(mx.array(picture[None])))
        noise = self._once(("noise", look.seed, look.size), lambda: seeded_noise([look.seed], size))
        spectrum = self._spectrum(look)
        forcing = self._forcing(look, spectrum)
        t = mx.array([look.t], dtype=mx.float32)
        z = add_noise(x, noise, t, look.noise_scale)
        if forcing is None:
            passed, mask = z, np.ones(size)
        else:
            operator = self._once(("operator", forcing, look.size), lambda: SpectralForcing.of(forcing, size))
            passed, mask = operator(z, t), masks(forcing, size, look.t)[0]
        b = bands(spectrum, forcing, look.noise_scale, look.t)
        figure = self._figure(look, spectrum, forcing)
        noisy, seen = to_uint8(mx.concatenate([z, passed]))
        grey = to_uint8(np.broadcast_to(2 * mask - 1, (3, *mask.shape)))
        return View(picture, noisy, seen, grey, figure.at(b), b.sentence())

    def _once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What `make` gives, the first time; the oldest is dropped where there are many."""
        found: _T = self._kept.pop(key) if key in self._kept else make()
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return found

    def _picture(self, look: Look) -> np.ndarray:
        if look.file:
            return self._once(("picture", *_source(look)), lambda: uploaded_picture(look.file, look.size))
        index = look.number * len(SCENE_CLASSES) + SCENE_CLASSES.index(look.kind)
        return self._once(("scene", index, look.size), lambda: scene(index, look.size)[0])

    def _spectrum(self, look: Look) -> Spectrum:
        if look.window > look.size:
            raise MlxSfError(f"windows of {look.window} pixels do not fit into {look.size}: choose smaller ones")
        if look.folder:
            return self._once(_measured(look), lambda: measure(_folder(look), _MEASURED, look.window or None))
        return self._once(_measured(look), lambda: self._own_spectrum(look))

    def _own_spectrum(self, look: Look) -> Spectrum:
        meter = Meter(look.size, look.window or None)
        meter.add(np.array(from_uint8(mx.array(self._picture(look)[None]))))
        return meter.so_far("this picture")

    def _forcing(self, look: Look, spectrum: Spectrum) -> ForcingConfig | None:
        key = ("forcing", *_which(look), *_measured(look))
        return self._once(key, lambda: forcing_of(look.schedule, look, spectrum))

    def _figure(self, look: Look, spectrum: Spectrum, forcing: ForcingConfig | None) -> StateFigure:
        k, power = spectrum.k[1:], spectrum.power()[1:]
        top = 10.0 ** np.ceil(np.log10(max(4 * power.max(), 4 * look.noise_scale**2)))
        figure = self._once(("figure", len(k), top), lambda: StateFigure(k, top))
        shown = (figure, *_which(look), *_measured(look))
        if shown != self._shown:
            others = {n: forcing_of(n, look, spectrum) for n in SCHEDULES if n not in (look.schedule, "none")}
            figure.set(spectrum, {f"{look.schedule} (chosen)": forcing, **others}, look.noise_scale)
            self._shown = shown
        return figure


def forcing_of(schedule: str, look: Look, spectrum: Spectrum) -> ForcingConfig | None:
    """The operator that a schedule's name means here, None for none."""
    if schedule == "none":
        return None
    window = look.window if look.window < look.size else 0
    if schedule == "power":
        return ForcingConfig(window, "power", schedule_power=look.power)
    if schedule == "fixed":
        return ForcingConfig(window, "fixed", fixed_scale=look.fixed)
    if schedule == "data":
        return ForcingConfig(window, "data", schedule_cutoffs=data_schedule(spectrum, look.noise_scale))
    if schedule == "cosine":
        return ForcingConfig(window, "cosine")
    return ForcingConfig(window, "linear")


def _source(look: Look) -> tuple[Hashable, ...]:
    return (look.file, look.kind, look.number, look.size)


def _measured(look: Look) -> tuple[Hashable, ...]:
    """What the spectrum depends on."""
    return ("spectrum", look.window, look.folder or _source(look), look.size)


def _which(look: Look) -> tuple[Hashable, ...]:
    return (look.schedule, look.power, look.fixed, look.window, look.size, look.noise_scale)


def _folder(look: Look) -> Any:
    path = Path(look.folder).expanduser()
    if not path.is_dir():
        raise MlxSfError(f"{look.folder}: no such folder on this machine: name one with pictures in it")
    return open_source(str(path), look.size)
