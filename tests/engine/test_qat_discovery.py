"""What a run offers to a model that is to be trained: containers, and a reason for every norm without one."""

from __future__ import annotations

from torch import nn

from fusecli import fuse
from tests import nets


def test_containers_are_found_and_the_rest_has_a_reason() -> None:
    net = nets.chain(
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        up=nn.ConvTranspose2d(6, 4, 2),
        up_bn=nn.BatchNorm2d(4),
        plain=nn.Conv2d(4, 5, 1),
        plain_bn=nn.BatchNorm2d(5, affine=False),
    ).train()
    outcome = fuse(net, nets.images(4, 3, 8, 8), discover=True, qat=True)
    assert [group.modules for group in outcome.groups] == [("conv", "bn", "relu")]
    assert outcome.groups[0].kinds_after[0] == "ConvBnReLU2d"
    left = {norm.module: norm.code for norm in outcome.unfused}
    assert left == {"up_bn": "no-training-container", "plain_bn": "no-affine"}
    assert outcome.model.training
    assert outcome.verification.check_results["training"] == "equivalent"


def test_no_norm_goes_into_the_layer_after_it() -> None:
    """At inference it would: here it goes on learning, and nothing is computed."""
    net = nets.chain(relu=nn.ReLU(), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 5, 1)).train()
    outcome = fuse(net, nets.images(4, 3, 8, 8), discover=True, qat=True)
    assert (outcome.status, outcome.groups) == ("nothing to fuse", ())
    assert [norm.code for norm in outcome.unfused] == ["no-linear-producer"]
    assert outcome.model.training
