"""From what the user names to a Source: the code that a spec names, the model's names, what is added.

Everything about a source but for what a run shows (`fusecli.pipeline.select`) is decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from torch import nn
from torch.nn.parameter import is_lazy

from fusecli import rules
from fusecli.blame import code_failed
from fusecli.checkpoint import Checkpoint, StoredTensor
from fusecli.consent import Consent, load_class, load_object
from fusecli.engine import CustomFuser, Vocabulary
from fusecli.errors import Problem, UsageError
from fusecli.graph.materialise import duplicate
from fusecli.graph.memory import same_memory
from fusecli.outcome import LedgerEntry
from fusecli.rewrite import MANIFEST_KEY, Manifest
from fusecli.source.adapter import Adapter, attach_adapter, open_adapter
from fusecli.source.reading import read_for
from fusecli.source.samples import as_computed
from fusecli.source.source import InMemory, Source
from fusecli.source.trained import read_trained
from fusecli.spec import Spec

_BUILT = "_fusecli_built"  # on a model that a factory has made


def resolve(
    checkpoint: Checkpoint, spec: Spec, consent: Consent, manifest: Manifest | None = None
) -> tuple[Source, Spec]:
    """The checkpoint with the code and the adapter that the spec names, read as the float model that it is;
    and the spec with the dtype that the model computes in.

    manifest   that of an artifact which was fused to be trained

    Raises UnsafeError where nobody allowed that code, UsageError where it does not belong to the checkpoint.
    """
    source = source_of(checkpoint, spec, consent)
    spec, told = as_computed(spec, checkpoint)
    source = replace(source, ledger=(*source.ledger, *told))
    return read_trained(source, spec, manifest), spec


def source_of(checkpoint: Checkpoint, spec: Spec, consent: Consent) -> Source:
    """The checkpoint with the adapter and the code that the spec names, as it was stored."""
    source = _source_of(checkpoint, spec, consent)
    adapter = adapter_of(spec)
    if adapter is None:
        return source
    return replace(source, adapter=adapter, ledger=(*source.ledger, adapter.entry))


def adapter_of(spec: Spec) -> Adapter | None:
    if spec.adapter is None:
        return None
    return open_adapter(spec.adapter, spec.folder, spec.where(("adapter",)))


def _source_of(checkpoint: Checkpoint, spec: Spec, consent: Consent) -> Source:
    build, vocabulary = _factory(spec, consent), vocabulary_of(spec, consent)
    if build is None and checkpoint.module is not None:
        module = checkpoint.module
        ledger = tuple(_train_mode(module)) if spec.mode == "folded" else ()
        return Source(checkpoint, lambda: duplicate(module), vocabulary, ledger)
    if build is None or MANIFEST_KEY in checkpoint.metadata:
        return Source(checkpoint, build, vocabulary)
    source = Source(checkpoint, build, vocabulary)
    reading = read_for(checkpoint, source.blank(), build)
    return replace(source, checkpoint=reading.checkpoint, reading=reading)


def _train_mode(module: nn.Module) -> list[LedgerEntry]:
    training = [path or "(the model)" for path, part in module.named_modules() if part.training]
    if not training:
        return []
    return [
        LedgerEntry("train-mode", training[0], f"{len(training)} modules were in train mode; set to eval")
    ]


def in_memory(model: nn.Module, spec: Spec, consent: Consent | None = None) -> InMemory:
    """The model, with the adapter of the spec beside its layers, as the source of a fold.

    consent   whose code the spec may name; None: it names none

    Raises UsageError for a model that has no state dict, and as `attach_adapter` does.
    """
    ledger: tuple[LedgerEntry, ...] = ()
    if (adapter := adapter_of(spec)) is not None:
        model, ledger = adapted(model, adapter), (adapter.entry,)
    vocabulary = Vocabulary(same_path=spec.verify.assume_same_path)
    if consent is not None:
        vocabulary = vocabulary_of(spec, consent)
        ledger = (*ledger, *consent.ledger)
    checkpoint = as_checkpoint(model)
    return InMemory(checkpoint, lambda: duplicate(model), vocabulary, ledger, model=model)


def adapted(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy that computes what the model does with the adapter beside its layers; raises as `attach_adapter`
    does."""
    twin = duplicate(model)
    attach_adapter(twin, adapter, tied={name for names in same_memory(twin) for name in names})
    for name, stored in adapter.tensors.items():
        path, _, local = name.rpartition(".")
        layer = twin.get_submodule(path)
        place = layer.get_parameter("weight").device
        layer._parameters[local] = nn.Parameter(stored.load().clone().to(place), requires_grad=False)
    return twin


def as_checkpoint(model: nn.Module) -> Checkpoint:
    """The model's state dict as the checkpoint that it would be, without a file."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        what = f"{', '.join(lazy[:3])} has no shape yet"
        raise UsageError(Problem(what, "model", "run the model once before it is fused"))
    try:
        state = model.state_dict()
    except Exception as error:  # whatever somebody's class or hook may raise
        what = f"it gives no state dict: {type(error).__name__}: {error}"
        raise UsageError(Problem(what, "model", "make model.state_dict() work first")) from error
    tensors = {
        name: StoredTensor(name, tensor.dtype, tuple(tensor.shape), tensor.detach)
        for name, tensor in state.items()
        if hasattr(tensor, "dtype")
    }
    return Checkpoint(Path("(in memory)"), "in memory", tensors, ())


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
