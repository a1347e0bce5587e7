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
# Of them, those that end in a gain, and where its weight and bias stand among the arguments.
GAINS: dict[str, tuple[int, ...]] = {
    "aten.native_layer_norm": (2, 3),
    "aten.native_group_norm": (1, 2),
    "aten._fused_rms_norm": (2,),
}

# Every element of the result is one of the argument's, unchanged but for its dtype.
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "detach", "lift_fresh"),
        *("t", "transpose", "permute", "movedim", "swapaxes", "unsqueeze", "squeeze", "flatten"),
        *("unflatten", "expand", "clone", "contiguous", "_to_copy", "repeat", "slice"),
    )
)
# Moves that take apart, pick, or put elements in another order: one value may become several.
SELECTIONS = frozenset(
    f"aten.{name}"
    for name in (
        *("split", "split_with_sizes", "chunk", "unbind", "select", "narrow", "index_select"),
        *("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "flip", "roll"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
        *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    )
)
JOINS = frozenset({"aten.cat"})
# Each element of the result is a mean of the argument's elements, with weights that add up to one: unless a
# padding is counted, which the labels show.
AVERAGES = frozenset(
    f"aten.{name}"
    for name in (
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
        *("adaptive_avg_pool3d", "_adaptive_avg_pool3d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
    )
)
# Of the moves, those whose meaning is in the sizes that they are given.
RESHAPES = frozenset(
    f"aten.{name}" for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "flatten")
)
# What hands a number to Python.
LOOKS = frozenset({"aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal"})
# Of several operands, element by element.
SUMS = frozenset(f"aten.{name}" for name in ("add", "add_"))
AFFINE = SUMS | frozenset(
    f"aten.{name}"
    for name in ("sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "addcmul", "addcmul_")
)
POINTWISE = AFFINE | frozenset(
    f"aten.{name}" for name in ("sqrt", "rsqrt", "reciprocal", "pow", "abs", "exp", "square", "clamp")
)
