"""Is it still the same function? Runs the checks that fusecli.proof.findings weighs.

Group by group first, in float64 and on random numbers, with what is stored of each; then every other stored
tensor; then the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.bisect import first_that_differs
from fusecli.checkpoint import StoredTensor
from fusecli.errors import NotFoldable, Problem, RefusedError, UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.followers import widened
from fusecli.outcome import Judgement, Verdict
from fusecli.proof.compare import MOST, Difference, Incomparable, compare
from fusecli.proof.elsewhere import Elsewhere
from fusecli.proof.findings import Findings, verdict_of
from fusecli.proof.groups import (
    Exact,
    GroupCheck,
    NotDrawn,
    Planned,
    edited,
    exact_fold,
    judge_group,
    members_of,
    misstored,
)
from fusecli.proof.noise import narrowest, noise_of_neighbours
from fusecli.proof.region import Modules, Region
from fusecli.proof.run import float64_arithmetic
from fusecli.proof.sizes import Axes
from fusecli.proof.stored import same_bits, same_state
from fusecli.proof.streamed import ROOM, Fetch, Kept
from fusecli.proof.trace import End
from fusecli.proof.training import Training, judge_training
from fusecli.proof.whole import Opened, Seen, Twin, hold_against, in_full, see_original
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite
from fusecli.sample import Sample, cast, seeded

Progress = Callable[[str], None]
_INNER_READER = (
    "right by itself, but the model differs with it fused: something else reads a tensor inside it"
)
_OUT_OF_SIGHT = (
    "right in float64, but as users run the model, without hooks and modes, it differs: torch takes a fast "
    "path there that reads what the fold changes"
)


@dataclass(frozen=True)
class Subject:
    """What is judged: an original, its fold, and what is known of how one became the other.

    member     a module of the original by path, with its tensors as they are stored
    before     the tensors of the original, and after those of the fold, by their keys
    extra      what the state dicts hold besides tensors, before (under the keys of the fold) and after
    key        the key in the fold of a tensor of the original; None where it is gone
    expected   the keys that the fold should have
    made       a module of the fold by path, as it is stored; None: it is what the edits make of the original
    build      makes a fresh original, and load a fresh fold, as users have them; None: nobody has the code
    record     a run of the original on a sample
    trains     whether the fold is to be trained
    """

    groups: tuple[Planned, ...]
    member: Callable[[str], nn.Module]
    before: Mapping[str, StoredTensor]
    after: Mapping[str, StoredTensor]
    key: Callable[[str], str | None]
    expected: Collection[str]
    extra: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default_factory=lambda: ({}, {}))
    made: Callable[[str], nn.Module] | None = None
    build: Callable[[], nn.Module] | None = None
    load: Callable[[], nn.Module] | None = None
    record: Callable[[Sample], Recording] | None = None
    trains: bool = False


def judge(
    subject: Subject,
    samples: Sequence[Sample] = (),
    *,
    seed: int,
    progress: Progress = lambda _: None,
    dynamic: Sequence[Axes] = (),
    room: int = ROOM,
) -> tuple[Verdict, list[GroupCheck]]:
    """The verdict on `subject` and what was seen of each group. `dynamic` says for each tensor of a sample
    which of its axes may have other sizes; what it leaves out, or None: any. `room` is for float64 weights
    that are kept from one run to the next, in bytes.

    Raises UsageError where the original model cannot be run on the samples at all, KeyError where it has no
    module of a group's name, RefusedError where a group cannot be folded in float64.
    """
    return _Judge(subject, samples, seed, progress, dynamic, room).verdict()


@dataclass
class _Judge:
    subject: Subject
    samples: Sequence[Sample]
    seed: int
    progress: Progress
    dynamic: Sequence[Axes]
    room: int

    def __post_init__(self) -> None:
        self._recordings: list[Recording] = []
        self.groups = tuple(map(self._shown, self.subject.groups))
        self.kept = Kept(self.room)
        self.exact = _ExactFolds(self.groups, self.subject, self.kept)
        dtypes = (torch.empty(0, dtype=tensor.dtype) for tensor in self.subject.before.values())
        self.found = Findings([], narrowest(dtypes))

    def verdict(self) -> tuple[Verdict, list[GroupCheck]]:
        subject, found = self.subject, self.found
        wrong = [*(set(subject.expected) ^ subject.after.keys())]
        left: list[int] = []
        for number, group in enumerate(self.groups):
            self.progress(f"group {number + 1} of {len(self.groups)}")
            exact = self.exact.of(number)
            wrong += misstored(group, exact, subject.after, subject.key)
            check, drawn = self._judged(group, exact)
            found.checks.append(check)
            left += [] if drawn else [number]
        wrong += self._changed()
        bad_paths = {key[:end] for key in wrong for end, letter in enumerate(key) if letter == "."}
        found.checks = [replace(c, misstored=not bad_paths.isdisjoint(c.members)) for c in found.checks]
        found.note_stored(sorted(set(wrong)), len(subject.after))
        if subject.build is not None and subject.load is not None and self.samples:
            self._whole(
                Opened(Twin(subject.build), self.kept),
                Opened(Twin(subject.load, self.exact.tensors()), self.kept),
                left,
            )
        return verdict_of(found, self.seed), found.checks

    def _shown(self, group: Planned) -> _Shown:
        """The group with its part of a run; of a list that was believed the plan knows none."""
        region, looked = group.region, self.subject.record is not None
        if region is None:
            found = (Region(seen, group.members, chain=True) for seen in self._recorded())
            region = next((region for region in found if region.visits), None)
        known = region is not None or not looked
        return _Shown(group.members, group.rewrite, group.custom, region, never_ran=not known)

    def _recorded(self) -> Iterator[Recording]:
        """A recording of each sample, made when it is asked for."""
        yield from self._recordings
        for sample in self.samples[len(self._recordings) :]:
            if self.subject.record is not None:
                with suppress(UsageError):  # it does not run so: the proof will tell it
                    self._recordings.append(self.subject.record(sample))
                    yield self._recordings[-1]

    def _judged(self, group: _Shown, exact: Exact) -> tuple[GroupCheck, bool]:
        """What is seen on random numbers, and whether that is all that has to be seen."""
        if group.never_ran:
            return GroupCheck(group.members, self.found.dtype, ran=False), True
        try:
            check = judge_group(group, exact, self._plain(group, exact), self.seed)
        except NotDrawn:
            return GroupCheck(group.members, self.found.dtype), False
        except (Incomparable, LookupError) as odd:
            self.found.erratic.append(str(odd))
            return GroupCheck(group.members, self.found.dtype), True
        return replace(check, trouble=group.disorder if check.differs else ""), True

    def _plain(self, group: Planned, exact: Exact) -> tuple[Modules, Modules]:
        """The modules of a group before and after the fold, as they are stored; with the exact tensors where
        the file has none of that shape."""
        subject = self.subject
        before = members_of(group, subject.member)
        if subject.made is not None:
            return before, members_of(group, subject.made)
        found = {}
        for name, value in exact.tensors.items():
            stored = self.subject.after.get(self.subject.key(name) or "")
            found[name] = (
                stored.load() if stored is not None and stored.shape == tuple(value.shape) else value
            )
        return before, edited(before, Rewrite(found, exact.edits))

    def _changed(self) -> Iterator[str]:
        """Keys that no fold touched and whose tensor, or extra state, is not the original's."""
        subject = self.subject
        kept, stored = subject.extra
        yield from (n for n in kept.keys() | stored.keys() if not same_state(kept.get(n), stored.get(n)))
        folded = self.exact.keys
        for key, original in subject.before.items():
            new = subject.key(key)
            if new is None or new in folded or new not in subject.after or new not in subject.expected:
                continue
            if not same_bits(original.load(), subject.after[new].load()):
                yield new
            original.release()

    def _whole(self, original: Opened, fused: Opened, left: Sequence[int]) -> None:
        found, groups = self.found, self.groups
        found.dtype = narrowest(original.model.parameters())
        asked = [groups[number] for number in left]
        seen = see_original(original, self.samples, self.seed, _spans(groups), asked, self.progress)
        for number, calls in zip(left, seen.calls, strict=False):
            found.checks[number] = self._on_what_flowed(number, calls)
        found.erratic += seen.doubts
        try:
            hold_against(seen, fused, _spans(groups), found, self._noise, self.progress)
        except Incomparable as odd:
            found.erratic.append(str(odd))
        if found.runs:
            first = seen.seen[0]
            found.way = list(first.way if found.dtype is torch.float32 else first.trace.way)
            self._locate(original)
            self.progress("other sizes")
            self._elsewhere(original, fused)
        if self.subject.trains and found.runs:
            self.progress("training")
            found.training = self._trained()

    def _on_what_flowed(self, number: int, calls: Mapping[Any, Sample]) -> GroupCheck:
        group, exact, check = self.groups[number], self.exact.of(number), self.found.checks[number]
        region = group.region
        if region is None or not calls or any(turn not in calls for turn in region.order):
            return replace(check, noticed=0.0, ran=bool(calls))
        try:
            found = judge_group(group, exact, self._plain(group, exact), self.seed, calls)
        except (Incomparable, LookupError) as odd:
            self.found.erratic.append(str(odd))
            return replace(check, noticed=0.0)
        return replace(found, misstored=check.misstored)

    def _noise(self, seen: Seen) -> float:
        assert self.subject.build is not None
        return noise_of_neighbours(self.subject.build(), seen.sample, seen.output, seen.seed)

    def _partly_fused(self, original: Opened, count: int) -> nn.Module:
        """The original in float64 with the first groups fused."""
        twin = widened(original.model)  # two builds may differ in what no checkpoint holds
        tree = ModuleTree(twin)
        with float64_arithmetic():  # what computes a weight is run here too
            groups = self.groups[:count]
            rewrites = [group.rewrite({path: tree[path] for path in group.members}) for group in groups]
            for rewrite in rewrites:
                apply_rewrite(tree, rewrite)
        return twin

    def _locate(self, original: Opened) -> None:
        """Names the group that breaks the whole where each group by itself is right."""
        found = self.found
        if any(check.differs for check in found.checks) or not (found.whole_differs or found.too_far):
            return
        sample, seed = self.samples[0], self.seed
        if not found.whole_differs:
            number, why = self._broken_unwatched(original, sample, seed), _OUT_OF_SIGHT
        else:
            number, why = self._broken(original, sample, seed), _INNER_READER
            if number is None:
                agrees = (
                    "a fresh fold of the original agrees with it: something besides the tensors was changed"
                )
                found.end = replace(found.end, why=agrees)
        if number is not None:
            found.checks[number] = replace(found.checks[number], trouble=why)

    def _broken(self, original: Opened, sample: Sample, seed: int) -> int | None:
        spans = _spans(self.groups)
        right = Opened(Twin(lambda: self._partly_fused(original, 0))).in_float64(sample, seed, spans)

        def differs(count: int) -> bool:
            try:
                part = Opened(Twin(lambda: self._partly_fused(original, count))).in_float64(
                    sample, seed, spans
                )
            except Exception:  # a model that half a fold breaks
                return True
            end, inside = (
                compare(right.output, part.output, channels=True),
                right.trace.against(part.trace),
            )
            return max(end.error, inside.error) > self.found.tolerance

        return first_that_differs(len(self.groups), differs)

    def _broken_unwatched(self, original: Opened, sample: Sample, seed: int) -> int | None:
        """The group that breaks the whole only as users run it: on a path that no hook or mode sees."""

        def unwatched(count: int) -> Any:
            inputs = sample.copy(torch.float64)
            model = self._partly_fused(original, count)
            with seeded(seed), torch.no_grad():
                return cast(model(*inputs.args, **inputs.kwargs), None)

        try:
            reference = unwatched(0)
        except Exception:  # float64 may have no such path
            return None

        def differs(count: int) -> bool:
            try:
                return compare(reference, unwatched(count)).error > MOST
            except Exception:  # a model that half a fold breaks
                return True

        return first_that_differs(len(self.groups), differs)

    def _elsewhere(self, original: Opened, fused: Opened) -> None:
        """At other sizes; names the group whose fold holds for the recorded one only."""
        found, groups = self.found, self.groups
        elsewhere = Elsewhere(
            original, fused, self.samples[0], self.seed, _spans(groups), _exits(groups), found
        )
        elsewhere.judge(self.dynamic)
        if found.sizes is None or found.sizes.wrong is None:
            return
        name, sample, difference = found.sizes.wrong
        error = difference.why or f"relative error {difference.error:.1e} in float64"
        said = f"right at {found.sizes.at}, but at {name} the fused model differs: {error}"
        number = elsewhere.culprit(sample, partial(self._partly_fused, original), first_that_differs)
        if number is None:
            found.end = Difference(difference.error, difference.where, said)
        else:
            fixed = "if sizes never change, say `dynamic: []` for the inputs in the spec"
            found.checks[number] = replace(found.checks[number], trouble=f"{said}; {fixed}")

    def _trained(self) -> Training:
        subject = self.subject
        assert subject.build is not None
        assert subject.load is not None
        fused = in_full(subject.load(), self.exact.tensors())
        found = judge_training(widened(subject.build()), fused, subject.key, self.samples, self.seed)
        if found.judgement is not Judgement.DIFFERENT:
            return found
        alone = widened(subject.build()), widened(subject.build())
        again = judge_training(*alone, lambda name: name, self.samples, self.seed)
        if again.judgement is not Judgement.DIFFERENT:
            return found
        return Training(doubt=f"the original itself, trained twice, gives two results: {again.said}")


def _spans(groups: Sequence[_Shown]) -> list[tuple[End, End]]:
    """For each group the module whose call begins it and the one whose return ends it."""
    return [
        (End(group.members[0]), End(group.members[-1]))
        if group.region is None or group.region.chain or not group.region.visits
        else (End(*group.region.begins_in), End(*group.region.ends_in))
        for group in groups
    ]


def _exits(groups: Sequence[_Shown]) -> list[End]:
    """The calls that return what is read outside of the groups."""
    found = []
    for group in groups:
        chain = group.region is None or group.region.chain
        found += [End(group.members[-1])] if chain else [End(*turn) for turn in group.region.leaves_in]  # type: ignore[union-attr]
    return found


@dataclass(frozen=True)
class _Shown:
    """A group with the region that a run has shown, whether the plan knew it or not.

    never_ran  a run was recorded, and has called none of its members
    disorder   how the run has called them in another order than they are listed
    """

    members: tuple[str, ...]
    rewrite: Callable[[Mapping[str, nn.Module]], Rewrite]
    custom: bool
    region: Region | None
    never_ran: bool = False

    @property
    def disorder(self) -> str:
        order = [path for path, _ in self.region.order] if self.region is not None else []
        first = [order.index(path) for path in self.members if path in order]
        late = next((n for n in range(1, len(first)) if first[n] < first[n - 1]), None)
        return f"{self.members[late]} ran before {self.members[late - 1]}" if late is not None else ""


class _ExactFolds:
    """The groups' folds in float64, worked out when asked for; the tensors of the last ones are kept, as far
    as there is room."""

    def __init__(self, groups: Sequence[Planned], subject: Subject, kept: Kept) -> None:
        self._groups, self._subject = groups, subject
        self._kept = kept
        self._places: dict[str, tuple[int, str]] = {}

    def of(self, number: int) -> Exact:
        """The fold of one group, worked out anew."""
        subject, group = self._subject, self._groups[number]
        try:
            exact = exact_fold(group, subject.member, subject.made, subject.key)
        except NotFoldable as no:  # a fuser that takes float32 only
            what = f"it cannot be proven, for that is done in float64: {no.reason}"
            raise RefusedError(Problem(what, " + ".join(group.members), no.remedy)) from no
        for name in exact.tensors:
            if (new := subject.key(name)) is not None:
                self._places[new] = number, name
        for name, tensor in exact.tensors.items():
            self._kept.put((number, name), tensor)
        return exact

    @property
    def keys(self) -> Collection[str]:
        """The keys of all tensors that were folded, once every group was asked for."""
        return self._places.keys()

    def tensors(self) -> dict[str, Fetch]:
        def fetch(number: int, name: str) -> Fetch:
            def tensor() -> Tensor:
                known = self._kept.get((number, name))
                return self.of(number).tensors[name] if known is None else known

            return tensor

        return {new: fetch(*place) for new, place in self._places.items()}
