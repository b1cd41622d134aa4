"""Speed of the evaluation against torch-fidelity in the same run, and the memory of 50,000 images.

Weights are random: speed does not depend on them, and none need be downloaded.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np

from ..metrics.inception import Inception
from ..metrics.inception_weights import inception_shapes
from ..metrics.moments import Gaussian, frechet_distance
from ..parity.torch_fidelity import available, fidelity_distance, fidelity_extractor
from .rates import Runs, alternate

# run in the child: features of many images through the running statistics, and the distance, without the network
_CHILD = """
import json, re, resource, sys, time
from pathlib import Path
import numpy as np
from mlx_sf.metrics.moments import Moments, frechet_distance
from mlx_sf.metrics.scores import InceptionScore
def peak():
    status = Path("/proc/self/status")  # on Linux ru_maxrss starts with the parent's
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, count, start = peak(), int(sys.argv[1]), time.perf_counter()
moments, score, rng = Moments(2048), InceptionScore(count), np.random.default_rng(0)
for i in range(0, count, 500):
    n = min(500, count - i)
    moments.add(rng.standard_normal((n, 2048), dtype=np.float32))
    score.add(rng.standard_normal((n, 1008), dtype=np.float32), i)
streamed = peak()
score.finish()
g = moments.finish()
frechet_distance(g, g)
print(json.dumps({"before": before, "streamed": streamed, "peak": peak(), "seconds": time.perf_counter() - start}))
"""


def random_inception(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights that keep activations finite."""
    rng, out = np.random.default_rng(seed), {}
    for key, shape in inception_shapes().items():
        if key.endswith((".bn.weight", ".running_var")):
            out[key] = np.ones(shape, np.float32)
        elif len(shape) == 1:
            out[key] = np.zeros(shape, np.float32)
        else:
            out[key] = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return out


def measure_fid(
    batch_size: int = 16, rounds: int = 5, img_size: int = 256, count: int = 50_000, peer: bool = True
) -> dict[str, Any]:
    """Images a second, seconds of a 2048-d distance of full rank, memory of `count` images; ratios above 1: faster.

    Both networks see the same batch, in turn, `rounds` times; medians count. torch-fidelity runs with as
    many threads as there are cores, once as it is and once with its network in channels-last memory, its fastest.
    """
    weights = random_inception()
    images = np.random.default_rng(1).integers(0, 256, (batch_size, img_size, img_size, 3), dtype=np.uint8)
    network = Inception(weights)
    mx.reset_peak_memory()
    ways: Runs = {
        "mlx_sf": lambda: network.features(images, ["2048", "logits_unbiased"]),
    }
    with_peer = peer and available()
    if with_peer:
        plain, last = fidelity_extractor(weights), fidelity_extractor(weights, channels_last=True)
        ways |= {"torch_fidelity": lambda: plain(images), "torch_fidelity_channels_last": lambda: last(images)}
    taken = alternate(ways, rounds)
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    result: dict[str, Any] = {"batch_size": batch_size, "img_size": img_size, "rounds": rounds, "lanes": network.lanes}
    result |= {f"{name}_images_per_second": batch_size / seconds for name, seconds in median.items()}
    result |= {
        f"{name}_spread": f"{batch_size / max(s):.2f} to {batch_size / min(s):.2f} images/s"
        for name, s in taken.items()
    }
    if with_peer:
        result["speed_over_peer"] = median["torch_fidelity"] / median["mlx_sf"]
        result["speed_over_peer_channels_last"] = median["torch_fidelity_channels_last"] / median["mlx_sf"]
    result["network_peak_bytes"] = mx.get_peak_memory()
    result |= _distance(with_peer)
    return result | _memory(count)


def _distance(peer: bool) -> dict[str, float]:
    """Two covariances of full rank whose eigenvalues fall over seven orders of magnitude, as real features' do."""
    rng, D = np.random.default_rng(2), 2048
    mix = rng.standard_normal((D, D)) * np.logspace(0, -3.5, D)[:, None]
    sides = []
    for _ in range(2):
        rows = rng.standard_normal((3 * D, D)) @ mix
        sides.append(Gaussian(rows.mean(axis=0), np.cov(rows, rowvar=False)))
    ours, seconds = 0.0, []
    for _ in range(2):  # the first also loads the library
        start = time.perf_counter()
        ours = frechet_distance(*sides)
        seconds.append(time.perf_counter() - start)
    result = {"distance_seconds": min(seconds)}
    if peer:
        start = time.perf_counter()
        theirs = fidelity_distance(*(x for g in sides for x in (g.mu, g.sigma)))
        result["torch_fidelity_distance_seconds"] = time.perf_counter() - start
        result["distance_speed_over_peer"] = result["torch_fidelity_distance_seconds"] / result["distance_seconds"]
        result["distance_relative_difference"] = abs(ours - theirs) / ours
    return result


def _memory(count: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    child = json.loads(done.stdout)
    return {
        "statistics_of_images": count,
        "statistics_bytes": child["streamed"] - child["before"],
        "statistics_and_distance_bytes": child["peak"] - child["before"],
        "statistics_seconds": child["seconds"],
    }
