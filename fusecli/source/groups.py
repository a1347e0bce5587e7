"""The groups that a spec lists, bound to the names of a source, and the structure that they are found in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from fusecli.engine import Group
from fusecli.errors import Problem, UsageError
from fusecli.graph.kinds import LAYER_KINDS, is_norm, kind_of
from fusecli.source.learned_scales import Trained
from fusecli.source.source import Source, Structure
from fusecli.source.stand_ins import adapted_groups, module_names, stand_ins
from fusecli.spec import Spec
from fusecli.spec.groups import GroupSpec
from fusecli.spec.names import NameTree
from fusecli.spec.wildcards import bind_groups


def structure_and_groups(source: Source, spec: Spec) -> tuple[Source, Structure, list[Group]]:
    """What is planned on, with the groups that the spec and the checkpoint ask for; and the source, with what
    had to be assumed where nobody has the model's code. Raises UsageError."""
    if source.build is None:
        return _of_tensors(source, spec)
    structure = source.structure()
    modules = structure.tree.modules
    groups = groups_of(spec, structure.names)
    if (trained := source.trained) is not None:
        kinds = {path: kind_of(modules[path]) for group in groups for path in group.modules}
        groups = trained_groups(
            trained,
            groups,
            lambda path: is_norm(modules[path]),
            lambda path: kinds[path] in LAYER_KINDS,
            spec.exclude,
        )
    return source, structure, groups


def _of_tensors(source: Source, spec: Spec) -> tuple[Source, Structure, list[Group]]:
    if spec.bake:
        fix = "give --model and --input, or model and inputs in the spec"
        what = "the model's code computes its weights, and it is not known"
        raise UsageError(Problem(what, spec.where(("bake",)), fix))
    groups = groups_of(spec, module_names(source.checkpoint), optional_from=2)
    if (trained := source.trained) is not None:
        stored = source.checkpoint.tensors
        groups = trained_groups(
            trained,
            groups,
            lambda path: f"{path}.running_mean" in stored,
            lambda path: f"{path}.weight" in stored and f"{path}.running_mean" not in stored,
            spec.exclude,
        )
    groups += adapted_groups(source, groups)
    return *stand_ins(source, groups, dict(spec.assume)), groups


def groups_of(spec: Spec, names: Sequence[str], optional_from: int | None = None) -> list[Group]:
    """The spec's groups bound to names; raises UsageError with all problems."""
    bound = bind_groups(spec, names, optional_from=optional_from, shared_last=optional_from is None)
    return [Group(group.modules, group.where, _hints(group.spec)) for group in bound]


def _hints(group: GroupSpec) -> dict[str, Any]:
    return {name: getattr(group, name) for name in ("kind", "groups", "stride", "eps")}


def trained_groups(
    trained: Trained,
    groups: Sequence[Group],
    is_norm: Callable[[str], bool],
    is_layer: Callable[[str], bool],
    exclude: Collection[str] = (),
) -> list[Group]:
    """The groups that fold a norm, and those of the layers with a norm inside that nobody has listed or
    excluded. What only makes a container of a layer and its activation is left out: there are none."""
    norms = {path for group in groups for path in group.modules if is_norm(path)}
    kept = [
        group
        for group in groups
        if norms & {*group.modules[1:]} or (group.modules[0] in norms and any(map(is_layer, group.modules)))
    ]
    held = {path for group in kept for path in group.modules}
    excluded = NameTree([path for pair in trained.norms.items() for path in pair], exclude).excluded
    unlisted = ((layer, norm) for layer, norm in trained.norms.items() if layer not in held)
    kept += [Group(pair) for pair in unlisted if not any(map(excluded, pair))]
    return [_with_trained_hints(group, trained) for group in kept]


def _with_trained_hints(group: Group, trained: Trained) -> Group:
    hints = {**trained.hints.get(group.modules[0], {}), **{k: v for k, v in group.hints.items() if v}}
    return replace(group, hints=hints)
