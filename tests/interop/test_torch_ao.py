"""To torch.ao's containers and back, beside what torch.ao's own fuse_modules_qat makes of the same model."""

from __future__ import annotations

import builtins
import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli import fuse_modules, fuse_modules_qat
from fusecli import nn as fused_nn
from fusecli.errors import UsageError
from fusecli.interop import torch_ao as adapter
from fusecli.interop.torch_ao import from_torch_ao, to_torch_ao
from tests import nets, torch_ao_qat

# Modules of each sequence, and the shape of an input.
SEQUENCES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "ConvReLU1d": (lambda: [nn.Conv1d(3, 4, 3), nn.ReLU()], (2, 3, 6)),
    "ConvReLU2d": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU()], (2, 3, 6, 6)),
    "ConvReLU3d": (lambda: [nn.Conv3d(3, 4, 3), nn.ReLU()], (2, 3, 6, 6, 6)),
    "LinearReLU": (lambda: [nn.Linear(3, 4), nn.ReLU()], (6, 3)),
    "BNReLU2d": (lambda: [nn.BatchNorm2d(3), nn.ReLU()], (2, 3, 6, 6)),
    "BNReLU3d": (lambda: [nn.BatchNorm3d(3), nn.ReLU()], (2, 3, 6, 6, 6)),
    "ConvBn1d": (lambda: [nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)], (2, 3, 6)),
    "ConvBn2d": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 6, 6)),
    "ConvBn3d": (lambda: [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)], (2, 3, 6, 6, 6)),
    "ConvBnReLU1d": (lambda: [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()], (2, 3, 6)),
    "ConvBnReLU2d": (
        lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()],
        (2, 3, 6, 6),
    ),
    "ConvBnReLU3d": (lambda: [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()], (2, 3, 6, 6, 6)),
    "LinearBn1d": (lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4)], (6, 3)),
}


class OwnConv(nn.Conv2d):
    """A subclass, as model code has them."""


def network(name: str) -> tuple[Any, list[str], Tensor]:
    """The sequence between torch.ao's stubs, the names of its modules, and an input."""
    modules, shape = SEQUENCES[name][0](), SEQUENCES[name][1]
    ao = torch_ao_qat.torch_ao("quantization")
    with torch_ao_qat.quietly():
        stubs = ao.QuantStub(), ao.DeQuantStub()
    names = [f"m{number}" for number in range(len(modules))]
    net = nets.chain(quant=stubs[0], **dict(zip(names, modules, strict=True)), dequant=stubs[1])
    return net.train(), names, nets.images(*shape)


def both_ways(name: str) -> tuple[Any, Any, Tensor]:
    """The model as torch.ao fuses it, and as fusecli fuses and adapts it."""
    net, names, x = network(name)
    with torch_ao_qat.quietly():
        theirs = torch_ao_qat.torch_ao("quantization").fuse_modules_qat(net, names)
    return theirs, to_torch_ao(fuse_modules_qat(net, names)), x


def anatomy(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# What is left alone, and what is refused.


def test_a_model_without_containers_stays_what_it_is() -> None:
    net = nets.conv_bn()
    for function in (to_torch_ao, from_torch_ao):
        assert anatomy(function(net)) == anatomy(net)
        assert same_state(function(net), net)
        assert function(net) is not net
        assert function(net, inplace=True) is net


def test_bn_relu_1d_stays_what_it_is() -> None:
    net = nn.Sequential(fused_nn.BNReLU1d(nn.BatchNorm1d(3), nn.ReLU()))
    assert type(to_torch_ao(net)[0]) is fused_nn.BNReLU1d


def test_a_subclass_of_a_container_stays_what_it_is() -> None:
    class Own(fused_nn.ConvReLU2d):
        """A user's."""

    assert type(to_torch_ao(Own(nn.Conv2d(3, 4, 1), nn.ReLU()))) is Own


def test_containers_that_fusecli_has_not_stay_what_they_are() -> None:
    tanh = torch_ao_qat.torch_ao("nn.intrinsic").LinearTanh(nn.Linear(3, 4), nn.Tanh())
    assert type(from_torch_ao(nn.Sequential(tanh))[0]) is type(tanh)


def test_float_modules_of_torch_ao_stay_what_they_are() -> None:
    ao, quantized = torch_ao_qat.torch_ao("quantization"), torch_ao_qat.torch_ao("nn.quantized")
    with torch_ao_qat.quietly():
        net = nn.Sequential(ao.QuantStub(), nn.Conv2d(3, 4, 1), ao.DeQuantStub(), quantized.FloatFunctional())
        net = ao.QuantWrapper(net)
    assert anatomy(from_torch_ao(net)) == anatomy(net)


REFUSED: list[tuple[str, Callable[[], nn.Module], list[str]]] = [
    (
        "a subclass of the layer",
        lambda: fused_nn.ConvReLU2d(OwnConv(3, 4, 1), nn.ReLU()),
        ["block: ConvReLU2d holds a OwnConv; torch.ao takes Conv2d"],
    ),
    (
        "a subclass of the norm",
        lambda: fused_nn.ConvBn2d(nn.Conv2d(3, 4, 1), nets.ReluNorm2d(4)),
        ["ConvBn2d holds a ReluNorm2d; torch.ao takes BatchNorm2d"],
    ),
    (
        "a norm without gamma",
        lambda: fused_nn.ConvBn2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        ["block: the norm in ConvBn2d has no gamma and beta; leave this group out"],
    ),
    (
        "a norm without statistics",
        lambda: fused_nn.LinearBn1d(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        ["block: the norm in LinearBn1d has no running statistics; leave this group out"],
    ),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("make", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_torch_ao_would_refuse_is_named(
    make: Callable[[], nn.Module], words: list[str], inplace: bool
) -> None:
    net = nn.Sequential()
    net.add_module("fine", fused_nn.ConvReLU2d(nn.Conv2d(3, 4, 1), nn.ReLU()))
    net.add_module("block", make())
    before = anatomy(net)
    with pytest.raises(UsageError) as mistake:
        to_torch_ao(net, inplace)
    assert all(word in str(mistake.value) for word in words)
    assert anatomy(net) == before


@pytest.mark.parametrize(
    "modules",
    [
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU()],
        [nn.BatchNorm2d(3, affine=False), nn.ReLU()],
        [nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()],
    ],
    ids=["a computed weight", "a norm alone without gamma", "a norm alone without statistics"],
)
def test_what_torch_ao_takes_is_not_refused(modules: list[nn.Module]) -> None:
    container = fused_nn.container_for(*modules)
    assert container is not None
    ours = to_torch_ao(container(*modules))
    theirs = getattr(torch_ao_qat.torch_ao("nn.intrinsic"), container.__name__)(*modules)
    assert type(ours) is type(theirs)
    x = nets.images(2, 3, 4, 4)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("case", [0, 1])
def test_torch_ao_refuses_those_types_itself(case: int) -> None:
    container = REFUSED[case][1]()
    theirs = getattr(torch_ao_qat.torch_ao("nn.intrinsic"), type(container).__name__)
    with pytest.raises(AssertionError, match="Incorrect types"):
        theirs(*container.children())


@pytest.mark.parametrize("case", [2, 3])
def test_torch_ao_refuses_those_norms_itself(case: int) -> None:
    net = nn.Sequential(*REFUSED[case][1]().children()).train()
    with torch_ao_qat.quietly(), pytest.raises(AssertionError, match="Only support fusing"):
        torch_ao_qat.torch_ao("quantization").fuse_modules_qat(net, ["0", "1"])


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as mistake:
        to_torch_ao(nn.Sequential(*(make() for _, make, _ in REFUSED)))
    assert len(mistake.value.problems) == len(REFUSED)


@pytest.mark.parametrize("maker", ["prepared", "learnable", "fx"])
def test_a_prepared_model_is_refused_by_name(maker: str) -> None:
    model = torch_ao_qat.MAKERS[maker]().model
    before = anatomy(model)
    with pytest.raises(UsageError, match=r"torch\.ao has prepared this model: ") as mistake:
        from_torch_ao(model, inplace=True)
    assert "stem.conv (ConvBnReLU2d)" in str(mistake.value)
    assert "weight_fake_quant" not in str(mistake.value)
    assert "'fusecli fuse' on that file" in str(mistake.value)
    assert anatomy(model) == before


def test_a_model_prepared_for_calibration_is_refused_by_name() -> None:
    net, names, _ = network("ConvReLU2d")
    ao = torch_ao_qat.torch_ao("quantization")
    with torch_ao_qat.quietly():
        net = ao.fuse_modules(net.eval(), names)
        net.qconfig = ao.get_default_qconfig("fbgemm")
        ao.prepare(net, inplace=True)
    with pytest.raises(UsageError, match=r"quant\.activation_post_process \(HistogramObserver\), m0\.act"):
        from_torch_ao(net)


def test_a_quantized_model_is_refused_by_name() -> None:
    net, names, x = network("ConvBnReLU2d")
    ao = torch_ao_qat.torch_ao("quantization")
    with torch_ao_qat.quietly():
        quantized = converted(ao.fuse_modules_qat(net, names), x)
    with pytest.raises(UsageError, match=r"has quantized this model: quant \(Quantize\), m0 \(ConvReLU2d\)"):
        from_torch_ao(quantized)


def test_a_prepared_layer_alone_is_named_the_model_itself() -> None:
    model = torch_ao_qat.prepared().model.stem.conv
    with pytest.raises(UsageError, match=r"this model: the model itself \(ConvBnReLU2d\); save"):
        from_torch_ao(model)


@pytest.mark.parametrize("function", [to_torch_ao, from_torch_ao])
def test_a_torch_without_torch_ao_is_a_mistake_that_is_explained(
    function: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.ao.nn.intrinsic", None)
    with pytest.raises(UsageError) as mistake:
        function(nets.conv_bn())
    assert str(mistake.value).startswith(
        f"fusecli.interop.torch_ao.{function.__name__}: this torch has no torch"
    )
    assert "stay with fusecli.nn's containers" in str(mistake.value)


def test_a_warning_of_torch_ao_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def loud(name: str, *rest: Any) -> Any:
        if name.startswith("torch.ao"):
            warnings.warn("torch.ao.quantization is deprecated", DeprecationWarning, stacklevel=2)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", loud)
    with pytest.raises(DeprecationWarning):
        import torch.ao.nn.intrinsic  # noqa: F401
    to_torch_ao(nets.conv_bn())


# Beside torch.ao's own.


@pytest.mark.parametrize("name", SEQUENCES)
def test_types_keys_and_training_are_those_of_torch_ao(name: str) -> None:
    theirs, ours, x = both_ways(name)
    assert anatomy(ours) == anatomy(theirs)
    assert type(ours.m0).__name__ == name
    assert same_state(ours, theirs)
    assert {n: m.training for n, m in ours.named_modules()} == {
        n: m.training for n, m in theirs.named_modules()
    }
    assert torch.equal(ours(x), theirs(x))
    assert same_state(ours, theirs)  # the running statistics have moved
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def converted(model: Any, x: Tensor) -> Any:
    """torch.ao's training with fake quantization, two steps of it, then int8."""
    ao = torch_ao_qat.torch_ao("quantization")
    with torch_ao_qat.quietly():
        model.qconfig = ao.get_default_qat_qconfig("fbgemm")
        prepared = ao.prepare_qat(model.train())
        for _ in range(2):
            loss = prepared(x).square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in prepared.parameters():
                    parameter -= 0.01 * parameter.grad
            prepared.zero_grad()
        return ao.convert(prepared.eval())


@pytest.mark.parametrize("name", SEQUENCES)
def test_prepare_qat_and_convert_give_the_same(name: str) -> None:
    fused = both_ways(name)
    theirs, ours = (converted(model, fused[2]) for model in fused[:2])
    assert anatomy(ours) == anatomy(theirs)
    assert ".quantized." in type(ours.m0).__module__
    with torch_ao_qat.quietly():
        outputs = theirs(fused[2]), ours(fused[2])
    assert torch.equal(*outputs)
    assert len(outputs[0].unique()) > 3


def test_prepare_for_calibration_gives_the_same() -> None:
    net, names, x = network("ConvReLU2d")
    ao = torch_ao_qat.torch_ao("quantization")
    net.eval()
    outputs = []
    with torch_ao_qat.quietly():
        for model in (ao.fuse_modules(net, names), to_torch_ao(fuse_modules(net, names))):
            model.qconfig = ao.get_default_qconfig("fbgemm")
            prepared = ao.prepare(model)
            prepared(x)
            outputs.append(ao.convert(prepared)(x))
    assert torch.equal(*outputs)


def test_without_the_adapter_torch_ao_does_not_know_the_containers() -> None:
    net, names, x = network("ConvBn2d")
    with torch_ao_qat.quietly():
        quantized = converted(fuse_modules_qat(net, names), x)
    assert type(quantized.m0) is fused_nn.ConvBn2d


@pytest.mark.parametrize("name", SEQUENCES)
def test_hooks_are_called_once_each(name: str) -> None:
    net, names, x = network(name)
    calls: list[str] = []
    net.get_submodule(names[0]).register_forward_pre_hook(lambda *_: calls.append("pre"))
    net.get_submodule(names[-1]).register_forward_hook(
        lambda module, args, kwargs, output: calls.append("post"), with_kwargs=True
    )
    to_torch_ao(fuse_modules_qat(net, names))(x)
    assert calls == ["pre", "post"]


def test_a_hook_can_still_be_removed_and_one_inside_is_kept() -> None:
    container = fused_nn.ConvReLU2d(nn.Conv2d(3, 4, 1), nn.ReLU())
    calls: list[str] = []
    handle = container.register_forward_hook(lambda *_: calls.append("container"))
    container[0].register_forward_hook(lambda *_: calls.append("conv"))
    changed = to_torch_ao(container, inplace=True)
    changed(torch.zeros(1, 3, 2, 2))
    handle.remove()
    changed(torch.zeros(1, 3, 2, 2))
    assert calls == ["conv", "container", "conv"]


# There and back.


def containers() -> Iterator[tuple[nn.Module, Tensor]]:
    for name, (modules, shape) in SEQUENCES.items():
        yield getattr(fused_nn, name)(*modules()), nets.images(*shape)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_there_and_back(training: bool, inplace: bool) -> None:
    for container, x in containers():
        net = nets.randomise(nn.Sequential(container), 0).train(training)
        before, twin = anatomy(net), copy.deepcopy(net)
        there = to_torch_ao(net, inplace)
        assert anatomy(there)["0"].__module__.startswith("torch.ao.nn.intrinsic")
        back = from_torch_ao(there, inplace)
        assert anatomy(back) == before
        assert same_state(back, twin)
        assert [m.training for m in back.modules()] == [m.training for m in twin.modules()]
        assert torch.equal(back(x), twin(x))
        assert (back is net) == inplace


def test_a_copy_shares_nothing() -> None:
    net = nn.Sequential(fused_nn.ConvBn2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    there = to_torch_ao(net)
    pointers = [{t.data_ptr() for t in model.state_dict().values()} for model in (net, there)]
    assert not pointers[0] & pointers[1]
    assert type(net[0]) is fused_nn.ConvBn2d


def test_the_model_itself_may_be_a_container() -> None:
    container = fused_nn.ConvReLU2d(nn.Conv2d(3, 4, 1), nn.ReLU())
    there = to_torch_ao(container)
    assert type(there).__module__.startswith("torch.ao.")
    assert type(from_torch_ao(there)) is fused_nn.ConvReLU2d
    assert to_torch_ao(container, inplace=True) is container
    with pytest.raises(UsageError, match=r"^the model itself: ConvReLU2d holds a OwnConv"):
        to_torch_ao(fused_nn.ConvReLU2d(OwnConv(3, 4, 1), nn.ReLU()))


def test_a_shared_container_stays_shared() -> None:
    container = fused_nn.ConvReLU2d(nn.Conv2d(3, 3, 1), nn.ReLU())
    for there in (
        to_torch_ao(nn.Sequential(container, container)),
        to_torch_ao(nn.Sequential(container, container), inplace=True),
    ):
        assert there[0] is there[1]
        back = from_torch_ao(there)
        assert back[0] is back[1]


def test_attributes_modes_and_parameters_stay() -> None:
    container = fused_nn.ConvBnReLU2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    container.qconfig = None  # torch.ao reads it: this layer stays float
    container[0].weight.requires_grad_(False)
    weight = container[0].weight
    there: Any = to_torch_ao(nn.Sequential(container), inplace=True)[0]
    assert vars(there)["qconfig"] is None
    assert there[0].weight is weight
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("whole", "norm", "told"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_norm_at_rest_stays_at_rest_and_is_told(
    whole: bool, norm: bool, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    container = fused_nn.ConvBn2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train(whole)
    container[1].train(norm)
    there: Any = to_torch_ao(nn.Sequential(container))
    assert (there[0].training, there[0][1].training) == (whole, norm)
    assert ["prepare_qat makes it learn again" in record.getMessage() for record in caplog.records] == (
        [True] if told else []
    )
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_prepare_qat_does_make_a_norm_at_rest_learn_again() -> None:
    ao, qat = torch_ao_qat.torch_ao("quantization"), torch_ao_qat.torch_ao("nn.intrinsic.qat")
    net: Any = to_torch_ao(nn.Sequential(fused_nn.ConvBn2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    net[0][1].eval()
    with torch_ao_qat.quietly():
        net.qconfig = ao.get_default_qat_qconfig("fbgemm")
        prepared = ao.prepare_qat(net)
    assert prepared[0].bn.training
    assert not prepared.apply(qat.freeze_bn_stats)[0].bn.training


def test_every_container_of_both_libraries_is_known() -> None:
    intrinsic = torch_ao_qat.torch_ao("nn.intrinsic")
    ours = {name for name in vars(fused_nn) if "ReLU" in name or "Bn" in name}
    shared = {name for name in ours if hasattr(intrinsic, name)}
    assert {kind.__name__ for kind in adapter._SHARED} == shared == set(SEQUENCES)
    assert ours - shared == {"BNReLU1d"}
