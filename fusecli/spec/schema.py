"""The JSON schema of a spec file, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from fusecli.spec.model import VERSIONS, Spec

_PAIR = {"type": "array", "minItems": 2}
_TWO_OR_MORE = {
    "anyOf": [
        {
            "type": "array",
            "items": {"anyOf": [_PAIR, {"type": "object", "properties": {"modules": _PAIR}}]},
        },
        {"type": "array", "items": {"type": ["string", "number", "boolean", "null"]}, "minItems": 2},
    ]
}
# A layer that is baked or adapted, or a module that does nothing, may stand alone.
_ALONE = [
    *(
        {"type": "object", "required": [key], "properties": {key: {"const": True}}}
        for key in ("bake", "remove_idle")
    ),
    {"type": "object", "required": ["adapter"], "properties": {"adapter": {"type": "object"}}},
]


def json_schema() -> dict[str, Any]:
    """The schema of what people write: a group may be a bare list, a single group need not be nested."""
    schema = Spec.model_json_schema(by_alias=True)
    keys, parts = schema["properties"], schema["$defs"]
    names = _group_forms(parts)
    keys["groups"] = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Group"}}, names]}
    keys["version"] = {"enum": list(VERSIONS), "default": VERSIONS[-1]}
    schema["anyOf"] = [*_ALONE, {"type": "object", "properties": {"groups": _TWO_OR_MORE}}]
    parts["FreeValue"] = {}
    parts["InputSpec"]["oneOf"] = [{"required": ["shape"]}, {"required": ["file", "key"]}]
    # {shape: []} is a tensor; to a schema it could be a dict with an empty tuple, too.
    parts["InputEntry"]["anyOf"] = parts["InputEntry"].pop("oneOf")
    for form in parts["InputEntry"]["anyOf"]:
        if form.get("type") == "object":
            form["minProperties"] = 1
    parts["ExtraMapping"]["oneOf"] = [{"required": ["sequence", "fuser"]}, {"required": ["treat", "as"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fusecli spec"}


def _group_forms(parts: dict[str, Any]) -> dict[str, Any]:
    """Splits the model's GroupSpec into its two spellings; answers the bare list of names."""
    mapping = parts["GroupMapping"] = parts.pop("GroupSpec")
    names = mapping["properties"]["modules"]
    names["minItems"] = 1
    stride = mapping["properties"]["stride"]["anyOf"]
    stride.insert(0, stride[0]["items"])
    parts["Group"] = {"anyOf": [names, {"$ref": "#/$defs/GroupMapping"}]}
    return dict(names)
