"""Words and columns for the console."""

import math
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """5400 -> "1 h 30 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def columns(rows: Sequence[tuple[str, str]]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line: the first of its message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
