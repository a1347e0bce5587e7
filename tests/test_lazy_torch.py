"""What needs no tensors does not import torch, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Refuses the import itself: a torch that was imported and forgotten again would be as slow.
PROGRAM = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "safetensors", "numpy"):
            sys.stderr.write(f"IMPORTED {name}\\n")
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
"""
COMMAND = PROGRAM + "from fusecli.cli import main\nmain()\n"


def run(
    program: str, *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], "Exit codes"),
        (["fuse", "--help"], "--allow-pickle"),
        (["verify", "--help"], "CHECKPOINT"),
        (["inspect", "--help"], "nothing in it is"),
        (["--version"], "fusecli "),
        (["rules"], "conv_transpose_bn"),
        (["rules", "conv_bn"], "Equation"),
        (["explain"], "not-adjacent"),
        (["explain", "overflow"], "Remedy"),
        (["schema"], '"groups"'),
    ],
    ids=" ".join,
)
def test_commands_that_only_talk(words, expected):
    ended = run(COMMAND, *words)
    assert ended.returncode == 0, ended.stderr
    assert expected.lower() in ended.stdout.lower()
    assert "IMPORTED" not in ended.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fusecli ", {"fuse", "verify", "rules", "explain"}),
        ("fusecli fuse --", {"--spec"}),
        ("fusecli rules ", {"conv_bn", "linear_bn"}),
        ("fusecli explain ", {"overflow", "not-adjacent"}),
        ("fusecli explain ov", {"overflow"}),
    ],
)
def test_shell_completion(line, offered):
    words = line.split(" ")
    ended = run(
        # The shell's script calls the program under this name, with the line in the environment.
        PROGRAM + "sys.argv = ['fusecli']\nfrom fusecli.cli import main\nmain()\n",
        _FUSECLI_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert "IMPORTED" not in ended.stderr
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.split()
    assert offered <= set(words)
    assert all(word.startswith(line.split(" ")[-1]) for word in words)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["fuse", "model.pt", "--spec", "bad.yaml"], 2, "did you mean 'groups'?"),
        (["fuse", "model.pt", "--spec", "none.yaml"], 2, "no such spec file"),
        (["verify", "model.pt", "fused.pt", "--spec", "bad.yaml"], 2, "did you mean 'groups'?"),
        (["fuse", "model.pt", "--spec", "bad.yaml", "--report", "xml=x"], 2, "json=PATH or md=PATH"),
        (["rules", "conv_bm"], 2, "did you mean 'conv_bn'?"),
        (["explain", "overflw"], 2, "did you mean 'overflow'?"),
        (["fuze"], 2, "fuse"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_told_at_once(tmp_path, words, code, expected):
    (tmp_path / "bad.yaml").write_text("version: 1\ngroup: [[conv1, bn1]]\n")
    ended = run(COMMAND, *words, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert expected in ended.stderr
    assert "IMPORTED" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_import_fusecli():
    ended = run(PROGRAM + "import fusecli\nprint(dir(fusecli), hasattr(fusecli, 'nothing'))\n")
    assert "IMPORTED" not in ended.stderr
    assert "load_fused" in ended.stdout
    assert ended.stdout.endswith("False\n")


def test_the_api_does_import_it():
    ended = run(PROGRAM + "import fusecli\nfusecli.fuse\n")
    assert "IMPORTED torch" in ended.stderr
    assert ended.returncode != 0


# Says at the end whether torch's compiler was imported: 1.5 seconds of CPU, that nothing here has a use for.
COMPILERLESS = """
import sys
from fusecli.cli import main
try:
    main()
finally:
    for name in ("torch._dynamo", "sympy"):
        if name in sys.modules:
            sys.stderr.write(f"IMPORTED {name}\\n")
"""
WORDS_MODEL = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 8), Norm(8), nn.Linear(8, 20, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))
"""


def test_to_fuse_needs_no_compiler(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "net.py").write_text(WORDS_MODEL)
    tensors = {
        "embed.weight": torch.randn(20, 8),
        "norm.weight": torch.randn(8),
        "head.weight": torch.randn(20, 8),
    }
    save_file(tensors, tmp_path / "words.safetensors")
    words = ("fuse", "words.safetensors", "--discover", "--model", "net.py:Net", "--input", "2x5:int64:0..20")
    ended = run(COMPILERLESS, *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "gain_linear" in ended.stdout
    assert "IMPORTED" not in ended.stderr
    digits = Path(__file__).parent.parent / "configs" / "digits"
    for name in ("model.pt", "net.py", "fuse.yaml", "heldout.safetensors"):
        (tmp_path / name).write_bytes((digits / name).read_bytes())
    ended = run(
        COMPILERLESS, "fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert "IMPORTED" not in ended.stderr
