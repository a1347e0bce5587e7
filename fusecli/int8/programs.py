"""Whether the program of a .pt2 file is the one that a fresh conversion of the float model gives.

Nothing that the file says is believed: ops, edges, arguments, the names of inputs, outputs and tensors are
held against a program that was converted, saved and loaded here. A scale or a zero point may be another
number, for another machine rounds otherwise (`rounded` says how far); but one value has one of each, wherever
it is quantized, dequantized and passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fusecli.int8.ops import FOLLOWERS, op_name
from fusecli.sample import tensors_in

_PER_TENSOR = {f"quantized_decomposed.{way}_per_tensor" for way in ("quantize", "dequantize")}
# Arguments of an op that quantizes or dequantizes per tensor, behind the value that it reads.
_SCALE, _ZERO_POINT, _DTYPE = 1, 2, 5


def unlike(fresh: ExportedProgram, written: ExportedProgram) -> list[str]:
    """What is other in `written` than in `fresh`, one sentence each.

    Tensors may hold other numbers of the same layout, and ops that quantize other scales and zero points.
    """
    found = [*_names(fresh, written), *_layouts(fresh, written)]
    mine, theirs = (dict(_graphs(program)) for program in (fresh, written))
    found += [f"only one of both has a graph {name}" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        found += _ops(mine[name], theirs[name])
    return found or _at_odds(fresh, written)


def _names(fresh: ExportedProgram, written: ExportedProgram) -> Iterator[str]:
    """How the program is called, what it gives, for which sizes, and which tensors its graph reads."""
    for what, read in (
        ("inputs", _inputs),
        ("outputs", _outputs),
        ("call", _calls),
        ("sizes", _sizes),
    ):
        pairs = zip_longest(read(fresh), read(written), fillvalue="nothing")
        for mine, theirs in pairs:
            if mine != theirs:
                yield f"its {what}: {_short(theirs)}, where the model has {_short(mine)}"
                break


def _inputs(program: ExportedProgram) -> list[str]:
    specs = program.graph_signature.input_specs
    return [f"{s.kind.name} {_argument(s.arg)} {s.target or ''} {s.persistent or ''}".strip() for s in specs]


def _outputs(program: ExportedProgram) -> list[str]:
    specs = program.graph_signature.output_specs
    return [f"{s.kind.name} {_argument(s.arg)} {s.target or ''}".strip() for s in specs]


def _argument(argument: Any) -> str:
    """Its name, and its value where it is a constant."""
    value = getattr(argument, "value", None)
    return str(argument.name) if value is None else f"{argument.name}={value!r}"


def _calls(program: ExportedProgram) -> list[str]:
    calls = ((entry.fqn, entry.signature) for entry in program.module_call_graph)
    return [
        f"{fqn}({', '.join(call.forward_arg_names or ())}) {call.in_spec} -> {call.out_spec}"
        for fqn, call in calls
        if call is not None
    ]


def _sizes(program: ExportedProgram) -> list[str]:
    ranges = sorted(f"{symbol} in {bounds}" for symbol, bounds in program.range_constraints.items())
    return [*ranges, *getattr(program, "_guards_code", ())]


def _layouts(fresh: ExportedProgram, written: ExportedProgram) -> Iterator[str]:
    """Tensors that only one of both has, or that are of another shape or dtype."""
    mine, theirs = ({**program.state_dict, **program.constants} for program in (fresh, written))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in theirs:
            yield f"{name} is missing"
        elif name not in mine:
            yield f"the model has no {name}"
        elif (layout := _layout(theirs[name])) != _layout(mine[name]):
            yield f"{name} is {layout}, where the model has {_layout(mine[name])}"


def _layout(value: Any) -> str:
    """Dtype and shape, a dynamic size by its name; the type of what is no tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"


def _graphs(program: ExportedProgram) -> Iterator[tuple[str, GraphModule]]:
    for name, part in program.graph_module.named_modules():
        if isinstance(part, GraphModule):
            yield name, part


def _ops(fresh: GraphModule, written: GraphModule) -> list[str]:
    """Ops in the order of the run; behind the first that is another op, every one would be."""
    found, same = [], dict[Node, Node]()
    for mine, theirs in zip_longest(fresh.graph.nodes, written.graph.nodes):
        if mine is None or theirs is None or (mine.op, mine.target) != (theirs.op, theirs.target):
            what, wanted = (_short(_described(node)) for node in (theirs, mine))
            found.append(f"there is {what}, where the model has {wanted}")
            break
        same[mine] = theirs
        found += [f"{mine.name}: {difference}" for difference in _arguments(mine, theirs, same)]
        if _given(mine) != _given(theirs):
            found.append(f"{mine.name}: it is said to give {_given(theirs)}, and gives {_given(mine)}")
    return found


def _described(node: Node | None) -> str:
    if node is None:
        return "nothing"
    return node.name if node.op in ("placeholder", "output") else f"{node.name} ({node.target})"


def _given(node: Node) -> str:
    return ", ".join(map(_layout, tensors_in(node.meta.get("val"))))


def _arguments(mine: Node, theirs: Node, same: Mapping[Node, Node]) -> Iterator[str]:
    if mine.kwargs.keys() != theirs.kwargs.keys() or len(mine.args) != len(theirs.args):
        yield f"it is called with {_short(_call(theirs))}, and not with {_short(_call(mine))}"
        return
    for index, (one, other) in enumerate(zip(mine.args, theirs.args, strict=True)):
        free = op_name(mine) in _PER_TENSOR and index in (_SCALE, _ZERO_POINT)
        if not (_number(mine, index, other) if free else _equal(one, other, same)):
            yield f"argument {index} is {_short(repr(other))}, and not {_short(repr(one))}"
    for name, one in mine.kwargs.items():
        if not _equal(one, theirs.kwargs[name], same):
            yield f"{name} is {_short(repr(theirs.kwargs[name]))}, and not {_short(repr(one))}"


def _call(node: Node) -> str:
    return ", ".join([*map(repr, node.args), *(f"{name}={value!r}" for name, value in node.kwargs.items())])


def _number(mine: Node, index: int, value: Any) -> bool:
    """Whether a scale or zero point is one at all: of the same type, a zero point among the integers."""
    numbers: tuple[Any, ...] = mine.args
    if type(value) is not type(numbers[index]):
        return False
    if index == _SCALE:
        return True
    limits = torch.iinfo(numbers[_DTYPE])
    return bool(limits.min <= value <= limits.max)


def _equal(one: Any, other: Any, same: Mapping[Node, Node]) -> bool:
    """The same argument: of the same type, for 1, 1.0 and True are not."""
    if isinstance(one, Node):
        return same.get(one) is other
    if isinstance(one, list | tuple):
        alike = isinstance(other, list | tuple) and len(one) == len(other)
        return alike and all(_equal(a, b, same) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (one != one and other != other)
    return type(one) is type(other) and bool(one == other)


def _at_odds(fresh: ExportedProgram, written: ExportedProgram) -> list[str]:
    """Ops whose scale or zero point is not that of the value that they read or pass on, of programs with the
    same ops: what is one number in the fresh program is one in any."""
    mine, theirs = (list(program.graph_module.graph.nodes) for program in (fresh, written))
    same = dict(zip(mine, theirs, strict=True))
    found = []
    for node in mine:
        for other in _sharing(node):
            if _numbers(node) == _numbers(other) and _numbers(same[node]) != _numbers(same[other]):
                found.append(f"{node.name} has another scale or zero point than {other.name}")
    return found


def _sharing(node: Node) -> Iterator[Node]:
    """The op in front of it that works with the same scale: it has made the integers that are read, or gave
    the values that were passed on."""
    source = node.args[0] if op_name(node) in _PER_TENSOR else None
    if isinstance(source, Node) and op_name(source) in FOLLOWERS:
        source = source.args[0]
    if isinstance(source, Node) and op_name(source) in _PER_TENSOR:
        yield source


def _numbers(node: Node) -> tuple[Any, ...]:
    return tuple(node.args[_SCALE : _ZERO_POINT + 1])


def _short(text: str, most: int = 120) -> str:
    """One line of it."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
