"""What is fused, on disk or in memory: its tensors, the code that gives them a structure, and how it is read.

A Source is made by fusecli.source.resolve, and not changed after that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fusecli.artifact import lent, load_strictly, loaded, parameter_names, tie, ties_of, without_numbers
from fusecli.checkpoint import Checkpoint, StoredTensor
from fusecli.engine import Vocabulary, bake_tree, separate
from fusecli.errors import Problem, RefusedError, UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate, with_tensors
from fusecli.graph.memory import same_memory
from fusecli.graph.undrawn import Undrawn
from fusecli.outcome import LedgerEntry
from fusecli.plain import some
from fusecli.rewrite import ModuleTree
from fusecli.source.adapter import Adapter, attach_adapter
from fusecli.source.learned_scales import Trained
from fusecli.source.reading import Reading

_LARGE = 256 * 2**20  # bytes; what is larger is not copied to be recorded


@dataclass(frozen=True)
class Structure:
    """The model that is planned on.

    model     without numbers where it is read from a file; its computed layers are plain, shared ones apart
    computed  the layers that are plain there as they are stored: a fold starts from those
    original  what the model in memory is, with those layers as they are; None: it is read from a file
    """

    model: nn.Module
    computed: Mapping[str, nn.Module] = field(default_factory=dict)
    original: nn.Module | None = None

    @cached_property
    def tree(self) -> ModuleTree:
        return ModuleTree(self.model)

    @cached_property
    def original_tree(self) -> ModuleTree:
        return self.tree if self.original is None else ModuleTree(self.original)

    @property
    def names(self) -> list[str]:
        """Every name of every module but the model itself."""
        return [path for path in self.tree.modules if path]


@dataclass(frozen=True)
class Source:
    """What is fused: `build` makes a fresh model of the user's class; None: only the tensors are at hand.

    unshared  modules that share their tensors in that class, and are given a copy of their own
    bakes     layers whose weight is computed, and that are made plain, with the rule that does it
    unbakeable  layers that stay computed, and why the model does not run with plain ones
    adapter   what is added to the model of that class, before anything is made of it
    trained   what quantization-aware training had made of the checkpoint, before it was read as a float one
    reading   how the model reads the checkpoint; None: by the names that it has
    """

    checkpoint: Checkpoint
    build: Callable[[], nn.Module] | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    ledger: tuple[LedgerEntry, ...] = ()
    unshared: tuple[str, ...] = ()
    bakes: Mapping[str, str] = field(default_factory=dict)
    unbakeable: Mapping[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    trained: Trained | None = None
    reading: Reading | None = None

    def structure(self) -> Structure:
        """The model on the meta device with the stored shapes and dtypes: structure without numbers.

        Raises UsageError where the checkpoint does not belong to the model.
        """
        whole = self.reading is not None and self.reading.whole
        model = self.original() if whole else self._prepared(self.blank())
        ties = ties_of(model)  # moving a module makes a parameter of each of its names
        tie(model.to("meta"), ties)
        if not whole:
            self._give_shapes(model)
        model.eval()  # by itself: a class may have a train() that returns nothing
        return plain(model, self.bakes)

    def _give_shapes(self, model: nn.Module) -> None:
        stored = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self.tensors.items()
        }
        load_strictly(model, {**stored, **self.checkpoint.others}, str(self.checkpoint.path))

    def blank(self) -> nn.Module:
        """A fresh model, on the meta device where its code allows that."""
        assert self.build is not None
        try:
            with torch.device("meta"), Undrawn():
                return self.build()
        except UsageError:
            return self.build()  # a factory that computes with its weights cannot be built without numbers

    @property
    def names(self) -> Collection[str]:
        """What a state dict of the model holds."""
        return self.blank().state_dict().keys() if self.reading is None else self.reading.names

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Those of the checkpoint and of the adapter, by their names in the model that has both."""
        if self.adapter is None:
            return self.checkpoint.tensors
        return {**self.checkpoint.tensors, **self.adapter.tensors}

    def _prepared(self, model: nn.Module) -> nn.Module:
        separate(ModuleTree(model), self.unshared)
        if self.adapter is not None:
            attach_adapter(model, self.adapter)
        return model

    def original(self, *, lend: bool = False) -> nn.Module:
        """A fresh model with the checkpoint's tensors, in eval mode.

        With `lend` parameters are the file's own memory, as long as it is open: nobody may write to them."""
        assert self.build is not None
        build = self.build
        if lend and (model := lent(lambda: self._loaded(without_numbers(build), lend=True))) is not None:
            return model
        return self._loaded(build())

    def _loaded(self, model: nn.Module, *, lend: bool = False) -> nn.Module:
        self._prepared(model)
        state = loaded(self._as_stored(), parameter_names(model) if lend else ())
        # As users load it: what shares memory has the numbers that are copied last.
        joined = {name for names in same_memory(model) for name in names}
        load_strictly(model, state, str(self.checkpoint.path), joined)
        model.eval()
        return model

    def _as_stored(self) -> Checkpoint:
        """The checkpoint and the adapter as they are loaded, by users too."""
        stored = self.checkpoint
        if self.reading is not None and self.reading.as_stored is not self.reading.checkpoint:
            stored = self.reading.as_stored
        added = self.adapter.tensors if self.adapter is not None else {}
        return replace(stored, tensors={**stored.tensors, **added})

    def runnable(self, structure: Structure) -> nn.Module:
        """A fresh model like `structure`, to be run: its computed weights are rounded."""
        model = self.original(lend=self._is_large)
        bake_tree(ModuleTree(model), self.bakes)
        return model

    @property
    def _is_large(self) -> bool:
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values()) > _LARGE

    def require_unwritten(self, recording: Recording) -> None:
        """Guard for a model that is run on the file's own memory: raises RefusedError where forward has
        written to it."""
        written = sorted(recording.written & self.checkpoint.tensors.keys()) if self._is_large else ()
        if written:
            what = f"forward writes to {some(written)}, and the model is too large to be copied for each run"
            raise RefusedError(
                Problem(what, str(self.checkpoint.path), "let forward leave its parameters alone")
            )

    @cached_property
    def _built(self) -> dict[str, nn.Module]:
        """Modules of a fresh model by path, for the tensors that no checkpoint holds."""
        assert self.build is not None
        return dict(self.build().named_modules(remove_duplicate=False))

    def member(self, path: str, structure: Structure) -> nn.Module:
        """The module at `path` with its stored tensors, a computed weight still to be computed."""
        added = self.adapter.tensors if self.adapter is not None else {}

        def fetch(name: str, old: Tensor) -> Tensor:
            key = f"{path}.{name}"
            stored = self.checkpoint.tensors.get(key) or added.get(key)
            if stored is not None:
                return stored.load()
            if not old.is_meta or self.build is None:
                return old
            owner, _, attribute = name.rpartition(".")
            return _tensor_of(self._built[path].get_submodule(owner), attribute)

        return with_tensors(structure.computed.get(path) or structure.tree[path], fetch)


def _tensor_of(module: nn.Module, name: str) -> Tensor:
    tensor = module._buffers.get(name)
    tensor = module._parameters[name] if tensor is None else tensor
    assert tensor is not None
    return tensor.detach()


def plain(model: nn.Module, bakes: Mapping[str, str]) -> Structure:
    """`model` with these layers made plain, and what they were."""
    tree = ModuleTree(model)
    computed = {path: with_tensors(tree[path], lambda _, old: old) for path in bakes}
    bake_tree(tree, bakes)
    return Structure(model, computed)


@dataclass(frozen=True)
class InMemory(Source):
    """A model that somebody has in memory; it is not changed."""

    model: nn.Module = field(default_factory=nn.Module)

    def structure(self) -> Structure:
        """The model itself, or a copy in which what is unshared has a copy of its own and what is computed is
        plain, its weights rounded: enough to plan on and to record."""
        original = self.model
        if self.unshared:
            original = duplicate(original)
            separate(ModuleTree(original), self.unshared)
        if not self.bakes:
            return Structure(original, original=original)
        twin = duplicate(original)
        twin.eval()  # by itself: a class may have a train() that returns nothing
        bake_tree(ModuleTree(twin), self.bakes)
        tree = ModuleTree(original)
        return Structure(twin, {path: tree[path] for path in self.bakes}, original)

    def runnable(self, structure: Structure) -> nn.Module:
        return duplicate(structure.model)

    def require_unwritten(self, recording: Recording) -> None:
        """Each run has a copy."""

    def member(self, path: str, structure: Structure) -> nn.Module:
        return structure.original_tree[path]
