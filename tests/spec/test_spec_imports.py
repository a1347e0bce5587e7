"""A mistake in a spec is reported before torch is imported: it takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from fusecli.errors import UsageError
from fusecli.spec import read_spec
from fusecli.spec.schema import json_schema
from fusecli.spec.wildcards import bind_lists
try:
    read_spec(sys.argv[1])
except UsageError as error:
    print(error)
json_schema()
bind_lists(["conv*", "bn*"], ["conv1", "bn1"])
heavy = {"torch", "numpy", "safetensors", "typer", "rich"} & set(sys.modules)
print("imported:", sorted(heavy))
own = {name for name in sys.modules if name.startswith("fusecli.")}
print("fusecli:", sorted(name for name in own if not name.startswith("fusecli.spec")))
"""


@pytest.mark.parametrize(
    "text", ["groups: [[conv1]]\n", "groups: [*x]\n", "extra_mappings: [{treat: torch.nn.X, as: a}]\n"]
)
def test_a_bad_spec_never_imports_torch(tmp_path: Path, text: str) -> None:
    spec = tmp_path / "fuse.yaml"
    spec.write_text(text)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(spec)], capture_output=True, text=True, check=True
    )
    problem, imported, own = run.stdout.splitlines()
    assert problem.startswith(f"{spec}:1:")
    assert imported == "imported: []"
    assert own == "fusecli: ['fusecli.errors', 'fusecli.outcome', 'fusecli.reasons']"
