"""What the README shows works as it stands: its commands, its Python and its spec."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import torch_ao_qat
from tests.nets import randomise

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIGITS = ROOT / "configs" / "digits"
SCRIPTS = {"bash scripts/demo", "bash scripts/test"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    line for block in blocks("console") for line in block.splitlines() if line and not line.startswith("#")
]
OURS = [line for line in COMMANDS if line.startswith("fusecli ")]


def test_every_command_is_known_to_these_tests():
    others = set(COMMANDS) - set(OURS)
    assert others - SCRIPTS == {"pip install .", "pip install '.[quantize]'"}
    assert others >= SCRIPTS
    assert {line.split()[1] for line in OURS} >= {"fuse", "verify", "plan", "quantize"}


@pytest.fixture
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: model.pt and fuse.yaml are those of the digits, whose code the project allows;
    trained_qat.pt is what torch.ao would have made of it."""
    for name in ("model.pt", "fuse.yaml", "net.py", "heldout.safetensors"):
        shutil.copy(DIGITS / name, tmp_path)
    shutil.copytree(
        ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("*.fused.*", "__pycache__")
    )
    allowed = '[tool.fusecli]\nallow-code = ["net.py", "configs/digits/net.py"]\n'
    (tmp_path / "pyproject.toml").write_text(allowed)
    torch.save({"model_state_dict": torch_ao_qat.prepared().state}, tmp_path / "trained_qat.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_in_their_order_and_the_python(cli, anywhere, monkeypatch):
    for line in OURS:
        ended = cli(*shlex.split(line)[1:])
        assert ended.code == 0, f"{line}\n{ended.err}"
    (source,) = (block for block in blocks("python") if "load_fused" in block and "qat" not in block)
    names: dict[str, object] = {}
    exec((anywhere / "net.py").read_text(), names)
    exec("import fusecli\n" + source, names)
    assert isinstance(names["model"], torch.nn.Module)
    assert not names["model"].training


def test_training_as_it_stands(cli, anywhere):
    """The command before it, the lines, and the way on: what they save folds and becomes int8."""
    (before,) = (line for line in OURS if "qat.yaml" in line)
    assert cli(*shlex.split(before)[1:]).code == 0
    (source,) = (block for block in blocks("python") if "prepare_qat" in block)
    images = load_file(DIGITS / "calibration.safetensors")["images"]
    names: dict[str, object] = {"train": lambda model: model(images).sum().backward()}
    exec((anywhere / "net.py").read_text(), names)
    exec("import fusecli\nimport torch\n" + source, names)
    fold, verify = (line for line in OURS if "trained_qat.pt" in line)
    assert cli(*shlex.split(fold)[1:]).code == 0
    assert cli(*shlex.split(verify)[1:]).code == 0
    words = ["quantize", "trained_qat.pt", "--spec", "configs/digits/quantize.yaml", "-o", "int8.pt2"]
    assert cli(*words).code == 0


def test_the_python_api_as_it_stands(anywhere, capsys):
    (source,) = (block for block in blocks("python") if "outcome" in block)
    net: dict[str, object] = {}
    exec((anywhere / "net.py").read_text(), net)
    names = {"model": randomise(net["build"](), seed=0), "inputs": torch.randn(2, 1, 8, 8)}
    exec(source, names)
    out = capsys.readouterr().out
    assert out.startswith("groups:\n  - [stem.conv, stem.bn]\n")
    assert out.splitlines()[-2:] == ["fused equivalent", "equivalent"]
    assert type(names["fused"].stem.conv).__name__ == "ConvReLU2d"


def test_the_yaml_is_the_digits_spec():
    shown = next(block for block in blocks("yaml") if "version:" in block)
    file = (DIGITS / "fuse.yaml").read_text(encoding="utf-8")
    assert shown == re.sub(r"\A(#.*\n)+", "", file)  # the file says at its top what it belongs to
    assert yaml.safe_load(shown)["version"] == 1


def test_the_toml_is_what_this_repository_says():
    (shown,) = blocks("toml")
    here = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fusecli"]
    assert set(tomllib.loads(shown)["tool"]["fusecli"]["allow-code"]) <= set(here["allow-code"])


def test_the_demo_runs_the_main_job_as_it_stands(cli, anywhere):
    """`fusecli fuse configs/digits/model.pt --spec configs/digits/fuse.yaml`, without a flag."""
    demo = (ROOT / "scripts" / "demo").read_text()
    assert "run fusecli fuse $digits/model.pt --spec $digits/fuse.yaml\n" in demo
    assert cli("fuse", "configs/digits/model.pt", "--spec", "configs/digits/fuse.yaml").code == 0


def test_the_second_command_is_what_ci_runs():
    assert (ROOT / "scripts" / "test").is_file()
    assert "bash scripts/test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_exit_codes_are_the_programs():
    from fusecli.errors import ExitCode

    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}


def test_every_spec_of_the_table_exists():
    table = re.findall(r"^\| `(\w+\.yaml)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(path.name for path in (ROOT / "configs" / "models").glob("*.yaml"))


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_demo(tmp_path):
    """In a copy, with the environment of this checkout: pip would need the network."""
    if not (ROOT / ".venv" / "bin" / "fusecli").is_file():
        pytest.skip("there is no .venv: scripts/setup makes it")
    folder = tmp_path / "clone"
    kept = shutil.ignore_patterns(".git", ".venv", "*.fused.*", "__pycache__", ".*_cache", "bench-results")
    shutil.copytree(ROOT, folder, ignore=kept)
    # scripts/setup makes a new environment in a copy; here the one that is there must do.
    (folder / "scripts" / "setup").write_text("#!/usr/bin/env bash\n")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "80"}
    ended = subprocess.run(
        ["bash", "scripts/demo"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "fused, equivalent" in ended.stdout
    assert "verified, equivalent" in ended.stdout
    right = re.search(r"images right\D+(\d+) of 120\D+(\d+) of 120", ended.stdout)
    assert right is not None
    assert right[1] == right[2]
