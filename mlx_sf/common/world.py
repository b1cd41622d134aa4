"""The only notion of several processes, as `mlx.launch` starts them: who am I, and what do the others say?"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..errors import MlxSfError


class World:
    """The processes of this program; one, unless `mlx.launch` started it. Rank 0 alone decides, reads and writes."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> "World":
        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value (anything that JSON holds), on every rank."""
        if self.size == 1:
            return value
        text = np.frombuffer(json.dumps(value).encode() if self.main else b"", np.uint8)
        length = mx.distributed.all_sum(mx.array(len(text))).item()
        mine = mx.array(text.astype(np.int32)) if self.main else mx.zeros((length,), mx.int32)  # type: ignore[arg-type]
        return json.loads(np.array(mx.distributed.all_sum(mine)).astype(np.uint8).tobytes())

    def share_arrays(self, tree: Any) -> Any:
        """Rank 0's arrays on every rank; all ranks pass trees of the same shapes."""
        if self.size == 1:
            return tree
        shared = tree_map(lambda a: mx.distributed.all_sum(a if self.main else mx.zeros_like(a)), tree)
        mx.eval(shared)
        return shared

    def any(self, value: bool) -> bool:
        """Whether any rank says so."""
        return value if self.size == 1 else mx.distributed.all_sum(mx.array(int(value))).item() != 0

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank."""
        if self.size == 1:
            return [data]
        lengths = np.array(mx.distributed.all_gather(mx.array([len(data)], dtype=mx.int32)))
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        every = np.array(mx.distributed.all_gather(mx.array(padded))).reshape(self.size, -1)
        return [every[i, :n].tobytes() for i, n in enumerate(lengths)]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks, on every rank; float32 or whole numbers."""
        return array if self.size == 1 else np.asarray(mx.distributed.all_sum(mx.array(array)))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A process that went away becomes one clear line in the others."""
        try:
            yield
        except RuntimeError as e:
            if self.size == 1 or ("ring" not in str(e).lower() and "peer" not in str(e).lower()):
                raise
            raise MlxSfError(f"process {self.rank} of {self.size} lost the others ({e}): start all again") from None
