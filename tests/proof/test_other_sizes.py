"""One size is not all sizes: what a proof has seen at 8 x 8 it also runs at 9 x 8, at 8 x 9 and on one more
image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Outcome
from tests.nets import images, randomise
from tests.proof.nets import X, bn, conv, net, verdict
from tests.rules.side_by_side import relative_error

IMAGES = images(2, 3, 8, 8)


class SamePad(nn.Conv2d):
    """As timm's Conv2dSame: how much is padded depends on the size."""

    def forward(self, x: Tensor) -> Tensor:
        pad = []
        for size in (x.shape[-1], x.shape[-2]):
            need = max((-(-size // 2) - 1) * 2 + 2 - size, 0)
            pad += [need // 2, need - need // 2]
        if any(pad):
            x = F.pad(x, pad)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class InFront(nn.Module):
    """A norm in front of a layer, where every other norm is behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.same = nn.BatchNorm2d(3), SamePad(3, 4, 2, stride=2)
        self.conv, self.bn = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.conv(self.same(self.norm(x)).relu())).mean((2, 3))
        return z


class Dead(InFront):
    """What reads the layer makes zeros of it, on these inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = (x.amax() > 1e3).to(x.dtype)
        z: Tensor = self.bn(self.conv(x)).mean((2, 3)) + (self.same(self.norm(x)) * gate).mean()
        return z


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1))
        z: Tensor = self.conv(y)
        return z


class Undefined(Odd):
    """Where it pads, it returns NaN, which nothing can be held against."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(self.bn(self.stem(x)).relu())
        return y * (float("nan") if x.shape[-1] % 2 else 1.0)


class Divided(nn.Module):
    """A pool whose last window has fewer elements than it is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.pool = nn.AvgPool2d(2, ceil_mode=True, divisor_override=4)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(self.pool(self.norm(x)))
        return z


HOLD_AT_ONE_SIZE = {"if odd: pad": Odd, "divisor": Divided}


def groups(outcome: Outcome) -> set[tuple[str, ...]]:
    return {group.modules for group in outcome.groups}


def sizes(outcome: Outcome) -> str:
    return verdict(outcome).checks["sizes"]


def agree(model: nn.Module, other: Any, *inputs: Tensor) -> None:
    with torch.no_grad():
        for x in inputs:
            assert relative_error(other(x), model(x).double()) < 1e-5


@pytest.mark.parametrize("build", HOLD_AT_ONE_SIZE.values(), ids=HOLD_AT_ONE_SIZE)
def test_what_holds_at_one_size_only_is_left(build: Any) -> None:
    model = randomise(build(), 1)
    outcome = fusecli.fuse(model, IMAGES, discover=True)
    assert all("norm" not in group for group in groups(outcome))
    dropped = [no for no in outcome.refused if "norm" in no.group]
    assert dropped
    assert all("2x3x8x8" in no.reason and "x9" in no.reason for no in dropped)
    if outcome.model is not None:
        agree(model, outcome.model, IMAGES, images(2, 3, 9, 9), images(3, 3, 8, 9))


def test_a_layer_that_pads_by_size_is_seen_before_anything_is_folded() -> None:
    """It is run by itself at several sizes: at one of them it adds zeros, where a folded shift should be."""
    model = randomise(InFront(), 1)
    found = fusecli.fuse(model, IMAGES, discover=True)
    assert all("norm" not in group for group in groups(found))
    (left,) = [unfused for unfused in found.unfused if unfused.module == "norm"]
    assert left.code == "not-linear-in-weight"
    if found.model is not None:
        agree(model, found.model, IMAGES, images(2, 3, 9, 9), images(3, 3, 8, 9))
    listed = fusecli.fuse(model, IMAGES, groups=[["norm", "same"]])
    assert [(no.code, listed.exit_code) for no in listed.refused] == [
        ("not-linear-in-weight", ExitCode.REFUSED)
    ]
    assert all("norm" not in group for group in fusecli.plan(model, IMAGES).groups)


@pytest.mark.parametrize("build", HOLD_AT_ONE_SIZE.values(), ids=HOLD_AT_ONE_SIZE)
def test_a_listed_one_is_different_and_the_size_is_named(build: Any) -> None:
    model = randomise(build(), 1)
    outcome = fusecli.fuse(model, IMAGES, groups=[["norm", "conv"]])
    assert outcome.exit_code == ExitCode.DIFFERENT, outcome
    assert outcome.model is None
    assert "2x3x8x8" in " ".join(verdict(outcome).reasons)
    assert "x9" in " ".join(verdict(outcome).reasons)
    assert verdict(outcome).check_results["sizes"] == "different"


def test_an_output_that_is_undefined_does_not_hide_what_differs_inside() -> None:
    outcome = fusecli.fuse(randomise(Undefined(), 1), IMAGES, groups=[["stem", "bn"], ["norm", "conv"]])
    assert outcome.exit_code == ExitCode.DIFFERENT
    assert "x9" in " ".join(verdict(outcome).reasons)
    assert verdict(outcome).first_different == ("norm", "conv")


def test_a_dead_head_does_not_hide_it() -> None:
    model = randomise(Dead(), 1)
    outcome = fusecli.fuse(model, IMAGES, discover=True)
    assert all("norm" not in group for group in groups(outcome))
    assert groups(outcome) == {("conv", "bn")}


def test_the_others_are_folded_all_the_same() -> None:
    outcome = fusecli.fuse(randomise(InFront(), 1), IMAGES, discover=True)
    assert groups(outcome) == {("conv", "bn")}
    assert outcome.status == "fused"


class Free(nn.Module):
    """Right at any size, whichever way it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.norm, self.up, self.head = nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(self.bn(self.conv(x)).relu()))
        if y.shape[-2:] != x.shape[-2:]:
            y = F.interpolate(y, x.shape[-2:])
        z: Tensor = self.head(y)
        return z


@pytest.mark.parametrize("size", [9, 8])
def test_what_holds_at_every_size_is_folded(size: int) -> None:
    model, x = randomise(Free(), 2), images(1, 3, size, size)
    outcome = fusecli.fuse(model, x, discover=True)
    assert outcome.status == "fused", verdict(outcome).reasons
    assert {path for group in groups(outcome) for path in group} >= {"conv", "bn", "norm", "head"}
    assert outcome.refused == ()
    assert f"2x3x{size + 1}x{size}" in sizes(outcome)
    assert f"1x3x{size}x{size + 1}" in sizes(outcome)
    agree(model, outcome.model, x, images(3, 3, 10, 7))


def test_that_forward_decides_by_size_is_in_the_ledger() -> None:
    model = net(halved, conv=conv(), bn=bn())
    outcome = fusecli.fuse(model, IMAGES, groups=[["conv", "bn"]])
    assert outcome.status == "fused"
    (entry,) = [entry for entry in outcome.ledger if entry.kind == "sizes"]
    assert "test_other_sizes.py" in entry.where
    assert "x9" in entry.what
    plain = fusecli.fuse(
        net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()), IMAGES, groups=[["conv", "bn"]]
    )
    assert not [entry for entry in plain.ledger if entry.kind == "sizes"]


def halved(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.conv(x))
    return F.pad(y, (0, 1)) if x.shape[-1] % 2 else y


class Rows(nn.Module):
    """On two axes the norm's channels are the layer's outputs; on three they are the axis between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.linear(x))
        return z


def test_the_report_says_for_which_sizes_it_speaks() -> None:
    outcome = fusecli.fuse(randomise(Rows(), 0), images(4, 8), groups=[["linear", "bn"]])
    assert outcome.status == "fused"
    assert sizes(outcome) == "equal at 4x8 and 5x8; inputs of another rank were not tried"
    fixed = net(lambda m, x: m.bn(m.conv(x.view(2, 3, 8, 8))), conv=conv(), bn=bn())
    outcome = fusecli.fuse(fixed, IMAGES, groups=[["conv", "bn"]])
    assert outcome.status == "fused"
    assert "speaks for 2x3x8x8 only" in sizes(outcome)


class Masked(nn.Module):
    """Several inputs that only fit together."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.bn = nn.Embedding(9, 6), nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, words: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        y = self.words(words) * mask[..., None]
        z: Tensor = self.bn(self.linear(y).transpose(1, 2)) + image.mean()
        return z


def test_inputs_that_fit_together_grow_together() -> None:
    words = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    inputs = (words, mask, images(1, 3, 7))
    outcome = fusecli.fuse(randomise(Masked(), 0), inputs, groups=[["linear", "bn"]])
    assert outcome.status == "fused", verdict(outcome).reasons
    assert "3x6, 3x6, 1x3x7" in sizes(outcome)


class OddBehindMask(nn.Module):
    """As `Odd`, with inputs that have to grow along with the image: which, and where, is not plain to see."""

    def __init__(self, mask: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mask, self.norm, self.conv = mask, nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        y = self.norm((x * self.mask(*masks)).relu())
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1))
        z: Tensor = self.conv(y)
        return z


def _square(x: Tensor) -> Tensor:
    assert x.shape[-1] == x.shape[-2], "squares only"
    return x


GROWING: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a mask of a square image": (lambda m: m[:, None], (images(2, 8, 8),)),
    "a row": (lambda row: row[:, None, None], (images(2, 8),)),
    "pairs": (lambda p: p.diagonal(dim1=1, dim2=2)[:, None, None], (images(2, 8, 8),)),
    "pairs beside a row": (
        lambda row, p: row[:, None, None] * p.diagonal(dim1=1, dim2=2)[:, None, None],
        (images(2, 8), images(2, 8, 8)),
    ),
    "squares only": (lambda m: _square(m)[:, None], (images(2, 8, 8),)),
}


@pytest.mark.parametrize(("mask", "masks"), GROWING.values(), ids=GROWING)
def test_the_axes_that_have_to_grow_together_are_found(
    mask: Callable[..., Tensor], masks: tuple[Tensor, ...]
) -> None:
    model = randomise(OddBehindMask(mask), 1)
    outcome = fusecli.fuse(model, (IMAGES, *masks), groups=[["norm", "conv"]])
    assert outcome.exit_code == ExitCode.DIFFERENT, outcome
    assert verdict(outcome).check_results["sizes"] == "different"


def test_integers_stay_in_the_range_that_was_seen() -> None:
    seen: list[int] = []

    def noting(m: Any, x: Tensor) -> Tensor:
        seen.append(int(x.max()))
        z: Tensor = m.bn(m.conv(m.words(x).movedim(-1, 1)))
        return z

    model = net(noting, words=nn.Embedding(9, 3), conv=conv(), bn=bn())
    outcome = fusecli.fuse(model, torch.randint(9, (2, 6, 6)), groups=[["conv", "bn"]])
    assert outcome.status == "fused", verdict(outcome).reasons
    assert "3x7x6" in sizes(outcome)
    assert max(seen) <= 8


def test_a_fused_model_that_fails_at_another_size_is_different() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    outcome = fusecli.fuse(model, X, groups=[["conv", "bn"]])

    class Strict(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[0] == X.shape[0]
            return x

    other = copy.deepcopy(outcome.model)
    other.bn = Strict()
    judged = fusecli.verify(model, other, X)
    assert str(judged) == "different"
    assert "AssertionError" in " ".join(judged.reasons)


def test_foreign_models_are_run_at_other_sizes_too() -> None:
    model = randomise(Odd(), 1)
    other = copy.deepcopy(model)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    shift = model.norm.bias - model.norm.running_mean * scale
    with torch.no_grad():
        other.conv.bias += other.conv.weight.sum((2, 3)) @ shift
        other.conv.weight *= scale[None, :, None, None]
    other.norm = nn.Identity()
    with torch.no_grad():
        assert relative_error(other(IMAGES), model(IMAGES)) < 1e-5
    judged = fusecli.verify(model, other, IMAGES)
    assert str(judged) == "different"
    assert "2x3x8x8" in judged.reasons[0]
    assert "x9" in judged.reasons[0]


def asking(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.conv(x))
    if x.abs().sum().item() > 0:
        y = y + 1
    return y if bool((x > -1e9).all()) else y * 2


def test_where_forward_asks_for_numbers_is_named_on_every_path_in_memory() -> None:
    model = net(asking, conv=conv(), bn=bn())
    outcome = fusecli.fuse(model, X, groups=[["conv", "bn"]])
    lines = [e.where for e in outcome.ledger if e.kind == "assumed"]
    assert len(lines) == 2
    assert all("test_other_sizes.py:" in line and "asking" in line for line in lines)
    judged = fusecli.verify(model, outcome.model, X)
    assert [e.where for e in judged.ledger] == lines
    plain = copy.deepcopy(model)
    judged = fusecli.verify(model, plain, X)  # of which nobody knows where it comes from
    assert all("test_other_sizes.py:" in e.where for e in judged.ledger)
    assert len(judged.ledger) == 2
    text = fusecli.plan(model, X).text
    assert all(f"#   {line}" in text for line in lines)


@pytest.mark.parametrize("build", HOLD_AT_ONE_SIZE.values(), ids=HOLD_AT_ONE_SIZE)
def test_a_plan_does_not_propose_it(build: Any) -> None:
    model = randomise(build(), 1)
    proposal = fusecli.plan(model, IMAGES)
    assert all("norm" not in group for group in proposal.groups)
    (left,) = [unfused for unfused in proposal.unfused if unfused.module == "norm"]
    assert left.code == "dropped"
    assert "it holds at 2x3x8x8, but not at" in left.reason
    assert fusecli.plan(randomise(Free(), 2), IMAGES).unfused == ()


class ByHeight(nn.Module):
    """Goes another way far from the sizes that are tried, which only its text shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if y.ndim != 4 or self.conv.weight.shape[0] > 100:
            raise ValueError("an image")
        height = y.shape[-2]
        y = y.abs() if height > 20 else y  # this one
        if self.conv.weight.shape[0] > 2:
            y = y * 2
        return self.head(y if len(x) < 100 else y.relu())  # and this one


def test_decisions_by_size_that_no_tried_size_shows_are_named() -> None:
    model = randomise(ByHeight(), 1)
    lines = Path(__file__).read_text().splitlines()
    places = [
        f"proof/test_other_sizes.py:{number} in ByHeight.forward"
        for number, line in enumerate(lines, 1)
        if line.endswith(("# this one", "# and this one"))
    ]
    outcome = fusecli.fuse(model, IMAGES, discover=True)
    assert outcome.exit_code == ExitCode.OK
    assert outcome.model is not None
    (entry,) = [entry for entry in outcome.ledger if entry.kind == "sizes"]
    assert entry.where == ", ".join(places)
    assert "forward decides by sizes here" in entry.what
    assert places[0] in fusecli.plan(model, IMAGES).text
    ledger = fusecli.verify(model, outcome.model, IMAGES).ledger
    assert [entry.where for entry in ledger if entry.kind == "sizes"] == [", ".join(places)]
    plain = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2)
    assert not fusecli.fuse(plain, IMAGES, discover=True).ledger
