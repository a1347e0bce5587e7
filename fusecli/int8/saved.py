"""A converted graph as a .pt2 file of torch.export, and back."""

from __future__ import annotations

import io
import operator
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fusecli.errors import Problem, UnsafeError, UsageError
from fusecli.int8.export import named, program
from fusecli.int8.ops import op_name
from fusecli.int8.quantize import Quantized
from fusecli.int8.torchao import quiet, register_ops

# All that a graph needs to run. What else torch keeps with a node are stack traces, with paths of the
# machine, and addresses of objects, with which no two files would be the same.
KEPT = ("val",)


def save(quantized: Quantized, path: Path) -> None:
    """Writes the converted graph as .pt2; the same graph gives the same bytes."""
    path.write_bytes(archive(quantized))


def archive(quantized: Quantized, extra: Mapping[str, str] | None = None) -> bytes:
    """The .pt2 file in memory: without example inputs, deflated, and alike whatever its name will be.

    extra: more files in it, by name; torch.export.load gives them back as its `extra_files`.
    """
    exported = quantized.plan.exported
    graph = program(quantized.model, exported.sample, batched=exported.batched)
    for module in graph.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta = {key: node.meta[key] for key in KEPT if key in node.meta}
    graph.example_inputs = None
    held = io.BytesIO()
    with quiet():
        torch.export.save(graph, held, extra_files=dict(extra or {}))
    return deflated(held)


def deflated(archive: io.BytesIO) -> bytes:
    """The same archive, compressed: torch stores its JSON as it is, which in small layers is most of it."""
    held = io.BytesIO()
    with zipfile.ZipFile(archive) as stored, zipfile.ZipFile(held, "w") as smaller:
        for entry in stored.infolist():
            record = zipfile.ZipInfo(entry.filename)  # dated 1980, as torch does it
            smaller.writestr(record, stored.read(entry), zipfile.ZIP_DEFLATED)
    return held.getvalue()


def calls(module: GraphModule) -> list[Node]:
    """The ops of a graph in order, but those that ask for sizes: saving puts these in another place.

    Nor what nobody reads of an op with several results, as of a norm: saving adds that.
    """
    ops = [node for node in module.graph.nodes if node.op == "call_function"]
    return [
        node
        for node in ops
        if op_name(node) != "aten.sym_size" and (node.users or node.target is not operator.getitem)
    ]


def load(path: Path, names: Sequence[str] = ()) -> GraphModule:
    """The saved graph as a module that is called like the model; torchao is not needed to run it.

    names: those of the `calls` of the graph that was saved, which torch does not keep. Raises UnsafeError
    where torch cannot load the file, UsageError where these are not its names.
    """
    return module_of(read(path), names, str(path))


def read(path: Path) -> ExportedProgram:
    """The program in a .pt2 file; raises UnsafeError where torch cannot load it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnsafeError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    return program_in(data, str(path))


def program_in(data: bytes, where: str = "") -> ExportedProgram:
    """The program in the bytes of a .pt2 file; raises UnsafeError where torch cannot load it."""
    register_ops()
    try:
        with quiet():
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # whatever torch raises for what somebody has put into a file
        raise _unreadable(error, where) from None


def module_of(exported: ExportedProgram, names: Sequence[str] = (), where: str = "") -> GraphModule:
    """The program as a module that is called like the model; names and errors are those of `load`."""
    try:
        with quiet():
            module = exported.module()
    except Exception as error:  # its graph may name what it does not have
        raise _unreadable(error, where) from None
    assert isinstance(module, GraphModule)
    return renamed(module, names, where) if names else module


def _unreadable(error: Exception, where: str) -> UnsafeError:
    said = str(error).partition("\n")[0] or type(error).__name__
    return UnsafeError(Problem(f"this is no .pt2 file that torch can load: {said}", where))


def renamed(module: GraphModule, names: Sequence[str], where: str) -> GraphModule:
    found, wanted = calls(module), [name for name in names if not name.startswith("sym_size")]
    if len(found) != len(wanted):
        raise UsageError(
            Problem(f"it has {len(found)} ops, and {len(wanted)} names are given for them", where)
        )
    return named(module, dict(zip(found, wanted, strict=True)))
