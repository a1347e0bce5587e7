"""YAML (or a dict) -> a frozen Spec; every error says file, line and the nearest valid word.

What only the work after a right spec needs is imported from its own file: `wildcards`, `schema`.
"""

from __future__ import annotations

from fusecli.spec.code import ExtraMapping, Model
from fusecli.spec.groups import GroupSpec
from fusecli.spec.inputs import InputEntry, InputSpec
from fusecli.spec.load import read_spec, spec_from_mapping
from fusecli.spec.model import Assume, Checkpoint, Output, Spec, Verify

__all__ = [
    "Assume",
    "Checkpoint",
    "ExtraMapping",
    "GroupSpec",
    "InputEntry",
    "InputSpec",
    "Model",
    "Output",
    "Spec",
    "Verify",
    "read_spec",
    "spec_from_mapping",
]
