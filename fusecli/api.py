"""The Python API: what `import fusecli` offers, on models in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fusecli.artifact import load_fused
from fusecli.consent import Consent
from fusecli.engine import (
    CustomFuser,
    Group,
    Vocabulary,
    compute_all,
    computed_layers,
    needed,
    rules_in,
)
from fusecli.engine import plan as planned_groups
from fusecli.errors import ExitCode, Problem, RefusedError, UnsafeError, UsageError
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.jobs import facts
from fusecli.jobs.adapter import open_adapter
from fusecli.jobs.choice import Choice, looked, settled
from fusecli.jobs.fold import Fold, Refused, group_reports, plan_fold
from fusecli.jobs.in_memory import (
    adapted,
    apart,
    applied,
    as_checkpoint,
    copied,
    held_warnings,
    in_train_mode,
    names_of,
    new_biases,
    require_folds,
    resting,
)
from fusecli.jobs.plan import listing, remarks
from fusecli.jobs.proof import prove_in_memory, reported
from fusecli.jobs.rerun import edited_run
from fusecli.jobs.sizes import require_other_sizes
from fusecli.jobs.source import Source, vocabulary_of
from fusecli.jobs.verdicts import STATUS, failures, on_all_paths, recorded
from fusecli.jobs.weight_ranges import weight_range
from fusecli.outcome import Judgement, LedgerEntry, Mode, Outcome, Proposal, Verdict
from fusecli.proof.foreign import judge_foreign
from fusecli.qat import prepare_qat
from fusecli.rewrite import ModuleTree
from fusecli.rules import all_rules
from fusecli.sample import Sample
from fusecli.spec import Spec, read_spec, spec_from_mapping
from fusecli.spec.model import Shared, Target
from fusecli.spec.wildcards import bind_groups, bind_lists

__all__ = [
    "fuse",
    "fuse_modules",
    "fuse_modules_qat",
    "load_fused",
    "load_int8",
    "plan",
    "prepare_qat",
    "verify",
]

_log = logging.getLogger("fusecli")
AdapterFile = str | Path | Mapping[str, Any]
Groups = Sequence[str] | Sequence[Sequence[str]]


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`model` with the groups fused, in eval mode: a drop-in for torch.ao.quantization.fuse_modules.

    modules_to_fuse          one list of module names, or a list of such lists
    inplace                  change `model` itself; else a copy is changed, which shares nothing with it
    fuser_func               replaces the rules: called as (modules, is_qat, additional_fuser_method_mapping),
                             it returns as many modules, which take the places of those it was given
    fuse_custom_config_dict  {"additional_fuser_method_mapping": {(Conv2d, MyNorm): fuser}}, each fuser called
                             as (is_qat, *modules)

    Where torch.ao leaves a model half fused, this changes nothing: all groups are checked first. Nothing is
    verified; `fuse` does that. What the model holds a second time, outside of its module tree (a list of its
    layers), stays as it was; that is logged. Raises UsageError for names that do not exist, RefusedError for
    groups that cannot be fused.
    """
    return _fused(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, "folded")


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`model` with the groups in containers (fusecli.nn.ConvBnReLU2d, ...), to be trained with simulated
    quantization: a drop-in for torch.ao.quantization.fuse_modules_qat, with its child layout.

    Arguments as for `fuse_modules`. Nothing is folded: the norms go on learning. The model stays in train
    mode; raises RefusedError for members that are in eval mode, and for what no container takes.
    """
    return _fused(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, "qat")


def _fused(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool,
    fuser_func: Callable[..., Sequence[nn.Module]] | None,
    config: Mapping[str, Any] | None,
    mode: Mode,
) -> nn.Module:
    additional = (config or {}).get("additional_fuser_method_mapping") or {}
    if fuser_func is not None:
        return _with_fuser_func(model, modules_to_fuse, inplace, fuser_func, additional, mode)
    tree = ModuleTree(model)
    vocabulary = _vocabulary(additional, mode)
    alone = any(len(fuser.sequence) == 1 for fuser in vocabulary.fusers)
    groups = [Group(g.modules, g.where) for g in bind_lists(modules_to_fuse, names_of(tree), alone=alone)]
    planned = planned_groups(tree, groups, vocabulary)
    rewrites, refused = compute_all(tree, planned.decisions)
    refused = [*planned.refused, *refused, *(resting(tree, planned.decisions) if mode == "qat" else ())]
    if refused:
        raise RefusedError(*(Problem(no.reason, " + ".join(no.group), no.remedy) for no in refused))
    if mode == "folded" and (training := [entry.where for entry in in_train_mode(model)]):
        _log.warning("%d modules were in train mode; set to eval: %s", len(training), ", ".join(training))
    for warning in held_warnings(model, planned.decisions, inplace=inplace):
        _log.warning("%s", warning)
    fused, lost = applied(model, planned.decisions, rewrites, inplace=inplace, mode=mode)
    for entry in lost:
        _log.warning("%s: %s %s", entry.where, entry.kind, entry.what)
    return fused


def fuse(
    model: nn.Module,
    inputs: Any,
    *,
    groups: Groups | None = None,
    spec: Spec | str | Path | Mapping[str, Any] | None = None,
    discover: bool | None = None,
    target: Target | None = None,
    shared: Shared | None = None,
    qat: bool | None = None,
    bake: bool | None = None,
    adapter: AdapterFile | None = None,
    allow_code: Iterable[str] = (),
    assume_same_path: bool | None = None,
) -> Outcome:
    """Fuses a copy of `model` and proves it on `inputs`; `outcome.model` is that copy, None if it is wrong.

    inputs    a tensor, a tuple of positional arguments, or a dict of keyword arguments
    groups    as for fuse_modules; None: those of the spec
    spec      a Spec, a path or a dict: groups, extra mappings, exclude and the seed are taken from it
    discover  also fuse what the dataflow offers, for `target` "inference" or "quant"; None: as the spec says
    shared    "clone": a module or weight with several names is given a copy for each one that can be folded
    qat       as fuse_modules_qat does: containers that are trained; verified in train mode too
    bake      layers whose weight is computed (weight_norm, a pruning mask) are made plain, then folded
    adapter   a LoRA adapter that is added first: its file, or {"file": ..., "scale": ...} as in a spec
    assume_same_path  every input goes through the modules that ran, where others stand beside them to choose
              from; None: as the spec says
    allow_code  packages and files whose code the spec may name, besides those that the environment and the
                project's pyproject.toml allow; a call never asks

    The outcome holds the same facts as the JSON report of `fusecli fuse`. A group that cannot be fused is in
    `outcome.refused`, and then nothing is fused. Raises UsageError for names that do not exist.
    """
    read = _spec(spec, groups, discover=discover, target=target, shared=shared, qat=qat, bake=bake)
    if assume_same_path is not None:
        verify_as = read.verify.model_copy(update={"assume_same_path": assume_same_path})
        read = read.model_copy(update={"verify": verify_as})
    model, ledger = _with_adapter(model, read, adapter)
    source = Source(as_checkpoint(model), lambda: duplicate(model))
    consent = Consent.gather(allow_code)
    source.vocabulary = vocabulary_of(read, consent)
    ledger = [*ledger, *consent.ledger]
    sample = Sample.of(inputs)
    asked = [
        Group(g.modules, g.where) for g in bind_groups(read, names_of(ModuleTree(model)), shared_last=True)
    ]
    given = model
    structure, run, choice = looked(
        read,
        source,
        lambda: apart(given, source.owns, source.bakes),
        lambda: duplicate(apart(given, source.owns, source.bakes)),
        sample,
        asked,
    )
    model = apart(given, source.owns) if source.bakes else structure
    tree = ModuleTree(model)
    before = Outcome(
        "fuse",
        "refused",
        ExitCode.REFUSED,
        spec=facts.spec_facts(read),
        totals_before=facts.with_ops(
            facts.totals(facts.layout_of(source.checkpoint), model), facts.seen(run)
        ),
        environment=facts.environment(),
        recording=recorded(run),
    )
    while True:
        try:
            fold, rewrites = settled(source, structure, choice, run, lambda fold: require_folds(tree, fold))
            if read.qat and (still := resting(tree, fold.decisions)):
                raise Refused(still)
        except Refused as no:
            return replace(
                before,
                refused=no.refused,
                unfused=choice.unfused((), no.refused),
                ledger=(*ledger, *facts.statistics_ledger(source.checkpoint, choice.names)),
            )
        if not fold.decisions:
            why = "every group is fused already" if fold.done else "no groups were given"
            return replace(
                before,
                status="nothing to fuse",
                exit_code=ExitCode.NOTHING,
                unfused=choice.unfused(),
                ledger=(*ledger, *facts.bare_ledger(choice.bare)),
                refused=tuple(choice.dropped.values()),
                problems=(_nothing(read, choice) or why,),
                model=duplicate(model) if read.qat else copied(model),
            )
        for number, (decision, rewrite) in enumerate(zip(fold.decisions, rewrites, strict=True)):
            fold.ranges[number] = weight_range(tree[decision.members[0]], rewrite, decision.members[0])
        fused, lost = applied(model, fold.decisions, rewrites, inplace=False, mode=read.mode)
        verdict, checks = prove_in_memory(fold, model, fused, sample, read.verify.seed)
        failed = failures(fold, checks)
        if verdict.judgement is not Judgement.DIFFERENT or not failed or not choice.may_drop(failed):
            break
        choice.drop(failed)  # nobody has asked for them
    verdict, reports = on_all_paths(
        verdict,
        reported(group_reports(fold, fused), checks),
        fold.decisions,
        assumed=source.vocabulary.same_path,
    )
    verdict = replace(verdict, groups=reports)
    status, code = STATUS[verdict.judgement]
    custom = any(decision.custom for decision in fold.decisions)
    after = None if custom else edited_run(run, fold.rewrites)
    return replace(
        before,
        status=status,
        exit_code=code,
        groups=reports,
        refused=(*choice.dropped.values(), *(no for d in fold.decisions for no in d.spared)),
        unfused=choice.unfused(fold.decisions),
        verification=verdict,
        ledger=(
            *ledger,
            *(in_train_mode(model) if read.mode == "folded" else ()),
            *facts.statistics_ledger(source.checkpoint, fold.members),
            *facts.own_ledger(needed(source.owns, fold.decisions)),
            *facts.caveat_ledger(fold.decisions, facts.seen(run)),
            *facts.path_ledger(fold.decisions),
            *facts.bare_ledger(choice.bare),
            *new_biases(tree, rewrites),
            *lost,
            *verdict.ledger,
        ),
        totals_after=facts.with_ops(facts.totals(facts.layout_of(as_checkpoint(fused)), fused), after),
        model=fused if verdict.judgement is not Judgement.DIFFERENT else None,
    )


def _nothing(spec: Spec, choice: Choice) -> str:
    """Why discovery has left nothing to fuse."""
    if not spec.discover:
        return ""
    return "no group is left that can be fused" if choice.dropped else "the dataflow offers nothing to fold"


def plan(
    model: nn.Module,
    inputs: Any,
    *,
    target: Target = "inference",
    exclude: Iterable[str] = (),
    bake: bool = False,
    assume_same_path: bool = False,
) -> Proposal:
    """What can be fused in `model`, as a run on `inputs` (as for `fuse`) shows it; it is not changed.

    target   "inference": norms are folded; "quant": a ReLU goes into a container too
    exclude  patterns of names that are left alone
    bake     layers whose weight is computed are made plain, then folded
    assume_same_path  as for `fuse`

    Raises UsageError where the model does not run on the inputs.
    """
    asked: dict[str, Any] = {"discover": True, "target": target, "exclude": list(exclude), "bake": bake}
    asked["verify"] = {"assume_same_path": assume_same_path}
    read = spec_from_mapping(asked, where="fusecli.plan")
    tree = ModuleTree(model)
    bind_groups(read, names_of(tree))  # there are none; an exclude that matches nothing is a slip
    source = Source(as_checkpoint(model), lambda: duplicate(model))
    source.vocabulary = replace(source.vocabulary, same_path=assume_same_path)
    structure, run, choice = looked(
        read,
        source,
        lambda: apart(model, (), source.bakes),
        lambda: duplicate(apart(model, (), source.bakes)),
        Sample.of(inputs),
        (),
    )

    def attempt(fold: Fold) -> None:
        require_folds(tree, fold)
        require_other_sizes(fold, run)

    fold, _ = settled(source, structure, choice, run, attempt)
    groups, unfused = choice.groups, choice.unfused(fold.decisions)
    text = ("bake: true\n" if bake else "") + listing(groups, unfused, names_of(tree), choice.idle)
    text += remarks(facts.caveat_ledger(fold.decisions, run.recording))
    return Proposal(tuple(group.modules for group in groups), unfused, text, recorded(run))


def verify(
    original: nn.Module,
    fused: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    adapter: AdapterFile | None = None,
    assume_same_path: bool = False,
) -> Verdict:
    """Whether `fused` computes what `original` does, on `inputs` (as for `fuse`), both in eval mode.

    A model that fusecli fused or loaded carries the names of its groups: each is judged by itself, and its
    weights against the fold of the original's. Of any other model only the outputs can be compared.
    With an `adapter` (as for `fuse`) it is the original with that beside its layers; `assume_same_path` as
    there. Neither model is changed. Raises UsageError where `original` does not run on the inputs.
    """
    sample = Sample.of(inputs)
    original, _ = _with_adapter(original, Spec(), adapter)
    names = ModuleTree(fused).rules_of_groups
    if not names:
        return judge_foreign(copied(original), copied(fused), sample, seed)
    original = apart(original, ModuleTree(fused).own_copies)
    source = Source(as_checkpoint(original), lambda: duplicate(original))
    known = {rule.name for rule in all_rules()}
    if any(not rules_in(rule) <= known for rule in names.values()):
        source.vocabulary = replace(source.vocabulary, mode="qat")
    plain = ModuleTree(fused).made_plain
    source.bakes = dict.fromkeys(plain, "bake") | computed_layers(
        ModuleTree(original), source.vocabulary, plain
    )
    structure = apart(original, (), source.bakes)
    try:
        run = Run(structure, sample, lambda: duplicate(structure))
        fold = plan_fold(
            source, structure, [Group(modules, rules=rules_in(rule)) for modules, rule in names.items()], run
        )
        verdict, checks = prove_in_memory(fold, original, fused, sample, seed)
        reports = reported(group_reports(fold, fused), checks)
    except (Refused, RefusedError, KeyError) as no:
        refused = no.refused if isinstance(no, Refused) else ()
        said = "; ".join(f"{' + '.join(one.group)}: {one.code}: {one.reason}" for one in refused)
        reason = f"the fused model's groups do not belong to the original: {said or no}"
        return Verdict(Judgement.DIFFERENT, seed=seed, reasons=(reason,))
    verdict, reports = on_all_paths(verdict, reports, fold.decisions, assumed=assume_same_path)
    ledger = (*facts.caveat_ledger(fold.decisions, facts.seen(run)), *verdict.ledger)
    return replace(verdict, groups=reports, ledger=ledger)


def load_int8(path: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """The model of a .pt2 file that `fusecli quantize` wrote, called like the float model it was made from.

    torch.export.load runs code that a file names: `allow_pickle` says that you trust it. torchao is not
    needed. Raises UnsafeError without that word, or for what is no such file.
    """
    if not allow_pickle:
        fix = "pass allow_pickle=True if you trust the file"
        raise UnsafeError(Problem("torch.export.load runs code that a .pt2 file names", str(path), fix))
    from fusecli.int8.saved import load  # with torch.export, half a second that nothing else needs

    return load(Path(path))


def _with_fuser_func(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool,
    fuser_func: Callable[..., Sequence[nn.Module]],
    additional: Mapping[Any, Any],
    mode: Mode,
) -> nn.Module:
    model = model if inplace else duplicate(model)
    tree = ModuleTree(model)
    made: list[tuple[str, nn.Module]] = []
    for group in bind_lists(modules_to_fuse, names_of(tree), alone=True):
        modules = list(fuser_func([tree[path] for path in group.modules], mode == "qat", dict(additional)))
        if len(modules) != len(group.modules):
            message = f"fuser_func returned {len(modules)} modules for {len(group.modules)}"
            raise UsageError(Problem(message, " + ".join(group.modules)))
        made += zip(group.modules, modules, strict=True)
    for path, module in made:
        tree.replace(path, module)
    tree.note_groups({}, custom=True)
    return model


def _with_adapter(
    model: nn.Module, spec: Spec, given: AdapterFile | None
) -> tuple[nn.Module, list[LedgerEntry]]:
    """The model with the adapter that is given, or that the spec names, and what the report says of it."""
    if given is not None:
        part = given if isinstance(given, Mapping) else {"file": str(given)}
        spec = spec_from_mapping({"adapter": part}, where="fusecli")
    if spec.adapter is None:
        return model, []
    adapter = open_adapter(spec.adapter, spec.folder, spec.where(("adapter",)))
    return adapted(model, adapter), [adapter.entry]


def _vocabulary(additional: Mapping[Any, Any], mode: Mode) -> Vocabulary:
    fusers = []
    for sequence, function in additional.items():
        types = sequence if isinstance(sequence, tuple) else (sequence,)
        fusers.append(CustomFuser(types, getattr(function, "__qualname__", repr(function)), function))
    return Vocabulary(tuple(fusers), mode=mode)


def _spec(spec: Spec | str | Path | Mapping[str, Any] | None, groups: Groups | None, **given: Any) -> Spec:
    if isinstance(spec, str | Path):
        spec = read_spec(spec)
    elif isinstance(spec, Mapping):
        spec = spec_from_mapping(spec)
    if groups is not None:
        alone = bool(given.get("bake")) or _alone(spec)
        listed = spec_from_mapping({"groups": groups}, where="", alone=alone)
        spec = spec.model_copy(update={"groups": listed.groups}) if spec else listed
    return (spec or Spec()).model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )


def _alone(spec: Spec | None) -> bool:
    """Whether a group may have one name, as in a file that says what this spec does."""
    if spec is None:
        return False
    one_class = any(len(mapping.sequence or ()) == 1 for mapping in spec.extra_mappings)
    return spec.bake or spec.remove_idle or spec.adapter is not None or one_class
