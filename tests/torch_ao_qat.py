"""What torch.ao's quantization-aware training leaves behind, each with what its model gives in float64."""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.digits.net import DigitsNet
from tests.nets import images, randomise

# up.conv is left with its norm: torch.ao folds no transposed convolution in training.
GROUPS = (
    ("stem.conv", "stem.bn", "stem.relu"),
    ("down.depthwise", "down.bn"),
    ("blocks.0.conv", "blocks.0.bn"),
    ("blocks.1.conv", "blocks.1.bn"),
    ("head.linear", "head.bn"),
)
UNITS = tuple(group[0] for group in GROUPS)
NORMS = {group[0]: group[1] for group in GROUPS}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """torch.ao is deprecated, so its warnings are no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torch_ao(name: str) -> Any:
    """A module of torch.ao, as "quantization"; the test is skipped where this torch has none."""
    with quietly():
        try:
            return importlib.import_module(f"torch.ao.{name}")
        except ModuleNotFoundError:
            pytest.skip("this torch has no torch.ao")


@dataclass(frozen=True)
class Trained:
    """A model of torch.ao after a few steps of training, and what it gives for `images` in eval mode, in
    float64 and without fake quantization."""

    model: Any
    images: Tensor
    expected: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


def digits_net(seed: int = 0) -> DigitsNet:
    """The digits network before its training: in train mode, every third gamma of its norms negative."""
    net = DigitsNet()
    randomise(net, seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.mul_(0.1)  # randn in every layer makes outputs of 1e6
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.copy_(module.weight.sign() * (0.3 + module.weight.abs() / 2))
    return net.train()


def fused(seed: int = 0) -> Trained:
    """fuse_modules_qat alone: containers, nothing prepared."""
    with quietly():
        return _trained(torch_ao("quantization").fuse_modules_qat(digits_net(seed), _lists()), seed)


def prepared(seed: int = 0) -> Trained:
    """prepare_qat with the default of fbgemm: a scale for each channel of a weight."""
    return _prepared(lambda ao: ao.get_default_qat_qconfig("fbgemm"), seed)


def prepared_per_tensor(seed: int = 0) -> Trained:
    """prepare_qat with one scale for each weight."""
    return _prepared(
        lambda ao: ao.QConfig(ao.default_fused_act_fake_quant, ao.default_fused_wt_fake_quant), seed
    )


def prepared_learnable(seed: int = 0) -> Trained:
    """prepare_qat with scales that are parameters."""
    learnable = torch_ao("quantization._learnable_fake_quantize")._LearnableFakeQuantize

    def qconfig(ao: Any) -> Any:
        output = learnable.with_args(observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        weight = learnable.with_args(
            observer=ao.MovingAverageMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        )
        return ao.QConfig(output.with_args(scale=0.1), weight.with_args(scale=0.1))

    return _prepared(qconfig, seed)


def prepared_fx(seed: int = 0) -> Trained:
    """prepare_qat_fx, which fuses by itself; `up` is kept out of the graph, since it raises for it."""
    ao, fx = torch_ao("quantization"), torch_ao("quantization.quantize_fx")
    custom = torch_ao("quantization.fx.custom_config").PrepareCustomConfig()
    with quietly():
        model = fx.prepare_qat_fx(
            digits_net(seed),
            ao.get_default_qat_qconfig_mapping("fbgemm"),
            (torch.zeros(2, 1, 8, 8),),
            prepare_custom_config=custom.set_non_traceable_module_names(["up"]),
        )
        return _trained(model, seed)


def version_1(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prepared state dict as torch before 1.6 wrote it: the norm's tensors stand on the layer."""
    old = {"bn.weight": "gamma", "bn.bias": "beta"}
    old.update({f"bn.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")})
    renamed = {f"{unit}.{new}": f"{unit}.{name}" for unit in UNITS for new, name in old.items()}
    return {renamed.get(key, key): tensor for key, tensor in state.items()}


MAKERS: Mapping[str, Callable[[], Trained]] = {
    "fused": fused,
    "prepared": prepared,
    "per-tensor": prepared_per_tensor,
    "learnable": prepared_learnable,
    "fx": prepared_fx,
}


def _lists() -> list[list[str]]:
    return [list(group) for group in GROUPS]


def _prepared(qconfig: Callable[[Any], Any], seed: int) -> Trained:
    ao = torch_ao("quantization")
    with quietly():
        model = ao.fuse_modules_qat(digits_net(seed), _lists())
        model.qconfig = qconfig(ao)
        return _trained(ao.prepare_qat(model, inplace=True), seed)


def _trained(model: Any, seed: int, steps: int = 3) -> Trained:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(0, 10, (16,), generator=rng)
        loss = nn.functional.cross_entropy(model(torch.rand(16, 1, 8, 8, generator=rng)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = images(4, 1, 8, 8, seed=seed + 1, dtype=torch.float64)
    return Trained(model, x, _without_rounding(model)(x).detach())


def _without_rounding(model: Any) -> Any:
    ao = torch_ao("quantization")
    twin = copy.deepcopy(model).double().eval()
    twin.apply(ao.disable_observer).apply(ao.disable_fake_quant)
    for module in twin.modules():
        if hasattr(module, "toggle_fake_quant"):  # of _LearnableFakeQuantize, which has switches of its own
            module.toggle_fake_quant(False).toggle_observer_update(False).toggle_qparam_learning(False)
    return twin
