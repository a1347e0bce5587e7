"""Modules that a run has seen to do nothing: they give the very tensor that they take."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from fusecli.engine.audit import Audit
from fusecli.engine.decisions import Decision, Group
from fusecli.engine.steps import Operand, Step, by_waves
from fusecli.graph.dataflow import Visit
from fusecli.graph.kinds import NOTHING, is_patched
from fusecli.graph.materialise import with_tensors
from fusecli.outcome import Evidence
from fusecli.proof.region import Region
from fusecli.rules import all_rules

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_EMPTY = (nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)  # nothing would be gained
_SMALL = 8


def idle_modules(audit: Audit) -> Iterator[str]:
    """Those without tensors, hooks or modules of their own; an nn.Identity is one already."""
    if audit.vocabulary.rules is not None and "idle" not in audit.vocabulary.rules:
        return
    for path in audit.recording.names:
        module = audit.tree[path]
        if not path or type(module) in _EMPTY or any(True for _ in module.children()):
            continue
        held = module._parameters or module._buffers or module._forward_hooks or module._forward_pre_hooks
        visits = audit.recording.visits_of(path)
        if not held and visits and all(_gives_what_it_takes(audit, module, visit) for visit in visits):
            shapes = {audit.recording.values[visit.takes[0]].shape for visit in visits}
            known = type(module) in (*NOTHING, *_POOLS) and not is_patched(module)
            if known or all(_idle_for_others(module, s) for s in shapes):
                yield path


def _gives_what_it_takes(audit: Audit, module: nn.Module, visit: Visit) -> bool:
    if not visit.plain or len(visit.takes) != 1 or len(visit.gives) != 1:
        return False
    if type(module) in _POOLS and not is_patched(module):
        return _pools_single_elements(module)
    return visit.takes == visit.gives and not any(audit.recording.alive[number] for number in visit.calls)


def _idle_for_others(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module of an unknown class gives what it takes for other sizes and numbers too: it may pad
    or crop what is not as large as this was."""
    alone = with_tensors(module, lambda _, old: old).eval()
    generator = torch.Generator().manual_seed(0)
    try:
        for more, scale in enumerate((1e-3, 1.0, 1e3), 1):
            sizes = [min(size, _SMALL) + more for size in shape]
            x = torch.randn(sizes, generator=generator) * scale
            with torch.no_grad():
                given = alone(x.clone())
            if not (isinstance(given, Tensor) and torch.equal(given, x)):
                return False
    except Exception:  # whatever somebody's forward may raise
        return False
    return True


def _pools_single_elements(pool: nn.Module) -> bool:
    sizes = [getattr(pool, name) for name in ("kernel_size", "stride")]
    numbers = [n for size in sizes for n in (size if isinstance(size, tuple) else (size,))]
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return prod(numbers) == 1 and not any(padding) and getattr(pool, "divisor_override", None) in (None, 1)


def idle_decision(audit: Audit, group: Group) -> Decision:
    """The decision for a group of one such module."""
    rule = next(rule for rule in all_rules() if rule.name == "idle")
    waves = [(Step(rule, (Operand(group.modules[0], "nothing"),)),)]
    region = Region(audit.recording, group.modules)
    return Decision(
        group,
        rule.name,
        by_waves(waves),
        group.modules,
        probe=lambda _: None,
        evidence=Evidence.OBSERVED,
        region=region,
        leaving=group.modules,
    )
