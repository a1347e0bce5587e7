"""Proving a written artifact: with the model, by running it; without, group by group on stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fusecli.artifact import load_into
from fusecli.checkpoint import Checkpoint
from fusecli.consent import Consent
from fusecli.engine import Decision, fuse_tree
from fusecli.equivalence.alone import judge_alone
from fusecli.equivalence.compare import TOLERANCE, compare
from fusecli.equivalence.findings import Findings, verdict_of
from fusecli.equivalence.groups import GroupCheck
from fusecli.equivalence.judge import judge
from fusecli.equivalence.noise import narrowest
from fusecli.equivalence.run import float64_arithmetic, run
from fusecli.equivalence.stored import same_state
from fusecli.equivalence.subject import Subject
from fusecli.errors import RefusedError
from fusecli.graph.followers import widened
from fusecli.jobs.fold import Fold, extra_state
from fusecli.jobs.source import Source
from fusecli.outcome import GroupReport, Judgement, Verdict
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """How a proof is run: samples with their seed, whom to tell about progress, and for each tensor of a
    sample the axes that may have other sizes (None: any)."""

    samples: Sequence[Sample]
    seed: int
    consent: Consent
    tick: Tick
    dynamic: Sequence[tuple[int, ...] | None] = ()


def prove_with_model(fold: Fold, artifact: Checkpoint, proof: Proof) -> tuple[Verdict, list[GroupCheck]]:
    """Loads the artifact into a fresh model as a user would and judges it against the original."""
    source = fold.source
    assert source.build is not None
    original = source.original()
    fused = load_into(source.build(), artifact, lambda: proof.consent)
    fused.eval()

    def partly_fused(count: int) -> nn.Module:
        return float64_fold(original, fold.decisions[:count])

    subject = Subject(
        original=original,
        fused=fused,
        exact=partly_fused(len(fold.decisions)),
        groups=tuple(decision.members for decision in fold.decisions),
        passes=tuple(decision.passes for decision in fold.decisions),
        regions=tuple(decision.region for decision in fold.decisions),
        folded=fold.folded,
        foreign=fold.foreign,
        partly_fused=partly_fused,
        names=fold.keymap if source.vocabulary.mode == "qat" else None,
    )
    verdict, checks = judge(subject, proof.samples, seed=proof.seed, tick=proof.tick, dynamic=proof.dynamic)
    stored = verdict.check_results["from disk"] is Judgement.EQUIVALENT
    only_the_whole = stored and not any(check.judgement is Judgement.DIFFERENT for check in checks)
    if verdict.judgement is Judgement.DIFFERENT and only_the_whole and _builds_disagree(source, proof):
        verdict = _undetermined(verdict)
    return _with_learned(verdict, mislearned(fold, artifact)), checks


def _with_learned(verdict: Verdict, wrong: list[str]) -> Verdict:
    if not wrong:
        return verdict
    said = f"learned scales are not those of the checkpoint: {', '.join(wrong[:3])}"
    return replace(
        verdict,
        judgement=Judgement.DIFFERENT,
        smallest_tolerance=None,
        reasons=(*verdict.reasons, said),
        checks={**verdict.checks, "from disk": said},
        check_results={**verdict.check_results, "from disk": Judgement.DIFFERENT},
    )


def _builds_disagree(source: Source, proof: Proof) -> bool:
    """Whether two fresh models with the same checkpoint compute different things: then what was built beside
    the tensors decides, and no artifact can hold it."""
    sample, seed = proof.samples[0], proof.seed
    outputs = [run(source.original().double(), sample, seed=seed, dtype=torch.float64) for _ in range(2)]
    return compare(*outputs).error > TOLERANCE


def _undetermined(verdict: Verdict) -> Verdict:
    reason = "two builds of the factory with this checkpoint disagree: its tensors do not determine the model"
    return replace(
        verdict,
        judgement=Judgement.INCONCLUSIVE,
        smallest_tolerance=None,
        reasons=(reason,),
        check_results={
            **verdict.check_results,
            "semantic": Judgement.INCONCLUSIVE,
            "drift": Judgement.INCONCLUSIVE,
        },
    )


def float64_fold(original: nn.Module, decisions: Sequence[Decision]) -> nn.Module:
    """A float64 copy of `original` with the groups of `decisions` fused, unrounded.

    Raises RefusedError where float64 weights cannot be fused: the caller has fused them in a narrower dtype.
    """
    twin = widened(original)
    with float64_arithmetic():  # what computes a weight is run here too
        _, refused = fuse_tree(ModuleTree(twin), decisions)
    if refused:
        raise RefusedError(*(f"{' + '.join(no.group)}: {no.reason}" for no in refused))
    return twin


def prove_alone(fold: Fold, artifact: Checkpoint, proof: Proof) -> tuple[Verdict, list[GroupCheck]]:
    """Judges each group by itself on random input; all other tensors have to be the original's own bits."""
    dtypes = (torch.empty(0, dtype=tensor.dtype) for tensor in artifact.tensors.values())
    found = Findings([], narrowest(dtypes))
    wrong = sorted(fold.layout.keys() ^ artifact.tensors.keys())
    keymap = fold.keymap
    for number, (decision, rewrite) in enumerate(zip(fold.decisions, fold.rewrites, strict=True)):
        proof.tick(f"group {number + 1} of {len(fold.decisions)}")
        names = {key: new for key in rewrite.tensors if (new := keymap(key)) is not None}
        stored = {key: artifact.tensors[new].load() for key, new in names.items() if new in artifact.tensors}
        members = {path: fold.source.member(path, fold.modules[path]) for path in decision.members}
        check, misstored = judge_alone(members, decision.rewrite, stored, proof.seed)
        found.checks.append(check)
        wrong += [names.get(key, key) for key in misstored]
    wrong += [*_changed(fold, artifact), *mislearned(fold, artifact)]
    found.note_stored(wrong, len(artifact.tensors))
    return verdict_of(found, proof.seed), found.checks


def _changed(fold: Fold, artifact: Checkpoint) -> list[str]:
    """Keys that no fold touched and whose tensor, or extra state, is not the original's."""
    keymap, folded = fold.keymap, fold.folded
    kept, stored = extra_state(fold), artifact.others
    changed = [
        name for name in kept.keys() | stored.keys() if not same_state(kept.get(name), stored.get(name))
    ]
    for key, original in fold.source.checkpoint.tensors.items():
        new = keymap(key)
        if new in folded or new not in artifact.tensors or new not in fold.layout:
            continue
        if not _same_bits(original.load(), artifact.tensors[new].load()):
            changed.append(str(new))
    return changed


def mislearned(fold: Fold, artifact: Checkpoint) -> list[str]:
    """Keys of learned scales and zero points that the artifact has not got as they are."""
    return [
        name
        for name, tensor in fold.learned.tensors.items()
        if name not in artifact.tensors or not _same_bits(tensor, artifact.tensors[name].load())
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # NaN is equal to NaN here: the question is whether the bytes were kept.
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def reported(reports: Sequence[GroupReport], checks: Sequence[GroupCheck]) -> tuple[GroupReport, ...]:
    """The structural facts of each group with the numbers that the proof measured."""
    return tuple(
        replace(
            report,
            status=str(check.judgement),
            float64_error=check.difference.error if check.calls else None,
            drift=check.drift,
            noise_floor=check.noise_floor,
            notes=(*report.notes, *filter(None, [check.why])),
        )
        for report, check in zip(reports, checks, strict=True)
    )
