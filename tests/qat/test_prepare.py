from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import fusecli.nn as fused_nn
from fusecli.errors import RefusedError, UsageError
from fusecli.qat import (
    DEFAULT,
    INT8_PER_TENSOR,
    QNNPACK,
    QatConv2d,
    QatConvBn2d,
    QatConvBnReLU2d,
    QatLayer,
    QatLinear,
    Scheme,
    disable_observer,
    prepare_qat,
)
from tests.qat.cases import NAMES, batch, build, randomized
from tests.qat.oracle import prepared_by_torch_ao


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnContainer(fused_nn.ConvReLU2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""

    note = "kept"


def patched() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.forward = lambda input: input  # type: ignore[method-assign]
    return conv


def hooked(container: nn.Module, member: int) -> nn.Module:
    container[member].register_forward_hook(lambda *_: None)  # type: ignore[index]
    return container


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3)


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(6, **options)


REFUSED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("forward", lambda: OwnForward(4, 6, 3), "x: OwnForward has a forward of its own"),
    ("_conv_forward", lambda: OwnConv(4, 6, 3), "x: OwnConv has a _conv_forward of its own"),
    ("linear", lambda: OwnLinear(4, 6), "x: OwnLinear has a forward of its own"),
    ("patched", patched, "x: Conv2d has a forward of its own"),
    ("container", lambda: OwnContainer(conv(), nn.ReLU()), "x: OwnContainer has a forward of its own"),
    ("conv in", lambda: fused_nn.ConvBn2d(OwnForward(4, 6, 3), norm()), "x.0: OwnForward has a forward"),
    ("norm in", lambda: fused_nn.ConvBn2d(conv(), OwnNorm(6)), "x.1: OwnNorm has a forward of its own"),
    ("relu in", lambda: fused_nn.ConvBnReLU2d(conv(), norm(), OwnReLU()), "x.2: OwnReLU has a forward"),
    ("parametrized", lambda: weight_norm(conv()), "x: its weight is computed by parametrize"),
    (
        "parametrized in",
        lambda: fused_nn.ConvReLU2d(weight_norm(conv()), nn.ReLU()),
        "x.0: its weight is computed by parametrize",
    ),
    (
        "pruned in",
        lambda: fused_nn.ConvReLU2d(prune.identity(conv(), "weight"), nn.ReLU()),
        "x.0: its weight is computed by pruning",
    ),
    ("lazy", lambda: nn.LazyLinear(3), "x: its weight has no shape yet; run the model once first"),
    (
        "no statistics",
        lambda: fused_nn.ConvBn2d(conv(), norm(track_running_stats=False)),
        "x.1: the norm has no running statistics",
    ),
    (
        "channels",
        lambda: fused_nn.LinearBn1d(nn.Linear(4, 6), nn.BatchNorm1d(5)),
        "x.1: the norm has 5 channels, the layer before it 6",
    ),
    ("hook on the layer", lambda: hooked(build("ConvBnReLU2d"), 0), "x.0: the hook would never be called"),
    ("hook on the relu", lambda: hooked(build("ConvBnReLU2d"), 2), "register it on 'x' itself"),
    ("torch.ao", lambda: prepared_by_torch_ao(build("ConvBn2d"))[0], "x: ConvBn2d is a module of torch.ao"),
]


@pytest.mark.parametrize(("build_it", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_computes_something_else_is_refused_by_name(
    build_it: Callable[[], nn.Module], message: str, inplace: bool
) -> None:
    model = nn.Sequential()
    model.add_module("fine", nn.Linear(2, 2))
    model.add_module("x", build_it())
    before = [*model.modules()]
    with pytest.raises(RefusedError) as refusal:
        prepare_qat(model, inplace=inplace)
    assert message in str(refusal.value)
    assert len(refusal.value.problems) == 1
    assert [*model.modules()] == before, "nothing is changed by a refusal"


def test_all_that_is_in_the_way_is_named_at_once() -> None:
    odd = OwnForward(4, 6, 3)
    model = nn.ModuleDict({"a": odd, "b": weight_norm(conv()), "again": odd})
    with pytest.raises(RefusedError) as refusal:
        prepare_qat(model)
    assert [problem.where for problem in refusal.value.problems] == ["a", "b"]


def test_a_model_in_eval_mode_is_refused_with_the_fix() -> None:
    with pytest.raises(UsageError, match=r"the model is in eval mode.*; call model.train\(\) first"):
        prepare_qat(nn.Sequential(nn.Linear(2, 2)).eval())


def test_a_model_without_layers_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="no convolution and no linear layer"):
        prepare_qat(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_other_modules_are_left_float() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 6, 2),
        fused_nn.BNReLU2d(nn.BatchNorm2d(6), nn.ReLU()),
        nn.MultiheadAttention(6, 2),
        nn.TransformerEncoderLayer(6, 2, batch_first=True),
        nn.TransformerDecoderLayer(6, 2),
    )
    prepared = prepare_qat(model)
    found = [name for name, module in prepared.named_modules() if isinstance(module, QatLayer)]
    assert found == ["0", "6.linear1", "6.linear2"]
    for number in (1, 2, 3, 4, 5):
        assert type(prepared[number]) is type(model[number])  # type: ignore[index]


def test_in_place_the_parameters_are_the_same_objects_and_an_optimizer_stays_valid() -> None:
    model = nn.Sequential(build("ConvBnReLU2d"), nn.Flatten(), nn.LazyLinear(3))
    model(batch("Conv2d", torch.float32))
    model[0][0].bias.requires_grad_(False)  # type: ignore[index]
    parameters, buffers = list(model.parameters()), list(model.buffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = prepare_qat(model, inplace=True)
    assert prepared is model
    assert all(a is b for a, b in zip(prepared.parameters(), parameters, strict=True))
    assert all(any(a is b for b in prepared.buffers()) for a in buffers)
    before = [p.detach().clone() for p in parameters]
    prepared(batch("Conv2d", torch.float32)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert changed == [True, False, True, True, True, True]


def test_a_copy_leaves_the_model_alone() -> None:
    model = randomized(nn.Sequential(build("ConvBn2d"), nn.ReLU()))
    state = copy.deepcopy(model.state_dict())
    prepared = prepare_qat(model)
    prepared(batch("Conv2d", torch.float32)).sum().backward()
    assert isinstance(model[0], fused_nn.ConvBn2d)  # type: ignore[index]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_model_can_be_one_layer(name: str) -> None:
    layer = build(name)
    prepared = prepare_qat(layer, inplace=True)
    assert isinstance(prepared, QatLayer)
    assert all(a is b for a, b in zip(prepared.parameters(), layer.parameters(), strict=True))


def test_preparing_twice_changes_nothing() -> None:
    once = prepare_qat(nn.Sequential(build("ConvBnReLU2d"), build("Conv2d")))
    modules = list(once.modules())
    assert list(prepare_qat(once, QNNPACK, inplace=True).modules()) == modules
    assert isinstance(prepare_qat(once[0]), QatConvBnReLU2d)  # type: ignore[index]


class Shared(nn.Module):
    """A convolution under two names, in two parents, and its weight in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = fused_nn.ConvBn2d(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.inner = nn.ModuleDict({"b": self.a, "c": nn.Conv2d(4, 4, 3, padding=1)})
        self.alone = self.a[0]
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.inner["c"].weight  # type: ignore[union-attr, assignment]
        self.missing = None

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.alone(self.inner["c"](self.inner["b"](self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_shared_stays_shared_and_in_its_order(inplace: bool) -> None:
    model = Shared()
    names = [name for name, _ in model.named_children()]
    prepared: Any = prepare_qat(model, inplace=inplace)
    assert prepared.a is prepared.inner["b"]
    assert type(prepared.a) is QatConvBn2d
    assert type(prepared.alone) is QatConv2d
    assert prepared.alone.weight is prepared.a.weight
    assert prepared.alone.weight_fake_quant is not prepared.a.weight_fake_quant
    assert [name for name, _ in prepared.alone.named_children()] == [
        "weight_fake_quant",
        "activation_post_process",
    ]
    assert prepared.tied.weight is prepared.inner["c"].weight
    assert prepared.tied is not prepared.inner["c"]
    assert [name for name, _ in prepared.named_children()] == names
    everywhere = dict(prepared.named_modules(remove_duplicate=False))
    assert everywhere["inner.b.bn"] is everywhere["a.bn"]
    assert isinstance(everywhere["inner.c"], QatConv2d)
    assert prepared(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


def hook_calls(module: nn.Module, called: list[str]) -> list[Any]:
    def named(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    return [
        module.register_forward_pre_hook(named("pre")),
        module.register_forward_hook(named("post")),
        module.register_forward_hook(lambda m, a, kwargs, y: called.append("kwargs"), with_kwargs=True),
        module.register_full_backward_pre_hook(named("backward pre")),
        module.register_full_backward_hook(named("backward")),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_called_once_each_and_can_be_removed(name: str) -> None:
    called: list[str] = []
    model = nn.Sequential(build(name))
    handles = hook_calls(model[0], called)
    prepared = prepare_qat(model, inplace=True)
    x = batch(name, torch.float32).requires_grad_()
    prepared(x).sum().backward()
    assert called == ["pre", "post", "kwargs", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    prepared(x).sum().backward()
    assert len(called) == 5


def test_hooks_travel_with_a_copy_and_those_of_a_norm_stay_on_it() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(build("ConvBnReLU2d"))
    model[0][1].register_forward_hook(lambda module, args, y: seen.append(y))  # type: ignore[index]
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    prepared = prepare_qat(model)
    y = prepared(batch("Conv2d", torch.float32))
    assert len(seen) == 2
    assert (seen[0] < 0).any()
    assert seen[1] is y


def test_mode_and_attributes_are_kept() -> None:
    model = nn.Sequential(Named(4, 6, 3), build("ConvBn2d"))
    model[0].eval()
    model[0].label = "mine"
    prepared: Any = prepare_qat(model)
    assert (prepared[0].training, prepared[1].training, prepared[1].bn.training) == (False, True, True)
    model[1][0].eval()  # type: ignore[index]
    assert prepare_qat(model)[1].training  # type: ignore[index]
    assert prepared[0].label == "mine"
    assert type(prepared[0]) is QatConv2d


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_device_are_kept(name: str) -> None:
    for place in ({"dtype": torch.float64}, {"device": "meta"}):
        prepared = prepare_qat(build(name).to(**place))  # type: ignore[arg-type]
        tensors = [p for p in prepared.parameters() if p.is_floating_point()]
        assert {t.dtype for t in tensors} == {place.get("dtype", torch.float32)}
        assert {t.device.type for t in prepared.state_dict().values()} == {place.get("device", "cpu")}


def test_the_scheme_is_that_of_every_layer() -> None:
    prepared: Any = prepare_qat(nn.Sequential(build("Conv2d"), build("ConvBn2d")), Scheme(INT8_PER_TENSOR))
    for layer in prepared:
        assert layer.weight_fake_quant.activation_post_process.ch_axis is None
        assert layer.activation_post_process.activation_post_process.quant_max == 255
    assert prepared[0].weight_fake_quant is not prepared[1].weight_fake_quant


def test_an_error_in_training_says_where() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))  # type: ignore[index]
    with pytest.raises(ValueError, match=r"^1\.weight_fake_quant: a tensor of shape \[2, 2\] has NaN"):
        model(torch.randn(3, 2))
    model = prepare_qat(nn.Linear(2, 2)).apply(disable_observer)
    with pytest.raises(ValueError, match=r"^weight_fake_quant: fake quantization is on, but nothing"):
        model(torch.randn(3, 2))


def test_a_rounded_input_is_a_module_before_the_model() -> None:
    model = nn.Sequential(DEFAULT.activation.fake_quantize(), prepare_qat(nn.Linear(3, 2)))
    assert type(model[1]) is QatLinear
    model(torch.randn(4, 3))
    assert model[0].activation_post_process.observed


def test_torch_ao_is_never_imported() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import fusecli.qat;"
        "print([name for name in set(sys.modules) - before if name.startswith('torch.ao')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
