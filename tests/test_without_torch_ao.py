"""Nothing but the adapter needs torch.ao, which torch will remove."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Files fused, verified and loaded by the command line and the API; the containers; a few rules.
CORE = (
    "tests/nn",
    "tests/cli/test_cases.py",
    "tests/engine/test_modes.py",
    "tests/rewrite/test_manifest.py",
    "tests/rules/test_bn_conv.py",
    "tests/rules/test_conv_bn.py",
    "tests/rules/test_conv_bn_relu.py",
    "tests/rules/test_guide.py",
    "tests/rules/test_linear_bn.py",
)
IMPORT_ALL = """
import importlib, pkgutil
import tests.without_torch_ao
import fusecli
for module in pkgutil.walk_packages(fusecli.__path__, "fusecli."):
    importlib.import_module(module.name)
    print(module.name)
"""
ADAPT = """
import tests.without_torch_ao
from torch import nn
from fusecli.errors import UsageError
from fusecli.interop.torch_ao import to_torch_ao
try:
    to_torch_ao(nn.Identity())
except UsageError as mistake:
    print(mistake)
"""


def python(*words: str) -> str:
    """What a new interpreter prints, which has to end well."""
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def test_torch_ao_is_gone() -> None:
    attempt = "import tests.without_torch_ao, torch\nprint(hasattr(torch, 'ao'))\nimport {}"
    for name in ("torch.ao", "torch.ao.nn.intrinsic", "torch.quantization"):
        ended = subprocess.run(
            [sys.executable, "-c", attempt.format(name)], cwd=ROOT, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (1, "False\n")
        assert "ModuleNotFoundError: No module named 'torch." in ended.stderr


def test_every_file_can_be_imported() -> None:
    imported = set(python("-c", IMPORT_ALL).split())
    assert {"fusecli.api", "fusecli.rules.conv_bn", "fusecli.interop.torch_ao"} <= imported


def test_the_adapter_says_what_is_missing() -> None:
    assert "to_torch_ao: this torch has no torch.ao.nn.intrinsic (No module named 'torch.ao')" in python(
        "-c", ADAPT
    )


@pytest.mark.slow
def test_the_core_of_the_suite_passes() -> None:
    words = ("-p", "tests.without_torch_ao", "-p", "no:cacheprovider", "-q", "-m", "not slow")
    printed = python("-m", "pytest", *words, *CORE)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", printed)}
    assert counts["passed"] > 250
    assert 0 < counts["skipped"] < 60  # what compares with torch.ao
