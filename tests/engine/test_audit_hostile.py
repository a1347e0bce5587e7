"""What looks like a group and is none, and what looks like none and is one: each was wrong once."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli.engine import discover, plan
from fusecli.engine.decisions import Group
from fusecli.errors import UsageError
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample
from tests.nets import FrozenBatchNorm2d, randomise
from tests.proof.nets import X, bn, conv, net
from tests.torchscript import scripted

PAIR = ("conv", "bn")


def outcome(model: nn.Module, x: Any = X, *groups: list[str]) -> Any:
    return fusecli.fuse(model, x, groups=list(groups) or [list(PAIR)])


def codes(model: nn.Module, x: Any = X) -> list[str]:
    return [no.code for no in outcome(model, x).refused]


def by_size(y: Tensor, z: Tensor) -> Tensor:
    return z * 2 if y[y > 5].numel() > 10_000 else z


READ_IN_A_SHAPE = {
    "mask": lambda m, x: (lambda y: by_size(y, m.bn(y)))(m.conv(x)),
    "unique": lambda m, x: (lambda y: m.bn(y) * torch.unique(y).shape[0] ** 0)(m.conv(x)),
    "nonzero": lambda m, x: (lambda y: m.bn(y) + y.nonzero().shape[1] * 0)(m.conv(x)),
}


@pytest.mark.parametrize("case", READ_IN_A_SHAPE)
def test_a_shape_that_depends_on_numbers_reads_them(case: str) -> None:
    assert codes(net(READ_IN_A_SHAPE[case], conv=conv(), bn=bn())) == ["multiple-consumers"]


class Domains(nn.Module):
    """One norm, statistics for each domain: forward puts the right ones into it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.conv, self.bn, self.change = conv(), bn(), change
        for name in ("mean0", "mean1"):
            self.register_buffer(name, torch.randn(self.bn.num_features))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        if self.change == "mean":
            self.bn.running_mean = getattr(self, f"mean{domain}")
        if self.change == "eps":
            self.bn.eps = (1e-3, 1.0)[domain]
        if self.change == "call":
            mean = {"running_mean": getattr(self, f"mean{domain}")}
            return torch.func.functional_call(self.bn, mean, (self.conv(x),))
        return self.bn(self.conv(x))


@pytest.mark.parametrize("change", ["mean", "eps", "call"])
def test_a_norm_that_is_given_other_numbers(change: str) -> None:
    model = randomise(Domains(change), 0)
    refused = outcome(model).refused
    assert [no.code for no in refused] == ["written-in-forward"]
    assert ("eps" if change == "eps" else "running_mean") in refused[0].evidence[0]


def test_a_forward_that_was_put_on_the_instance() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    clamped = lambda self, x: nn.BatchNorm2d.forward(self, x.clamp(-30, 30))  # noqa: E731
    model.bn.forward = types.MethodType(clamped, model.bn)
    assert codes(model) == ["not-affine"]


class Images:
    """What DETR calls a NestedTensor: nobody sees a tensor in it."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors


def test_an_input_that_hides_its_tensor() -> None:
    model = net(lambda m, x: m.bn(m.conv(x.tensors)), conv=conv(), bn=bn())
    run = Run(model, Sample((Images(X),)), lambda: duplicate(model))
    assert [group.modules for group in discover(ModuleTree(model), run).groups] == [PAIR]


class LearnedInput(nn.Module):
    """The first layer of a StyleGAN: its input is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 3, 8, 8))
        self.conv, self.bn = conv(), bn()

    def forward(self, style: Tensor) -> Tensor:
        return self.bn(self.conv(self.const.expand(style.shape[0], -1, -1, -1))) * style


def test_a_learned_input_is_no_weight() -> None:
    assert outcome(randomise(LearnedInput(), 0), torch.rand(2, 1, 1, 1)).status == "fused"


class Standardised(nn.Module):
    """Batch norm of a weight, which a convolution then applies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv.weight.permute(0, 2, 3, 1).reshape(-1, 3)
        weight = self.bn(flat).reshape(-1, *self.conv.weight.shape[2:], 3).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, padding=1)


def test_a_norm_of_weights() -> None:
    model = randomise(Standardised(), 0)
    run = Run(model, Sample((X,)), lambda: duplicate(model))
    left = {norm.module: norm.code for norm in discover(ModuleTree(model), run).left}
    assert left == {"bn": "norm-on-weights"}


@functools.lru_cache
def grid(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


CACHE: dict[int, Tensor] = {}


def cached(size: int) -> Tensor:
    if size not in CACHE:
        CACHE[size] = torch.arange(size, dtype=torch.float32)
    return CACHE[size]


class Helper:
    """A class and an object that keep a grid, as many models have one."""

    of_class: Tensor | None = None

    def __init__(self) -> None:
        self.of_object: Tensor | None = None


HELPER, LISTED = Helper(), []  # type: ignore[var-annotated]
GLOBAL: Tensor | None = None


def of_class(size: int) -> Tensor:
    if Helper.of_class is None:
        Helper.of_class = torch.arange(size, dtype=torch.float32)
    return Helper.of_class


def of_object(size: int) -> Tensor:
    if HELPER.of_object is None:
        HELPER.of_object = torch.arange(size, dtype=torch.float32)
    return HELPER.of_object


def of_list(size: int) -> Tensor:
    if not LISTED:
        LISTED.append(torch.arange(size, dtype=torch.float32))
    return LISTED[0]


def of_file(size: int) -> Tensor:
    global GLOBAL
    if GLOBAL is None:
        GLOBAL = torch.arange(size, dtype=torch.float32)
    return GLOBAL


@pytest.mark.parametrize("position", [grid, cached, of_class, of_object, of_list, of_file])
def test_a_cache_of_the_model_s_code_is_no_obstacle(position: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x)) + position(8), conv=conv(), bn=bn())
    run = Run(model, Sample((X,)), lambda: duplicate(model))
    assert [group.modules for group in discover(ModuleTree(model), run).groups] == [PAIR]
    assert outcome(model).status == "fused"
    assert type(model(X)) is Tensor


def test_a_forward_that_looks_at_numbers() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        try:
            largest = float(y.max())
        except Exception:
            largest = 0.0
        z = m.bn(y)
        return z * 2 if largest > 1e9 else z

    model = net(wiring, conv=conv(), bn=bn())
    run = Run(model, Sample((X,)), lambda: duplicate(model))
    refused = plan(ModuleTree(model), [Group(PAIR)], run=run).refused
    assert [no.code for no in refused] == ["multiple-consumers"]


def test_the_bias_of_many_layers_is_tried_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(nn.Conv2d):
        pass

    layers = [(Plain(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)) for _ in range(5)]
    model = randomise(nn.Sequential(*(module for pair in layers for module in pair)), 0)
    runs: list[object] = []
    recorded = Run._recorded
    monkeypatch.setattr(Run, "_recorded", lambda self, biased: runs.append(biased) or recorded(self, biased))
    run = Run(model, Sample((X,)), lambda: duplicate(model))
    assert len(discover(ModuleTree(model), run).groups) == 5
    assert len(runs) == 2


def test_a_scripted_part_beside_the_group_and_around_it() -> None:
    tail = scripted(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())
    model = net(lambda m, x: m.tail(m.bn(m.conv(x))), conv=conv(), bn=bn(), tail=tail)
    run = Run(model, Sample((X,)), lambda: duplicate(model))
    planned = plan(ModuleTree(model), [Group(PAIR), Group(("tail.0", "tail.1"))], run=run)
    assert [decision.members for decision in planned.decisions] == [PAIR]
    assert [(no.group, no.code) for no in planned.refused] == [(("tail.0", "tail.1"), "scripted")]


def test_a_norm_that_widens_the_dtype() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv().bfloat16(), bn=FrozenBatchNorm2d(3))
    assert codes(model, X.bfloat16()) == ["dtype"]


def test_a_hook_cannot_follow_a_norm_into_two_layers() -> None:
    model = net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(), bn=bn())
    model.bn.register_forward_hook(lambda module, args, output: None)
    refused = outcome(model, X, ["a", "bn"], ["b", "bn"]).refused
    assert {no.code for no in refused} == {"shared-module"}
    assert "hooks" in refused[0].reason


def test_modules_that_ran_through_their_forward_only() -> None:
    model = net(lambda m, x: m.bn.forward(m.conv.forward(x)), conv=conv(), bn=bn())
    assert codes(model) == ["functional-layer"]


def test_labels_of_a_value_that_is_read_again_and_again() -> None:
    class Doubling(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            for _ in range(40):
                scale = (scale + scale) / 2
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    assert outcome(net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=Doubling(3))).status == "fused"


def test_discovery_completes_a_norm_that_is_listed_with_one_of_its_layers() -> None:
    model = net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(), bn=bn())
    found = fusecli.fuse(model, X, groups=[["a", "bn"]], discover=True)
    assert (found.status, [group.modules for group in found.groups]) == ("fused", [("a", "bn"), ("b", "bn")])


def test_sizes_of_one_are_said() -> None:
    model = net(lambda m, x: m.bn(m.conv(x).reshape(-1, 6)), conv=nn.Conv1d(3, 6, 3), bn=nn.BatchNorm1d(6))
    (group,) = outcome(model, torch.randn(4, 3, 3)).groups
    assert "size 1" in group.notes[0]
    assert codes(model, torch.randn(4, 3, 8)) == ["bn-axis"]


def sparse() -> Any:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    model.register_buffer("eye", torch.eye(3).to_sparse())
    return model


def compressed() -> Any:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta")  # as long as torch says so
        model.eye = torch.eye(3).to_sparse_csr()
    return model


ODD = {
    "sparse": sparse,
    "compressed": compressed,
    "vmap": lambda: net(lambda m, x: torch.vmap(torch.sum)(m.bn(m.conv(x))), conv=conv(), bn=bn()),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_beside_the_group(case: str) -> None:
    assert outcome(ODD[case]()).status == "fused"


def test_a_lazy_layer_elsewhere() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    model.lazy = nn.LazyLinear(3)
    with pytest.raises(UsageError, match="no shape yet"):
        outcome(model)


def test_discovery_leaves_the_other_layers_of_a_norm_that_are_excluded() -> None:
    model = net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(), bn=bn())
    spec = {"groups": [["a", "bn"]], "discover": True, "exclude": ["b"]}
    assert [no.code for no in fusecli.fuse(model, X, spec=spec).refused] == ["shared-module"]


def test_a_view_back_to_an_earlier_shape_is_a_step() -> None:
    model = net(lambda m, x: m.bn(m.conv(x).unsqueeze(0)), conv=conv(), bn=bn())
    assert outcome(model, X[0]).status == "fused"


ASKED = {
    "dtype": lambda m, x: m.bn(m.conv(x.to(m.bn.weight.dtype))),
    "features": lambda m, x: m.bn(m.conv(x)).view(x.shape[0], m.bn.num_features, -1),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_discovered_group_that_the_proof_rejects_is_left_out(case: str) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        return ASKED[case](m, m.relu(m.bn0(m.conv0(x))))

    layers = {"conv0": conv(), "bn0": bn(), "relu": nn.ReLU(), "conv": conv(), "bn": bn()}
    found = fusecli.fuse(net(wiring, **layers), X, discover=True)
    assert (found.status, [group.modules for group in found.groups]) == ("fused", [("conv0", "bn0")])
    assert [(norm.module, norm.code) for norm in found.unfused] == [("bn", "dropped")]


def test_a_norm_that_is_given_more_than_a_tensor() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    assert codes(net(lambda m, x: m.bn(m.conv(x), scale=2.0), conv=conv(), bn=Scaled(3))) == ["not-affine"]


def test_a_tensor_of_the_norm_that_the_model_reads() -> None:
    wiring = lambda m, x: m.bn(m.conv(x)) * (m.bn.num_batches_tracked >= 0)  # noqa: E731
    assert codes(net(wiring, conv=conv(), bn=bn())) == ["shared-weight"]


def test_nested_tensors_beside_the_group() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return torch.nested.nested_tensor([y[0].flatten(1), y[1].flatten(1)]).to_padded_tensor(0.0)

    model = net(wiring, conv=conv(), bn=bn())
    run = Run(model, Sample((X[:2],)), lambda: duplicate(model))
    assert any("nested" in call.name for call in run.recording.calls)
