"""The one exception that the program shows to its user, and how it names an option.

The library says `batch_size`, the command line `--batch-size`: a message marks the names of options (`option`), and
whoever shows it decides how they are spelt (`MlxSfError.shown`).
"""

import re
from collections.abc import Callable
from typing import Any

# around an option's name in a message: code points that no message holds otherwise
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}")


def option(name: str) -> str:
    """The name of an option inside a message: shown as `batch_size` by the library, `--batch-size` by the commands."""
    return f"{_OPEN}{name}{_CLOSE}"


def spelt(message: str, spelling: Callable[[str], str] = str) -> str:
    """A message with the names of its options spelt by `spelling`."""
    return _MARKED.sub(lambda m: spelling(m[1]), message)


class MlxSfError(Exception):
    """Something the user can act on, said in one line: what is wrong, where, what was found, what to do.

    The command line prints it without a traceback and exits with status 1. Library callers may catch it.
    """

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())  # one line, whatever was quoted inside
        super().__init__(spelt(self.message))

    def shown(self, spelling: Callable[[str], str]) -> str:
        """The line with the names of options spelt by `spelling`."""
        return spelt(self.message, spelling)


class FieldError(MlxSfError):
    """A field of a configuration, or an option, that holds what it cannot hold.

    Args:
        field: its name in the library. got: what it holds. want: what it may hold, in words.
        where: the file or part that it was read from, if any. fix: what to do, if `want` does not say it.
    """

    def __init__(self, field: str, got: Any, want: str, where: str = "", fix: str = "") -> None:
        self.field, self.got, self.want, self.where, self.fix = field, got, want, where, fix
        text = f"{option(field)} is {got!r}, want {want}"
        super().__init__((f"{where}: " if where else "") + text + (f": {fix}" if fix else ""))

    def within(self, where: str) -> "FieldError":
        """The same error, said of a part of `where`."""
        return FieldError(self.field, self.got, self.want, f"{where}: {self.where}" if self.where else where, self.fix)
