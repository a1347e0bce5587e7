"""The few ops that have to be known by name: what applies a weight, what normalises, what only moves."""

from __future__ import annotations

# Where the weight stands among the arguments, and which axis of the result its output channels are.
CONVOLUTIONS = {"aten.convolution": (1, 1), "aten._convolution": (1, 1)}
PRODUCTS = {
    "aten.mm": (1, -1),
    "aten.addmm": (2, -1),
    "aten.bmm": (1, -1),
    "aten.baddbmm": (2, -1),
    "aten.matmul": (1, -1),
    "aten.linear": (1, -1),
    "aten.mv": (0, -1),
    "aten.addmv": (1, -1),
}
LAYERS = CONVOLUTIONS | PRODUCTS

# Batch norm by a fixed affine or by the statistics of the batch; the position of the flag that says which.
NORMS = {
    "aten.native_batch_norm": 5,
    "aten.cudnn_batch_norm": 5,
    "aten.miopen_batch_norm": 5,
    "aten._native_batch_norm_legit": 5,
    "aten._batch_norm_impl_index": 5,
    "aten.batch_norm": 5,
    "aten._native_batch_norm_legit_no_training": None,
    "aten._batch_norm_no_update": None,
    "aten._batch_norm_with_update": None,
}
NORM_VECTORS = (1, 2, 3, 4)  # weight, bias, running mean, running variance
EPS = {name: 6 if flag is None else 7 for name, flag in NORMS.items()}
ALWAYS_BATCH = {"aten._batch_norm_with_update"}
# Norms that compute their statistics from each input.
BATCH_DEPENDENT = frozenset(
    f"aten.{name}"
    for name in ("native_layer_norm", "native_group_norm", "layer_norm", "group_norm", "_fused_rms_norm")
)

# Every element of the result is one of the argument's, unchanged but for its dtype.
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "detach", "lift_fresh"),
        *("t", "transpose", "permute", "movedim", "swapaxes", "unsqueeze", "squeeze", "flatten"),
        *("unflatten", "expand", "clone", "contiguous", "_to_copy", "repeat", "slice"),
    )
)
# Of the moves, those whose meaning is in the sizes that they are given.
RESHAPES = frozenset(
    f"aten.{name}" for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "flatten")
)
# Of several operands, element by element.
SUMS = frozenset(f"aten.{name}" for name in ("add", "add_"))
AFFINE = SUMS | frozenset(
    f"aten.{name}"
    for name in ("sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "addcmul", "addcmul_")
)
POINTWISE = AFFINE | frozenset(
    f"aten.{name}" for name in ("sqrt", "rsqrt", "reciprocal", "pow", "abs", "exp", "square", "clamp")
)
