"""Every layout of quantization-aware training, with norms and without, through all commands, from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusecli
import fusecli.qat
from fusecli.checkpoint import open_checkpoint
from tests import torch_ao_qat
from tests.conftest import Cli
from tests.nets import randomise
from tests.torch_ao_qat import quietly, torch_ao

WORDS = ["--spec", "fuse.yaml", "--allow-code", "net.py"]
NETS = """
from torch import nn

class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.point, self.norm = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.flat, self.head = nn.Flatten(), nn.Linear(6 * 16, 5)
    def forward(self, x):
        return self.head(self.flat(self.norm(self.point(self.act(self.bn(self.conv(x)))))))

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.a, self.act, self.b = nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 5)
    def forward(self, x):
        return self.b(self.act(self.a(self.flat(x))))

class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.bn, self.act = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()
        self.conv, self.norm = nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    def forward(self, x):
        return self.norm(self.conv(self.act(self.bn(self.up(x)))))
"""
GROUPS = {
    "Norms": [["conv", "bn", "act"], ["point", "norm"]],
    "Plain": [],
    "Up": [["up", "bn", "act"], ["conv", "norm"]],
}
FUSED = {
    "Norms": [["conv", "bn", "act"], ["point", "norm"]],
    "Plain": [["a", "act"]],
    "Up": [["conv", "norm"]],
}
LAYOUTS = ["fused", "prepared", "version 1", "fx", "fusecli"]
ACTIVATIONS = ["unsigned", "signed"]
WEIGHTS = ["per-channel", "per-tensor"]


class Case(NamedTuple):
    layout: str
    net: str
    activations: str
    weights: str


CASES = [
    Case(layout, net, activations, weights)
    for layout in LAYOUTS
    for net in ("Norms", "Plain")
    for activations in ACTIVATIONS
    for weights in WEIGHTS
    # Nothing is observed in containers alone, so nothing distinguishes them; fusecli's are unsigned here.
    if not (layout == "fused" and (activations, weights) != ("unsigned", "per-channel"))
    if not (layout == "fusecli" and activations == "signed")
]
# One of each layout, net, sign and granularity in every run; the rest of the product stands behind `slow`.
COVERING = {
    Case("fused", "Norms", "unsigned", "per-channel"),
    Case("fused", "Plain", "unsigned", "per-channel"),
    Case("prepared", "Norms", "signed", "per-channel"),
    Case("prepared", "Plain", "signed", "per-tensor"),
    Case("prepared", "Plain", "unsigned", "per-channel"),
    Case("version 1", "Norms", "unsigned", "per-tensor"),
    Case("fx", "Norms", "signed", "per-tensor"),
    Case("fx", "Plain", "unsigned", "per-channel"),
    Case("fusecli", "Norms", "unsigned", "per-channel"),
    Case("fusecli", "Plain", "unsigned", "per-tensor"),
}
EACH = [
    pytest.param(case, id="-".join(case), marks=() if case in COVERING else pytest.mark.slow)
    for case in CASES
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETS)
    return tmp_path


def net(name: str) -> nn.Module:
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(NETS, "net.py", "exec"), names)
    model: nn.Module = randomise(names[name](), 3).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.mul_(0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(module.weight.sign() * (0.5 + module.weight.abs() / 2))
    return model


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 3, 6, 6, generator=generator) for _ in range(count)]


def qconfig(case: Case) -> Any:
    ao = torch_ao("quantization")
    signed, each = case.activations == "signed", case.weights == "per-channel"
    activation = ao.FakeQuantize.with_args(
        observer=ao.MinMaxObserver,
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
        quant_min=-128 if signed else 0,
        quant_max=127 if signed else 255,
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.PerChannelMinMaxObserver if each else ao.MinMaxObserver,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric if each else torch.per_tensor_symmetric,
        quant_min=-128,
        quant_max=127,
    )
    return ao.QConfig(activation, weight)


def trained(case: Case, steps: int = 3) -> nn.Module:
    """The model in the layout, after some batches in train mode."""
    model: Any = net(case.net)
    ao = torch_ao("quantization")
    with quietly():
        if case.layout == "fx":
            fx = torch_ao("quantization.quantize_fx")
            mapping = ao.QConfigMapping().set_global(qconfig(case))
            model = fx.prepare_qat_fx(model, mapping, (batches(1)[0],))
        elif case.layout == "fusecli":
            for group in FUSED[case.net]:
                model = fusecli.fuse_modules_qat(model, group)
            scheme = fusecli.qat.Scheme(
                fusecli.qat.INT8_PER_CHANNEL
                if case.weights == "per-channel"
                else fusecli.qat.INT8_PER_TENSOR,
                fusecli.qat.TensorScheme(0, 255, averaging_constant=1.0),
            )
            model = fusecli.prepare_qat(model, scheme)
        else:
            model = ao.fuse_modules_qat(model, FUSED[case.net])
            if case.layout != "fused":
                model.qconfig = qconfig(case)
                model = ao.prepare_qat(model)
        # The statistics stand still: what a weight is multiplied by is then what its scale was made of.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        for x in batches(steps):
            model(x)
    return model


def simulated(model: nn.Module, x: Tensor, *, rounding: bool) -> Tensor:
    """What the trained model gives in eval mode; without rounding in float64."""
    ao = torch_ao("quantization")
    with quietly(), torch.no_grad():
        twin = torch_ao_qat.copy.deepcopy(model).eval()
        twin.apply(ao.disable_observer).apply(fusecli.qat.disable_observer)
        if rounding:
            # The input is a quantized value too, which the eager layouts leave to a QuantStub.
            low, high = torch.cat(batches(3)).aminmax()
            scale = (high - low) / 255
            return twin(torch.fake_quantize_per_tensor_affine(x, scale, int(-(low / scale).round()), 0, 255))
        twin.apply(ao.disable_fake_quant).apply(fusecli.qat.disable_fake_quant)
        return twin.double()(x.double())


def sqnr(reference: Tensor, given: Tensor) -> float:
    noise = (reference - given.double()).square().sum()
    return float(10 * (reference.square().sum() / noise).log10())


def write(case: Case, state: dict[str, Tensor], **more: Any) -> None:
    torch.save(state, "qat.pt")
    save_file({"x": torch.cat(batches(3))}, "images.safetensors")
    spec = {
        "version": 1,
        "model": {"factory": f"net.py:{case.net}"},
        "inputs": [{"file": "images.safetensors", "key": "x"}],
        "groups": GROUPS[case.net],
        "verify": {"samples": 1},
        "quantize": {"calibrate": [{"file": "images.safetensors", "key": "x"}], "threshold": {"sqnr": 1}},
        **more,
    }
    Path("fuse.yaml").write_text(json.dumps(spec))


def integers(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["fusecli"])["trained"]["quantizers"]
    return {entry["of"]: entry["integers"] for entry in found}


def state_of(case: Case, model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    if case.layout != "version 1":
        return state
    old = {f"bn.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")}
    old |= {"bn.weight": "gamma", "bn.bias": "beta"}
    renamed = {
        f"{group[0]}.{new}": f"{group[0]}.{name}" for group in FUSED["Norms"] for new, name in old.items()
    }
    return {renamed.get(key, key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("case", EACH)
def test_it_goes_all_the_way(folder: Path, cli: Cli, case: Case) -> None:
    pytest.importorskip("torchao")
    model = trained(case)
    write(case, state_of(case, model))
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0, done.err + done.out
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    assert cli("verify", "qat.pt", "out.safetensors").code == 0
    x = batches(1, seed=9)[0]
    exact = simulated(model, x, rounding=False)
    with torch.no_grad():
        folded = fusecli.load_fused(net(case.net), "out.safetensors").double()(x.double())
    assert (folded - exact).abs().max() <= 1e-6 * exact.abs().max()  # what is stored is rounded to float32
    done = cli("quantize", "qat.pt", *WORDS, "-o", "int8.pt2")
    assert done.code == 0, done.err + done.out
    assert cli("verify", "qat.pt", "int8.pt2", *WORDS, "--allow-pickle").code == 0
    with torch.no_grad():
        given = fusecli.load_int8("int8.pt2", allow_pickle=True)(x)
    least = 25.0
    # FX quantizes no signed activations, so it simulates weights only.
    if case.layout != "fused" and (case.layout, case.activations) != ("fx", "signed"):
        least = sqnr(exact, simulated(model, x, rounding=True)) - 1
    assert sqnr(exact, given) >= least


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_learned_scales_are_those_of_the_int8_file(
    folder: Path, cli: Cli, activations: str, weights: str
) -> None:
    """Signed integers are stored as unsigned ones, 128 above; nothing is folded, and nothing is lost."""
    pytest.importorskip("torchao")
    case = Case("prepared", "Plain", activations, weights)
    learned = trained(case).state_dict()
    write(case, learned)
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert integers("out.safetensors")["b.output"] == ([0, 255] if activations == "unsigned" else [-128, 127])
    assert cli("quantize", "qat.pt", *WORDS, "-o", "int8.safetensors").code == 0
    assert cli("verify", "qat.pt", "int8.safetensors", *WORDS).code == 0
    stored = load_file("int8.safetensors")
    step = 128 if activations == "signed" else 0
    for layer in "ab":
        weight, output = f"{layer}.weight_fake_quant", f"{layer}.activation_post_process"
        scale = learned[f"{weight}.scale"].expand_as(stored[f"{layer}.weight.scale"])
        assert torch.equal(stored[f"{layer}.weight.scale"], scale)
        assert torch.equal(stored[f"{layer}.output.scale"], learned[f"{output}.scale"].squeeze())
        assert int(stored[f"{layer}.output.zero_point"]) == int(learned[f"{output}.zero_point"]) + step


def test_float_weights_are_those_of_the_trained_model_in_float64(folder: Path, cli: Cli) -> None:
    """Without the rounding to float32 they agree to what a proof sees."""
    case = Case("prepared", "Norms", "signed", "per-channel")
    model = trained(case)
    state = {
        name: tensor.double()
        if tensor.is_floating_point() and "fake" not in name and "post" not in name
        else tensor
        for name, tensor in model.state_dict().items()
    }
    write(case, state, inputs=[{"shape": [2, 3, 6, 6], "dtype": "float64"}])
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    x = batches(1, seed=9)[0]
    exact = simulated(model, x, rounding=False)
    with torch.no_grad():
        folded = fusecli.load_fused(net("Norms"), "out.safetensors")(x.double())
    assert (folded - exact).abs().max() <= 1e-7 * exact.abs().max()


def test_observers_that_never_saw_a_value_are_left_out_by_name(folder: Path, cli: Cli) -> None:
    """Before the first step a scale is 1 and a zero point 0, whatever the values are."""
    pytest.importorskip("torchao")
    case = Case("prepared", "Plain", "unsigned", "per-channel")
    model: Any = trained(case, steps=3)
    fresh: Any = trained(case, steps=0)
    state = model.state_dict()
    off = {
        name: tensor for name, tensor in fresh.state_dict().items() if name.startswith("a.activation_post")
    }
    write(case, {**state, **off})
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    said = " ".join(done.out.split())
    assert (done.code, "a.output: its scale is not used: its observer has never seen a value" in said) == (
        0,
        True,
    )
    assert "b.output: its scale is not used" not in said
    assert integers("out.safetensors").keys() == {"a.weight", "b.weight", "b.output"}
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    write(case, fresh.state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors", "--force").code == 0
    assert not integers("out.safetensors")
    done = cli("quantize", "qat.pt", *WORDS, "-o", "int8.pt2")
    assert done.code == 0, done.out
    x = batches(1)[0]
    with torch.no_grad():
        given = fusecli.load_int8("int8.pt2", allow_pickle=True)(x)
    assert sqnr(simulated(model, x, rounding=False), given) > 25


@pytest.mark.parametrize("weights", WEIGHTS)
def test_fx_makes_a_container_of_a_norm_behind_a_transposed_convolution(
    folder: Path, cli: Cli, weights: str
) -> None:
    case = Case("fx", "Up", "unsigned", weights)
    ao, fx = torch_ao("quantization"), torch_ao("quantization.quantize_fx")
    with quietly():
        transposed = qconfig(case._replace(weights="per-tensor"))  # torch.ao has no other for it
        mapping = (
            ao.QConfigMapping().set_global(qconfig(case)).set_object_type(nn.ConvTranspose2d, transposed)
        )
        model = fx.prepare_qat_fx(net("Up"), mapping, (batches(1)[0],))
        for x in batches(3):
            model(x)
    assert "bn.0.running_mean" in model.state_dict()
    write(case, model.state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    assert cli("verify", "qat.pt", "out.safetensors").code == 0


def test_the_scales_of_fx_belong_to_nothing_that_has_a_name(folder: Path, cli: Cli) -> None:
    pytest.importorskip("torchao")
    case = Case("fx", "Plain", "unsigned", "per-channel")
    write(case, trained(case).state_dict())
    said = " ".join(cli("quantize", "qat.pt", *WORDS, "-o", "int8.safetensors").out.split())
    assert "prepare_qat_fx numbers its observers" in said
    assert said.count("prepare_qat_fx numbers") == 1
    assert "no quantized value" not in said


@pytest.mark.parametrize("prepared", [True, False])
def test_the_average_of_a_model(folder: Path, cli: Cli, prepared: bool) -> None:
    """torch.optim.swa_utils.AveragedModel keeps a counter beside its module."""
    case = Case("prepared", "Norms", "unsigned", "per-channel")
    model = trained(case) if prepared else net("Norms")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    write(case, averaged.state_dict())
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0, done.err
    assert "an AveragedModel was saved: its average is read" in " ".join(done.out.split())
    assert "n_averaged" not in load_file("out.safetensors")
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    with open_checkpoint("qat.pt") as checkpoint:
        assert "n_averaged" not in checkpoint.tensors


def test_the_average_that_was_pickled_whole(folder: Path, cli: Cli) -> None:
    """As of DataParallel, what it wraps is the model."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1)
    torch.save(torch.optim.swa_utils.AveragedModel(model), "whole.pt")
    spec = {
        "version": 1,
        "inputs": [{"shape": [2, 3, 6, 6]}],
        "groups": [["0", "1"]],
        "verify": {"samples": 1},
    }
    Path("fuse.yaml").write_text(json.dumps(spec))
    words = ["--spec", "fuse.yaml", "--allow-pickle"]
    done = cli("fuse", "whole.pt", *words, "-o", "out.safetensors")
    assert done.code == 0, done.err
    assert load_file("out.safetensors").keys() == {"0.weight", "0.bias"}


def test_a_counter_of_somebodys_own_stays(folder: Path) -> None:
    torch.save(
        {"n_averaged": torch.tensor(3), "module.weight": torch.ones(2), "other": torch.ones(2)}, "own.pt"
    )
    with open_checkpoint("own.pt") as checkpoint:
        assert set(checkpoint.tensors) == {"n_averaged", "module.weight", "other"}


def test_a_channel_of_positive_weights_alone(folder: Path, cli: Cli) -> None:
    """torch.ao's fused fake quantizer gives it the zero point -128, symmetric or not."""
    pytest.importorskip("torchao")
    case = Case("prepared", "Plain", "unsigned", "per-channel")
    state = trained(case).state_dict()
    state["a.weight"][0].abs_()
    state["a.weight_fake_quant.scale"][0] = state["a.weight"][0].max() / 255
    state["a.weight_fake_quant.zero_point"][0] = -128
    write(case, state)
    assert cli("quantize", "qat.pt", *WORDS, "-o", "int8.safetensors").code == 0
    assert cli("verify", "qat.pt", "int8.safetensors", *WORDS).code == 0
    assert load_file("int8.safetensors")["a.weight.zero_point"][0] == -128


def test_artifacts_of_before_have_noted_no_integers(folder: Path, cli: Cli) -> None:
    pytest.importorskip("torchao")
    case = Case("prepared", "Plain", "unsigned", "per-channel")
    write(case, trained(case).state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    with safe_open("out.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["fusecli"])
    for entry in found["trained"]["quantizers"]:
        del entry["integers"]
    save_file(load_file("out.safetensors"), "before.safetensors", {"fusecli": json.dumps(found)})
    assert cli("verify", "qat.pt", "before.safetensors", *WORDS).code == 0
    assert cli("quantize", "before.safetensors", *WORDS, "-o", "int8.safetensors").code == 0


@pytest.mark.parametrize(
    "odd", [[1, 255], [0, 0], [-129, 127], [0, 256], [0], "all", [0.0, 255.0], [False, True]]
)
def test_integers_that_are_none(folder: Path, cli: Cli, odd: Any) -> None:
    case = Case("prepared", "Plain", "unsigned", "per-channel")
    write(case, trained(case).state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    with safe_open("out.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["fusecli"])
    found["trained"]["quantizers"][0]["integers"] = odd
    save_file(load_file("out.safetensors"), "odd.safetensors", {"fusecli": json.dumps(found)})
    assert cli("verify", "qat.pt", "odd.safetensors", *WORDS).code == 3
    found["trained"]["quantizers"][0]["integers"] = [-5, 127]
    save_file(load_file("out.safetensors"), "wrong.safetensors", {"fusecli": json.dumps(found)})
    assert cli("verify", "qat.pt", "wrong.safetensors", *WORDS).code == 1


def test_weights_with_one_scale_behind_a_transposed_convolution(folder: Path, cli: Cli) -> None:
    """The norm is folded only now, and one scale cannot follow it into each channel: calibration gives it."""
    pytest.importorskip("torchao")
    case = Case("fx", "Up", "unsigned", "per-tensor")
    ao, fx = torch_ao("quantization"), torch_ao("quantization.quantize_fx")
    with quietly():
        model = fx.prepare_qat_fx(net("Up"), ao.QConfigMapping().set_global(qconfig(case)), (batches(1)[0],))
        for x in batches(3):
            model(x)
    write(case, model.state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    done = cli("quantize", "qat.pt", *WORDS, "-o", "int8.pt2")
    assert done.code == 0, done.out
    assert cli("verify", "qat.pt", "int8.pt2", *WORDS, "--allow-pickle").code == 0
    x = batches(1)[0]
    with torch.no_grad():
        given = fusecli.load_int8("int8.pt2", allow_pickle=True)(x)
    assert sqnr(simulated(model, x, rounding=False), given) > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_checkpoints_of_training_in_half(folder: Path, cli: Cli, dtype: torch.dtype) -> None:
    """Everything that floats was cast, scales and what observers saw too."""
    case = Case("prepared", "Norms", "signed", "per-channel")
    state = trained(case).state_dict()
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    inputs = [{"shape": [2, 3, 6, 6], "dtype": str(dtype).removeprefix("torch.")}]
    write(case, half, inputs=inputs)
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0, done.out + done.err
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    assert cli("verify", "qat.pt", "out.safetensors").code == 0
    assert integers("out.safetensors")["head.output"] == [-128, 127]


def test_the_layouts_of_qnnpack(folder: Path, cli: Cli) -> None:
    """One scale for each weight, its average with memory, and activations of 8 bits."""
    pytest.importorskip("torchao")
    case = Case("prepared", "Norms", "unsigned", "per-tensor")
    ao = torch_ao("quantization")
    with quietly():
        model: Any = ao.fuse_modules_qat(net("Norms"), FUSED["Norms"])
        model.qconfig = ao.get_default_qat_qconfig("qnnpack")
        model = ao.prepare_qat(model)
        for x in batches(4):
            model(x)
    write(case, model.state_dict())
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    done = cli("quantize", "qat.pt", *WORDS, "-o", "int8.safetensors")
    assert done.code == 0, done.out
    assert integers("out.safetensors")["head.weight"] in ([-127, 127], [-128, 127])  # as the torch


SHARED = """
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
    def forward(self, x):
        return self.act(self.bn(self.conv(self.act(self.bn(self.conv(x))))))
"""


def test_a_layer_that_is_called_twice(folder: Path, cli: Cli) -> None:
    Path("net.py").write_text(SHARED)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(SHARED, "net.py", "exec"), names)
    ao = torch_ao("quantization")
    case = Case("prepared", "Twice", "unsigned", "per-channel")
    with quietly():
        model: Any = ao.fuse_modules_qat(randomise(names["Twice"](), 1).train(), ["conv", "bn", "act"])
        model.qconfig = qconfig(case)
        model = ao.prepare_qat(model)
        for x in batches(2):
            model(x)
    torch.save(model.state_dict(), "qat.pt")
    spec = {
        "version": 1,
        "model": {"factory": "net.py:Twice"},
        "inputs": [{"shape": [2, 3, 6, 6]}],
        "groups": [["conv", "bn", "act"]],
        "verify": {"samples": 1},
    }
    Path("fuse.yaml").write_text(json.dumps(spec))
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    x = batches(1)[0]
    exact = simulated(model, x, rounding=False)
    with torch.no_grad():
        folded = fusecli.load_fused(names["Twice"](), "out.safetensors").double()(x.double())
    assert (folded - exact).abs().max() <= 1e-6 * exact.abs().max()
