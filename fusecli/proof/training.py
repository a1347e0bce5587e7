"""Does it still train as it did? A model that was fused to be trained, against the original, in train mode.

Both start from the same float64 numbers and see the same batches. Compared are the outputs, which depend on
the statistics of the batch, the running statistics that it leaves behind, and, after one step of an
optimiser, the parameters, the outputs on a second batch and the statistics once more, and at last the outputs
in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.outcome import Judgement
from fusecli.proof.compare import TOLERANCE, Difference, Incomparable, compare
from fusecli.proof.run import float64_arithmetic, run
from fusecli.sample import Sample, cast, seeded, tensors_in

_RATE = 0.1
Names = Callable[[str], str | None]


@dataclass
class Training:
    """What was seen: the largest difference, and why nothing could be seen."""

    difference: Difference = field(default_factory=Difference)
    doubt: str = ""
    steps: int = 0

    @property
    def judgement(self) -> Judgement:
        if self.difference.error > TOLERANCE:
            return Judgement.DIFFERENT
        return Judgement.INCONCLUSIVE if self.doubt else Judgement.EQUIVALENT

    @property
    def said(self) -> str:
        """One sentence: what it proved or missed."""
        if self.judgement is Judgement.DIFFERENT:
            number = f"relative error {self.difference.error:.1e}"
            return f"{self.difference.where} differs: {self.difference.why or number}"
        if self.doubt:
            return self.doubt
        error = f"{self.difference.error:.1e}"
        return f"outputs, running statistics and parameters agree to {error}, after an optimiser step too"


def judge_training(
    original: nn.Module, fused: nn.Module, names: Names, samples: Sequence[Sample], seed: int
) -> Training:
    """Trains both float64 twins, which are changed, for a step on the samples, side by side.

    names   the name in `fused` of a tensor of `original`
    """
    found = Training()
    original.train()
    fused.train()
    batches = [samples[0], samples[-1]]
    watched = _watched(original, fused, names)
    optimisers = [torch.optim.SGD(_learning(model), _RATE) for model in (original, fused)]
    with float64_arithmetic():
        for number, batch in enumerate(batches):
            try:
                expected = _trained(original, batch, seed + number, optimisers[0])
            except _NoStep as no:
                found.doubt = str(no)
                return found
            except Exception as error:  # whatever somebody's forward may raise
                found.doubt = f"the model does not train on these inputs: {type(error).__name__}: {error}"
                return found
            try:
                given = _trained(fused, batch, seed + number, optimisers[1])
            except Exception as error:
                found.difference = Difference(float("inf"), "output", f"the fused model raises {error}")
                return found
            try:
                for difference in _differences(original, fused, watched, expected, given):
                    found.difference = found.difference.worse(difference)
            except Incomparable as odd:
                found.doubt = str(odd)
                return found
            found.steps += 1
    try:
        found.difference = found.difference.worse(_afterwards(original, fused, samples[0], seed))
    except Incomparable as odd:
        found.doubt = str(odd)
    return found


class _NoStep(Exception):
    """There is nothing that an optimiser could change."""


def _afterwards(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Difference:
    """How the outputs in eval mode differ, once both were trained: what they learned and no name tells, as
    of a custom fuser's result, shows there."""
    original.eval()
    fused.eval()
    try:
        expected = run(original, sample, seed=seed, dtype=torch.float64)
    except Exception:  # what was trained on random numbers may run no more
        return Difference()
    try:
        given = run(fused, sample, seed=seed, dtype=torch.float64)
    except Exception as error:
        return Difference(float("inf"), "output", f"in eval mode afterwards the fused model raises {error}")
    found = compare(expected, given)
    # A step on random numbers may have ended in NaN.
    where = f"{found.where}, in eval mode afterwards,"
    return Difference() if found.undefined else replace(found, where=where)


def _learning(model: nn.Module) -> Iterator[Tensor]:
    # A model in which everything is frozen still has to be given to the optimiser.
    yield torch.zeros((), dtype=torch.float64, requires_grad=True)
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)


def _trained(model: nn.Module, batch: Sample, seed: int, optimiser: torch.optim.Optimizer) -> Any:
    """The output of one training step; the loss weighs every output by a random number of its own, for a sum
    of what a norm gives does not depend on its input."""
    inputs = batch.copy(torch.float64)
    with seeded(seed), torch.enable_grad():
        output = model(*inputs.args, **inputs.kwargs)
        leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
        if not leaves:
            raise _NoStep("no gradient reaches the output of the model: it was not trained")
        loss = sum((leaf * torch.randn_like(leaf)).mean() for leaf in leaves)
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        (loss.real if loss.is_complex() else loss).backward()
    optimiser.step()
    return cast(output, None)


def _watched(original: nn.Module, fused: nn.Module, names: Names) -> dict[str, str]:
    """The tensors that are compared after each step, by their names in both models. Buffers that no state
    dict holds are built anew each time: of them those that are equal before the first step."""
    before, after, stored = _tensors(original), _tensors(fused), original.state_dict()
    return {
        name: other
        for name, tensor in before.items()
        if (other := names(name)) in after
        and other is not None
        and (name in stored or compare(tensor, after[other]).error == 0)
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor, buffers that no state dict holds too."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return {**dict(model.named_buffers(remove_duplicate=False)), **state}


def _differences(
    original: nn.Module, fused: nn.Module, watched: Mapping[str, str], expected: Any, given: Any
) -> Iterator[Difference]:
    yield compare(expected, given)
    after = _tensors(fused)
    for name, tensor in _tensors(original).items():
        if watched.get(name) not in after:
            continue
        found = compare(tensor, after[watched[name]])
        yield Difference(found.error, name, found.why, found.floating, found.undefined)
