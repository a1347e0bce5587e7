from __future__ import annotations

import pytest
from torch import nn

from fusecli import fuse_modules_qat
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import names
from tests.rules.training import assert_hooks_run_once_qat, assert_like_torch_ao_qat

GRID = {1: (4, 3, 9), 2: (4, 3, 9, 8), 3: (4, 3, 5, 6, 7)}


def net(rank: int = 2, bias: bool = True):
    return nets.chain(
        conv=nets.CONV[rank](3, 8, 3, bias=bias, padding=1), bn=nets.BATCH_NORM[rank](8, momentum=0.3)
    ).train()


@pytest.mark.parametrize(
    ("norm", "code"),
    [
        (nn.BatchNorm2d(8, affine=False), "no gamma and beta to learn"),
        (nn.BatchNorm2d(8, track_running_stats=False), "keeps no running statistics"),
        (nn.BatchNorm2d(4), "conv has 8 channels, bn 4"),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), "no container takes"),
        (nn.SyncBatchNorm(8), "no container takes"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_case_44_refused(norm: nn.Module, code: str) -> None:
    refused = nn.Sequential()
    refused.add_module("conv", nn.Conv2d(3, 8, 3))
    refused.add_module("bn", norm)
    before = list(refused.children())
    with pytest.raises(RefusedError, match=code):
        fuse_modules_qat(refused, ["conv", "bn"], inplace=True)
    assert list(refused.children()) == before


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_case_44_a_transposed_convolution(rank: int) -> None:
    refused = nets.chain(conv=nets.CONV_TRANSPOSE[rank](3, 8, 3), bn=nets.BATCH_NORM[rank](8)).train()
    with pytest.raises(RefusedError, match="no container trains ConvTranspose"):
        fuse_modules_qat(refused, ["conv", "bn"])


def test_case_44_a_model_in_eval_mode() -> None:
    with pytest.raises(RefusedError, match=r"in eval mode: conv, bn; call model.train\(\) first"):
        fuse_modules_qat(net().eval(), ["conv", "bn"])


def test_a_dropout_between_acts_while_training() -> None:
    refused = nets.chain(conv=nn.Conv2d(3, 8, 3), drop=nn.Dropout(), bn=nn.BatchNorm2d(8)).train()
    with pytest.raises(RefusedError, match="no rule fuses Conv2d -> Dropout"):
        fuse_modules_qat(refused, ["conv", "drop", "bn"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_case_45_like_torch_ao(rank: int, bias: bool) -> None:
    assert_like_torch_ao_qat(net(rank, bias), nets.images(*GRID[rank]))
    assert_hooks_run_once_qat(net(rank, bias), nets.images(*GRID[rank]))


@pytest.mark.parametrize("inplace", [True, False])
def test_the_members_go_on_with_their_own_tensors(inplace: bool) -> None:
    model = net()
    weight, mean = model.conv.weight, model.bn.running_mean
    fused = fuse_modules_qat(model, names(model), inplace=inplace)
    assert (fused is model, fused.conv[0].weight is weight) == (inplace, inplace)
    assert (fused.conv[1].running_mean is mean) == inplace
    assert type(model.conv).__name__ == ("ConvBn2d" if inplace else "Conv2d")
