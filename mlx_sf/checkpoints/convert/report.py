"""What a conversion tells its user."""

from dataclasses import dataclass, field

from ..config import Config


@dataclass
class Report:
    """What a conversion did, for people: settings by origin, keys left out, counts."""

    config: Config
    layout: str
    origin: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0
