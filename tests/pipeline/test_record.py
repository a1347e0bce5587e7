"""What a run tells of the model as a fold would make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.pipeline import record as recording
from fusecli.pipeline.fold import Fold, plan_fold
from fusecli.pipeline.record import ops_after, record_edited, require_running
from fusecli.pipeline.select import record_and_select
from fusecli.sample import Sample
from fusecli.source.resolve import in_memory
from fusecli.spec import Spec
from tests.nets import images, randomise
from tests.proof.nets import bn, conv, net

X = images(2, 3, 8, 8)


class Biased(nn.Conv2d):
    """Adds its bias by an op of its own, once it has one."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class Counting(nn.BatchNorm2d):
    """Asks itself how often it was called: another op, that nothing depends on."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x).clone()
        return y


def chain(*modules: nn.Module) -> Any:
    return randomise(nn.Sequential(*modules), 0).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "a chain": lambda: chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(6, 2)),
    "a linear layer": lambda: chain(nn.Linear(8, 4, bias=False), nn.BatchNorm2d(3)),
    "a layer that adds its bias": lambda: chain(Biased(3, 4, 1, bias=False), nn.BatchNorm2d(4)),
    "a norm of several ops": lambda: chain(nn.Conv2d(3, 4, 3), Counting(4), nn.Hardswish()),
    "two behind one sum": lambda: net(
        lambda m, x: m.last(m.bn(m.a(x) + m.b(x)).relu()), a=conv(), b=conv(), bn=bn(), last=conv()
    ),
    "a norm that is shared": lambda: net(
        lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(bias=False), b=conv(), bn=bn()
    ),
    "in front of a layer": lambda: net(lambda m, x: m.a(m.bn(x.relu())), a=nn.Conv2d(3, 3, 1), bn=bn()),
}


def folded(model: Any) -> tuple[Fold, Any]:
    spec = Spec().model_copy(update={"discover": True})
    source = in_memory(model, spec)
    selection = record_and_select(spec, source, source.structure(), Sample((X,)), ())
    return plan_fold(selection.source, selection.structure, selection.groups, selection.run), selection.run


@pytest.mark.parametrize("name", MODELS)
def test_the_ops_that_are_left_are_those_of_a_run(name: str) -> None:
    fold, run = folded(MODELS[name]())
    after = record_edited(run, fold.rewrites)
    assert after is not None
    assert ops_after(fold, run) == after.steps
    if fold.decisions:
        assert after.steps != run.recording.steps or name == "a layer that adds its bias"


@pytest.mark.parametrize(("name", "runs"), [("a chain", 0), ("a layer that adds its bias", 1)])
def test_only_what_a_recording_does_not_tell_is_run_again(
    monkeypatch: pytest.MonkeyPatch, name: str, runs: int
) -> None:
    fold, run = folded(MODELS[name]())
    made: list[Any] = []
    monkeypatch.setattr(recording, "record_edited", lambda *words: made.append(record_edited(*words)))
    ops_after(fold, run)
    assert len(made) == runs


def asks_for_its_norms(m: Any, x: Tensor) -> Tensor:
    """Reads a statistic of some norms in forward: with those fused it does not run."""
    for number in (1, 4):
        x = x * m.layers[number].norm.running_var.numel()
    for layer in m.layers:
        x = layer.norm(layer.conv(x))
    return x


def test_the_groups_that_break_forward_are_found_by_halves() -> None:
    layers = nn.ModuleList()
    for _ in range(8):
        layer = nn.Module()
        layer.conv, layer.norm = conv(), bn()
        layers.append(layer)
    model = net(asks_for_its_norms, layers=layers)
    source = in_memory(model, Spec())
    structure = source.structure()
    groups = [(f"layers.{n}.conv", f"layers.{n}.norm") for n in range(8)]
    from fusecli.engine import Group

    fold = plan_fold(source, structure, [Group(group) for group in groups])
    run = recording.record(source, structure, Sample((X,)))
    counted = []
    numbers = run.numbers
    run.numbers = lambda: (counted.append(None), numbers())[1]  # type: ignore[func-returns-value]
    with pytest.raises(recording.Refused) as caught:
        require_running(fold, run)
    assert [no.group for no in caught.value.refused] == [groups[1], groups[4]]
    assert len(counted) == 11  # the whole, 2 halves, 4 quarters, and 4 single ones
    assert torch.is_tensor(model(X))
