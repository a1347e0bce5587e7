"""Blocks with branches become one convolution, whatever their class is; and classes that do it themselves."""

from __future__ import annotations

import copy
import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode
from fusecli.graph.record import Run
from fusecli.outcome import Outcome
from fusecli.sample import Sample
from tests import reparameterised
from tests.conftest import Cli
from tests.nets import float64, images, randomise
from tests.proof.nets import X, bn, conv, net
from tests.reparameterised import BLOCKS, NETWORKS, WIDTH, build
from tests.rules.side_by_side import relative_error
from tests.rules.wired import classes, folded, left, refusal

relu = torch.relu
INPUT = images(2, WIDTH, 15, 14)
PICTURES = images(2, 3, 17, 16)


def trained(make: Callable[[], nn.Module]) -> Any:
    return randomise(make(), 0)


def ops(model: nn.Module, x: Tensor) -> Counter[str]:
    """How often one forward calls each op."""
    recording = Run(model, Sample.of(x), lambda: copy.deepcopy(model)).recording
    return Counter(call.name for call in recording.calls if recording.alive[call.number])


def discovered(model: nn.Module, x: Tensor) -> Outcome:
    """In float64, where it is the same function to rounding."""
    twin, exact = float64(model), x.double()
    outcome = fusecli.fuse(twin, exact, discover=True)
    assert outcome.status == "fused", (outcome.verification, outcome.unfused)
    assert relative_error(outcome.model(exact), twin(exact)) < 1e-12
    return outcome


@pytest.mark.parametrize("case", BLOCKS)
def test_one_convolution_is_left(case: str) -> None:
    model = trained(BLOCKS[case])
    outcome = discovered(model, INPUT)
    (group,) = outcome.groups
    assert group.evidence == "observed"
    assert outcome.unfused == ()
    after = ops(outcome.model, INPUT.double())
    assert (after["aten.convolution"], after["aten.native_batch_norm"], after["aten.mul"]) == (1, 0, 0)
    weight, bias = outcome.model.state_dict().values()
    assert (weight.ndim, bias.ndim) == (4, 1)
    before, now = outcome.totals_before, outcome.totals_after
    assert before is not None
    assert now is not None
    assert now.parameters == weight.numel() + bias.numel() < before.parameters
    assert before.ops is not None
    assert now.ops is not None
    assert now.ops < before.ops
    assert not [entry for entry in outcome.ledger if entry.kind == "bare-identity"]


@pytest.mark.parametrize("case", BLOCKS)
def test_in_the_stored_dtype(case: str) -> None:
    model = trained(BLOCKS[case])
    outcome = fusecli.fuse(model, INPUT, discover=True)
    assert outcome.status == "fused", outcome.verification
    again = fusecli.fuse(outcome.model, INPUT, discover=True)
    assert (again.exit_code, again.groups) == (ExitCode.NOTHING, ())


def test_each_new_bias_is_named_once() -> None:
    outcome = discovered(trained(BLOCKS["repvgg"]), INPUT)
    assert [entry.where for entry in outcome.ledger] == ["rbr_dense.conv.bias"]


def test_a_branch_of_two_layers_stays_a_branch() -> None:
    model = trained(lambda: reparameterised.DiverseBranchBlock(WIDTH, 6))
    outcome = discovered(model, INPUT)
    assert classes(outcome.model, "origin.conv", "origin.bn", "point.conv") == ["Conv2d", "Identity", "Zero"]
    after = ops(outcome.model, INPUT.double())
    assert (after["aten.convolution"], after["aten.native_batch_norm"]) == (3, 0)


SKIPS: dict[str, Callable[[Any, Tensor], Any]] = {
    "before": lambda m, x: relu(m.skip(x) + m.layer(x)),
    "behind": lambda m, x: relu(m.layer(x) + m.skip(x)),
    "of a value that is computed": lambda m, x: relu(m.skip(y := x.sigmoid()) + m.layer(y)),
}


@pytest.mark.parametrize("case", SKIPS)
def test_an_identity_wherever_it_is_called(case: str) -> None:
    order = "layer skip" if case == "behind" else "skip layer"
    model = net(SKIPS[case], skip=nn.Identity(), layer=conv(bias=False))
    once = folded(model, X, "parallel_norm", order)
    assert classes(once, "skip", "layer") == ["Zero", "Conv2d"]


READ: dict[str, Callable[[Any, Tensor], Any]] = {
    "by the layer": lambda m, x: relu((y := m.skip(x)) + m.layer(y)),
    "in place": lambda m, x: relu((y := m.skip(x + 0)).add_(m.layer(y))),
    "detached": lambda m, x: relu((y := m.skip(x)) + m.layer(y.detach())),
    "by something else": lambda m, x: relu((y := m.skip(x)) + m.layer(x)) * y.mean(),
    "as the output": lambda m, x: (relu((y := m.skip(x)) + m.layer(x)), y),
}


@pytest.mark.parametrize("case", READ)
def test_an_identity_that_is_read_elsewhere_stays(case: str) -> None:
    """A zero in its place would reach the other reader."""
    model = net(READ[case], skip=nn.Identity(), layer=conv())
    left(model, X)
    refusal(model, X, ["skip", "layer"])


class TestBareIdentity:
    @pytest.mark.parametrize("swapped", [False, True])
    def test_it_stays_and_is_named(self, swapped: bool) -> None:
        wiring = lambda m, x: relu(x + m.bn(m.layer(x)) if swapped else m.bn(m.layer(x)) + x)  # noqa: E731
        outcome = discovered(net(wiring, layer=conv(), bn=bn()), X)
        (bare,) = [entry for entry in outcome.ledger if entry.kind == "bare-identity"]
        assert bare.where == "layer"
        assert outcome.groups[0].rule == "conv_bn"
        assert ops(outcome.model, X.double())["aten.add"] == 1

    def test_alone_there_is_nothing_to_fold(self) -> None:
        model = net(lambda m, x: relu(m.layer(x) + x), layer=conv())
        left(model, X)
        outcome = fusecli.fuse(model, X, discover=True)
        assert [(entry.kind, entry.where) for entry in outcome.ledger] == [("bare-identity", "layer")]

    def test_other_branches_are_folded_beside_it(self) -> None:
        wiring = lambda m, x: relu(m.a(x) + x + m.b(x))  # noqa: E731
        outcome = discovered(net(wiring, a=conv(), b=nn.Conv2d(3, 3, 1)), X)
        assert ops(outcome.model, X.double())["aten.convolution"] == 1
        assert [entry.where for entry in outcome.ledger if entry.kind == "bare-identity"] == ["a"]


FUSED = Path("model.fused.safetensors")
RUN = ("--input", "2x3x17x16")
JSON = ("--report", "json=-")
Save = Callable[[str], Any]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Puts net.py and model.pt, a network by its name, into the working folder; returns the network."""
    monkeypatch.chdir(tmp_path)

    def save(network: str) -> Any:
        Path("net.py").write_text(Path(reparameterised.__file__).read_text())
        model = trained(NETWORKS[network])
        torch.save(model.state_dict(), "model.pt")
        return model

    return save


@pytest.mark.parametrize("network", ["repvgg", "mobileone", "residual"])
class TestFromTheCommandLine:
    def test_it_is_proven_counted_and_loaded(self, cli: Cli, saved: Save, network: str) -> None:
        model = saved(network)
        words = ("--model", f"net.py:build(network={network!r})", *RUN)
        ended = cli("fuse", "model.pt", "--discover", *words, *JSON)
        assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
        totals = ended.report["totals"]
        assert ended.report["verification"]["float64_error"] < 1e-9
        program, *step = shlex.split(ended.report["next_step"])
        assert (program, cli(*step).code) == ("fusecli", 0)
        fused = fusecli.load_fused(build(network), FUSED)
        blocks = sum(isinstance(child, nn.Module) for child in model)
        assert ops(fused, PICTURES)["aten.convolution"] == blocks
        assert totals["after"]["parameters"] == sum(p.numel() for p in fused.parameters())
        assert totals["before"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert totals["after"]["ops"] < totals["before"]["ops"]
        assert totals["after"]["norms"] == 0
        assert relative_error(fused(PICTURES), float64(model)(PICTURES.double())) < 1e-5

    def test_people_see_the_counts(self, cli: Cli, saved: Save, network: str) -> None:
        saved(network)
        words = ("--model", f"net.py:build(network={network!r})", *RUN)
        totals = cli("fuse", "model.pt", "--discover", *words, "--dry-run", *JSON).report["totals"]
        ended = cli("fuse", "model.pt", "--discover", *words)
        assert ended.code == 0
        said = {" ".join(line.split()) for line in ended.out.splitlines()}
        for label, key in (("parameters", "parameters"), ("op calls", "ops")):
            numbers = [f"{totals[when][key]:,}" for when in ("before", "after")]
            assert any(line.startswith(label) and all(n in line for n in numbers) for line in said), said


def test_a_bare_identity_where_nothing_else_is_folded(cli: Cli, saved: Save) -> None:
    saved("bare")
    ended = cli("fuse", "model.pt", "--discover", "--model", "net.py:build(network='bare')", *RUN, *JSON)
    assert (ended.code, ended.report["status"]) == (5, "nothing to fuse")
    lost = [entry for entry in ended.report["ledger"] if entry["kind"] != "consent"]
    assert [(entry["kind"], entry["where"]) for entry in lost] == [("bare-identity", "0.conv")]
    assert not FUSED.exists()


def test_a_bare_identity_from_the_command_line(cli: Cli, saved: Save) -> None:
    saved("residual")
    ended = cli("fuse", "model.pt", "--discover", "--model", "net.py:build(network='residual')", *RUN, *JSON)
    bare = [entry["where"] for entry in ended.report["ledger"] if entry["kind"] == "bare-identity"]
    assert (ended.code, bare) == (0, ["2.branch.conv"])


def write_spec(network: str, block: str, *groups: list[str]) -> tuple[str, ...]:
    """A spec in which blocks of one class are deployed by their own method; the words to use it."""
    spec = {
        "version": 1,
        "model": {"factory": "tests.reparameterised:build", "kwargs": {"network": network}},
        "inputs": [{"shape": list(PICTURES.shape)}],
        "groups": list(groups),
        "extra_mappings": [{"sequence": [f"tests.reparameterised.{block}"], "fuser": "net.py:deploy"}],
    }
    Path("fuse.yaml").write_text(json.dumps(spec))
    return ("--spec", "fuse.yaml", "--allow-code", "net.py", "--allow-code", "tests")


class TestAClassThatDeploysItself:
    def test_it_is_verified_like_everything_else(self, cli: Cli, saved: Save) -> None:
        model = saved("deployable")
        words = write_spec("deployable", "Deployable", ["1"], ["3"])
        ended = cli("fuse", "model.pt", *words, *JSON)
        assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
        assert [(g["modules"], g["rule"]) for g in ended.report["groups"]] == [
            (["1"], "net.py:deploy"),
            (["3"], "net.py:deploy"),
        ]
        assert all(group["float64_error"] < 1e-9 for group in ended.report["groups"])
        assert cli("verify", "model.pt", FUSED, *words).code == 0
        fused: Any = fusecli.load_fused(build("deployable"), FUSED, allow_code=["net.py"])
        assert ops(fused, PICTURES)["aten.convolution"] == 3
        assert relative_error(fused(PICTURES), float64(model)(PICTURES.double())) < 1e-5

    def test_a_wrong_one_is_different(self, cli: Cli, saved: Save) -> None:
        saved("wrongly deployable")
        words = write_spec("wrongly deployable", "WronglyDeployable", ["1"])
        ended = cli("fuse", "model.pt", *words, *JSON)
        assert (ended.code, ended.report["status"]) == (1, "different"), ended.err
        assert not FUSED.exists()

    def test_another_class_is_none_of_its_business(self, cli: Cli, saved: Save) -> None:
        saved("deployable")
        words = write_spec("deployable", "Deployable", ["1"], ["0"])
        ended = cli("fuse", "model.pt", *words, *JSON)
        (no,) = ended.report["refused"]
        assert (ended.code, no["group"], no["code"]) == (4, ["0"], "no-rule")
        assert not FUSED.exists()

    def test_without_a_fuser_a_name_alone_is_a_slip(self, cli: Cli, saved: Save) -> None:
        saved("deployable")
        words = write_spec("deployable", "Deployable", ["1"])
        spec = json.loads(Path("fuse.yaml").read_text())
        del spec["extra_mappings"]
        Path("fuse.yaml").write_text(json.dumps(spec))
        ended = cli("fuse", "model.pt", *words)
        assert ended.code == 2
        assert "a group needs at least two names" in ended.err
