"""Orbax checkpoints of JAX: a folder in the OCDBT key-value layout that holds a zarr array for each tensor.

Read by the `tensorstore` library, an optional package. Names are the tree's paths joined with dots.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..common.text import first_line
from ..errors import MlxSfError

ORBAX_MANIFEST = "manifest.ocdbt"


def orbax_folder(path: Path) -> Path | None:
    """The OCDBT folder at a path, or in its sub-folder `checkpoint`; None where there is none."""
    return next((p for p in (path, path / "checkpoint") if (p / ORBAX_MANIFEST).is_file()), None)


class OrbaxTensor:
    """A tensor of such a folder, read when asked for."""

    def __init__(self, store: "OrbaxFile", name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._store, self.name, self.dtype, self.shape = store, name, dtype, shape

    def read(self) -> np.ndarray:
        """Its values; bfloat16 as float32."""
        try:
            values = np.asarray(self._store.array(self.name).read().result())
        except Exception as e:  # tensorstore's own, of several kinds
            raise MlxSfError(f"{self._store.path}: tensor {self.name!r} cannot be read ({_reason(e)})") from None
        return values.astype(np.float32) if self.dtype == "bfloat16" else values


class OrbaxFile:
    """The tensors of an OCDBT folder by name, "params.net.final_layer.linear._flax_linear.bias"."""

    def __init__(self, path: Path) -> None:
        try:
            import tensorstore
        except ImportError:
            raise MlxSfError(
                f"{path}: is an Orbax checkpoint of JAX, read with the package tensorstore: pip install 'mlx-sf[jax]'"
            ) from None
        self.path, self._tensorstore = path, tensorstore
        self._base = {"driver": "ocdbt", "base": f"file://{path.resolve()}/"}
        self.tensors: dict[str, OrbaxTensor] = {}
        try:
            store = tensorstore.KvStore.open(self._base).result()
            for key in (k.decode() for k in store.list().result()):
                if key.endswith("/.zarray"):
                    about = json.loads(store.read(key).result().value)
                    name = key.removesuffix("/.zarray")
                    shape = tuple(int(n) for n in about["shape"])
                    self.tensors[name] = OrbaxTensor(self, name, _dtype(about["dtype"]), shape)
        except Exception as e:
            raise MlxSfError(f"{path}: cannot be read as an Orbax checkpoint ({_reason(e)})") from None
        if not self.tensors:
            raise MlxSfError(f"{path}: holds no zarr arrays: want an Orbax checkpoint with them in it")

    def array(self, name: str) -> Any:
        spec = {"driver": "zarr", "kvstore": {**self._base, "path": name + "/"}}
        return self._tensorstore.open(spec, open=True, read=True).result()


def _dtype(name: Any) -> str:
    known = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<f8": "float64", "<i4": "int32"}
    return known.get(name, str(name))


def _reason(e: Exception) -> str:
    return first_line(e).split(" [")[0][:200]
