"""`verify` of a .pt2 file in which one thing was changed: each is refused, and the untouched file is not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from fusecli.commands import int8
from fusecli.int8.latency import latency
from fusecli.int8.saved import program_in
from tests.conftest import Cli, Run
from tests.nets import randomise

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        y = nn.functional.max_pool2d(self.bn(self.conv(x)).relu(), 2).mean((2, 3))
        return {"scores": self.fc(y), "other": self.head(y) - self.fc.bias}
"""
Tamper = Callable[[ExportedProgram], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a small project; out.pt2 is made in it by the first test that asks."""
    folder = tmp_path_factory.mktemp("tampered")
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(SOURCE, "net.py", "exec"), names)
    torch.save(randomise(names["Net"](), 0).state_dict(), folder / "model.pt")
    (folder / "net.py").write_text(SOURCE)
    rng = torch.Generator().manual_seed(0)
    data = {name: torch.randn(16, 2, 8, 8, generator=rng) for name in ("x", "held")}
    save_file(data, folder / "x.safetensors")
    files = {key: [{"file": "x.safetensors", "key": key}] for key in data}
    spec = {"version": 1, "model": {"factory": "net.py:Net"}, "inputs": files["held"]}
    spec["quantize"] = {"calibrate": files["x"], "threshold": {"sqnr": 10}}
    (folder / "quantize.yaml").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def folder(made: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.setattr(
        int8, "latency", lambda models, sample, seconds: latency(models, sample, seconds=0.01)
    )
    if not (made / "out.pt2").exists():
        done = cli("quantize", "model.pt", *WORDS, "-o", "out.pt2")
        assert done.code == 0, done.out + done.err
    return made


WORDS = ["--spec", "quantize.yaml", "--allow-code", "net.py"]


def verified(cli: Cli, name: str, *words: str) -> Run:
    return cli("verify", "model.pt", name, *WORDS, "--allow-pickle", *words)


def written(folder: Path, tamper: Tamper) -> None:
    """bad.pt2: out.pt2, changed, with the same facts beside it."""
    facts = {"fusecli.json": ""}
    program_in((folder / "out.pt2").read_bytes())  # makes torch know the ops
    program = torch.export.load(io.BytesIO((folder / "out.pt2").read_bytes()), extra_files=facts)
    tamper(program)
    program.graph_module.recompile()
    torch.export.save(program, folder / "bad.pt2", extra_files=facts)


def ops(program: ExportedProgram, name: str = "") -> list[Node]:
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    return [node for node in called if name in str(node.target)]


def argument(position: int, index: int, change: Callable[[Any], Any]) -> Tamper:
    """Another argument of the op at that position of those that quantize or dequantize."""

    def tamper(program: ExportedProgram) -> None:
        node = ops(program, "quantize_per_")[position]
        node.update_arg(index, change(node.args[index]))

    return tamper


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Tamper:
    def tamper(program: ExportedProgram) -> None:
        before = program.state_dict[name]
        after = change(before.detach().clone())
        program.state_dict[name] = (
            torch.nn.Parameter(after, False) if isinstance(before, torch.nn.Parameter) else after
        )

    return tamper


def first_one_more(value: Tensor) -> Tensor:
    value.view(-1)[0] += 1
    return value


def a_little(value: Tensor) -> Tensor:
    value.view(-1)[-1] *= 1.0001
    return value


def edge(position: int, index: int, source: int) -> Tamper:
    """The op at that position reads what another op of the same shape gives."""

    def tamper(program: ExportedProgram) -> None:
        ops(program)[position].update_arg(index, ops(program)[source])

    return tamper


def without_bias(program: ExportedProgram) -> None:
    node = ops(program, "aten.linear")[0]
    node.args = node.args[:2]


def another_bias(program: ExportedProgram) -> None:
    one, other = ops(program, "aten.linear")
    one.args = (*one.args[:2], other.args[2])


def other_weight(program: ExportedProgram) -> None:
    one, other = ops(program, "aten.linear")
    one.args, other.args = (
        (one.args[0], other.args[1], *one.args[2:]),
        (
            other.args[0],
            one.args[1],
            *other.args[2:],
        ),
    )


def one_more_op(program: ExportedProgram) -> None:
    relu = ops(program, "aten.relu")[0]
    with program.graph.inserting_after(relu):
        more = program.graph.call_function(torch.ops.aten.relu.default, (relu,))
    more.meta = dict(relu.meta)
    relu.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


def one_op_less(program: ExportedProgram) -> None:
    relu = ops(program, "aten.relu")[0]
    relu.replace_all_uses_with(relu.args[0])
    program.graph.erase_node(relu)


def another_op(program: ExportedProgram) -> None:
    ops(program, "aten.relu")[0].target = torch.ops.aten.sigmoid.default


def outputs_swapped(program: ExportedProgram) -> None:
    (last,) = (node for node in program.graph.nodes if node.op == "output")
    last.args = (tuple(reversed(last.args[0])),)
    program.graph_signature.output_specs.reverse()


def output_renamed(program: ExportedProgram) -> None:
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.out_spec = torch.utils._pytree.tree_structure({"scores": 0, "others": 0})


def larger_pool(program: ExportedProgram) -> None:
    ops(program, "aten.max_pool2d")[0].update_arg(1, [1, 2])


COVERING: dict[str, Tamper] = {
    "the high end of an activation": argument(4, 4, lambda high: 215),
    "the scale of the output": argument(-1, 1, lambda scale: scale * 1.5),
    "the scale of an input, by little": argument(4, 1, lambda scale: scale * (1 + 1e-6)),
    "a zero point, by one": argument(-1, 2, lambda zero: zero + 1),
    "a range of weights": argument(0, 5, lambda high: 110),
    "an integer": tensor("_frozen_param0", first_one_more),
    "a scale of weights": tensor("_scale_1", a_little),
    "a bias": tensor("fc.bias", a_little),
    "a dropped bias": without_bias,
    "another bias": another_bias,
    "another weight": other_weight,
    "an op more": one_more_op,
    "an op less": one_op_less,
    "another op": another_op,
    "outputs swapped": outputs_swapped,
    "an output renamed": output_renamed,
    "an argument of another op": larger_pool,
}


def test_the_untouched_file_is_what_it_says(folder: Path, cli: Cli) -> None:
    assert verified(cli, "out.pt2").code == 0
    written(folder, lambda program: None)
    assert verified(cli, "bad.pt2").code == 0


def refused(folder: Path, cli: Cli, tamper: Tamper) -> None:
    written(folder, tamper)
    done = verified(cli, "bad.pt2", "--report", "json=-")
    assert done.code in (1, 3), done.out
    if done.code == 1:
        assert done.report["status"] == "different"
        assert done.report["problems"]


@pytest.mark.parametrize("tamper", COVERING.values(), ids=COVERING)
def test_one_thing_that_was_changed_is_seen(folder: Path, cli: Cli, tamper: Tamper) -> None:
    refused(folder, cli, tamper)


# --- everything, one at a time


def changed(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.int16
    return value * 1.5 if isinstance(value, float) else value + 1


def everything(program: ExportedProgram) -> Iterator[tuple[str, Tamper]]:
    for position, node in enumerate(ops(program, "quantize_per_")):
        for index, value in enumerate(node.args):
            if not isinstance(value, Node):
                yield f"{node.name} argument {index}", argument(position, index, changed)
    for name, value in program.state_dict.items():
        yield f"one of {name}", tensor(name, a_little if value.is_floating_point() else first_one_more)
    for position, node in enumerate(ops(program)):
        for index, value in enumerate(node.args):
            if isinstance(value, Node):
                yield f"{node.name} reads another value at {index}", rewired(position, index)


def rewired(position: int, index: int) -> Tamper:
    """The op reads another value there: one of the same kind in front of it, where there is one."""

    def tamper(program: ExportedProgram) -> None:
        node = ops(program)[position]
        read = node.args[index]
        earlier = [other for other in program.graph.nodes if other < node and other not in (read, node)]
        kind = read.meta["val"].dtype, read.meta["val"].shape
        alike = [n for n in earlier if (n.meta["val"].dtype, n.meta["val"].shape) == kind]
        node.update_arg(index, [*earlier, *alike][-1])

    return tamper


@pytest.mark.slow
def test_every_number_every_tensor_and_every_edge(folder: Path, cli: Cli) -> None:
    before = program_in((folder / "out.pt2").read_bytes())
    cases = list(everything(before))
    assert len(cases) > 70
    accepted = []
    for name, tamper in cases:
        written(folder, tamper)
        if verified(cli, "bad.pt2", "-q").code not in (1, 3):
            accepted.append(name)
    assert accepted == []
