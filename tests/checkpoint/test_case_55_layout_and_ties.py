"""Case 55: every layout and dtype is written right, ties are known, equal content gives equal bytes."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusecli.checkpoint import open_checkpoint, sha256_file, write_pt, write_safetensors
from fusecli.errors import UsageError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLES = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
]
DTYPES = [*FLOATS, *WHOLES, torch.complex64]


def layout_of(state):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def write(path, state, metadata=None):
    write_safetensors(path, layout_of(state), state.items(), metadata or {})
    return path


def raw(tensor):
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.fixture
def shapes():
    """Every shape that an offset or a stride can get wrong."""
    weight = torch.arange(96.0).reshape(2, 3, 4, 4)
    return {
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "slice": torch.arange(10)[3:7],
        "every_second": torch.arange(10)[::2],
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "odd_bytes": torch.ones(3, dtype=torch.bool),
        "requires_grad": torch.nn.Parameter(torch.ones(2)),
        "conjugated": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        "naïve.ключ\n\"'": torch.ones(1),
    }


def test_shapes_and_layouts_to_safetensors(tmp_path, shapes):
    path = write(tmp_path / "m.safetensors", shapes)
    found = load_file(path)
    assert set(found) == set(shapes)
    for name, tensor in shapes.items():
        assert torch.equal(found[name], tensor.detach()), name
    with open_checkpoint(path) as checkpoint:
        for name, tensor in shapes.items():
            assert torch.equal(checkpoint.tensors[name].load(), tensor.detach()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_to_safetensors(tmp_path, dtype):
    values = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    state = {"a": values, "b": torch.tensor([True]), "c": torch.tensor(2.0, dtype=torch.float64)}
    path = write(tmp_path / "m.safetensors", state)
    with safe_open(path, "pt") as file, open_checkpoint(path) as checkpoint:
        for found in (file.get_tensor("a"), checkpoint.tensors["a"].load()):
            assert found.dtype == dtype
            assert raw(found) == raw(values)
            assert found.data_ptr() % dtype.itemsize == 0


def test_bytes_are_those_of_the_library(tmp_path, state):
    write(tmp_path / "ours", state, {"fusecli": "manifest"})
    save_file(state, tmp_path / "library", metadata={"fusecli": "manifest"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_bytes_depend_on_neither_order_nor_layout(tmp_path, state):
    first = write(tmp_path / "a", state, {"x": "1", "y": "2"})
    turned = dict(reversed(state.items()))
    turned["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    second = write(tmp_path / "b", turned, {"y": "2", "x": "1"})
    assert sha256_file(first) == sha256_file(second)


def test_tensors_are_written_one_by_one_in_any_order(tmp_path, state):
    path, alive = tmp_path / "m", []

    def produce():
        for name in ("bn.num_batches_tracked", "conv.bias", "conv.weight", "bn.running_mean"):
            alive.append(path.stat().st_size)
            yield name, state[name].clone()

    write_safetensors(path, layout_of(state), produce(), {})
    assert alive[0] < path.stat().st_size
    assert torch.equal(load_file(path)["conv.weight"], state["conv.weight"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda pairs: pairs[1:], "never arrived"),
        (lambda pairs: [*pairs, pairs[0]], "arrived, the layout has"),
        (lambda pairs: [*pairs, ("new", torch.ones(1))], "tensor 'new'"),
        (lambda pairs: [(pairs[0][0], pairs[0][1].half()), *pairs[1:]], "float16"),
        (lambda pairs: [(pairs[0][0], pairs[0][1].flatten()), *pairs[1:]], "108"),
    ],
)
def test_a_broken_promise_is_a_bug(tmp_path, state, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_safetensors(tmp_path / "m", layout_of(state), change(list(state.items())), {})


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(UsageError, match=r"'w' \(torch.complex128\).*format: pt"):
        write(tmp_path / "m", {"w": torch.ones(1, dtype=torch.complex128)})


def test_no_tensors_at_all(tmp_path):
    with open_checkpoint(write(tmp_path / "m", {})) as checkpoint:
        assert not checkpoint.tensors
    assert load_file(tmp_path / "m") == {}


def tied():
    weight, buffer = torch.ones(2, 2), torch.arange(8.0)
    return {
        "encoder": weight,
        "decoder": weight,
        "transposed": weight.t(),
        "part": buffer[:4],
        "same_part": buffer[:4],
        "other_part": buffer[4:],
        "none": torch.empty(0),
        "nothing": torch.empty(0),
    }


TIES = (("encoder", "decoder"), ("part", "same_part"))


@pytest.mark.parametrize("legacy", [False, True])
def test_ties_are_names_of_the_very_same_memory(tmp_path, legacy):
    torch.save(tied(), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.ties == TIES


def test_ties_carry_the_stripped_names(tmp_path):
    weight = torch.ones(2)
    torch.save({"module.a": weight, "module.b": weight}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.ties == (("a", "b"),)


def test_write_pt_keeps_ties_order_and_the_manifest(tmp_path):
    write_pt(tmp_path / "m.pt", tied(), {"fusecli": '{"edits": []}'})
    plain = torch.load(tmp_path / "m.pt", weights_only=True)
    assert type(plain) is OrderedDict
    assert list(plain) == list(tied())
    assert plain["encoder"].data_ptr() == plain["decoder"].data_ptr() == plain["transposed"].data_ptr()
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.ties == TIES
        assert json.loads(checkpoint.metadata["fusecli"]) == {"edits": []}


def test_write_pt_takes_only_its_own_bytes_along(tmp_path):
    write_pt(tmp_path / "m.pt", {"part": torch.arange(1_000_000.0)[:2]}, {})
    assert (tmp_path / "m.pt").stat().st_size < 10_000


def test_write_pt_is_the_same_under_any_name(tmp_path, state):
    write_pt(tmp_path / "first.pt", state, {"fusecli": "x"})
    write_pt(
        tmp_path / "second.other", {name: tensor.clone() for name, tensor in state.items()}, {"fusecli": "x"}
    )
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.other").read_bytes()


def test_a_model_loads_what_write_pt_wrote(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    write_pt(tmp_path / "m.pt", model.state_dict(), {"fusecli": "manifest"})
    model.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)


def test_the_manifest_of_a_safetensors_artifact(tmp_path, state):
    with open_checkpoint(write(tmp_path / "m", state, {"fusecli": '{"a": "ü"}'})) as checkpoint:
        assert checkpoint.metadata["fusecli"] == '{"a": "ü"}'


def test_the_metadata_of_an_ordinary_state_dict_is_no_manifest(tmp_path):
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.metadata == {}


def test_copying_a_real_network_changes_no_bit(trained, tmp_path):
    with open_checkpoint(trained("facenet_pytorch", "data/pnet.pt")) as checkpoint:
        state = {name: stored.load() for name, stored in checkpoint.tensors.items()}
        assert any(not tensor.is_contiguous() for tensor in state.values())
        found = load_file(write(tmp_path / "m", state))
    assert all(raw(found[name]) == raw(state[name]) for name in state)
