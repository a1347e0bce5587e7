"""A checkpoint and the code or the stand-ins that give its tensors a structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusecli import rules
from fusecli.artifact import lent, load_strictly, loaded, parameter_names, tie, ties_of, without_numbers
from fusecli.blame import code_failed
from fusecli.checkpoint import Checkpoint, StoredTensor
from fusecli.consent import Consent, load_class, load_object
from fusecli.engine import CustomFuser, Group, Vocabulary, bake_tree, separate
from fusecli.errors import Problem, RefusedError, UsageError
from fusecli.graph.materialise import duplicate, with_tensors
from fusecli.graph.memory import same_memory
from fusecli.graph.record import Run
from fusecli.graph.stand_in import Hints, Unknown, rank_of, stand_in
from fusecli.jobs.adapter import Adapter, dress, open_adapter, require_known
from fusecli.jobs.learned_scales import Trained
from fusecli.jobs.reading import Reading, read_for
from fusecli.outcome import LedgerEntry
from fusecli.plain import some
from fusecli.rewrite import MANIFEST_KEY, ModuleTree, plant
from fusecli.spec import Spec
from fusecli.spec.groups import GroupSpec
from fusecli.spec.wildcards import bind_groups

_LARGE = 256 * 2**20  # bytes; what is larger is not copied to be recorded
_BUILT = "_fusecli_built"  # on a model that a factory has made


@dataclass
class Source:
    """What is fused: `build` makes a fresh model of the user's class; None: only the tensors are at hand.

    owns   modules that share their tensors in that class, and are given a copy of their own
    bakes  layers whose weight is computed, and that are made plain, with the rule that does it
    unbakeable  layers that stay computed, and why the model does not run with plain ones
    adapter  what is added to the model of that class, before anything is made of it
    trained  what quantization-aware training had made of the checkpoint, before it was read as a float one
    reading  how the model reads the checkpoint; None: by the names that it has
    """

    checkpoint: Checkpoint
    build: Callable[[], nn.Module] | None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    ledger: list[LedgerEntry] = field(default_factory=list)
    owns: list[str] = field(default_factory=list)
    bakes: dict[str, str] = field(default_factory=dict)
    unbakeable: dict[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    trained: Trained | None = None
    reading: Reading | None = None
    _computed: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def skeleton(self) -> nn.Module:
        """The model on the meta device with the stored shapes and dtypes: structure without numbers.

        Raises UsageError where the checkpoint does not belong to the model.
        """
        if self.reading is not None and self.reading.whole:
            model = self.original()
        else:
            model = self.blank()
            self._prepare(model)
        ties = ties_of(model)  # moving a module makes a parameter of each of its names
        tie(model.to("meta"), ties)
        if self.reading is None or not self.reading.whole:
            self._give_shapes(model)
        model.eval()  # by itself: a class may have a train() that returns nothing
        self.bake(model)
        return model

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
            with torch.device("meta"):
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

    def bake(self, model: nn.Module) -> None:
        """Makes the layers of `bakes` plain, and keeps them as they are: a fold starts from what is
        stored."""
        tree = ModuleTree(model)
        self._computed = {path: with_tensors(tree[path], lambda _, old: old) for path in self.bakes}
        bake_tree(tree, self.bakes)

    def _prepare(self, model: nn.Module) -> None:
        if self.owns:
            separate(ModuleTree(model), self.owns)
        if self.adapter is not None:
            dress(model, self.adapter)

    def original(self, *, lend: bool = False) -> nn.Module:
        """A fresh model with the checkpoint's tensors, in eval mode.

        With `lend` parameters are the file's own memory, as long as it is open: nobody may write to them."""
        assert self.build is not None
        build = self.build
        if lend and (model := lent(lambda: self._loaded(without_numbers(build), lend=True))) is not None:
            return model
        return self._loaded(build())

    def _loaded(self, model: nn.Module, *, lend: bool = False) -> nn.Module:
        self._prepare(model)
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

    def runnable(self) -> nn.Module:
        """The original with the structure of the skeleton, to be run: its computed weights are rounded."""
        model = self.original(lend=self._is_large)
        bake_tree(ModuleTree(model), self.bakes)
        return model

    @property
    def _is_large(self) -> bool:
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values()) > _LARGE

    def require_unwritten(self, run: Run) -> None:
        """Guard for a model that is run on the file's own memory: raises RefusedError where forward has
        written to it."""
        try:
            written = sorted(run.recording.written & self.checkpoint.tensors.keys()) if self._is_large else ()
        except UsageError:  # it does not run
            return
        if written:
            what = f"forward writes to {some(written)}, and the model is too large to be copied for each run"
            raise RefusedError(
                Problem(what, str(self.checkpoint.path), "let forward leave its parameters alone")
            )

    @cached_property
    def built(self) -> dict[str, nn.Module]:
        """Modules of a fresh model by path, for the tensors that no checkpoint holds."""
        assert self.build is not None
        return dict(self.build().named_modules(remove_duplicate=False))

    def member(self, path: str, skeleton: nn.Module) -> nn.Module:
        """The module at `path` with its tensors from the checkpoint, a computed weight still to be computed;
        `skeleton` is the meta model's."""

        def fetch(name: str, old: Tensor) -> Tensor:
            key = f"{path}.{name}"
            stored = self.checkpoint.tensors.get(key)
            if stored is None and self.adapter is not None:
                stored = self.adapter.tensors.get(key)
            if stored is not None:
                return stored.load()
            if not old.is_meta or self.build is None:
                return old
            return self.built[path].get_buffer(name) if "." not in name else _deep(self.built[path], name)

        return with_tensors(self._computed.get(path, skeleton), fetch)


def _deep(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = owner._buffers.get(attribute)
    tensor = owner._parameters[attribute] if tensor is None else tensor
    assert tensor is not None
    return tensor.detach()


def source_of(checkpoint: Checkpoint, spec: Spec, consent: Consent) -> Source:
    """The checkpoint with the adapter and the code that the spec names; raises UnsafeError where nobody
    allowed that code."""
    source = _source_of(checkpoint, spec, consent)
    if spec.adapter is not None:
        source.adapter = open_adapter(spec.adapter, spec.folder, spec.where(("adapter",)))
        source.ledger.append(source.adapter.entry)
    return source


def _source_of(checkpoint: Checkpoint, spec: Spec, consent: Consent) -> Source:
    build = _factory(spec, consent)
    if build is None and checkpoint.module is not None:
        module = checkpoint.module
        ledger = _train_mode(module) if spec.mode == "folded" else []
        return Source(checkpoint, lambda: duplicate(module), vocabulary_of(spec, consent), ledger)
    source = Source(checkpoint, build, vocabulary_of(spec, consent))
    if build is not None and MANIFEST_KEY not in checkpoint.metadata:
        source.reading = read_for(checkpoint, source.blank(), build)
        source.checkpoint = source.reading.checkpoint
    return source


def _train_mode(module: nn.Module) -> list[LedgerEntry]:
    training = [path or "(the model)" for path, part in module.named_modules() if part.training]
    if not training:
        return []
    return [
        LedgerEntry("train-mode", training[0], f"{len(training)} modules were in train mode; set to eval")
    ]


def vocabulary_of(spec: Spec, consent: Consent) -> Vocabulary:
    """The spec's extra mappings with their classes and functions imported."""
    folder = spec.folder
    fusers, treat = [], {}
    for extra in spec.extra_mappings:
        if extra.fuser is not None:
            classes = tuple(load_class(name, consent, folder) for name in extra.sequence or ())
            fusers.append(CustomFuser(classes, extra.fuser, load_object(extra.fuser, consent, folder)))
        else:
            treat[load_class(extra.treat or "", consent, folder)] = load_class(
                extra.as_ or "", consent, folder
            )
    return Vocabulary(
        tuple(fusers),
        treat,
        _chosen_rules(spec),
        spec.allow_restructure,
        spec.shared == "clone",
        spec.mode,
        spec.verify.assume_same_path,
    )


def _chosen_rules(spec: Spec) -> frozenset[str] | None:
    """The names of the rules that may be used; raises UsageError for one that is not there."""
    known = rules.names()
    for key, listed in (("rules", spec.rules), ("no_rules", spec.no_rules)):
        for name in listed:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                fix = f"did you mean '{near[0]}'?" if near else "'fusecli rules' lists all"
                raise UsageError(Problem(f"rule '{name}' is unknown", spec.where((key,)), fix))
    if not (spec.rules or spec.no_rules):
        return None
    return frozenset(spec.rules or known) - frozenset(spec.no_rules)


def _factory(spec: Spec, consent: Consent) -> Callable[[], nn.Module] | None:
    if spec.model is None:
        return None
    reference, kwargs = spec.model.factory, dict(spec.model.kwargs)
    factory = load_object(reference, consent, spec.folder)
    where = spec.where(("model",))

    def build() -> nn.Module:
        try:
            model = factory(**copy.deepcopy(kwargs))
        except Exception as error:  # whatever somebody's constructor may raise
            problem = code_failed(error, f"the factory {reference}", where, "check model.kwargs")
            raise UsageError(problem) from error
        if not isinstance(model, nn.Module):
            message = f"the factory {reference} returned {type(model).__name__}, not an nn.Module"
            raise UsageError(Problem(message, where, "name a class or a function that builds the model"))
        if _BUILT in vars(model):
            message = f"the factory {reference} returns the same object each time"
            raise UsageError(Problem(message, where, "let it build a new model in each call"))
        vars(model)[_BUILT] = True
        return model

    return build


def planted(
    checkpoint: Checkpoint,
    groups: Iterable[Group],
    assume: Mapping[str, object],
    known: Mapping[str, nn.Module] | None = None,
) -> tuple[nn.Module, list[LedgerEntry]]:
    """A model of stand-ins, one for each member of `groups`, and what had to be assumed.

    `known` are members without tensors that are known all the same.
    Raises UsageError with everything that the spec has to say more.
    """
    local = _by_module(checkpoint)
    modules: dict[str, nn.Module] = {}
    known = known or {}
    ledger: list[LedgerEntry] = []
    problems: list[Problem] = []
    for group in groups:
        told: dict[str, Any] = {key: group.hints.get(key) for key in ("kind", "groups", "stride", "eps")}
        hints = Hints(
            **told,
            transposed=assume.get("transposed"),  # type: ignore[arg-type]  # the spec's own types
            assumed_eps=assume.get("eps"),  # type: ignore[arg-type]
            where=group.where,
        )
        rank = rank_of(local.get(group.modules[0], {}))
        for path in group.modules:
            try:
                if path in local:
                    modules[path] = stand_in(path, local[path], hints, rank)
                else:
                    modules[path] = known.get(path) or Unknown()
            except UsageError as error:
                problems += error.problems
        ledger += (LedgerEntry("assumed", path, what) for path, what in hints.assumed)
    if problems:
        raise UsageError(*problems)
    return plant(modules), ledger


def _by_module(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    local: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, tensor in checkpoint.tensors.items():
        path, _, attribute = name.rpartition(".")
        local.setdefault(path, {})[attribute] = (tensor.shape, tensor.dtype)
    return local


def adapted_groups(source: Source, groups: Sequence[Group]) -> list[Group]:
    """The layers of the adapter that no group has, where nobody has the model's code; raises UsageError for
    those that the file has not."""
    if source.adapter is None:
        return []
    require_known(source.adapter, module_names(source.checkpoint))
    held = {path for group in groups for path in group.modules}
    return [Group((path,)) for path in source.adapter.pairs if path not in held]


def dressed(source: Source, model: nn.Module) -> None:
    """Puts the adapter's layers into a model of stand-ins, and makes them plain again: what is planned on."""
    if source.adapter is not None:
        tied = {name for names in source.checkpoint.ties for name in names}
        dress(model, source.adapter, tied=tied)
        source.bakes = dict.fromkeys(source.adapter.pairs, "lora")
        source.bake(model)


def module_names(checkpoint: Checkpoint) -> list[str]:
    """The modules that hold tensors, in the order of the file."""
    return [path for path in _by_module(checkpoint) if path]


def groups_of(spec: Spec, names: Sequence[str], optional_from: int | None = None) -> list[Group]:
    """The spec's groups bound to names; raises UsageError with all problems."""
    bound = bind_groups(spec, names, optional_from=optional_from, shared_last=optional_from is None)
    return [Group(group.modules, group.where, _hints(group.spec)) for group in bound]


def _hints(group: GroupSpec) -> dict[str, Any]:
    return {name: getattr(group, name) for name in ("kind", "groups", "stride", "eps")}
