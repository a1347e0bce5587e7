"""`fusecli plan`: the spec that it writes is one that `fuse` takes, and says why the other norms are left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fusecli.spec import Spec, read_spec
from tests.cli.conftest import PAIR, PAIRS, Project, edit, spoil
from tests.conftest import Cli

INPUT = ("--input", "heldout.safetensors:images")
BARE = ("plan", "model.pt")
GIVEN = (*BARE, "--model", "net.py:build")
PLAN = (*GIVEN, *INPUT)
SMALL = (*GIVEN, "--input", "2x3x8x8")
ALLOW = ("--allow-code", "net.py")
FOUND = Path("found.yaml")
RELUS = {"stem.bn": "stem.relu", "head.bn": "head.relu"}


def parsed(text: str) -> Spec:
    FOUND.write_text(text)
    return read_spec(FOUND)


def comments(text: str) -> list[str]:
    """The comments behind the groups, which are about the norms that are left."""
    return [line for line in text.partition("\ngroups:")[2].splitlines() if line.startswith("#")]


def planned(cli: Cli, *words: str | Path) -> list[list[str]]:
    """The groups that a plan has found."""
    ended = cli(*words, "-q", "--report", "json=plan.json")
    assert ended.code in (0, 5), ended.err
    return [group["modules"] for group in json.loads(Path("plan.json").read_text())["groups"]]


class TestTheSpec:
    def test_on_stdout(self, cli: Cli, digits: Path) -> None:
        ended = cli(*PLAN)
        assert ended.code == 0
        assert ended.out == (
            "# model.pt: 6 groups, 0 norms left\n"
            "version: 1\n"
            "model: {factory: 'net.py:build'}\n"
            "inputs:\n"
            "  - {file: heldout.safetensors, key: images}\n"
            "groups:\n"
            "  - [stem.conv, stem.bn]\n"
            "  - [down.depthwise, down.bn]\n"
            '  - ["blocks.*.conv", "blocks.*.bn"]  # 2\n'
            "  - [up.conv, up.bn]\n"
            "  - [head.linear, head.bn]\n"
        )
        spec = parsed(ended.out)
        assert spec.model is not None
        assert (spec.model.factory, len(spec.groups), spec.discover) == ("net.py:build", 5, False)
        # What people read stands beside it, not in it.
        assert "planned: a spec of all that is sound" in ended.err
        assert "32 op calls of one forward" in ended.err
        assert not Path("model.fused.safetensors").exists()

    def test_quiet_is_the_spec_alone(self, cli: Cli, digits: Path) -> None:
        ended = cli(*PLAN, "-q")
        assert (ended.code, ended.err) == (0, "")
        assert parsed(ended.out).groups

    def test_in_a_file(self, cli: Cli, digits: Path) -> None:
        text = cli(*PLAN).out
        ended = cli(*PLAN, "-o", FOUND)
        assert (ended.code, ended.err) == (0, "")
        assert FOUND.read_text() == text
        assert "found.yaml (YAML, 285 bytes)" in ended.out
        assert "version: 1" not in ended.out
        assert not list(digits.glob(".*"))

    def test_fuse_takes_it(self, cli: Cli, digits: Path) -> None:
        report = Path("plan.json")
        assert cli(*PLAN, "-o", FOUND, "--report", f"json={report}").code == 0
        program, *words = json.loads(report.read_text())["next_step"].split()
        assert (program, words) == ("fusecli", ["fuse", "model.pt", "--spec", "found.yaml", *ALLOW])
        ended = cli(*words, "--report", "json=-")
        assert (ended.code, ended.report["status"]) == (0, "fused")
        assert [group["modules"] for group in ended.report["groups"]] == PAIRS
        assert ended.report["unfused"] == []

    def test_the_same_each_time(self, cli: Cli, digits: Path) -> None:
        first = cli(*PLAN).out
        assert cli(*PLAN).out == first
        assert cli(*PLAN, "--seed", "7").out == first
        # Its own output gives it again, wherever the spec stands.
        FOUND.write_text(first)
        assert cli(*BARE, "--spec", FOUND, *ALLOW).out == first

    @pytest.mark.parametrize("target", ["inference", "quant"])
    def test_the_target(self, cli: Cli, digits: Path, target: str) -> None:
        expected = [[*pair, RELUS[pair[1]]] if pair[1] in RELUS else pair for pair in PAIRS]
        expected = expected if target == "quant" else PAIRS
        assert planned(cli, *PLAN, "--target", target, "-o", FOUND) == expected
        again = (*BARE, "--spec", FOUND, *ALLOW)
        assert planned(cli, *again) == expected
        assert cli(*again).out == FOUND.read_text()
        ended = cli("fuse", "model.pt", "--spec", FOUND, *ALLOW, "--report", "json=-")
        assert [group["modules"] for group in ended.report["groups"]] == expected

    def test_its_own_groups_do_not_count(self, cli: Cli, digits: Path) -> None:
        edit(digits / "fuse.yaml", ("[up.conv, up.bn, up.act]", "[pool, up.bn]"))
        assert planned(cli, *BARE, "--spec", "fuse.yaml", *ALLOW) == PAIRS

    @pytest.mark.parametrize("pattern", ["blocks", "blocks.*", "*.*.bn"])
    def test_exclude(self, cli: Cli, digits: Path, pattern: str) -> None:
        ended = cli(*PLAN, "--exclude", pattern)
        assert parsed(ended.out).exclude == (pattern,)
        assert "blocks" not in ended.out.replace(pattern, "").partition("# Left")[0]
        assert comments(ended.out) == [
            "# Left, with the reason ('fusecli explain CODE' says more):",
            "#   excluded: an exclude pattern of the spec covers it",
            "#     blocks.0.bn (BatchNorm2d)",
            "#     blocks.1.bn (BatchNorm2d)",
        ]
        ended = cli("fuse", "model.pt", "--spec", FOUND, *ALLOW, "--report", "json=-")
        assert (ended.code, len(ended.report["groups"])) == (0, 4)

    def test_exclude_takes_the_place_of_the_specs(self, cli: Cli, digits: Path) -> None:
        edit(digits / "fuse.yaml", ("groups:", "exclude: [stem]\ngroups:"))
        words = (*BARE, "--spec", "fuse.yaml", *ALLOW)
        assert planned(cli, *words) == PAIRS[1:]
        assert planned(cli, *words, "--exclude", "head", "--exclude", "up") == PAIRS[:4]


class TestPaths:
    """Every path in the spec is relative to where the spec is written."""

    def test_elsewhere(self, cli: Cli, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (digits / "specs").mkdir()
        path = Path("specs") / "found.yaml"
        assert cli(*PLAN, "-o", path).code == 0
        text = path.read_text()
        assert "factory: '../net.py:build'" in text
        assert "file: ../heldout.safetensors" in text
        ended = cli("fuse", "model.pt", "--spec", path, *ALLOW, "--report", "json=-")
        assert (ended.code, len(ended.report["groups"])) == (0, 6)
        # From there to here again, and from another working folder.
        back = cli(*BARE, "--spec", path, *ALLOW).out
        assert back == cli(*PLAN).out
        monkeypatch.chdir(digits / "specs")
        assert cli("plan", "../model.pt", "--spec", "found.yaml", "--allow-code", "../net.py").out == text

    def test_what_is_typed_beside_a_spec(self, cli: Cli, digits: Path) -> None:
        """Typed paths start in the working folder, those of the spec in its own."""
        (digits / "specs").mkdir()
        path = Path("specs") / "empty.yaml"
        path.write_text("version: 1\n")
        assert cli(*BARE, "--spec", path, *PLAN[2:]).out == cli(*PLAN).out

    def test_code_of_mappings(self, cli: Cli, project: Project) -> None:
        project(TAUGHT, [["conv", "norm"]], extra_mappings=TEACHING)
        Path("specs").mkdir()
        words = (*BARE, "--spec", "fuse.yaml", *ALLOW)
        path = Path("specs") / "found.yaml"
        assert planned(cli, *words, "-o", path) == [["conv", "norm"]]
        (treat, other) = read_spec(path).extra_mappings
        assert (treat.treat, other.sequence) == ("../net.py:Taught", ("../net.py:Taught", "torch.nn.ReLU"))
        assert other.fuser == "../net.py:fuser"
        assert cli("fuse", "model.pt", "--spec", path, *ALLOW).code == 0

    def test_everything_else_is_taken_over(self, cli: Cli, project: Project) -> None:
        project(
            PAIR.replace("build()", "build(**_)"),
            model={"factory": "net.py:build", "kwargs": KWARGS},
            inputs=[{"shape": [2, 3, 8, 8], "range": [-1, 1]}],
            verify={"seed": 3, "samples": 2},
            output={"format": "pt"},
        )
        spec = read_spec("fuse.yaml")
        again = parsed(cli(*BARE, "--spec", "fuse.yaml", *ALLOW).out)
        assert again == spec
        assert again.model is not None
        assert again.model.kwargs == KWARGS


KWARGS = {"a": ["1e5", "0o14", "no", "a\n#b"], "b": {"c": None}, "d": 1e-5, "e": "../x: y"}
TAUGHT = """
from collections import OrderedDict
from torch import nn

class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, __import__("torch").ones(6))

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

def fuser(is_qat, *modules):
    raise ValueError("never called")

def build():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), norm=Taught()))
"""
TEACHING = [
    {"treat": "net.py:Taught", "as": "torch.nn.BatchNorm2d"},
    {"sequence": ["net.py:Taught", "torch.nn.ReLU"], "fuser": "net.py:fuser"},
]


LEFT = """
import torch
from collections import OrderedDict
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.group = nn.GroupNorm(2, 6)
        self.spare = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.first(torch.relu(self.bn(self.conv(x))))
        return self.group(self.second(torch.relu(x)))

build = Net
"""
ACTED = "what feeds it is no layer that it could be folded into: aten.relu in the model's forward"


class TestWhatIsLeft:
    def test_each_with_its_reason(self, cli: Cli, project: Project) -> None:
        project(LEFT)
        ended = cli(*SMALL, "--report", "json=plan.json")
        assert ended.out.startswith("# model.pt: 1 group, 4 norms left\n")
        assert [group.modules for group in parsed(ended.out).groups] == [("conv", "bn")]
        said = comments(ended.out)
        assert said[0] == "# Left, with the reason ('fusecli explain CODE' says more):"
        assert said[1:4] == [
            f"#   no-linear-producer: {ACTED}",
            "#     first (BatchNorm2d)",
            "#     second (BatchNorm2d)",
        ]
        rest = dict(zip(said[5::2], said[4::2], strict=True))
        assert rest["#     group (GroupNorm)"].startswith("#   batch-dependent: ")
        assert rest["#     spare (BatchNorm2d)"].startswith("#   not-executed: ")

    def test_the_report_accounts_for_every_norm(self, cli: Cli, project: Project) -> None:
        project(LEFT)
        cli(*SMALL, "--report", "json=plan.json", "--report", "md=plan.md")
        report = json.loads(Path("plan.json").read_text())
        assert (report["command"], report["status"], report["exit_code"]) == ("plan", "proposed", 0)
        (group,) = report["groups"]
        assert (group["modules"], group["evidence"], group["status"]) == (
            ["conv", "bn"],
            "observed",
            "planned",
        )
        assert {norm["module"]: norm["code"] for norm in report["unfused"]} == {
            "first": "no-linear-producer",
            "second": "no-linear-producer",
            "group": "batch-dependent",
            "spare": "not-executed",
        }
        assert report["verification"] is None
        assert report["recording"]
        assert "no-linear-producer" in Path("plan.md").read_text()

    def test_numbers_that_forbid_a_fold(self, cli: Cli, digits: Path) -> None:
        spoil("blocks.1.bn.running_var", float("nan"))
        ended = cli(*PLAN)
        assert ended.code == 0
        assert [group.modules for group in parsed(ended.out).groups][2] == ("blocks.0.conv", "blocks.0.bn")
        assert any(line.startswith("#   bad-statistics: ") for line in comments(ended.out))
        assert "#     blocks.1.bn (BatchNorm2d)" in comments(ended.out)

    @pytest.mark.parametrize("quiet", [(), ("-q",)])
    def test_5_nothing_can_be_folded(self, cli: Cli, project: Project, quiet: Sequence[str]) -> None:
        project(LEFT)
        ended = cli(*SMALL, "--exclude", "conv", *quiet)
        assert ended.code == 5
        assert ended.out.startswith("# model.pt: 0 groups, 5 norms left\n")
        assert parsed(ended.out).groups == ()
        assert "the dataflow offers nothing to fold" in ended.err
        # The spec that lists nothing is written all the same, and fuse agrees.
        assert cli(*SMALL, "--exclude", "conv", "-o", FOUND, "--force").code == 5
        assert cli("fuse", "model.pt", "--spec", FOUND, *ALLOW).code == 5


HOSTILE = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 3), first, nn.ReLU(), second))

    def forward(self, x):
        return sum(module(x) for module in self.children())

build = Net
NAMES = %r
"""
NAMES = [
    "a\ngroups: [[x, y]]",
    "b: c",
    "d # e",
    "f\x1b[31m",
    "'g\"",
    "::error::h",
    "i\u2028j",
    "1e5",
    "-k",
    "{l",
]


def test_hostile_names_stay_names(cli: Cli, project: Project) -> None:
    project(HOSTILE % NAMES)
    ended = cli(*SMALL)
    assert ended.code == 0
    groups = [group.modules for group in parsed(ended.out).groups]
    assert groups == [(f"{name}.0", f"{name}.1") for name in NAMES]
    # One line for each norm, its reasons beside, and nothing that a terminal or a CI runner obeys.
    said = [line for line in comments(ended.out) if line.endswith(" (BatchNorm2d)")]
    assert len(said) == len(NAMES)
    assert "#     a\\ngroups: [[x, y]].3 (BatchNorm2d)" in said
    assert all(char.isprintable() or char == "\n" for char in ended.out)
    assert not any(line.strip().startswith("::") for line in ended.out.splitlines())
    ended = cli("fuse", "model.pt", "--spec", FOUND, *ALLOW, "--report", "json=-")
    assert (ended.code, len(ended.report["groups"])) == (0, len(NAMES))


CHATTY = """
print("importing")

def build():
    from torch import nn
    print("building")
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
"""


def test_stdout_carries_the_spec_alone(cli: Cli, project: Project) -> None:
    project(CHATTY)
    ended = cli(*SMALL)
    assert [group.modules for group in parsed(ended.out).groups] == [("0", "1")]
    assert {"importing", "building"} <= set(ended.err.splitlines())


class TestWhereItIsWritten:
    def test_an_existing_file_needs_force(self, cli: Cli, digits: Path) -> None:
        FOUND.write_text("precious")
        ended = cli(*PLAN, "-o", FOUND)
        assert (ended.code, ended.out) == (2, "")
        assert "found.yaml: exists already" in ended.err
        assert "add --force" in ended.err
        assert FOUND.read_text() == "precious"
        assert cli(*PLAN, "-o", FOUND, "--force").code == 0
        assert read_spec(FOUND).groups

    @pytest.mark.parametrize("force", [(), ("--force",)])
    @pytest.mark.parametrize("name", ["model.pt", "./model.pt", "net.py", "heldout.safetensors"])
    def test_not_over_what_is_read(self, cli: Cli, digits: Path, name: str, force: Sequence[str]) -> None:
        before = (digits / name).read_bytes()
        ended = cli(*PLAN, "-o", name, *force)
        assert ended.code == 2
        assert "is a file of the command itself" in ended.err
        assert "choose another path" in ended.err
        assert (digits / name).read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "said"),
        [("none/found.yaml", "its folder does not exist"), (".", "is a folder"), ("fuse.yaml/x", "folder")],
    )
    def test_nowhere(self, cli: Cli, digits: Path, name: str, said: str) -> None:
        ended = cli(*PLAN, "-o", name, "--force")
        assert ended.code == 2
        assert said in ended.err
        assert "fix: " in ended.err


@pytest.mark.parametrize(
    ("words", "said", "fix"),
    [
        (["plan"], "Missing argument 'checkpoint'", ""),
        (["plan", "model.pt"], "planning runs the model, and its code is not known", "--model and --input"),
        ([*BARE, *INPUT], "its code is not known", "--model and --input"),
        (GIVEN, "no inputs to run it on", "inputs"),
        ([*BARE, "--model", "net.py"], "--model: 'net.py' names no factory", "net.py:Net"),
        ([*BARE, "--model", "net.py:build(8)", *INPUT], "keyword arguments only", "width=8"),
        ([*BARE, "--model", "net.py:biuld", *INPUT], "there is no 'biuld'", "'build'?"),
        ([*BARE, "--model", "net.py:build(size=3)", *INPUT], "raised TypeError", "kwargs"),
        ([*BARE, "--model", "nett.py:build", *INPUT], "no such file to allow", "check"),
        ([*GIVEN, "--input", "2x1x8x8:f32"], "dtype 'f32' is unknown", "float32"),
        ([*GIVEN, "--input", "2*1"], "--input: '2*1' describes no tensor", "2x3x224x224"),
        ([*GIVEN, "--input", "2x3x8x8"], "expected input", "one entry per"),
        ([*GIVEN, "--input", "x.safetensors:images"], "cannot be read", "safetensors"),
        ([*PLAN, "--target", "int8"], "is not one of 'inference'", ""),
        ([*PLAN, "--exclude", "blocs.*"], "exclude 'blocs.*' matches no module", "did you mean"),
        ([*PLAN, "--exclude", "**"], "no wildcard here", "one * for each"),
        ([*PLAN, "--report", "json=-"], "the spec goes to stdout already", "give -o, or the report a path"),
        (
            [*PLAN, "-o", "f.yaml", "--report", "json=f.yaml"],
            "cannot replace a file of the command",
            "another",
        ),
        ([*PLAN, "--report", "json=net.py"], "cannot replace a file of the command", "another path"),
        ([*BARE, "--spec", "none.yaml"], "none.yaml", "did you mean 'fuse.yaml'?"),
        (["plan", "none.pt", *PLAN[2:]], "none.pt: there is no such file", ""),
    ],
)
def test_2_usage(cli: Cli, digits: Path, words: Sequence[str], said: str, fix: str) -> None:
    source = Path("net.py").read_text()
    ended = cli(*words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err.replace("\n", " ")
    assert fix in ended.err
    assert not fix or "fix: " in ended.err
    assert "Traceback" not in ended.err
    assert Path("net.py").read_text() == source


def test_3_a_spec_does_not_allow_its_own_code(cli: Cli, digits: Path) -> None:
    ended = cli(*BARE, "--spec", "fuse.yaml")
    assert (ended.code, ended.out) == (3, "")
    assert "add --allow-code net.py" in ended.err


def test_a_report_on_stdout_beside_the_spec_in_a_file(cli: Cli, digits: Path) -> None:
    ended = cli(*PLAN, "-o", FOUND, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "proposed")
    assert ended.report["output"]["path"] == "found.yaml"
    assert read_spec(FOUND).groups


def test_a_whole_pickled_module(cli: Cli, project: Project) -> None:
    project()
    names: dict = {}
    exec(PAIR, names)
    torch.save(names["build"]().eval(), "model.pt")
    words = ("plan", "model.pt", "--input", "2x3x8x8", "-o", FOUND)
    assert cli(*words).code == 3
    ended = cli(*words, "--allow-pickle", "--report", "json=-")
    assert ended.code == 0
    _, *step = ended.report["next_step"].split()
    assert cli(*step).code == 0


def test_a_group_that_forward_cannot_do_without_is_left(cli: Cli, project: Project) -> None:
    """forward asks the norm for its dtype: an identity has no weight."""
    project(
        """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(self.n(self.a(x)).relu().to(self.bn.weight.dtype)))

build = Net
"""
    )
    ended = cli("plan", "model.pt", "--model", "net.py:build", "--input", "2x3x8x8")
    assert ended.code == 0, ended.err
    assert "  - [a, n]" in ended.out.splitlines()
    assert "[conv, bn]" not in ended.out
    assert "#   dropped:" in ended.out
