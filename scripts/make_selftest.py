"""Collect the golden numbers that `mlx-sf selftest` ships: tests/golden -> mlx_sf/parity/selftest*.npz.

python scripts/make_selftest.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402

from mlx_sf.checkpoints.conversion import convert as convert_any  # noqa: E402
from mlx_sf.checkpoints.convert.jit import convert  # noqa: E402
from mlx_sf.checkpoints.u1_files import PublishedFile  # noqa: E402
from mlx_sf.formats.shards import open_foreign  # noqa: E402
from mlx_sf.formats.tensor_file import TensorFile  # noqa: E402

GOLDEN = ROOT / "tests/golden/parity"
# model -> weight sets that the cases below use
WEIGHTS = {"forced": ["model"], "vanilla": ["model"], "hybrid": ["ema2"], "noctx": ["model"]}
FORWARD = {"forced": "forced", "vanilla": "vanilla", "noctx": "noctx"}
SAMPLING = ["vanilla_10", "vanilla_22", "hybrid_1_snr_inverse"]
GRADIENTS = [
    "net.x_embedder.proj1.weight",
    "net.blocks.1.attn.qkv.weight",
    "net.blocks.1.attn.q_norm.weight",
    "net.blocks.2.mlp.w12.weight",
    "net.in_context_posemb",
    "net.t_embedder.mlp.0.weight",
    "net.final_layer.linear.bias",
]


def main() -> None:
    tolerances = json.loads((GOLDEN / "tolerances.json").read_text())
    cases = json.loads((GOLDEN / "configs.json").read_text())
    arrays: dict[str, np.ndarray] = {}
    tolerance: dict[str, float] = {}

    def take(file: str, name: str, golden: bool = True) -> None:
        arrays[f"{file}/{name}"] = np.load(GOLDEN / f"{file}.npz")[name]
        if golden:
            tolerance[f"{file}/{name}"] = tolerances[f"{file}.npz"][name][2]

    configs = {}
    for model, sets in WEIGHTS.items():
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / f"{model}.npz"
            convert(GOLDEN / f"{model}.pth", target, sets, flags={"in_context_start": 1})
            file = TensorFile(target)
            configs[model] = file.text
            for name, entry in file.entries.items():
                arrays[f"weights/{model}/{name}"] = entry.read()
    for name in ("filter_x", "filter_t"):
        take("operator", name, golden=False)
    for name in ("filter_window16", "filter_window4", "filter_fixed0.3"):
        take("operator", name)
    for case in FORWARD:
        for what in "xty":
            take("forward", f"{case}/{what}", golden=False)
        take("forward", f"{case}/out")
    for what in ("x", "t", "labels_dropped", "noise"):
        take("loss", f"forced_x/{what}", golden=False)
    take("loss", "forced_x/loss")
    for key in GRADIENTS:
        take("loss", f"forced_x/grad/{key}")
    sampling = []
    for case in cases["sampling"]:
        if case["case"] in SAMPLING:
            for what in ("noise", "labels"):
                take("sample", f"{case['inputs']}/{what}", golden=False)
            take("sample", f"{case['case']}/z_after_{case['steps']}")
            sampling.append(case)
    index = {"configs": configs, "tolerance": tolerance, "sampling": sampling}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(ROOT / "mlx_sf/parity/selftest.npz", **arrays)


def text_to_image() -> None:
    """MM-JiT with head sizes 12 and 52, guided steps, and the text encoder."""
    golden = ROOT / "tests/golden/minit2i"
    tolerances = json.loads((golden / "tolerances.json").read_text())
    arrays: dict[str, np.ndarray] = {}
    configs, tolerance = {}, {}
    for model, folder in (("small", "minit2i-b-16"), ("hd52", "minit2i-l-16")):
        with tempfile.TemporaryDirectory() as temporary:
            convert_any(golden / "hub" / folder, Path(temporary) / "x.npz")
            file = TensorFile(Path(temporary) / "x.npz")
            configs[model] = file.text
            arrays |= {f"weights/{model}/{name}": entry.read() for name, entry in file.entries.items()}
        inputs = [("forward", f"{model}/{what}") for what in ("x", "context", "mask")]
        inputs += [("sample", f"{model}/{what}") for what in ("noise", "context", "mask")]
        for name, key in inputs:
            arrays[f"{name}/{key}"] = np.load(golden / f"{name}.npz")[key]
    arrays |= {
        f"weights/t5/{k}": e.read()
        for k, e in open_foreign(golden / "t5" / "model.safetensors").items()
        if "decoder" not in k
    }
    arrays |= {f"t5/long/{what}": np.load(golden / "t5.npz")[f"long/{what}"] for what in ("ids", "mask")}
    results = [("forward", "small/out"), ("forward", "hd52/out"), ("sample", "small_02/z_after_8")]
    for file_name, key in (*results, ("sample", "hd52_00/z_after_6"), ("t5", "long/out")):
        arrays[f"{file_name}/{key}"] = np.load(golden / f"{file_name}.npz")[key]
        tolerance[f"{file_name}/{key}"] = tolerances[f"{file_name}.npz"][key][2]
    cases = json.loads((golden / "configs.json").read_text())["sampling"]
    sampling = {case: cases[case] for case in ("small_02", "hd52_00")}
    t5 = json.loads((golden / "t5" / "config.json").read_text())
    index = {"configs": configs, "tolerance": tolerance, "sampling": sampling, "t5": t5}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(ROOT / "mlx_sf/parity/selftest_t2i.npz", **arrays)


def sensenova_u1() -> None:
    """The network with U1's linear head: both sides, a prompt's ids, guided and forced steps."""
    golden = ROOT / "tests/golden/u1"
    tolerances = json.loads((golden / "tolerances.json").read_text())["mlp"]
    file = PublishedFile(golden / "mlp" / "model.safetensors.index.json")
    arrays: dict[str, np.ndarray] = {}
    for name, entry in file.entries.items():
        if not name.startswith("tokenizer/"):
            values = np.asarray(entry.array().astype(mx.float32))
            arrays[name if name.startswith("text/") else f"weights/u1/{name}"] = values
    parts, sampled = (np.load(golden / f"mlp_{what}.npz") for what in ("parts", "sampling"))
    last = file.config.model.depth - 1
    results = {key: parts[key] for key in (f"prefix_cond/v_{last}", "fwd/x_pred")}
    results |= {key: sampled[key] for key in ("wide_none/final", "wide_none_sf/final")}
    inputs = ("noise_wide", "fwd_image", "cond_ids", "uncond_ids")
    arrays |= results | {f"in/{what}": parts[f"in/{what}"] for what in inputs}
    index = {"configs": {"u1": file.text}, "tolerance": {key: tolerances[key][2] for key in results}}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(ROOT / "mlx_sf/parity/selftest_u1.npz", **arrays)


if __name__ == "__main__":
    main()
    text_to_image()
    sensenova_u1()
