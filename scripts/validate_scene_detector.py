#!/usr/bin/env python3
"""How often is the scene detector right? Writes the section "Validation" of docs/geneval.md.

    scripts/validate_scene_detector.py                       # about ten minutes
    scripts/validate_scene_detector.py --per-category 20     # does it run?

Pictures are captioned scenes whose objects are known. Each is judged by GenEval's rules on its own prompt, where the
verdict must be yes, and on the prompt of another picture of its category, where it must be the verdict on the true
objects. Pictures of noise, which show nothing, must be right on no prompt.
"""

import datetime
import platform
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_sf import __version__  # noqa: E402
from mlx_sf.common.files import replacing  # noqa: E402
from mlx_sf.data.captioned_scenes import (  # noqa: E402
    CATEGORIES,
    CaptionedSceneSource,
    Instance,
    categories,
)
from mlx_sf.metrics.geneval import Detection, judge, overlap  # noqa: E402
from mlx_sf.metrics.scene_detector import detect  # noqa: E402
from mlx_sf.metrics.scene_prompts import prompts  # noqa: E402

PAGE, HEADING = ROOT / "docs" / "geneval.md", "## Validation\n"
SIZES = (32, 48, 64, 96, 128)
BLURS, NOISES = (0.5, 1.0, 2.0), (5, 10, 20)
SMOOTH = (0, 1, 2, 4, 8)  # standard deviations in pixels of the blur of pictures of noise
SEED = 2024  # of the pictures


@dataclass
class Tally:
    """What was seen in the pictures of one row: verdicts by category, and objects."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    agreed: int = 0  # on another picture's prompt
    exact: int = 0  # pictures whose objects, all of them and no more, were found with shape and colour
    pictures: int = 0
    objects: int = 0
    missed: int = 0
    extra: int = 0
    shapes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (true, found), where they differ
    colours: Counter[tuple[str, str]] = field(default_factory=Counter)
    off: float = 0.0  # largest distance of a box's side from the true one, in pixels

    def share(self, category: str) -> str:
        return percent(self.right[category], self.asked[category])

    def look(self, found: list[Detection], true: tuple[Instance, ...]) -> None:
        """Count the objects of one picture; those below the least confidence of GenEval do not count."""
        found = [d for d in found if d.score > 0.3]
        exact = len(found) == len(true)
        for t in true:
            near = max(found, key=lambda d: overlap(d.box, t.box), default=None)
            self.objects += 1
            if near is None or overlap(near.box, t.box) < 0.5:
                self.missed += 1
                exact = False
                continue
            found.remove(near)
            exact = exact and (near.name, near.colour) == (t.shape, t.colour)
            if near.name != t.shape:
                self.shapes[t.shape, near.name] += 1
            elif near.colour != t.colour:
                self.colours[t.colour, str(near.colour)] += 1
            else:
                self.off = max(self.off, float(np.abs(np.subtract(near.box, t.box)).max()))
        self.extra += len(found)
        self.exact += exact


def percent(part: int, of: int) -> str:
    return f"{100 * part / of:.1f}" if part < of else "100"


def tally(split: str, size: int, blur: float, noise: float, per_category: int) -> Tally:
    """The detector on the first pictures of a split, blurred and then under normal noise (0 to 255)."""
    source, asked = CaptionedSceneSource((size, size), seed=SEED, split=split), prompts(split, per_category, SEED)
    turns, result = len(categories(split)), Tally()
    rng = np.random.default_rng(SEED)
    for i, metadata in enumerate(asked):
        picture, true = source.draw(i)
        worse = ndimage.gaussian_filter(picture.astype(np.float64), (blur, blur, 0)) if blur else picture
        worse = worse + rng.normal(0, noise, picture.shape) if noise else worse
        found = detect(np.clip(np.round(worse), 0, 255).astype(np.uint8))
        other = asked[(i + turns) % len(asked)]
        truth = [Detection(t.shape, t.box, 1.0, t.colour) for t in true]
        result.pictures += 1
        result.asked[metadata["tag"]] += 1
        result.right[metadata["tag"]] += judge(metadata, found).correct
        result.agreed += judge(other, found).correct == judge(other, truth).correct
        result.look(found, true)
    return result


def tally_noise(blur: float, per_category: int) -> Tally:
    """The detector on pictures of normal noise, 64 x 64, blurred and stretched to a standard deviation of 50."""
    rng, result = np.random.default_rng(SEED), Tally()
    for metadata in prompts("seen", per_category, SEED):
        field = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (blur, blur, 0))
        found = detect(np.clip(128 + 50 * field / field.std(), 0, 255).astype(np.uint8))
        result.pictures += 1
        result.asked[metadata["tag"]] += 1
        result.right[metadata["tag"]] += judge(metadata, found).correct
        result.look(found, ())
    return result


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]


def row(name: str, split: str, t: Tally) -> list[str]:
    shares = [t.share(c) if c in t.asked else "–" for c in CATEGORIES]
    return [name, split, *shares, percent(t.agreed, t.pictures), percent(t.exact, t.pictures)]


def confusions(name: str, t: Tally) -> list[str]:
    def told(counts: Counter[tuple[str, str]]) -> str:
        return ", ".join(f"{a} → {b} {n}" for (a, b), n in counts.most_common()) or "none"

    return [name, str(t.objects), str(t.missed), str(t.extra), told(t.shapes), told(t.colours), f"{t.off:.1f}"]


def page(
    clean: dict[tuple[int, str], Tally], worse: dict[str, Tally], noise: dict[float, Tally], per_category: int
) -> list[str]:
    """The section, line by line."""
    today = datetime.date.today().isoformat()
    head = ["pictures", "split", *CATEGORIES, "other prompt", "exact"]
    shown = [row(f"{size} px", split, t) for (size, split), t in clean.items()]
    shown_worse = [row(name, "seen", t) for name, t in worse.items()]
    nothing = [[f"{b:g}", *(t.share(c) for c in CATEGORIES), f"{t.extra / t.pictures:.2f}"] for b, t in noise.items()]
    objects = [confusions(f"{size} px, {split}", t) for (size, split), t in clean.items()]
    objects += [confusions(name, t) for name, t in worse.items()]
    return [
        f"Written by `scripts/validate_scene_detector.py` on {today} (mlx-sf {__version__}, Python "
        f"{platform.python_version()}, NumPy {np.__version__}): {per_category} pictures of each category in every row.",
        "",
        "Percent of right verdicts by category, on the picture's own prompt. *Other prompt*: percent of pictures on "
        "which the verdict on another picture's prompt is the verdict on the true objects. *Exact*: percent of "
        "pictures whose objects, all of them and no more, were found with their shapes and colours.",
        "",
        *table(head, shown),
        "",
        "Pictures made worse, at 64 pixels unless said: Gaussian blur by its standard deviation in pixels, normal "
        "noise by its standard deviation of 255.",
        "",
        *table(head, shown_worse),
        "",
        "Objects and what they were confused with (true → found, number of objects). *Box*: largest distance of a side "
        "from the true one, in pixels, where shape and colour are right.",
        "",
        *table(["pictures", "objects", "missed", "extra", "shape", "colour", "box"], objects),
        "",
        "Pictures of noise, which show nothing, at 64 pixels: normal noise, blurred by the standard deviation in the "
        "first column and stretched to a standard deviation of 50. Percent of verdicts that say yes, and objects found "
        "in a picture.",
        "",
        *table(["blur", *CATEGORIES, "objects"], nothing),
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--per-category", type=click.IntRange(1), default=400, help="Pictures of each category in a row.")
@click.option("--print", "only_print", is_flag=True, help="Print the section instead of writing it.")
def main(per_category: int, only_print: bool) -> None:
    """Validate the scene detector on pictures whose objects are known."""
    with ProcessPoolExecutor(2) as pool:

        def later(split: str, size: int, blur: float = 0, noise: float = 0) -> Callable[[], Tally]:
            return pool.submit(tally, split, size, blur, noise, per_category).result

        jobs = {(size, split): later(split, size) for size in SIZES for split in ("seen", "unseen")}
        bad = {f"blur {b:g}": later("seen", 64, blur=b) for b in BLURS}
        bad |= {f"noise {n}": later("seen", 64, noise=n) for n in NOISES}
        bad |= {"32 px, blur 1": later("seen", 32, blur=1), "32 px, noise 10": later("seen", 32, noise=10)}
        empty = {b: pool.submit(tally_noise, b, per_category) for b in SMOOTH}
        lines = page(
            {k: r() for k, r in jobs.items()},
            {k: r() for k, r in bad.items()},
            {b: f.result() for b, f in empty.items()},
            per_category,
        )
    text = "\n".join(lines) + "\n"
    if only_print:
        click.echo(text, nl=False)
        return
    before = PAGE.read_text().split(HEADING)[0]
    with replacing(PAGE) as temporary:
        temporary.write_text(f"{before}{HEADING}\n{text}")
    click.echo(f"{PAGE}: written")


if __name__ == "__main__":
    main()
