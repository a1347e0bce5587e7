"""The groups of a spec bound to the modules that exist: patterns expanded, every name checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fusecli.errors import Problem, UsageError
from fusecli.spec import nodes
from fusecli.spec.groups import GroupSpec
from fusecli.spec.load import spec_from_mapping
from fusecli.spec.model import Spec
from fusecli.spec.names import Binding, NameTree
from fusecli.spec.wording import shown

_MOST_NEAREST = 20


@dataclass(frozen=True, slots=True)
class BoundGroup:
    """One group of existing modules, the entry of the spec it came from and where that stands."""

    modules: tuple[str, ...]
    spec: GroupSpec
    where: str


def bind_groups(
    spec: Spec, names: Collection[str], *, optional_from: int | None = None, shared_last: bool = False
) -> list[BoundGroup]:
    """The groups of `spec`, in its order, with patterns expanded over `names` (in the order of `names`).

    Members from index `optional_from` on may be missing from `names`: without model code only modules
    that hold tensors are known, and an activation holds none. With `shared_last` several groups may end in
    the same module: a run of the model will tell whether it belongs to all of them.
    Raises UsageError with every unknown name, name twice in a group, duplicate and overlapping group.
    """
    binder = _Binder(NameTree(names, spec.exclude), spec.where, optional_from, shared_last)
    bound = [group for i, entry in enumerate(spec.groups) for group in binder.bind(i, entry)]
    if optional_from is None:
        binder.check_exclude()
    if len(binder.problems) >= nodes.MOST_PROBLEMS:
        binder.problems.append(Problem("the groups after these are not checked", fix="correct these first"))
    if binder.problems:
        raise UsageError(*binder.problems)
    return bound


def bind_lists(
    groups: Sequence[object],
    names: Collection[str],
    *,
    optional_from: int | None = None,
    alone: bool = False,
) -> list[BoundGroup]:
    """`bind_groups` for plain lists of names, or one list of names; places look like `groups[3]`.

    alone  a group may have one name: somebody's fuser takes modules by themselves
    """
    spec = spec_from_mapping({"groups": groups}, where="", alone=alone)
    return bind_groups(spec, names, optional_from=optional_from)


class _Binder:
    """Binds one entry after the other, and remembers which module belongs to which."""

    def __init__(
        self,
        tree: NameTree,
        where: Callable[[nodes.Path], str],
        optional_from: int | None,
        shared_last: bool,
    ) -> None:
        self.tree = tree
        self.where = where
        self.optional_from = optional_from
        self.shared_last = shared_last
        self.problems: list[Problem] = []
        self._entries: dict[tuple[str, ...], str] = {}
        self._owner: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._compared = 0

    def bind(self, index: int, entry: GroupSpec) -> list[BoundGroup]:
        where = self.where(("groups", index))
        if len(self.problems) >= nodes.MOST_PROBLEMS or not self._well_formed(index, entry, where):
            return []
        if any("*" in name for name in entry.modules):
            expanded = self._expanded(entry, where)
        else:
            self._check_known(index, entry)
            expanded = [entry.modules]
        self._claim(expanded, where)
        return [BoundGroup(modules, entry, where) for modules in expanded]

    def check_exclude(self) -> None:
        """An exclude that excludes nothing is a slip that would fuse what was to be left alone."""
        for i, pattern in enumerate(self.tree.exclude):
            if not self.tree.covers(pattern):
                self._report(
                    f"exclude {shown(pattern)} matches no module", self.where(("exclude", i)), pattern
                )

    def _well_formed(self, index: int, entry: GroupSpec, where: str) -> bool:
        names = entry.modules
        before = len(self.problems)
        if (first := self._entries.setdefault(names, where)) != where:
            self.problems.append(Problem(f"this group is listed already at {first}", where, "remove one"))
        seen: set[str] = set()
        for i, name in enumerate(names):
            if name in seen:
                place = self.where(("groups", index, "modules", i))
                self.problems.append(
                    Problem(f"{shown(name)} stands twice in this group", place, "remove one")
                )
            seen.add(name)
        if len({name.count("*") for name in names}) > 1:
            fix = "the n-th * stands for the same text in each name, so each name has as many"
            self.problems.append(Problem("the names of this group have different numbers of '*'", where, fix))
        return len(self.problems) == before

    def _check_known(self, index: int, entry: GroupSpec) -> None:
        for i, name in enumerate(entry.modules[: self.optional_from]):
            if name not in self.tree:
                self._report(
                    f"no module is named {shown(name)}", self.where(("groups", index, "modules", i)), name
                )

    def _expanded(self, entry: GroupSpec, where: str) -> list[tuple[str, ...]]:
        first, complete, excluded, missing = entry.modules[0], [], 0, None
        for bound in self.tree.bindings(first):
            modules = tuple(_filled(pattern, bound) for pattern in entry.modules)
            absent = next((name for name in modules[: self.optional_from] if name not in self.tree), None)
            if absent is not None:
                missing = missing or absent
            elif any(map(self.tree.excluded, modules)):
                excluded += 1
            else:
                complete.append(modules)
        if not complete:
            self._report_unmatched(first, excluded, missing, where)
        return complete

    def _report_unmatched(self, first: str, excluded: int, missing: str | None, where: str) -> None:
        if excluded:
            what = f"this pattern matches only what exclude leaves out ({excluded} groups)"
            self.problems.append(Problem(what, where, "remove the group or the exclude"))
        elif missing:
            what = f"this pattern matches no complete group: no module is named {shown(missing)}"
            self._report(what, where, missing)
        else:
            self._report(f"no module matches {shown(first)}", where, first)

    def _claim(self, expanded: list[tuple[str, ...]], where: str) -> None:
        """Reports an overlap once for each pair of entries, however many modules they share."""
        reported: set[str] = set()
        for modules in expanded:
            for name in modules:
                owner, taken = self._owner.setdefault(name, (where, modules))
                if self.shared_last and name == modules[-1] == taken[-1]:
                    continue
                if taken is not modules and owner not in reported:
                    reported.add(owner)
                    what = f"{shown(name)} is in another group already, at {owner}"
                    fix = "a module is fused once; a pattern leaves out what exclude names"
                    self.problems.append(Problem(what, where, fix))

    def _report(self, what: str, where: str, name: str) -> None:
        near = self.tree.nearest(name) if self._compared < _MOST_NEAREST else None
        self._compared += 1
        self.problems.append(Problem(what, where, f"did you mean {shown(near)}?" if near else ""))


def _filled(pattern: str, bound: Binding) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(text + piece for text, piece in zip(bound, rest, strict=True))
