"""Is it still the same function? Runs the checks that fusecli.equivalence.findings weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fusecli.equivalence.compare import Incomparable
from fusecli.equivalence.drift import measure_drift
from fusecli.equivalence.elsewhere import judge_elsewhere
from fusecli.equivalence.findings import Findings, verdict_of
from fusecli.equivalence.groups import GroupCheck
from fusecli.equivalence.noise import narrowest
from fusecli.equivalence.sizes import Axes
from fusecli.equivalence.stored import misstored
from fusecli.equivalence.subject import Subject, with_exact_tensors
from fusecli.equivalence.training import Names, Training, judge_training
from fusecli.equivalence.trial import NoTwin, Trial
from fusecli.graph.followers import widened
from fusecli.outcome import Judgement, Verdict
from fusecli.sample import Sample


def judge(
    subject: Subject,
    samples: Sequence[Sample],
    *,
    seed: int,
    tick: Callable[[str], None] = lambda _: None,
    dynamic: Sequence[Axes] = (),
) -> tuple[Verdict, list[GroupCheck]]:
    """The verdict on `subject` and what was seen of each group. `dynamic` says for each tensor of a sample
    which of its axes may have other sizes; what it leaves out, or None: any.

    Raises UsageError where the original model cannot be run on the samples at all, KeyError where one of the
    models has no module of a group's name.
    """
    original, fused = widened(subject.original), with_exact_tensors(subject)
    checks = [
        GroupCheck(
            group,
            _modules(fused, group),
            _modules(subject.fused, group),
            passes,
            region,
            (_modules(original, group), _modules(subject.original, group)),
        )
        for group, passes, region in zip(subject.groups, subject.passes, subject.shapes, strict=True)
    ]
    found = Findings(checks, narrowest(subject.original.parameters()))
    stored = subject.fused.state_dict()
    found.note_stored(
        misstored(subject.exact.state_dict(), stored, subject.folded, subject.foreign), len(stored)
    )
    for number, sample in enumerate(samples):
        tick(f"sample {number + 1} of {len(samples)}")
        trial = Trial(subject, original, fused, sample, seed + number, found)
        try:
            reference = trial.semantic(first=number == 0)
            measure_drift(subject, sample, seed + number, reference, found)
        except (Incomparable, NoTwin) as odd:
            found.erratic.append(str(odd))
            break
        found.runs += 1
        trial.locate()
    for check in checks:
        check.on_drawn_input(seed)
    if found.runs:
        tick("other sizes")
        judge_elsewhere(Trial(subject, original, fused, samples[0], seed, found), dynamic, found.way)
    if subject.names is not None and found.runs:
        tick("training")
        found.training = _trained(subject, subject.names, samples, seed)
    return verdict_of(found, seed), found.checks


def _trained(subject: Subject, names: Names, samples: Sequence[Sample], seed: int) -> Training:
    twins = widened(subject.original), with_exact_tensors(subject)
    found = judge_training(*twins, names, samples, seed)
    if found.judgement is not Judgement.DIFFERENT:
        return found
    alone = widened(subject.original), widened(subject.original)
    again = judge_training(*alone, lambda name: name, samples, seed)
    if again.judgement is not Judgement.DIFFERENT:
        return found
    return Training(doubt=f"the original itself, trained twice, gives two results: {again.said}")


def _modules(model: nn.Module, group: tuple[str, ...]) -> list[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return [modules[path] for path in group]
