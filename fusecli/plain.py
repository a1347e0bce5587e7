"""Names in sentences: as text (`visible`), for names from files are data, and not all of them (`some`).

A module name can hold an escape sequence that repaints the terminal, a line break that forges a line of
the report, a bidi override that reverses it, or a line that a CI runner obeys. GitHub's runner obeys
`::command::` at the start of a line (after trimming) and `##[command]` anywhere in it (ActionCommand.cs);
Azure's obeys `##vso[` anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Control, format (bidi, zero width), surrogate, private, unassigned, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_COMMAND = re.compile(r"(?:^|(?<= )):(?=:)|:{3,}|#(?=#(?:\[|vso\[))")
# What our own sentences are set in; the terminal replaces these where it cannot show them.
TYPOGRAPHY = "×→…·–✓✗─"


def visible(text: str, *, ascii_only: bool = False) -> str:
    """`text` on one line, with everything that acts instead of showing written as an escape, such as \\x1b.

    ascii_only also escapes letters beyond ASCII, for a console that cannot encode them.
    """
    shown = "".join(_escaped(char) if _acts(char, ascii_only) else char for char in text)
    return _COMMAND.sub(lambda command: "".join(f"\\x{ord(char):02x}" for char in command[0]), shown)


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _acts(char: str, ascii_only: bool) -> bool:
    if " " <= char <= "~":
        return False
    if ascii_only:
        return char not in TYPOGRAPHY
    category = unicodedata.category(char)
    # A space that is not the space bar's (NBSP, em space) would make two different names look alike.
    return category in _UNSEEN or category == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
