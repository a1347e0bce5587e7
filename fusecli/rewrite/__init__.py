"""What a rule answers: new tensors and structural edits; applied to a tree, written down, replayed."""

from fusecli.rewrite.apply import apply_edits, apply_rewrite
from fusecli.rewrite.edits import (
    Bias,
    Bordered,
    Clone,
    Container,
    Edit,
    Identity,
    Opaque,
    Own,
    Passed,
    Plain,
    Remainder,
    Resize,
    Rewrite,
    Zero,
)
from fusecli.rewrite.keys import KeyMap
from fusecli.rewrite.manifest import (
    MANIFEST_KEY,
    GroupRecord,
    Manifest,
    QuantizerRecord,
    TrainedRecord,
)
from fusecli.rewrite.tree import ModuleTree, stand_in_model

__all__ = [
    "MANIFEST_KEY",
    "Bias",
    "Bordered",
    "Clone",
    "Container",
    "Edit",
    "GroupRecord",
    "Identity",
    "KeyMap",
    "Manifest",
    "ModuleTree",
    "Opaque",
    "Own",
    "Passed",
    "Plain",
    "QuantizerRecord",
    "Remainder",
    "Resize",
    "Rewrite",
    "TrainedRecord",
    "Zero",
    "apply_edits",
    "apply_rewrite",
    "stand_in_model",
]
