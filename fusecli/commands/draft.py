"""A spec to begin with: the candidate pairs as groups, and a place for what only the user knows."""

from __future__ import annotations

from collections.abc import Sequence

from fusecli.commands.entries import entries, scalar
from fusecli.contents import Candidate, ModuleFacts, Role

_SIDE = 64  # a spatial size that most networks take


def draft_spec(
    nesting: str | None, modules: Sequence[ModuleFacts], candidates: Sequence[Candidate], ordered: bool
) -> str:
    """The YAML text; "" without candidates. Its factory and inputs are to be filled in.

    ordered  the first layer of `modules` may be the model's first
    """
    if not candidates:
        return ""
    pairs = [(candidate.layer, candidate.norm) for candidate in candidates]
    lines = ["version: 1"]
    if nesting is not None:
        lines.append(f"checkpoint: {{key: {scalar(nesting)}}}")
    lines += [
        'model: {factory: "your_package.models:build"}  # or "net.py:build"',
        "inputs:  # one entry for each argument of forward; the shape is a guess",
        f"  - {{shape: {_input_shape(modules if ordered else ())}}}",
        "groups:  # guesses: strike out what does not follow each other",
        *(line for entry in entries(pairs, [m.path for m in modules if m.path]) for line in entry),
    ]
    return "\n".join(lines) + "\n"


def _input_shape(modules: Sequence[ModuleFacts]) -> list[int]:
    """What the first layer takes, as far as its weight tells; images where the first is not known."""
    weight = next((m.shape("weight") or () for m in modules if m.role is Role.LAYER), (0, 3, 0, 0))
    return [2, weight[1], *(_SIDE for _ in weight[2:])]
