"""`mlx-sf info`: what a checkpoint, a PNG, a PyTorch file or this installation is."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import click

from ..checkpoints.adapters import CONFIG as ADAPTER_CONFIG
from ..checkpoints.adapters import adapter_facts
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.convert import minit2i
from ..checkpoints.hub import cached, listing
from ..checkpoints.names import HubName
from ..checkpoints.resolve import hub_name, resolve
from ..checkpoints.text_encoder import find_encoder
from ..errors import MlxSfError
from ..formats.orbax import OrbaxFile, orbax_folder
from ..models import parameter_count
from ..models.quantize import describe
from ..models.t5 import T5Config
from .options import go_offline, offline_option

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


@click.command(short_help="Say what a checkpoint, a PNG or this installation is.")
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@offline_option
def command(path: str | None, as_json: bool, offline: bool) -> None:
    """Say what PATH is: a checkpoint (file, run folder, foreign folder), a PNG made by mlx-sf, or a .pth file.

    Of a place on the Hugging Face Hub, org/name, it lists the models with their sizes; nothing is downloaded.

    Without PATH: versions, device, the BLAS in use and memory of this installation.
    """
    go_offline(offline)
    if path is None:
        from ..device.defaults import describe

        facts: dict[str, Any] = dict(describe())
    elif Path(path).suffix.lower() == ".png":
        from ..formats.png import read_metadata

        facts = read_metadata(path)
    elif Path(path).suffix.lower() in _TORCH_SUFFIXES and Path(path).exists():
        facts = _torch_facts(path)
    elif (place := hub_name(path)) is not None:
        facts = _hub_facts(place)
    elif (folder := orbax_folder(Path(path).expanduser())) is not None:
        facts = _orbax_facts(folder)
    elif (Path(path) / ADAPTER_CONFIG).is_file():
        facts = adapter_facts(Path(path))
    elif (Path(path) / "config.json").is_file() and (Path(path) / "tokenizer.json").is_file():
        facts = _encoder_facts(path)
    else:
        facts = _checkpoint_facts(path)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<{width}}  {text}")


def _checkpoint_facts(path: str) -> dict[str, Any]:
    checkpoint = Checkpoint(resolve(path))
    c = checkpoint.config
    dtypes = sorted({e.dtype for e in checkpoint.file.entries.values()})
    model, flow, sample = (dataclasses.asdict(part) for part in (c.model, c.flow, c.sample))
    forcing = model.pop("forcing", None)
    return {
        "file": f"{checkpoint.path} ({checkpoint.file.container}, {checkpoint.file.size / 1e6:.1f} MB)",
        "model": c.name + (" with Spectral Forcing" if forcing else ", vanilla"),
        "architecture": c.model.architecture,
        "weights": ", ".join(c.weights),
        "parameters": f"{parameter_count(c.model):,} ({', '.join(dtypes)})",
        **({"quantised": describe(c.quantization)} if c.quantization else {}),
        **({"adapter": str(c.adapter)} if c.adapter else {}),
        "network": model,
        **({"forcing": forcing} if forcing else {}),
        "flow": flow,
        "sampling": {k: v for k, v in sample.items() if v is not None},
        **({"classes": ", ".join(c.class_names)} if c.class_names else {}),
        **({"provenance": dict(c.provenance)} if c.provenance else {}),
    }


def _orbax_facts(folder: Path) -> dict[str, Any]:
    """What an Orbax folder holds, by its tensors' names and shapes."""
    file = OrbaxFile(folder)
    tops: dict[str, list[int]] = {}
    for name, tensor in file.tensors.items():
        tops.setdefault(name.split(".")[0], []).append(math.prod(tensor.shape))
    return {
        "file": f"{folder} (Orbax checkpoint of JAX)",
        **{top: f"{len(sizes)} tensors, {sum(sizes):,} values" for top, sizes in tops.items()},
        **({"network": minit2i.describe(list(file.tensors))} if minit2i.recognises(list(file.tensors)) else {}),
    }


def _encoder_facts(path: str) -> dict[str, Any]:
    """What a text encoder's folder holds."""
    files = find_encoder(path)
    return {"file": f"{files.weights} (text encoder)", "network": dataclasses.asdict(T5Config.read(files.config))}


def _hub_facts(name: HubName) -> dict[str, Any]:
    """What lies at a place on the Hub, without its weights."""
    found = listing(name)
    models = found.models()
    here = {model: cached(name.repo, model) for model in models}
    return {
        "repository": f"{name.repo} at commit {found.commit}",
        **{
            model or ".": f"{found.size(files) / 1e9:.2f} GB, {len(files)} file(s)" + (", here" if here[model] else "")
            for model, files in sorted(models.items())
        },
        **({} if models else {"models": "none that this program reads"}),
    }


def _torch_facts(path: str) -> dict[str, Any]:
    """What a PyTorch file holds, read without PyTorch and without running anything in it."""
    from ..formats.torch_file.reader import Record, TensorRef, open_torch_file

    def about(value: Any) -> str:
        if isinstance(value, TensorRef):
            return f"{value.dtype} {tuple(value.shape)}"
        if isinstance(value, dict) and value and all(isinstance(v, TensorRef) for v in value.values()):
            return f"{len(value)} tensors, {sum(math.prod(v.shape) for v in value.values()):,} values"
        if isinstance(value, Record):
            return ", ".join(f"{k} {v}" for k, v in value.values.items())
        if isinstance(value, dict | list | tuple):
            return f"{type(value).__name__} of {len(value)}"
        return str(value)

    with open_torch_file(path) as file:
        root = file.root
        facts = {"file": f"{path} (torch.save, {file.layout} layout, {Path(path).stat().st_size / 1e6:.1f} MB)"}
        if not isinstance(root, dict):
            raise MlxSfError(f"{path}: holds {about(root)}, want a state dict or a training checkpoint")
        if all(isinstance(v, TensorRef) for v in root.values()):
            facts["state dict"] = about(root)
        return facts | {str(k): about(v) for k, v in list(root.items())[:400]}
