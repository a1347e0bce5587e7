"""A pickle read as data: which globals it names and which storages it points to. Nothing is executed.

The scan only explains (what was refused, which device, is the file complete); the guard is torch's own
weights_only unpickler, so a pickle that confuses the scan gains nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

_MARK = object()
_UNKNOWN = object()
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX"}
# torch's storage classes say so themselves, but warn whoever asks that they are deprecated.
_ITEMSIZES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    "ComplexDouble": 16,
}
_MODULE_FIELDS = {"_parameters", "_buffers", "_modules"}


@dataclass(frozen=True)
class Global:
    """A class or function that unpickling would import; `called` once it would be called as well."""

    path: str
    called: bool = False


@dataclass(frozen=True)
class Block:
    """One storage: its key, the device it was saved from, and its size where the type is known."""

    key: str
    location: str
    nbytes: int


@dataclass
class Scan:
    """What one or more pickles in a row say; `root` is the last one's outermost object, where known."""

    globals: dict[str, None] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    module_fields: set[str] = field(default_factory=set)
    root: object = None

    @property
    def holds_module(self) -> bool:
        return self.module_fields == _MODULE_FIELDS

    @property
    def root_class(self) -> str:
        """The class of the outermost object, if it is an instance of some class."""
        return self.root.path if isinstance(self.root, Global) and self.root.called else ""


def scan_pickle(stream: IO[bytes] | bytes, scan: Scan) -> None:
    """Adds one pickle, up to its STOP, to the scan; ValueError if it is no pickle or cut off."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        try:
            _step(opcode, argument, stack, memo, scan)
        except (IndexError, TypeError):
            raise ValueError("the pickle's stack does not add up") from None


def _step(
    opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], memo: dict[int, Any], scan: Scan
) -> None:
    name = opcode.name
    if name in _PUTS or name == "MEMOIZE":
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in _GETS:
        stack.append(memo.get(argument, _UNKNOWN))
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "STOP":
        scan.root = stack[-1]
    elif name in _FILLS:
        _take(opcode, stack)
    else:
        taken = _take(opcode, stack)
        stack.extend(_pushed(opcode, argument, taken, scan))


def _take(opcode: pickletools.OpcodeInfo, stack: list[Any]) -> list[Any]:
    """Pops what the opcode consumes; an opcode that fills a container leaves the container."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        start = len(stack) - 1 - stack[::-1].index(_MARK) if stack[-1] is not _MARK else len(stack) - 1
        taken = stack[start + 1 :]
    else:
        start = len(stack) - len(before) + (opcode.name in _FILLS)
        taken = stack[start:]
    if start < 0:
        raise IndexError("stack underflow")
    del stack[start:]
    return taken


def _pushed(opcode: pickletools.OpcodeInfo, argument: Any, taken: list[Any], scan: Scan) -> Iterator[object]:
    name = opcode.name
    if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
        path = ".".join(str(part) for part in taken) if name == "STACK_GLOBAL" else argument.replace(" ", ".")
        yield _named(path.replace("__builtin__.", "builtins."), name == "INST", scan)
    elif name in _CALLS and isinstance(taken[0], Global):
        yield Global(taken[0].path, called=True)
    elif name == "BINPERSID":
        _note_block(taken[0], scan)
        yield _UNKNOWN
    elif "TUPLE" in name:
        yield tuple(taken)
    elif not opcode.stack_before and isinstance(argument, (str, int)):
        if argument in _MODULE_FIELDS:
            scan.module_fields.add(str(argument))
        yield argument
    else:
        yield from [_UNKNOWN] * len(opcode.stack_after)


def _named(path: str, called: bool, scan: Scan) -> Global:
    scan.globals[path] = None
    return Global(path, called)


def _note_block(saved_id: Any, scan: Scan) -> None:
    """A persistent id of torch: ("storage", type, key, location, element count, ...)."""
    if not (isinstance(saved_id, tuple) and len(saved_id) >= 5 and saved_id[0] == "storage"):
        return
    _, kind, key, location, count = saved_id[:5]
    if isinstance(kind, Global) and isinstance(count, int):
        scan.blocks[str(key)] = Block(str(key), str(location), count * _itemsize(kind.path))


def _itemsize(path: str) -> int:
    """Bytes per element of a storage class such as torch.FloatStorage; untyped ones count bytes."""
    return _ITEMSIZES.get(path.rpartition(".")[2].removesuffix("Storage"), 1)
