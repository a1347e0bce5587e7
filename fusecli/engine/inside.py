"""What a member of a group does inside its own calls: a layer applies a weight, a norm is a fixed affine."""

from __future__ import annotations

from collections.abc import Sequence

from fusecli.engine.decisions import Member
from fusecli.errors import NotFoldable, UsageError, require
from fusecli.graph.dataflow import Call, Recording, Visit, described
from fusecli.graph.kinds import is_exact
from fusecli.graph.ops import AFFINE, ALWAYS_BATCH, MOVES, NORMS
from fusecli.graph.record import Run
from fusecli.graph.sites import Site, adds_bias, flowing, layer_sites, strangers

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TEACH = "teach it with extra_mappings (treat, or sequence and fuser) or leave it out"


def untouched(recording: Recording, path: str) -> None:
    """Guard: forward writes to no tensor of the module, and nobody else reads one."""
    written = sorted(f"{path}.{name}" for name in _VECTORS if f"{path}.{name}" in recording.written)
    require(
        not written,
        "written-in-forward",
        f"forward writes to {', '.join(written)}",
        remedy="leave the group out",
    )
    readers = strangers(recording, path)
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


def layer_at_work(run: Run, member: Member) -> list[Site]:
    """Where a layer applies its weight: once in each call, with a bias that is added. Raises NotFoldable."""
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
    _bias_is_read(run, member)
    return sites


def _bias_is_read(run: Run, member: Member) -> None:
    """A bias that the fold adds or changes has to reach the output of every call."""
    recording, path = run.recording, member.path
    if member.module._parameters.get("bias") is None:
        if is_exact(member.module):
            return
        try:
            recording = run.with_biases([path])
        except UsageError as error:
            raise NotFoldable(
                "bias-not-read", f"{path} does not run with a bias", evidence=(str(error),), remedy=_TEACH
            ) from error
    visits = recording.visits_of(path)
    read = [
        any(
            any(adds_bias(recording, call, value, path) for value in call.reads)
            for call in flowing(recording, visit)
        )
        for visit in visits
    ]
    require(
        all(read),
        "bias-not-read",
        f"{path} does not add a bias that it is given",
        evidence=(f"{type(member.module).__name__} read it in {sum(read)} of {len(read)} calls",),
        remedy=_TEACH,
    )


def norm_at_work(recording: Recording, member: Member) -> list[Site]:
    """Where a norm reads and writes: one tensor from one tensor, by a fixed affine and then its submodules in
    a row. Raises NotFoldable."""
    untouched(recording, member.path)
    visits = recording.visits_of(member.path)
    return [_norm_site(recording, member, visit, turn) for turn, visit in enumerate(visits)]


def _norm_site(recording: Recording, member: Member, visit: Visit, turn: int) -> Site:
    path = member.path
    flow = flowing(recording, visit)
    weights = [value for value in visit.takes if recording.values[value].constant]
    require(
        not weights,
        "norm-on-weights",
        f"{path} normalises weights, not activations",
        evidence=tuple(", ".join(sorted(recording.values[value].origins)) for value in weights),
    )
    for call in flow:
        require(
            not _uses_batch(call),
            "batch-statistics",
            f"{path} normalises by the statistics of the batch, in eval mode too",
            evidence=(recording.described(call),),
            remedy="set momentum and track_running_stats as for inference, or leave it out",
        )
    if not is_exact(member.module):
        _affine_inside(recording, member, flow)
    inner = [call for call in flow if call.name in NORMS or not is_exact(member.module)] or flow
    require(bool(inner), "not-affine", f"{path} computes nothing from its input", remedy=_TEACH)
    _remainder(recording, member, visit, inner[-1])
    made = set(range(visit.calls.start, visit.calls.stop))
    entries = {
        value
        for call in flow
        for value in call.reads
        if not recording.values[value].constant and recording.values[value].made_by not in made
    }
    require(
        len(entries) == 1 and len(visit.gives) == 1,
        "not-affine",
        f"{path} does not make one tensor from one tensor",
        remedy=_TEACH,
    )
    return Site(path, turn, frozenset(made), entries.pop(), visit.gives[0])


def _affine_inside(recording: Recording, member: Member, flow: Sequence[Call]) -> None:
    for call in flow:
        operands = {value for value in call.reads if not recording.values[value].constant}
        require(
            call.name in NORMS or (call.name in (AFFINE | MOVES) and len(operands) == 1),
            "not-affine",
            f"{type(member.module).__name__} does more than scale and shift: {call.name}",
            evidence=(recording.described(call),),
            remedy=_TEACH,
        )


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
