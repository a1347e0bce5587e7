from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from fusecli.errors import UnsafeError
from fusecli.outcome import Evidence
from fusecli.rewrite import (
    Bias,
    Container,
    GroupRecord,
    Identity,
    Manifest,
    ModuleTree,
    Opaque,
    Remainder,
    apply_edits,
)
from tests import nets

MANIFEST = Manifest(
    mode="folded",
    groups=(
        GroupRecord(
            ("conv", "drop", "bn", "relu"), "conv_bn_relu", Evidence.OBSERVED, ("drop",), {"eps": 1e-3}
        ),
    ),
    edits=(
        Bias("conv"),
        Identity("bn", "conv", last=False),
        Container("conv", "ConvReLU2d", ("conv", "relu")),
        Remainder("norm", "conv", ("drop", "act")),
        Opaque("x", ("x", "y"), "pkg:fuser"),
    ),
    input_sha256="ab" * 32,
    spec_sha256="cd" * 32,
    versions={"fusecli": "0.1.0", "torch": "2.13"},
    ties=(("a.weight", "b.weight"),),
    key="state_dict",
    strip_prefix=("module.",),
)


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(MANIFEST.to_json()), **values})


def edit(**values: Any) -> str:
    return changed(edits=[values])


GROUP = json.loads(MANIFEST.to_json())["groups"][0]
DAMAGED = {
    "empty": "",
    "half": MANIFEST.to_json()[:-9],
    "null": "null",
    "a list": "[]",
    "a number": "7",
    "deep": "[" * 100_000,
    "huge number": f'{{"version": {"9" * 5000}}}',
    "nothing in it": "{}",
    "no edits": json.dumps({k: v for k, v in json.loads(MANIFEST.to_json()).items() if k != "edits"}),
    "another version": changed(version=2),
    "no version": changed(version=None),
    "edits that are text": changed(edits="conv"),
    "an unknown edit": edit(edit="exec", path="conv"),
    "an edit that is a list": edit(edit=["bias"], path="conv"),
    "an edit without its name": edit(path="conv"),
    "an edit without a path": edit(edit="bias"),
    "a path that is a number": edit(edit="bias", path=3),
    "a path that is a list": edit(edit="bias", path=["conv"]),
    "the model itself": edit(edit="identity", path="", into="conv"),
    "into the model itself": edit(edit="identity", path="bn", into=""),
    "one field too many": edit(edit="bias", path="conv", code="import os"),
    "no members": edit(edit="container", path="conv", cls="ConvReLU2d", members=[]),
    "members that are text": edit(edit="container", path="conv", cls="ConvReLU2d", members="conv"),
    "members of numbers": edit(edit="container", path="conv", cls="ConvReLU2d", members=[1, 2]),
    "a nameless member": edit(edit="remainder", path="bn", into="conv", members=["act", ""]),
    "another class": edit(edit="container", path="conv", cls="os.system", members=["conv", "relu"]),
    "a class that is a list": edit(
        edit="container", path="conv", cls=["ConvReLU2d"], members=["conv", "relu"]
    ),
    "last that is text": edit(edit="identity", path="bn", into="conv", last="yes"),
    "a group without members": changed(groups=[{**GROUP, "modules": []}]),
    "unknown evidence": changed(groups=[{**GROUP, "evidence": "rumour"}]),
    "hints that are numbers": changed(groups=[{**GROUP, "hints": 5}]),
    "versions that are a list": changed(versions=["2.13"]),
    "ties of numbers": changed(ties=[[1, 2]]),
    "a prefix that is text": changed(strip_prefix="module."),
    "a version that is true": changed(version=True),
    "a version that is a float": changed(version=1.0),
    "groups that are a mapping": changed(groups={}),
    "edits that are a mapping": changed(edits={}),
    "a rule that is a list": changed(groups=[{**GROUP, "rule": ["conv_bn"]}]),
    "a rule without a name": changed(groups=[{**GROUP, "rule": ""}]),
    "a key that is a number": changed(key=3),
    "a version of torch that is a number": changed(versions={"torch": 2.13}),
    "a version of nothing": changed(versions={"": "2.13"}),
    "a tie of one name": changed(ties=[["a.weight"]]),
    "a tie of a name with itself": changed(ties=[["a.weight", "a.weight"]]),
    **{
        f"{field}: {what}": changed(**{field: value})
        for field in ("input_sha256", "spec_sha256", "adapter_sha256")
        for what, value in {
            "text": "nonsense",
            "63 digits": "a" * 63,
            "65 digits": "a" * 65,
            "a line more": "a" * 64 + "\n",
            "no digits": "g" * 64,
            "capitals": "A" * 64,
            "a number": 5,
            "none": None,
            "a list": ["a" * 64],
            "false": False,
        }.items()
    },
    "no digest of the input": changed(input_sha256=""),
    "no digest of the spec": changed(spec_sha256=""),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_and_hostile_manifests(what: str) -> None:
    with pytest.raises(UnsafeError) as unsafe:
        Manifest.from_json(DAMAGED[what], "m.safetensors")
    (problem,) = unsafe.value.problems
    assert problem.where == "m.safetensors"
    assert "manifest" in problem.what
    assert len(problem.fix) < 300


def test_another_version_says_which() -> None:
    with pytest.raises(UnsafeError, match="has version 2, this fusecli reads 1"):
        Manifest.from_json(changed(version=2), "m.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [Bias("norm"), Bias("relu"), Identity("gone", "conv"), Container("bn", "ConvReLU2d", ("bn", "relu"))],
)
def test_edits_that_do_not_fit_the_model_raise_what_replay_catches(wrong: Any) -> None:
    net = nets.chain(
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU(), norm=nn.BatchNorm2d(6, affine=False)
    )
    with pytest.raises((KeyError, TypeError, AttributeError)):
        apply_edits(ModuleTree(net), [wrong])


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "") == MANIFEST


def test_the_same_work_gives_the_same_text() -> None:
    document = json.loads(MANIFEST.to_json())
    turned = json.dumps(dict(reversed(document.items())))
    assert Manifest.from_json(turned, "").to_json() == MANIFEST.to_json()
    assert MANIFEST.to_json() == json.dumps(document, sort_keys=True, separators=(",", ":"))


def test_the_result_of_a_fuser_is_not_written() -> None:
    opaque = Opaque("x", ("x", "y"), "pkg:fuser", nn.Linear(2, 2))
    text = replace(MANIFEST, edits=(opaque,)).to_json()
    assert "result" not in text
    assert Manifest.from_json(text, "").edits == (Opaque("x", ("x", "y"), "pkg:fuser"),)
