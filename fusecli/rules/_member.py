"""The words that rules are written in: a member of a group, read as a value of the algebra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine, LinearOp, fold_input, fold_output, round_once
from fusecli.errors import require
from fusecli.graph.kinds import is_exact, without_statistics
from fusecli.graph.lift import adapter_of, channel_affine, linear_op, lowered, sizes_of
from fusecli.graph.materialise import materialised
from fusecli.nn import container_for
from fusecli.rewrite import (
    Bias,
    Bordered,
    Clone,
    Container,
    Edit,
    Identity,
    Passed,
    Remainder,
    Resize,
    Rewrite,
    Zero,
)


@dataclass(frozen=True)
class Route:
    """How an affine map arrives at the layer that takes it over.

    channels  for each channel of the layer the channel of the map, or -1 where none arrives
    shifts    whether it brings its shift: of layers whose outputs are added, one takes it
    affine    the map, of the module's tensors
    neutral   the tensors, by their name in the module, with which the map does nothing
    calls     the recorded ops that it is, where it is no module of its own
    """

    channels: tuple[int, ...]
    shifts: bool
    affine: Callable[[nn.Module], ChannelAffine]
    neutral: Callable[[nn.Module], Mapping[str, Tensor]]
    calls: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Member:
    """A module, its path and its kind: one of fusecli.graph.kinds, what the user has it treated as, or what a
    run has shown ("scale": it scales and shifts, "gain": it ends so).

    route  where a run has shown how its channels arrive; None: one to one
    """

    path: str
    module: nn.Module
    kind: str
    route: Route | None = None

    @property
    def op(self) -> LinearOp:
        return linear_op(self.module, transposed=self.kind == "conv_transpose")

    @property
    def affine(self) -> ChannelAffine:
        if self.route is None:
            return channel_affine(self.module)
        channels = torch.tensor(self.route.channels)
        return self.route.affine(self.module).spread(channels, shifts=self.route.shifts)

    @property
    def materialised(self) -> dict[str, Tensor]:
        """The parameters of a layer whose weight or bias is computed, as they are then, in float64."""
        plain = materialised(self.module)._parameters
        return {f"{self.path}.{name}": p.detach() for name, p in plain.items() if p is not None}

    @property
    def adapter(self) -> tuple[LinearOp, LinearOp, LinearOp, ChannelAffine]:
        """The layer without its adapter, the adapter's A and B, and the scale of their product."""
        return adapter_of(self.module)

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
        """The layer computes `op`; it gets a bias if it needs one, and other sizes where the kernel grew."""
        edits: tuple[Edit, ...] = () if op.bias is None else (Bias(self.path),)
        if (op.geometry, op.weight.shape) != (self.op.geometry, self.op.weight.shape):
            edits = (Resize(self.path, tuple(sizes_of(op, self.path, self.module).items())), *edits)
        return Rewrite(lowered(self.path, op), edits)

    def followed_by(self, f: Member, *, last: bool = True) -> Rewrite:
        """f . W: the layer computes what `f` makes of its output, and `f` is gone."""
        return self.becomes(fold_output(self.op, f.affine, self.dtype)) + f.absorbed_into(self, last=last)

    def preceded_by(self, f: Member) -> Rewrite:
        """W . f: the layer computes what it makes of the output of `f`, and `f` is gone."""
        return self.becomes(fold_input(self.op, f.affine, self.dtype)) + f.passed_to(self)

    def computes(self, op: LinearOp) -> Rewrite:
        """As `becomes`, for a layer whose own padding is no part of `op`."""
        return Rewrite(lowered(self.path, op), () if op.bias is None else (Bias(self.path),))

    def bordered_with(self, f: ChannelAffine) -> Rewrite:
        """The convolution pads with what f turns into 0."""
        require(is_exact(self.module), "fixed-size", f"the class of {self.path} is not known")
        border = {f"{self.path}.border": round_once(f.root, self.dtype)}
        return Rewrite(border, (Bordered(self.path),))

    def becomes_copy(self, layer: Member, op: LinearOp) -> Rewrite:
        """In the norm's place stands a layer like `layer` that computes `op`."""
        tensors = lowered(self.path, op)
        return Rewrite(tensors, (Clone(self.path, layer.path), Bias(self.path)))

    def becomes_affine(self, f: ChannelAffine) -> Rewrite:
        """The norm computes f: gamma = s sqrt(var + eps), beta = t + mean s; its statistics stay."""
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        mean, var = (self.module._buffers[name] for name in ("running_mean", "running_var"))
        plain = weight is not None and bias is not None and mean is not None and var is not None
        require(plain, "no-weight", f"{self.path} has no weight and bias that could take the other map")
        assert weight is not None and mean is not None and var is not None  # noqa: PT018
        root = (var.double() + float(self.module.eps)).sqrt()  # type: ignore[arg-type]
        gamma, beta = f.scale * root, f.shift + mean.double() * f.scale
        vectors = {"weight": gamma, "bias": beta}
        return Rewrite({f"{self.path}.{n}": round_once(v, weight.dtype) for n, v in vectors.items()})

    def absorbed_into(self, layer: Member, *, last: bool = True) -> Rewrite:
        """The norm is gone, all of it; of a module that does more, its gain is."""
        if self.kind == "gain":
            return self._neutralised()
        return Rewrite(edits=(Identity(self.path, layer.path, last),))

    def passed_to(self, layer: Member) -> Rewrite:
        """As `absorbed_into`, for a layer that comes after."""
        if self.kind == "gain":
            return self._neutralised()
        return Rewrite(edits=(Passed(self.path, (layer.path,)),))

    def _neutralised(self) -> Rewrite:
        assert self.route is not None
        return Rewrite({f"{self.path}.{name}": t for name, t in self.route.neutral(self.module).items()})

    def leaves(self) -> Rewrite:
        """The module is gone: what it takes is what it gave."""
        return Rewrite(edits=(Passed(self.path, ()),))

    def silenced(self, layer: Member) -> Rewrite:
        """The branch is gone: what is added to the layer's output is nothing."""
        return Rewrite(edits=(Zero(self.path, layer.path),))

    def leaves_children(self, layer: Member) -> Rewrite:
        """The norm is gone, its submodules stay in their order."""
        return Rewrite(edits=(Remainder(self.path, layer.path, self.children),))

    def trained_with(self, norm: Member, *others: Member) -> Rewrite:
        """As `contained_with`, for a norm that goes on learning; a quantizer that simulates the fold needs
        its gamma and its running statistics."""
        missing = without_statistics(norm.module)
        require(missing is None, *(missing or ("no-statistics", "")))
        learns = norm.module._parameters.get("weight") is not None
        require(learns, "no-affine", f"{norm.path} has no gamma and beta to learn (affine=False)")
        layer: Any = self.module
        outputs = layer.out_features if self.kind == "linear" else layer.out_channels
        features = norm.module._buffers["running_mean"].numel()  # type: ignore[union-attr]  # it is there
        require(outputs == features, "shape", f"{self.path} has {outputs} channels, {norm.path} {features}")
        return self.contained_with(norm, *others)

    def contained_with(self, *others: Member) -> Rewrite:
        """All move into the fusecli.nn container made for them."""
        members = (self, *others)
        container = container_for(*(member.module for member in members))
        kinds = ", ".join(type(member.module).__name__ for member in members)
        last = "activation" if others[-1].kind != "norm" else "norm"
        remedy = f"leave the {last} out of the group"
        require(container is not None, "no-container", f"no container takes ({kinds})", remedy=remedy)
        assert container is not None
        paths = tuple(member.path for member in members)
        return Rewrite(edits=(Container(self.path, container.__name__, paths),))
