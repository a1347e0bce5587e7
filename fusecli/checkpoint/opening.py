"""A checkpoint, whatever its format: opened safely, its tensors by name and read only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fusecli.checkpoint.digest import sha256_file
from fusecli.checkpoint.extra_state import EXTRA_STATE
from fusecli.checkpoint.header import parse_json
from fusecli.checkpoint.mapped import map_safetensors, map_shards
from fusecli.checkpoint.nesting import Choice, choose_state
from fusecli.checkpoint.pickled import load_pickled
from fusecli.checkpoint.prefixes import Renaming, strip_prefixes
from fusecli.checkpoint.sniff import Kind, sniff
from fusecli.checkpoint.stored import StoredTensor, find_ties, store
from fusecli.checkpoint.trouble import misused, unreadable
from fusecli.consent import Consent

MANIFEST = "fusecli"
AVERAGED = "n_averaged"  # how many models torch.optim.swa_utils.AveragedModel has averaged
Kept = TypeVar("Kept")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file and everything that was found out while opening it.

    nesting   the key under which the state dict stood in the file; None: at the top
    prefixes  wrapper prefixes that were taken off the names
    others    entries of the state dict that are no tensors (extra state)
    ties      names that are the very same memory
    metadata  what the file says of itself; under "fusecli" the manifest of an artifact
    versions  of which version the tensors of each module are, for the code that loads them
    module    the whole pickled module (only with allow_pickle); `tensors` share its memory
    files     every file that was opened: the path itself and, for an index, its shards
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    others: Mapping[str, object] = field(default_factory=dict)
    nesting: str | None = None
    prefixes: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    module: nn.Module | None = None

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """This checkpoint with other names: a model may have what looked like a wrapper's prefix."""
        return replace(
            self,
            tensors=_renamed(self.tensors, names),
            others={names.get(name, name): value for name, value in self.others.items()},
            ties=tuple(tuple(names[name] for name in tie) for tie in self.ties),
            versions=_versions(self.versions, names),
        )

    @cached_property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def _digest(self) -> str:
        if len(self.files) == 1:
            return sha256_file(self.path)
        return hashlib.sha256("".join(sha256_file(file) for file in self.files).encode()).hexdigest()

    def sha256(self) -> str:
        """The file's hex sha256; of a sharded checkpoint the sha256 of the digests of index and shards."""
        return self._digest

    @contextmanager
    def hashing(self) -> Iterator[Callable[[], str]]:
        """Takes the digest on another core while the block works; yields how to wait for it."""
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(self.sha256).result

    def close(self) -> None:
        """Forgets the tensors. Those loaded before stay valid; the file is unmapped with the last of them."""
        object.__setattr__(self, "tensors", {})
        object.__setattr__(self, "module", None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    key: str | None = None,
    strip_prefix: Sequence[str] = (),
    consent: Consent | None = None,
) -> Checkpoint:
    """The checkpoint in the file, whose format its content decides.

    key            dotted key of the state dict inside a training checkpoint
    strip_prefix   prefixes to take off the names besides the known ones
    allow_pickle   consent to run code that a pickle names
    consent        where that code may be found, besides what is installed

    Raises UnsafeError for a file that is unsafe or unreadable, UsageError for a path, key or prefix that
    does not fit.
    """
    path = Path(path)
    kind = sniff(path)
    if kind in (Kind.SAFETENSORS, Kind.SHARDS):
        return _open_mapped(path, kind, key, strip_prefix)
    loaded = load_pickled(path, kind, allow_pickle, consent)
    choice = choose_state(path, loaded.root, key)
    return _open_state(path, kind, replace(choice, notices=loaded.notices + choice.notices), strip_prefix)


def _open_mapped(path: Path, kind: Kind, key: str | None, strip_prefix: Sequence[str]) -> Checkpoint:
    if key is not None:
        raise misused(path, f"a safetensors file has no key '{key}' to open", "leave out checkpoint.key")
    mapped = map_safetensors(path) if kind is Kind.SAFETENSORS else map_shards(path)
    final = MANIFEST in mapped.metadata
    found, average = (dict(mapped.tensors), ()) if final else _averaged(mapped.tensors)
    renaming = _rename(path, found, found, strip_prefix, final)
    tensors = _renamed(found, renaming.names)
    return Checkpoint(
        path=path,
        format=kind.value,
        tensors=tensors,
        files=mapped.files,
        prefixes=renaming.prefixes,
        notices=(*average, *_remarks(tensors, renaming)),
        others=_extra_state(path, mapped.metadata),
        metadata=mapped.metadata,
    )


def _open_state(path: Path, kind: Kind, choice: Choice, strip_prefix: Sequence[str]) -> Checkpoint:
    module = _unwrapped(choice.state) if isinstance(choice.state, nn.Module) else None
    state = module.state_dict() if module is not None else choice.state
    assert isinstance(state, Mapping)
    found = {name: value for name, value in state.items() if _is_tensor(value)}
    _refuse_names(path, found)
    final = module is not None or bool(_manifest(state))
    found, average = (found, ()) if final else _averaged(found)
    kept = {name: value for name, value in state.items() if name in found or not _is_tensor(value)}
    renaming = _rename(path, kept, found, strip_prefix, final)
    tensors = _renamed({name: store(name, value, path) for name, value in found.items()}, renaming.names)
    return Checkpoint(
        path=path,
        format=kind.value if module is None else f"pickled module ({kind.value.split()[0]})",
        tensors=tensors,
        files=(path,),
        others={renaming.names[name]: value for name, value in kept.items() if name not in found},
        nesting=choice.key,
        prefixes=renaming.prefixes,
        notices=(*choice.notices, *average, *_remarks(tensors, renaming), *_mode(module)),
        ties=find_ties({renaming.names[name]: value for name, value in found.items()}),
        metadata=_manifest(state),
        versions=_versions(_versions_in(state), renaming.names),
        module=module,
    )


def _rename(
    path: Path, state: Mapping[str, Any], found: Mapping[str, Any], extra: Sequence[str], final: bool
) -> Renaming:
    """Tensors decide which prefixes there are; the other entries follow where they carry them.

    `final`: a module or an artifact, whose names are the model's own, whatever they look like.
    """
    if final:
        return Renaming({name: name for name in state}, ())
    return strip_prefixes(path, found, extra, [name for name in state if name not in found])


def _renamed(tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> dict[str, StoredTensor]:
    return {names[key]: replace(tensors[key], name=names[key]) for key in tensors}


def _versions(versions: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The versions of modules, by the paths that they have where tensors are named like this."""
    found = {}
    for key, name in names.items():
        # From the last part on, the modules around a tensor are the same ones.
        old, new = key.split(".")[:-1], name.split(".")[:-1]
        while old and new:
            found[".".join(new)] = versions.get(".".join(old), {})
            if old.pop() != new.pop():
                break
    found.setdefault("", versions.get("", {}))
    return {path: version for path, version in found.items() if version}


def _versions_in(state: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = getattr(state, "_metadata", None)
    if not isinstance(metadata, Mapping) or MANIFEST in metadata:
        return {}
    return {path: version for path, version in metadata.items() if isinstance(version, Mapping)}


def _extra_state(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """What an artifact holds beside its tensors; other files have metadata of their own."""
    if MANIFEST not in metadata or EXTRA_STATE not in metadata:
        return {}
    return parse_json(path, metadata[EXTRA_STATE].encode(), "extra state")


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _averaged(tensors: Mapping[str, Kept]) -> tuple[dict[str, Kept], tuple[str, ...]]:
    """The tensors without the counter that torch.optim.swa_utils.AveragedModel keeps beside its module, and a
    remark on it."""
    found = dict(tensors)
    if AVERAGED not in found or not all(name == AVERAGED or name.startswith("module.") for name in found):
        return found, ()
    del found[AVERAGED]
    return found, (f"an AveragedModel was saved: its average is read, {AVERAGED} is left out",)


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, _WRAPPERS):
        module = cast(nn.Module, module.module)
    return module


def _refuse_names(path: Path, names: Mapping[str, object]) -> None:
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise unreadable(path, f"the tensor name {name!r} is no valid text", "rename it and save again")


def _remarks(tensors: Mapping[str, StoredTensor], renaming: Renaming) -> tuple[str, ...]:
    remarks = [f"the prefix '{prefix}' was taken off the names" for prefix in renaming.prefixes]
    counters = [t for n, t in tensors.items() if n.rpartition(".")[2] == "num_batches_tracked"]
    if floats := sum(counter.dtype.is_floating_point for counter in counters):
        remarks.append(f"num_batches_tracked is a float in {floats} places; it plays no part in inference")
    return tuple(remarks)


def _mode(module: nn.Module | None) -> tuple[str, ...]:
    trained = [part for part in module.modules() if part.training] if module is not None else []
    return (f"the module was saved in train mode ({len(trained)} of its modules)",) if trained else ()


def _manifest(state: Mapping[str, Any]) -> dict[str, str]:
    """Our own writer's entry in the state dict's `_metadata`, which torch keeps for module versions."""
    metadata = getattr(state, "_metadata", None)
    manifest = metadata.get(MANIFEST) if isinstance(metadata, Mapping) else None
    return {MANIFEST: manifest} if isinstance(manifest, str) else {}
