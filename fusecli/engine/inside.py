"""What a member of a group does inside its own calls: a layer applies a weight, a norm is a fixed affine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fusecli.engine.decisions import Member
from fusecli.errors import NotFoldable, UsageError, require
from fusecli.graph.dataflow import Call, Recording, Visit, described
from fusecli.graph.held import Hold
from fusecli.graph.kinds import is_exact
from fusecli.graph.ops import AFFINE, ALWAYS_BATCH, EPS, MOVES, NORM_VECTORS, NORMS
from fusecli.graph.record import Run
from fusecli.graph.sites import (
    Site,
    adds_bias,
    applied_as_weight,
    flowing,
    foreign,
    layer_sites,
    moved_from,
    reads_through,
    strangers,
    weight_of,
)

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TEACH = "teach it with extra_mappings (treat, or sequence and fuser) or leave it out"


def untouched(recording: Recording, path: str) -> None:
    """Guard: forward writes to no tensor of the module, and nobody else reads one."""
    require_seen(recording, path)
    written = sorted(f"{path}.{name}" for name in _VECTORS if f"{path}.{name}" in recording.written)
    require(
        not written,
        "written-in-forward",
        f"forward writes to {', '.join(written)}",
        remedy="leave the group out",
    )
    readers = strangers(recording, path)
    if readers and path in recording.held:
        raise held_elsewhere(path, recording.held[path], described(recording, readers))
    if readers and not recording.visits_of(path):
        seen = described(recording, readers)
        raise NotFoldable(
            "functional-layer",
            f"{path} is never called: its tensors are used by function calls",
            evidence=seen,
            remedy="call the module in forward instead",
        )
    require(
        not readers,
        "shared-weight",
        f"the tensors of {path} are also read outside of its own forward",
        evidence=described(recording, readers),
        remedy="leave the group out: the other reader would see folded values",
    )
    require(bool(recording.visits_of(path)), "not-executed", "it did not run on these inputs")


def require_seen(recording: Recording, *paths: str) -> None:
    """Guard: all that these modules do is in the recording, and whoever reads what is between them."""
    first = {recording.first_name.get(path, path) for path in paths}
    called = sorted(first & recording.elsewhere.keys())
    visits = [visit for path in paths for visit in recording.visits_of(path)]
    before = len(paths) > 1 and any(visit.calls.stop <= recording.unseen_until for visit in visits)
    if not called and not before:
        return
    if called:
        reason = f"{', '.join(called)} is called in another thread, where no op is recorded"
        evidence = tuple(f"{path} is called in another thread" for path in called)
    else:
        reason = "ops ran that no recording shows, as in another thread, and may have read what is inside"
        evidence = (
            *(f"{path} is called in another thread" for path in sorted(recording.elsewhere)),
            *(
                f"a tensor that no op has made is read by {', '.join(described(recording, readers))}"
                for value in sorted(recording.appeared)
                if (readers := recording.readers(value))
            ),
        )
    raise NotFoldable(
        "unseen",
        reason,
        evidence=evidence[:3],
        remedy="let forward do its work in the thread that calls it, or leave the group out",
    )


def held_elsewhere(path: str, hold: Hold, seen: tuple[str, ...]) -> NotFoldable:
    """The refusal of a module that forward does not call where it stands."""
    what = f"through `{hold.name}`, not by its attribute"
    if hold.path != path:
        what = f"through the function `{hold.name}`, which calls the original where a copy of the model runs"
    return NotFoldable(
        "held-elsewhere",
        f"forward reaches {path} {what}",
        evidence=seen,
        remedy=f"call {path} itself in forward, or let an nn.ModuleList or nn.Sequential hold it and nothing "
        "else",
    )


def layer_at_work(run: Run, member: Member, unbiased: Collection[str]) -> list[Site]:
    """Where a layer applies its weight: once in each call, with a bias that is added. Raises NotFoldable.

    unbiased  layers without a bias whose class is not known: whether they would add one is tried in one run
    """
    recording, path = run.recording, member.path
    untouched(recording, path)
    sites, visits = layer_sites(recording, path), len(recording.visits_of(path))
    if not sites and is_exact(member.module):
        raise NotFoldable(
            "derived-weight",
            f"the weight that {path} applies is no parameter of its own",
            remedy="store the weight it is computed to, as a plain parameter",
        )
    require(
        [site.visit for site in sites] == list(range(visits)),
        "not-linear-in-weight",
        f"{path} does not apply its weight once in each call",
        evidence=(f"{visits} calls, its weight applied {len(sites)} times",),
        remedy=_TEACH,
    )
    _bias_is_read(run, member, unbiased)
    return sites


def applied_as_is(recording: Recording, path: str, sites: Sequence[Site]) -> bool:
    """Whether the ops at `sites` apply the layer's stored weight itself, add its bias or none, and nothing
    else in the run reads either: then its output is linear in both, whatever its class does besides."""
    applying = {number for site in sites for number in site.calls}
    for number in applying:
        weight = weight_of(recording.calls[number])
        source = None if weight is None else recording.values[moved_from(recording, weight)].name
        if source is None or source.rpartition(".")[2] != "weight":
            return False
    for value in recording.tensors_of(path):
        for call, read in reads_through(recording, value.number):
            if call.number not in applying and not adds_bias(recording, call, read, path):
                return False
    return True


def _bias_is_read(run: Run, member: Member, unbiased: Collection[str]) -> None:
    """A bias that the fold adds or changes has to reach the output of every call."""
    recording, path = run.recording, member.path
    if member.module._parameters.get("bias") is None:
        if is_exact(member.module):
            return
        recording = _with_bias(run, path, unbiased)
    read = [
        any(adds_bias(recording, call, value, path) for call in calls for value in call.reads)
        for calls in ([recording.calls[i] for i in visit.calls] for visit in recording.visits_of(path))
    ]
    require(
        all(read),
        "bias-not-read",
        f"{path} does not add a bias that it is given",
        evidence=(f"{type(member.module).__name__} read it in {sum(read)} of {len(read)} calls",),
        remedy=_TEACH,
    )


def _with_bias(run: Run, path: str, unbiased: Collection[str]) -> Recording:
    """The run with a zero bias on every layer that might need one; if that fails, on this one alone."""
    try:
        return run.with_biases(unbiased)
    except UsageError:
        try:
            return run.with_biases([path])
        except UsageError as error:
            reason = f"{path} does not run with a bias"
            raise NotFoldable("bias-not-read", reason, evidence=(str(error),), remedy=_TEACH) from error


def norm_at_work(recording: Recording, member: Member) -> list[Site]:
    """Where a norm reads and writes: one tensor from one tensor, by a fixed affine and then its submodules in
    a row. Raises NotFoldable."""
    untouched(recording, member.path)
    visits = recording.visits_of(member.path)
    return [_norm_site(recording, member, visit, turn) for turn, visit in enumerate(visits)]


def _norm_site(recording: Recording, member: Member, visit: Visit, turn: int) -> Site:
    path, flow = member.path, flowing(recording, visit)
    one = visit.plain and len(visit.takes) == len(visit.gives) == 1
    require(one, "not-affine", f"{path} does not make one tensor from one tensor alone", remedy=_TEACH)
    (entry,), (given,) = visit.takes, visit.gives
    require(
        not (recording.values[entry].constant and applied_as_weight(recording, given)),
        "norm-on-weights",
        f"{path} normalises weights, not activations",
        evidence=tuple(sorted(recording.values[entry].origins)),
    )
    for call in flow:
        require(
            not _uses_batch(call),
            "batch-statistics",
            f"{path} normalises by the statistics of the batch, in eval mode too",
            evidence=(recording.described(call),),
            remedy="set momentum and track_running_stats as for inference, or leave it out",
        )
        if is_exact(member.module) and call.name in NORMS:
            _own_vectors(recording, member, call)
    if not is_exact(member.module):
        _affine_inside(recording, member, visit, flow)
    inner = [call for call in flow if call.name in NORMS or not is_exact(member.module)] or flow
    require(bool(inner), "not-affine", f"{path} computes nothing from its input", remedy=_TEACH)
    _remainder(recording, member, visit, inner[-1])
    return Site(path, turn, frozenset(visit.calls), entry, given)


def _own_vectors(recording: Recording, member: Member, call: Call) -> None:
    """The class is known, but forward may have put other tensors or another eps into it for this run."""
    module: Any = member.module
    names = recording.names[recording.first_name[member.path]]
    strange = []
    for name, position in zip(_VECTORS, NORM_VECTORS, strict=True):
        given = call.argument(position)
        held = module._parameters.get(name, module._buffers.get(name))
        seen = "" if given is None else recording.values[moved_from(recording, given)].name
        if (held is not None or given is not None) and seen not in {f"{own}.{name}" for own in names}:
            strange.append(f"its {name} is {seen or 'made in forward' if given is not None else 'not used'}")
    eps = call.args[EPS[call.name]]
    if eps != module.eps:
        strange.append(f"its eps is {eps:g}, and {module.eps:g} outside of forward")
    require(
        not strange,
        "written-in-forward",
        f"forward has {member.path} normalise by something else than its own numbers",
        evidence=tuple(strange),
        remedy="leave the group out: other inputs may use other numbers",
    )


def _affine_inside(recording: Recording, member: Member, visit: Visit, flow: Sequence[Call]) -> None:
    """An unknown class has to scale and shift its one input by its own tensors; a probe does the rest."""
    coming = set(visit.takes)
    for call in flow:
        operands = foreign(recording, visit, call)
        one = len(operands) == 1 and operands <= coming
        require(
            one and (call.name in NORMS or call.name in AFFINE | MOVES),
            "not-affine",
            f"{type(member.module).__name__} does more than scale and shift: {call.name}",
            evidence=(recording.described(call),),
            remedy=_TEACH,
        )
        coming.update(call.makes)


def _remainder(recording: Recording, member: Member, visit: Visit, affine: Call) -> None:
    """What stays of a norm with submodules has to be those, once each and in their order."""
    children = [name for name, child in member.module._modules.items() if child is not None]
    called = recording.visits_in(visit)
    value = affine.makes[0]
    for name, child in zip(children, called, strict=False):
        right = child.path == recording.first_name[f"{member.path}.{name}"] and child.takes == (value,)
        require(
            right and len(child.gives) == 1,
            "not-affine",
            f"{member.path} does not call its submodules in a row, once each, after it has normalised",
            evidence=(f"{child.path} was called where {name} was expected",),
            remedy=_TEACH,
        )
        value = child.gives[0]
    while (after := _moved(recording, value, visit)) is not None:
        value = after
    require(
        len(called) == len(children) and visit.gives == (value,),
        "not-affine",
        f"{member.path} does something else than normalise and call its submodules in a row",
        evidence=tuple(recording.described(call) for call in flowing(recording, visit)),
        remedy=_TEACH,
    )


def _moved(recording: Recording, value: int, visit: Visit) -> int | None:
    readers = recording.readers(value)
    if value in visit.gives or len(readers) != 1 or readers[0].number not in visit.calls:
        return None
    return readers[0].makes[0] if readers[0].name in MOVES else None


def _uses_batch(call: Call) -> bool:
    if call.name in ALWAYS_BATCH:
        return True
    position = NORMS.get(call.name)
    return position is not None and position < len(call.args) and call.args[position] is True
