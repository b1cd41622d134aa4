"""torch-fidelity, where it is installed, as a peer for tests and benchmarks. The program itself never imports it."""

import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def _torchvision_stub() -> None:
    """The few names that torch-fidelity takes from torchvision, whose binary often does not load beside a CPU torch."""
    import torch

    def pil_to_tensor(image: Any) -> Any:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    class Dataset:
        pass

    class Compose:
        def __init__(self, parts: Sequence[Callable[[Any], Any]]) -> None:
            self.parts = parts

        def __call__(self, x: Any) -> Any:
            for part in self.parts:
                x = part(x)
            return x

    functional = _module("torchvision.transforms.functional", pil_to_tensor=pil_to_tensor)
    transforms = _module("torchvision.transforms", functional=functional, Compose=Compose)
    datasets = _module("torchvision.datasets", CIFAR10=Dataset, CIFAR100=Dataset, STL10=Dataset)
    models = _module("torchvision.models")
    _module("torchvision", transforms=transforms, datasets=datasets, models=models, __version__="0")


def available() -> bool:
    """Whether torch and torch-fidelity are installed."""
    return all(importlib.machinery.PathFinder.find_spec(name) is not None for name in ("torch", "torch_fidelity"))


def _import() -> None:
    if "torch_fidelity" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401
    except Exception:  # missing, or operators that this torch has not
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _torchvision_stub()
    import torch_fidelity  # noqa: F401


def save_state_dict(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """The weights as torch-fidelity's public file has them: an old-style `torch.save` state dict."""
    import torch

    state = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def fidelity_metrics(
    samples: Path, data: Path, weights: Mapping[str, np.ndarray], kid_subset_size: int = 1000
) -> dict[str, float]:
    """torch-fidelity's own FID, IS and KID of two folders, on the CPU."""
    _import()
    import torch_fidelity

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        save_state_dict(path, weights)
        metrics: dict[str, float] = torch_fidelity.calculate_metrics(
            input1=str(samples), input2=str(data), cuda=False, isc=True, fid=True, kid=True, verbose=False, cache=False,
            kid_subset_size=kid_subset_size, feature_extractor_weights_path=str(path), batch_size=16,
            save_cpu_ram=True,
        )  # fmt: skip
    return metrics


def fidelity_extractor(
    weights: Mapping[str, np.ndarray], channels_last: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """torch-fidelity's network as a function: pictures (B, H, W, 3) uint8 -> features (B, 2048)."""
    _import()
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import (
        FeatureExtractorInceptionV3,
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        save_state_dict(path, weights)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    if channels_last:
        network = network.to(memory_format=torch.channels_last)

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, 3, 1)))
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            out: np.ndarray = network(x)[0].numpy()
            return out

    return features


def fidelity_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """torch-fidelity's distance between two Gaussians."""
    _import()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    out = fid_statistics_to_metric({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}, verbose=False)
    return float(next(iter(out.values())))
