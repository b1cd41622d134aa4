"""Every download from the Hugging Face Hub. Nothing downloaded is executed."""

from pathlib import Path

from ..errors import MlxSfError
from ..formats.shards import INDEX
from ..formats.tensor_file import SUFFIXES


def fetch(name: str) -> Path:
    """The file "org/name/path/file" of a repository, or the folder of "org/name" with its checkpoints."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries without a network are not for our user: one line says it all
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        if file:
            return Path(hf_hub_download(repo, file))
        return Path(snapshot_download(repo, allow_patterns=["*" + s for s in (*SUFFIXES, INDEX)]))
    except Exception as e:
        line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise MlxSfError(f"{name}: not a file here, and not to be had from the Hugging Face hub ({line})") from None
