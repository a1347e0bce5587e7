"""Other hands on a tensor: what a norm takes or gives is written to, or used where nobody records it.

Once a norm is an identity, what it gives is the memory that it takes: a write to the one shows in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusecli
from tests.cli.conftest import project  # noqa: F401
from tests.conftest import Cli
from tests.proof.nets import X, bn, conv, net

IN_PLACE = "multiple-consumers"


def unpadded() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3)


def before_a_layer(wiring: Callable[[Any, Tensor], Any]) -> Any:
    """A norm that can only go into the layer after it."""
    return net(lambda m, x: wiring(m, torch.relu(m.a(x))), a=conv(), bn=bn(), b=unpadded())


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result()


def codes(model: nn.Module, *group: str) -> list[str]:
    """Why a group is refused; what was folded computes the same."""
    outcome = fusecli.fuse(model, X.clone(), groups=[list(group)])
    if outcome.status == "fused":
        assert_same(model, outcome.model)
    else:
        assert outcome.status == "refused"
    return [no.code for no in outcome.refused]


def assert_same(model: nn.Module, fused: Any) -> None:
    with torch.no_grad():
        expected, given = model(X.clone()), fused(X.clone())
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def numpy_zero(h: Tensor) -> None:
    np.asarray(h.detach())[:] = 0


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "all of it": lambda h: h.zero_(),
    "a channel": lambda h: h[:, 0].zero_(),
    "setitem": lambda h: h.__setitem__((slice(None), 0), 0.0),
    "chunk": lambda h: h.chunk(3, 1)[0].add_(1),
    "split": lambda h: h.split(1, 1)[2].mul_(0),
    "unbind": lambda h: h.unbind(0)[0].add_(1),
    "diagonal": lambda h: h.diagonal(0, 2, 3).zero_(),
    "as strided": lambda h: h.as_strided((5,), (3,)).zero_(),
    "foreach": lambda h: torch._foreach_mul_([h[:, 1]], 0.0),
    "data": lambda h: h.data.view(-1).add_(1),
    "numpy": numpy_zero,
    "thread": lambda h: elsewhere(h.zero_),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_what_the_norm_takes(write: str) -> None:
    def wiring(m: Any, h: Tensor) -> Tensor:
        y = m.bn(h)
        WRITES[write](h)
        z: Tensor = m.b(y)
        return z

    assert codes(before_a_layer(wiring), "bn", "b") == [IN_PLACE]


def numpy_before(h: Tensor) -> Any:
    array = h.detach().numpy()
    return lambda: array.fill(0)


TAKEN_BEFORE: dict[str, Callable[[Tensor], Any]] = {
    "a view": lambda h: h[:, 1].zero_,
    "numpy": numpy_before,
}


@pytest.mark.parametrize("view", TAKEN_BEFORE)
def test_a_write_through_what_was_taken_before_the_norm(view: str) -> None:
    def wiring(m: Any, h: Tensor) -> Tensor:
        write = TAKEN_BEFORE[view](h)
        y = m.bn(h)
        write()
        z: Tensor = m.b(y)
        return z

    assert codes(before_a_layer(wiring), "bn", "b") == [IN_PLACE]


def test_a_write_to_what_the_norm_gives() -> None:
    def wiring(m: Any, h: Tensor) -> Tensor:
        y = m.bn(h)
        z = m.b(y)
        y.zero_()
        return z.mean() + h.mean()  # type: ignore[no-any-return]

    assert codes(before_a_layer(wiring), "bn", "b") == [IN_PLACE]


def test_a_write_seen_through_two_norms() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        y = m.bn2(m.bn(h))
        h[:, 0] = 0
        z: Tensor = m.b(y)
        return z

    model = net(wiring, a=conv(), bn=bn(), bn2=bn(), b=unpadded())
    outcome = fusecli.fuse(model, X, discover=True)
    assert [g.modules for g in outcome.groups] == [("bn", "bn2")]  # what bn2 gives is new memory
    assert_same(model, outcome.model)
    assert codes(model, "bn", "bn2", "b") != []


SAFE: dict[str, Callable[[Any, Tensor], Any]] = {
    "before": lambda m, h: (h[:, 0].zero_(), m.b(m.bn(h)))[1],
    "a copy": lambda m, h: (lambda y: (h.clone()[:, 0].zero_(), m.b(y))[1])(m.bn(h)),
    "numpy of a copy": lambda m, h: (lambda y: (numpy_zero(h.clone()), m.b(y))[1])(m.bn(h)),
    "after": lambda m, h: (lambda z: (h[:, 0].zero_(), z)[1])(m.b(m.bn(h))),
    "after, and read": lambda m, h: (lambda z: (h.add_(1), z.mean() + h)[1])(m.b(m.bn(h))),
    "list of numbers": lambda m, h: (lambda y: (h.tolist(), m.b(y))[1])(m.bn(h)),
    "residual": lambda m, h: h[:, :, 1:-1, 1:-1].add_(m.b(m.bn(h))),
}


@pytest.mark.parametrize("case", SAFE)
def test_writes_that_nobody_sees(case: str) -> None:
    assert codes(before_a_layer(SAFE[case]), "bn", "b") == []


def test_in_place_behind_a_chain_is_what_everybody_writes() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = torch.relu_(m.bn(m.a(x)))
        y += x
        y[:, 0] = 0
        return y

    assert codes(net(wiring, a=conv(), bn=bn()), "a", "bn") == []


POOLED: dict[str, Callable[[Any, Tensor], Any]] = {
    "takes": lambda m, h: (lambda y: (h.add_(1), y * 1)[1])(m.pool(h)),
    "gives": lambda m, h: m.pool(h).add_(1) * h,
    "neither": lambda m, h: torch.relu(m.pool(h)) + h,
}


@pytest.mark.parametrize("case", POOLED)
def test_a_pooling_of_single_elements_gives_new_memory(case: str) -> None:
    model = net(lambda m, x: POOLED[case](m, m.a(x)), a=conv(), pool=nn.AvgPool2d(1))
    outcome = fusecli.fuse(model, X, spec={"remove_idle": True})
    assert [no.code for no in outcome.refused] == ([] if case == "neither" else [IN_PLACE])
    assert_same(model, outcome.model)


def test_a_layer_that_is_stored_in_the_places_of_its_norms() -> None:
    """What it gave is new memory; the identity in its place gives the input itself."""

    def wiring(m: Any, x: Tensor, *, write: bool) -> Tensor:
        x = torch.relu(x)
        y, z = m.a(x), m.a(x + 1)
        if write:
            x.zero_()
        return m.bn(y) + m.bn2(z)  # type: ignore[no-any-return]

    def folded(write: bool) -> int:
        model = net(lambda m, x: wiring(m, x, write=write), a=conv(), bn=bn(), bn2=bn())
        outcome = fusecli.fuse(model, X, discover=True, shared="clone")
        if outcome.model is not None:
            assert_same(model, outcome.model)
        return len(outcome.groups)

    assert (folded(write=False), folded(write=True)) == (1, 0)


UNSEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "reads what is between": lambda m, x: (lambda h: m.bn(h) + elsewhere(torch.sin, h))(m.a(x)),
    "its result is returned": lambda m, x: (lambda h: (m.bn(h), elsewhere(torch.sin, h)))(m.a(x)),
    "calls a layer": lambda m, x: m.bn(elsewhere(m.a, x)),
    "calls all": lambda m, x: elsewhere(lambda: m.bn(m.a(x))),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_ops_in_another_thread(case: str) -> None:
    model = net(UNSEEN[case], a=conv(), bn=bn())
    assert codes(model, "a", "bn") == ["unseen"]
    outcome = fusecli.fuse(model, X, discover=True)
    assert (outcome.status, [norm.module for norm in outcome.unfused]) == ("nothing to fuse", ["bn"])


def test_a_write_from_another_thread_stands_between() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        elsewhere(h.add_, 1)
        y: Tensor = m.bn(h)
        return y

    assert codes(net(wiring, a=conv(), bn=bn()), "a", "bn") == ["not-adjacent"]


CONSTANT = torch.linspace(-1, 1, 3).view(3, 1, 1)


class Dirty(torch.autograd.Function):
    """Writes in place, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        return x.add_(1).mul_(2)


SEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "a thread before": lambda m, x: m.bn(m.a(elsewhere(torch.sin, x))),
    "a constant of the module's file": lambda m, x: m.bn(m.a(x + CONSTANT)) * CONSTANT,
    "a constant that is returned": lambda m, x: (m.bn(m.a(x)), CONSTANT),
    "numbers from numpy": lambda m, x: m.bn(m.a(x)) * torch.from_numpy(np.full(8, 2, np.float32)),
    "literals": lambda m, x: m.bn(m.a(x)) * torch.Tensor([2.0]) + x.new_tensor([1.0]),
    "a function of autograd": lambda m, x: Dirty.apply(m.bn(m.a(x))).add_(1),
    "another name": lambda m, x: m.bn(m.a(x).data),
    "a scripted fork": lambda m, x: m.bn(m.a(torch.jit.wait(torch.jit.fork(torch.sin, x)))),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", SEEN)
def test_what_is_no_other_thread(case: str) -> None:
    assert codes(net(SEEN[case], a=conv(), bn=bn()), "a", "bn") == []


FILES = """
from concurrent.futures import ThreadPoolExecutor
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        h = self.conv(x)
        with ThreadPoolExecutor(1) as pool:
            return self.bn(h) + pool.submit(lambda: h * 2).result()

build = Net
"""


def test_threads_on_files(cli: Cli, project: Callable[..., Path]) -> None:  # noqa: F811
    project(FILES)
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py", "--report", "json=-")
    assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (4, ["unseen"])
    ended = cli("plan", "model.pt", "--model", "net.py:build", "--input", "2x3x8x8", "-o", "plan.yaml")
    assert (ended.code, "unseen: ops ran that no recording shows" in Path("plan.yaml").read_text()) == (
        5,
        True,
    )
