from __future__ import annotations

import pytest
from torch import nn

from fusecli import fuse_modules_qat
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import names
from tests.rules.training import assert_hooks_run_once_qat, assert_like_torch_ao_qat, assert_trains_alike


def test_a_norm_without_gamma_is_refused_here_too() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, affine=False))
    with pytest.raises(RefusedError, match="no gamma and beta to learn"):
        fuse_modules_qat(model, ["0", "1"])


def test_a_relu_behind_it_stays() -> None:
    model = nets.chain(linear=nn.Linear(3, 8), bn=nn.BatchNorm1d(8), relu=nn.ReLU())
    fused = assert_trains_alike(model, nets.images(5, 3))
    assert [type(child).__name__ for child in fused.children()] == ["LinearBn1d", "Identity", "ReLU"]


@pytest.mark.parametrize("bias", [True, False])
def test_case_45_like_torch_ao(bias: bool) -> None:
    model = nets.chain(linear=nn.Linear(3, 8, bias=bias), bn=nn.BatchNorm1d(8, momentum=None)).train()
    assert_like_torch_ao_qat(model, nets.images(5, 3))
    assert_hooks_run_once_qat(model, nets.images(5, 3))


@pytest.mark.parametrize(
    "model",
    [
        nets.chain(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU()),
        nets.chain(bn=nn.BatchNorm2d(3), relu=nn.ReLU()),
    ],
    ids=["conv_relu", "bn_relu"],
)
def test_what_has_no_norm_to_fold_is_as_at_inference(model: nn.Module) -> None:
    assert_like_torch_ao_qat(model.train(), nets.images(4, 3, 6, 6))


def test_a_linear_layer_and_its_relu() -> None:
    model = nets.chain(linear=nn.Linear(3, 8), relu=nn.ReLU()).train()
    assert_like_torch_ao_qat(model, nets.images(4, 3))
    assert names(model) == ["linear", "relu"]
