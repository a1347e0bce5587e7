"""Networks of a hundred families, recorded on shapes alone: nothing crashes, every norm is accounted for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence

import pytest
import torch

from fusecli.engine import Decision, discover, fuse_tree
from fusecli.graph.kinds import norms
from fusecli.graph.record import Run
from fusecli.reasons import REASONS
from fusecli.rewrite import ModuleTree
from fusecli.sample import tensors_in
from tests.zoo.networks import Zoo, built, far, names_moved, ran, sample_for, trained

# How many norms are folded, and how many there are: the rest stands behind an addition, a concatenation or a
# pooling, computes its statistics itself, or shares its layer.
NETWORKS = {
    "alexnet": (0, 0),
    "vgg11": (0, 0),
    "bninception": (69, 69),
    "resnet10": (12, 12),
    "preresnet10": (8, 10),
    "resnext14_16x4d": (17, 17),
    "seresnet10": (12, 12),
    "sepreresnet10": (5, 10),
    "seresnext50_32x4d": (53, 53),
    "senet16": (19, 19),
    "resnestabc14": (23, 23),
    "ibn_resnet50": (53, 66),
    "ibnb_resnet50": (52, 55),
    "airnet50_1x64d_r2": (88, 88),
    "bam_resnet18": (32, 32),
    "cbam_resnet18": (28, 28),
    "sknet50": (85, 85),
    "scnet50": (117, 117),
    "regnetx002": (44, 44),
    "diaresnet10": (12, 12),
    "diapreresnet10": (5, 10),
    "diracnet18v2": (0, 0),
    "sharesnet18": (12, 20),
    "densenet121": (59, 121),
    "condensenet74_c4_g4": (36, 73),
    "sparsenet121": (59, 121),
    "peleenet": (113, 113),
    "drnc26": (30, 30),
    "dpn68": (45, 72),
    "darknet_ref": (7, 7),
    "darknet53": (52, 52),
    "channelnet": (15, 15),
    "revnet38": (19, 34),
    "bagnet9": (53, 53),
    "dla34": (37, 37),
    "fishnet99": (63, 99),
    "espnetv2_wd2": (45, 62),
    "dicenet_wd5": (55, 71),
    "hrnet_w18_small_v1": (91, 91),
    "vovnet27s": (27, 27),
    "selecsls42": (41, 41),
    "hardnet39ds": (74, 74),
    "squeezenet_v1_0": (0, 0),
    "sqnxt23_w1": (111, 111),
    "shufflenet_g1_w1": (49, 49),
    "shufflenetv2b_wd2": (56, 56),
    "mobilenet_w1": (27, 27),
    "mobilenetv2_w1": (53, 53),
    "mobilenetv3_small_w7d20": (34, 34),
    "igcv3_w1": (98, 98),
    "ghostnet": (81, 81),
    "mnasnet_b1": (52, 52),
    "proxylessnas_cpu": (61, 61),
    "fbnet_cb": (65, 65),
    "xception": (40, 40),
    "inceptionv3": (94, 94),
    "inceptionresnetv1": (112, 112),
    "spnasnet": (64, 64),
    "efficientnet_b0": (49, 49),
    "efficientnet_edge_small_b": (49, 49),
    "mixnet_s": (49, 49),
    "nin_cifar10": (0, 0),
    "preresnet20_cifar10": (9, 19),
    "xdensenet40_2_k24_bc_cifar10": (18, 39),
    "wrn16_10_cifar10": (7, 13),
    "ror3_56_cifar10": (55, 55),
    "rir_cifar10": (21, 35),
    "resdropresnet20_cifar10": (21, 21),
    "shakeshakeresnet20_2x16d_cifar10": (39, 39),
    "shakedropresnet20_cifar10": (21, 21),
    "fractalnet_cifar10": (35, 35),
    "diapreresnet20_cifar10": (9, 19),
    "isqrtcovresnet18": (21, 21),
    "resneta10": (14, 14),
    "resnetd50b": (55, 55),
    "octresnet10_ad2": (2, 22),
    "deeplabv3_resnetd50b_voc": (63, 63),
    "icnet_resnetd50b_cityscapes": (69, 69),
    "fastscnn_cityscapes": (45, 45),
    "dabnet_cityscapes": (49, 71),
    "bisenet_resnet18_celebamaskhq": (31, 31),
    "danet_resnetd50b_cityscapes": (59, 59),
    "ctxnet_cityscapes": (51, 51),
    "lednet_cityscapes": (60, 63),
    "esnet_cityscapes": (32, 35),
    "edanet_cityscapes": (40, 42),
    "enet_cityscapes": (87, 88),
    "erfnet_cityscapes": (36, 39),
    "linknet_cityscapes": (34, 34),
    "simplepose_mobile_resnet18_coco": (23, 23),
    "lwopenpose2d_mobilenet_cmupan_coco": (33, 33),
    "prnet": (43, 48),
    "centernet_resnet18_voc": (26, 26),
    "voca8flame": (0, 1),
    "tresnet_m": (60, 60),
    "bn_vgg11": (8, 8),
    "regnety002": (44, 44),
    "dla46xc": (48, 48),
    "densenet40_k12_bc_cifar10": (18, 39),
}

# One architecture of each of 25 families: what is folded in them is run.
FAMILIES = (
    *("resnet10", "preresnet10", "mobilenetv3_small_w7d20", "shufflenet_g1_w1", "ghostnet", "dla46xc"),
    *("densenet40_k12_bc_cifar10", "sqnxt23_w1", "resnestabc14", "dicenet_wd5", "mixnet_s", "hardnet39ds"),
    *("efficientnet_b0", "ror3_56_cifar10", "shakedropresnet20_cifar10", "sharesnet18", "wrn16_10_cifar10"),
    *("isqrtcovresnet18", "regnetx002", "espnetv2_wd2", "octresnet10_ad2", "ibn_resnet50", "rir_cifar10"),
    *("condensenet74_c4_g4", "shakeshakeresnet20_2x16d_cifar10"),
)


def folded(decisions: Sequence[Decision], norms: Iterable[str]) -> list[str]:
    """Those of the norms that a group is made for."""
    members = {path for decision in decisions for path in decision.members}
    return [path for path in norms if path in members]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_is_folded_or_left_with_a_reason(zoo: Zoo, name: str) -> None:
    with torch.device("meta"):
        model = built(zoo, name)
    run = Run(model, sample_for(name, model), lambda: trained(built(zoo, name)))
    tree = ModuleTree(model)
    offer = discover(tree, run)
    found = {id(module): path for path, module in reversed([*norms(tree.modules)])}
    fused = folded(offer.plan.decisions, found.values())
    assert (len(fused), len(found)) == NETWORKS[name]
    assert sorted([*fused, *(unfused.module for unfused in offer.left)]) == sorted(found.values())
    assert all(unfused.code in REASONS and unfused.reason for unfused in offer.left)


def test_the_families_are_25(zoo: Zoo) -> None:
    assert len({zoo[name].__module__ for name in FAMILIES}) == len(FAMILIES) == 25


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_offered_can_be_folded(zoo: Zoo, name: str) -> None:
    model = trained(built(zoo, name)).double()
    sample = sample_for(name, model).copy(torch.float64)
    offer = discover(ModuleTree(model), Run(model, sample, lambda: copy.deepcopy(model)))
    fused = copy.deepcopy(model)
    tree = ModuleTree(fused)
    assert fuse_tree(tree, offer.plan.decisions)[1] == []
    (expected, before), (output, after) = (ran(net, sample) for net in (model, fused))
    assert far(expected, output) < 1e-12
    assert min(float(tensor.abs().max()) for tensor in tensors_in(expected)) > 0
    assert set(before) - set(after) == set(folded(offer.plan.decisions, before))
    left = {unfused.module: unfused.code for unfused in offer.left}
    assert {left[path] for path in after} <= REASONS.keys()
    assert names_moved(model, fused, offer.plan.decisions) == []


def test_the_stand_in_for_torchvision_is_gone(zoo: Zoo) -> None:
    assert "resnet10" in zoo
    assert not {"torchvision", "torchvision.ops"} & sys.modules.keys()
