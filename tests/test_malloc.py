"""Arrays that come and go must not make the kernel clear pages again and again."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mlx_sf import _malloc
kept = _malloc.keep_freed_memory()
from mlx_sf.config import model_config
from mlx_sf.model import JiT
import mlx.core as mx
model = JiT(model_config("tiny", 32, 256))
x, t, y = mx.ones((8, 3, 256, 256)), mx.array([0.5]), mx.zeros((8,), dtype=mx.int32)
for _ in range(2):
    mx.eval(model(x, t, y))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    mx.eval(model(x, t, y))
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | environment
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have caches of their own")
def test_freed_memory_is_used_again_without_the_kernel():
    kept, count = faults()
    assert not kept or count < 10_000  # 20,000 to 25,000 otherwise


def test_peoples_own_settings_stay():
    assert not faults(MALLOC_TRIM_THRESHOLD_="131072")[0]
    assert not faults(MALLOC_ARENA_MAX="4")[0]
