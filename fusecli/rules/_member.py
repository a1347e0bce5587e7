"""The words that rules are written in: a member of a group, read as a value of the algebra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fusecli.algebra import ChannelAffine, LinearOp
from fusecli.errors import require
from fusecli.graph.lift import channel_affine, linear_op, lowered
from fusecli.nn import container_for
from fusecli.rewrite import Bias, Container, Identity, Remainder, Rewrite


@dataclass(frozen=True)
class Member:
    """A module, its path and its kind (fusecli.graph.kinds, or what the user has it treated as)."""

    path: str
    module: nn.Module
    kind: str

    @property
    def op(self) -> LinearOp:
        return linear_op(self.module, transposed=self.kind == "conv_transpose")

    @property
    def affine(self) -> ChannelAffine:
        return channel_affine(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the layer's weight: a fold is rounded to it, once."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight.dtype

    @property
    def children(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.module.named_children())

    def becomes(self, op: LinearOp) -> Rewrite:
        """The layer computes `op`; it gets a bias if it had none."""
        return Rewrite(lowered(self.path, op), (Bias(self.path),))

    def absorbed_into(self, layer: Member, *, last: bool = True) -> Rewrite:
        """The norm is gone, all of it."""
        return Rewrite(edits=(Identity(self.path, layer.path, last),))

    def leaves_children(self, layer: Member) -> Rewrite:
        """The norm is gone, its submodules stay in their order."""
        return Rewrite(edits=(Remainder(self.path, layer.path, self.children),))

    def contained_with(self, relu: Member) -> Rewrite:
        """Both move into the fusecli.nn container made for them."""
        container = container_for(self.module)
        kinds = f"{type(self.module).__name__} and a {type(relu.module).__name__}"
        fits = container is not None and isinstance(relu.module, nn.ReLU)
        require(
            fits,
            "no-container",
            f"no container takes a {kinds}",
            remedy="leave the activation out of the group",
        )
        assert container is not None
        return Rewrite(edits=(Container(self.path, container.__name__, (self.path, relu.path)),))
