"""The JSON schema of a spec file, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from fusecli.spec.model import VERSIONS, Spec

# An editor reads an unquoted 1.10 or null as YAML does; as a name it is good all the same.
_NAME = {"type": ["string", "number", "boolean", "null"]}


def json_schema() -> dict[str, Any]:
    """The schema of what people write: a group may be a bare list, a single group need not be nested."""
    schema = Spec.model_json_schema(by_alias=True)
    parts = schema["$defs"]
    names = {"type": "array", "items": _NAME, "minItems": 2}
    parts["GroupSpec"]["properties"]["modules"] = names
    parts["GroupMapping"] = parts.pop("GroupSpec")
    parts["Group"] = {"anyOf": [names, {"$ref": "#/$defs/GroupMapping"}]}
    _tighten(parts)
    keys = schema["properties"]
    keys["groups"] = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Group"}}, names]}
    keys["version"] = {"enum": list(VERSIONS), "default": VERSIONS[-1]}
    keys["exclude"] = {"type": "array", "items": _NAME}
    for later in ("qat", "discover"):
        keys[later] = {"const": False, "default": False}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fusecli spec"}
