"""Artifacts on disk, the same bytes for the same content: safetensors tensor by tensor, or a state dict.

The safetensors library writes only what is all in memory at once. This writer knows the layout beforehand,
so each tensor goes to its place as soon as it is folded and can be dropped.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusecli.checkpoint.dtypes import NAMES
from fusecli.checkpoint.header import LENGTH_BYTES, LIMIT
from fusecli.checkpoint.stored import memory_of
from fusecli.checkpoint.trouble import misused

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_ALIGNMENT = 8
_CHUNK = 1 << 30  # some systems refuse larger single writes


def write_safetensors(
    path: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
    final: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Writes every tensor at its own offset, in whatever order they come, then the header.

    `final` gives the metadata that is written, of the same length, once all tensors have come.
    Raises ValueError if the tensors are not exactly those of the layout (a bug of the caller), UsageError
    for what the format cannot hold, OSError from the disk.
    """
    header, offsets = _encode_header(path, layout, metadata)
    pending = dict(offsets)
    with path.open("wb", buffering=0) as file, _Behind() as behind:
        for name, tensor in tensors:
            promised, found = layout.get(name), (tensor.dtype, tuple(tensor.shape))
            if name not in pending or promised != found:
                raise ValueError(f"tensor '{name}': {found} arrived, the layout has {promised}")
            behind.do(_write_tensor, file.fileno(), tensor, pending.pop(name))
        behind.wait()
        if pending:
            raise ValueError(f"tensors never arrived: {sorted(pending)}")
        if final is not None:
            length, (header, _) = len(header), _encode_header(path, layout, final())
            if len(header) != length:
                raise ValueError("the final metadata is not as long as promised")
        _write_at(file.fileno(), memoryview(header), 0)


class _Behind:
    """Does one thing at a time on another thread: the next tensor is folded while this one is written.

    The next thing waits for the one before: two tensors are in memory, not all of them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def do(self, work: Callable[..., None], *args: Any) -> None:
        self.wait()
        self._last = self._pool.submit(work, *args)

    def wait(self) -> None:
        """Raises what the work before has raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _encode_header(path: Path, layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and the place of every tensor from the start of the file.

    Wide dtypes come first, so that every tensor is aligned to its own element size.
    """
    document: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position, places = 0, {}
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        if dtype not in NAMES or name == "__metadata__":
            what = f"safetensors cannot hold the tensor '{name}' ({dtype})"
            raise misused(path, what, "choose output: {format: pt} in the spec")
        places[name], position = position, position + math.prod(shape) * dtype.itemsize
        offsets = [places[name], position]
        document[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LIMIT:
        raise misused(
            path, "too many tensors for a safetensors header", "choose output: {format: pt} in the spec"
        )
    origin = LENGTH_BYTES + len(text)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, {name: origin + place for name, place in places.items()}


def _write_tensor(handle: int, tensor: torch.Tensor, offset: int) -> None:
    """Straight from the tensor's memory: `dense` keeps it alive while the kernel reads it."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    size = dense.numel() * dense.element_size()
    if size:
        memory = (ctypes.c_char * size).from_address(dense.data_ptr())
        _write_at(handle, memoryview(memory).cast("B"), offset)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data[:_CHUNK], offset)
        data, offset = data[written:], offset + written


def write_pt(
    path: Path,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    others: Mapping[str, object] | None = None,
) -> None:
    """Writes a plain state dict in the given order, `others` last; `metadata` goes where torch keeps module
    versions.

    Tied tensors stay tied, and a view of a larger tensor takes only its own bytes along.
    """
    compact: dict[tuple[object, ...], torch.Tensor] = {}
    result: OrderedDict[str, object] = OrderedDict()
    for name, tensor in state.items():
        memory = memory_of(tensor) if tensor.numel() else (name,)
        if memory not in compact:
            compact[memory] = _own(tensor)
        result[name] = compact[memory]
    result.update(others or {})
    result._metadata = dict(sorted(metadata.items()))  # type: ignore[attr-defined]
    with _Sink(path, "w") as sink:
        try:
            # A file object, not a path: torch would put the file's name into the archive.
            torch.save(result, sink)
        except RuntimeError:
            # torch hides a failed write behind an error of its own.
            if sink.failure:
                raise sink.failure from None
            raise


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is a view of something larger: torch.save writes whole storages."""
    needed = tensor.numel() * tensor.element_size()
    return tensor.detach() if tensor.untyped_storage().nbytes() == needed else tensor.detach().clone()


class _Sink(FileIO):
    """A file that takes every write whole, and remembers why one failed."""

    failure: OSError | None = None

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self.failure = error
            raise
        return memoryview(data).nbytes
