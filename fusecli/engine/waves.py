"""Folds of more than a chain: one map into all the layers it comes from, or goes to; branches into one layer.

A wave is what has to be done at once: a map leaves its place, and every layer on its routes takes it over.
Waves follow each other to a fixpoint, in the order of their equations: into producers (the last map first,
so that of two in a row the second goes into the first), into consumers, sums of branches, products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from fusecli.algebra import ChannelAffine
from fusecli.engine.audit import SIZE_ONE
from fusecli.engine.branches import Branch, Sum, sums
from fusecli.engine.clones import clones
from fusecli.engine.decisions import Decision, Group, Member
from fusecli.engine.known import Known
from fusecli.engine.maps import Map
from fusecli.engine.products import rows
from fusecli.engine.routes import Routes, Way
from fusecli.engine.steps import Operand, Step, Wave, by_waves, prove_strangers
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Recording
from fusecli.graph.kinds import LAYER_KINDS
from fusecli.graph.lift import linear_op
from fusecli.graph.materialise import with_tensors
from fusecli.graph.ops import RESHAPES
from fusecli.outcome import Evidence
from fusecli.proof.region import Region
from fusecli.rewrite import ModuleTree, apply_rewrite, stand_in_model
from fusecli.rules import Rule, all_rules
from fusecli.rules._member import Route


@dataclass
class Search:
    """Looks for waves among the modules that `may` take part.

    strict  a shift under zero padding is refused without looking at its numbers
    rules   the names of those that may be used
    restructure, clone  whether rules may be used that change a layer's class, or store it several times

    What it leaves behind: `refused`, why maps stay where they are; `below`, why they cannot go into the
    layers after them; `bare`, layers that could take over their own input, if no operator added it.
    """

    known: Known
    may: Callable[[str], bool]
    strict: bool = False
    rules: Collection[str] | None = None
    restructure: bool = False
    clone: bool = False
    refused: dict[str, NotFoldable] = field(default_factory=dict)
    below: dict[str, NotFoldable] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)

    def waves(self, gone: Collection[str] = ()) -> list[Wave]:
        """Every wave there is, in the order they have to be done; `gone` are maps that are folded already."""
        self.refused |= {path: no for path, no in self.known.refused.items() if self.may(path)}
        routes = Routes(self.known.audit, self.known.maps, self.may, self.known.layer_sites, set(gone))
        waves: list[Wave] = []
        # What has left its place may have stood between two others.
        while found := [*self._moved(routes, up=True), *self._moved(routes, up=False)]:
            waves += found
        if self.clone:
            waves += self._cloned(routes)
        biased = {path for wave in waves for step in wave for path in step.paths}
        changed = {step.paths[1] for wave in waves for step in wave if step.rule.restructures}
        sums = list(self._summed(routes, changed))
        summed = changed | {path for wave in sums for step in wave for path in step.paths}
        return [*waves, *sums, *self._multiplied(routes, biased, summed)]

    def _moved(self, routes: Routes, *, up: bool) -> Iterator[Wave]:
        for found in self.known.maps:
            if found.path in routes.gone or not self.may(found.path):
                continue
            try:
                wave = self._wave(routes, found, up=up)
            except NotFoldable as no:
                if up or no.code in TELLING:
                    self.refused[found.path] = no
                if not up:
                    self.below[found.path] = no
                continue
            routes.gone.add(found.path)
            self.refused.pop(found.path, None)
            yield wave

    def _wave(self, routes: Routes, found: Map, *, up: bool) -> Wave:
        self._same_dtype(found)
        ways = routes.up(found) if up else routes.down(found)
        hooks = found.member.module._forward_hooks or found.member.module._forward_pre_hooks
        require(
            len(ways) == 1 or not hooks,
            "shared-module",
            f"{found.path} has hooks, which cannot follow it into several layers",
            remedy="take the hooks off first",
        )
        return tuple(self._step(found, way, up=up) for way in ways)

    def _step(self, found: Map, way: Way, *, up: bool) -> Step:
        kinds = (way.target.kind, found.member.kind) if up else (found.member.kind, way.target.kind)
        moving = Operand(
            found.path,
            found.member.kind,
            Route(way.channels, way.shifts, found.affine, found.neutral, found.calls),
        )
        target = Operand(way.target.path, way.target.kind)
        if up:
            return Step(rule_for("fold_output", kinds, self.rules), (target, moving))
        bordered = self.restructure and self._pads_zeros(found, way)
        rule = rule_for("fold_input", kinds, self.rules, restructures=bordered)
        if self.strict and not bordered:
            self._require_passed(found, way)
        return Step(rule, (moving, target))

    def _pads_zeros(self, found: Map, way: Way) -> bool:
        """Whether a shift meets zeros that it does not reach."""
        if way.target.kind != "conv" or not found.affine(found.member.module).shifts:
            return False
        return linear_op(way.target.module, transposed=False).geometry.zero_bordered

    def _require_passed(self, found: Map, way: Way) -> None:
        """Guard: a shift goes through the layer whatever its numbers are."""
        layer = way.target
        if layer.kind not in LAYER_KINDS or not found.affine(found.member.module).shifts:
            return
        op = linear_op(layer.module, transposed=layer.kind == "conv_transpose")
        require(
            not op.geometry.zero_bordered,
            "padding-border",
            f"outputs of {layer.path} at the border read zeros that the shift never reached",
            remedy="keep both layers, or let the layer pad with other values: --allow-restructure",
        )
        require(
            layer.kind != "conv_transpose" or op.pointwise,
            "transposed-shift",
            "each output of a transposed conv sums other taps, so the shift does not become a bias",
            remedy="keep both layers",
        )

    def _same_dtype(self, found: Map) -> None:
        for site in found.sites:
            if site.entry is not None and found.member.kind != "gain":
                before, after = (
                    self.known.audit.recording.values[v].dtype for v in (site.entry, site.exit or 0)
                )
                require(
                    before == after,
                    "dtype",
                    f"{found.path} turns {before} into {after}",
                    remedy="convert it first",
                )

    def _cloned(self, routes: Routes) -> Iterator[Wave]:
        """Layers that are called several times, each time with a norm of its own behind them."""
        for path in self.known.audit.recording.names:
            layer = self.known.audit.member(path) if path and self.may(path) else None
            if layer is None or layer.kind not in LAYER_KINDS:
                continue
            try:
                behind = clones(routes, layer, self.known.layer_sites(layer))
                rule = rule_for("fold_output", (layer.kind, "norm"), self.rules, clones=True)
            except NotFoldable:
                continue
            for found, _ in behind:
                routes.gone.add(found.path)
                self.refused.pop(found.path, None)
            if behind:
                yield tuple(
                    Step(
                        rule,
                        (
                            Operand(path, layer.kind),
                            Operand(found.path, "norm", Route(channels, True, found.affine, found.neutral)),
                        ),
                    )
                    for found, channels in behind
                )

    def _summed(self, routes: Routes, changed: Collection[str]) -> Iterator[Wave]:
        """Branches of one sum, one after the other into the layer that stays; those of another class by now
        stay as they are."""
        touched = set(changed)
        for found in sums(routes, self.known.addends, self.known.layer_sites):
            if any(branch.member.path in touched for branch in found.branches):
                continue
            best = max((self._sum(found, base) for base in found.branches), key=len, default=())
            for branch, step in best:
                touched.update(step.paths)
                if branch.map is not None:
                    routes.gone.add(branch.member.path)
                self.refused.pop(branch.member.path, None)
                yield (step,)
            if found.bare and (layer := self._would_take(found)) is not None:
                self.bare.append(layer)

    def _would_take(self, found: Sum) -> str | None:
        """The layer that could take over the tensor itself, if a module gave it."""
        for base in (branch for branch in found.branches if branch.member.kind in LAYER_KINDS):
            op = linear_op(base.member.module, transposed=base.member.kind == "conv_transpose")
            if set(op.geometry.stride) <= {1} and op.in_channels == op.out_channels and base.map is None:
                return base.member.path
        return None

    def _sum(self, found: Sum, base: Branch) -> list[tuple[Branch, Step]]:
        """The other branches that `base` can take over."""
        if base.map is not None or base.member.kind not in LAYER_KINDS or not found.may_stay(base):
            return []
        steps = []
        trying = {b.member.path: on_meta(b.member.module) for b in found.branches}
        for branch in sorted(found.branches, key=lambda b: b.leaf):
            if branch.member.path == base.member.path:
                continue
            try:
                rule = rule_for("sum_parallel", (base.member.kind, branch.member.kind), self.rules)
                route = self._beside(base, branch)
                operands = (
                    Operand(base.member.path, base.member.kind),
                    Operand(branch.member.path, branch.member.kind, route),
                )
                step = Step(rule, operands)
                tree = ModuleTree(stand_in_model(trying))
                apply_rewrite(tree, step.rewrite(tree.modules))
            except NotFoldable as no:
                self.refused.setdefault(branch.member.path, no)
                continue
            trying = {path: tree[path] for path in trying}
            steps.append((branch, step))
        return steps

    def _beside(self, base: Branch, branch: Branch) -> Route | None:
        """What reads the tensor that the layer reads: its channels are the layer's inputs, one to one."""
        op = linear_op(base.member.module, transposed=base.member.kind == "conv_transpose")
        channels = tuple(range(op.in_channels))
        found = branch.map
        if found is None:
            same = partial(_same, op.in_channels)
            return Route(channels, True, same, lambda _: {}) if branch.same else None
        size = self.known.audit.recording.values[base.entry].shape
        axis = len(size) - 1 - op.rank
        require(
            found.axis % len(size) == axis, "bn-axis", f"the channels of {found.path} are not the layer's"
        )
        return Route(channels, True, found.affine, found.neutral, found.calls)

    def _multiplied(self, routes: Routes, biased: Collection[str], summed: Collection[str]) -> Iterator[Wave]:
        """Layers in a row, each into the first that it follows; one that is part of a sum stays."""
        first_of: dict[str, str] = {}
        biased = set(biased)
        work: dict[str, nn.Module] = {}  # what the layers are by then, without numbers
        for one, second in rows(routes, self.known.layer_sites):
            first = self.known.audit.member(first_of.get(one.path, one.path))
            if {first.path, second.path} & set(summed):
                continue
            for member in (first, second):
                work.setdefault(member.path, on_meta(member.module))
            try:
                step = self._product(first, second, work, biased)
            except NotFoldable as no:
                self.refused.setdefault(second.path, no)
                continue
            first_of[second.path] = first.path
            biased.update([first.path] if second.path in biased else [])
            yield (step,)

    def _product(
        self, first: Member, second: Member, work: dict[str, nn.Module], biased: Collection[str]
    ) -> Step:
        rule = rule_for("compose", (first.kind, second.kind), self.rules)
        outer = linear_op(second.module, transposed=False)
        bias = first.path in biased or work[first.path]._parameters.get("bias") is not None
        require(
            not bias or outer.pointwise or not outer.geometry.zero_bordered,
            "padding-border",
            f"{second.path} pads with zeros, not with the bias of {first.path}",
        )
        step = Step(rule, (Operand(first.path, first.kind), Operand(second.path, second.kind)))
        tree = ModuleTree(stand_in_model({path: work[path] for path in step.paths}))
        apply_rewrite(tree, step.rewrite(tree.modules))
        work[first.path] = tree[first.path]
        return step


def _same(channels: int, _: nn.Module) -> ChannelAffine:
    """The map that an nn.Identity is."""
    one = torch.ones(channels, dtype=torch.float64)
    return ChannelAffine(one, torch.zeros_like(one), shifts=False)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy that has shapes and no numbers: enough to see whether a rule takes it."""
    return with_tensors(module, lambda _, old: old.to("meta"))


def wide(
    recording: Recording, group: Group, waves: Sequence[Wave], shown: frozenset[str] = frozenset()
) -> Decision:
    """The decision that these waves make up, with the part of the run that they change."""
    names = dict.fromkeys(step.rule.name for wave in waves for step in wave)
    used = {path for wave in waves for step in wave for path in step.paths}
    members = tuple(path for path in group.modules if path in used)
    enclosing = frozenset(p for p in members if any(other.startswith(f"{p}.") for other in members))
    operands = [operand for wave in waves for step in wave for operand in step.operands]
    inline = frozenset(c for o in operands if o.path in enclosing and o.route for c in o.route.calls)
    region = Region(recording, members, inline, enclosing)
    shapes = [recording.values[value].shape for call in region.calls for value in call.reads]
    blind = any(call.name in RESHAPES for call in region.calls) and any(1 in shape for shape in shapes)
    return Decision(
        group,
        "+".join(names),
        by_waves(waves),
        members,
        tuple(path for path in group.modules if path not in used),
        probe=partial(prove_strangers, waves, shown),
        shown=shown,
        evidence=Evidence.OBSERVED,
        region=region,
        caveats=(SIZE_ONE,) if blind else (),
        leaving=tuple(_leaving(step) for wave in waves for step in wave if _leaving(step)),
    )


def _leaving(step: Step) -> str:
    """The module that a step makes an identity of; "" for none."""
    # Of a layer that is stored in the places of its norms, an identity stays where it was.
    which = {"fold_output": 0 if step.rule.clones else 1, "fold_input": 0, "compose": 1}
    if step.rule.equation not in which:
        return ""
    moving = step.operands[which[step.rule.equation]]
    return "" if moving.kind == "gain" else moving.path


# What says more about a map that stays than that nothing feeds it: why it does not go into the layer
# after it. A list that asks for that was no slip of the pen.
TELLING = ("padding-border", "transposed-shift", "tied-weights", "padded-rows")


def rule_for(
    equation: str,
    kinds: tuple[str, ...],
    allowed: Collection[str] | None,
    *,
    restructures: bool = False,
    clones: bool = False,
) -> Rule:
    """The rule of this equation for exactly these kinds; raises NotFoldable where there is none."""
    fitting = [
        rule
        for rule in all_rules()
        if (rule.equation, rule.restructures, rule.clones) == (equation, restructures, clones)
        and len(rule.pattern) == len(kinds)
        and rule.matches(kinds)
    ]
    for rule in fitting:
        if allowed is None or rule.name in allowed:
            return rule
    require(
        not fitting, "rule-off", f"{', '.join(rule.name for rule in fitting)} would fold it and is turned off"
    )
    raise NotFoldable("no-rule", f"no rule folds {' -> '.join(kinds)}", remedy="'fusecli rules' lists all")
