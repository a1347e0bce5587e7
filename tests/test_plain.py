from __future__ import annotations

import pytest

from fusecli.plain import visible
from tests.report.outcomes import HOSTILE_NAMES


@pytest.mark.parametrize(
    "text", ["", "layer1.0.conv1", "aten::add", "层.卷积", "3.1× → é", "a b", "[red]x[/red]"]
)
def test_harmless_text_is_left_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("\u202eexe", r"\u202eexe"),
        ("\u2028\u200b\ufeff", r"\u2028\u200b\ufeff"),
        ("\udc80", r"\udc80"),
        ("a\u00a0b", r"a\xa0b"),
        ("::error::x", r"\x3a:error::x"),
        ("see ::error::x", r"see \x3a:error::x"),
        ("##[add-mask]x", r"\x23#[add-mask]x"),
        ("x ##vso[task]", r"x \x23#vso[task]"),
    ],
)
def test_what_acts_is_written_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_ascii_escapes_letters_but_keeps_our_own_signs_for_the_page_to_replace() -> None:
    assert visible("é → 层", ascii_only=True) == r"\xe9 → \u5c42"


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_every_name_becomes_one_printable_encodable_line(name: str) -> None:
    shown = visible(name)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode() == shown
