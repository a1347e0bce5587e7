"""What is proven is what users run: in the stored dtype, without modes, hooks or gradients, torch may take a
fast path that no recorder sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Outcome
from tests.nets import images, randomise
from tests.rules.side_by_side import relative_error

# torch says this once, of its own fast path.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
WIDTH, LENGTH = 8, 4
TOKENS = images(2, LENGTH, WIDTH)
PADDED = torch.tensor([[False] * LENGTH, [False, False, True, True]])
WITHOUT = {"x": TOKENS}
MASKED = {"x": TOKENS, "mask": PADDED}


class Tagger(nn.Module):
    """An encoder, and a head that reads every row, the padded ones too."""

    def __init__(self, norm: bool = False, **options: Any) -> None:
        super().__init__()
        nested = options.pop("nested", True)
        options = {"batch_first": True, **options}
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, **options)
        self.encoder = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(WIDTH) if norm else None, enable_nested_tensor=nested
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.behind(self.encoder(x, src_key_padding_mask=mask)))
        return y

    def behind(self, y: Tensor) -> Tensor:
        return y


class Behind(Tagger):
    """A batch norm directly behind the encoder, and one that is far away from it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.out, self.far = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def behind(self, y: Tensor) -> Tensor:
        z: Tensor = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return z

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.far(self.out(super().forward(x, mask).relu()).mean(1))
        return y


def model_of(cls: type[Tagger] = Tagger, **options: Any) -> Any:
    return randomise(cls(**options), 3).eval()


def by_hand(model: Tagger) -> Tagger:
    """The fold that was made before: right wherever no row is padded."""
    other = copy.deepcopy(model)
    norm, head = other.encoder.layers[-1].norm2, other.head
    with torch.no_grad():
        head.bias += head.weight @ norm.bias
        head.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()
    return other


def apart(model: nn.Module, other: Any, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return relative_error(model(**inputs), other(**inputs))


def folded(outcome: Outcome) -> list[tuple[str, ...]]:
    return [group.modules for group in outcome.groups]


@pytest.mark.parametrize("inputs", [WITHOUT, MASKED], ids=["no mask", "mask"])
def test_a_gain_at_the_end_of_an_encoder_that_pads_stays(inputs: dict[str, Tensor]) -> None:
    model = model_of()
    outcome = fusecli.fuse(model, inputs, discover=True)
    assert folded(outcome) == []
    (last,) = (left for left in outcome.unfused if left.module == "encoder.layers.1.norm2")
    assert last.code == "padded-rows"
    assert apart(model, outcome.model, MASKED) == 0.0


def test_a_listed_one_is_refused() -> None:
    outcome = fusecli.fuse(model_of(), WITHOUT, groups=[["encoder.layers.1.norm2", "head"]])
    assert outcome.exit_code == ExitCode.REFUSED
    (no,) = outcome.refused
    assert no.code == "padded-rows"
    assert "enable_nested_tensor=False" in no.remedy
    assert "encoder fills" in no.reason


@pytest.mark.parametrize("inputs", [WITHOUT, MASKED], ids=["no mask", "mask"])
def test_a_norm_behind_the_padding_stays_and_one_far_away_folds(inputs: dict[str, Tensor]) -> None:
    model = model_of(Behind)
    outcome = fusecli.fuse(model, inputs, discover=True)
    assert outcome.status == "fused", outcome.verification
    assert ("out", "far") in folded(outcome)
    assert not any("encoder" in path for group in folded(outcome) for path in group)
    assert apart(model, outcome.model, MASKED) < 1e-5


SOUND = {
    "no nested tensors": {"nested": False},
    "a norm behind the padding": {"norm": True},
    "norms first": {"norm_first": True, "norm": True, "nested": False},
    "not batch first": {"batch_first": False, "nested": False},
}


@pytest.mark.parametrize("inputs", [WITHOUT, MASKED], ids=["no mask", "mask"])
@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND)
def test_what_holds_on_both_paths_folds(options: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    model = model_of(**options)
    masked = MASKED
    if not options.get("batch_first", True):
        inputs, masked = ({**case, "x": TOKENS.transpose(0, 1)} for case in (inputs, MASKED))
    outcome = fusecli.fuse(model, inputs, discover=True)
    assert outcome.status == "fused", outcome.verification
    assert any(group[-1] == "head" for group in folded(outcome))
    assert apart(model, outcome.model, masked) < 1e-5
    assert fusecli.verify(model, outcome.model, masked).equivalent


def test_foreign_models_are_compared_as_users_run_them() -> None:
    model = model_of()
    other = by_hand(model)
    assert apart(model, other, MASKED) > 0.05
    assert fusecli.verify(model, other, WITHOUT).equivalent
    judged = fusecli.verify(model, other, MASKED)
    assert str(judged) == "different"
    assert "as users run them" in " ".join(judged.reasons)


def test_a_foreign_model_that_is_right_on_the_fast_path_is_equivalent() -> None:
    model = model_of()
    other = copy.deepcopy(model)
    with torch.no_grad():  # two units that change places
        for name in ("weight", "bias"):
            tensor = getattr(other.encoder.layers[0].linear1, name)
            tensor[:2] = tensor[:2].flip(0).clone()
        columns = other.encoder.layers[0].linear2.weight
        columns[:, :2] = columns[:, :2].flip(1).clone()
    judged = fusecli.verify(model, other, MASKED)
    assert judged.equivalent, judged.reasons


class Shortcut(nn.Module):
    """Takes another way where nobody looks; a fold in front of its mask is right only where somebody does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 5)
        self.first, self.second = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if torch.overrides.has_torch_function((y,)) or self.bn._forward_hooks:
            y = self.bn(y)
        else:
            y = self.bn(y * (torch.arange(y.shape[-1]) < 2))
        z: Tensor = self.second(self.first(self.head(y.transpose(1, 2)).relu()).transpose(1, 2))
        return z


def test_a_group_that_is_wrong_only_where_nobody_looks_is_dropped() -> None:
    model = randomise(Shortcut(), 0).eval()
    x = images(2, 3, 6)
    outcome = fusecli.fuse(model, x, discover=True)
    assert ("conv", "bn") not in folded(outcome)
    assert ("first", "second") in folded(outcome)
    assert any("as users run" in no.reason for no in outcome.refused)
    with torch.no_grad():
        assert relative_error(model(x), outcome.model(x)) < 1e-5
    listed = fusecli.fuse(model, x, groups=[["conv", "bn"]])
    assert listed.exit_code == ExitCode.DIFFERENT
    assert listed.model is None


class Recurrent(nn.Module):
    """A layer that shares its weight with an RNN, whose op reads it as a whole."""

    def __init__(self, rnn: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.rnn = rnn(6, 6, batch_first=True)
        wide = len(self.rnn.weight_ih_l0)
        self.gain, self.shared, self.norm = nn.LayerNorm(6), nn.Linear(6, wide), nn.BatchNorm1d(wide)
        self.shared.weight = self.rnn.weight_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.bn(self.first(x).transpose(1, 2)).transpose(1, 2))
        z: Tensor = self.norm(self.shared(self.gain(y)).transpose(1, 2))
        return z


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_weight_that_the_op_of_an_rnn_reads_stays(rnn: type[nn.RNNBase]) -> None:
    model, x = randomise(Recurrent(rnn), 0), images(2, 4, 5)
    outcome = fusecli.fuse(model, x, discover=True)
    assert folded(outcome) == [("first", "bn")]
    with torch.no_grad():
        assert relative_error(outcome.model(x), model(x)) < 1e-4


class ByDtype(nn.BatchNorm2d):
    """Another function in the dtype that users run it in."""

    def forward(self, input: Tensor) -> Tensor:
        scaled = 1.0 if input.dtype == torch.float64 else 1.5
        return super().forward(input) * scaled


@pytest.mark.parametrize("asked", [{"discover": True}, {"groups": [["0", "1"]]}], ids=["found", "listed"])
def test_a_norm_that_is_another_function_in_its_own_dtype_is_different(asked: Any) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), ByDtype(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3)
    outcome = fusecli.fuse(model, images(2, 3, 8, 8), **asked)
    assert outcome.exit_code == ExitCode.DIFFERENT
    assert outcome.model is None
    assert outcome.verification is not None
    assert "in the stored dtype, where the original computes something else than in float64" in str(
        outcome.verification.reasons
    )


def test_a_fold_that_rounds_less_than_the_original_is_equivalent() -> None:
    model: Any = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3)
    for huge in (1e5, 1e6, 1e7):
        with torch.no_grad():
            model[0].bias += huge
            model[1].running_mean += huge
        assert fusecli.fuse(model, images(2, 3, 8, 8), discover=True).status == "fused"
