"""A page of fixed width on a console: untrusted text becomes lines that it cannot forge or overflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from fusecli.plain import TYPOGRAPHY, visible

# Longer lines than this are hard to follow back to their beginning, however wide the window.
WIDEST = 100
# Nobody reads more of one text than this; a name of a megabyte is an attack on whoever scrolls.
LONGEST = 600
# A break inside of quotes, or after an escape, would change the command.
_QUOTES = frozenset("'\"\\")
# One cell each, so that a layout made for one alphabet fits in the other.
_ASCII = str.maketrans(TYPOGRAPHY, "x>~--+!-")


class Page:
    """Writes lines of spans (text, style), at most `width` cells wide, in the alphabet of the console."""

    def __init__(self, console: Console) -> None:
        self.width = min(console.width, WIDEST)
        self._console = console
        self._ascii_only = not console.encoding.lower().replace("_", "-").startswith("utf")

    def show(self, text: str) -> str:
        """Untrusted text, on one line, in characters this console has."""
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
        return visible(text, ascii_only=self._ascii_only)

    def line(self, *spans: tuple[str, str]) -> None:
        line = Text()
        for text, style in spans:
            line.append(text.translate(_ASCII) if self._ascii_only else text, style)
        line.rstrip()
        # Text, not str: rich would read brackets in a name as markup, and :x: as an emoji.
        self._console.print(line, soft_wrap=True)

    def blank(self) -> None:
        self.line()

    def title(self, text: str, remark: str = "") -> None:
        self.blank()
        self.line((text, "bold"), (f"  {remark}" if remark else "", "dim"))

    def hanging(
        self, label: str, text: str, *, style: str = "", label_style: str = "dim", column: int = 13
    ) -> None:
        """`label`, then untrusted `text` wrapped beside it, in a column of its own."""
        self._beside(label, wrapped(self.show(text), self.width - column), style, label_style, column)

    def command(self, label: str, text: str) -> None:
        """Like `hanging`; a command that needs several lines is written so that a shell takes it back."""
        shown, room = self.show(text), self.width - 13
        if cell_len(shown) > room and shown.startswith("fusecli ") and not _QUOTES.intersection(shown):
            parts = list(wrapped(shown, room - 2, whole_words=True))
            self._beside(label, [f"{part} \\" for part in parts[:-1]] + parts[-1:], "bold", "bold", 13)
        else:
            self.hanging(label, text, style="bold", label_style="bold")

    def _beside(self, label: str, parts: Iterable[str], style: str, label_style: str, column: int) -> None:
        lead = set_cell_size(shortened(f"  {label}", column - 1), column)
        for part in parts:
            self.line((lead, label_style), (part, style))
            lead = " " * column


def wrapped(text: str, width: int, *, whole_words: bool = False) -> Iterator[str]:
    """Lines of at most `width` cells, broken at spaces; a word that is longer is broken where it must be.

    whole_words: it sticks out instead, as the path in a command has to.
    """
    line = ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        *full, line = [word] if whole_words else _pieces(word, width)
        yield from full
    yield line


def shortened(text: str, width: int) -> str:
    """`text` in at most `width` cells, cut in the middle: both ends of a module path tell where it is."""
    if cell_len(text) <= width:
        return text
    tail = max(width - 1, 2) // 2
    end = text[-tail:]
    while cell_len(end) > tail:
        end = end[1:]
    return set_cell_size(text, width - 1 - cell_len(end)).rstrip() + "…" + end


def _pieces(word: str, width: int) -> list[str]:
    pieces = []
    while cell_len(word) > width:
        cut = next(n for n in range(min(len(word), width), 0, -1) if cell_len(word[:n]) <= width)
        # A CI runner obeys a line that begins with ::, so a break may not make one.
        while cut > 1 and word.startswith("::", cut):
            cut -= 1
        pieces.append(word[:cut])
        word = word[cut:]
    return [*pieces, word]
