"""How a model on the Hugging Face Hub is named: org/name, org/name@revision/folder, a pasted address."""

import re
from dataclasses import dataclass

from ..errors import MlxSfError


@dataclass(frozen=True)
class HubName:
    """A place on the Hub: `repo` "org/name"; `path` in it, "" for all; `revision`, a branch, tag or commit."""

    repo: str
    path: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else "@" + self.revision
        return self.repo + revision + ("/" + self.path if self.path else "")


_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>[^@\\]*))?", re.ASCII)
# a page of the Hub or of a mirror: .../org/name[/tree|blob|resolve/REVISION[/path]]
_PAGE = re.compile(
    rf"https?://[^/]+/(?P<repo>{_PART}/{_PART})(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+)(?:/(?P<path>[^?#]*))?)?"
    r"/?(?:[?#].*)?",
    re.ASCII,
)


def parse(text: str) -> HubName | None:
    """The place that a text names, None where it names none; `MlxSfError` for a path out of the repository."""
    match = _PAGE.fullmatch(text) or _NAME.fullmatch(text.removeprefix("hf://").removeprefix("models/"))
    if match is None:
        return None
    path = (match["path"] or "").strip("/")
    if any(part in ("", ".", "..") for part in path.split("/") if path):
        raise MlxSfError(f"{text}: its path {path!r} is none inside a repository, want org/name/folder")
    return HubName(match["repo"], path, match["revision"] or "main")
