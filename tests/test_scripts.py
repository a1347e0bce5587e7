"""The scripts run in the environment that their first lines name, ask nobody, and keep to one thread."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
PYTHON = sorted(
    path.name for path in SCRIPTS.iterdir() if path.is_file() and b"env python3" in path.read_bytes()[:40]
)
# As in an environment that scripts/setup base has made: what only the extras bring cannot be imported.
BASE = """
from importlib.machinery import PathFinder

missing = {"numpy", "pytest", "sklearn", "scipy", "torchao", "pytorchcv"}
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: (
        None if name.partition(".")[0] in missing else find(name, path, target)
    )
)
"""


def named(script: str) -> str:
    """The environment that the first lines of a script name."""
    said = (SCRIPTS / script).read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0]
    found = re.search(r"environment\s+of\s+`scripts/setup (base|all)`", said)
    assert found is not None, f"{script} does not say where it runs"
    return found[1]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BASE)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT)))}


def run(script: Path, *words: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def test_every_script_says_where_it_runs():
    assert {name: named(name) for name in PYTHON} == {
        "bench": "all",
        "digits_scores": "base",
        "make_rule_examples": "base",
        "natural_noise": "base",
        "qat_digits": "all",
        "train_digits": "all",
    }


def test_the_environment_of_these_tests_is_as_poor_as_it_claims(base, tmp_path):
    program = "import importlib.util as u; print([u.find_spec(n) for n in ('numpy', 'sklearn', 'torchao')])"
    done = subprocess.run([sys.executable, "-c", program], env=base, capture_output=True, text=True)
    assert done.stdout == "[None, None, None]\n", done.stderr


def test_noise_without_numpy(base, tmp_path):
    done = run(SCRIPTS / "natural_noise", "noise.safetensors", "8", env=base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "noise.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        "calibration": (64, 3, 8, 8),
        "held_out": (32, 3, 8, 8),
    }


def test_examples_without_numpy(base, tmp_path):
    done = run(SCRIPTS / "make_rule_examples", "made", env=base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for made in (tmp_path / "made").rglob("*.safetensors"):
        here = ROOT / "configs" / made.relative_to(tmp_path / "made")
        assert load_file(made).keys() == load_file(here).keys()


def test_scores_without_numpy(cli, base, tmp_path):
    """In a copy, where the fused network is not there at first, and then is."""
    digits = tmp_path / "configs" / "digits"
    shutil.copytree(ROOT / "configs" / "digits", digits, ignore=shutil.ignore_patterns("*.fused.*"))
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(SCRIPTS / "digits_scores", tmp_path / "scripts")
    done = run(script, env=base, cwd=tmp_path)
    assert (done.returncode, "bash scripts/demo writes it" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr
    spec = ("--spec", digits / "fuse.yaml", "--allow-code", digits / "net.py")
    assert cli("fuse", digits / "model.pt", *spec).code == 0
    done = run(script, env=base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images right" in done.stdout


@pytest.mark.parametrize(
    "words", [["bench"], ["bench", "startup", "proof"], ["bench", "zoo"], ["train_digits"], ["qat_digits"]]
)
def test_what_is_missing_is_told_in_a_sentence(base, tmp_path, words):
    """And at once: not after the benches that could run."""
    done = run(SCRIPTS / words[0], *words[1:], env=base, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("bash scripts/setup all")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $1: ${FUSECLI_ALLOW_CODE-} ${OMP_NUM_THREADS-}" >>"$SEEN"
"""


@pytest.mark.parametrize(("threads", "seen"), [(None, "1"), ("3", "3")])
def test_the_demo_asks_nobody_and_keeps_to_one_thread(tmp_path, threads, seen):
    """With stand-ins for the programs that it runs. A number of threads that a user has set stays."""
    for folder in ("scripts", ".venv/bin", "configs/digits"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPTS / "demo", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup").write_text("#!/usr/bin/env bash\n")
    for name in ("fusecli", "python"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(STAND_IN)
        program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"SEEN": str(tmp_path / "seen"), **({"OMP_NUM_THREADS": threads} if threads else {})}
    subprocess.run(["bash", "scripts/demo"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "seen").read_text().splitlines() == [
        f"{called}: configs/digits/net.py {seen}"
        for called in ("fusecli fuse", "fusecli verify", "python scripts/digits_scores")
    ]
