"""Lists against the recorded run: what is refused with which evidence, what folds, and what torch.ao does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecli.engine import Group, plan
from fusecli.errors import ExitCode
from fusecli.graph.record import Run
from fusecli.outcome import Evidence, Outcome, Refusal
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample, tensors_in
from tests.nets import AlwaysDropout, float64, images
from tests.proof.nets import PAIR, Net, X, bn, conv, fused, net, verdict
from tests.rules.side_by_side import relative_error

Look = Callable[[Any, Any], Any]
CROSSED = (["conv", "bn2"], ["conv2", "bn"])


def refusals(model: nn.Module, *groups: list[str], x: Any = X) -> tuple[Refusal, ...]:
    outcome = fused(model, *groups, x=x)
    assert (outcome.status, outcome.exit_code, outcome.model) == ("refused", ExitCode.REFUSED, None)
    assert all(no.reason and no.remedy for no in outcome.refused)
    assert not outcome.groups
    return outcome.refused


def refusal(model: nn.Module, *groups: list[str], x: Any = X) -> Refusal:
    (only,) = refusals(model, *groups, x=x)
    return only


def shown(no: Refusal, *facts: str) -> bool:
    """Whether the evidence holds all of this, and where the group was written."""
    return all(any(fact in line for line in no.evidence) for fact in (*facts, "groups["))


def folded(model: nn.Module, *groups: list[str], x: Any = X) -> Outcome:
    """The outcome of a fold that the run has shown and the verifier has proven."""
    outcome = fused(model, *groups, x=x)
    assert (outcome.status, outcome.refused) == ("fused", ()), verdict(outcome).reasons
    assert all((g.status, g.evidence) == ("equivalent", Evidence.OBSERVED) for g in outcome.groups)
    error = verdict(outcome).float64_error
    assert error is not None
    assert error < 1e-12
    return outcome


@torch.no_grad()
def torch_ao_error(
    torch_ao: Any, model: nn.Module, *groups: list[str], x: Any = X, look: Look = lambda m, x: m(*x)
) -> float:
    """How far what `look` sees of torch.ao's fold is from what it sees of the model, in float64.

    torch.ao says nothing, whatever this is: a warning would be an error here.
    """
    inputs = Sample.of(x).copy(torch.float64).args
    plain = float64(model)
    theirs = torch_ao(float64(model), list(groups or [PAIR]))
    ours, theirs = (look(m, Sample(inputs).copy().args) for m in (plain, theirs))
    pairs = zip(tensors_in(theirs), tensors_in(ours), strict=True)
    return max(relative_error(actual, expected) for actual, expected in pairs)


def pairs_in_a_row(randomised: bool = True) -> Any:
    """conv -> bn -> conv2 -> bn2."""
    modules = {"conv": conv(), "bn": bn(), "conv2": conv(), "bn2": bn()}
    make = net if randomised else Net
    return make(lambda m, x: m.bn2(m.conv2(m.bn(m.conv(x)))), **modules).eval()


@pytest.mark.parametrize("randomised", [True, False], ids=["case_01", "case_02_fresh_statistics"])
def test_case_01_02_crossed_pairs(torch_ao: Any, randomised: bool) -> None:
    model = pairs_in_a_row(randomised)
    first, second = refusals(model, *CROSSED)
    assert (first.group, first.code) == (("conv", "bn2"), "not-adjacent")
    assert shown(first, "aten.native_batch_norm in bn", "bn2 reads what comes from aten.convolution in conv2")
    assert (second.group, second.code) == (("conv2", "bn"), "not-adjacent")
    assert shown(second, "aten.native_batch_norm in bn2", "bn reads what comes from aten.convolution in conv")
    # With fresh statistics no comparison of outputs shows what torch.ao has done.
    error = torch_ao_error(torch_ao, model, *CROSSED)
    assert error > 1e-3 if randomised else error < 1e-9
    assert len(folded(model, PAIR, ["conv2", "bn2"]).groups) == 2


def test_case_02_untrained_statistics_are_called_out() -> None:
    outcomes = fused(pairs_in_a_row(False), PAIR, ["conv2", "bn2"]), fused(pairs_in_a_row(False), *CROSSED)
    for outcome in outcomes:
        assert {entry.where for entry in outcome.ledger if entry.kind == "statistics"} == {"bn", "bn2"}


FORWARD = "the model's forward"
BETWEEN: dict[str, tuple[Any, nn.Module, str]] = {
    "03_relu_function": (lambda m, x: m.bn(F.relu(m.conv(x))), nn.Identity(), f"aten.relu in {FORWARD}"),
    "03_relu": (lambda m, x: m.bn(m.op(m.conv(x))), nn.ReLU(), "aten.relu in op"),
    "03_relu_in_place": (lambda m, x: m.bn(m.op(m.conv(x))), nn.ReLU(inplace=True), "aten.relu_ in op"),
    "04_max_pool": (
        lambda m, x: m.bn(m.op(m.conv(x))),
        nn.MaxPool2d(2),
        "aten.max_pool2d_with_indices in op",
    ),
    "05_avg_pool": (lambda m, x: m.bn(m.op(m.conv(x))), nn.AvgPool2d(3, 1, 1), "aten.avg_pool2d in op"),
    "05_zero_pad": (lambda m, x: m.bn(m.op(m.conv(x))), nn.ZeroPad2d(1), "aten.constant_pad_nd in op"),
    "05_pad_function": (
        lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 1, 1))),
        nn.Identity(),
        f"aten.constant_pad_nd in {FORWARD}",
    ),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_case_03_to_05_something_between(torch_ao: Any, case: str) -> None:
    wiring, op, between = BETWEEN[case]
    model = net(wiring, conv=conv(), bn=bn(), op=op)
    no = refusal(model)
    assert (no.code, shown(no, between)) == ("not-adjacent", True)
    assert torch_ao_error(torch_ao, model) > 1e-3


def test_case_04_max_pool_behind_positive_gammas_is_luck(torch_ao: Any) -> None:
    model = net(BETWEEN["04_max_pool"][0], conv=conv(), bn=bn(), op=nn.MaxPool2d(2))
    model.bn.weight.data.abs_()
    assert torch_ao_error(torch_ao, model) < 1e-12
    assert refusal(model).code == "not-adjacent"


NOTHING: dict[str, Any] = {
    "modules": lambda m, x: m.bn(m.drop(m.same(m.conv(x)))),
    "function": lambda m, x: m.bn(F.dropout(m.conv(x), training=m.training)),
    "views": lambda m, x: m.bn(m.conv(x).flatten(2).clone().view(2, 3, 8, 8).contiguous()),
}


@pytest.mark.parametrize("between", NOTHING)
def test_case_06_nothing_between(between: str) -> None:
    model = net(NOTHING[between], conv=conv(), bn=bn(), same=nn.Identity(), drop=nn.Dropout(0.9))
    assert folded(model).groups[0].kept == ()


def test_case_06_listed(torch_ao: Any) -> None:
    modules = {"conv": conv(), "same": nn.Identity(), "drop": nn.Dropout(0.9), "bn": bn()}
    model = net(NOTHING["modules"], **modules)
    assert folded(model, list(modules)).groups[0].kept == ("same", "drop")
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch_ao(model, list(modules))


def test_case_06_a_dropout_that_never_stops() -> None:
    model = net(lambda m, x: m.bn(m.drop(m.conv(x))), conv=conv(), bn=bn(), drop=AlwaysDropout())
    no = refusal(model)
    assert (no.code, shown(no, "aten.mul in drop")) == ("not-adjacent", True)


# The wiring, the module that is shared, and what is seen of its other use.
SHARED: dict[str, tuple[Any, str, str]] = {
    "07_called_again_after": (
        lambda m, x: (m.bn(m.conv(x)), m.conv(x).sigmoid()),
        "conv",
        f"aten.sigmoid in {FORWARD}",
    ),
    "07_called_before": (
        lambda m, x: m.bn(m.conv(m.relu(m.conv(x)))),
        "conv",
        "aten.relu in relu",
    ),
    "07_called_again_behind_the_norm": (
        lambda m, x: m.conv(m.bn(m.conv(x))),
        "conv",
        "the model's output",
    ),
    "08_one_call_two_norms": (
        lambda m, x: (lambda y: (m.bn(y), m.bn2(y)))(m.conv(x)),
        "conv",
        "aten.native_batch_norm in bn2",
    ),
    "08_two_calls_two_norms": (
        lambda m, x: (m.bn(m.conv(x)), m.bn2(m.conv(x + 1))),
        "conv",
        "aten.native_batch_norm in bn2",
    ),
    "10_called_again_after": (
        lambda m, x: (m.bn(m.conv(x)), m.bn(m.other(x))),
        "bn",
        "aten.convolution in other",
    ),
    "10_called_before": (
        lambda m, x: m.bn(m.conv(m.bn(m.other(x)))),
        "bn",
        "aten.convolution in other",
    ),
}


def sharing(case: str) -> Any:
    return net(SHARED[case][0], conv=conv(), bn=bn(), bn2=bn(), other=conv(), relu=nn.ReLU())


@pytest.mark.parametrize("case", SHARED)
def test_case_07_08_10_a_shared_module(torch_ao: Any, case: str) -> None:
    _, shared, elsewhere = SHARED[case]
    no = refusal(sharing(case))
    assert (no.code, no.reason.split()[0]) == ("shared-module", shared)
    assert shown(no, elsewhere)
    assert torch_ao_error(torch_ao, sharing(case)) > 1e-3


SIAMESE: dict[str, Any] = {
    "one_after_the_other": lambda m, a, b: (m.bn(m.conv(a)), m.bn(m.conv(b))),
    "interleaved": lambda m, a, b: (lambda p, q: (m.bn(p), m.bn(q)))(m.conv(a), m.conv(b)),
    "in_reversed_order": lambda m, a, b: (lambda p, q: (m.bn(q), m.bn(p)))(m.conv(a), m.conv(b)),
    "one_behind_the_other": lambda m, a, b: m.bn(m.conv(m.bn(m.conv(a)) + b)),
}


@pytest.mark.parametrize("case", SIAMESE)
def test_case_09_the_same_pair_twice_is_folded_once(case: str) -> None:
    model, x = net(SIAMESE[case], conv=conv(), bn=bn()), (X, images(2, 3, 8, 8, seed=5))
    outcome = folded(model, x=x)
    assert len(outcome.groups) == 1
    assert type(outcome.model.bn) is nn.Identity
    for actual, expected in zip(outcome.model(*x), model(*x), strict=True):
        assert relative_error(actual, expected) < 1e-5


def keep(m: Any, x: Tensor) -> Tensor:
    m.feat = m.conv(x)
    return m.bn(m.feat)


CONSUMERS: dict[str, tuple[Any, str]] = {
    "skip": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), f"aten.add in {FORWARD}"),
    "output": (lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)), "the model's output"),
    "kept_on_self": (keep, "kept after the run as feat"),
    "data": (lambda m, x: (lambda y: m.bn(y).sigmoid() * y.data)(m.conv(x)), f"aten.mul in {FORWARD}"),
    "numpy": (
        lambda m, x: (lambda y: m.bn(y) * float(y.detach().numpy().mean()))(m.conv(x)),
        f"Tensor.numpy in {FORWARD}",
    ),
    "in_place": (lambda m, x: (lambda y: (m.bn(y), y.add_(1)))(m.conv(x)), f"aten.add_ in {FORWARD}"),
    # The norm's output is memory of its own, but once the norm is an identity it is the layer's.
    "in_place_unread": (
        lambda m, x: (lambda y: (m.bn(y), y.add_(1)))(m.conv(x))[0],
        f"aten.add_ in {FORWARD}",
    ),
}


@pytest.mark.parametrize("case", CONSUMERS)
def test_case_11_somebody_else_reads_what_the_conv_gives(torch_ao: Any, case: str) -> None:
    wiring, reader = CONSUMERS[case]
    model = net(wiring, conv=conv(), bn=bn())
    no = refusal(model)
    assert (no.code, shown(no, reader)) == ("multiple-consumers", True)

    def look(m: Any, x: Any) -> Any:
        return m(*x), getattr(m, "feat", None)

    assert torch_ao_error(torch_ao, model, look=look) > 1e-3


@pytest.mark.parametrize("where", ["conv", "bn"])
def test_case_11_a_hook_that_keeps_what_it_sees(torch_ao: Any, where: str) -> None:
    model, seen = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()), list[Tensor]()
    if where == "conv":
        model.conv.register_forward_hook(lambda _, __, output: seen.append(output))
    else:
        model.bn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    no = refusal(model)
    assert (no.code, shown(no, "kept after the run by a hook")) == ("multiple-consumers", True)

    model(X)
    (right,), theirs = seen[-1:], torch_ao(model, PAIR)
    seen.clear()
    theirs(X)
    # torch.ao gives the one hook what the norm would have given, and drops the other.
    assert len(seen) == (where == "conv")
    assert all(relative_error(wrong, right.double()) > 1e-3 for wrong in seen)


def test_case_11_a_hook_that_keeps_nothing_is_no_reader() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    model.conv.register_forward_hook(lambda _, __, output: None)
    assert folded(model).groups[0].rule == "conv_bn"


def relu_and_skip(m: Any, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    return m.relu(y) + y


def test_case_12_the_norm_feeds_relu_and_a_skip(torch_ao: Any) -> None:
    model, group = net(relu_and_skip, conv=conv(), bn=bn(), relu=nn.ReLU()), [*PAIR, "relu"]
    outcome = fused(model, group)
    (report,) = outcome.groups
    assert (report.rule, report.status, report.evidence) == ("conv_bn", "equivalent", Evidence.OBSERVED)
    assert report.kept == ("relu",)
    assert any("relu stays" in note and "not the only one" in note for note in report.notes)
    assert [type(getattr(outcome.model, name)) for name in group] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert torch_ao_error(torch_ao, model, group) > 1e-3


def test_case_12_in_place_the_skip_reads_what_the_relu_gives() -> None:
    model = net(relu_and_skip, conv=conv(), bn=bn(), relu=nn.ReLU(inplace=True))
    assert folded(model, [*PAIR, "relu"]).groups[0].rule == "conv_bn_relu"


def test_case_13_one_relu_in_many_places(torch_ao: Any) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.relu(m.bn2(m.conv2(m.relu(m.bn(m.conv(x))))))
        return y

    model = net(wiring, conv=conv(), bn=bn(), conv2=conv(), bn2=bn(), relu=nn.ReLU())
    no = refusal(model, [*PAIR, "relu"])
    assert (no.code, no.reason.split()[0]) == ("shared-module", "relu")
    assert shown(no, "aten.native_batch_norm in bn2")
    assert torch_ao_error(torch_ao, model, [*PAIR, "relu"]) > 1e-3
    assert len(folded(model, PAIR, ["conv2", "bn2"]).groups) == 2


def both(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x)), m.twin(x)


def test_case_14_an_alias(torch_ao: Any) -> None:
    shared = conv()
    model = net(both, conv=shared, twin=shared, bn=bn())
    no = refusal(model)
    assert (no.code, no.reason.split()[0]) == ("shared-module", "conv")
    # torch.ao makes two layers out of one, the second of them with the weights as they were.
    theirs = torch_ao(model, PAIR)
    assert theirs.twin is not theirs.conv
    assert torch.equal(theirs.twin.weight, model.conv.weight)


def test_case_15_tied_weights(torch_ao: Any) -> None:
    model = net(both, conv=conv(), twin=conv(), bn=bn())
    model.twin.weight = model.conv.weight
    no = refusal(model)
    assert (no.code, shown(no, "conv.weight is also twin.weight")) == ("tied-weights", True)
    theirs = torch_ao(model, PAIR)  # unties them without a word
    assert theirs.twin.weight is not theirs.conv.weight


def test_case_16_a_weight_that_a_function_reads_too(torch_ao: Any) -> None:
    def wiring(m: Any, x: Tensor) -> Any:
        return m.bn(m.conv(x)), F.conv2d(x, m.conv.weight, padding=1)

    model = net(wiring, conv=conv(), bn=bn())
    no = refusal(model)
    assert (no.code, shown(no, f"aten.convolution in {FORWARD}")) == ("shared-weight", True)
    assert torch_ao_error(torch_ao, model) > 1e-3


def test_case_16_a_weight_that_only_a_function_reads(torch_ao: Any) -> None:
    def wiring(m: Any, x: Tensor) -> Any:
        return m.bn(F.conv2d(x, m.conv.weight, padding=1))

    model = net(wiring, conv=conv(bias=False), bn=bn())
    no = refusal(model)
    assert (no.code, shown(no, f"aten.convolution in {FORWARD}")) == ("functional-layer", True)
    assert torch_ao_error(torch_ao, model) > 1e-3


LINEAR: dict[str, tuple[Any, tuple[int, ...]]] = {
    "nc": (lambda m, x: m.bn(m.conv(x)), (3, 5)),
    "n1c_viewed": (lambda m, x: m.bn(m.conv(x).view(-1, 4)), (3, 1, 5)),
    "nlc_flattened": (lambda m, x: m.bn(m.conv(x).flatten(0, 1)), (3, 4, 5)),
    "nlc_transposed": (lambda m, x: m.bn(m.conv(x).transpose(1, 2)), (3, 4, 5)),
}
WRONG_AXIS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "nlc": (lambda m, x: m.bn(m.conv(x)), (3, 4, 5)),
    "nlc_viewed": (lambda m, x: m.bn(m.conv(x).view(-1, 4, 2)), (6, 5)),
}


def linear(wiring: Any) -> Any:
    return net(wiring, conv=nn.Linear(5, 4), bn=nn.BatchNorm1d(4))


@pytest.mark.parametrize("case", WRONG_AXIS)
def test_case_19_linear_with_the_norm_on_another_axis(torch_ao: Any, case: str) -> None:
    wiring, shape = WRONG_AXIS[case]
    no = refusal(linear(wiring), x=images(*shape))
    assert (no.code, shown(no, "normalises axis 1")) == ("bn-axis", True)
    assert torch_ao_error(torch_ao, linear(wiring), x=images(*shape)) > 1e-3


@pytest.mark.parametrize("case", LINEAR)
def test_case_19_linear_with_the_norm_on_its_channels(case: str) -> None:
    wiring, shape = LINEAR[case]
    assert folded(linear(wiring), x=images(*shape)).groups[0].rule == "linear_bn"


def test_case_23_unbatched_conv1d(torch_ao: Any) -> None:
    modules = {"conv": nn.Conv1d(3, 6, 3, padding=1), "bn": nn.BatchNorm1d(6)}
    model = net(lambda m, x: m.bn(m.conv(x)), **modules)
    no = refusal(model, x=images(3, 6))
    assert (no.code, shown(no, "normalises axis 1")) == ("bn-axis", True)
    assert torch_ao_error(torch_ao, model, x=images(3, 6)) > 1e-3
    assert folded(model, x=images(2, 3, 6)).groups[0].rule == "conv_bn"


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm([8, 8]), nn.GroupNorm(3, 3), nn.InstanceNorm2d(3), nn.LocalResponseNorm(2)],
    ids=lambda norm: type(norm).__name__,
)
def test_case_32_a_norm_that_depends_on_the_input(torch_ao: Any, norm: nn.Module) -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=norm)
    no = refusal(model)
    assert (no.code, shown(no)) == ("batch-dependent", True)
    assert type(norm).__name__.startswith(no.reason.split()[0])  # what the norm is
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch_ao(model, PAIR)


UNSOUND: dict[str, tuple[Any, str]] = {
    **{f"case_{case}": (wiring, "shared-module") for case, (wiring, *_) in SHARED.items()},
    **{
        f"case_{case}": (BETWEEN[case][0], "not-adjacent") for case in ("03_relu_function", "05_pad_function")
    },
    **{f"case_11_{case}": (CONSUMERS[case][0], "multiple-consumers") for case in ("skip", "output", "data")},
}


@pytest.mark.parametrize("case", UNSOUND)
def test_the_audit_comes_before_any_weight(case: str) -> None:
    wiring, code = UNSOUND[case]
    modules = {"conv": conv(), "bn": bn(), "bn2": bn(), "other": conv(), "relu": nn.ReLU()}
    model = net(wiring, **modules)
    structure = copy.deepcopy(model).to("meta")
    run = Run(structure, Sample.of(X), numbers=lambda: copy.deepcopy(model))
    planned = plan(ModuleTree(structure), [Group(("conv", "bn"))], run=run)
    assert ([no.code for no in planned.refused], planned.decisions) == ([code], ())
