"""A checkpoint as a repository of the Hugging Face Hub: weights, config.json, a card, a picture; and its upload."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .. import __version__
from ..common.figures import grid
from ..common.files import sha256
from ..common.text import first_line
from ..errors import MlxSfError, option
from ..formats.shards import SHARD_BYTES
from ..formats.tensor_file import Entry
from ..models import Architecture, architecture, parameter_count
from ..models.quantize import describe
from ..sampling.class_names import ClassNames
from ..spectral import describe_forcing
from .checkpoint import Checkpoint, stored_name, write_checkpoint
from .config import Config
from .names import parse
from .pipeline import load

PICTURES = 8
# what a checkpoint tells of its origin that may be read by everybody; where its data lies on a disk is not among it
_PUBLIC = (
    "converted_from", "converted_by", "dtype", "epoch", "repo", "commit", "trained_by", "step", "quantized_from",
    "quantized_by",
)  # fmt: skip
_IMAGENET = "ImageNet may be used for non-commercial research and education only, under the terms of its owners."


@dataclasses.dataclass(frozen=True)
class Words:
    """What the card says that the checkpoint does not know.

    `licence` is that of the weights. `command` gives the command line that draws: for the classes of the picture with
    seed 0 into demo.png, or for none in particular; with a second argument, for a prompt. `base_model` is the
    repository that they were made from and `relation` how ("finetune", "quantized"), "" where there is none. `record`
    is one that `mlx-sf eval` wrote.
    """

    licence: str
    command: Callable[..., str]
    base_model: str = ""
    relation: str = ""
    record: Mapping[str, Any] | None = None


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a repository."""
    name = parse(repo)
    if name is None or name.repo != repo:
        raise MlxSfError(f"{repo!r} cannot be the name of a repository, want ORG/NAME")


def write_repository(
    checkpoint: Checkpoint, folder: Path, repo: str, words: Words, weights: str | None = None, demo: bool = True
) -> list[Path]:
    """Write a repository into a new folder: one weight set without anything of its training run. Returns its files.

    The weights keep their types and bits. `demo` draws a few classes with the checkpoint's own settings. Raises
    `MlxSfError` where the folder is there already, or the checkpoint is not complete.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MlxSfError(f"{folder}: is there already, want a new folder for the repository")
    checkpoint.require_network()
    name = checkpoint.pick(weights)
    told = {k: _bare(v) for k, v in checkpoint.config.provenance.items() if k in _PUBLIC}
    config = dataclasses.replace(checkpoint.config, weights=(name,), provenance=told)
    entries = list(_entries(checkpoint, name))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if sum(e.nbytes for e in entries) > SHARD_BYTES:
        if folder.exists():
            folder.rmdir()
        write_checkpoint(folder, entries, config, SHARD_BYTES)
    else:
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder / "model.safetensors", entries, config)
    (folder / "config.json").write_text(config_json(config) + "\n")
    drawn = _draw(folder) if demo else None
    if drawn is not None:
        drawn[0].save(folder / "demo.png")
    digests = {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))}
    (folder / "README.md").write_text(card(config, repo, words, digests, drawn[1] if drawn else ()))
    return sorted(folder.iterdir())


def _bare(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _entries(checkpoint: Checkpoint, weights: str) -> Iterator[Entry]:
    """The stored tensors of one weight set, by the network's own names; file and tensors are checked (`stream`)."""
    for key, _ in checkpoint.stream(weights):
        yield dataclasses.replace(checkpoint.file.entries[stored_name(checkpoint.config, weights, key)], name=key)


def config_json(config: Config) -> str:
    """config.json: the checkpoint's configuration, and the words by which the Hub knows a quantised model."""
    data = json.loads(config.to_json()) | {"model_type": config.model.architecture, "library_name": "mlx"}
    if config.quantization is not None:
        bits = {"bits": config.quantization.bits, "group_size": config.quantization.group_size}
        data |= {"quantization": data["quantization"] | bits, "quantization_config": bits}
    return json.dumps(data, indent=2, sort_keys=True)


def _draw(folder: Path) -> tuple[Image.Image, list[str]] | None:
    """Pictures of classes spread over all of them, seeds 0, 1, ..., and the classes; None for prompts."""
    pipeline = load(folder)
    count = pipeline.config.model.num_classes
    if not count:
        return None
    n = min(PICTURES, count)
    chosen = [i * count // n for i in range(n)]
    pictures = pipeline.sample(chosen, seed=0)
    # laid out as `mlx-sf sample -o demo.png` does: the command on the card repeats the picture
    return Image.fromarray(grid([np.asarray(p) for p in pictures])), [str(i) for i in chosen]


# ------------------------------------------------------------------------------------------------ the card


def card(config: Config, repo: str, words: Words, digests: Mapping[str, str], drawn: Sequence[str]) -> str:
    """README.md of the repository: the header that the Hub reads, and what people want to know."""
    forcing, model, kind = config.model.forcing, config.model, architecture(config.model)
    imagenet = ClassNames.of(model.num_classes or 0, config.class_names).wnids != ()
    relation = words.relation or ("quantized" if config.quantization is not None and words.base_model else "")
    header: dict[str, Any] = {
        "license": words.licence,
        "library_name": "mlx",
        "pipeline_tag": "text-to-image" if kind.reads_text else "unconditional-image-generation",
        **({"base_model": words.base_model} if words.base_model else {}),
        **({"base_model_relation": relation} if words.base_model and relation else {}),
        **({"datasets": ["ILSVRC/imagenet-1k"]} if imagenet else {}),
        "tags": ["mlx", "mlx-sf", kind.name, "pixel-space", *_conditional(kind), "flow-matching"]
        + (["imagenet"] if imagenet else [])
        + (["spectral-forcing"] if forcing else []),
        **({"widget": [{"text": _label(config, drawn[0]), "output": {"url": "demo.png"}}]} if drawn else {}),
    }
    s, title = config.sample, repo.split("/")[1]
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {title}", ""]
    if drawn:
        lines += ["![samples](demo.png)", "", "```bash"]
        lines += [words.command(drawn), "```", ""]
    lines += [
        f"{config.name}, a pixel-space diffusion transformer in [MLX](https://github.com/ml-explore/mlx) format, "
        f"written by mlx-sf {__version__}.",
        "",
        "```bash",
        words.command((), "a red star") if kind.reads_text else words.command(()),
        "```",
        "",
        "| setting | value |",
        "| --- | --- |",
        f"| picture | {model.size[0]} x {model.size[1]} pixels |",
        f"| parameters | {parameter_count(model):,} |",
        f"| weights | {config.weights[0]} |",
        *([f"| quantised | {describe(config.quantization)} |"] if config.quantization else []),
        f"| Spectral Forcing | {describe_forcing(forcing) if forcing else 'none'} |",
        f"| solver | {s.method}, {s.steps} steps |",
        f"| guidance | {s.cfg:g} for t in ({s.cfg_low:g}, {s.cfg_high:g}) |",
        f"| noise scale | {config.flow.noise_scale:g} |",
    ]
    if kind.reads_text:
        reads = f"{len(model.text.words)} words of its own" if model.text.words else model.text.encoder
        lines += [f"| text | {model.text.length} places, {reads} |"]
    if config.class_names:
        names = ", ".join(config.class_names[:12]) + (" ..." if len(config.class_names) > 12 else "")
        lines += [f"| classes | {len(config.class_names)}: {names} |"]
    lines += ["", *_measured(words.record), *_origin(config, words, digests)]
    if imagenet:
        lines += [_IMAGENET, "", "Faces and people are this kind of network's weak side.", ""]
    lines += [kind.citation] if kind.citation else []
    lines += ["Spectral Forcing: arXiv 2606.15236."] if forcing else []
    return "\n".join(lines) + "\n"


def _conditional(kind: Architecture) -> list[str]:
    return [] if kind.reads_text else ["class-conditional"]


def _label(config: Config, number: str) -> str:
    return ClassNames.of(config.model.num_classes, config.class_names).short(int(number)) or f"class {number}"


def _measured(record: Mapping[str, Any] | None) -> list[str]:
    """The numbers of an evaluation, each with what it depends on; nothing where there is no record."""
    if record is None:
        return []
    try:
        metrics, settings = record["metrics"], record["settings"]
        sample, reference = settings["config"]["sample"], record["reference"]
        where = reference.get("url") or Path(reference["where"]).name
        rows = [f"| FID | {metrics['fid']:.4f} |"] if metrics.get("fid") is not None else []
        rows += [
            f"| N | {metrics['count']} |",
            f"| guidance | {sample['cfg']:g} |",
            f"| solver | {sample['method']}, {sample['steps']} steps |",
            f"| seed | {settings['seed']} |",
            f"| reference | {where}{', SHA-256 ' + reference['sha256'] if reference.get('sha256') else ''} |",
            f"| checkpoint | SHA-256 {record['checkpoint_sha256']} |",
            f"| measured | {record['time']} |",
        ]
    except (KeyError, TypeError, ValueError):
        raise MlxSfError(
            f"{option('record')}: is no record that `mlx-sf eval` wrote of a checkpoint: name one of its records/*.json"
        ) from None
    return ["Measured with `mlx-sf eval`:", "", "| | |", "| --- | --- |", *rows, ""]


def _origin(config: Config, words: Words, digests: Mapping[str, str]) -> list[str]:
    told = dict(config.provenance)
    lines = [f"Made from {words.base_model}."] if words.base_model else []
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in told.items()]
    lines += [f"- {name}: SHA-256 {digest}" for name, digest in digests.items()]
    return [*lines, ""]


# ------------------------------------------------------------------------------------------------ the Hub


def check_token() -> None:
    """Refuse to begin without a token that may write."""
    from huggingface_hub import HfApi, errors

    try:
        user = HfApi().whoami()
    except Exception as e:
        if not isinstance(e, errors.HfHubHTTPError | errors.LocalTokenNotFoundError):  # of the network, by no one class
            raise MlxSfError(
                f"the Hub cannot be reached ({type(e).__name__}): {option('dry_run')} needs none"
            ) from None
        raise MlxSfError(
            f"the Hub knows no valid token of yours ({first_line(e)}): `hf auth login`, or set HF_TOKEN"
        ) from None
    token = user.get("auth", {}).get("accessToken", {}) if isinstance(user, dict) else {}
    if token.get("role") == "read":
        raise MlxSfError("the Hub's token may only read: make one that may write, then `hf auth login`")


def send(folder: Path, repo: str, private: bool, revision: str | None, create_pr: bool) -> str:
    """Upload a written repository in one commit; returns its address."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            revision=revision,
            create_pr=create_pr,
            commit_message=f"Upload with mlx-sf {__version__}",
        )
    except errors.RevisionNotFoundError:
        raise MlxSfError(f"{repo}: has no branch {revision!r}: make it on its page first") from None
    except errors.HfHubHTTPError as e:
        raise MlxSfError(
            f"{repo}: the Hub refuses the upload ({first_line(e)}): is the repository yours to write?"
        ) from None
    except Exception as e:
        raise MlxSfError(f"{repo}: the upload broke off ({first_line(e)}): try again") from None
    return str(done.pr_url or done.commit_url)
