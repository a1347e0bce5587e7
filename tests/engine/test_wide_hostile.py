"""What a hostile reading found in the folds that are no chain: each was wrong, or offered and not sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from tests.nets import randomise
from tests.proof.nets import X, bn, conv, net


def groups(model: Any, x: Any = X) -> list[tuple[str, ...]]:
    """What plan offers: no proof stands behind it."""
    return list(fusecli.plan(model, x).groups)


def same(model: Any, *inputs: Tensor) -> None:
    """What is fused on the first input is right on the others too."""
    outcome = fusecli.fuse(model, inputs[0], discover=True)
    fused = model if outcome.model is None else outcome.model
    for x in inputs:
        with torch.no_grad():
            assert torch.allclose(fused.double()(x.double()), model.double()(x.double()), atol=1e-5), x.shape


class Scaled(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.g = how, nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        return self.how(self, y)


@pytest.mark.parametrize(
    "how",
    [
        lambda m, y: y * m.g / y.shape[-1],
        lambda m, y: y * (m.g / y.shape[-1]),
        lambda m, y: y * m.g * torch.full((), float(y.shape[-1])),
        lambda m, y: y * m.g + torch.full((3, 1, 1), float(y.shape[0])),
        lambda m, y: y * m.g + torch.arange(y.shape[-1]),
        lambda m, y: y * m.g * torch.tensor(2.0),
        lambda m, y: y * m.g + y.numel(),
    ],
)
def test_numbers_that_come_from_a_size(how: Any) -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 3, 1), Scaled(how), nn.Tanh(), Scaled(how), nn.Conv2d(3, 2, 1)), 0
    )
    same(model, torch.randn(2, 3, 5, 5), torch.randn(1, 3, 4, 3), torch.randn(3, 3, 1, 2))


def test_a_literal_that_is_always_the_same_is_part_of_the_scale() -> None:
    half = Scaled(lambda m, y: 0.5 * y * (1 + m.g))
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), half, nn.Tanh()), 0)
    assert groups(model) == [("0", "1")]
    same(model, X, torch.randn(1, 3, 4, 3))


def test_a_norm_on_more_than_layers_give() -> None:
    def with_zeros(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.tanh(m.bn(torch.cat([y, torch.zeros_like(y)], 1)))

    def with_constants(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.bn(torch.cat([m.a(x), torch.zeros(2, 3, 8, 8)], 1)))

    for wiring in (with_zeros, with_constants):
        assert groups(net(wiring, a=conv(), bn=bn(6))) == []


def test_casts_stay_between() -> None:
    rounded = net(lambda m, x: torch.tanh(m.bn(m.a(x).long().float())), a=conv(), bn=bn())
    assert groups(rounded) == []
    narrow = net(
        lambda m, x: m.b(m.bn(torch.tanh(x)).half().float()), bn=bn(), b=conv(3, 3, padding_mode="reflect")
    )
    assert groups(narrow) == []


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        (lambda m, x: (lambda u: torch.cat([u, u + m.c(x)], 1))(m.a(x) + torch.relu(x)), []),
        (lambda m, x: (lambda u: torch.cat([u, u + m.c(x)], 1))(m.a(x) + m.b(x)), [("a", "b")]),
        (lambda m, x: (lambda y: y + y + m.b(x))(m.a(x)), []),
        (lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), []),
        (lambda m, x: m.a(x) - m.b(x), []),
        (lambda m, x: sum([m.a(x), m.b(x), m.c(x)]), [("a", "b", "c")]),
    ],
)
def test_sums(wiring: Any, expected: list[tuple[str, ...]]) -> None:
    model = net(lambda m, x: torch.tanh(wiring(m, x)), a=conv(), b=conv(), c=conv())
    assert groups(model) == expected
    same(model, X, torch.randn(1, 3, 5, 4))


def test_a_scale_that_is_undone_in_another_call() -> None:
    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.b = nn.Parameter(torch.rand(3, 1, 1)), nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor, back: bool = False) -> Tensor:
            return (x - self.b) / self.g if back else x * self.g + self.b

    assert (
        groups(net(lambda m, x: m.n(m.d(torch.tanh(m.n(m.c(x)))), True), n=Act(), c=conv(), d=conv())) == []
    )


def test_a_branch_that_is_called_by_keyword() -> None:
    model = net(lambda m, x: torch.tanh(m.a(x) + m.b(input=x)), a=conv(), b=conv())
    outcome = fusecli.fuse(model, X, discover=True)
    assert (outcome.status, [g.modules for g in outcome.groups]) == ("fused", [("a", "b")])


def test_memory_that_is_written_to_later() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(x)
        y = m.bn(h)
        h.add_(1)
        z: Tensor = m.b(y) + h
        return z

    assert groups(net(wiring, bn=bn(), b=nn.Conv2d(3, 3, 1))) == []


def test_forward_that_looks_at_numbers_is_named() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        if x.mean() > 0:
            h = m.bn(h)
        z: Tensor = m.b(h)
        return z

    outcome = fusecli.fuse(net(wiring, bn=bn(), b=nn.Conv2d(3, 3, 1)), X.abs(), discover=True)
    assert [entry.kind for entry in outcome.ledger if "looks at numbers" in entry.what] == ["assumed"]


def test_a_gain_that_no_state_dict_holds() -> None:
    class Fleeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.register_buffer("g", torch.rand(3, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.tanh(self.a(x) * self.g))

    assert groups(randomise(nn.Sequential(Fleeting()), 0)) == []


def test_long_residual_streams() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.as_tensor(self.down(F.gelu(self.up(self.norm(x)))))

    deep = randomise(nn.Sequential(*(Block() for _ in range(300)), nn.BatchNorm1d(5)), 0)
    assert len(groups(deep, torch.randn(2, 5, 4))) == 300


def test_the_chains_of_a_group_that_does_not_hold_are_folded_by_themselves() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y: Tensor = (m.bn(m.a(x)) + m.bn2(m.b(x))) * m.b.out_channels  # which a branch that is silent has not
        return y

    outcome = fusecli.fuse(net(wiring, a=conv(), bn=bn(), b=conv(), bn2=bn()), X, discover=True)
    assert outcome.status == "fused"
    assert [g.modules for g in outcome.groups] == [("a", "bn"), ("b", "bn2")]
    assert [no.group for no in outcome.refused] == [("a", "bn", "b", "bn2")]


def test_why_a_gain_stays() -> None:
    model = net(lambda m, x: (lambda y: m.fc(y) + y)(m.ln(x)), ln=nn.LayerNorm(8), fc=nn.Linear(8, 8))
    (left,) = fusecli.plan(model, X).unfused
    assert (left.code, "gain stays" in left.evidence[0]) == ("batch-dependent", True)


def test_a_rule_that_is_turned_off_is_named() -> None:
    model = net(lambda m, x: torch.relu(m.bn(m.a(x))), a=conv(), bn=bn())
    outcome = fusecli.fuse(model, X, spec={"discover": True, "no_rules": ["conv_bn"]})
    assert [(norm.code, "conv_bn" in norm.reason) for norm in outcome.unfused] == [("rule-off", True)]
    outcome = fusecli.fuse(model, X, spec={"groups": ["a", "bn"], "rules": ["linear_bn"]})
    assert [no.code for no in outcome.refused] == ["rule-off"]


def test_a_parametrization_is_called_by_its_name() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv())
    model = net(lambda m, x: torch.relu(m.bn(m.a(x))), a=layer, bn=bn())
    (left,) = fusecli.plan(model, X).unfused
    assert (left.code, "--bake" in left.remedy) == ("parametrized", True)
    assert fusecli.fuse(model, X, discover=True, bake=True).status == "fused"


def test_a_norm_whose_scale_comes_out_of_an_unknown_op() -> None:
    class Soft(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            scale = F.softplus(self.weight) * (self.running_var + self.eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    model = net(lambda m, x: m.b(m.bn(torch.relu(x))), bn=Soft(3), b=nn.Conv2d(3, 3, 1))
    assert fusecli.fuse(model, X, discover=True).groups == ()
