"""Progress on the console: a bar on a terminal, a plain line now and then where there is none."""

import sys
import time
from typing import Any

from tqdm import tqdm


def tell(line: str) -> None:
    """A line for people, on stderr: results alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """A tqdm bar on stderr, or plain lines every `every` seconds where stderr is not a terminal.

    Use as a context manager; `update(n)` counts, `note(text)` shows a short status behind the bar. Nothing is shown
    for work that ends within `after` seconds.
    """

    def __init__(self, total: int, what: str, unit: str = "it", after: float = 1.0, every: float = 15.0) -> None:
        self.total, self.what, self.unit, self.every = total, what, unit, every
        self.done, self.text = 0, ""
        self.start = time.monotonic()
        self.last = self.start + max(0.0, after - every)
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=what, unit=unit, delay=after, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def set_total(self, total: int) -> None:
        self.total = total
        if self.bar is not None:
            self.bar.total = total

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            spent = now - self.start
            left = spent / self.done * (self.total - self.done) if self.done else 0.0
            line = f"{self.what}: {self.done}/{self.total} {self.unit}, {spent:.0f} s, about {left:.0f} s left"
            tell(f"{line} {self.text}".rstrip())
