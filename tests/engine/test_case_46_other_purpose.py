"""Case 46 in memory: what is fused for one purpose is not taken for the other."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fusecli
from fusecli.errors import RefusedError
from tests import nets

GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
FOLDED = "fused for inference: there is no norm left that could be trained"
TRAINS = "fused to be trained: the norm inside is not folded"


def folded() -> Any:
    return fusecli.fuse_modules(nets.two_pairs(), GROUPS).train()


def to_train() -> Any:
    return fusecli.fuse_modules_qat(nets.two_pairs().train(), GROUPS)


def unknown(model: Any) -> Any:
    """As if somebody else had fused it: nothing says by which rules."""
    model.__dict__.pop("_fusecli_groups")
    return model


@pytest.mark.parametrize("model", [folded(), unknown(folded())], ids=["noted", "unknown"])
def test_what_is_folded_is_not_trained(model: Any) -> None:
    with pytest.raises(RefusedError, match=FOLDED):
        fusecli.fuse_modules_qat(model, GROUPS)
    outcome = fusecli.fuse(model, nets.images(4, 3, 8, 8), groups=GROUPS, qat=True)
    assert {no.code for no in outcome.refused} == {"other-purpose"}


@pytest.mark.parametrize(
    "model",
    [to_train(), unknown(to_train()), fusecli.prepare_qat(to_train())],
    ids=["noted", "unknown", "prepared"],
)
def test_what_trains_is_not_folded(model: Any) -> None:
    with pytest.raises(RefusedError, match=TRAINS):
        fusecli.fuse_modules(model.eval(), GROUPS)


def test_its_remedy_folds_it() -> None:
    model, x = to_train().eval(), nets.images(4, 3, 8, 8)
    fused = fusecli.fuse_modules(model, [["conv1.0", "conv1.1"], ["conv2.0", "conv2.1"]])
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (fused(x) - model(x)).abs().max() <= 1e-4 * model(x).abs().max()


@pytest.mark.parametrize("again", [fusecli.fuse_modules_qat, lambda m, g: fusecli.fuse_modules(m.eval(), g)])
def test_the_same_purpose_twice_is_fine(again: Any) -> None:
    model = to_train() if again is fusecli.fuse_modules_qat else folded()
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in again(model, GROUPS).modules()] == kinds


def test_a_pair_without_a_norm_is_the_same_for_both() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), relu=nn.ReLU()).train()
    fused = fusecli.fuse_modules_qat(net, ["conv", "relu"])
    assert type(fusecli.fuse_modules(fused.eval(), ["conv", "relu"]).conv).__name__ == "ConvReLU2d"


def test_a_mapping_of_none_is_no_mapping() -> None:
    config = {"additional_fuser_method_mapping": None}
    fused = fusecli.fuse_modules_qat(nets.two_pairs().train(), GROUPS, fuse_custom_config_dict=config)
    assert type(fused.conv1).__name__ == "ConvBnReLU2d"
