"""One recorded forward in eval mode, on a copy: with fake tensors where the model's code allows it.

Fake tensors have shapes and no numbers: no arithmetic, no memory. A model whose control flow or shapes depend
on numbers needs real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusecli.errors import Problem, UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate
from fusecli.graph.memory import same_memory
from fusecli.graph.recorder import Recorder
from fusecli.sample import Sample, mapped, seeded


@dataclass
class Run:
    """One run of a model on a sample, recorded when somebody asks for it.

    structure  the model; meta tensors will do, and it is not changed
    numbers    makes a copy with real tensors, for a model that needs them
    """

    structure: nn.Module
    sample: Sample
    numbers: Callable[[], nn.Module]

    @cached_property
    def recording(self) -> Recording:
        """Raises UsageError where the model does not run on the sample at all."""
        return self._recorded(())

    def with_biases(self, layers: Collection[str]) -> Recording:
        """The same run with a zero bias on each of these layers: does anything read it?"""
        return self._recorded(layers)

    def _recorded(self, biased: Collection[str]) -> Recording:
        problem: Exception | None = None
        for attempt in self._attempts(biased):
            try:
                return attempt()
            except Exception as error:  # whatever somebody's forward may raise, or fake tensors cannot do
                problem = error
        raise UsageError(
            Problem(
                f"the model does not run on these inputs: {type(problem).__name__}: {problem}",
                "inputs",
                "give one entry per forward argument, with the shape and dtype it expects",
            )
        ) from problem

    def _attempts(self, biased: Collection[str]) -> Iterator[Callable[[], Recording]]:
        """From the cheapest. In float64 runs what does not run in the stored dtype, such as a bfloat16 model
        that is given float32 inputs. The last error is the one that a user can do something about."""
        parameters = (p for p in self.structure.parameters() if p.is_floating_point())
        narrow = any(parameter.dtype.itemsize < 4 for parameter in parameters)
        dtypes = (None, torch.float64) if narrow else (None,)
        # A user's hook may keep what it is given, and a fake tensor is of no use to anybody.
        if not any(map(_hooked, self.structure.modules())):
            for dtype in dtypes:
                yield partial(self._with_fakes, biased, dtype)
        for dtype in reversed(dtypes):
            yield partial(self._with_numbers, biased, dtype)

    def _with_fakes(self, biased: Collection[str], dtype: torch.dtype | None) -> Recording:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = _fake_twin(self.structure, mode)
        with mode:
            _add_biases(model, biased)
            inputs = self.sample.mapped(lambda tensor: mode.from_tensor(_in(tensor, dtype)))
            return self._run(model.to(dtype) if dtype else model, inputs, fake=True)

    def _with_numbers(self, biased: Collection[str], dtype: torch.dtype | None) -> Recording:
        model = self.numbers()
        _add_biases(model, biased)
        return self._run(model.to(dtype) if dtype else model, self.sample.copy(dtype), fake=False)

    def _run(self, model: nn.Module, inputs: Sample, *, fake: bool) -> Recording:
        model.eval()
        recorder = Recorder(fake)
        with seeded(0), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with recorder.watching(model):
                recorder.takes((inputs.args, dict(inputs.kwargs)))
                output = model(*inputs.args, **inputs.kwargs)
            recorder.returns(output)
            # What autograd keeps for the output goes; what is inside an output of an unknown class stays.
            output = mapped(output, Tensor.detach)
            recorder.outlives(model)
        return recorder.recording(same_memory(self.structure))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _in(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _add_biases(model: nn.Module, layers: Collection[str]) -> None:
    for path in layers:
        layer: Any = model.get_submodule(path)
        size = getattr(layer, "out_channels", None) or layer.out_features
        zeros = torch.zeros(size, dtype=layer.weight.dtype, device=layer.weight.device)
        layer._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)


def _fake_twin(structure: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy without numbers; tensors that share memory share it in the copy."""

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        twin: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, tensor.requires_grad)
        return twin

    held = (
        tensor
        for module in structure.modules()
        for owned in (module._parameters, module._buffers, vars(module))
        for tensor in owned.values()
        if isinstance(tensor, Tensor)
    )
    return duplicate(structure, {id(tensor): fake(tensor) for tensor in held})
