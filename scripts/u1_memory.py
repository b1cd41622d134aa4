"""Measure SenseNova-U1's two phases: peak memory against the plan, seconds a step against the device's product rate.

python scripts/u1_memory.py FOLDER [--layers 20] [--side 512]

Makes a network of random weights in the authors' layout in FOLDER (4 GB with 20 layers), unless it is there. Each phase
runs in a process of its own. Prints a JSON object; bytes are MLX's peaks and the whole process's, less what it held
before.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402

import mlx_sf  # noqa: E402, F401  the BLAS before mlx.core
from mlx_sf.checkpoints import memory_plan  # noqa: E402
from mlx_sf.checkpoints.checkpoint import Checkpoint  # noqa: E402
from mlx_sf.checkpoints.load import load_model  # noqa: E402
from mlx_sf.checkpoints.two_phase import Prefixes  # noqa: E402
from mlx_sf.checkpoints.u1_files import TEXT, published_name  # noqa: E402
from mlx_sf.device.defaults import default_dtype, peak_memory, pick_dtype  # noqa: E402
from mlx_sf.models import parameter_shapes  # noqa: E402
from mlx_sf.models.flops import forward_flops  # noqa: E402
from mlx_sf.models.u1_config import U1Config  # noqa: E402
from mlx_sf.models.u1_text import text_shapes  # noqa: E402

TINY = ROOT / "tests/golden/u1/mlp"
PROMPT = "a red cube on a blue sphere, " * 6


def make(folder: Path, layers: int) -> None:
    """A random network: width 2048, 16 heads of 128, in shards of about 1 GB."""
    config = U1Config(
        hidden_size=2048, depth=layers, num_heads=16, mlp_hidden=6144, vocab_size=8192, head_width=4096
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {published_name(k): (k, s) for k, s in parameter_shapes(config).items()}
    shapes |= {published_name(TEXT + k): (k, s) for k, s in text_shapes(config).items()}
    pending: dict[str, mx.array] = {}
    shards: list[dict[str, str]] = []

    def flush() -> None:
        name = f"model-{len(shards) + 1:05d}-of-99999.safetensors"
        mx.save_safetensors(str(folder / name), pending)
        shards.append(dict.fromkeys(pending, name))
        pending.clear()
        mx.clear_cache()

    for i, (key, (_, shape)) in enumerate(shapes.items()):
        w = mx.random.normal(shape, key=mx.random.key(i)) * (0.02 if len(shape) > 1 else 0) + (len(shape) == 1)
        if "embedding.weight" in key:  # the authors' kernels
            side = 16 if "patch" in key else 2
            w = w.reshape(shape[0], -1, side, side)
        pending[key] = w.astype(mx.bfloat16)
        mx.eval(pending[key])
        if sum(v.nbytes for v in pending.values()) > 10**9:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": {k: v for shard in shards for k, v in shard.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = json.loads((TINY / "config.json").read_text())
    said["patch_size"] = said["vision_config"]["patch_size"] = 16
    said["vision_config"]["hidden_size"] = config.embed_width
    said["llm_config"] |= {
        "hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 6144, "vocab_size": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        shutil.copy(TINY / name, folder / name)


def first(folder: Path, side: int) -> dict[str, float]:
    """Phase one of a new prompt and the empty branch."""
    checkpoint = Checkpoint(folder / "model.safetensors.index.json")
    dtype = default_dtype()
    features = Prefixes(checkpoint, "", pick_dtype(dtype))
    prompt = f"{PROMPT} {time.time_ns()}"  # one that no cache holds
    tokens = len(features.ids(prompt))
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = peak_memory()["process"], time.perf_counter()
    features.ensure([prompt, None])
    seconds, peak = time.perf_counter() - start, peak_memory()
    how = memory_plan.Drawing(dtype, prompt_tokens=tokens)
    planned = memory_plan.plan(checkpoint.config, how)
    return {
        "tokens": tokens, "seconds": seconds, "layer": planned.layer, "prefixes": planned.prefixes,
        "planned": planned.first, "mlx": peak["mlx"], "process_above_start": peak["process"] - before,
    }  # fmt: skip


def second(folder: Path, side: int) -> dict[str, float]:
    """Phase two: the generation side loaded, guided steps of one picture."""
    checkpoint = Checkpoint(folder / "model.safetensors.index.json")
    dtype = default_dtype()
    checkpoint.config = checkpoint.config.at(side, side)
    features = Prefixes(checkpoint, "", pick_dtype(dtype))
    features.ensure([PROMPT, None])
    mx.clear_cache()
    mx.reset_peak_memory()
    before = peak_memory()["process"]
    network, config = load_model(checkpoint, None, pick_dtype(dtype))
    network.features = features
    given, null = network.condition([PROMPT]), network.condition([None])
    z = mx.random.normal((1, 3, side, side))
    seconds = []
    for i in range(4):
        start = time.perf_counter()
        mx.eval(network.guided(z, mx.array([i / 4]), given, null))
        seconds.append(time.perf_counter() - start)
    peak, size = peak_memory(), 2048
    a, b = (mx.random.normal((size, size)).astype(pick_dtype(dtype)) for _ in range(2))
    mx.eval(a, b, a @ b)
    start = time.perf_counter()
    for _ in range(8):
        mx.eval(a @ b)
    rate = 8 * 2 * size**3 / (time.perf_counter() - start)
    how = memory_plan.Drawing(dtype, prompt_tokens=len(features.ids(PROMPT)))
    planned = memory_plan.plan(config, how)
    step = sorted(seconds)[1]
    return {
        "generation": planned.generation, "activations_planned": planned.activations, "planned": planned.second,
        "mlx": peak["mlx"], "process_above_start": peak["process"] - before, "seconds_per_step": step,
        "product_rate": rate, "share_of_product_rate": 2 * forward_flops(config.model) / step / rate,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--phase", choices=("first", "second"))
    o = parser.parse_args()
    if o.phase:
        print(json.dumps({"first": first, "second": second}[o.phase](o.folder, o.side)))
        return
    if not (o.folder / "config.json").exists():
        make(o.folder, o.layers)
    found = {}
    for phase in ("first", "second"):
        command = [sys.executable, __file__, str(o.folder), "--side", str(o.side), "--phase", phase]
        found[phase] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
