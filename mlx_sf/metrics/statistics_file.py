"""Statistics files: what one side of a comparison is, without its pictures.

An `.npz` with `mu` (D,) and `sigma` (D, D) as torch-fidelity's fork, pytorch-fid and ADM write it; files made here add
the float64 mean, the spectrum, on request the features, and where everything came from.
"""

import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import replacing
from ..errors import MlxSfError, option
from .inception import TAPS
from .moments import Gaussian, covariance_factor
from .scores import MeanStd

FORMAT = "mlx-sf statistics"
_LARGEST = 1 << 27  # bytes of any array but the features: sigma of 2048 dimensions takes a quarter
PUBLISHED = "a statistics file is an .npz with arrays mu (D,) and sigma (D, D), such as jit_in256_stats.npz"


@dataclass(frozen=True)
class Measured:
    """What was measured on a set of pictures.

    features: Gaussian of the Inception features. spectrum: Gaussian of the log band powers. rows: features (N, D)
    float32, where they were kept. inception_score: where logits were computed. provenance: see `write_statistics`.
    """

    features: Gaussian
    spectrum: Gaussian | None = None
    rows: np.ndarray | None = None
    inception_score: MeanStd | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    where: str = "statistics"

    @property
    def count(self) -> int | None:
        return self.features.count


def write_statistics(path: str | os.PathLike[str], measured: Measured) -> None:
    """Write a statistics file, atomically. Readable by torch-fidelity's fork (mu float32, sigma float64).

    The provenance is JSON in a uint8 array: format, img_size [height, width], count, tap, inception_sha256, source
    and how the pictures were prepared.
    """
    g = measured.features
    arrays: dict[str, Any] = {"mu": g.mu.astype(np.float32), "sigma": g.sigma, "mu_float64": g.mu}
    if measured.spectrum is not None:
        arrays |= {"spectrum_mu": measured.spectrum.mu, "spectrum_sigma": measured.spectrum.sigma}
    score = measured.inception_score
    facts = {**measured.provenance, "format": FORMAT, "version": 1, "count": g.count}
    if score is not None:
        facts["inception_score"] = [score.mean, score.std]
    arrays["provenance"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    if measured.rows is not None:
        arrays["features"] = np.asarray(measured.rows, dtype=np.float32)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **arrays)


def read_statistics(path: str | os.PathLike[str], tap: str = "2048", keep_rows: bool = False) -> Measured:
    """Read and check a statistics file, ours or a published one, for features of a tap.

    Raises `MlxSfError` saying what is wrong with it: not an .npz, arrays missing, of another shape, not finite, not a
    covariance.
    """
    path = Path(path)
    if not path.exists():
        raise MlxSfError(f"{path}: no such file, want reference statistics or a folder of pictures")
    try:
        arrays = _read_arrays(path, keep_rows)
    except MlxSfError:
        raise
    except OSError as e:
        raise MlxSfError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:  # zipfile, zlib and NumPy raise many kinds on damaged input
        raise MlxSfError(f"{path}: not a statistics file ({type(e).__name__}: {e}): {PUBLISHED}") from None
    facts = _facts(path, arrays.get("provenance"))
    count = facts.get("count")
    features = _gaussian(path, arrays, "mu", "sigma", count)
    if features.dims != TAPS[tap]:
        other = next((t for t, d in TAPS.items() if d == features.dims), None)
        hint = f"use {option('feature_layer')} {other}" if other else "take another file"
        raise MlxSfError(
            f"{path}: statistics have {features.dims} dimensions, features of layer {tap} have {TAPS[tap]}: {hint}"
        )
    spectrum = _gaussian(path, arrays, "spectrum_mu", "spectrum_sigma", count) if "spectrum_mu" in arrays else None
    rows = arrays.get("features")
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != features.dims or not np.isfinite(rows).all()):
        raise MlxSfError(f"{path}: features have shape {rows.shape} or are not finite, want (N, {features.dims})")
    score = facts.get("inception_score")
    return Measured(features, spectrum, rows, MeanStd(*score) if score else None, facts, str(path))


def _read_arrays(path: Path, keep_rows: bool) -> dict[str, np.ndarray]:
    wanted = ["mu", "sigma", "mu_float64", "spectrum_mu", "spectrum_sigma", "provenance"]
    with zipfile.ZipFile(path) as z:
        sizes = {i.filename.removesuffix(".npy"): i.file_size for i in z.infolist()}
    for name in ("mu", "sigma"):
        if name not in sizes:
            listed = ", ".join(sorted(sizes)[:6]) or "nothing"
            raise MlxSfError(f"{path}: holds no array {name!r} (it holds {listed}): {PUBLISHED}")
    large = next((n for n in wanted if sizes.get(n, 0) > _LARGEST), None)
    if large:
        raise MlxSfError(f"{path}: array {large!r} would take {sizes[large]} bytes: {PUBLISHED}")
    if keep_rows:
        wanted.append("features")
    with np.load(path, allow_pickle=False) as z:
        return {name: z[name] for name in wanted if name in sizes}


def _gaussian(path: Path, arrays: Mapping[str, np.ndarray], mu_name: str, sigma_name: str, count: Any) -> Gaussian:
    mu, sigma = arrays[mu_name], arrays.get(sigma_name, np.zeros(0))
    if mu_name == "mu" and "mu_float64" in arrays and arrays["mu_float64"].shape == mu.shape:
        mu = arrays["mu_float64"]
    for name, a in ((mu_name, mu), (sigma_name, sigma)):
        if a.dtype.kind not in "fiu":
            raise MlxSfError(f"{path}: array {name!r} is {a.dtype}, want numbers")
        if not np.isfinite(a).all():
            raise MlxSfError(f"{path}: array {name!r} holds NaN or infinite values: make or download it again")
    D = mu.size
    if mu.shape != (D,) or sigma.shape != (D, D) or D == 0:
        raise MlxSfError(f"{path}: {mu_name} has shape {mu.shape} and {sigma_name} {sigma.shape}, want (D,) and (D, D)")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    largest = float(np.abs(sigma).max())
    if float(np.abs(sigma - sigma.T).max()) > 1e-5 * largest or float(np.diag(sigma).min()) < 0:
        raise MlxSfError(f"{path}: {sigma_name} is not symmetric or has a negative variance: not a covariance")
    sigma = (sigma + sigma.T) / 2
    # the factor is needed for every comparison, and shows whether sigma has a root at all
    factor = covariance_factor(Gaussian(mu, sigma))
    missing = abs(float(np.trace(sigma)) - float(np.square(factor).sum()))
    if missing > 1e-4 * max(float(np.trace(sigma)), 1e-300):
        raise MlxSfError(f"{path}: {sigma_name} has negative eigenvalues: not a covariance")
    return Gaussian(mu, sigma, count, factor)


def _facts(path: Path, raw: np.ndarray | None) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        facts = json.loads(raw.astype(np.uint8).tobytes())
        count, score = facts.get("count"), facts.get("inception_score")
        well_formed = (count is None or isinstance(count, int)) and (
            score is None or (len(score) == 2 and all(isinstance(v, float) for v in score))
        )
    except (ValueError, AttributeError, TypeError):
        well_formed = False
    if not well_formed:
        raise MlxSfError(f"{path}: its provenance cannot be read: damaged, make it again with `mlx-sf stats`")
    return dict(facts)


def check_comparable(measured: Mapping[str, Any], reference: Measured) -> list[str]:
    """Refuse a reference that is known to be of other pictures or another network; say what it does not tell.

    `measured` holds img_size [height, width], tap and inception_sha256 of the samples' side.
    """
    facts, notes = reference.provenance, []
    size = facts.get("img_size")
    if size is None:
        named = re.search(r"in(\d{3,4})_", Path(reference.where).name)  # as in jit_in256_stats.npz
        if named and int(named[1]) != measured["img_size"][0]:
            notes.append(f"{reference.where} is named after {named[1]}-pixel images, the samples are of another size")
        notes.append(
            f"{reference.where} does not say the image size, the number of images or the network it was made with"
        )
    elif list(size) != list(measured["img_size"]):
        raise MlxSfError(
            f"{reference.where}: statistics of {size[1]}x{size[0]} pictures, the samples are "
            f"{measured['img_size'][1]}x{measured['img_size'][0]}: make others of that size with `mlx-sf stats`"
        )
    sha = facts.get("inception_sha256")
    if sha is not None and sha != measured["inception_sha256"]:
        raise MlxSfError(
            f"{reference.where}: was made with other Inception weights ({sha[:12]}..., these are "
            f"{measured['inception_sha256'][:12]}...): the numbers would mean nothing"
        )
    if facts.get("tap", measured["tap"]) != measured["tap"]:
        raise MlxSfError(f"{reference.where}: holds features of layer {facts['tap']}, want {measured['tap']}")
    return notes
