"""Pieces of the page that are words: bars, notes, errors, facts."""

import html
import math
from collections.abc import Iterable

from ..common.text import duration


def bar(done: int, total: int, text: str) -> str:
    """A progress bar with its state in words. No live region: it would be read out ten times a second."""
    return (
        f'<div class="said"><progress max="{max(1, total)}" value="{done}" aria-label="{html.escape(text)}"></progress>'
        f"<span>{html.escape(text)}</span></div>"
    )


def note(text: str) -> str:
    """A sentence about what goes on."""
    return f'<div class="said" role="status"><span>{html.escape(text)}</span></div>' if text else ""


def alarm(text: str) -> str:
    """A sentence about what went wrong."""
    return f'<div class="said wrong" role="alert"><span>{html.escape(text)}</span></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A small table of names and values."""
    cells = "".join(f"<tr><th scope='row'>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in rows)
    return f'<table class="facts">{cells}</table>'


def left(seconds: float) -> str:
    """The time that is left, in words."""
    return f"about {duration(math.ceil(seconds))} left"
