from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fusecli.int8.torchao import flow, quiet
from fusecli.int8.watching import Watch, node_outputs, run
from fusecli.sample import Sample

Nets = tuple[fx.GraphModule, fx.GraphModule, Sample]


class Net(nn.Module):
    """A residual and a head; the same names in the float and in the converted graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y) + y)
        return self.f(y.mean((2, 3)))


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return torch.export.export(model.eval(), args, kwargs).module()


def converted(model: nn.Module, sample: Sample) -> fx.GraphModule:
    """The int8 graph of torchao by a small quantizer: relus and linear layers are quantized behind."""
    ao = flow()
    observer = ao.MinMax.with_args(eps=2**-12)
    activation = ao.Spec(torch.uint8, observer, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)

    class Quantizer(ao.Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in model.graph.nodes:
                if node.target in (torch.ops.aten.relu.default, torch.ops.aten.linear.default):
                    node.meta["quantization_annotation"] = ao.Annotation(
                        output_qspec=activation, _annotated=True
                    )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            pass

    with quiet():
        prepared = ao.prepare(graph_of(model, *sample.args), Quantizer())
        with torch.no_grad():
            prepared(*sample.args)
        return ao.convert(prepared)


def float_and_int8() -> Nets:
    """A network as a float graph and as an int8 graph, and its sample."""
    torch.manual_seed(0)
    model, sample = Net(), Sample((torch.randn(4, 3, 8, 8),))
    return graph_of(model, *sample.args), converted(model, sample), sample


@pytest.fixture(scope="module")
def nets() -> Nets:
    return float_and_int8()


def test_a_float_value_is_the_nodes_own(nets: Nets):
    graph, _, sample = nets
    found = node_outputs(graph, ["relu", "linear"], sample)
    assert list(found) == ["relu", "linear"]
    conv = graph.get_parameter("a.weight"), graph.get_parameter("a.bias")
    assert torch.equal(found["relu"], nn.functional.conv2d(sample.args[0], *conv, padding=1).relu())
    assert torch.equal(found["linear"], graph(*sample.args))
    assert not found["relu"].requires_grad


def test_an_int8_value_is_the_one_behind_its_quantization(
    nets: Nets,
):
    _, graph, sample = nets
    node = next(node for node in graph.graph.nodes if node.name == "relu")
    quantize = next(iter(node.users))
    assert "quantize_per_tensor" in str(quantize.target)
    scale, zero = quantize.args[1:3]
    value = node_outputs(graph, ["relu"], sample)["relu"]
    steps = value / scale + zero
    assert torch.allclose(steps, steps.round(), atol=1e-3), "no value of the 256 that int8 has"
    own = nn.functional.conv2d(
        sample.args[0], graph.get_parameter("a.weight"), graph.get_parameter("a.bias"), padding=1
    )
    assert 0 < (value - own.relu()).abs().max() <= scale * 0.501
    # what is not quantized behind is passed on as it is
    assert torch.equal(node_outputs(graph, ["conv2d"], sample)["conv2d"], own)


def test_an_unknown_node_is_named(nets: Nets):
    with pytest.raises(ValueError, match="no node nowhere"):
        node_outputs(nets[0], ["relu", "nowhere"], nets[2])


def test_only_what_is_asked_for_is_kept():
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = x + 1
            return x

    graph = graph_of(Chain(), torch.zeros(3))
    alive: list[int] = []

    class Counting(Watch):
        def run_node(self, n: fx.Node) -> Any:
            alive.append(sum(isinstance(value, Tensor) for value in self.env.values()))
            return super().run_node(n)

    run(Counting(graph, ["add_1"], lambda name, value: None), Sample((torch.zeros(3),)))
    assert max(alive) <= 2


def test_what_is_kept_is_not_overwritten_by_an_op_in_place():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 1).relu_()

    graph = graph_of(InPlace(), torch.zeros(3))
    assert node_outputs(graph, ["sub"], Sample((torch.zeros(3),)))["sub"].tolist() == [-1, -1, -1]


def test_samples_with_keywords_and_nested_arguments_and_the_samples_stay_as_they_are():
    class Keywords(nn.Module):
        def forward(self, x: Tensor, *, by: dict[str, Tensor], plus: Tensor) -> dict[str, Tensor]:
            return {"y": x.mul_(by["s"]) + plus - by["t"]}

    by = {"s": torch.tensor(2.0), "t": torch.tensor(5.0)}
    graph = graph_of(Keywords(), torch.ones(3), by=by, plus=torch.tensor(1.0))
    turned = {"t": by["t"], "s": by["s"]}
    x = torch.ones(3)
    for sample in (
        Sample((x,), {"by": by, "plus": torch.tensor(1.0)}),
        Sample((x,), {"plus": torch.tensor(1.0), "by": turned}),
        Sample((), {"plus": torch.tensor(1.0), "by": turned, "x": x}),
    ):
        assert node_outputs(graph, ["sub"], sample)["sub"].tolist() == [-2, -2, -2]
    assert x.tolist() == [1, 1, 1]
