"""Tensors from quantization-aware training, recognised by their names; plain state dicts stay plain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.digits.net import DigitsNet
from fusecli import nn as fused_nn
from fusecli.checkpoint.qat_layout import QatLayout, Quantizer, qat_layout
from tests import nets, torch_ao_qat

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
RANGES = ("activation_post_process.min_val", "activation_post_process.max_val")
FAKE = ("scale", "zero_point", "fake_quant_enabled", "observer_enabled", *RANGES)
OBSERVER = ("eps", "min_val", "max_val")

Shapes = dict[str, tuple[int, ...]]


def anything(path: str) -> bool:
    return True


def below(path: str, names: Iterable[str]) -> Shapes:
    """Tensors of one element each under these names."""
    return {f"{path}.{name}": (1,) for name in names}


def layer(path: str, channels: int = 4, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{path}.weight": (channels, 3, 1, 1)}
    return {**weight, f"{path}.bias": (channels,)} if bias else weight


def norm(path: str, channels: int = 4) -> Shapes:
    return {f"{path}.{name}": (channels,) if name != NORM[-1] else () for name in NORM}


def shapes_of(module: nn.Module | Mapping[str, Tensor]) -> Shapes:
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def found(shapes: Shapes, contains: Callable[[str], bool] = lambda _: False) -> QatLayout:
    """The layout, which has each key of the file once."""
    layout = qat_layout(shapes, contains)
    assert layout is not None
    scales = [key for q in layout.quantizers.values() for key in (q.scale, q.zero_point)]
    assert sorted([*layout.names, *scales, *layout.dropped]) == sorted(shapes)
    assert len(set(layout.names.values())) == len(layout.names)
    return layout


class OwnNormConv(nn.Conv2d):
    """A convolution with a norm of its own inside, under the name that torch.ao gives one."""

    def __init__(self) -> None:
        super().__init__(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)


class NamedAlike(nn.Module):
    """Modules of a user with the names of torch.ao's observers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.conv.add_module("weight_fake_quant", nn.BatchNorm2d(4))
        self.activation_post_process = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "conv": lambda: nn.Conv2d(3, 4, 1),
    "conv_bn": nets.conv_bn,
    "two_pairs": nets.two_pairs,
    "digits": DigitsNet,
    "Sequential(conv, bn)": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    "nested Sequential": lambda: nn.ModuleDict(
        {"stem": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())}
    ),
    "torchvision's": lambda: nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 4, 1),
            "bn1": nn.BatchNorm2d(4),
            "layer1": nn.ModuleList(
                nn.ModuleDict({"downsample": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
                for _ in range(2)
            ),
            "features": nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))]),
        }
    ),
    "frozen": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nets.FrozenBatchNorm2d(4)),
    "own bn": OwnNormConv,
    "named alike": NamedAlike,
    "lstm": lambda: nn.LSTM(3, 4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, batch_first=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_state_dict_has_no_layout(name: str) -> None:
    assert qat_layout(shapes_of(PLAIN[name]())) is None


@pytest.mark.parametrize(
    "keys",
    [
        # A norm by the layer's name alone is no proof: only a prepared layer has a quantized weight.
        {**layer("conv"), **norm("conv.bn")},
        {**layer("conv"), **below("conv", ("gamma", "beta", "running_mean", "running_var"))},
        # Something of the user's under torch.ao's names.
        below("act.activation_post_process", ("weight", "bias")),
        below("act.activation_post_process", ("scale",)),
        below("act.activation_post_process", ("min_val", "threshold")),
        {"weight_fake_quant": (4,), "net.activation_post_process": (4,)},
        below("activation_post_process_net.head", ("weight", "bias")),
        below("quant", ("scale", "zero_point")),  # as torch.ao's convert leaves a QuantStub
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_names_that_are_no_evidence(keys: Shapes) -> None:
    assert qat_layout(keys) is None


@pytest.mark.parametrize(
    "keys",
    [
        {**layer("p.0"), **layer("p.1")},
        {**layer("p.0"), **norm("p.1", channels=8)},
        {**layer("p.0"), **norm("p.1"), **layer("p.3")},
        {**layer("p.0"), **norm("p.1"), **layer("p")},
        {**layer("p.0.conv"), **norm("p.1")},
        {**layer("p.0"), **layer("p.0.branch"), **norm("p.1")},
        {**layer("p.0"), **norm("p.1"), "p.1.threshold": (4,)},
        {**below("p.0", ("weight_g", "weight_v")), **layer("p.1")},
        {**norm("p.0"), **layer("p.1")},
        {**norm("p.0"), **norm("p.1")},
        {**layer("p.0"), **below("p.1", ("weight", "bias"))},
        {"p.0": (4, 3), "p.1": (4,)},
        {"p.0.weight": (4,), "p.0.bias": (4,)},
        {"p.0.weight_ih_l0": (4, 3), "p.0.bias_ih_l0": (4,)},
        layer("p.2"),
        layer("p"),
    ],
    ids=lambda keys: " ".join(key.removeprefix("p.") for key in keys)[:40],
)
def test_a_path_that_may_be_a_container_and_is_none(keys: Shapes) -> None:
    assert qat_layout(keys, anything) is None


def test_only_the_paths_that_may_be_containers_are() -> None:
    state = shapes_of(nn.ModuleDict({name: nn.Sequential(*nets.conv_bn()) for name in ("a", "b")}))
    layout = found(state, lambda path: path == "b")
    assert layout.units == ("b",)
    assert {key: name for key, name in layout.names.items() if key != name} == {
        "b.0.weight": "b.weight",
        "b.0.bias": "b.bias",
        **{f"b.1.{name}": f"b.bn.{name}" for name in NORM},
    }


# Container, its modules, what is expected of the names, and whether a norm is inside.
CONTAINERS: list[tuple[str, Any, list[str], bool]] = [
    ("ConvReLU2d", [nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()], ["weight"], False),
    ("LinearReLU", [nn.Linear(3, 4), nn.ReLU()], ["weight", "bias"], False),
    ("BNReLU2d", [nn.BatchNorm2d(4), nn.ReLU()], [*NORM], False),
    ("BNReLU3d", [nn.BatchNorm3d(4, affine=False), nn.ReLU()], [*NORM[2:]], False),
    (
        "ConvBn1d",
        [nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)],
        ["weight", "bias", *(f"bn.{n}" for n in NORM)],
        True,
    ),
    (
        "ConvBnReLU2d",
        [nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
        ["weight", *(f"bn.{name}" for name in NORM)],
        True,
    ),
    (
        "LinearBn1d",
        [nn.Linear(3, 4), nn.BatchNorm1d(4)],
        ["weight", "bias", *(f"bn.{n}" for n in NORM)],
        True,
    ),
    (
        "ConvBn2d",
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1, bias=False)), nn.BatchNorm2d(4)],
        [f"parametrizations.weight.original{n}" for n in (0, 1)] + [f"bn.{name}" for name in NORM],
        True,
    ),
]


@pytest.mark.parametrize("path", ["", "net.block.3"])
@pytest.mark.parametrize(
    ("name", "modules", "names", "with_norm"), CONTAINERS, ids=[name for name, *_ in CONTAINERS]
)
def test_containers(
    name: str, modules: list[nn.Module], names: list[str], with_norm: bool, path: str
) -> None:
    dot = f"{path}." if path else ""
    state = {f"{dot}{key}": s for key, s in shapes_of(getattr(fused_nn, name)(*modules)).items()}
    layout = found(state, lambda candidate: candidate == path)
    assert layout.kind == "fused"
    assert list(layout.names.values()) == [f"{dot}{name}" for name in names]
    assert layout.units == ((path,) if with_norm else ())
    assert (layout.quantizers, layout.dropped) == ({}, ())


@pytest.mark.parametrize("parts", [("weight_g", "weight_v"), ("weight_orig", "weight_mask")])
def test_a_container_of_a_layer_whose_weight_is_computed(parts: tuple[str, ...]) -> None:
    layout = found({**below("p.0", parts), **norm("p.1")}, anything)
    assert list(layout.names.values()) == [*below("p", parts), *norm("p.bn")]
    assert layout.units == ("p",)


def seen(owner: str) -> tuple[str, str]:
    return f"{owner}.activation_post_process.min_val", f"{owner}.activation_post_process.max_val"


def test_the_scale_of_a_learnable_quantizer_is_not_made_of_what_it_saw() -> None:
    learnable = [*FAKE, "learning_enabled"]
    layout = found({**layer("head"), **below("head.weight_fake_quant", learnable)})
    assert layout.quantizers["head.weight"].seen is None


def test_a_prepared_layer_with_its_norm() -> None:
    keys = {
        **layer("conv", bias=True),
        **norm("conv.bn"),
        **below("conv.weight_fake_quant", FAKE),
        **below("conv.activation_post_process", FAKE),
    }
    layout = found(keys)
    assert (layout.kind, layout.units) == ("prepared", ("conv",))
    assert list(layout.names) == list(layout.names.values()) == [*layer("conv", bias=True), *norm("conv.bn")]
    weight, output = "conv.weight_fake_quant", "conv.activation_post_process"
    assert layout.quantizers == {
        "conv.weight": Quantizer(f"{weight}.scale", f"{weight}.zero_point", True, seen(weight)),
        "conv.output": Quantizer(f"{output}.scale", f"{output}.zero_point", False, seen(output)),
    }
    assert layout.dropped == tuple(f"{owner}.{name}" for owner in (weight, output) for name in FAKE[2:])


def test_a_prepared_layer_without_a_norm() -> None:
    layout = found({**layer("head"), **below("head.weight_fake_quant", FAKE)})
    assert (layout.kind, layout.units) == ("prepared", ())
    assert layout.quantizers["head.weight"].folded is False


@pytest.mark.parametrize(
    "own",
    [
        {**norm("own.bn"), **below("own.activation_post_process", FAKE)},
        {**below("own", ("gamma", "running_mean")), **below("own.activation_post_process", FAKE)},
        {**below("own", ("running_mean",)), **below("own.weight_fake_quant", FAKE)},
    ],
    ids=["bn", "gamma", "running_mean"],
)
def test_a_norm_of_the_users_own_beside_prepared_layers(own: Shapes) -> None:
    layout = found({**layer("own"), **own, **layer("head"), **below("head.weight_fake_quant", FAKE)})
    assert layout.units == ()
    assert all(key == name for key, name in layout.names.items())


def test_the_first_version_has_the_norm_on_the_layer() -> None:
    norms = ("gamma", "beta", *NORM[2:])
    keys = {**layer("conv"), **below("conv", norms), **below("conv.weight_fake_quant", FAKE)}
    layout = found(keys)
    assert layout.units == ("conv",)
    plain = [layout.names[f"conv.{name}"] for name in norms]
    assert plain == [f"conv.bn.{name}" for name in NORM]
    assert layout.quantizers["conv.weight"].folded


def test_a_norm_in_both_versions_is_refused() -> None:
    keys = {**layer("conv"), **norm("conv.bn"), **below("conv", ("gamma", "running_mean"))}
    with pytest.raises(
        ValueError, match=r"^keys 'conv\.bn\.weight' and 'conv\.gamma' would both be named 'c"
    ):
        qat_layout({**keys, **below("conv.weight_fake_quant", FAKE)})


OUTPUTS = [
    ("quant.activation_post_process", "quant.output"),
    ("net.add.activation_post_process", "net.add.output"),
    ("activation_post_process", "output"),
    ("activation_post_process_3", "activation_post_process_3"),
    ("sub.activation_post_process_12", "sub.activation_post_process_12"),
    ("stem_conv_activation_post_process_0", "stem_conv_activation_post_process_0"),
]


@pytest.mark.parametrize(("path", "name"), OUTPUTS, ids=[name for _, name in OUTPUTS])
def test_observers_of_outputs(path: str, name: str) -> None:
    layout = found({**layer("head"), **below(path, FAKE)})
    assert list(layout.quantizers) == [name]
    assert layout.quantizers[name] == Quantizer(f"{path}.scale", f"{path}.zero_point", False, seen(path))


def test_observers_without_a_scale_are_dropped() -> None:
    for observer in (OBSERVER, (*OBSERVER, "histogram"), ("min_vals", "max_vals")):
        keys = below("quant.activation_post_process", observer)
        layout = found({**layer("head"), **keys})
        assert (layout.kind, layout.quantizers, layout.dropped) == ("prepared", {}, tuple(keys))
        assert layout.names == {"head.weight": "head.weight"}


def test_an_observer_inside_an_observer_is_the_outers() -> None:
    # FixedQParamsFakeQuantize has an observer with a scale of its own.
    keys = below("sigmoid.activation_post_process", FAKE)
    inner = below("sigmoid.activation_post_process.activation_post_process", ("scale", "zero_point"))
    layout = found({**keys, **inner})
    assert [q.scale for q in layout.quantizers.values()] == ["sigmoid.activation_post_process.scale"]
    assert set(inner) <= set(layout.dropped)


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        (norm("p.0"), list(norm("p"))),
        (layer("p.0"), list(layer("p"))),
        ({**layer("p.0"), **norm("p.1")}, [*layer("p"), *norm("p.bn")]),
    ],
    ids=["BNReLU", "ConvReLU", "ConvBn"],
)
def test_a_container_with_an_observer_needs_nobody_to_know_it(inside: Shapes, names: list[str]) -> None:
    layout = found({**inside, **below("p.activation_post_process", FAKE)})
    assert list(layout.names.values()) == names
    assert layout.units == (("p",) if "p.1.weight" in inside else ())
    assert list(layout.quantizers) == ["p.output"]


def test_containers_and_prepared_layers_in_one_file() -> None:
    keys = {
        **norm("first.0"),
        **layer("conv"),
        **norm("conv.bn"),
        **below("conv.weight_fake_quant", FAKE),
        **layer("late.0"),
        **norm("late.1"),
        **layer("plain.0"),
        **norm("plain.1"),
    }
    layout = found(keys, lambda path: path in ("first", "late"))
    assert (layout.kind, layout.units) == ("prepared", ("conv", "late"))
    assert layout.names["first.0.running_mean"] == "first.running_mean"
    assert layout.names["late.1.running_mean"] == "late.bn.running_mean"
    assert layout.names["plain.1.running_mean"] == "plain.1.running_mean"


def test_a_container_whose_members_were_prepared_one_by_one() -> None:
    keys = {**layer("p.0"), **below("p.0.weight_fake_quant", FAKE), **norm("p.1")}
    layout = found(keys, anything)
    assert layout.names["p.0.weight"] == "p.weight"
    assert list(layout.quantizers) == ["p.weight"]
    assert layout.quantizers["p.weight"].folded is False


@pytest.mark.parametrize("seed", range(30))
def test_models_put_together_by_chance(seed: int) -> None:
    """What was built is what is found, whatever the depth and the mixture."""
    rng = random.Random(seed)
    keys: Shapes = {}
    units, quantized, containers = [], [], set()
    for number in range(rng.randint(1, 8)):
        path = ".".join([rng.choice(["a", "0", "1", "bn", "conv"]) for _ in range(rng.randint(0, 3))])
        path = f"{path}.m{number}".removeprefix(".")
        kind = rng.choice(["plain", "sequential", "container", "prepared", "prepared-1", "bare"])
        bias, observed = rng.random() < 0.5, rng.random() < 0.5
        if kind in ("sequential", "container"):
            keys |= {**layer(f"{path}.0", bias=bias), **norm(f"{path}.1")}
        elif kind == "prepared":
            keys |= {**layer(path, bias=bias), **norm(f"{path}.bn")}
        elif kind == "prepared-1":
            keys |= {**layer(path, bias=bias), **below(path, ("gamma", "beta", *NORM[2:]))}
        else:
            keys |= layer(path, bias=bias)
        if kind.startswith("prepared") or kind == "bare":
            keys |= below(f"{path}.weight_fake_quant", FAKE)
            quantized.append(f"{path}.weight")
        if kind not in ("sequential", "plain") and observed:
            keys |= below(f"{path}.activation_post_process", FAKE)
            quantized.append(f"{path}.output")
        if kind == "container":
            containers.add(path)
        if kind in ("container", "prepared", "prepared-1"):
            units.append(path)
    if not quantized and not containers:
        assert qat_layout(keys, containers.__contains__) is None
        return
    layout = found(keys, containers.__contains__)
    assert layout.kind == ("prepared" if quantized else "fused")
    assert layout.units == tuple(units)
    assert list(layout.quantizers) == quantized
    for unit in units:
        inside = {name for name in layout.names.values() if name.startswith(f"{unit}.")}
        assert inside - {f"{unit}.bias"} == {f"{unit}.weight", *(f"{unit}.bn.{name}" for name in NORM)}


def as_float(state: Mapping[str, Tensor], layout: QatLayout) -> dict[str, Tensor]:
    """The tensors under the names of the digits network."""
    plain = {layout.names[key]: tensor for key, tensor in state.items() if key in layout.names}
    for unit, its_norm in torch_ao_qat.NORMS.items():
        inside = f"{unit}.bn."
        plain = {
            f"{its_norm}.{name.removeprefix(inside)}" if name.startswith(inside) else name: tensor
            for name, tensor in plain.items()
        }
    return plain


@pytest.mark.parametrize("maker", [*torch_ao_qat.MAKERS, "version 1"])
def test_the_plain_names_are_the_function_that_torch_ao_trained(maker: str) -> None:
    trained = torch_ao_qat.MAKERS.get(maker, torch_ao_qat.prepared)()
    state = torch_ao_qat.version_1(trained.state) if maker == "version 1" else trained.state
    layout = found(shapes_of(state), torch_ao_qat.UNITS.__contains__)
    assert layout.units == torch_ao_qat.UNITS
    assert layout.kind == ("fused" if maker == "fused" else "prepared")
    net = DigitsNet().double()
    net.load_state_dict(as_float(state, layout), strict=True)
    error = (net.eval()(trained.images) - trained.expected).abs().max() / trained.expected.abs().max()
    assert error < 1e-9
    weights = {name: q for name, q in layout.quantizers.items() if name.endswith(".weight")}
    if maker != "fused":
        assert {name for name, q in weights.items() if q.folded} == {f"{u}.weight" for u in layout.units}
        assert weights.keys() - {f"{u}.weight" for u in layout.units} == {"head.classifier.weight"}


@pytest.mark.parametrize(("maker", "number"), [("prepared", 32), ("per-tensor", 1), ("learnable", 1)])
def test_the_scales_are_those_of_the_folded_weight(maker: str, number: int) -> None:
    trained = torch_ao_qat.MAKERS[maker]()
    quantizer = found(shapes_of(trained.state)).quantizers["stem.conv.weight"]
    assert trained.state[quantizer.scale].shape == trained.state[quantizer.zero_point].shape == (number,)


def test_a_stub_a_sum_and_a_bn_relu_of_torch_ao() -> None:
    ao, quantized = torch_ao_qat.torch_ao("quantization"), torch_ao_qat.torch_ao("nn.quantized")
    net = nn.Sequential(
        ao.QuantStub(), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2), nn.Sigmoid()
    )
    net.add_module("sum", quantized.FloatFunctional())
    with torch_ao_qat.quietly():
        net = ao.fuse_modules_qat(net.train(), ["1", "2"])
        net.qconfig = ao.get_default_qat_qconfig("fbgemm")
        ao.prepare_qat(net, inplace=True)
    layout = found(shapes_of(net))
    assert list(layout.quantizers) == ["0.output", "1.output", "3.output", "4.output", "sum.output"]
    assert list(layout.names.values()) == [*(f"1.{name}" for name in NORM), "3.weight", "3.bias"]
    assert layout.units == ()


def test_a_model_prepared_for_calibration() -> None:
    ao = torch_ao_qat.torch_ao("quantization")
    net = nn.Sequential(ao.QuantStub(), *nets.conv_bn(), nn.ReLU(), nn.Linear(3, 4)).eval()
    with torch_ao_qat.quietly():
        net = ao.fuse_modules(net, ["1", "2", "3"])
        net.qconfig = ao.get_default_qconfig("fbgemm")
        ao.prepare(net, inplace=True)
    layout = found(shapes_of(net))
    assert (layout.kind, layout.quantizers, layout.units) == ("prepared", {}, ())
    assert list(layout.names.values()) == ["1.weight", "1.bias", "4.weight", "4.bias"]


def test_a_torch_size_is_a_shape() -> None:
    sizes: Any = {name: torch.Size(shape) for name, shape in {**layer("p.0"), **norm("p.1")}.items()}
    assert found(sizes, anything).units == ("p",)
