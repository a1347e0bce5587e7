"""Case 58: what YAML may hold. Names are text; the rest is a clear error with its line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fusecli.errors import UsageError
from fusecli.spec import Spec, read_spec, reader

Read = Callable[[str | bytes], Spec]
Wrong = Callable[[str | bytes], list[str]]

REFUSED = {
    "empty file": ("", "1:1: the file is empty"),
    "only comments": ("# nothing\n", "1:1: the file is empty"),
    "a list": ("- [conv1, bn1]\n", "1:1: the top level is not a mapping"),
    "a scalar": ("\nconv1\n", "2:1: the top level is not a mapping"),
    "two documents": ("groups: []\n---\ngroups: []\n", "2:1: a second document begins here"),
    "duplicate key": (
        "qat: false\ngroups: []\nqat: false\n",
        "3:1: key 'qat' is written twice; the first is at fuse.yaml:1:1",
    ),
    "duplicate key below": ("verify:\n  seed: 1\n  'seed': 2\n", "3:3: key 'seed' is written twice"),
    "tag": ("verify: {seed: !!int 1}\n", "1:16: the YAML tag 'tag:yaml.org,2002:int' is refused"),
    "python tag": ("model: !!python/object/apply:os.system [id]\n", "1:8: the YAML tag"),
    "bare tag": ("groups: [[! conv1, bn1]]\n", "1:11: the YAML tag '!' is refused"),
    "anchor": ("groups:\n  - &x [conv1, bn1]\n", "2:5: the YAML anchor '&x' is refused"),
    "alias": ("groups:\n  - [conv1, *bn1]\n", "2:13: '*bn1' is a YAML alias"),
    "alias as key": ("*x : 1\n", "1:1: '*x' is a YAML alias"),
    "unquoted pattern": (
        "groups:\n  - [a, *.bn]\n",
        "2:10: a '*' begins a YAML alias here; put patterns in quotes",
    ),
    "merge key": ("verify:\n  <<: {seed: 1}\n", "2:3: merge keys ('<<') are refused"),
    "list as key": ("[a, b]: 1\n", "1:1: a key must be text"),
    "mapping as key": ("? {a: 1}\n: 1\n", "1:3: a key must be text"),
    "tab indent": ("verify:\n\tseed: 1\n", "2:1: a tab indents this line; indent with spaces"),
    "tab after spaces": ("verify:\n  seed: 1\n  \tsamples: 1\n", "3:3: a tab indents this line"),
    "control character": (
        "qat: false\ngroups: [[a\x1b[31m, b]]\n",
        "2:12: the character '\\x1b' cannot stand",
    ),
    "null byte": ("groups: [[a\x00, b]]\n", "1:12: the character '\\x00' cannot stand"),
    "unicode line end": ("qat: false # a\u2028b\n", "1:15: the character '\\u2028' cannot stand"),
    "not utf-8": (b"qat: false\n# \xff\n", "2:3: the byte 0xff is not UTF-8 text"),
    "utf-16": ("qat: false\n".encode("utf-16"), "1:1: the byte 0xff is not UTF-8 text"),
    "open bracket": (
        "groups: [[a, b]\nqat: false\n",
        "1:9: this bracket has no end, or a comma is missing in it",
    ),
    "stray colon": ("model: factory: x\n", "1:15: this ':' makes a key where none can stand"),
    "open quote": ("model: 'x\n", "1:8: this quote has no end"),
    "stray dash": ("qat: false\n - a\n  - b\n- c\n", "4:1: this is not YAML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused_where_it_stands(wrong: Wrong, text: str | bytes, message: str) -> None:
    problems = wrong(text)
    assert problems[0].startswith(f"fuse.yaml:{message}"), problems
    assert len(problems) == 1


@pytest.mark.parametrize("case", REFUSED)
def test_the_parser_without_libyaml_says_the_same(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(reader, "_LOADER", yaml.SafeLoader)
    text, message = REFUSED[case]
    where, what = message.split(": ", 1)
    (problem,) = wrong(text)
    assert what in problem
    # The two parsers agree on the line; inside it a syntax error is found a few columns apart.
    assert problem.startswith(f"fuse.yaml:{where.split(':')[0]}:")


def test_all_of_it_is_reported_at_once_in_the_order_of_the_file(wrong: Wrong) -> None:
    text = """\
version: 2
vrify: {seed: 1}
groups:
  - [conv1, *bn1]
  - !!seq [conv2]
  - []
qat: yes
qat: false
"""
    assert [problem.split(";")[0] for problem in wrong(text)] == [
        "fuse.yaml:1:10: version 2 is unknown to this fusecli, which knows 1",
        "fuse.yaml:2:1: key 'vrify' is unknown",
        "fuse.yaml:4:13: '*bn1' is a YAML alias, which a spec does not have",
        "fuse.yaml:5:5: the YAML tag 'tag:yaml.org,2002:seq' is refused",
        "fuse.yaml:6:5: this group is empty",
        "fuse.yaml:7:6: true or false is expected, found 'yes'",
        "fuse.yaml:8:1: key 'qat' is written twice",
    ]


@pytest.mark.parametrize("loader", [reader._LOADER, yaml.SafeLoader])
def test_an_alias_bomb_is_refused_and_never_expanded(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch, loader: type
) -> None:
    monkeypatch.setattr(reader, "_LOADER", loader)
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    began = time.perf_counter()
    problems = wrong("\n".join(["a0: &a0 lol", *levels]))
    assert problems[0].startswith("fuse.yaml:1:")
    assert any("'*a28' is a YAML alias" in problem for problem in problems)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("loader", [reader._LOADER, yaml.SafeLoader])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_before_it_is_deep(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch, loader: type, opening: str
) -> None:
    monkeypatch.setattr(reader, "_LOADER", loader)
    (problem,) = wrong("groups:\n  " + opening * 100_000)
    assert problem.startswith("fuse.yaml:2:")
    assert "nested deeper than 20 levels" in problem


def test_nesting_is_counted_not_guessed(read: Read) -> None:
    deep = "[" * 17 + "1" + "]" * 17
    spec = read(f"model: {{factory: 'a:b', kwargs: {{x: {deep}}}}}")
    assert spec.model is not None
    assert str(spec.model.kwargs["x"]) == deep


def test_a_file_of_5_mib_is_refused_before_it_is_parsed(wrong: Wrong) -> None:
    began = time.perf_counter()
    (problem,) = wrong("groups:\n" + "  - [conv1, bn1]\n" * (5 << 20 >> 4))
    assert problem.startswith("fuse.yaml: the spec file is larger than 1 MiB")
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "name",
    [
        "1.10",
        "012",
        "yes",
        "no",
        "on",
        "1e-5",
        "null",
        "~",
        "true",
        "0x1f",
        "1_000",
        "2024-01-01",
        ".nan",
        "1:30",
        "=",
        "0",
        "é",
        "a b",
    ],
)
def test_a_name_is_the_text_that_stands_in_the_file(read: Read, name: str) -> None:
    spec = read(f"groups:\n  - [{name}, bn1]\n  - {{modules: ['{name}', conv]}}\nexclude: [{name}]\n")
    assert spec.groups[0].modules == (name, "bn1")
    assert spec.groups[1].modules == (name, "conv")
    assert spec.exclude == (name,)
    assert all(type(module) is str for module in spec.groups[0].modules)


FREE = {
    "1e-5": 1e-5,
    "1.0e-5": 1e-5,
    "1E3": 1000.0,
    "-2.5": -2.5,
    ".5": 0.5,
    "12": 12,
    "+3": 3,
    "0x1f": 31,
    "0o14": 12,
    "-.inf": float("-inf"),
    "true": True,
    "True": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    "'1e-5'": "1e-5",
    '"true"': "true",
    "'null'": "null",
    "1.10": 1.1,
    "2024-01-01": "2024-01-01",
    "1:30": "1:30",
    "y": "y",
    "nan": "nan",
    "[1, {a: no-op}]": [1, {"a": "no-op"}],
}


@pytest.mark.parametrize(("written", "value"), FREE.items())
def test_a_keyword_argument_is_what_yaml_1_2_makes_of_it(read: Read, written: str, value: object) -> None:
    spec = read(f"model:\n  factory: 'a:b'\n  kwargs:\n    x: {written}\n")
    assert spec.model is not None
    found = spec.model.kwargs["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "fix", "what"),
    [
        ("012", "write 12 or 0o12", "octal in some YAML readers and decimal in others"),
        ("-08", "write -8", "octal in some YAML readers and decimal in others"),
        ("no", "write false", "true or false in some YAML readers and text in others"),
        ("ON", "write true", "true or false in some YAML readers and text in others"),
        ("1_000", "write 1000", "a number in some YAML readers and text in others"),
    ],
)
def test_a_keyword_argument_is_never_guessed(wrong: Wrong, written: str, fix: str, what: str) -> None:
    text = f"model:\n  factory: 'a:b'\n  kwargs:\n    x: [{written}]\n"
    assert wrong(text) == [f"fuse.yaml:4:9: '{written}' is {what}; {fix}, or put the text in quotes"]


NUMBERS = {
    "012": "'012' is octal in some YAML readers and decimal in others; write 12 or 0o12",
    "1_0": "'1_0' is a number in some YAML readers and text in others; write 10",
    "yes": "a whole number is expected, found 'yes'",
    "true": "a whole number is expected, found 'true'",
    "1.5": "a whole number is expected, found '1.5'",
    "4.0": "a whole number is expected, found '4.0'",
    "'4'": "a whole number is expected, found '4'; remove the quotes",
    "": "this needs a value",
    "[4]": "a whole number is expected, found a list",
    "0": "this is at least 1 and below 2**31, found 0",
    "9" * 300: "this is at least 1 and below 2**31",
    "9" * 9000: "a whole number is expected",
}


@pytest.mark.parametrize(("written", "message"), NUMBERS.items(), ids=lambda text: text[:9])
def test_a_number_is_a_number(wrong: Wrong, written: str, message: str) -> None:
    (problem,) = wrong(f"verify:\n  samples: {written}\n")
    expected = "a whole number is expected, found nothing" if not written else message
    assert problem.partition(": ")[2].startswith(expected)
    assert problem.startswith("fuse.yaml:2:")


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_eps_is_a_number_with_or_without_a_point(read: Read, written: str) -> None:
    assert read(f"assume: {{eps: {written}}}").assume.eps == 1e-3


@pytest.mark.parametrize(
    "written", ["0", "-1e-5", ".inf", ".nan", "1e999", "9" * 399, "1e-5x", "'1e-5'", "on"]
)
def test_eps_is_above_zero_and_finite(wrong: Wrong, written: str) -> None:
    assert wrong(f"assume: {{eps: {written}}}")[0].startswith("fuse.yaml:1:15: ")
    assert wrong(f"groups:\n- {{modules: [a, b], eps: {written}}}")[0].startswith("fuse.yaml:2:26: ")


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("yes", "write true"),
        ("No", "write false"),
        ("on", "write true"),
        ("OFF", "write false"),
        ("'true'", "write true or false, without quotes"),
        ("1", "write true or false, without quotes"),
    ],
)
def test_a_flag_is_true_or_false(wrong: Wrong, written: str, fix: str) -> None:
    assert wrong(f"qat: {written}") == [
        f"fuse.yaml:1:6: true or false is expected, found {shown(written)}; {fix}"
    ]


def shown(written: str) -> str:
    return "'" + written.strip("'") + "'"


def test_control_characters_in_names_are_shown_escaped(wrong: Wrong) -> None:
    (problem,) = wrong('"\\x1b[31m\\nkey\\u202e": 1\n')
    assert problem.startswith("fuse.yaml:1:1: key '\\x1b[31m\\nkey\\u202e' is unknown")


def test_a_long_name_is_cut_in_messages(wrong: Wrong) -> None:
    (problem,) = wrong(f"{'k' * 900}: 1\n")
    assert len(problem) < 400


def test_crlf_and_a_byte_order_mark_do_not_move_the_lines(wrong: Wrong) -> None:
    (problem,) = wrong(b"\xef\xbb\xbfqat: false\r\ngroups: []\r\nvrify: {}\r\n")
    assert problem.startswith("fuse.yaml:3:1: key 'vrify'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fuse.yml", "fuse.yml: there is no such spec file; did you mean 'fuse.yaml'?"),
        ("nowhere/at.all", "nowhere/at.all: there is no such spec file; check the path"),
        (".", ".: the spec file cannot be read: Is a directory"),
        ("a\x00b", "a\\x00b: the spec file cannot be read: embedded null byte"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fuse.yaml").write_text("")
    with pytest.raises(UsageError) as caught:
        read_spec(name)
    assert str(caught.value) == message


def test_thousands_of_problems_do_not_take_minutes(wrong: Wrong) -> None:
    began = time.perf_counter()
    problems = wrong("".join(f"key{i}: 1\n" for i in range(50_000)))
    assert len(problems) == 1001
    assert problems[-1] == "49000 more problems are not shown"
    assert time.perf_counter() - began < 10
