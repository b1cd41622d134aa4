"""Pictures of a prompt file in the folder that GenEval's evaluators read: drawn once, continued where it was left."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.pipeline import Pipeline, default_batch
from ..common.fields import require
from ..common.files import read_json, replacing, sha256, writable_folder
from ..common.progress import Progress
from ..common.world import World
from ..errors import MlxSfError
from ..formats.png import save_png
from ..sampling.generate import my_batches
from ..sampling.output import finite_images
from ..sampling.request import Request
from .geneval import Metadata, line_of
from .geneval_folder import METADATA, picture_name, prompt_folder

SETTINGS = "export.json"
_STRIDE = 1000  # seeds of one prompt, as in GenEval's script


class Export:
    """A folder of GenEval that is being drawn.

    Args:
        root: the folder. prompts: line number -> metadata, as `geneval_folder.named_prompts` gives them.
        num_images: pictures of each prompt, 1 to 1000.
        seed: picture k of line i has seed `seed` + 1000 i + k and depends on that alone.
        settings: what else decides what the pictures are, and a pipeline does not say (JSON).

    Raises `FieldError` for numbers out of range.
    """

    def __init__(
        self,
        root: Path,
        prompts: Mapping[int, Metadata],
        num_images: int = 4,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        require(1 <= num_images <= _STRIDE, "num_images", num_images, f"1 to {_STRIDE}")
        require(0 <= seed < 2**62, "seed", seed, "a number from 0 to 2^62")
        self.root, self.prompts, self.num_images, self.seed = root, prompts, num_images, seed
        self.settings = settings or {}

    def draw(self, pipeline: Pipeline, batch_size: int | None = None, world: World | None = None) -> int:
        """Draw the pictures that are missing; how many those were, on all processes together.

        Raises `MlxSfError` where the folder holds pictures of other prompts, settings or weights.
        """
        world = world or World()
        missing = [tuple(m) for m in world.share(self._prepare(pipeline) if world.main else None)]
        if not missing:
            return 0
        request = Request(
            tuple(self.prompts[i]["prompt"].rstrip() for i, _ in missing),
            tuple(self.seed + _STRIDE * i + k for i, k in missing),
        )
        size = batch_size or default_batch(pipeline.config)
        steps = len(my_batches(len(request), size, world)) * pipeline.config.sample.steps
        with Progress(steps, f"drawing {len(request)} pictures", "steps") as bar:
            for numbers, state in pipeline.generate(request, size, world):
                bar.update()
                if state.step < state.steps:
                    continue
                pictures = pipeline.to_uint8(finite_images(state.z, numbers))
                for n, picture in zip(numbers, pictures, strict=True):
                    save_png(self.root / picture_name(*missing[n]), picture, pipeline.facts(request, n))
        return len(missing)

    def _prepare(self, pipeline: Pipeline) -> list[tuple[int, int]]:
        """The folder with its settings and metadata; which (line, picture) it lacks."""
        if pipeline.config.model.num_classes:
            raise MlxSfError(f"{pipeline.config.name}: draws classes, not prompts: take a model that draws from text")
        writable_folder(self.root)
        settings, path = self._settings(pipeline), self.root / SETTINGS
        if path.is_file():
            self._agree(read_json(path), settings)
        elif other := next((p for p in self.root.iterdir() if p.name.isdigit()), None):
            raise MlxSfError(f"{other}: was not drawn by this command ({SETTINGS} is missing): name another folder")
        else:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n")
        missing = []
        for i, metadata in self.prompts.items():
            folder = writable_folder(prompt_folder(self.root, i) / "samples").parent
            if not (folder / METADATA).is_file():
                with replacing(folder / METADATA) as temporary:
                    temporary.write_text(line_of(metadata) + "\n")
            missing += [(i, k) for k in range(self.num_images) if not (self.root / picture_name(i, k)).is_file()]
        return missing

    def _settings(self, pipeline: Pipeline) -> dict[str, Any]:
        """Everything that decides what the pictures are."""
        lines = json.dumps([[i, line_of(m)] for i, m in self.prompts.items()])
        drawn = pipeline.facts(Request(("",), (self.seed,)), 0)
        return {
            "prompts": f"{len(self.prompts)}, sha256 {hashlib.sha256(lines.encode()).hexdigest()[:16]}",
            "num_images": self.num_images,
            "checkpoint_sha256": sha256(pipeline.path),
            **{k: v for k, v in drawn.items() if k not in ("program", "prompt", "checkpoint")},
            **self.settings,
        }

    def _agree(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*now, *before]):
            old, new = before.get(name), now.get(name)
            if json.dumps(old) != json.dumps(new):
                raise MlxSfError(
                    f"{self.root}: was begun with {name} {json.dumps(old)}, not {json.dumps(new)}: "
                    "repeat those settings, or name another folder"
                )
