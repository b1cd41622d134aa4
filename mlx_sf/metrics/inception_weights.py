"""Weights of the FID Inception-v3: their names and shapes, reading them from any container, fetching them once.

The public file is a `torch.save` state dict of 472 float tensors. A converted file holds the same tensors under the
same names in PyTorch's layout (O, I, kh, kw); folding and transposing are the network's business.
"""

import hashlib
import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.files import cache_folder, replacing, sha256
from ..common.progress import Progress
from ..errors import MlxSfError, option
from ..formats.tensor_file import Entry, TensorFile, check_suffix, write_tensor_file

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
FILE_BYTES = 95_628_359
FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
FORMAT = "mlx-sf inception"
FC = "fc"


@dataclass(frozen=True)
class Conv:
    """A convolution: channels in and out, kernel (height, width), stride, padding (rows, columns)."""

    into: int
    out: int
    kernel: tuple[int, int]
    stride: int = 1
    pad: tuple[int, int] = (0, 0)


def _square(into: int, out: int, k: int, stride: int = 1, pad: int = 0) -> Conv:
    return Conv(into, out, (k, k), stride, (pad, pad))


def _row(into: int, out: int, k: int) -> Conv:
    return Conv(into, out, (1, k), 1, (0, k // 2))


def _column(into: int, out: int, k: int) -> Conv:
    return Conv(into, out, (k, 1), 1, (k // 2, 0))


def _block_a(into: int, pool: int) -> dict[str, Conv]:
    return {
        "branch1x1": _square(into, 64, 1),
        "branch5x5_1": _square(into, 48, 1),
        "branch5x5_2": _square(48, 64, 5, pad=2),
        "branch3x3dbl_1": _square(into, 64, 1),
        "branch3x3dbl_2": _square(64, 96, 3, pad=1),
        "branch3x3dbl_3": _square(96, 96, 3, pad=1),
        "branch_pool": _square(into, pool, 1),
    }


def _block_b() -> dict[str, Conv]:
    return {
        "branch3x3": _square(288, 384, 3, 2),
        "branch3x3dbl_1": _square(288, 64, 1),
        "branch3x3dbl_2": _square(64, 96, 3, pad=1),
        "branch3x3dbl_3": _square(96, 96, 3, 2),
    }


def _block_c(c: int) -> dict[str, Conv]:
    return {
        "branch1x1": _square(768, 192, 1),
        "branch7x7_1": _square(768, c, 1),
        "branch7x7_2": _row(c, c, 7),
        "branch7x7_3": _column(c, 192, 7),
        "branch7x7dbl_1": _square(768, c, 1),
        "branch7x7dbl_2": _column(c, c, 7),
        "branch7x7dbl_3": _row(c, c, 7),
        "branch7x7dbl_4": _column(c, c, 7),
        "branch7x7dbl_5": _row(c, 192, 7),
        "branch_pool": _square(768, 192, 1),
    }


def _block_d() -> dict[str, Conv]:
    return {
        "branch3x3_1": _square(768, 192, 1),
        "branch3x3_2": _square(192, 320, 3, 2),
        "branch7x7x3_1": _square(768, 192, 1),
        "branch7x7x3_2": _row(192, 192, 7),
        "branch7x7x3_3": _column(192, 192, 7),
        "branch7x7x3_4": _square(192, 192, 3, 2),
    }


def _block_e(into: int) -> dict[str, Conv]:
    return {
        "branch1x1": _square(into, 320, 1),
        "branch3x3_1": _square(into, 384, 1),
        "branch3x3_2a": _row(384, 384, 3),
        "branch3x3_2b": _column(384, 384, 3),
        "branch3x3dbl_1": _square(into, 448, 1),
        "branch3x3dbl_2": _square(448, 384, 3, pad=1),
        "branch3x3dbl_3a": _row(384, 384, 3),
        "branch3x3dbl_3b": _column(384, 384, 3),
        "branch_pool": _square(into, 192, 1),
    }


_BLOCKS = {
    "Mixed_5b": _block_a(192, 32),
    "Mixed_5c": _block_a(256, 64),
    "Mixed_5d": _block_a(288, 64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(1280),
    "Mixed_7c": _block_e(2048),
}

# every convolution of the network by the prefix of its keys
CONVS: dict[str, Conv] = {
    "Conv2d_1a_3x3": _square(3, 32, 3, 2),
    "Conv2d_2a_3x3": _square(32, 32, 3),
    "Conv2d_2b_3x3": _square(32, 64, 3, pad=1),
    "Conv2d_3b_1x1": _square(64, 80, 1),
    "Conv2d_4a_3x3": _square(80, 192, 3),
    **{f"{block}.{branch}": conv for block, branches in _BLOCKS.items() for branch, conv in branches.items()},
}


def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the 472 tensors in PyTorch's layout: 23,885,392 values."""
    shapes: dict[str, tuple[int, ...]] = {FC + ".weight": (1008, 2048), FC + ".bias": (1008,)}
    for name, c in CONVS.items():
        shapes[f"{name}.conv.weight"] = (c.out, c.into, *c.kernel)
        shapes |= {f"{name}.bn.{k}": (c.out,) for k in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def is_inception_state_dict(keys: Collection[str]) -> bool:
    """Whether these are the names of an Inception network's tensors (and not a diffusion transformer's)."""
    return {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", FC + ".weight"} <= set(keys)


def convert_inception(tensors: Mapping[str, Any], where: str = "inception weights") -> dict[str, np.ndarray]:
    """The 472 tensors as float32 arrays, from anything with `.shape` and, if it is lazy, `.read()`.

    Integer `num_batches_tracked` tensors are ignored. Raises `MlxSfError` naming the first tensor that is missing,
    unexpected, misshapen, not floating point or not finite.
    """
    shapes = inception_shapes()
    given = [k for k in tensors if not k.endswith(".num_batches_tracked")]
    problem = next((f"lacks tensor {k!r}" for k in shapes if k not in tensors), None)
    problem = problem or next((f"holds a foreign tensor, {k!r}" for k in given if k not in shapes), None)
    if problem:
        raise MlxSfError(f"{where}: {problem}: want the 472 tensors of {FILE_NAME}")
    out = {}
    for key, shape in shapes.items():
        value = tensors[key]
        if tuple(value.shape) != shape:
            raise MlxSfError(f"{where}: tensor {key!r} has shape {tuple(value.shape)}, the FID Inception wants {shape}")
        array = np.asarray(value.read() if hasattr(value, "read") else value)
        if array.dtype.kind != "f":
            raise MlxSfError(f"{where}: tensor {key!r} is {array.dtype}, want floating point")
        array = np.ascontiguousarray(array, dtype=np.float32).reshape(shape)
        if not np.isfinite(array).all():
            raise MlxSfError(f"{where}: tensor {key!r} holds NaN or infinite values: take another copy of the file")
        out[key] = array
    return out


def content_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the little-endian float32 bytes of all tensors in sorted order of their names.

    It identifies the network whatever file it came from; statistics files and records carry it.
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(np.ascontiguousarray(weights[key], dtype="<f4").tobytes())
    return digest.hexdigest()


def save_inception(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray], source: str = "") -> None:
    """Write the tensors to one `.npz` or `.safetensors` file, readable by `np.load`, `mx.load` and this module."""
    check_suffix(path)
    text = json.dumps({"format": FORMAT, "source": source, "content_sha256": content_sha256(weights)})
    write_tensor_file(path, [Entry.of(k, weights[k]) for k in sorted(weights)], text)


def load_inception(path: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """The network's tensors: from a `.pth`, `.npz` or `.safetensors` file, or (None) from the cache or the network.

    Raises `MlxSfError` for anything that is not exactly the FID Inception.
    """
    path = fetch_inception() if path is None else Path(path)
    if not path.exists():
        raise MlxSfError(f"{path}: no such file, want Inception weights: {_by_hand()}")
    if path.is_dir():
        raise MlxSfError(f"{path}: is a folder, want a file with Inception weights ({FILE_NAME} or a converted one)")
    with open(path, "rb") as f:
        magic = f.read(4)
    if path.suffix == ".safetensors":
        return convert_inception(_read_safetensors(path), str(path))
    if magic == b"PK\x03\x04" and path.suffix == ".npz":
        return convert_inception(_read_npz(path), str(path))
    from ..formats.torch_file.reader import open_torch_file

    with open_torch_file(path) as file:
        root = file.root
        if isinstance(root, Mapping) and "state_dict" in root and not is_inception_state_dict(root):
            root = root["state_dict"]
        if not isinstance(root, Mapping) or not is_inception_state_dict(root):
            raise MlxSfError(f"{path}: does not hold the FID Inception: want {FILE_NAME}")
        return convert_inception(root, str(path))


def is_inception_file(path: str | os.PathLike[str]) -> bool:
    """Whether a `torch.save` file holds an Inception network; False also for what cannot be read as one."""
    from ..formats.torch_file.reader import open_torch_file

    try:
        with open_torch_file(Path(path)) as file:
            return isinstance(file.root, Mapping) and is_inception_state_dict(file.root)
    except MlxSfError:
        return False


def convert_inception_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Convert Inception weights to an `.npz` or `.safetensors` file. One line about it, for the console."""
    check_suffix(target)
    weights = load_inception(source)
    public = sha256(Path(source)) == FILE_SHA256
    save_inception(target, weights, Path(source).name)
    what = "the public FID Inception" if public else "an FID Inception with other weights than the public file's"
    return f"{target}: {what}, {len(weights)} tensors, content SHA-256 {content_sha256(weights)}"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz made here or by hand (`np.savez(path, **state_dict)`)."""
    try:
        with zipfile.ZipFile(path) as z:
            if sum(i.file_size for i in z.infolist()) > 4 * 95_541_568:
                raise MlxSfError(f"{path}: expands to more than four times the FID Inception's size: not its weights")
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files if k != "__config__"}
    except MlxSfError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise many kinds on damaged input
        raise MlxSfError(f"{path}: damaged or not an .npz of arrays ({type(e).__name__}: {e})") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        own = TensorFile(path)
    except MlxSfError as e:
        if "no configuration" not in str(e):
            raise
    else:
        own.verify()
        return dict(own.entries)
    try:
        return {k: np.array(v) for k, v in mx.load(str(path)).items()}  # type: ignore[union-attr]
    except Exception as e:
        raise MlxSfError(f"{path}: damaged or not a .safetensors file ({type(e).__name__}: {e})") from None


# ---- the public file -------------------------------------------------------------------------------------------


def _by_hand() -> str:
    return (
        f"download {URLS[0]} (91 MB, SHA-256 {FILE_SHA256}) on any machine and put it at {cache_folder() / FILE_NAME}, "
        f"or name its place with {option('inception_weights')}"
    )


def fetch_inception() -> Path:
    """The public weights file in the cache, downloaded and checked on first use."""
    path = cache_folder() / FILE_NAME
    if path.exists():
        if sha256(path) == FILE_SHA256:
            return path
        raise MlxSfError(f"{path}: is not the file it should be (its SHA-256 differs): delete it, then {_by_hand()}")
    reasons = []
    for url in URLS:
        try:
            _download(url, path)
            return path
        except (OSError, urllib.error.URLError, MlxSfError) as e:
            reason = getattr(e, "reason", None) or e
            reasons.append(f"{url.split('/')[2] or url}: {reason}")
    raise MlxSfError(f"Inception weights cannot be downloaded ({'; '.join(reasons)}): {_by_hand()}")


def _download(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "mlx-sf"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=30) as answer, replacing(path) as temporary:
        total = int(answer.headers.get("Content-Length") or FILE_BYTES)
        with open(temporary, "wb") as f, Progress(total >> 20, "downloading Inception weights", "MiB") as bar:
            while part := answer.read(1 << 20):
                f.write(part)
                digest.update(part)
                bar.update()
        if digest.hexdigest() != FILE_SHA256:
            raise MlxSfError(f"what came from there has SHA-256 {digest.hexdigest()}, not the file's")
