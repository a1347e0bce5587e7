"""The exported graph: one function, any batch where that is possible, and one sentence where nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli.errors import UsageError
from fusecli.int8.export import exported
from fusecli.sample import Sample


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Named(nn.Module):
    def forward(self, x, scale=None, *, shift=None):
        return {"sum": x * scale + shift, "x": (x, shift)}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(batch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)).eval()
    graph = exported(model, Sample((torch.randn(batch, 3, 5, 5),)))
    assert (graph.batched, graph.notes) == (True, ())
    for other in (1, 3, 8):
        x = torch.randn(other, 3, 5, 5)
        torch.testing.assert_close(graph.module(x), model(x))


def test_arguments_by_name_share_the_batch():
    x, scale, shift = torch.randn(2, 3), torch.randn(2, 1), torch.randn(3)
    graph = exported(Named().eval(), Sample((x,), {"scale": scale, "shift": shift}))
    assert graph.batched
    found = graph.module(torch.ones(7, 3), scale=torch.ones(7, 1), shift=shift)
    assert torch.equal(found["sum"], 1 + shift.expand(7, 3))
    assert found["x"][1] is shift


def test_a_batch_that_is_fixed_is_said():
    model = Function(lambda x: x.reshape(2, 3, -1)).eval()
    graph = exported(model, Sample((torch.randn(2, 12),)))
    assert (graph.batched, graph.notes) == (False, ("the graph takes inputs of exactly these sizes: 2x12",))
    assert graph.module(torch.randn(2, 12)).shape == (2, 3, 4)


def test_a_model_that_branches_on_values_is_one_sentence():
    model = Function(lambda x: x if x.sum() > 0 else -x).eval()
    with pytest.raises(UsageError, match="Function: the model cannot be exported: ") as raised:
        exported(model, Sample((torch.randn(2, 3),)))
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_training_mode_is_refused():
    with pytest.raises(UsageError, match="training mode"):
        exported(nn.Linear(2, 2), Sample((torch.randn(1, 2),)))


def test_another_function_is_refused():
    model = Function(lambda x: x + torch.rand(())).eval()
    with pytest.raises(UsageError, match="other outputs than the model"):
        exported(model, Sample((torch.randn(2, 3),)))


def test_no_op_writes_to_what_it_reads():
    def forward(x):
        y = x + 1
        y[:, 0].relu_()
        y += 1
        return y

    graph = exported(Function(forward).eval(), Sample((torch.randn(2, 3),)))
    calls = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    mutable = [
        node for node in calls if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]
    assert calls
    assert not mutable


def test_nodes_are_named_by_their_ops():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU6(), nn.Conv2d(3, 3, 3), nn.Flatten()).eval()
    graph = exported(model, Sample((torch.randn(2, 3, 9, 9),)))
    names = [node.name for node in graph.module.graph.nodes if node.op == "call_function"]
    assert [name for name in names if not name.startswith("sym_size")] == [
        "conv2d",
        "relu6",
        "conv2d_1",
        "view",
    ]


def test_the_model_and_the_sample_are_left_alone():
    x = torch.randn(1, 3)
    before = x.clone()
    model = Function(lambda x: x.relu_()).eval()
    exported(model, Sample((x,)))
    assert torch.equal(x, before)
