"""What the tensors of a checkpoint are called in the model that they are loaded into, and what its classes
make of them: found out once, before anybody reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fusecli.artifact import load_strictly, loaded, require_shapes, ties_of
from fusecli.checkpoint import Checkpoint, find_ties, store, strip_prefixes
from fusecli.errors import FusecliError, UsageError
from fusecli.graph.loading import adapts_names, has_extra_state, loads_by_itself


@dataclass(frozen=True)
class Reading:
    """A checkpoint under the model's names.

    as_stored  what users load, where the classes of the model make something else of it; else the same
    names      what a state dict of the model holds
    whole      whether the model has to be loaded with numbers before its structure is known
    """

    checkpoint: Checkpoint
    as_stored: Checkpoint
    names: Collection[str]
    whole: bool = False


def read_for(checkpoint: Checkpoint, blank: nn.Module, build: Callable[[], nn.Module]) -> Reading:
    """How the model that `build` makes reads the checkpoint; `blank` is one, with or without numbers.

    Raises UsageError for a model whose layers have no shapes yet.
    """
    require_shapes(blank)
    try:
        expected = blank.state_dict().keys()
    except Exception:  # get_extra_state may ask for numbers, which a model on the meta device has not got
        expected = build().state_dict().keys()
    checkpoint = _one_tensor_for_one(_named(checkpoint, expected), blank)
    renames = expected != {*checkpoint.tensors, *checkpoint.others} and adapts_names(blank)
    if not (renames or loads_by_itself(blank)):
        return Reading(checkpoint, checkpoint, expected, has_extra_state(blank))
    model = build()
    try:
        load_strictly(model, loaded(checkpoint), str(checkpoint.path))
    except UsageError:
        return Reading(
            checkpoint, checkpoint, expected
        )  # it is another checkpoint, or one that has to be made ready
    return Reading(_read_by(model, checkpoint), checkpoint, expected, whole=True)


def _named(checkpoint: Checkpoint, expected: Collection[str]) -> Checkpoint:
    """With the names that the model has: what looked like a wrapper's prefix may be its own. A name of either
    is the other's where they are one without prefixes."""
    if checkpoint.tensors.keys() <= set(expected):
        return checkpoint
    listed = [prefix for prefix in checkpoint.prefixes if any(name.startswith(prefix) for name in expected)]
    try:
        bare = strip_prefixes(checkpoint.path, expected, listed).names
    except FusecliError:  # without its prefixes the model would have two tensors of one name
        return checkpoint
    names = {without: name for name, without in bare.items()}
    if not checkpoint.tensors.keys() <= names.keys():
        return checkpoint
    return replace(checkpoint.renamed(names), prefixes=())


def _one_tensor_for_one(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """A parameter with several names has, under each, the tensor that load_state_dict copies last."""
    tensors = dict(checkpoint.tensors)
    for names in ties_of(model):
        stored = [name for name in names if name in tensors]
        tensors |= {name: replace(tensors[stored[-1]], name=name) for name in stored}
    return replace(checkpoint, tensors=tensors)


def _read_by(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    state = model.state_dict()
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    tensors = {name: store(name, tensor, checkpoint.path) for name, tensor in found.items()}
    others = {name: value for name, value in state.items() if name not in found}
    return replace(checkpoint, tensors=tensors, others=others, ties=find_ties(found))
