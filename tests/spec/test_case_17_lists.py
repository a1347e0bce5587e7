"""Case 17: duplicate, overlapping and empty groups, unknown names: all at once, with lines and near names."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fusecli.errors import UsageError
from fusecli.spec import Spec, spec_from_mapping
from fusecli.spec.wildcards import bind_groups, bind_lists

Read = Callable[[str | bytes], Spec]
Wrong = Callable[[str | bytes], list[str]]

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2) for block in (0, 1)]
NAMES = [
    "conv1",
    "bn1",
    "relu",
    *(f"{block}.{leaf}" for block in BLOCKS for leaf in ("conv1", "bn1", "conv2", "bn2")),
]


def unbound(spec: Spec, names: list[str] = NAMES, optional_from: int | None = None) -> list[str]:
    """The problems that binding finds, as the user sees them."""
    with pytest.raises(UsageError) as caught:
        bind_groups(spec, names, optional_from=optional_from)
    return [str(problem) for problem in caught.value.problems]


def test_everything_wrong_with_the_lists_at_once(read: Read) -> None:
    spec = read("""\
groups:
  - [conv1, bn1]
  - [conv1, bn1]
  - [layer1.0.conv1, bn1]
  - [layer1.0.conv2, layer1.0.bn2, layer1.0.bn2]
  - [layer1.1.convv1, layer1.1.bn1]
  - [layer2.0.conv1, "layer*.0.bn1"]
  - ["layr*.1.conv2", "layr*.1.bn2"]
exclude: [heads]
""")
    assert unbound(spec) == [
        "fuse.yaml:3:5: this group is listed already at fuse.yaml:2:5; remove one",
        "fuse.yaml:4:5: 'bn1' is in another group already, at fuse.yaml:2:5;"
        " a module is fused once; a pattern leaves out what exclude names",
        "fuse.yaml:5:36: 'layer1.0.bn2' stands twice in this group; remove one",
        "fuse.yaml:6:6: no module is named 'layer1.1.convv1'; did you mean 'layer1.1.conv1'?",
        "fuse.yaml:7:5: the names of this group have different numbers of '*';"
        " the n-th * stands for the same text in each name, so each name has as many",
        "fuse.yaml:8:5: no module matches 'layr*.1.conv2'; did you mean 'layer1.1.conv2'?",
        "fuse.yaml:9:11: exclude 'heads' matches no module",
    ]


def test_an_unknown_name_in_the_last_of_50_groups(read: Read) -> None:
    names = [f"features.{i}" for i in range(100)]
    groups = [f"  - [features.{i}, features.{i + 1}]" for i in range(0, 100, 2)]
    groups[-1] = "  - [features.98, feature.99]"
    spec = read("groups:\n" + "\n".join(groups))
    assert unbound(spec, names) == [
        "fuse.yaml:51:19: no module is named 'feature.99'; did you mean 'features.99'?"
    ]


def test_an_empty_group_and_a_group_of_one_need_no_model(wrong: Wrong) -> None:
    assert wrong("groups:\n  - [conv1, bn1]\n  - []\n  - [conv1]\n  - {modules: []}\n  - ['*.a']\n") == [
        "fuse.yaml:3:5: this group is empty; list the names to fuse: [conv1, bn1], or remove it",
        "fuse.yaml:4:5: a group needs at least two names; list what is fused into what: [conv1, bn1]",
        "fuse.yaml:5:6: this group is empty; list the names to fuse: [conv1, bn1], or remove it",
        "fuse.yaml:6:5: a group needs at least two names; list what is fused into what: [conv1, bn1]",
    ]


@pytest.mark.parametrize("text", ["groups: [conv1]", "groups:\n  - conv1\n  - [bn1, relu]"])
def test_a_bare_name_is_no_group(wrong: Wrong, text: str) -> None:
    (problem,) = wrong(text)
    assert "needs at least two names" in problem or "a group is a list of names, found 'conv1'" in problem


def test_the_same_names_with_another_eps_are_still_a_duplicate(read: Read) -> None:
    spec = read("groups:\n- [conv1, bn1]\n- {modules: [conv1, bn1], eps: 1}\n")
    assert unbound(spec) == ["fuse.yaml:3:3: this group is listed already at fuse.yaml:2:3; remove one"]


def test_a_pattern_that_reaches_into_a_listed_group_overlaps(read: Read) -> None:
    groups = 'groups:\n- [layer1.0.conv1, layer1.0.bn1]\n- ["layer*.*.conv1", "layer*.*.bn1"]\n'
    (problem,) = unbound(read(groups))
    assert problem.startswith("fuse.yaml:3:3: 'layer1.0.conv1' is in another group already, at fuse.yaml:2:3")
    bound = bind_groups(read(groups + "exclude: [layer1.0]\n"), NAMES)
    assert [group.modules[0] for group in bound] == [
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer2.0.conv1",
        "layer2.1.conv1",
    ]


def test_two_bindings_of_one_pattern_can_overlap_too() -> None:
    spec = spec_from_mapping({"groups": [["x*y*", "z*_*"]]})
    names = ["x1y2_3", "x1_2y3", "z1_2_3"]
    assert unbound(spec, names)[0].startswith("spec.groups[0]: 'z1_2_3' is in another group already")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("layer1.0.cnov1", "layer1.0.conv1"),
        ("layr1.0.conv1", "layer1.0.conv1"),
        ("module.conv1", "conv1"),
        ("model.layer1.0.conv1", "layer1.0.conv1"),
        ("1.bn2", "layer1.1.bn2"),
        ("layer1.conv1", "layer1.0.conv1"),
        ("Conv1", "conv1"),
    ],
)
def test_the_nearest_name_is_the_one_that_was_meant(name: str, nearest: str) -> None:
    (problem,) = unbound(spec_from_mapping({"groups": [[name, "relu"]]}))
    assert problem == f"spec.groups[0][0]: no module is named '{name}'; did you mean '{nearest}'?"


def test_near_names_are_sought_for_the_first_twenty() -> None:
    problems = unbound(spec_from_mapping({"groups": [[f"conv1{i:02}" for i in range(30)]]}))
    assert ["did you mean 'conv1'?" in problem for problem in problems] == [True] * 20 + [False] * 10


@pytest.mark.parametrize("names", [[], [""], ["entirely.different"]])
def test_without_a_near_name_none_is_made_up(names: list[str]) -> None:
    problems = unbound(spec_from_mapping({"groups": [["xy", "zw"]]}), names)
    assert problems == [
        "spec.groups[0][0]: no module is named 'xy'",
        "spec.groups[0][1]: no module is named 'zw'",
    ]


def test_names_are_shown_escaped() -> None:
    (problem,) = unbound(spec_from_mapping({"groups": [["conv\x1b[31m", "bn1"]]}), ["conv\x1b[32m", "bn1"])
    assert problem == r"spec.groups[0][0]: no module is named 'conv\x1b[31m'; did you mean 'conv\x1b[32m'?"


def test_members_without_tensors_may_be_missing_where_no_model_is_at_hand() -> None:
    spec = spec_from_mapping(
        {"groups": [["conv1", "bn1", "act"], ["layer*.*.conv1", "layer*.*.bn1", "layer*.*.act"]]}
    )
    bound = bind_groups(spec, NAMES, optional_from=2)
    assert bound[0].modules == ("conv1", "bn1", "act")
    assert bound[-1].modules == ("layer2.1.conv1", "layer2.1.bn1", "layer2.1.act")
    assert len(bound) == 5
    assert len(unbound(spec)) == 2


def test_the_first_two_may_not_be_missing() -> None:
    spec = spec_from_mapping({"groups": [["conv1", "bn", "act"]]})
    assert unbound(spec, optional_from=2) == [
        "spec.groups[0][1]: no module is named 'bn'; did you mean 'bn1'?"
    ]


@pytest.mark.parametrize(
    "groups", [["conv1", "bn1"], ("conv1", "bn1"), [["conv1", "bn1"]], [("conv1", "bn1")]]
)
def test_a_single_list_is_one_group_as_in_torch_ao(groups: list[object]) -> None:
    (bound,) = bind_lists(groups, NAMES)
    assert bound.modules == ("conv1", "bn1")


def test_a_single_list_in_a_file(read: Read) -> None:
    (bound,) = bind_groups(read("groups: [conv1, bn1, 1.10]"), [*NAMES, "1.10"])
    assert (bound.modules, bound.where) == (("conv1", "bn1", "1.10"), "fuse.yaml:1:1")


def test_plain_lists_are_checked_like_a_file() -> None:
    with pytest.raises(UsageError) as caught:
        bind_lists([["conv1", "bn1"], ["conv1", "bn1"], ["layer1.0.conv1", "layer1.0.bn"]], NAMES)
    assert [str(problem) for problem in caught.value.problems] == [
        "groups[1]: this group is listed already at groups[0]; remove one",
        "groups[2][1]: no module is named 'layer1.0.bn'; did you mean 'layer1.0.bn1'?",
    ]
    with pytest.raises(UsageError) as caught:
        bind_lists([[], ["conv1", 3], {"modules": ["a"]}, {"a", "b"}], NAMES)
    assert [problem.where for problem in caught.value.problems] == [
        "groups[0]",
        "groups[1][1]",
        "groups[2].modules",
        "groups[3]",
    ]


def test_no_groups_are_no_problem() -> None:
    assert bind_lists([], NAMES) == []
    assert bind_groups(Spec(), []) == []


def many(per: int) -> list[str]:
    return [
        f"layer{i // per}.{i % per}.{name}"
        for i in range(10_000)
        for name in ("conv1", "bn1", "conv2", "bn2")
    ]


@pytest.mark.parametrize("per", [100, 10_000])
def test_10_000_groups_over_40_000_names_take_about_a_second(per: int) -> None:
    names = many(per)
    groups = [[f"layer{i // per}.{i % per}.conv1", f"layer{i // per}.{i % per}.bn1"] for i in range(10_000)]
    patterns = [
        [f"layer{i // per}.{i % per}.con*1", f"layer{i // per}.{i % per}.bn1*"] for i in range(10_000)
    ]
    # Every name of the first half is wrong, and each is one letter from a right one.
    slips = [[name + "x" for name in group] for group in groups[:5_000]] + groups[5_000:]
    specs = [spec_from_mapping({"groups": lists}) for lists in (groups, patterns, slips)]
    began = time.perf_counter()
    assert len(bind_groups(specs[0], names)) == 10_000
    assert len(unbound(specs[1], names)) == 1001
    assert unbound(specs[2], names)[-1] == "the groups after these are not checked; correct these first"
    assert len(bind_lists(["*.*.conv1", "*.*.bn1"], names)) == 10_000
    # Four bindings, each far below a second alone; the margin is for a machine that is busy.
    assert time.perf_counter() - began < 10
