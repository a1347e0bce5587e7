"""Checkpoints that quantization-aware training has left: read as the float model that they are, and folded,
by an interpreter that has no torch.ao."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusecli
from configs.digits.net import DigitsNet
from tests import torch_ao_qat
from tests.conftest import Cli
from tests.nets import randomise

ROOT = Path(__file__).resolve().parents[2]
GROUPS = [
    ["stem.conv", "stem.bn", "stem.relu"],
    ["down.depthwise", "down.bn", "down.act"],
    ["blocks.*.conv", "blocks.*.bn"],
    ["up.conv", "up.bn", "up.act"],
    ["head.linear", "head.bn", "head.relu"],
]
SPEC = {
    "version": 1,
    "model": {"factory": "net.py:build"},
    "inputs": [{"shape": [4, 1, 8, 8]}],
    "groups": GROUPS,
    "verify": {"samples": 1},
}
WORDS = ["--spec", "fuse.yaml", "--allow-code", "net.py"]
LAYOUTS = [*torch_ao_qat.MAKERS, "version 1"]
# The program, in an interpreter that cannot import torch.ao.
PROGRAM = "import tests.without_torch_ao; from fusecli.cli import main; main()"


@pytest.fixture
def folder(digits: Path) -> Path:
    write(**SPEC)
    return digits


def write(**spec: Any) -> None:
    Path("fuse.yaml").write_text(json.dumps(spec))


def saved(layout: str, double: bool = False) -> torch_ao_qat.Trained:
    """qat.pt from a model of torch.ao; `double`: in float64, so that a fold rounds no more than a proof."""
    maker = "prepared" if layout == "version 1" else layout
    trained = torch_ao_qat.MAKERS[maker]()
    state = {
        name: tensor.double() if double and is_parameter(name, tensor) else tensor
        for name, tensor in trained.state.items()
    }
    torch.save(torch_ao_qat.version_1(state) if layout == "version 1" else state, "qat.pt")
    return trained


def is_parameter(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and "fake_quant" not in name and "post_process" not in name


def manifest(path: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fusecli"])


def program(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_folds_to_what_the_trained_model_gives(folder: Path, layout: str) -> None:
    trained = saved(layout, double=True)
    write(**{**SPEC, "inputs": [{"shape": [4, 1, 8, 8], "dtype": "float64"}]})
    done = program("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    model = fusecli.load_fused(DigitsNet(), "out.safetensors")
    with torch.no_grad():
        error = (model(trained.images) - trained.expected).abs().max() / trained.expected.abs().max()
    assert error < 1e-9
    assert program("verify", "qat.pt", "out.safetensors", *WORDS).returncode == 0
    assert program("verify", "qat.pt", "out.safetensors").returncode == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_are_those_of_the_float_model(folder: Path, cli: Cli, layout: str) -> None:
    """No container, though the groups list ReLUs; beside the float model there are only scales."""
    saved(layout)
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    stored = load_file("out.safetensors")
    float_keys = {name for name in DigitsNet().state_dict() if ".bn." not in name}
    biases = {f"{path}.bias" for path in ("stem.conv", "down.depthwise", "blocks.0.conv", "blocks.1.conv")}
    learned = {name for name in stored if name.endswith((".scale", ".zero_point"))}
    assert stored.keys() - learned == float_keys | biases
    assert {entry["of"] for entry in manifest("out.safetensors")["trained"]["quantizers"]} == {
        name.rpartition(".")[0] for name in learned
    }
    assert bool(learned) == (layout != "fused")


def test_scales_of_folded_weights_stay_as_they_are(folder: Path, cli: Cli) -> None:
    """torch.ao quantizes gamma / sqrt(var + eps) times the weight: that is what is stored now."""
    state = saved("prepared").state
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    stored = load_file("out.safetensors")
    for layer in ("stem.conv", "down.depthwise", "head.linear", "head.classifier"):
        for name in ("scale", "zero_point"):
            learned = state[f"{layer}.weight_fake_quant.{name}"]
            assert torch.equal(stored[f"{layer}.weight.{name}"], learned)
            output = state[f"{layer}.activation_post_process.{name}"]
            assert torch.equal(stored[f"{layer}.output.{name}"], output)
    assert stored["stem.conv.weight.scale"].shape == (32,)


def unfused(per_channel: bool, zero_point: int = 0) -> dict[str, Tensor]:
    """A convolution that was prepared beside its norm, not with it: fuse_modules_qat was left out."""
    state = torch_ao_qat.digits_net().state_dict()
    scale = torch.rand(32 if per_channel else 1) + 0.1
    quantizer = {"scale": scale, "zero_point": torch.full(scale.shape, zero_point, dtype=torch.int32)}
    state |= {f"stem.conv.weight_fake_quant.{name}": value for name, value in quantizer.items()}
    for path, value in (("stem.conv", 0.5), ("stem.bn", 0.25), ("stem.relu", 0.125)):
        state[f"{path}.activation_post_process.scale"] = torch.tensor([value])
        state[f"{path}.activation_post_process.zero_point"] = torch.tensor([3], dtype=torch.int32)
    return dict(state)


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_of_weights_that_are_folded_now_are_multiplied(
    folder: Path, cli: Cli, per_channel: bool
) -> None:
    state = unfused(per_channel)
    torch.save(state, "qat.pt")
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0
    gamma, var = state["stem.bn.weight"].double(), state["stem.bn.running_var"].double()
    assert (gamma < 0).any()
    factor = (gamma / (var + 1e-5).sqrt()).abs()
    stored = load_file("out.safetensors")
    expected = (state["stem.conv.weight_fake_quant.scale"].double() * factor).float()
    assert torch.equal(stored["stem.conv.weight.scale"], expected)
    assert torch.equal(stored["stem.conv.weight.zero_point"], torch.zeros(32, dtype=torch.int32))
    # What the layer gives now is what the norm gave; the tensor between is gone.
    assert float(stored["stem.conv.output.scale"]) == 0.25
    assert float(stored["stem.relu.output.scale"]) == 0.125
    assert "stem.conv.output: its scale is gone: the fold makes another tensor" in " ".join(done.out.split())
    records = {
        entry["of"]: entry["rescaled"] for entry in manifest("out.safetensors")["trained"]["quantizers"]
    }
    assert records == {"stem.conv.weight": True, "stem.conv.output": False, "stem.relu.output": False}


def test_a_negative_gamma_has_no_place_for_a_zero_point(folder: Path, cli: Cli) -> None:
    torch.save(unfused(per_channel=True, zero_point=5), "qat.pt")
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0
    assert "a negative gamma turns the weight around its zero point" in " ".join(done.out.split())
    assert "stem.conv.weight.scale" not in load_file("out.safetensors")


def test_norms_that_no_group_names_are_found_by_a_run(folder: Path, cli: Cli) -> None:
    write(**{**SPEC, "groups": []})
    saved("prepared")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    norms = manifest("out.safetensors")["trained"]["norms"]
    assert norms == torch_ao_qat.NORMS


def test_without_code_eps_has_to_be_said(folder: Path, cli: Cli) -> None:
    saved("prepared")
    silent = cli("fuse", "qat.pt")
    assert (silent.code, "the eps of stem.conv.bn is not in a state dict" in silent.err) == (2, True)
    assert not Path("qat.fused.safetensors").exists()
    done = cli("fuse", "qat.pt", "--assume-eps", "1e-5")
    assert done.code == 0
    assert "load_fused needs it: list it in groups" in " ".join(done.out.split())
    assert cli("verify", "qat.pt", "qat.fused.safetensors").code == 0
    state, x = load_file("qat.fused.safetensors"), torch.load("qat.pt", weights_only=True)
    gamma, var = x["stem.conv.bn.weight"], x["stem.conv.bn.running_var"]
    expected = x["stem.conv.weight"] * (gamma / (var + 1e-5).sqrt()).view(-1, 1, 1, 1)
    assert torch.allclose(state["stem.conv.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["fused", "prepared"])
def test_without_code_groups_name_the_norms(folder: Path, cli: Cli, layout: str) -> None:
    write(version=1, groups=[group for group in GROUPS if "up.conv" not in group], assume={"eps": 1e-5})
    trained = saved(layout, double=True)
    assert cli("fuse", "qat.pt", "--spec", "fuse.yaml", "-o", "out.safetensors").code == 0
    assert manifest("out.safetensors")["trained"]["norms"] == torch_ao_qat.NORMS
    model = fusecli.load_fused(DigitsNet(), "out.safetensors")
    with torch.no_grad():
        assert torch.allclose(model(trained.images), trained.expected, rtol=1e-9)


def test_names_of_containers_alone_are_not_believed(folder: Path, cli: Cli) -> None:
    """stem.conv.0 and stem.conv.1 could be a Sequential: nothing is guessed."""
    saved("fused")
    done = cli("fuse", "qat.pt", "--assume-eps", "1e-5")
    said = " ".join(done.err.split())
    assert (done.code, "nothing says what to fuse" in said, "known by the groups" in said) == (2, True, True)
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict(), "plain.pt")
    assert "containers" not in cli("fuse", "plain.pt").err


def test_a_sequential_is_not_a_container(folder: Path, cli: Cli) -> None:
    """With the same keys; the model says what they are."""
    text = "nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))"
    Path("net.py").write_text(f"from torch import nn\ndef build():\n    return {text}\n")
    torch.save(randomise(eval(text, {"nn": torch.nn}), 0).state_dict(), "plain.pt")
    write(**{**SPEC, "inputs": [{"shape": [2, 3, 8, 8]}], "groups": [["0.0", "0.1"]]})
    assert cli("fuse", "plain.pt", *WORDS).code == 0
    assert "trained" not in manifest("plain.fused.safetensors")


def test_our_own_artifact(folder: Path, cli: Cli) -> None:
    """Fused for training by us: its manifest says all that a fold needs, without spec or code."""
    listed = [group for group in GROUPS if "up.conv" not in group]
    write(**{**SPEC, "groups": listed, "qat": True})
    assert cli("fuse", "model.pt", *WORDS, "-o", "own.safetensors").code == 0
    assert cli("fuse", "own.safetensors", "-o", "out.safetensors").code == 0
    assert cli("verify", "own.safetensors", "out.safetensors").code == 0
    model = fusecli.load_fused(DigitsNet(), "out.safetensors", mode="folded")
    assert type(model.stem.bn).__name__ == "Identity"
    write(**SPEC)
    assert cli("fuse", "own.safetensors", *WORDS, "-o", "whole.safetensors").code == 0
    assert len(manifest("whole.safetensors")["groups"]) == 6
    assert cli("fuse", "model.pt", *WORDS, "-o", "direct.safetensors").code == 0
    whole, direct = load_file("whole.safetensors"), load_file("direct.safetensors")
    assert torch.equal(whole["up.conv.weight"], direct["up.conv.weight"])
    assert torch.equal(whole["stem.conv.weight"], direct["stem.conv.0.weight"])


def test_what_is_trained_already_is_not_fused_for_training(folder: Path, cli: Cli) -> None:
    saved("prepared")
    done = cli("fuse", "qat.pt", *WORDS, "--qat")
    assert (done.code, "give --no-qat" in done.err) == (2, True)
    write(**{**SPEC, "qat": True})
    assert cli("fuse", "qat.pt", *WORDS).code == 2
    assert cli("fuse", "qat.pt", *WORDS, "--no-qat").code == 0


@pytest.mark.parametrize("key", ["stem.conv.weight.scale", "stem.conv.weight"])
@pytest.mark.parametrize("with_code", [True, False])
def test_verify_sees_what_was_changed(folder: Path, cli: Cli, key: str, with_code: bool) -> None:
    saved("prepared")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    tensors, text = load_file("out.safetensors"), json.dumps(manifest("out.safetensors"))
    tensors[key] *= 1.001
    save_file(tensors, "bad.safetensors", {"fusecli": text})
    assert cli("verify", "qat.pt", "bad.safetensors", *(WORDS if with_code else [])).code == 1


def test_verify_against_another_checkpoint(folder: Path, cli: Cli) -> None:
    saved("prepared")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    done = cli("verify", "model.pt", "out.safetensors", *WORDS)
    assert (done.code, "is not the checkpoint of quantization-aware training" in done.err) == (2, True)


def test_a_norm_that_nobody_can_name(folder: Path, cli: Cli) -> None:
    saved("prepared")
    write(version=1, model=SPEC["model"], groups=[["up.conv", "up.bn"]])
    done = cli("fuse", "qat.pt", *WORDS)
    assert done.code == 2
    assert "stem.conv holds a norm, and nothing says which one of the model it is" in " ".join(
        done.err.split()
    )


PAIR = """
from torch import nn

def build():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
"""


def pair() -> Any:
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(PAIR, "net.py", "exec"), names)
    return randomise(names["build"](), 0)


def test_a_norm_inside_cannot_take_the_name_of_another(folder: Path, cli: Cli) -> None:
    """A Sequential of layer and norm, listed with the norm behind it, looks like a container and its norm."""
    torch.save(pair().state_dict(), "plain.pt")
    write(version=1, groups=[["0", "1"]], assume={"eps": 1e-5})
    done = cli("fuse", "plain.pt", "--spec", "fuse.yaml")
    assert (done.code, "0.1.weight and 1.weight would both be 1.weight" in done.err) == (2, True)
    assert not Path("plain.fused.safetensors").exists()


def test_a_file_that_is_one_layer(folder: Path, cli: Cli) -> None:
    layer = fusecli.prepare_qat(fusecli.fuse_modules_qat(pair()[0].train(), ["0", "1"])[0])
    torch.save(layer.state_dict(), "qat.pt")
    done = cli("fuse", "qat.pt", "--assume-eps", "1e-5")
    assert (done.code, "the whole file is one layer with a norm inside" in done.err) == (2, True)


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_excluded_stays(folder: Path, cli: Cli, listed: bool) -> None:
    """Its weight is what was trained, not what it was quantized as; its output is that of the norm."""
    state = saved("prepared").state
    kept = [group for group in GROUPS if "head.linear" not in group] if listed else []
    write(**{**SPEC, "groups": kept, "exclude": ["head"]})
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0
    assert "head.linear.weight: its scale is gone" in " ".join(done.out.split())
    stored = load_file("out.safetensors")
    assert torch.equal(stored["head.linear.weight"], state["head.linear.weight"])
    assert torch.equal(stored["head.bn.running_var"], state["head.linear.bn.running_var"])
    scales = {name for name in stored if name.startswith("head.") and name.endswith(".scale")}
    assert scales == {"head.bn.output.scale", "head.classifier.weight.scale", "head.classifier.output.scale"}
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0
    assert cli("verify", "qat.pt", "out.safetensors").code == 0


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_norms_are_found_in_any_dtype(folder: Path, cli: Cli, dtype: str) -> None:
    state = {
        name: tensor.to(getattr(torch, dtype)) if is_parameter(name, tensor) else tensor
        for name, tensor in torch_ao_qat.prepared().state.items()
    }
    torch.save(state, "qat.pt")
    write(**{**SPEC, "groups": [], "inputs": [{"shape": [4, 1, 8, 8], "dtype": dtype}]})
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert manifest("out.safetensors")["trained"]["norms"] == torch_ao_qat.NORMS


def test_a_norm_before_its_layer_is_not_passed_over(folder: Path, cli: Cli) -> None:
    saved("prepared")
    write(**{**SPEC, "groups": [["stem.bn", "stem.conv"]]})
    done = cli("fuse", "qat.pt", *WORDS)
    assert (done.code, "did you mean [stem.conv, stem.bn]" in done.err) == (2, True)


def test_an_adapter_comes_too_late(folder: Path, cli: Cli) -> None:
    saved("prepared")
    save_file(
        {
            "head.classifier.lora_A.weight": torch.ones(2, 32),
            "head.classifier.lora_B.weight": torch.ones(10, 2),
        },
        "adapter.safetensors",
    )
    write(**{**SPEC, "adapter": {"file": "adapter.safetensors", "scale": 1.0}})
    done = cli("fuse", "qat.pt", *WORDS)
    assert (done.code, "an adapter cannot be added to a checkpoint" in " ".join(done.err.split())) == (
        2,
        True,
    )


def test_a_factory_of_the_prepared_model(folder: Path, cli: Cli) -> None:
    text = Path("net.py").read_text()
    made = f"fusecli.prepare_qat(fusecli.fuse_modules_qat(DigitsNet(), {GROUPS[0]!r}))"
    Path("net.py").write_text(f"{text}\nimport fusecli\ndef prepared():\n    return {made}\n")
    torch.save(fusecli.prepare_qat(fusecli.fuse_modules_qat(DigitsNet(), GROUPS[0])).state_dict(), "qat.pt")
    write(**{**SPEC, "model": {"factory": "net.py:prepared"}})
    done = cli("fuse", "qat.pt", *WORDS)
    assert (done.code, "the factory builds the model as it was prepared" in " ".join(done.err.split())) == (
        2,
        True,
    )


def test_observers_of_the_models_own(folder: Path, cli: Cli) -> None:
    """What its class has is part of the model."""
    text = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1))
    def forward(self, x):
        return x * self.scale

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.activation_post_process = Scale()
    def forward(self, x):
        return self.activation_post_process(self.bn(self.conv(x)))
"""
    Path("net.py").write_text(text)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(text, "net.py", "exec"), names)
    torch.save(randomise(names["Net"](), 0).state_dict(), "plain.pt")
    model, inputs = {"factory": "net.py:Net"}, [{"shape": [2, 3, 8, 8]}]
    write(**{**SPEC, "model": model, "inputs": inputs, "groups": [["conv", "bn"]]})
    assert cli("fuse", "plain.pt", *WORDS).code == 0
    assert "trained" not in manifest("plain.fused.safetensors")


@pytest.mark.parametrize("shape", [(3,), (0,), (32, 32), (1, 32)], ids=str)
def test_scales_of_another_shape_are_not_multiplied(folder: Path, cli: Cli, shape: tuple[int, ...]) -> None:
    state = unfused(per_channel=True)
    state["stem.conv.weight_fake_quant.scale"] = torch.rand(shape) + 0.1
    torch.save(state, "qat.pt")
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert done.code == 0
    assert "neither one for the weight nor one for each channel" in " ".join(done.out.split())
    assert "stem.conv.weight.scale" not in load_file("out.safetensors")


def test_scales_of_a_transposed_convolution(folder: Path, cli: Cli) -> None:
    """Its outputs are no channels of its weight's first axis, so nobody could tell what is scaled."""
    state = dict(torch_ao_qat.digits_net().state_dict())
    state["up.conv.weight_fake_quant.scale"] = torch.rand(1)
    state["up.conv.weight_fake_quant.zero_point"] = torch.zeros(1, dtype=torch.int32)
    torch.save(state, "qat.pt")
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert (done.code, "the outputs of a transposed convolution" in " ".join(done.out.split())) == (0, True)
    assert "up.conv.weight.scale" not in load_file("out.safetensors")


def test_no_scale_becomes_0(folder: Path, cli: Cli) -> None:
    state = unfused(per_channel=True)
    state["stem.bn.weight"][0] = 0
    torch.save(state, "qat.pt")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    learned = state["stem.conv.weight_fake_quant.scale"][0]
    assert torch.equal(load_file("out.safetensors")["stem.conv.weight.scale"][0], learned)


def test_scales_of_what_a_custom_fuser_makes(folder: Path, cli: Cli) -> None:
    saved("prepared")
    text = """
def fuser(is_qat, layer, norm, relu):
    from torch.nn.utils.fusion import fuse_linear_bn_eval
    return nn.Sequential(fuse_linear_bn_eval(layer, norm), relu)
"""
    Path("net.py").write_text(Path("net.py").read_text() + text)
    sequence = ["torch.nn.Linear", "torch.nn.BatchNorm1d", "torch.nn.ReLU"]
    write(**SPEC, extra_mappings=[{"sequence": sequence, "fuser": "net.py:fuser"}])
    done = cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors")
    assert (done.code, "what a custom fuser makes is not known" in " ".join(done.out.split())) == (0, True)
    assert not {name for name in load_file("out.safetensors") if name.startswith("head.linear.weight")}
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0


def test_computed_weights_beside_what_was_trained(folder: Path, cli: Cli) -> None:
    """`bake: true` holds for the layers that were left alone."""
    text = """
from collections import OrderedDict
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

def build():
    layers = dict(a=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), b=weight_norm(nn.Conv2d(4, 4, 3)))
    return nn.Sequential(OrderedDict(**layers, bn2=nn.BatchNorm2d(4)))
"""
    Path("net.py").write_text(text)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(text, "net.py", "exec"), names)
    model = fusecli.fuse_modules_qat(randomise(names["build"](), 0).train(), ["a", "bn"])
    model.a = fusecli.prepare_qat(model.a)
    model(torch.randn(2, 3, 8, 8))
    torch.save(model.state_dict(), "qat.pt")
    inputs, groups = [{"shape": [2, 3, 8, 8]}], [["a", "bn"], ["b", "bn2"]]
    write(**{**SPEC, "inputs": inputs, "groups": groups, "bake": True})
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert cli("verify", "qat.pt", "out.safetensors", *WORDS).code == 0


def forged(source: str, change: Any) -> None:
    """odd.safetensors: the artifact with another manifest."""
    found = manifest(source)
    change(found)
    save_file(load_file(source), "odd.safetensors", {"fusecli": json.dumps(found)})


def _drop(found: Any) -> None:
    del found["trained"]["quantizers"][0]


def _flip(found: Any) -> None:
    found["trained"]["quantizers"][0]["rescaled"] = True


def _add(found: Any) -> None:
    found["trained"]["quantizers"].append({"of": "stem", "rescaled": False})


def _other_layout(found: Any) -> None:
    found["trained"]["layout"] = "fused"


def _more_norms(found: Any) -> None:
    found["trained"]["norms"]["up.conv"] = "up.bn"


@pytest.mark.parametrize("change", [_drop, _flip, _add, _other_layout, _more_norms], ids=lambda f: f.__name__)
def test_verify_reads_what_the_manifest_says_of_training(folder: Path, cli: Cli, change: Any) -> None:
    saved("prepared")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    forged("out.safetensors", change)
    done = cli("verify", "qat.pt", "odd.safetensors")
    said = "what the manifest says was trained is not what the checkpoint holds"
    assert (done.code, said in " ".join(done.out.split())) == (1, True)


@pytest.mark.parametrize(
    "trained",
    [
        None,
        [],
        {"layout": "prepared", "norms": {}},
        {"layout": "prepared", "norms": {"": "bn"}, "quantizers": []},
        {"layout": "prepared", "norms": {"conv": 3}, "quantizers": []},
        {"layout": "prepared", "norms": {}, "quantizers": [{}]},
        {"layout": "prepared", "norms": {}, "quantizers": [{"of": "conv", "rescaled": "no"}]},
        {"layout": "odd", "norms": {}, "quantizers": []},
    ],
    ids=str,
)
def test_a_damaged_record_is_no_manifest(folder: Path, cli: Cli, trained: Any) -> None:
    saved("prepared")
    assert cli("fuse", "qat.pt", *WORDS, "-o", "out.safetensors").code == 0
    forged("out.safetensors", lambda found: found.update(trained=trained))
    assert cli("verify", "qat.pt", "odd.safetensors").code == 3


@pytest.mark.parametrize("edit", [{"members": ["stem.conv"]}, {"path": "stem.conv.0"}], ids=str)
def test_containers_that_their_manifest_does_not_explain(folder: Path, cli: Cli, edit: Any) -> None:
    write(**{**SPEC, "groups": [GROUPS[0]], "qat": True})
    assert cli("fuse", "model.pt", *WORDS, "-o", "own.safetensors").code == 0
    forged("own.safetensors", lambda found: found["edits"][0].update(edit))
    done = cli("fuse", "odd.safetensors", "-o", "out.safetensors")
    assert (done.code, "does not say which module" in done.err) == (2, True)


def test_an_eps_that_is_not_the_models(folder: Path, cli: Cli) -> None:
    """No number of an artifact that is to be trained depends on it, but the fold that comes later does."""
    write(**{**SPEC, "groups": [GROUPS[0]], "qat": True})
    assert cli("fuse", "model.pt", *WORDS, "-o", "own.safetensors").code == 0
    forged("own.safetensors", lambda found: found["groups"][0]["hints"].update(eps=0.5))
    done = cli("verify", "model.pt", "odd.safetensors", *WORDS)
    assert (done.code, "the manifest's eps is 0.5" in " ".join(done.out.split())) == (1, True)


def test_a_whole_model_is_not_judged_without_its_run(folder: Path, cli: Cli) -> None:
    """What only a run has shown is not different because nobody has run it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    torch.save(randomise(model, 0), "whole.pt")
    write(version=1, inputs=[{"shape": [2, 3, 8, 8]}], discover=True)
    words = ["--allow-pickle", "--spec", "fuse.yaml"]
    assert cli("fuse", "whole.pt", *words, "-o", "out.safetensors").code == 0
    assert cli("verify", "whole.pt", "out.safetensors", *words).code == 0
    done = cli("verify", "whole.pt", "out.safetensors", "--allow-pickle")
    assert (done.code, "cannot be judged without a run of the model" in " ".join(done.err.split())) == (
        2,
        True,
    )


def test_inspect_says_what_it_is(folder: Path, cli: Cli) -> None:
    saved("prepared")
    said = " ".join(cli("inspect", "qat.pt").out.split())
    assert "trained with simulated quantization (prepared): 'fusecli fuse' reads it as a float model" in said
    assert "simulated" not in cli("inspect", "model.pt").out
