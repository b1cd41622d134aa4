"""The Inception network that pictures are measured with, and its identity."""

from typing import Any

from .. import __version__
from .inception import Inception
from .inception_weights import content_sha256, load_inception


class Extractor:
    """The network with its weights (`path`, or the public file), the layer `tap` that features are taken from."""

    def __init__(self, path: str | None, tap: str) -> None:
        weights = load_inception(path)
        self.path, self.tap, self.sha256 = path or "public file", tap, content_sha256(weights)
        self.network = Inception(weights)

    def describe(self) -> dict[str, Any]:
        """For the provenance of what it measured."""
        return {"tap": self.tap, "inception_sha256": self.sha256, "program": f"mlx-sf {__version__}"}
