"""The mathematics of folding: two values, four equations, one rounding.

    fold_output   f . W  = (s W) x + (s b + t)     always exact
    fold_input    W . f  = (W s) x + (W t + b)     no shift under zero padding or into a transposed conv
    sum_parallel  A + B  = (A + B) x + (a + b)     kernels aligned by their padding, all else alike
    compose       B . A  = (B A) x + (B a + b)     one side pointwise

Tensors in, tensors out: no modules, no names, no files. Every equation answers with a new value
or raises NotFoldable; none writes to its operands, which may be read-only memory maps.
"""

from __future__ import annotations

from fusecli.algebra.affine import ChannelAffine, batch_norm
from fusecli.algebra.compose import compose
from fusecli.algebra.fold_input import fold_input
from fusecli.algebra.fold_output import fold_output
from fusecli.algebra.geometry import Geometry
from fusecli.algebra.layout import pack, unpack
from fusecli.algebra.linear_op import LinearOp, diagonal
from fusecli.algebra.rounding import round_once
from fusecli.algebra.sum_parallel import sum_parallel

__all__ = [
    "ChannelAffine",
    "Geometry",
    "LinearOp",
    "batch_norm",
    "compose",
    "diagonal",
    "fold_input",
    "fold_output",
    "pack",
    "round_once",
    "sum_parallel",
    "unpack",
]
