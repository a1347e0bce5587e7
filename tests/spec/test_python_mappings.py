"""Dicts from Python are read as strictly as files, with places that Python can follow."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from fusecli.errors import UsageError
from fusecli.spec import GroupSpec, Spec, Verify, spec_from_mapping


def test_all_problems_at_once_with_places() -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_mapping(
            {
                "vrify": {},
                "groups": [["a", 1.1], ["b"], {"modules": ["a", "b"], "eps": "1e-5"}],
                "inputs": [{"shape": [True]}, [{"shape": "1"}]],
                "qat": 0,
                "assume": {"eps": float("nan")},
                "model": {"factory": "a:b", "kwargs": {"x": {1: 2}}},
            }
        )
    assert sorted(str(problem).split(";")[0] for problem in caught.value.problems) == [
        "spec.assume.eps: a finite number is expected, found float nan",
        "spec.groups[0][1]: a name is expected, found float 1.1",
        "spec.groups[1]: a group needs at least two names",
        "spec.groups[2].eps: a number is expected, found '1e-5'",
        "spec.inputs[0].shape[0]: a whole number is expected, found bool True",
        "spec.inputs[1][0].shape: a list is expected, found '1'",
        "spec.model.kwargs.x: a key must be text, found '1'",
        "spec.qat: true or false is expected, found int 0",
        "spec.vrify: key 'vrify' is unknown",
    ]


@pytest.mark.parametrize("value", [None, [], "groups", 3])
def test_a_spec_is_a_mapping(value: object) -> None:
    with pytest.raises(UsageError, match=r"^options: a mapping is expected"):
        spec_from_mapping(value, where="options")  # type: ignore[arg-type]


def test_a_dict_that_holds_itself_is_refused() -> None:
    loop: dict[str, object] = {}
    loop["kwargs"] = loop
    with pytest.raises(UsageError, match="nested deeper than 20 levels"):
        spec_from_mapping({"model": {"factory": "a:b", "kwargs": loop}})


def test_text_from_python_is_never_read_as_yaml() -> None:
    spec = spec_from_mapping({"model": {"factory": "a:b", "kwargs": {"x": "yes", "y": "1e-5", "z": "null"}}})
    assert spec.model is not None
    assert spec.model.kwargs == {"x": "yes", "y": "1e-5", "z": "null"}


def test_values_reach_the_factory_as_they_are() -> None:
    thing = object()
    spec = spec_from_mapping(
        {"model": {"factory": "a:b", "kwargs": {"size": (1, 2), "thing": thing, "l": [1]}}}
    )
    assert spec.model is not None
    assert spec.model.kwargs == {"size": (1, 2), "thing": thing, "l": [1]}


def test_mappings_and_parts_are_as_good_as_dicts() -> None:
    group = GroupSpec(modules=("a", "b"))
    spec = spec_from_mapping(MappingProxyType({"groups": [group], "verify": Verify(seed=3)}))
    assert (spec.groups, spec.verify.seed) == ((group,), 3)
    assert (spec.source, spec.sha256) == (None, None)


def test_where_speaks_python() -> None:
    spec = spec_from_mapping({"groups": [["a", "b"]]}, where="options")
    assert spec.where(("groups", 0, "modules", 1)) == "options.groups[0][1]"
    assert Spec().where(("groups", 3)) == "spec.groups[3]"
