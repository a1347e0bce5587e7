"""What the Python API does on models in memory: the steps of the pipeline in a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fusecli.checkpoint import Checkpoint
from fusecli.commands.plan import proposed
from fusecli.consent import Consent
from fusecli.engine import CustomFuser, Group, Vocabulary, computed_layers, rules_in
from fusecli.errors import ExitCode, Problem, RefusedError, UsageError
from fusecli.graph.materialise import duplicate, in_eval_mode
from fusecli.outcome import Judgement, Mode, Outcome, Proposal, Refusal, Verdict
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Fold, Refused, apply_fold, plan_fold, range_of
from fusecli.pipeline.in_memory import held_warnings, in_train_mode, members_in_eval_mode, new_biases
from fusecli.pipeline.outcome import Made, ledger_of, outcome_of, recorded, weighed
from fusecli.pipeline.prove import Trials, prove_in_memory, room_of
from fusecli.pipeline.record import record, seen
from fusecli.pipeline.select import Selection, record_and_select
from fusecli.pipeline.settle import settle
from fusecli.proof.foreign import judge_foreign
from fusecli.rewrite import ModuleTree
from fusecli.rules import all_rules
from fusecli.sample import Sample
from fusecli.source.groups import groups_of
from fusecli.source.resolve import in_memory
from fusecli.source.source import InMemory
from fusecli.spec import Spec, read_spec, spec_from_mapping
from fusecli.spec.wildcards import bind_groups, bind_lists

_log = logging.getLogger("fusecli")
AdapterFile = str | Path | Mapping[str, Any]
Groups = Sequence[str] | Sequence[Sequence[str]]
FuserFunction = Callable[..., Sequence[nn.Module]]


def fuse_in_memory(model: nn.Module, sample: Sample, spec: Spec, consent: Consent) -> Outcome:
    """A fused copy of the model, in the outcome where it is proven on `sample`."""
    source = in_memory(model, spec, consent)
    structure = source.structure()
    selection = record_and_select(spec, source, structure, sample, groups_of(spec, structure.names))
    trials = Trials((sample,), spec.verify.seed, room=room_of(spec))

    def attempt(selection: Selection, fold: Fold) -> tuple[Made, Sequence[Refusal]]:
        original = fold.structure.original
        assert original is not None
        tree = ModuleTree(original)
        if spec.qat and (still := members_in_eval_mode(tree, fold.decisions)):
            raise Refused(still)
        ranges = {n: range_of(fold, n, rewrite) for n, rewrite in enumerate(fold.rewrites)}
        train_mode = in_train_mode(original) if spec.mode == "folded" else []
        biases = new_biases(tree, fold.rewrites)
        fused, lost = apply_fold(fold)
        proof = prove_in_memory(fold, fused, trials)
        ledger = (*train_mode, *ledger_of(selection, fold), *biases, *lost)
        return weighed(proof, fused, ledger=ledger, ranges=ranges), proof.failures

    settled = settle(selection, attempt)
    outcome, made = outcome_of(settled, spec), settled.made
    if outcome.exit_code is ExitCode.REFUSED:
        return outcome
    if made is None:
        twin = duplicate(source.model)
        return replace(outcome, model=twin if spec.qat else in_eval_mode(twin))
    return outcome if made.verdict.judgement is Judgement.DIFFERENT else replace(outcome, model=made.model)


def plan_in_memory(model: nn.Module, sample: Sample, spec: Spec) -> Proposal:
    """What can be fused in the model, as a run on `sample` shows it."""
    source = in_memory(model, spec)
    structure = source.structure()
    bind_groups(spec, structure.names)  # there are none; an exclude that matches nothing is a slip
    found = proposed(record_and_select(spec, source, structure, sample, ()))
    selection = found.selection
    return Proposal(
        tuple(group.modules for group in selection.groups),
        found.unfused,
        ("bake: true\n" if spec.bake else "") + found.text,
        recorded(selection),
    )


def verify_in_memory(original: nn.Module, fused: nn.Module, sample: Sample, spec: Spec) -> Verdict:
    """Whether `fused` computes what `original` does with the spec's adapter beside it: group by group where
    the model carries their names."""
    source = in_memory(original, spec)
    known, seed = ModuleTree(fused), spec.verify.seed
    if not known.rules_of_groups:
        return judge_foreign(
            in_eval_mode(duplicate(source.model)), in_eval_mode(duplicate(fused)), sample, seed
        )
    names = {rule.name for rule in all_rules()}
    mode: Mode = (
        "folded" if all(rules_in(rule) <= names for rule in known.rules_of_groups.values()) else "qat"
    )
    source = replace(
        source, vocabulary=replace(source.vocabulary, mode=mode), unshared=tuple(known.own_copies)
    )
    plain = known.made_plain
    groups = [Group(modules, rules=rules_in(rule)) for modules, rule in known.rules_of_groups.items()]
    try:
        computed = computed_layers(source.structure().tree, source.vocabulary, plain)
        source = replace(source, bakes=dict.fromkeys(plain, "bake") | computed)
        structure = source.structure()
        run = record(source, structure, sample)
        fold = plan_fold(source, structure, groups, run)
        proof = prove_in_memory(fold, fused, Trials((sample,), seed))
        caveats = facts.caveat_ledger(fold.decisions, seen(run))
        made = weighed(proof, fused, ledger=caveats)
    except (Refused, RefusedError, KeyError) as no:
        refused = no.refused if isinstance(no, Refused) else ()
        said = "; ".join(f"{' + '.join(one.group)}: {one.code}: {one.reason}" for one in refused)
        reason = f"the fused model's groups do not belong to the original: {said or no}"
        return Verdict(Judgement.DIFFERENT, seed=seed, reasons=(reason,))
    return replace(made.verdict, ledger=made.ledger)


def fused_by_name(
    model: nn.Module,
    names: Groups,
    inplace: bool,
    function: FuserFunction | None,
    config: Mapping[str, Any] | None,
    mode: Mode,
) -> nn.Module:
    """`fuse_modules` and `fuse_modules_qat`: nothing is run, nothing is proven."""
    additional = (config or {}).get("additional_fuser_method_mapping") or {}
    if function is not None:
        return _with_fuser_function(model, names, inplace, function, additional, mode)
    vocabulary = _vocabulary(additional, mode)
    # No state dict: a model may have none that can be asked for, and nothing is written or proven.
    source = InMemory(Checkpoint(Path(), "in memory", {}, ()), vocabulary=vocabulary, model=model)
    structure = source.structure()
    alone = any(len(fuser.sequence) == 1 for fuser in vocabulary.fusers)
    groups = [Group(g.modules, g.where) for g in bind_lists(names, structure.names, alone=alone)]
    try:
        fold = plan_fold(source, structure, groups)
        if mode == "qat" and (still := members_in_eval_mode(structure.tree, fold.decisions)):
            raise Refused(still)
    except Refused as no:
        raise RefusedError(*(Problem(n.reason, " + ".join(n.group), n.remedy) for n in no.refused)) from None
    if mode == "folded" and (training := [entry.where for entry in in_train_mode(model)]):
        _log.warning("%d modules were in train mode; set to eval: %s", len(training), ", ".join(training))
    for warning in held_warnings(model, fold.decisions, inplace=inplace):
        _log.warning("%s", warning)
    fused, lost = apply_fold(fold, inplace=inplace)
    for entry in lost:
        _log.warning("%s: %s %s", entry.where, entry.kind, entry.what)
    return fused


def _vocabulary(additional: Mapping[Any, Any], mode: Mode) -> Vocabulary:
    fusers = []
    for sequence, function in additional.items():
        types = sequence if isinstance(sequence, tuple) else (sequence,)
        fusers.append(CustomFuser(types, getattr(function, "__qualname__", repr(function)), function))
    return Vocabulary(tuple(fusers), mode=mode)


def _with_fuser_function(
    model: nn.Module,
    names: Groups,
    inplace: bool,
    function: FuserFunction,
    additional: Mapping[Any, Any],
    mode: Mode,
) -> nn.Module:
    model = model if inplace else duplicate(model)
    tree = ModuleTree(model)
    made: list[tuple[str, nn.Module]] = []
    for group in bind_lists(names, [path for path in tree.modules if path], alone=True):
        modules = list(function([tree[path] for path in group.modules], mode == "qat", dict(additional)))
        if len(modules) != len(group.modules):
            message = f"fuser_func returned {len(modules)} modules for {len(group.modules)}"
            raise UsageError(Problem(message, " + ".join(group.modules)))
        made += zip(group.modules, modules, strict=True)
    for path, module in made:
        tree.replace(path, module)
    tree.note_groups({}, custom=True)
    return model


def spec_of(
    spec: Spec | str | Path | Mapping[str, Any] | None,
    groups: Groups | None = None,
    adapter: AdapterFile | None = None,
    *,
    assume_same_path: bool | None = None,
    **given: Any,
) -> Spec:
    """The spec, with what was given besides in place of what it says; None: it was not given."""
    if isinstance(spec, str | Path):
        spec = read_spec(spec)
    elif isinstance(spec, Mapping):
        spec = spec_from_mapping(spec)
    said = {name: value for name, value in given.items() if value is not None}
    if groups is not None:
        alone = bool(given.get("bake")) or _alone(spec)
        said["groups"] = spec_from_mapping({"groups": groups}, where="", alone=alone).groups
    spec = spec or Spec()
    if adapter is not None:
        part = dict(adapter) if isinstance(adapter, Mapping) else {"file": str(adapter)}
        if spec.source is not None:  # what is given is no path of that file's folder
            part["file"] = str(Path(part.get("file", "")).absolute())
        said["adapter"] = spec_from_mapping({"adapter": part}, where="fusecli").adapter
    if assume_same_path is not None:
        said["verify"] = spec.verify.model_copy(update={"assume_same_path": assume_same_path})
    return spec.model_copy(update=said)


def _alone(spec: Spec | None) -> bool:
    """Whether a group may have one name, as in a file that says what this spec does."""
    if spec is None:
        return False
    one_class = any(len(mapping.sequence or ()) == 1 for mapping in spec.extra_mappings)
    return spec.bake or spec.remove_idle or spec.adapter is not None or one_class
