"""The ops that have an integer form here, by name, and the part of each that quantization has to know."""

from __future__ import annotations

from torch.fx import Node

# Ops with a weight as their second argument, by the axis of the weight that output channels are on.
# In a grouped transposed convolution, (i, o/g, k), that axis holds the channels of one group, and a slice of
# it is used by one output channel of each group: coarser than per output channel, and as correct.
LAYERS = {
    "aten.linear": 0,
    **{f"aten.conv{n}d": 0 for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": 1 for n in (1, 2, 3)},
}
# Ops of two tensors, each with a scale of its own.
PAIRS = {"aten.add", "aten.mul"}
# What a layer or a sum takes in: its result is observed behind it, and never between.
ABSORBED = {"aten.relu": "relu", "aten.relu6": "relu6", "aten.hardtanh": "hardtanh"}
# Every element of the result is one of the input, zero, or between two of them: same scale, same zero point.
FOLLOWERS = frozenset(
    f"aten.{name}"
    for name in (
        *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("flatten", "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "movedim"),
        *(
            "squeeze",
            "unsqueeze",
            "expand",
            "clone",
            "contiguous",
            "alias",
            "detach",
            "slice",
            "select",
            "narrow",
        ),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "pixel_shuffle"),
        *("pixel_unshuffle", "channel_shuffle", "pad", "constant_pad_nd", "dropout", "feature_dropout"),
    )
)
NORMS = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten._native_batch_norm_legit"}


def op_name(node: Node) -> str:
    """'aten.conv2d' for every overload of it; '' for what is no op of torch."""
    return str(getattr(node.target, "overloadpacket", "")) if node.op == "call_function" else ""


def short(node: Node) -> str:
    """The op without its namespace, as a reader knows it: 'relu6' where a hardtanh is one."""
    if op_name(node) == "aten.hardtanh" and tuple(node.args[1:]) == (0.0, 6.0):
        return "relu6"
    return op_name(node).rpartition(".")[2].lstrip("_") or getattr(node.target, "__name__", str(node.target))


def changes_values(node: Node) -> bool:
    """Whether a follower is called in a way that makes values its input does not have."""
    name, rest = op_name(node), node.args[1:]
    if name == "aten.pad":
        mode, value = (*rest[1:], "constant", None)[:2] if len(rest) < 3 else rest[1:3]
        return mode == "constant" and bool(value)
    if name == "aten.constant_pad_nd":
        return bool(rest[1:] and rest[1])
    if name in ("aten.dropout", "aten.feature_dropout"):
        return rest[1] is True
    return name == "aten.avg_pool2d" and len(rest) > 5 and rest[5] is not None
