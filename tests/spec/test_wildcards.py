"""Patterns: a * stays within two dots, and the n-th * means the same text in every name of the group."""

from __future__ import annotations

import time

import pytest

from fusecli.errors import UsageError
from fusecli.spec import spec_from_mapping
from fusecli.spec.names import NameTree, glob
from fusecli.spec.wildcards import bind_groups, bind_lists

RESNET = [
    "stem.conv",
    "stem.bn",
    "layer2.0.conv1",
    "layer2.0.bn1",
    "layer1.0.conv1",
    "layer1.0.bn1",
    "layer1.1.conv1",
    "layer1.1.bn1",
    "layer1.1.conv2",
    "head.conv1",
    "head.bn1",
    "head.0.conv1",
    "head.0.bn1",
]


@pytest.mark.parametrize(
    ("pattern", "text", "bound"),
    [
        ("conv", "conv1", None),
        ("layer*", "lay", None),
        ("a*a", "a", None),
        ("*x*", "abc", None),
        ("a*b*a", "aba", ("", "")),
        ("conv", "conv", ()),
        ("layer*", "layer12", ("12",)),
        ("layer*", "layer", ("",)),
        ("*", "anything", ("anything",)),
        ("a*c*e", "abcde", ("b", "d")),
        ("*_*", "1_2_3", ("1", "2_3")),
    ],
)
def test_what_a_star_stands_for(pattern: str, text: str, bound: tuple[str, ...] | None) -> None:
    assert glob(pattern, text) == bound


def test_a_pattern_made_to_stall_does_not() -> None:
    began = time.perf_counter()
    assert glob("*a" * 1000 + "b", "a" * 100_000) is None
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "group",
    [
        ["*.conv", "*.norm"],  # no such norm
        ["layer*.conv1", "layer*.bn1"],  # a star does not cross a dot
        ["layer*.*.conv2", "layer*.*.bn2"],  # the one conv2 has no bn2
        ["*.*.*.conv", "*.*.*.bn"],
    ],
)
def test_a_pattern_that_binds_no_complete_group_is_a_problem(group: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        bind_lists([group], RESNET)
    (problem,) = caught.value.problems
    assert problem.where == "groups[0]"


def test_an_incomplete_binding_names_what_is_missing() -> None:
    with pytest.raises(
        UsageError, match=r"no complete group: no module is named 'layer1.1.bn2'; did you mean 'layer1.1.bn1'"
    ):
        bind_lists([["layer*.*.conv2", "layer*.*.bn2"]], RESNET)


def test_each_complete_binding_is_a_group_in_the_order_of_the_model() -> None:
    bound = bind_lists([["layer*.*.conv1", "layer*.*.bn1"]], RESNET)
    assert [group.modules for group in bound] == [
        ("layer2.0.conv1", "layer2.0.bn1"),
        ("layer1.0.conv1", "layer1.0.bn1"),
        ("layer1.1.conv1", "layer1.1.bn1"),
    ]
    assert {group.where for group in bound} == {"groups[0]"}


def test_the_order_is_that_of_the_names_where_blocks_interleave() -> None:
    names = [f"{branch}.{depth}.{leaf}" for depth in (0, 1) for branch in "ba" for leaf in ("conv", "bn")]
    bound = bind_lists([["*.*.conv", "*.*.bn"]], names)
    assert [group.modules[0] for group in bound] == ["b.0.conv", "a.0.conv", "b.1.conv", "a.1.conv"]


def test_an_incomplete_binding_beside_complete_ones_is_passed_over() -> None:
    names = [name for name in RESNET if name != "layer1.0.bn1"]
    bound = bind_lists([["layer*.*.conv1", "layer*.*.bn1"]], names)
    assert [group.modules[0] for group in bound] == ["layer2.0.conv1", "layer1.1.conv1"]


def test_the_same_star_means_the_same_text() -> None:
    names = ["a.1.conv", "a.2.conv", "b.2.conv", "a.2.bn", "b.1.bn"]
    bound = bind_lists([["*.*.conv", "*.*.bn"]], names)
    assert [group.modules for group in bound] == [("a.2.conv", "a.2.bn")]


def test_a_literal_and_a_pattern_do_not_make_a_group() -> None:
    with pytest.raises(UsageError, match=r"different numbers of '\*'"):
        bind_lists([["stem.conv", "*.bn"]], RESNET)


def test_a_pattern_of_which_nothing_is_left_is_a_problem() -> None:
    spec = spec_from_mapping({"groups": [["head.*1", "head.b*1"], ["*.conv1", "*.bn1"]], "exclude": ["head"]})
    with pytest.raises(
        UsageError, match=r"groups\[1\]: .* matches only what exclude leaves out \(1 groups\)"
    ):
        bind_groups(spec, RESNET)


@pytest.mark.parametrize("exclude", ["head", "head.*", "h*", "*.0.bn1"])
def test_exclude_covers_a_module_and_what_is_inside_it(exclude: str) -> None:
    names = [*RESNET, "tail.1.conv1", "tail.1.bn1"]
    groups = [["*.*.conv1", "*.*.bn1"], ["stem.conv", "stem.bn"]]
    bound = bind_groups(spec_from_mapping({"groups": groups, "exclude": [exclude]}), names)
    left = {group.modules[0] for group in bound}
    assert "head.0.conv1" not in left
    assert {"layer1.1.conv1", "tail.1.conv1", "stem.conv"} <= left
    assert ("layer1.0.conv1" in left) == (exclude != "*.0.bn1")


def test_exclude_leaves_a_group_that_is_named_in_full() -> None:
    spec = spec_from_mapping({"groups": [["head.conv1", "head.bn1"]], "exclude": ["head"]})
    assert len(bind_groups(spec, RESNET)) == 1


def test_an_exclude_that_may_name_modules_without_tensors_is_not_judged() -> None:
    spec = spec_from_mapping({"groups": [["stem.conv", "stem.bn"]], "exclude": ["relu*"]})
    assert len(bind_groups(spec, RESNET, optional_from=2)) == 1
    with pytest.raises(UsageError, match=r"spec.exclude\[0\]: exclude 'relu\*' matches no module"):
        bind_groups(spec, RESNET)


def test_the_root_module_is_no_name() -> None:
    assert "" not in NameTree(["", "conv"])
    assert bind_lists([["*1", "b*"]], ["", "x1", "bx"])[0].modules == ("x1", "bx")
