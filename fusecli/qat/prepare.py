"""Swaps layers for those that simulate quantization while they learn."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fusecli.errors import Problem, RefusedError, UsageError
from fusecli.nn import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    FusedModule,
    LinearBn1d,
    LinearReLU,
)
from fusecli.nn.duplicate import duplicate
from fusecli.qat import batch_norm, layers
from fusecli.qat.batch_norm import QatNorm
from fusecli.qat.layers import QatLayer
from fusecli.qat.refusals import foreign, problems
from fusecli.qat.scheme import DEFAULT, Scheme

_KINDS: dict[type[nn.Module], type[QatLayer]] = {
    nn.Conv1d: layers.QatConv1d,
    nn.Conv2d: layers.QatConv2d,
    nn.Conv3d: layers.QatConv3d,
    nn.Linear: layers.QatLinear,
    ConvReLU1d: layers.QatConvReLU1d,
    ConvReLU2d: layers.QatConvReLU2d,
    ConvReLU3d: layers.QatConvReLU3d,
    LinearReLU: layers.QatLinearReLU,
    ConvBn1d: batch_norm.QatConvBn1d,
    ConvBn2d: batch_norm.QatConvBn2d,
    ConvBn3d: batch_norm.QatConvBn3d,
    ConvBnReLU1d: batch_norm.QatConvBnReLU1d,
    ConvBnReLU2d: batch_norm.QatConvBnReLU2d,
    ConvBnReLU3d: batch_norm.QatConvBnReLU3d,
    LinearBn1d: batch_norm.QatLinearBn1d,
}
# These read the weights of their linear layers instead of calling them (the encoder layer in its fast path).
_LEFT_FLOAT = (QatLayer, nn.MultiheadAttention, nn.TransformerEncoderLayer)
_Slot = tuple[nn.Module, str, str, nn.Module]


def prepare_qat(model: nn.Module, scheme: Scheme = DEFAULT, *, inplace: bool = False) -> nn.Module:
    """`model`, with every convolution and linear layer, alone or in a container of training, quantized as
    `scheme` says while it goes on learning.

    The containers are those of fusecli.nn that `fusecli.fuse_modules_qat` makes (ConvBnReLU2d, LinearReLU,
    ...): fuse first, or rounding does not see that a norm will be folded. Parameters, buffers and hooks stay
    the same objects (those of the copy, unless `inplace`), so an optimizer made before stays valid. What is
    prepared already stays as it is. Left float: transposed convolutions, norms without a layer (BNReLU2d),
    nn.MultiheadAttention and nn.TransformerEncoderLayer, whatever is no module.

    State dicts are interchangeable with those of torch.ao.quantization.prepare_qat as far as the layers above
    go; theirs fake-quantizes the output of norms, transposed convolutions and some activations too, and does
    not quantize Conv1d.

    The model's input is not rounded. Where the integers begin at the input, put a module before the model:
    nn.Sequential(scheme.activation.fake_quantize(), model).

    Raises UsageError for a model in eval mode or without any such layer, RefusedError with the name of each
    layer that computes something else than its class says. Then nothing has been changed.
    """
    if not model.training:
        what = "the model is in eval mode, and quantization-aware training trains it"
        raise UsageError(Problem(what, "prepare_qat", "call model.train() first"))
    found: dict[nn.Module, str] = {}
    for _, _, path, module in _slots(_holder(model)):
        found.setdefault(module, path)
    if not found and not any(isinstance(module, QatLayer) for module in model.modules()):
        what = "the model has no convolution and no linear layer to quantize"
        raise UsageError(Problem(what, "prepare_qat", "give it the module that has them"))
    wrong = [problem for module, path in found.items() for problem in problems(path, module)]
    if wrong:
        raise RefusedError(*wrong)
    holder = _holder(model if inplace else duplicate(model))
    made: dict[nn.Module, QatLayer] = {}
    for parent, name, path, module in list(_slots(holder)):
        if module not in made:
            made[module] = _prepared(module, scheme)
            _tell_where(made[module], path)
        parent._modules[name] = made[module]
    return holder[0]


def _holder(model: nn.Module) -> nn.Sequential:
    """A parent for the model, so that the model can be swapped itself."""
    return nn.Sequential(model)


def _slots(holder: nn.Module) -> Iterator[_Slot]:
    """Parent, name there, path in the model and module, for every place of every module to swap."""
    waiting, seen = [(holder, "")], {holder}
    while waiting:
        parent, path = waiting.pop(0)
        for name, child in parent._modules.items():
            if child is None or isinstance(child, _LEFT_FLOAT):
                continue
            where = "" if parent is holder else f"{path}.{name}".lstrip(".")
            if _kind(child) or foreign(child):
                yield parent, name, where, child
            elif child not in seen:
                seen.add(child)
                waiting.append((child, where))


def _kind(module: nn.Module) -> type[QatLayer] | None:
    return next((qat for kind, qat in _KINDS.items() if isinstance(module, kind)), None)


def _prepared(module: nn.Module, scheme: Scheme) -> QatLayer:
    kind = _kind(module)
    assert kind is not None
    if not isinstance(module, FusedModule):
        return kind(module, scheme)
    layer, *others = module
    prepared = kind(layer, others[0], scheme) if issubclass(kind, QatNorm) else kind(layer, scheme)
    # The layer and the relu have no hooks, or they were refused; those of the container stay in its place.
    prepared.__dict__.update({name: value for name, value in vars(module).items() if "_hook" in name})
    prepared.training = module.training
    return prepared


def _tell_where(layer: QatLayer, path: str) -> None:
    for name in ("weight_fake_quant", "activation_post_process"):
        getattr(layer, name).where = f"{path}.{name}" if path else name
