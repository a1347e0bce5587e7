"""What ops in a row do to one tensor, where each only scales and shifts it: one scale and one shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fusecli.errors import require
from fusecli.graph.dataflow import Call
from fusecli.graph.ops import GAINS
from fusecli.graph.replay import Replay

Pair = tuple[Tensor, Tensor]


def adds_shift(call: Call) -> bool:
    if call.name in GAINS:
        return any(call.argument(position) is not None for position in GAINS[call.name][1:])
    return call.name.rstrip("_") in ("aten.add", "aten.sub", "aten.rsub")


def evaluated(chain: Sequence[Call], constants: Replay) -> Pair:
    """Scale and shift of ops in a row."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    pair = (one, zero)
    for call in chain:
        if call.name in GAINS:
            vectors = [call.argument(position) for position in GAINS[call.name]]
            held = [None if vector is None else constants.at(vector) for vector in vectors]
            pair = (
                one if held[0] is None else held[0],
                zero if held[-1] is None or len(held) < 2 else held[-1],
            )
        else:
            pair = _step(call, pair, constants)
    return pair


def _step(call: Call, pair: Pair, constants: Replay) -> Pair:
    """What one affine op makes of s x + t."""
    values = constants.recording.values
    operands: list[Tensor | None] = []
    for position in range(len(call.args)):
        read = call.argument(position)
        if read is None:
            literal = call.args[position]
            operands.append(
                torch.tensor(literal, dtype=torch.float64) if isinstance(literal, int | float) else None
            )
        else:
            operands.append(constants.at(read) if values[read].constant else None)
    flowing = next(
        i for i in range(len(call.args)) if (r := call.argument(i)) is not None and not values[r].constant
    )
    rule = _ALGEBRA.get(call.name.rstrip("_"))
    require(rule is not None and "rounding_mode" not in call.kwargs, "not-affine", call.name)
    assert rule is not None
    return rule(pair, operands, flowing, _options(call))


def _options(call: Call) -> dict[str, object]:
    """What an op is told besides its operands; with a number as operand, alpha comes third."""
    third = {"alpha": call.args[2]} if len(call.args) > 2 else {}
    return {**third, **call.kwargs}


def _sum(
    pair: Pair, operands: list[Tensor | None], flowing: int, options: Mapping[str, object], sign: int
) -> Pair:
    """x + alpha c, or c + alpha x; `sign` is that of the second."""
    alpha = float(options.get("alpha", 1)) * sign  # type: ignore[arg-type]
    other = operands[1 - flowing]
    require(other is not None, "not-affine", "an op without its second operand")
    assert other is not None
    if flowing == 0:
        return pair[0], pair[1] + alpha * other
    return alpha * pair[0], alpha * pair[1] + other


def _product(pair: Pair, operands: list[Tensor | None], flowing: int, _: Mapping[str, object]) -> Pair:
    other = operands[1 - flowing]
    require(other is not None, "not-affine", "an op without its second operand")
    assert other is not None
    return pair[0] * other, pair[1] * other


def _quotient(pair: Pair, operands: list[Tensor | None], flowing: int, _: Mapping[str, object]) -> Pair:
    other = operands[1]
    require(flowing == 0 and other is not None, "not-affine", "a constant is divided by what flows")
    assert other is not None
    return pair[0] / other, pair[1] / other


def _reversed(pair: Pair, operands: list[Tensor | None], flowing: int, options: Mapping[str, object]) -> Pair:
    """rsub: the second operand less alpha times the first."""
    return _sum(pair, operands[::-1], 1 - flowing, options, -1)


def _negative(pair: Pair, _: list[Tensor | None], __: int, ___: Mapping[str, object]) -> Pair:
    return -pair[0], -pair[1]


_ALGEBRA: dict[str, Callable[[Pair, list[Tensor | None], int, Mapping[str, object]], Pair]] = {
    "aten.add": lambda pair, operands, flowing, options: _sum(pair, operands, flowing, options, 1),
    "aten.sub": lambda pair, operands, flowing, options: _sum(pair, operands, flowing, options, -1),
    "aten.rsub": _reversed,
    "aten.mul": _product,
    "aten.div": _quotient,
    "aten.neg": _negative,
}
