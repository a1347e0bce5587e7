"""Recorded ops run again on tensors with numbers: what a value is, once those that it is made from are
known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fusecli.graph.dataflow import Call, Recording, Ref

Named = Callable[[str], Tensor]


@dataclass
class Replay:
    """The values of one recording, each worked out once from `known` ones and the model's own tensors.

    named  the parameter or buffer of this name; raises LookupError where there is none
    """

    recording: Recording
    named: Named
    known: dict[int, Tensor] = field(default_factory=dict)

    def at(self, value: int) -> Tensor:
        """Raises LookupError where a value is needed that nobody knows, or an op cannot be run by itself."""
        if value not in self.known:
            call, name = self.recording.maker(value), self.recording.values[value].name
            if call is not None:
                self._run(call)
            elif name:
                self.known[value] = self.named(name)
            if value not in self.known:
                raise LookupError(self.recording.described(call) if call else name or "a tensor of the run")
        return self.known[value]

    def _run(self, call: Call) -> None:
        if not callable(call.op):
            return
        # Nothing that is known may be written to: an op in place gets copies, and its result is one of them.
        given = {read: self.at(read) for read in call.reads}
        if call.writes:
            given = {read: tensor.clone() for read, tensor in given.items()}
        if call.name == "aten._to_copy":  # a twin in another dtype stays in it
            self.known[call.makes[0]] = given[call.reads[0]]
            return
        args, kwargs = tree_map_only(Ref, lambda ref: given[ref.value], (call.args, dict(call.kwargs)))
        results = [leaf for leaf in tree_leaves(call.op(*args, **kwargs)) if isinstance(leaf, Tensor)]
        if len(results) == len(call.makes):
            self.known.update(zip(call.makes, results, strict=True))
