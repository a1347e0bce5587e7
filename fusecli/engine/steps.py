"""Waves of steps: one rule application after the other on the same modules, in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusecli.algebra import round_once
from fusecli.engine.decisions import Modules
from fusecli.engine.promises import keeps_promise
from fusecli.errors import NotFoldable, require
from fusecli.graph.kinds import FOLDABLE, LAYER_KINDS, NORM_KINDS, NOTHING, is_exact
from fusecli.graph.lift import channel_affine
from fusecli.graph.materialise import probe_inputs, with_tensors
from fusecli.proof.compare import TOLERANCE, compare
from fusecli.proof.probe import worst_of
from fusecli.proof.run import float64_arithmetic
from fusecli.rewrite import (
    Edit,
    Identity,
    KeyMap,
    ModuleTree,
    Passed,
    Rewrite,
    Zero,
    apply_rewrite,
    stand_in_model,
)
from fusecli.rules import Rule
from fusecli.rules._member import Member, Route


@dataclass(frozen=True)
class Operand:
    """What a rule is called with, but for its tensors."""

    path: str
    kind: str
    route: Route | None = None

    def member(self, modules: Modules) -> Member:
        return Member(self.path, modules[self.path], self.kind, self.route)


@dataclass(frozen=True)
class Step:
    """One application of one rule."""

    rule: Rule
    operands: tuple[Operand, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(operand.path for operand in self.operands)

    def rewrite(self, modules: Modules) -> Rewrite:
        return self.rule.rewrite(*(operand.member(modules) for operand in self.operands))


Wave = tuple[
    Step, ...
]  # steps that are done at once: a map leaves its place, each layer on its ways takes it


def by_waves(waves: Sequence[Wave]) -> Callable[[Modules], Rewrite]:
    """The rewrite that these waves come down to: every tensor is computed in float64 and rounded once."""

    def rewrite(modules: Modules) -> Rewrite:
        # Those around others first: they stand without them.
        tree = ModuleTree(stand_in_model({path: _wide(path, modules) for path in sorted(modules)}))
        done = Rewrite()
        for wave in waves:
            at_once = _together([step.rewrite(tree.modules) for step in wave])
            apply_rewrite(tree, at_once)
            done = done + at_once
        gone = KeyMap(done.edits)
        kept = {key: tensor for key, tensor in done.tensors.items() if gone(key) is not None}
        return Rewrite({key: _rounded(key, tensor, modules) for key, tensor in kept.items()}, done.edits)

    return rewrite


def _together(rewrites: Sequence[Rewrite]) -> Rewrite:
    """Rewrites of the same modules as they are now; a module that leaves its place does so once."""
    tensors: dict[str, Tensor] = {}
    edits: dict[object, Edit] = {}
    for found in rewrites:
        tensors |= found.tensors
        for edit in found.edits:
            leaves = isinstance(edit, Identity | Passed | Zero)
            key = edit.path if leaves else edit
            known = edits.get(key)
            if isinstance(edit, Passed) and isinstance(known, Passed):
                edit = Passed(edit.path, tuple(dict.fromkeys((*known.members, *edit.members))))
            elif known is not None:
                continue
            edits[key] = edit
    # What is still needed for another edit leaves last.
    ordered = sorted(edits.values(), key=lambda edit: isinstance(edit, Identity | Passed | Zero))
    return Rewrite(tensors, tuple(ordered))


def _wide(path: str, modules: Modules) -> nn.Module:
    """A copy with float64 tensors, without the submodules that are members themselves."""
    module = modules[path]
    if any(other.startswith(f"{path}.") for other in modules):
        alone = object.__new__(type(module))
        alone.__dict__.update(module.__dict__)
        alone.__dict__["_modules"] = {}
        module = alone
    return with_tensors(module, lambda _, old: old.double() if old.is_floating_point() else old)


def _rounded(key: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """In the dtype that the tensor has, or if it is new that of the weight beside it, or of another one."""
    path, _, name = key.rpartition(".")
    module = modules[path]
    beside = [module._parameters.get(name), module._buffers.get(name), module._parameters.get("weight")]
    others = (other._parameters.get("weight") for other in modules.values())
    old = next(tensor for tensor in (*beside, *others) if tensor is not None)
    if tensor.dtype is old.dtype:
        return tensor
    return round_once(tensor, old.dtype) if tensor.dtype is torch.float64 else tensor.to(old.dtype)


def prove_strangers(waves: Sequence[Wave], shown: frozenset[str], modules: Modules) -> None:
    """Guard for members whose class is not known: each does what its kind says, on random input in float64.

    A layer that only its outputs are scaled of may move over its input as it likes; one that takes over what
    comes before it has to be the convolution or the linear layer that its attributes say. What a run has
    shown op by op (a scale, a gain, the outputs of the layers in `shown`) needs no proof. Raises NotFoldable.
    """
    tree = ModuleTree(stand_in_model({path: _wide(path, modules).eval() for path in sorted(modules)}))
    for wave in waves:
        rewrites = [step.rewrite(tree.modules) for step in wave]
        strange = {o.path for step in wave for o in step.operands if not is_exact(tree[o.path])}
        expected = {path: _behaviour(path, wave, tree, path in shown) for path in sorted(strange)}
        known = {path: behaviour for path, behaviour in expected.items() if behaviour is not None}
        scaled = {step.paths[0] for step in wave if _scales(step)}
        # What is no scaled layer has to keep its promise as it is: the fold gives it other tensors.
        for path in known.keys() - scaled:
            _require_equal(tree[path], path, *known[path])
        apply_rewrite(tree, _together(rewrites))
        for path in known.keys() & scaled:
            _require_equal(tree[path], path, *known[path])


def _scales(step: Step) -> bool:
    return step.rule.equation == "fold_output" and step.operands[0].kind in LAYER_KINDS


Behaviour = tuple[Sequence[tuple[Tensor, Tensor]], str]


def _behaviour(path: str, wave: Wave, tree: ModuleTree, shown: bool) -> Behaviour | None:
    """Random inputs for a member, with what it should give for each, and the code if it does not."""
    for step in wave:
        for operand in step.operands:
            if operand.path != path or operand.kind not in FOLDABLE:
                continue
            if shown and step.rule.equation == "fold_output":
                return None
            module, member = tree[path], operand.member(tree.modules)
            code = "not-affine" if operand.kind in NORM_KINDS else "not-linear-in-weight"
            with _probing(module, code):
                inputs = list(probe_inputs(module, 0x5EED))
                if operand.kind in NORM_KINDS:
                    return [(x, channel_affine(module)(x)) for x in inputs], code
                if step.rule.equation == "fold_output":
                    after = step.operands[1].member(tree.modules).affine
                    return [(x, after(_run(module, x))) for x in inputs], code
                return [(x, member.op(x)) for x in inputs], code
    return None


@contextmanager
def _probing(module: nn.Module, code: str) -> Iterator[None]:
    try:
        yield
    except NotFoldable:
        raise
    except Exception as error:  # whatever somebody's forward may raise
        message = f"{type(module).__name__} could not be probed: {type(error).__name__}: {error}"
        raise NotFoldable(code, message, remedy=_TEACH) from error


def _run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), float64_arithmetic():
        y: Tensor = module(x.clone())
        return y


def _require_equal(module: nn.Module, path: str, meant: Sequence[tuple[Tensor, Tensor]], code: str) -> None:
    with _probing(module, code):
        difference = worst_of([compare(meaning, _run(module, x)) for x, meaning in meant])
    if difference.error > TOLERANCE and code == "not-affine":
        inside = [child for child in module._modules.values() if child is not None]
        acting = ", ".join(type(child).__name__ for child in inside if type(child) not in NOTHING)
        require(
            not (inside and keeps_promise(module)),
            "activation-inside",
            f"{path} ({type(module).__name__}) has an activation inside, {acting}, and no single layer "
            "stands directly in front of it",
        )
    require(
        difference.error <= TOLERANCE,
        code,
        f"a float64 probe disproves the fold: {path} ({type(module).__name__}) computes something else than "
        "its base",
        evidence=(f"relative error {difference.error:.1e} {difference.why}".strip(),),
        remedy=_TEACH,
    )


_TEACH = "teach it with extra_mappings (sequence and fuser) or leave it out"
