"""Groups as entries of a spec: what is read back from the text is these groups and no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import yaml

from fusecli.commands.entries import entries
from fusecli.spec import read_spec
from fusecli.spec.wildcards import bind_groups, bind_lists

Names = tuple[str, ...]


def lines(groups: Sequence[Names], *others: str) -> list[str]:
    """The entries of the groups of a model that has `others` too, as the lines of a file."""
    names = dict.fromkeys([name for group in groups for name in group] + list(others))
    return [line for entry in entries(groups, names) for line in entry]


def block(path: str, *leaves: str) -> Names:
    return tuple(f"{path}.{leaf}" for leaf in leaves)


def blocks(pattern: str, numbers: Sequence[object], *leaves: str) -> list[Names]:
    return [block(pattern.format(number), *leaves) for number in numbers]


PAIR = ("conv", "bn")
TABLE: dict[str, tuple[list[Names], list[str], list[str]]] = {
    # groups, other names of the model, lines
    "nothing": ([], ["conv"], []),
    "one pair": ([PAIR], [], ["  - [conv, bn]"]),
    "one in a block": ([block("a.0", *PAIR)], [], ["  - [a.0.conv, a.0.bn]"]),
    "a block that repeats": (blocks("a.{}", [0, 1, 2], *PAIR), [], ['  - ["a.*.conv", "a.*.bn"]  # 3']),
    "a number inside a word": (blocks("a{}", [1, 2], *PAIR), [], ['  - ["a*.conv", "a*.bn"]  # 2']),
    "three members": (
        blocks("a.{}", [0, 1], "conv", "bn", "relu"), [],
        ['  - ["a.*.conv", "a.*.bn", "a.*.relu"]  # 2'],
    ),
    "numbers at the top": (
        [("0", "1"), ("3", "4")], [],
        ['  - ["0", "1"]', '  - ["3", "4"]'],  # the path has no number that the names share
    ),
    "two numbers": (
        [block(f"a.{i}.{j}", *PAIR) for i in (0, 1) for j in (0, 1)], [],
        ['  - ["a.*.*.conv", "a.*.*.bn"]  # 4'],
    ),
    "two families": (
        [block(f"a.{i}", f"conv{j}", f"bn{j}") for i in (0, 1) for j in (1, 2)], [],
        ['  - ["a.*.conv1", "a.*.bn1"]  # 2', '  - ["a.*.conv2", "a.*.bn2"]  # 2'],
    ),
    # a * would take block 2 as well, which is no group
    "one number too many": (
        blocks("a.{}", [0, 1], *PAIR), ["a.2.conv", "a.2.bn"],
        ["  - [a.0.conv, a.0.bn]", "  - [a.1.conv, a.1.bn]"],
    ),
    "too many in one of two": (
        [block(f"a.{i}.{j}", *PAIR) for i in (0, 1) for j in (0, 1)], ["a.2.0.conv", "a.2.0.bn"],
        ['  - ["a.0.*.conv", "a.0.*.bn"]  # 2', '  - ["a.1.*.conv", "a.1.*.bn"]  # 2'],
    ),
    "one block is shorter": (
        [block(f"a.{i}.{j}", *PAIR) for i, j in ((0, 0), (0, 1), (1, 0))], ["a.1.1.conv", "a.1.1.bn"],
        ['  - ["a.0.*.conv", "a.0.*.bn"]  # 2', "  - [a.1.0.conv, a.1.0.bn]"],
    ),
    # a * is any text, not only a number
    "a name that only looks alike": (
        blocks("a{}", [1, 2], *PAIR), ["ab.conv", "ab.bn"],
        ["  - [a1.conv, a1.bn]", "  - [a2.conv, a2.bn]"],
    ),
    "half a pair is no group": (
        blocks("a.{}", [0, 1], *PAIR), ["a.2.conv", "a.3.bn"], ['  - ["a.*.conv", "a.*.bn"]  # 2'],
    ),
    "names that YAML would misread": (
        [("conv: a", "bn # b"), ("- c", "[d]"), ("null", "no"), ("1.10", "012")], [],
        ['  - ["conv: a", "bn # b"]', '  - ["- c", "[d]"]', "  - [null, no]", '  - ["1.10", "012"]'],
    ),
    "quotes": ([('a"b', "c'd"), ("e\\f", "g\nh")], [], ['  - ["a\\"b", "c\'d"]', '  - ["e\\\\f", "g\\nh"]']),
    "what no editor shows": (
        [("a\u2028b", "c\x85d"), ("e\u202ef", "g\x9bh"), ("schön", "\U0001f600")], [],
        [
            r'  - ["a\U00002028b", "c\U00000085d"]',
            r'  - ["e\U0000202ef", "g\U0000009bh"]',
            '  - ["schön", "\U0001f600"]',
        ],
    ),
    "a long path": (
        blocks("encoder.layers.{}.feed_forward.expansion", [0, 1], "convolution", "normalisation"), [],
        [
            '  - ["encoder.layers.*.feed_forward.expansion.convolution",  # 2',
            '     "encoder.layers.*.feed_forward.expansion.normalisation"]',
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_the_entries_and_what_they_stand_for(case: str, tmp_path) -> None:
    groups, others, expected = TABLE[case]
    assert lines(groups, *others) == expected
    path = tmp_path / "fuse.yaml"
    path.write_text("\n".join(["version: 1", "groups:" if expected else "groups: []", *expected]) + "\n")
    names = dict.fromkeys([name for group in groups for name in group] + others)
    bound = bind_groups(read_spec(path), names)
    assert sorted(group.modules for group in bound) == sorted(groups)


@pytest.mark.parametrize("case", [case for case in TABLE if case != "names that YAML would misread"])
def test_any_yaml_reader_reads_the_same(case: str) -> None:
    """Apart from names such as null, which fusecli reads as text."""
    groups, others, expected = TABLE[case]
    read = yaml.safe_load("\n".join(expected)) or []
    bound = bind_lists(read, dict.fromkeys([name for group in groups for name in group] + others))
    assert sorted(group.modules for group in bound) == sorted(groups)


def test_a_resnet_is_a_few_lines() -> None:
    """The first block of a stage has a pair more: no other block can match its names."""
    groups = [
        block(f"layer{stage}.{number}", f"conv{i}", f"bn{i}")
        for stage in (1, 2, 3, 4) for number in (0, 1, 2) for i in (1, 2)
    ]  # fmt: skip
    groups += [block(f"layer{stage}.0.downsample", "0", "1") for stage in (2, 3, 4)]
    assert lines(groups) == [
        '  - ["layer*.*.conv1", "layer*.*.bn1"]  # 12',
        '  - ["layer*.*.conv2", "layer*.*.bn2"]  # 12',
        '  - ["layer*.*.downsample.0", "layer*.*.downsample.1"]  # 3',
    ]


def test_the_same_groups_the_same_lines() -> None:
    groups = blocks("a.{}", range(9), *PAIR)
    assert lines(groups) == lines(groups)
    assert lines(groups[::-1]) == lines(groups)
