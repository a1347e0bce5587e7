"""`fuse --discover`: what a run shows to be sound is fused; every norm that is left is accounted for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fusecli
from tests.cli.conftest import PAIR, PAIRS, Project, edit, spoil, wrong_fold
from tests.conftest import Cli, Run

RUN = ("--model", "net.py:build", "--input", "heldout.safetensors:images")
DISCOVER = ("fuse", "model.pt", "--discover", *RUN)
ALLOW = ("--allow-code", "net.py")
SPEC = ("--spec", "fuse.yaml", *ALLOW)
FUSE = ("fuse", "model.pt", *SPEC)
JSON = ("--report", "json=-")
FUSED = Path("model.fused.safetensors")
RELU = [*PAIRS[0], "stem.relu"]


def respec(**changes: Any) -> None:
    """fuse.yaml of the digits with other values for some keys."""
    spec = {
        "version": 1,
        "model": {"factory": "net.py:build"},
        "inputs": [{"file": "heldout.safetensors", "key": "images"}],
    }
    Path("fuse.yaml").write_text(json.dumps(spec | changes))


def modules(ended: Run) -> list[list[str]]:
    return [group["modules"] for group in ended.report["groups"]]


def codes(ended: Run) -> dict[str, str]:
    """The code of every norm that is left."""
    return {norm["module"]: norm["code"] for norm in ended.report["unfused"]}


class TestWithoutASpec:
    def test_fused_and_verified(self, cli: Cli, digits: Path) -> None:
        ended = cli(*DISCOVER, *JSON)
        assert (ended.code, ended.report["status"]) == (0, "fused")
        assert modules(ended) == PAIRS
        assert {group["evidence"] for group in ended.report["groups"]} == {"observed"}
        assert (ended.report["unfused"], ended.report["refused"]) == ([], [])
        program, *words = shlex.split(ended.report["next_step"])
        assert (program, words) == ("fusecli", ["verify", "model.pt", str(FUSED), *RUN])
        ended = cli(*words, *JSON)
        assert (ended.code, ended.report["status"]) == (0, "verified")
        assert modules(ended) == PAIRS

    def test_the_same_bytes_as_from_a_spec_and_from_a_plan(self, cli: Cli, digits: Path) -> None:
        respec(groups=PAIRS)
        assert cli(*FUSE, "-o", "listed.safetensors").code == 0
        assert cli(*DISCOVER).code == 0
        assert cli("plan", *DISCOVER[1:2], *RUN, "-o", "found.yaml").code == 0
        words = ("--spec", "found.yaml", *ALLOW)
        assert cli("fuse", "model.pt", *words, "-o", "planned.safetensors").code == 0
        for name in ("listed", "planned"):
            assert Path(f"{name}.safetensors").read_bytes() == FUSED.read_bytes()

    def test_quant_takes_the_relus(self, cli: Cli, digits: Path) -> None:
        ended = cli(*DISCOVER, "--target", "quant", *JSON)
        assert (ended.code, modules(ended)[0], modules(ended)[-1]) == (0, RELU, [*PAIRS[-1], "head.relu"])
        assert cli("verify", "model.pt", FUSED, *RUN).code == 0

    def test_kwargs_that_are_typed(self, cli: Cli, project: Project) -> None:
        project(PAIR.replace("build()", "build(width=6)").replace("6", "width").replace("=width)", "=6)"))
        words = ("--model", "net.py:build(width=6)", "--input", "2x3x8x8")
        ended = cli("fuse", "model.pt", "--discover", *words, *JSON)
        assert (ended.code, modules(ended)) == (0, [["conv", "bn"]])
        _, *step = shlex.split(ended.report["next_step"])
        assert cli(*step).code == 0

    @pytest.mark.parametrize(
        ("words", "said", "fix"),
        [
            ((), "nothing says what to fuse", "--spec fuse.yaml, or --discover with --model and --input"),
            (("--discover",), "discovery runs the model, and its code is not known", "--model and --input"),
            (("--discover", *RUN[2:]), "its code is not known", "--model and --input"),
            (("--discover", *RUN[:2]), "no inputs to run it on", "inputs"),
            (("--discover", *RUN[:2], "--input", "2x3x8x8"), "expected input", "one entry per"),
        ],
    )
    def test_2_usage(self, cli: Cli, digits: Path, words: Sequence[str], said: str, fix: str) -> None:
        ended = cli("fuse", "model.pt", *words)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
        assert fix in ended.err
        assert not FUSED.exists()

    @pytest.mark.parametrize("word", ["--model=net.py:build", "--input=2x1x8x8"])
    def test_a_model_alone_is_nothing_to_fuse(self, cli: Cli, digits: Path, word: str) -> None:
        assert cli("fuse", "model.pt", word).code == 2

    def test_dry_run(self, cli: Cli, digits: Path) -> None:
        ended = cli(*DISCOVER, "--dry-run", *JSON)
        assert (ended.code, ended.report["status"], modules(ended)) == (0, "planned", PAIRS)
        assert not FUSED.exists()

    @pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--min-folded", "0")])
    def test_5_nothing_can_be_folded(self, cli: Cli, project: Project, flags: Sequence[str]) -> None:
        project(
            "from torch import nn\ndef build():\n    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))\n"
        )
        words = ("--model", "net.py:build", "--input", "2x3x8x8")
        ended = cli("fuse", "model.pt", "--discover", *words, *flags, *JSON)
        assert (ended.code, ended.report["status"]) == (5, "nothing to fuse")
        assert codes(ended) == {"1": "no-linear-producer"}
        assert "the dataflow offers nothing to fold" in ended.report["problems"]
        assert not FUSED.exists()


class TestBesideASpec:
    def test_it_adds_to_the_groups(self, cli: Cli, digits: Path) -> None:
        respec(groups=[RELU, PAIRS[3]], discover=True)
        ended = cli(*FUSE, *JSON)
        assert ended.code == 0
        assert sorted(modules(ended)) == sorted([RELU, *PAIRS[1:]])
        _, *step = shlex.split(ended.report["next_step"])
        assert cli(*step, *JSON).report["status"] == "verified"

    def test_the_flag_does_the_same_and_typing_wins(self, cli: Cli, digits: Path) -> None:
        respec(groups=[RELU], discover=True)
        assert cli(*FUSE, "-o", "a.safetensors").code == 0
        respec(groups=[RELU])
        assert cli(*FUSE, "--discover", "-o", "b.safetensors").code == 0
        respec(groups=[RELU], model=None, inputs=[])
        assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *DISCOVER[2:], "-o", "c.safetensors").code == 0
        assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
        assert Path("a.safetensors").read_bytes() == Path("c.safetensors").read_bytes()

    def test_exclude(self, cli: Cli, digits: Path) -> None:
        respec(discover=True, exclude=["blocks.*", "head"], target="quant")
        ended = cli(*FUSE, *JSON)
        assert (ended.code, modules(ended)) == (0, [RELU, *PAIRS[1:2], *PAIRS[4:5]])
        assert codes(ended) == dict.fromkeys(["blocks.0.bn", "blocks.1.bn", "head.bn"], "excluded")

    def test_without_it_a_norm_is_not_listed(self, cli: Cli, digits: Path) -> None:
        respec(groups=PAIRS[:5])
        ended = cli(*FUSE, *JSON)
        (left,) = ended.report["unfused"]
        assert (ended.code, left["module"], left["code"]) == (0, "head.bn", "not-listed")
        assert "[head.linear, head.bn] would fold it" in left["evidence"] + [left["remedy"]]

    def test_a_listed_group_that_is_refused_stops_all(self, cli: Cli, digits: Path) -> None:
        respec(groups=[["pool", "up.bn"]], discover=True)
        ended = cli(*FUSE, *JSON)
        assert (ended.code, [no["group"] for no in ended.report["refused"]]) == (4, [["pool", "up.bn"]])
        assert not FUSED.exists()

    def test_without_the_models_code(self, cli: Cli, digits: Path) -> None:
        respec(groups=PAIRS, discover=True, model=None, inputs=[], assume={"eps": 1e-5})
        ended = cli(*FUSE)
        assert ended.code == 2
        assert "discovery runs the model" in ended.err
        assert "model and inputs in the spec" in ended.err


SPOILS: dict[str, tuple[str, float, str]] = {
    "NaN": ("blocks.1.bn.running_var", float("nan"), "bad-statistics"),
    "negative": ("blocks.1.bn.running_var", -1.0, "bad-statistics"),
    "NaN in a weight": ("blocks.1.conv.weight", float("nan"), "not-finite"),
    "overflow": ("blocks.1.bn.weight", 3e38, "overflow"),
}


@pytest.mark.parametrize("case", SPOILS)
class TestNumbersThatForbidAFold:
    def test_discovered_it_is_left_out(self, cli: Cli, digits: Path, case: str) -> None:
        name, value, code = SPOILS[case]
        spoil(name, value)
        if case == "overflow":
            spoil("blocks.1.conv.weight", 1e6)
        ended = cli(*DISCOVER, "--dry-run", *JSON)
        assert modules(ended) == [pair for pair in PAIRS if pair[1] != "blocks.1.bn"]
        assert codes(ended) == {"blocks.1.bn": code}

    def test_listed_it_stops_all(self, cli: Cli, digits: Path, case: str) -> None:
        name, value, code = SPOILS[case]
        spoil(name, value)
        if case == "overflow":
            spoil("blocks.1.conv.weight", 1e6)
        respec(groups=[PAIRS[3]], discover=True)
        ended = cli(*FUSE, *JSON)
        assert ended.code == 4
        assert [(no["group"], no["code"]) for no in ended.report["refused"]] == [(PAIRS[3], code)]
        assert codes(ended)["stem.bn"] == "held-back"
        assert not FUSED.exists()


HALF = """
from collections import OrderedDict
from torch import nn

def build():
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 6, 3), bn2=nn.BatchNorm2d(6),
    )).half()
"""


def test_float16_overflow_is_left_out_and_the_rest_is_written(cli: Cli, project: Project) -> None:
    """gamma 10 at variance 0 scales by 3162: a weight of 30 is then too large, though no output is."""
    project(HALF, None, [{"shape": [2, 3, 8, 8], "dtype": "float16"}])
    content = torch.load("model.pt", weights_only=True)
    content["bn.weight"] *= 1e-3
    content["bn.bias"] *= 1e-3
    torch.save(content, "model.pt")
    for name, value in (("bn2.weight", 10.0), ("bn2.running_var", 0.0), ("conv2.weight", 30.0)):
        spoil(name, value)
    ended = cli(*FUSE, "--discover", *JSON)
    assert (ended.code, modules(ended), codes(ended)) == (0, [["conv", "bn"]], {"bn2": "overflow"}), ended.out
    assert cli("verify", "model.pt", FUSED, *SPEC).code == 0
    names: dict[str, Any] = {}
    exec(HALF, names)
    fused = fusecli.load_fused(names["build"](), FUSED)
    assert isinstance(fused.bn, torch.nn.Identity)
    assert isinstance(fused.bn2, torch.nn.BatchNorm2d)


GAINS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.linear2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.bn = nn.Sigmoid(), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.norm(x)
        x = self.linear(y)
        x = self.linear2(x.sigmoid())
        return self.bn(self.act(x))

build = Net
"""


class TestWhatIsRequired:
    @pytest.mark.parametrize("flags", [("--require-all",), ("--min-folded", "100"), ("--min-folded", "83.4")])
    def test_4_a_norm_that_is_not_listed(self, cli: Cli, digits: Path, flags: Sequence[str]) -> None:
        respec(groups=PAIRS[:5])
        for extra in ((), ("--dry-run",)):
            ended = cli(*FUSE, *flags, *extra, *JSON)
            assert (ended.code, ended.report["status"]) == (4, "refused")
            assert codes(ended) == {"head.bn": "not-listed"}
            assert "fusecli plan" in ended.report["next_step"]
            assert not FUSED.exists()
        (problem,) = ended.report["problems"]
        said = {"--require-all": "1 norm", "--min-folded": "5 of 6 norms with running statistics"}[flags[0]]
        assert problem.startswith(flags[0])
        assert said in problem
        assert cli(*FUSE, *flags, "--discover").code == 0
        assert FUSED.exists()

    @pytest.mark.parametrize("flags", [(), ("--min-folded", "0"), ("--min-folded", "83.3")])
    def test_0_what_is_folded_is_enough(self, cli: Cli, digits: Path, flags: Sequence[str]) -> None:
        respec(groups=PAIRS[:5])
        assert cli(*FUSE, *flags).code == 0

    def test_excluded_norms_could_be_folded(self, cli: Cli, digits: Path) -> None:
        respec(discover=True, exclude=["head"])
        ended = cli(*FUSE, "--require-all", *JSON)
        assert (ended.code, codes(ended)) == (4, {"head.bn": "excluded"})

    def test_norms_that_cannot_be_folded_are_not_required(self, cli: Cli, digits: Path) -> None:
        spoil("blocks.1.bn.running_var", -1.0)
        ended = cli(*DISCOVER, "--require-all", "--dry-run", *JSON)
        assert ended.report["problems"] == []
        # But a percentage counts them.
        ended = cli(*DISCOVER, "--min-folded", "90", *JSON)
        assert (ended.code, codes(ended)) == (4, {"blocks.1.bn": "bad-statistics"})
        assert "5 of 6" in ended.report["problems"][0]
        assert not FUSED.exists()

    def test_no_percentage_of_norms_that_nothing_folds(self, cli: Cli, project: Project) -> None:
        project(PAIR.replace("bn=nn.BatchNorm2d(6)", "bn=nn.BatchNorm2d(6), group=nn.GroupNorm(2, 6)"))
        ended = cli(*FUSE, "--min-folded", "100", "--require-all", *JSON)
        assert (ended.code, codes(ended)) == (0, {"group": "batch-dependent"})

    @pytest.mark.parametrize("norm", ["LayerNorm(8)", "RMSNorm(8)"])
    def test_a_gain_is_no_norm_with_running_statistics(self, cli: Cli, project: Project, norm: str) -> None:
        """A folded gain is no part of what is folded, and one that stays is no part of what is left."""
        source = GAINS.replace("LayerNorm(8)", norm)
        project(source, groups=None, discover=True, inputs=[{"shape": [2, 8]}])
        ended = cli(*FUSE, "--min-folded", "50", *JSON)
        assert ended.code == 4
        (problem,) = ended.report["problems"]
        assert problem.startswith("--min-folded 50: 0 of 1 norms with running statistics are folded, 0.0 %")
        assert ["norm", "linear"] in [group["modules"] for group in ended.report["groups"]]

    def test_a_gain_that_is_not_listed_is_no_norm_that_is_left(self, cli: Cli, project: Project) -> None:
        source = GAINS.replace("self.bn(self.act(x))", "self.act(self.bn(x))")
        project(source, groups=[["linear2", "bn"]], inputs=[{"shape": [2, 8]}])
        ended = cli(*FUSE, "--min-folded", "100", "--require-all", *JSON)
        assert ended.code == 0, (ended.report["problems"], ended.report["refused"])
        assert codes(ended) == {"norm": "not-listed"}

    def test_a_gain_that_is_refused_is_no_norm_that_is_left(self, cli: Cli, project: Project) -> None:
        source = GAINS.replace("self.bn(self.act(x))", "self.act(self.bn(x)) + y").replace("(y)", "(y) + y")
        project(source, groups=None, discover=True, inputs=[{"shape": [2, 8]}])
        ended = cli(*FUSE, "--min-folded", "100", "--require-all", *JSON)
        assert ended.code == 0, ended.report["problems"]
        assert "norm" in codes(ended)

    def test_a_norm_that_stays_in_a_container_is_not_folded(self, cli: Cli, project: Project) -> None:
        project(
            PAIR.replace("bn=nn.BatchNorm2d(6)", "bn=nn.BatchNorm2d(6), b=nn.BatchNorm2d(6), r=nn.ReLU()"),
            groups=[["conv", "bn"], ["b", "r"]],
        )
        ended = cli(*FUSE, "--min-folded", "51", *JSON)
        assert ended.code == 4
        assert "1 of 2 norms with running statistics" in ended.report["problems"][0]

    def test_with_nothing_listed(self, cli: Cli, digits: Path) -> None:
        respec()
        ended = cli(*FUSE, "--require-all", *JSON)
        assert (ended.code, ended.report["status"]) == (4, "refused")
        assert len(codes(ended)) == 6
        assert cli(*FUSE).code == 5

    @pytest.mark.parametrize("percent", ["-1", "101", "all"])
    def test_2_no_percentage(self, cli: Cli, digits: Path, percent: str) -> None:
        ended = cli(*FUSE, "--min-folded", percent)
        assert ended.code == 2
        assert "--min-folded" in ended.err


HEAD = ["head.linear", "head.bn", "head.relu"]


class TestKeepGoing:
    def test_without_it_nothing_is_written(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        ended = cli(*FUSE, *JSON)
        assert (ended.code, ended.report["status"]) == (1, "different")
        assert not FUSED.exists()

    def test_the_rest_is_written(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        ended = cli(*FUSE, "--keep-going", *JSON)
        assert (ended.code, ended.report["status"]) == (1, "partly fused")
        assert len(modules(ended)) == 5
        assert {group["status"] for group in ended.report["groups"]} == {"equivalent"}
        (dropped,) = ended.report["refused"]
        assert (dropped["group"], dropped["code"]) == (HEAD, "dropped")
        assert dropped["reason"].startswith("it failed verification: ")
        assert codes(ended) == {"head.bn": "dropped"}
        assert (ended.report["totals"]["before"]["norms"], ended.report["totals"]["after"]["norms"]) == (6, 1)
        assert ended.report["verification"]["judgement"] == "equivalent"
        assert "head.linear + head.bn + head.relu" in ended.err
        assert "dropped" in ended.err

        names: dict[str, Any] = {}
        exec(Path("net.py").read_text(), names)
        original, fused = names["build"](), names["build"]()
        original.load_state_dict(torch.load("model.pt", weights_only=True)["model_state_dict"])
        fused = fusecli.load_fused(fused, FUSED)
        assert isinstance(fused.head.bn, torch.nn.BatchNorm1d)
        assert fusecli.verify(original, fused, torch.rand(4, 1, 8, 8)).equivalent
        _, *step = shlex.split(ended.report["next_step"])
        assert cli(*step, *JSON).report["status"] == "verified"

    def test_the_same_bytes_as_without_the_group(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        assert cli(*FUSE, "--keep-going").code == 1
        edit(digits / "fuse.yaml", ("  - [head.linear, head.bn, head.relu]\n", ""))
        assert cli(*FUSE, "-o", "without.safetensors").code == 0
        assert Path("without.safetensors").read_bytes() == FUSED.read_bytes()

    def test_dry_run(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        ended = cli(*FUSE, "--keep-going", "--dry-run", *JSON)
        assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (1, ["dropped"])
        assert not FUSED.exists()

    def test_nothing_else_is_left(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        text = Path("fuse.yaml").read_text()
        start, end = text.index("groups:"), text.index("extra_mappings:")
        Path("fuse.yaml").write_text(f"{text[:start]}groups: [{HEAD}]\n{text[end:]}".replace("'", ""))
        ended = cli(*FUSE, "--keep-going", *JSON)
        assert (ended.code, ended.report["status"]) == (1, "different")
        assert [no["code"] for no in ended.report["refused"]] == ["dropped"]
        assert not FUSED.exists()

    def test_it_changes_nothing_where_all_is_right(self, cli: Cli, digits: Path) -> None:
        ended = cli(*FUSE, "--keep-going", *JSON)
        assert (ended.code, ended.report["status"], ended.report["refused"]) == (0, "fused", [])

    def test_a_refused_group_stops_all(self, cli: Cli, digits: Path) -> None:
        """What is unsound by the dataflow is the spec's mistake, not a failed proof."""
        wrong_fold(digits)
        edit(digits / "fuse.yaml", ("[up.conv, up.bn, up.act]", "[pool, up.bn]"))
        ended = cli(*FUSE, "--keep-going", *JSON)
        assert (ended.code, [no["group"] for no in ended.report["refused"]]) == (4, [["pool", "up.bn"]])
        assert not FUSED.exists()

    def test_what_is_required_counts_the_dropped(self, cli: Cli, digits: Path) -> None:
        wrong_fold(digits)
        ended = cli(*FUSE, "--keep-going", "--min-folded", "100", *JSON)
        assert ended.code == 4  # a fold was wrong too, but too little is left to write anything
        assert codes(ended) == {"head.bn": "dropped"}
        assert ended.report["problems"][0].startswith("--min-folded 100: 5 of 6")
        assert not FUSED.exists()
