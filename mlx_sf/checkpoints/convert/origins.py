"""Settings of a foreign file, each with the place that said it: shapes, stored options, flags, published models."""

from typing import Any

from ...errors import MlxSfError


class Origins:
    """Settings by name with the place each came from; disagreement between places is an error."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values: dict[str, tuple[Any, str]] = {}

    def put(self, name: str, value: Any, origin: str) -> None:
        """What `origin` ("shapes", "args", "flag x", "published") says of a setting."""
        if name not in self.values:
            self.values[name] = (value, origin)
            return
        old, old_origin = self.values[name]
        if old != value:
            raise MlxSfError(
                f"{self.where}: {origin} {_say(origin)} {name} {value!r}, "
                f"but the file's {old_origin} {_say(old_origin)} {old!r}"
            )

    def get(self, name: str) -> Any:
        """The value of a setting; None where no place has said one."""
        return self.values[name][0] if name in self.values else None

    def told(self) -> dict[str, list[str]]:
        """ "name value" of every setting by the kind of place, for people."""
        told: dict[str, list[str]] = {}
        for name, (value, origin) in self.values.items():
            told.setdefault(origin.split(" ")[0], []).append(f"{name} {value}")
        return told


def _say(origin: str) -> str:
    return "say" if origin in ("shapes", "args") else "says"
