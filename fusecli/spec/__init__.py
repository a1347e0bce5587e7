"""YAML (or a dict) -> a frozen Spec; every error says file, line and the nearest valid word."""

from __future__ import annotations

from fusecli.spec.code import ExtraMapping, Model
from fusecli.spec.groups import GroupSpec
from fusecli.spec.inputs import InputEntry, InputSpec
from fusecli.spec.load import read_spec, spec_from_mapping
from fusecli.spec.model import Assume, Checkpoint, Output, Spec, Verify
from fusecli.spec.schema import json_schema
from fusecli.spec.wildcards import BoundGroup, bind_groups, bind_lists

__all__ = [
    "Assume",
    "BoundGroup",
    "Checkpoint",
    "ExtraMapping",
    "GroupSpec",
    "InputEntry",
    "InputSpec",
    "Model",
    "Output",
    "Spec",
    "Verify",
    "bind_groups",
    "bind_lists",
    "json_schema",
    "read_spec",
    "spec_from_mapping",
]
