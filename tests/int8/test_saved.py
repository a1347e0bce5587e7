"""The .pt2 file: the same function, the same bytes, small, and nothing of this machine in it."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch
from torch import nn

from fusecli.errors import FusecliError, UsageError
from fusecli.int8.quantize import quantize
from fusecli.int8.saved import archive, calls, load, save
from fusecli.sample import Sample
from tests.int8.nets import built


@pytest.fixture(scope="module")
def done():
    model = built("AddReLU")
    return quantize(model, [Sample((torch.randn(1, 3, 6, 6),)) for _ in range(3)])


def test_loaded_it_is_the_same_function(done, tmp_path):
    save(done, tmp_path / "x.pt2")
    loaded = load(tmp_path / "x.pt2")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 6, 6)
        assert torch.equal(loaded(x), done.model(x))


@pytest.mark.parametrize("name", ["AddReLU", "Pools"])  # Pools asks for a size
def test_its_ops_get_their_names_back(name, tmp_path):
    model = built(name)
    done = quantize(model, [Sample((torch.randn(*model.SHAPE),))])
    save(done, tmp_path / "x.pt2")
    names = [node.name for node in done.model.graph.nodes if node.op == "call_function"]
    loaded = load(tmp_path / "x.pt2", names)
    mine, theirs = ([(node.name, node.target) for node in calls(graph)] for graph in (done.model, loaded))
    assert mine == theirs
    x = torch.randn(3, *model.SHAPE[1:])
    assert torch.equal(loaded(x), done.model(x))
    with pytest.raises(UsageError, match="names are given"):
        load(tmp_path / "x.pt2", names[:-1])


def test_other_files_travel_in_it(done):
    extra = {"facts.json": ""}
    torch.export.load(io.BytesIO(archive(done, {"facts.json": "{}"})), extra_files=extra)
    assert extra == {"facts.json": "{}"}


def test_saved_twice_it_is_the_same_file(done, tmp_path):
    save(done, tmp_path / "x.pt2")
    save(done, tmp_path / "another name.pt2")
    again = quantize(built("AddReLU"), [Sample((torch.randn(1, 3, 6, 6),))])
    assert (tmp_path / "x.pt2").read_bytes() == (tmp_path / "another name.pt2").read_bytes()
    assert archive(again) != (tmp_path / "x.pt2").read_bytes()


def test_nothing_of_the_machine_or_the_inputs_is_in_it(done, tmp_path):
    save(done, tmp_path / "x.pt2")
    with zipfile.ZipFile(tmp_path / "x.pt2") as opened:
        records = {entry.filename: opened.read(entry) for entry in opened.infolist()}
    assert not records["archive/data/sample_inputs/model.pt"]
    for name, record in records.items():
        assert b"/site-packages/" not in record, name
        assert b"stack_trace" not in record, name


def test_it_is_small(tmp_path):
    layers = [nn.Conv2d(64 * 2**n, 128 * 2**n, 3, 2, 1, groups=1) for n in range(3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 100)).eval()
    size = sum(4 * tensor.numel() for tensor in model.parameters())
    assert 5e6 < size < 1e7
    save(quantize(model, [Sample((torch.randn(2, 64, 8, 8),))]), tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").stat().st_size < 0.27 * size


def test_what_is_no_pt2_file_is_one_sentence(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    for path in (tmp_path / "x.pt2", tmp_path / "missing.pt2"):
        with pytest.raises(FusecliError) as raised:
            load(path)
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
