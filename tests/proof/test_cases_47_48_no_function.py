"""Models that are no function of their input, and inputs that do not reach a group."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Judgement
from tests.proof.nets import X, bn, changed, consistent, conv, fused, judged, net, right_fold, verdict


def with_head(head: Callable[[Any, Tensor], Any]) -> Any:
    model = net(lambda m, x: head(m, m.bn(m.conv(x))), conv=conv(), bn=bn())
    model.register_buffer("calls", torch.zeros(()))
    return model


def counting(m: Any, y: Tensor) -> Tensor:
    m.calls += 1
    return y


def drifting(m: Any, y: Tensor) -> Tensor:
    m.calls += 1
    return y * m.calls


def remembering(m: Any, y: Tensor) -> Tensor:
    m.seen = getattr(m, "seen", 0) + 1
    return y * m.seen


ERRATIC = {
    "dropout": (lambda m, y: F.dropout(y, 0.5, training=True), "draws random numbers"),
    "rand": (lambda m, y: y + torch.rand(3, 1, 1), "draws random numbers"),
    "noise_of_ulps": (lambda m, y: y * (1 + 1e-8 * torch.rand(())), "draws random numbers"),
    "python": (lambda m, y: y * random.random(), "draws random numbers"),
    "numpy": (lambda m, y: y * float(np.random.rand()), "draws random numbers"),
    "unseeded": (lambda m, y: y * float(np.random.default_rng().random()), "no seed controls"),
    "buffer": (drifting, "writes to its buffers calls"),
    "attribute": (remembering, "keeps a state outside its buffers"),
    "nan": (lambda m, y: (y - y) / (y - y), "returns NaN"),
}


@pytest.mark.parametrize("case", ERRATIC)
def test_case_47_a_model_that_disagrees_with_itself_is_named(case: str) -> None:
    head, cause = ERRATIC[case]
    outcome = fused(with_head(head))
    assert (outcome.status, outcome.exit_code) == ("inconclusive", ExitCode.INCONCLUSIVE)
    assert cause in verdict(outcome).reasons[0]
    assert outcome.groups[0].status == "equivalent"
    assert consistent(verdict(outcome))


def test_case_47_a_wrong_group_of_an_erratic_model_is_still_different() -> None:
    model = net(lambda m, x: torch.rand(3, 1, 1) + m.bn(F.relu(m.conv(x))), conv=conv(), bn=bn())
    found = judged(model)
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, ("conv", "bn"))
    assert consistent(found)


@pytest.mark.parametrize("head", [counting, lambda m, y: y.add_(1)])
def test_case_47_a_state_that_no_output_shows_is_fine(head: Any) -> None:
    assert fused(with_head(head)).status == "fused"


def test_case_47_forward_writes_to_its_input() -> None:
    x = X.clone()
    assert (
        fused(net(lambda m, x: m.bn(m.conv(x.mul_(2).add_(1))), conv=conv(), bn=bn()), x=x).status == "fused"
    )
    assert torch.equal(x, X)


def test_case_48_a_group_that_never_runs() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return m.bn2(m.conv2(y)) if y.shape[0] > 99 else y

    model = net(wiring, conv=conv(), bn=bn(), conv2=conv(), bn2=bn())
    outcome = fused(model, ["conv", "bn"], ["conv2", "bn2"])
    assert outcome.exit_code is ExitCode.INCONCLUSIVE
    assert verdict(outcome).reasons == ("conv2 + bn2: the inputs never executed it",)
    assert [report.status for report in outcome.groups] == ["equivalent", "inconclusive"]
    assert outcome.groups[1].float64_error is None
    assert consistent(verdict(outcome))


def test_case_48_nan_inside_hides_nothing() -> None:
    """A group is compared as a function, not on what one input happened to excite."""
    model = net(lambda m, x: m.bn(m.conv(x / 0 * 0)).nan_to_num() + x, conv=conv(), bn=bn())
    right = right_fold(model)
    wrong = changed(right, "conv.weight", lambda w: w[0].mul_(1.001))
    found = fusecli.verify(model, wrong, X)
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, ("conv", "bn"))
    assert consistent(found)
