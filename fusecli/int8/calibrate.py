"""What the observers see: calibration batches, every value finite, and what training has learned already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusecli.errors import Problem, UsageError
from fusecli.int8.flow import fix, observers
from fusecli.int8.torchao import quiet
from fusecli.int8.units import QuantUnit
from fusecli.sample import Sample

Learned = Mapping[str, tuple[Tensor, Tensor]]


def value_names(prepared: GraphModule, units: Sequence[QuantUnit]) -> dict[str, str]:
    """What a value is called, by its node: a weight has its own name, others have their unit's or node's."""
    called = {unit.output: unit.name for unit in units}
    return {
        node.name: str(node.target) if node.op == "get_attr" else f"{called.get(node.name, node.name)}.output"
        for node, _ in observers(prepared)
    }


@torch.no_grad()
def calibrate(
    prepared: GraphModule,
    names: Mapping[str, str],
    batches: Sequence[Sample],
    progress: Callable[[str], None],
) -> None:
    """Runs every batch through the observers.

    Raises UsageError for a value that is not finite or that no batch has, and for batches of sizes that the
    graph does not take.
    """
    seen: set[Any] = set()
    watches: dict[Any, str] = {}
    for node, observer in observers(prepared):
        watches.setdefault(
            observer, names[node.name]
        )  # where several values share it, the others follow this
    handles = [
        observer.register_forward_pre_hook(lambda module, inputs: look(module, inputs[0], watches, seen))
        for observer in watches
    ]
    for index, sample in enumerate(batches, 1):
        progress(f"calibrating, batch {index} of {len(batches)}")
        fresh = sample.copy()
        try:
            with quiet():
                prepared(*fresh.args, **fresh.kwargs)
        except AssertionError as error:
            if "Guard failed" not in str(error):
                raise
            fix = "give all batches the sizes of the first; only the number of samples in a batch may differ"
            raise UsageError(Problem(f"its sizes do not fit: {error}", f"batch {index}", fix)) from None
    for handle in handles:
        handle.remove()
    unseen = [name for observer, name in watches.items() if observer not in seen]
    if unseen:
        fix = "give batches that are not empty"
        raise UsageError(Problem("calibration never saw a value of it", unseen[0], fix))


def look(observer: Any, value: Tensor, watches: Mapping[Any, str], seen: set[Any]) -> None:
    if not torch.isfinite(value).all():
        fix = "look at the calibration inputs, and at the model's weights"
        raise UsageError(Problem("calibration met a value that is not finite", watches[observer], fix))
    if value.numel():
        seen.add(observer)


def teach(
    prepared: GraphModule, names: Mapping[str, str], units: Sequence[QuantUnit], known: Learned
) -> list[str]:
    """Puts learned scales in the place of calibrated ones; returns a note for each that belongs to no value.

    Values of one scale take the first that is known for any of them. Of a layer and the activation in its
    unit the activation's is meant: what is in front of it is no value any more.
    """
    layers = (unit for unit in units if unit.weight)
    aliases = {f"{path}.output": f"{unit.name}.output" for unit in layers for path in unit.modules}
    wanted = {name: name for name in known if name not in aliases}
    wanted |= {value: name for name, value in aliases.items() if name in known}
    done: set[Any] = set()
    for node, observer in observers(prepared):
        name = names[node.name]
        if name in wanted and observer not in done:
            fix(node, observer, *known[wanted[name]], wanted[name])
            done.add(observer)
    lost = wanted.keys() - set(names.values())
    return [
        f"the learned scale of {wanted[name]} is not used: it is no quantized value" for name in sorted(lost)
    ]
