"""How text from a spec or a model is shown in a message, and what the writer probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_LONGEST = 120
_ALIKE = 0.6


def shown(text: str) -> str:
    """`text` in quotes, safe for a terminal: control and invisible characters escaped, long text cut."""
    return f"'{escaped(text[:_LONGEST])}{'...' if len(text) > _LONGEST else ''}'"


def escaped(text: str) -> str:
    """`text` with every character that does not print written as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `word`, the first of equals, or None.

    difflib.get_close_matches prefers the last of equals in the alphabet: bn2 before bn1.
    """
    best, found = _ALIKE, None
    matcher = SequenceMatcher(b=word[:_LONGEST], autojunk=False)
    for option in options:
        matcher.set_seq1(option)
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
            ratio = matcher.ratio()
            best, found = (ratio, option) if ratio > best else (best, found)
    return found


def suggestion(word: str, options: Iterable[str]) -> str:
    """The fix for an unknown word: the nearest option, or all of them."""
    options = list(options)
    near = closest(word, options)
    return f"did you mean {shown(near)}?" if near else f"use one of: {', '.join(options)}"


def described(value: object) -> str:
    """What was found where something else was expected."""
    if isinstance(value, str):
        return shown(value) if value else "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "nothing" if value is None else f"{type(value).__name__} {escaped(repr(value)[:_LONGEST])}"
