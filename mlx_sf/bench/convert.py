"""Memory and time of converting a large checkpoint: a process of its own, watched from outside."""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..models import parameter_shapes
from ..models.jit_sizes import model_config

# run in the child: peak resident bytes after importing what the converter needs, and after converting
_CHILD = """
import json, resource, sys, time
from mlx_sf.checkpoints.convert.jit import convert
import mlx.core as mx
unit = 1 if sys.platform == "darwin" else 1024
mx.eval(mx.zeros(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], flags={"noise_scale": 1.0})
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps({"interpreter": before, "peak": after, "seconds": seconds}))
"""


class _Pickle:
    """Writes the few pickle opcodes that a reference checkpoint needs, so that no torch is needed to make one."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.storages: list[tuple[str, int]] = []

    def text(self, s: str) -> None:
        raw = s.encode()
        self.out += b"X" + struct.pack("<I", len(raw)) + raw

    def integers(self, values: tuple[int, ...]) -> None:
        self.out += b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    def tensor(self, shape: tuple[int, ...]) -> None:
        key, count = str(len(self.storages)), int(np.prod(shape))
        self.storages.append((key, count))
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.text("storage")
        self.out += b"ctorch\nFloatStorage\n"
        self.text(key)
        self.text("cuda:0")
        self.out += b"J" + struct.pack("<i", count) + b"tQ" + b"J" + struct.pack("<i", 0)
        self.integers(shape)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        self.integers(strides)
        self.out += b"\x89ccollections\nOrderedDict\n)RtR"


def write_reference_checkpoint(path: Path, size: str = "B/32") -> int:
    """A `torch.save` file like the reference trainer's, of random float32: model, two EMAs, two optimiser moments.

    Returns its size in bytes. Memory stays small; about 2.7 GB on disk for B/32.
    """
    shapes = {f"net.{k}": v for k, v in parameter_shapes(model_config(size)).items()}
    shapes["net.x_embedder.proj2.weight"] += (1, 1)
    p = _Pickle()
    p.out += b"}("
    for part in ("model", "model_ema1", "model_ema2"):
        p.text(part)
        p.out += b"}("
        for key, shape in shapes.items():
            p.text(key)
            p.tensor(shape)
        p.out += b"u"
    p.text("optimizer")
    p.out += b"}("
    p.text("state")
    p.out += b"}("
    for i, shape in enumerate(s for k, s in shapes.items() if k != "net.pos_embed"):
        p.out += b"J" + struct.pack("<i", i) + b"}("
        for moment in ("exp_avg", "exp_avg_sq"):
            p.text(moment)
            p.tensor(shape)
        p.out += b"u"
    p.out += b"uu"
    p.text("args")
    p.out += b"cargparse\nNamespace\n)\x81}("
    p.text("model")
    p.text(f"JiT-{size}")
    p.out += b"ubu."
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
        z.writestr("c/data.pkl", bytes(p.out))
        z.writestr("c/byteorder", "little")
        for key, count in p.storages:
            with z.open(f"c/data/{key}", "w", force_zip64=True) as f:
                for n in _chunks(count):
                    f.write(rng.standard_normal(n, dtype=np.float32).data)
        z.writestr("c/version", "3\n")
    return path.stat().st_size


def _chunks(count: int, most: int = 1 << 20) -> Iterator[int]:
    while count:
        yield min(count, most)
        count -= min(count, most)


def measure_conversion(folder: str | os.PathLike[str] | None = None, size: str = "B/32") -> dict[str, Any]:
    """Convert a made-up checkpoint of `size` in a fresh process.

    Returns bytes: input, output, interpreter (peak before), peak, peak over the interpreter; and seconds.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, target = Path(scratch) / "source.pth", Path(scratch) / "target.safetensors"
        start = time.perf_counter()
        input_bytes = write_reference_checkpoint(source, size)
        made = time.perf_counter() - start
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(source), str(target)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        child = json.loads(done.stdout.splitlines()[-1])
        return {
            "input_bytes": input_bytes,
            "output_bytes": target.stat().st_size,
            "interpreter_bytes": child["interpreter"],
            "peak_bytes": child["peak"],
            "peak_over_interpreter": child["peak"] - child["interpreter"],
            "seconds": child["seconds"],
            "seconds_to_make_the_input": made,
        }
