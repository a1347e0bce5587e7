"""One recorded forward in eval mode, on a copy, with its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.blame import forward_failed
from fusecli.errors import RefusedError, UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.held import Hold, changes_in_a_fold, modules_held
from fusecli.graph.memory import same_memory
from fusecli.graph.places import decisions_by_size
from fusecli.graph.recorder import Recorder
from fusecli.nn.shallow import shallow_copy
from fusecli.sample import Sample, mapped, seeded


@dataclass
class Run:
    """One run of a model on a sample, recorded when somebody asks for it.

    structure  the model; meta tensors will do, and it is not changed
    numbers    makes a copy with real tensors, which is run
    others     the further inputs that the proof will be run on
    """

    structure: nn.Module
    sample: Sample
    numbers: Callable[[], nn.Module]
    others: Callable[[], Sequence[Sample]] = tuple
    _biased: dict[frozenset[str], Recording] = field(default_factory=dict, repr=False)
    _unbiased: dict[frozenset[Any], UsageError] = field(default_factory=dict, repr=False)

    @cached_property
    def held(self) -> dict[str, Hold]:
        """The modules of the model that are held outside of its tree too."""
        return modules_held(self.structure)

    @cached_property
    def recording(self) -> Recording:
        """Raises UsageError where the model does not run on the sample at all."""
        return self._recorded(())

    @cached_property
    def called_by_others(self) -> frozenset[str]:
        """The modules that the further inputs call, by all their names. They are run for that, so it is
        asked only where the recorded input leaves something open."""
        called: set[str] = set()
        for sample in self.others():
            for dtype in (None, torch.float64):
                try:
                    called |= _called(self.numbers().to(dtype), sample.copy(dtype))
                    break
                except Exception:  # whatever somebody's forward may raise: the proof will tell it
                    continue
        return frozenset(called)

    def with_biases(self, layers: Collection[str]) -> Recording:
        """The same run with a zero bias on each of these layers: does anything read it?

        Raises UsageError where the model does not run so; what one layer does not take, no other of its class
        is asked for.
        """
        key = frozenset(layers)
        kinds = (
            frozenset(type(self.structure.get_submodule(path)) for path in layers) if len(key) == 1 else key
        )
        if kinds in self._unbiased:
            raise self._unbiased[kinds]
        if key not in self._biased:
            try:
                self._biased[key] = self._recorded(layers)
            except UsageError as error:
                self._unbiased[kinds] = error
                raise
        return self._biased[key]

    def _recorded(self, biased: Collection[str]) -> Recording:
        problem: Exception | None = None
        parameters = (p for p in self.structure.parameters() if p.is_floating_point())
        other = any(parameter.dtype is not torch.float32 for parameter in parameters)
        # In float64 runs what does not in the stored dtype, such as a bfloat16 model that is given float32
        # inputs; but what it says in its own dtype is what a user can do something about.
        for dtype in (None, torch.float64) if other else (None,):
            try:
                return self._with_numbers(biased, dtype)
            except RefusedError:
                raise  # the model cannot be copied
            except Exception as error:  # whatever somebody's forward may raise
                problem = problem or error
        assert problem is not None
        raise UsageError(forward_failed(problem)) from problem

    def _with_numbers(self, biased: Collection[str], dtype: torch.dtype | None) -> Recording:
        model = self.numbers()
        _add_biases(model, biased)
        return self._run(Recorder(), model.to(dtype) if dtype else model, self.sample.copy(dtype))

    def _run(self, recorder: Recorder, model: nn.Module, inputs: Sample) -> Recording:
        model.eval()
        self._stand_alone(model)
        with seeded(0), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with recorder.watching(model):
                recorder.takes((inputs.args, dict(inputs.kwargs)))
                output = model(*inputs.args, **inputs.kwargs)
            recorder.returns(output)
            # What autograd keeps for the output goes; what is inside an output of an unknown class stays.
            output = mapped(output, Tensor.detach)
            recorder.outlives(model)
            output = None
        recording = recorder.recording(same_memory(self.structure), self.held)
        modules = dict(model.named_modules())
        ran = {type(modules[visit.path]): None for visit in recording.visits if visit.path in modules}
        decisions = dict.fromkeys(line for cls in ran for line in decisions_by_size(cls))  # type: ignore[arg-type]  # a class is hashable
        return replace(recording, by_size=tuple(decisions))

    def _stand_alone(self, model: nn.Module) -> None:
        """Puts other objects in the places of modules that are held a second time, as a fold would: a call
        that does not go through the tree is none of theirs."""
        if not self.held:
            return
        held = [module for path, module in model.named_modules() if path in self.held]
        instead = {module: shallow_copy(module) for module in held if changes_in_a_fold(module)}
        for parent in [*model.modules()]:
            places: Any = parent._modules
            places.update({name: instead[child] for name, child in places.items() if child in instead})


def _called(model: nn.Module, inputs: Sample) -> set[str]:
    """The modules that one run calls, by all their names."""
    called: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    model.eval()
    with seeded(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*inputs.args, **inputs.kwargs)
    return called


def _add_biases(model: nn.Module, layers: Collection[str]) -> None:
    for path in layers:
        layer: Any = model.get_submodule(path)
        size = getattr(layer, "out_channels", None) or layer.out_features
        zeros = torch.zeros(size, dtype=layer.weight.dtype, device=layer.weight.device)
        layer._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)
