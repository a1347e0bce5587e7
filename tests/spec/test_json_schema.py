"""The schema that editors check a spec with describes what people write."""

from __future__ import annotations

import json
from typing import Any

from fusecli.spec.schema import json_schema

SCHEMA = json_schema()


def accepts(schema: dict[str, Any], value: object) -> bool:
    """The few words of JSON schema that this one uses."""
    if "$ref" in schema:
        return accepts(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value)
    forms = [accepts(form, value) for form in schema.get("anyOf", [])]
    alternatives = [accepts(form, value) for form in schema.get("oneOf", [])]
    return (
        (not forms or any(forms))
        and (not alternatives or sum(alternatives) == 1)
        and ("const" not in schema or value == schema["const"])
        and ("enum" not in schema or value in schema["enum"])
        and _typed(schema, value)
        and _filled(schema, value)
    )


def _typed(schema: dict[str, Any], value: object) -> bool:
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
    }
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    return not wanted or any(isinstance(value, types.get(name, (int, float))) for name in wanted)


def _filled(schema: dict[str, Any], value: object) -> bool:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        filled = len(value) >= schema.get("minProperties", 0)
        return (
            filled
            and all(key in value for key in schema.get("required", []))
            and all(
                accepts(known.get(key, others), item)
                if key in known or others not in (True, False)
                else others
                for key, item in value.items()
            )
        )
    if isinstance(value, list):
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(accepts(items, item) for item in value)
    if isinstance(value, (int, float)) and "minimum" in schema and value < schema["minimum"]:
        return False
    return not (isinstance(value, (int, float)) and value <= schema.get("exclusiveMinimum", float("-inf")))


def test_what_people_write_is_valid() -> None:
    for document in (
        {},
        {"groups": ["conv1", "bn1"]},
        {"groups": [["conv1", "bn1"], {"modules": ["a", "b"], "eps": 1e-3, "stride": 2}]},
        {"groups": [[1.1, None], {"modules": [0, 1], "stride": [2, 1], "kind": "linear"}]},
        {"inputs": [{"shape": [1], "dynamic": [0]}, {"file": "a", "key": "b", "dynamic": []}]},
        {"inputs": [{"shape": [1]}, [{"file": "a", "key": "b"}, [{"shape": []}]]]},
        {"inputs": [{"image": {"shape": [1]}, "file": {"file": "a", "key": "b"}}]},
        {"inputs": [{"a": [{"shape": [1]}, {"b": {"shape": []}}]}]},
        {"model": {"factory": "a:b", "kwargs": {"x": [1, {"y": None}]}}},
        {"extra_mappings": [{"treat": "a.B", "as": "c.D"}, {"sequence": ["a.B", "c.D"], "fuser": "e:f"}]},
        {"discover": True, "bake": True, "groups": [["conv1"], ["a", "b"]]},
        {"groups": ["conv1"], "adapter": {"file": "a.safetensors", "scale": -2}},
        {"adapter": {"file": "a.safetensors", "alpha": 16}},
        {"version": 1, "qat": False, "discover": False, "exclude": ["head.*"], "verify": {"samples": 1}},
    ):
        assert accepts(SCHEMA, document), document


def test_what_fusecli_refuses_is_invalid() -> None:
    for document in (
        {"grops": []},
        {"version": 2},
        {"qat": "on"},
        {"quantize": {"observer": "mean"}},
        {"groups": "conv1"},
        {"groups": ["conv1"]},
        {"groups": ["conv1"], "bake": False},
        {"groups": [{"modules": ["conv1"]}]},
        {"adapter": {"scale": 2}},
        {"adapter": {"file": "a", "scale": "2"}},
        {"adapter": {"file": "a", "rank": 2}},
        {"groups": [["conv1"]]},
        {"groups": [{"modul": ["a", "b"]}]},
        {"groups": [{"modules": ["a", "b"], "eps": 0}]},
        {"groups": [{"modules": ["a", "b"], "kind": "conv"}]},
        {"inputs": [{"dtype": "int64"}]},
        {"inputs": [{"shape": [1], "dynamic": [-1]}]},
        {"inputs": [{"shape": [1], "dynamic": 0}]},
        {"inputs": [{"shape": [0]}]},
        {"inputs": [{}]},
        {"inputs": [{"image": {}}]},
        {"inputs": [{"image": {"shpe": [1]}}]},
        {"inputs": [{"image": {"shape": [1]}, "mask": 3}]},
        {"inputs": [{"image": [1, 2]}]},
        {"inputs": [{"shape": [1], "file": "a", "key": "b"}]},
        {"extra_mappings": [{"treat": "a.B", "as_": "c.D"}]},
        {"verify": {"samples": 0}},
        {"model": {"kwargs": {}}},
    ):
        assert not accepts(SCHEMA, document), document


def test_every_reference_leads_somewhere_and_the_schema_is_json() -> None:
    text = json.dumps(SCHEMA)
    assert all(f'"{name}":' in text for name in ("Group", "GroupMapping", "InputEntry"))
    targets = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert targets <= set(SCHEMA["$defs"])
