"""Collect the golden numbers that `mlx-sf selftest` ships: tests/golden/parity -> mlx_sf/parity/selftest.npz.

python scripts/make_selftest.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_sf.checkpoints.convert.jit import convert  # noqa: E402
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


if __name__ == "__main__":
    main()
