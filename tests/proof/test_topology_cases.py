"""Lists that do not fit the dataflow, believed as where nothing is recorded: the verifier sees every one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Judgement, Verdict
from tests.nets import images
from tests.proof.nets import PAIR, Net, X, bn, consistent, conv, fused, judged, net, straight, verdict


def assert_different(found: Verdict, *culprit: str) -> None:
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, culprit)
    assert consistent(found)


def test_a_list_that_fits_is_equivalent() -> None:
    assert judged(straight(), [*PAIR, "relu"]).equivalent


def crossed() -> Net:
    modules = {"conv1": conv(), "bn1": bn(), "conv2": conv(), "bn2": bn()}
    return Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))), **modules).eval()


def test_case_01_crossed_pairs() -> None:
    model = net(
        lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))), conv1=conv(), bn1=bn(), conv2=conv(), bn2=bn()
    )
    found = judged(model, ["conv1", "bn2"], ["conv2", "bn1"])
    assert_different(found, "conv1", "bn2")
    assert "bn1 ran before conv2" in " ".join(found.reasons)


def test_case_02_crossed_pairs_with_fresh_statistics() -> None:
    found = judged(crossed(), ["conv1", "bn2"], ["conv2", "bn1"])
    assert_different(found, "conv1", "bn2")
    assert found.float64_error is not None
    assert found.float64_error < 1e-9  # the outputs are equal


BETWEEN = {
    "03_relu": lambda m, x: m.bn(F.relu(m.conv(x))),
    "04_max_pool": lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)),
    "05_padded_avg_pool": lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 3, padding=1)),
    "05_zero_pad": lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 1, 1))),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_case_03_to_05_something_between(case: str) -> None:
    assert_different(judged(net(BETWEEN[case], conv=conv(), bn=bn())), *PAIR)


SHARED = {
    "07_conv_called_again_after": lambda m, x: (m.bn(m.conv(x)), m.conv(x)),
    "07_conv_called_again_before": lambda m, x: (m.conv(x), m.bn(m.conv(x)))[1],
    "10_bn_called_again": lambda m, x: (m.bn(m.conv(x)), m.bn(m.other(x))),
    "10_bn_called_before": lambda m, x: m.bn(m.conv(m.bn(m.other(x)))),
    "08_one_conv_two_bns": lambda m, x: (lambda y: (m.bn(y), m.bn2(y)))(m.conv(x)),
    "11_conv_output_returned": lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)),
    "11_conv_output_skips": lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
    "16_weight_used_functionally": lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
    "16_weight_only_used_functionally": lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("head", ["plain", "argmax"])
def test_case_07_08_10_11_16_something_shared(case: str, head: str) -> None:
    def wiring(m: Any, x: Any) -> Any:
        outputs = SHARED[case](m, x)
        if head == "plain":
            return outputs
        return [y.mean((2, 3)).argmax(1) for y in (outputs if isinstance(outputs, tuple) else [outputs])]

    assert_different(judged(net(wiring, conv=conv(), bn=bn(), other=conv(), bn2=bn())), *PAIR)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_case_12_bn_output_feeds_relu_and_a_skip(scale: float) -> None:
    def wiring(m: Any, x: Any) -> Any:
        y = m.bn2(m.conv2(m.bn1(m.conv1(x))))
        return m.bn3(m.conv3(m.relu(y) + scale * y))

    names = {"conv1": conv(), "bn1": bn(), "conv2": conv(), "bn2": bn(), "conv3": conv(), "bn3": bn()}
    groups = [["conv1", "bn1"], ["conv2", "bn2", "relu"], ["conv3", "bn3"]]
    found = judged(net(wiring, relu=nn.ReLU(), **names), *groups)
    assert_different(found, "conv2", "bn2", "relu")
    assert found.reasons[0].startswith("conv2 + bn2 + relu: relative error")
    assert [report.status for report in found.groups] == ["equivalent", "different", "equivalent"]


def test_case_13_one_relu_in_many_places() -> None:
    model = net(
        lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn(m.conv(x)))))),
        **{"conv": conv(), "bn": bn(), "relu": nn.ReLU(), "conv2": conv(), "bn2": bn()},
    )
    assert_different(judged(model, ["conv", "bn", "relu"]), "conv", "bn", "relu")


def aliased() -> Any:
    shared = conv()
    return net(lambda m, x: m.bn(m.a(x)) + m.b(x), a=shared, b=shared, bn=bn())


def tied() -> Any:
    model = net(lambda m, x: m.bn(m.a(x)) + m.b(x), a=conv(), b=conv(), bn=bn())
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize("model", [aliased(), tied()], ids=["aliased", "tied"])
def test_case_14_15_aliased_and_tied(model: Any) -> None:
    wrong = net(lambda m, x: m.bn(m.a(x)) + m.b(x), a=conv(), b=conv(), bn=bn())
    wrong.a.load_state_dict(model.a.state_dict())
    wrong.b.load_state_dict(model.b.state_dict())
    wrong.bn.load_state_dict(model.bn.state_dict())
    folded = fusecli.fuse_modules(wrong, ["a", "bn"])
    with torch.no_grad():
        folded.b.weight.copy_(folded.a.weight)  # the fold has changed both
    assert fusecli.verify(model, folded, X).judgement is Judgement.DIFFERENT
    del folded._fusecli_groups
    assert fusecli.verify(model, folded, X).judgement is Judgement.DIFFERENT


def test_case_19_linear_bn_on_the_wrong_axis() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=nn.Linear(5, 4), bn=nn.BatchNorm1d(4))
    assert_different(judged(model, x=images(3, 4, 5)), *PAIR)


def test_case_23_unbatched_conv1d() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv1d(3, 6, 3, padding=1), bn=nn.BatchNorm1d(6))
    assert_different(judged(model, x=images(3, 6)), *PAIR)


def test_the_first_group_of_the_run_is_named_not_the_first_of_the_list() -> None:
    def wiring(m: Any, x: Any) -> Any:
        return m.bn2(F.relu(m.conv2(m.bn(F.relu(m.conv(x))))))

    model = net(wiring, conv=conv(), bn=bn(), conv2=conv(), bn2=bn())
    assert_different(judged(model, ["conv2", "bn2"], PAIR), *PAIR)


def test_a_forward_that_asks_for_the_class_of_a_module_is_judged_by_its_output() -> None:
    def wiring(m: Any, x: Any) -> Any:
        y = m.bn(m.conv(x))
        return y.exp() if isinstance(m.bn, nn.BatchNorm2d) else y.tanh()

    outcome = fused(net(wiring, conv=conv(), bn=bn()))  # no audit sees what Python asks
    assert (outcome.status, outcome.exit_code, outcome.model) == ("different", ExitCode.DIFFERENT, None)
    assert_different(verdict(outcome), *PAIR)


def test_a_counter_does_not_hide_the_culprit() -> None:
    def wiring(m: Any, x: Any) -> Any:
        m.calls += 1
        y = m.conv2(m.bn(m.conv(x)))
        return (m.bn2(y) + y).mean((2, 3)).argmax(1)

    model = net(wiring, conv=conv(), bn=bn(), conv2=conv(), bn2=bn())
    model.register_buffer("calls", torch.zeros(()))
    assert_different(judged(model, PAIR, ["conv2", "bn2"]), "conv2", "bn2")
