"""What quantization decides, as plain values: the options, the units that become int8, what stays float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """observer: where the range of an activation comes from; weights: a scale per output channel, or one."""

    observer: Literal["minmax", "histogram"] = "minmax"
    weights: Literal["per-channel", "per-tensor"] = "per-channel"


@dataclass(frozen=True)
class QuantUnit:
    """Ops that are computed on quantized values and give one.

    name     what its output is called: the path of its layer where one module did this once, else the node
    modules  paths of the modules whose ops these are, the owner of the weight first; '' is the model itself
    nodes    names of the ops in the exported graph, in order: a layer, and the activation it takes in
    output   the node whose value is quantized: the last of them
    weight   name of the quantized weight, None where there is none; a bias stays float32
    kind     'conv2d+relu', 'add', 'max_pool2d'
    follows  whether it keeps the scale and zero point of its input
    """

    name: str
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    output: str
    weight: str | None
    kind: str
    follows: bool = False


@dataclass(frozen=True)
class LeftFloat:
    """An op that stays float32, between a dequantize and a quantize where it touches quantized values."""

    node: str
    module: str
    op: str
    reason: str
