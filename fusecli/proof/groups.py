"""Is one group still the same function? Its region before and after the fold, on the same random numbers.

Only the tensors of one group are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusecli.checkpoint import StoredTensor
from fusecli.graph.materialise import in_eval_mode, in_float64, probe_input, with_tensors
from fusecli.outcome import Judgement
from fusecli.proof.compare import MOST, TOLERANCE, Difference, Incomparable, compare, floating_error
from fusecli.proof.noise import narrowest, tolerance
from fusecli.proof.power import PERTURBATION, put_off
from fusecli.proof.region import Inputs, Modules, Region, Turn
from fusecli.proof.run import float64_arithmetic
from fusecli.proof.stored import holds_fold
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite, stand_in_model
from fusecli.sample import Sample


class Planned(Protocol):
    """How one group is fused, as the engine has decided it."""

    @property
    def members(self) -> tuple[str, ...]: ...
    @property
    def rewrite(self) -> Callable[[Modules], Rewrite]: ...
    @property
    def region(self) -> Region | None: ...
    @property
    def custom(self) -> bool: ...


@dataclass(frozen=True)
class GroupCheck:
    """What was seen of one group.

    ran         whether a run called it, or nobody could look
    difference  of the fold from the original, in float64
    noticed     the difference that 1 % of error in its weights makes
    drift, noise_floor  errors of fold and original in the stored dtype
    order       its place in the order of the run
    """

    members: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    ran: bool = True
    difference: Difference = field(default_factory=Difference)
    noticed: float = 0.0
    drift: float | None = None
    noise_floor: float | None = None
    trouble: str = ""
    undefined: bool = False
    misstored: bool = False
    order: int | None = None

    @property
    def differs(self) -> bool:
        return bool(self.trouble) or self.difference.error > self.tolerance

    @property
    def overflown(self) -> bool:
        return self.drift == math.inf and math.isfinite(self.noise_floor or 0.0)

    @property
    def tolerance(self) -> float:
        return tolerance(self.noise_floor, self.dtype)

    @property
    def judgement(self) -> Judgement:
        if self.differs or self.misstored:
            return Judgement.DIFFERENT
        return Judgement.INCONCLUSIVE if self.why else Judgement.EQUIVALENT

    @property
    def why(self) -> str:
        """One sentence where the judgement is not `equivalent`."""
        if self.trouble:
            return self.trouble
        if self.differs:
            number = f"relative error {self.difference.error:.1e} in float64"
            return self.difference.why or number
        if self.misstored:
            return "its stored tensors do not hold the fold"
        if not self.ran:
            return "the inputs never executed it"
        if self.undefined:
            return "it returns NaN in the original too, which equals nothing"
        if self.noticed <= self.tolerance:
            return "the inputs do not notice weights that are off by 1 %"
        return ""


@dataclass(frozen=True)
class Row:
    """Members that are believed to follow each other, where no run has shown them: run in a row."""

    members: tuple[str, ...]
    drawable = True

    def drawn(self, modules: Modules, seed: int, *, small: bool) -> Inputs:
        x = probe_input(modules[self.members[0]], torch.Generator().manual_seed(seed))
        return Inputs({0: x})

    def stored(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        return Inputs({0: inputs.numbers[0].to(dtype)})

    def of(self, modules: Modules, inputs: Inputs) -> tuple[Tensor, ...]:
        y: Tensor = inputs.numbers[0].clone()
        for path in self.members:
            y = modules[path](y)
        return (y,)


@dataclass(frozen=True)
class Exact:
    """A group in float64, before and after its fold, and the exact tensors of that by the key that they have
    before the edits."""

    before: Modules
    after: Modules
    tensors: Mapping[str, Tensor]
    edits: tuple[Any, ...]


Member = Callable[[str], nn.Module]


def exact_fold(
    group: Planned, member: Member, made: Member | None, key: Callable[[str], str | None]
) -> Exact:
    """The fold of one group in float64, not rounded.

    member  gives a module of the original as it is stored
    made    a module of the fold, to be run with the exact tensors; None: it is what the rewrite makes of it
    """
    before = members_of(group, member, lambda _, module: in_float64(module))
    with float64_arithmetic():  # what computes a weight is run here too
        rewrite = group.rewrite(before)
        if made is None:
            return Exact(before, edited(before, rewrite), rewrite.tensors, tuple(rewrite.edits))
    exact = {new: tensor for name, tensor in rewrite.tensors.items() if (new := key(name)) is not None}

    def fetch(name: str, old: Tensor) -> Tensor:
        value = exact.get(name, old)
        value = value if value.shape == old.shape else old
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()

    after = members_of(group, made, lambda path, module: with_tensors(module, fetch, f"{path}."))
    return Exact(before, after, rewrite.tensors, tuple(rewrite.edits))


def edited(modules: Modules, rewrite: Rewrite) -> dict[str, nn.Module]:
    """Copies of the members of a group with the rewrite done."""
    outer = {path: module for path, module in modules.items() if not _inside(path, modules)}
    fresh = {path: with_tensors(module, lambda _, old: old) for path, module in outer.items()}
    tree = ModuleTree(stand_in_model(fresh))
    apply_rewrite(tree, rewrite)
    return {path: tree[path] for path in modules if path in tree.modules}


def _same_tensors(_: str, module: nn.Module) -> nn.Module:
    return with_tensors(module, lambda _, old: old)


def members_of(
    group: Planned, member: Member, copy: Callable[[str, nn.Module], nn.Module] = _same_tensors
) -> dict[str, nn.Module]:
    """Copies of the members, in eval mode; of those inside of others the very modules that these hold."""
    outer = {
        path: in_eval_mode(copy(path, member(path)))
        for path in group.members
        if not _inside(path, group.members)
    }
    if len(outer) == len(group.members):
        return outer
    known = ModuleTree(stand_in_model(outer))
    return {path: known[path] for path in group.members}


def members_of_copies(modules: Modules) -> dict[str, nn.Module]:
    """Copies with the same numbers; of modules inside of others the very modules that the copies hold."""
    outer = {
        path: with_tensors(module, lambda _, old: old.detach())
        for path, module in modules.items()
        if not _inside(path, modules)
    }
    tree = ModuleTree(stand_in_model(outer))
    return {path: tree[path] for path in modules}


def _inside(path: str, paths: Any) -> bool:
    return any(path.startswith(f"{other}.") for other in paths)


def misstored(
    group: Planned, exact: Exact, stored: Mapping[str, StoredTensor], key: Callable[[str], str | None]
) -> list[str]:
    """The keys of a group's folded tensors that do not hold the exact ones, rounded once."""
    wrong = []
    for name, value in exact.tensors.items():
        new = key(name)
        if new is None:
            continue
        if new not in stored or not holds_fold(value, stored[new].load(), True, group.custom):
            wrong.append(new)
    return wrong


@torch.no_grad()
def judge_group(
    group: Planned,
    exact: Exact,
    plain: tuple[Modules, Modules],
    seed: int,
    seen: Mapping[Turn, Sample] | None = None,
) -> GroupCheck:
    """What is seen of one group.

    plain   its modules before and after the fold, as they are stored
    seen    what its members were called with in a run; None: random numbers are drawn

    Raises NotDrawn where nothing is proven on random numbers: what flowed into it in a run has to be taken.
    """
    part = group.region or Row(group.members)
    order = part.visits[0].number if isinstance(part, Region) and part.visits else None
    before, after = plain
    parameters = [parameter for module in before.values() for parameter in module.parameters()]
    dtype = narrowest(parameters or [b for module in before.values() for b in module.buffers()])
    check = GroupCheck(group.members, dtype, order=order)
    inputs, expected, difference = _compared(part, exact, seed, seen)
    # A fuser may be right for what flows there only.
    if seen is None and (difference.undefined or (group.custom and difference.error > TOLERANCE)):
        raise NotDrawn
    if difference.undefined:
        return replace(check, undefined=True)
    check = replace(check, difference=difference, noticed=_noticed(part, exact, inputs, expected))
    if seen is None and check.noticed <= MOST:
        raise NotDrawn
    try:
        narrow = part.stored(inputs, dtype)
        noise = floating_error(expected, part.of(before, narrow))
        drift = floating_error(expected, part.of(after, narrow))
    except Exception:  # e.g. an op that this CPU build has not got in float16
        return check
    return replace(check, noise_floor=noise or 0.0, drift=drift or 0.0)


class NotDrawn(Exception):
    """A group shows nothing on random numbers."""


def _compared(
    part: Region | Row, exact: Exact, seed: int, seen: Mapping[Turn, Sample] | None
) -> tuple[Inputs, Any, Difference]:
    """The inputs, what the original makes of them, and how the fold differs; on small inputs where that
    shows the same."""
    if seen is not None:
        assert isinstance(part, Region)
        inputs = part.seen(seen, seed)
        return inputs, *_difference(part, exact, inputs)
    if not part.drawable:
        raise NotDrawn
    found = None
    for small in (True, False):
        try:
            inputs = part.drawn(exact.before, seed, small=small)
            found = inputs, *_difference(part, exact, inputs)
        except Incomparable:
            raise
        except Exception:  # whatever a forward may raise on other sizes, or on numbers it is not made for
            continue
        if found[2].error <= TOLERANCE:
            break
    if found is None:
        raise NotDrawn
    return found


def _difference(part: Region | Row, exact: Exact, inputs: Inputs) -> tuple[Any, Difference]:
    with float64_arithmetic():
        expected = part.of(exact.before, inputs)
        if not expected:
            return expected, Difference()
        try:
            given = part.of(exact.after, inputs)
        except (Incomparable, LookupError) as odd:
            raise Incomparable(str(odd)) from odd
        except Exception as error:
            return expected, Difference(
                math.inf, "", f"the fused group raises {type(error).__name__}: {error}"
            )
        return expected, compare(expected, given, channels=True)


def _noticed(part: Region | Row, exact: Exact, inputs: Inputs, expected: Any) -> float:
    """How far 1 % of error in the weights moves it; of what has none, an output that is."""
    tensors = (chain(module.parameters(), module.buffers()) for module in exact.after.values())
    if next(chain.from_iterable(tensors), None) is None:
        return compare(expected, tuple(t * (1 + PERTURBATION) for t in expected)).error
    noisy = members_of_copies(exact.after)
    put_off(list(noisy.values()), list(exact.before.values()))
    with float64_arithmetic():
        try:
            return compare(expected, part.of(noisy, inputs)).error
        except Exception as error:
            raise Incomparable(str(error)) from error


@contextmanager
def watching(model: nn.Module, groups: Sequence[Planned]) -> Iterator[list[dict[Turn, Sample]]]:
    """Inside, what the members of `groups` are called with in a run of `model`, call by call."""
    found: list[dict[Turn, Sample]] = [{} for _ in groups]
    handles = []

    def hook(calls: dict[Turn, Sample], path: str) -> Callable[..., None]:
        turns = count()

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path, next(turns)] = Sample(args, kwargs).copy()

        return enter

    for group, calls in zip(groups, found, strict=True):
        enclosing = group.region.enclosing if group.region is not None else ()
        for path in group.members:
            if path not in enclosing:
                module = model.get_submodule(path)
                handles.append(
                    module.register_forward_pre_hook(hook(calls, path), prepend=True, with_kwargs=True)
                )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
