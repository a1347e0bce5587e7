"""Safetensors files, one or a folder of shards, mapped into memory tensor by tensor."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from fusecli.checkpoint.header import LIMIT, Entry, parse_json, read_header
from fusecli.checkpoint.stored import StoredTensor
from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, unreadable


@dataclass(frozen=True)
class Mapped:
    """The tensors of one file or of all shards, the metadata, and every file that was opened."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    files: tuple[Path, ...]


def map_safetensors(path: Path) -> Mapped:
    """The file's tensors, none of them read yet."""
    header = read_header(path)
    with path.open("rb") as file:
        # Copy-on-write: torch asks for writable memory, and a stray write must not reach the file.
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {
        name: StoredTensor(
            name, entry.dtype, entry.shape, partial(_view, view, entry), partial(_drop, view, entry)
        )
        for name, entry in header.entries.items()
    }
    return Mapped(tensors, header.metadata, (path,))


def _view(view: mmap.mmap, entry: Entry) -> torch.Tensor:
    """The tensor over the map itself; it keeps the map alive, so closing a checkpoint never unmaps it."""
    count = (entry.stop - entry.start) // entry.dtype.itemsize
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.start % entry.dtype.itemsize == 0:
        return torch.frombuffer(view, dtype=entry.dtype, count=count, offset=entry.start).reshape(entry.shape)
    # Old writers did not pad the header: such tensors lie askew, and kernels need them aligned.
    raw = torch.frombuffer(view, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
    return raw.clone().view(entry.dtype).reshape(entry.shape)


def _drop(view: mmap.mmap, entry: Entry) -> None:
    """Lets the tensor's pages go: without it a whole checkpoint would stay in memory once it was read."""
    first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = entry.stop - first
    if length > 0 and hasattr(view, "madvise"):
        view.madvise(mmap.MADV_DONTNEED, first, length)


def map_shards(path: Path) -> Mapped:
    """The tensors of all shards that an index file (model.safetensors.index.json) lists."""
    if path.stat().st_size > LIMIT:
        raise unreadable(path, "the JSON file is too large for a shard index", DOWNLOAD_AGAIN)
    weights = parse_json(path, path.read_bytes(), "JSON file").get("weight_map")
    if not (isinstance(weights, dict) and weights and all(isinstance(v, str) for v in weights.values())):
        fix = "give a checkpoint, or a *.safetensors.index.json with its 'weight_map'"
        raise unreadable(path, "is a JSON file, not a checkpoint", fix)
    shards = {name: map_safetensors(_shard(path, name)) for name in sorted(set(weights.values()))}
    tensors = {}
    for name, shard in weights.items():
        if name not in shards[shard].tensors:
            raise unreadable(path, f"shard '{shard}' does not hold the tensor '{name}'", DOWNLOAD_AGAIN)
        tensors[name] = shards[shard].tensors[name]
    return Mapped(tensors, {}, (path, *(file for shard in shards.values() for file in shard.files)))


def _shard(index: Path, name: str) -> Path:
    """The shard's path, if it is a file inside the index's own folder, links followed."""
    parts = PurePosixPath(name)
    folder = index.parent.resolve()
    shard = index.parent / name
    inside = shard.resolve().is_relative_to(folder) if "\0" not in name else False
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not inside:
        fix = "keep the shards beside their index, as files and not as links to elsewhere"
        raise unreadable(index, f"shard '{name}' lies outside the folder of the index", fix)
    if not shard.is_file():
        raise unreadable(index, f"shard '{name}' is missing", "fetch all shards into the folder of the index")
    return shard
