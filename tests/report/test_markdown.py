from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from fusecli.plain import visible
from fusecli.report import as_markdown
from fusecli.report.markdown_text import code, prose
from tests.report.outcomes import CLAIMED, FUSED, HOSTILE, HOSTILE_NAMES, REFUSED, SAMPLES

# As permissive as a renderer can be: raw HTML passes, links are made.
RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
OURS = {"h2", "h3", "ul", "li", "p", "strong", "code", "table", "thead", "tbody", "tr", "th", "td"}
OURS |= {"details", "summary"}


def _text_of(html: str) -> str:
    return (
        re.sub(r"<[^>]*>", "", html)
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", '"')
        .replace("&amp;", "&")
    )


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_is_code_and_reads_as_it_is(name: str) -> None:
    html = RENDERER.renderInline(code(name))
    assert re.fullmatch(r"<code>[^<]*</code>", html)
    assert _text_of(html) == visible(name)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_sentence_formats_links_and_mentions_nothing(name: str) -> None:
    html = RENDERER.renderInline(prose(name))
    assert set(re.findall(r"</?(\w+)", html)) <= {"code"}
    assert _text_of(html) == visible(name)
    outside_code = re.sub(r"<code>.*?</code>", "", html)
    assert not re.search(r"@\w|#\d|://|www\.|:\w+:", outside_code)


def test_ordinary_sentences_stay_readable() -> None:
    said = "the folded weight exceeds float16 (limit 10), in 3 of 4 channels; it's over."
    assert prose(said) == said
    assert prose("see layer_1, please") == "see `layer_1`, please"


@pytest.mark.parametrize("name", SAMPLES)
def test_only_our_own_markup_is_rendered(name: str) -> None:
    html = RENDERER.render(as_markdown(SAMPLES[name]))
    assert set(re.findall(r"</?(\w+)", html)) <= OURS


def test_hostile_names_do_not_move_the_cells_of_a_table() -> None:
    html = RENDERER.render(as_markdown(HOSTILE))
    groups = html.split("<h3>Groups</h3>")[1].split("</table>")[0]
    rows = groups.split("<tr>")[1:]
    assert len(rows) == 1 + len(HOSTILE.groups)
    assert {len(re.findall("<t[hd]", row)) for row in rows} == {8}
    # A row with more cells than the head loses them silently, so the last cell has to be the last fact.
    assert all("inf×" in row or "nan×" in row for row in rows[1:])


def test_no_line_can_be_read_as_a_command_by_a_ci_runner() -> None:
    lines = as_markdown(HOSTILE).splitlines()
    assert not [line for line in lines if line.lstrip().startswith("::")]
    assert not [line for line in lines if "##[" in line or "##vso[" in line]


def test_the_verdict_comes_first_and_says_what_was_believed() -> None:
    assert as_markdown(FUSED).startswith("## ✓ fused, equivalent\n")
    head = as_markdown(CLAIMED).split("###")[0]
    assert "as claimed" in head
    assert "no run has shown it" in head


def test_refusals_have_reason_evidence_and_remedy() -> None:
    text = as_markdown(REFUSED)
    for refusal in REFUSED.refused:
        assert f"`{refusal.code}` by" in text or f"`{refusal.code}`:" in text
        assert refusal.reason in _text_of(RENDERER.render(text))
    assert "leave this group out of the spec" in text
    assert text.split("### Refused")[-1].split("###")[0].endswith("\n\n'fusecli explain CODE' says more\n\n")
    assert "fusecli explain" not in as_markdown(FUSED)


def test_every_rename_is_listed() -> None:
    text = as_markdown(FUSED)
    for group in FUSED.groups:
        assert all(f"`{old}` → `{new}`" in text for old, new in group.keys_renamed)
        assert all(f"`{key}`" in text for key in (*group.keys_removed, *group.keys_added))
