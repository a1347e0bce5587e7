"""A file or a dict becomes a Spec, or an error that lists everything wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fusecli.errors import UsageError
from fusecli.spec import nodes
from fusecli.spec.adapter import Adapter
from fusecli.spec.code import ExtraMapping, Model
from fusecli.spec.groups import GroupSpec
from fusecli.spec.inputs import InputSpec
from fusecli.spec.model import Assume, Checkpoint, Origin, Output, Spec, Verify
from fusecli.spec.nodes import Finding, Node, Place
from fusecli.spec.quantize import Quantize, Threshold
from fusecli.spec.reader import DEEPEST, read_tree
from fusecli.spec.text import decode, read_bytes
from fusecli.spec.wording import escaped, shown, suggestion

# The mapping that stands below each key; its fields are the keys that may be meant.
_PARTS: dict[str, type[BaseModel]] = {
    "adapter": Adapter,
    "checkpoint": Checkpoint,
    "model": Model,
    "inputs": InputSpec,
    "groups": GroupSpec,
    "assume": Assume,
    "extra_mappings": ExtraMapping,
    "verify": Verify,
    "quantize": Quantize,
    "output": Output,
}
_BELOW_QUANTIZE: dict[object, type[BaseModel]] = {"threshold": Threshold, "calibrate": InputSpec}


def read_spec(path: str | Path) -> Spec:
    """The spec in the file at `path`.

    Raises UsageError with all problems at once, each with file, line and column as the user gave the file.
    """
    data = read_bytes(Path(path))
    label = escaped(str(path))
    root, findings = read_tree(decode(data, label), label)
    return _validated(root, findings, Origin(source=Path(path), sha256=hashlib.sha256(data).hexdigest()))


def spec_from_mapping(mapping: Mapping[str, Any], where: str = "spec", *, alone: bool = False) -> Spec:
    """The spec that a dict holds, read as strictly as a file; places look like `spec.groups[0]`.

    alone  a group may have one name, for a reason that the dict does not tell
    Raises UsageError with all problems at once.
    """
    findings: list[Finding] = []
    return _validated(_node(mapping, (), where, findings), findings, Origin(), alone=alone)


def _validated(root: Node, findings: list[Finding], origin: Origin, *, alone: bool = False) -> Spec:
    hidden = 0
    root = _one_group_is_a_list_of_groups(root)
    try:
        content = nodes.unwrap(root)
        spec = Spec.model_validate(content, context={"alone": alone or _may_stand_alone(content)})
    except ValidationError as error:
        details = error.errors(include_url=False)
        found = [_finding(detail, root) for detail in details[: nodes.MOST_PROBLEMS]]
        # What the reader has refused is not reported a second time for being no number either.
        known = {finding.place for finding in findings}
        findings = findings + [finding for place, finding in found if place not in known]
        hidden = len(details) - len(found)
    if findings:
        raise UsageError(*nodes.in_order(findings, hidden))
    spec._origin = Origin(origin.source, origin.sha256, root)
    return spec


def _may_stand_alone(content: object) -> bool:
    """Whether something is done to a module by itself, so that a group may have one name."""
    if not isinstance(content, dict):
        return False
    asked = (content.get("bake"), content.get("remove_idle"))
    if any(said in (True, "true", "True", "TRUE") for said in asked) or content.get("adapter"):
        return True
    mappings = content.get("extra_mappings")
    return isinstance(mappings, list | tuple) and any(map(_takes_one, mappings))


def _takes_one(mapping: object) -> bool:
    """Whether an extra mapping is a fuser for one class."""
    sequence = mapping.get("sequence") if isinstance(mapping, dict) else None
    return isinstance(sequence, list | tuple) and len(sequence) == 1


def _one_group_is_a_list_of_groups(root: Node) -> Node:
    """A flat list of names is one group, as in torch.ao."""
    groups = root.content.get("groups") if isinstance(root.content, dict) else None
    if groups is None or not isinstance(groups.content, (list, tuple)) or not groups.content:
        return root
    if not all(isinstance(item.content, str) for item in groups.content):
        return root
    wrapped = Node([groups], groups.place, groups.key_place)
    return Node({**root.content, "groups": wrapped}, root.place)


def _node(value: object, path: nodes.Path, label: str, findings: list[Finding]) -> Node:
    place = Place(0, 0, nodes.written(path, label))
    if len(path) > DEEPEST:
        findings.append(Finding(place, f"this is nested deeper than {DEEPEST} levels"))
        return Node(None, place)
    if isinstance(value, (list, tuple)):
        items = [_node(item, (*path, i), label, findings) for i, item in enumerate(value)]
        # A tuple among the kwargs reaches the factory as a tuple.
        return Node(tuple(items) if isinstance(value, tuple) else items, place)
    if not isinstance(value, Mapping):
        return Node(value, place)
    entries: dict[str, Node] = {}
    for key, item in value.items():
        if isinstance(key, str):
            child = _node(item, (*path, key), label, findings)
            entries[key] = Node(child.content, child.place, child.place)
        else:
            findings.append(Finding(place, f"a key must be text, found {shown(repr(key))}"))
    return Node(entries, place)


def _owner(path: nodes.Path) -> type[BaseModel]:
    """The mapping that the last of these keys stands in."""
    if len(path) < 2:
        return Spec
    if path[0] == "quantize" and len(path) > 2:
        return _BELOW_QUANTIZE[path[1]]
    return _PARTS[str(path[0])]


def _finding(details: Any, root: Node) -> tuple[Place, Finding]:
    """The place of the value that pydantic complains about, and the complaint in our words."""
    loc, kind = details["loc"], details["type"]
    node = nodes.find(root, loc)
    at_key = node.key_place or node.place
    if kind == "spec":
        return node.place, Finding(node.headed, details["ctx"]["what"], details["ctx"]["fix"])
    if kind == "extra_forbidden":
        owner = _owner(loc)
        keys = [field.alias or name for name, field in owner.model_fields.items()]
        return node.place, Finding(at_key, f"key {shown(loc[-1])} is unknown", suggestion(loc[-1], keys))
    if kind == "missing":
        return node.place, Finding(at_key, f"key {shown(loc[-1])} is missing")
    if kind == "model_type":
        return node.place, Finding(node.headed, "a mapping is expected", "write it as key: value")
    return node.place, Finding(node.headed, details["msg"])
