from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from fusecli.outcome import Outcome
from fusecli.report import print_terminal
from tests.report.outcomes import (
    CLAIMED,
    DIFFERENT,
    FUSED,
    FUSED_MANY,
    HOSTILE,
    INCONCLUSIVE,
    MANY,
    REFUSED,
    SAMPLES,
)


def _printed(outcome: Outcome, width: int = 80, encoding: str = "utf-8", **options: object) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    print_terminal(outcome, Console(file=file, width=width, legacy_windows=False, **options))  # type: ignore[arg-type]
    file.seek(0)
    return file.read()


def _unwrapped(text: str) -> str:
    return re.sub(r"( \\)?\s+", " ", text)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", SAMPLES)
def test_no_line_is_wider_than_the_console(name: str, width: int) -> None:
    command = set(SAMPLES[name].next_step.split())
    lines = _printed(SAMPLES[name], width).splitlines()
    wide = [line for line in lines if cell_len(line) > width]
    # A path in the command that comes next sticks out: broken, it could not be pasted.
    assert all(line.removesuffix(" \\").split()[-1] in command for line in wide)
    assert width < 60 or not wide


def test_a_path_in_the_next_command_is_never_broken() -> None:
    path = f"/{'deep/' * 30}model.pt"
    sample = replace(SAMPLES["fused"], next_step=f"fusecli verify {path} out.safetensors")
    assert path in _printed(sample)


@pytest.mark.parametrize("name", SAMPLES)
def test_without_a_terminal_there_is_no_escape_sequence(name: str) -> None:
    assert "\x1b" not in _printed(SAMPLES[name])


def test_no_color_takes_the_colours_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[\d;]*3\d[\d;]*m")
    terminal = {"force_terminal": True, "color_system": "standard"}
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour.search(_printed(FUSED, **terminal))
    monkeypatch.setenv("NO_COLOR", "1")
    bare = _printed(FUSED, **terminal)
    assert not colour.search(bare)
    assert re.sub(r"\x1b\[[\d;]*m", "", bare) == _printed(FUSED)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "iso-8859-1"])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_console_without_unicode_gets_ascii_of_the_same_shape(name: str, encoding: str) -> None:
    text = _printed(SAMPLES[name], encoding=encoding)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80


def test_marks_do_not_rely_on_colour() -> None:
    assert re.search(r"^✓ fused, equivalent", _printed(FUSED), re.M)
    assert re.search(r"^✗ different", _printed(DIFFERENT), re.M)
    assert re.search(r"^\? inconclusive", _printed(INCONCLUSIVE), re.M)
    assert re.search(r"^! different", _printed(DIFFERENT, encoding="ascii"), re.M)


def test_names_are_text() -> None:
    text = _printed(HOSTILE, force_terminal=True, color_system="truecolor")
    assert "[red]bold[/red]:bug:" in text
    # All that is left of escape sequences are the styles that we set ourselves.
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert plain.replace("\n", "").isprintable()
    assert r"\x1b[31mred\x1b[0m" in plain


@pytest.mark.parametrize("width", range(40, 121))
def test_no_line_can_be_read_as_a_command_by_a_ci_runner(width: int) -> None:
    lines = _printed(HOSTILE, width).splitlines()
    assert not [line for line in lines if line.lstrip().startswith("::")]
    assert not [line for line in lines if "##[" in line or "##vso[" in line]


def test_the_verdict_and_the_next_step_end_the_report() -> None:
    last = _printed(DIFFERENT).split("─" * 80)[-1]
    assert "✗ different" in last
    assert "backbone.body.layer2.4.conv1" in last
    assert "4.1e-05" in last
    assert "exit 1" in last
    assert last.strip().splitlines()[-2].split()[0] == "next"


@pytest.mark.parametrize("name", ["different", "inconclusive", "refused", "nothing", "error"])
def test_a_failure_says_what_to_do_and_that_nothing_was_written(name: str) -> None:
    text = _printed(SAMPLES[name])
    assert re.search(r"^  next +\w+", text, re.M)
    assert re.search(r"^  written +nothing$", text, re.M)


def test_many_groups_are_collapsed_to_the_ones_that_matter() -> None:
    lines = _printed(FUSED_MANY).splitlines()
    shown = [line for line in lines if line.startswith("  ✓ backbone")]
    assert 3 <= len(shown) <= 6
    assert "7.0e-16" in shown[0]
    assert f"{len(MANY) - len(shown)} more" in "\n".join(lines)
    assert "json=PATH" in "\n".join(lines)


def test_what_is_not_equivalent_is_never_collapsed() -> None:
    wrong = tuple(replace(group, status="different") for group in MANY[::2])
    text = _printed(replace(DIFFERENT, groups=(*wrong, *MANY[1::2])))
    assert text.count("  ✗ backbone") == len(wrong)


def test_few_groups_are_all_shown_in_the_order_of_the_run() -> None:
    text = _printed(FUSED)
    assert text.index("conv1 + bn1") < text.index("conv2 + bn2") < text.index("head.{fc, bn}")


def test_a_claim_is_said_beside_the_verdict_and_in_its_row() -> None:
    details, last = _printed(CLAIMED).split("─" * 80)
    assert "as claimed" in last
    assert "no run has shown it" in _unwrapped(last)
    assert len(re.findall(r"claimed +\d", details)) == len(CLAIMED.groups)
    assert "claimed" not in _printed(FUSED)


def test_a_success_that_nothing_verified_is_not_shown_as_one() -> None:
    text = _printed(replace(FUSED, verification=None))
    assert "✓ fused" not in text
    assert "not verified" in text


def test_refusals_are_blocks_of_what_why_and_remedy() -> None:
    text = _printed(REFUSED)
    assert "✗ conv3 + bn3" in text
    assert "why      overflow (conv_bn): the folded weight exceeds float16" in text
    assert "seen     channel 17: 7.2e+04" in text
    assert "remedy   leave this group out of the spec" in text


def test_the_last_line_of_the_refusals_says_where_to_read_on() -> None:
    lines = _printed(REFUSED).splitlines()
    (more,) = (number for number, line in enumerate(lines) if "fusecli explain" in line)
    assert lines[more] == "  'fusecli explain CODE' says more"
    assert lines[more - 1].lstrip().startswith("why      no-rule")
    assert lines[more + 1] == ""
    assert "fusecli explain" not in _printed(FUSED)


def test_a_wrapped_command_can_be_pasted_into_a_shell() -> None:
    command = _printed(FUSED).split("  next ")[1]
    *continued, last = command.splitlines()
    assert continued
    assert all(line.endswith(" \\") for line in continued)
    assert " ".join([*(line[:-2] for line in continued), last]).split() == FUSED.next_step.split()


def test_totals_are_before_after_and_difference() -> None:
    assert re.search(r"bytes +104,327 +99,120 +-5,207 \(-5.0 %\)", _printed(FUSED))


def test_reports_are_made_without_torch() -> None:
    script = "import sys, fusecli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
