"""Untrusted text inside Markdown: it shows, and neither formats, links, mentions nor ends a table cell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fusecli.plain import visible

# What a backtick span holds without meaning anything, in a table and out of it.
_SPAN = re.compile(r"[^`|\\<>&]+")
# Words that no Markdown dialect reads as anything but words.
_WORD = re.compile(r"[\w.,;:()'\"/%+=?!×→…·–-]+")
_WORD_MARKUP = re.compile(r"_|:(?=.)|www\.", re.IGNORECASE)
_LIST_MARKER = re.compile(r"[-+]+|=+|\d+[.)]")


def code(text: str) -> str:
    """A name, path, hash or command as code: never a link, a mention or an emoji."""
    shown = visible(text)
    if _SPAN.fullmatch(shown) and shown == shown.strip():
        return f"`{shown}`"
    # A pipe cannot stand in a table's backtick span, nor a backtick in any short one.
    return f"<code>{''.join(char if char.isalnum() else f'&#{ord(char)};' for char in shown)}</code>"


def prose(text: str) -> str:
    """A sentence that may quote names: every word that could be markup becomes code."""
    words = visible(text).split(" ")
    return " ".join(_safe(word, first=index == 0) for index, word in enumerate(words))


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> list[str]:
    """Lines of a table; `align` has one letter per column, r for right."""
    columns = list(head)
    marks = ["--:" if letter == "r" else "---" for letter in align.ljust(len(columns), "l")]
    return [_row(columns), _row(marks), *(_row(row) for row in rows), ""]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _safe(word: str, *, first: bool) -> str:
    if not word:
        return word
    core = word.rstrip(".,;:)")
    ending = word[len(core) :]
    if not core or (_WORD.fullmatch(core) and not _WORD_MARKUP.search(core)):
        return code(word) if first and _LIST_MARKER.fullmatch(word) else word
    return code(core) + ending
