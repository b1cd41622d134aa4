"""GenEval's metadata for captioned scenes, so that its rules judge pictures of them."""

from ..data.captioned_scenes import Description, caption, categories, describe
from ..errors import MlxSfError
from .geneval import Metadata


def metadata(description: Description, phrasing: int = 0) -> Metadata:
    """The line of a prompt file that a description stands for, its caption as the prompt.

    In "counting" one object more is excluded, as in GenEval's own file. In "position" the second object comes first,
    since the clause of the first refers to it.
    """
    first, last = description.objects[0], description.objects[-1]
    clauses = [{"class": o.shape, "count": o.count} for o in description.objects]
    values: Metadata = {"tag": description.category, "include": clauses}
    if description.category in ("colors", "color_attr"):
        values["include"] = [{**c, "color": o.colour} for c, o in zip(clauses, description.objects, strict=True)]
    elif description.category == "counting":
        values["exclude"] = [{"class": first.shape, "count": first.count + 1}]
    elif description.category == "position":
        values["include"] = [
            {"class": last.shape, "count": 1},
            {"class": first.shape, "count": 1, "position": [description.relation, 0]},
        ]
    return {**values, "prompt": caption(description, phrasing)}


def prompts(split: str = "seen", per_category: int = 100, seed: int = 0) -> list[Metadata]:
    """Metadata of the first captioned scenes of a split, `per_category` of each of its categories, which take turns.

    Prompt i is what picture i of `CaptionedSceneSource` shows with the same split and seed, in the same words.
    Raises `MlxSfError` for an unknown split, and for fewer than one of a category.
    """
    turns = len(categories(split))
    if per_category < 1:
        raise MlxSfError(f"captioned scenes: got {per_category} prompts of each category, want 1 or more")
    return [metadata(describe(i, seed, split), i // turns) for i in range(per_category * turns)]
