"""One file = one rule. Rules are discovered by their file names; nothing is registered by hand.

A rule file holds a docstring (What it fuses, Equation, Exact when, Refuses when, Before and after) and one
`@rule(...)` function named as the file. Listing rules reads the files without running them, so that
`fusecli rules` needs no torch.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fusecli.outcome import Mode

if TYPE_CHECKING:
    from fusecli.rewrite import Rewrite

_FOLDER = Path(__file__).parent


# In this order they are tried, and each to its end before the next.
EQUATIONS = ("fold_output", "fold_input", "sum_parallel", "compose", "none")


@dataclass(frozen=True)
class Rule:
    """A pattern of kinds (fusecli.graph.kinds, alternatives joined by "|") and what it rewrites to.

    equation      which of the four equations of the algebra it is; "none" where nothing is computed
    restructures  whether a layer becomes one of another class: only where the user allows it
    clones        whether a layer is stored several times: only with `shared: clone`
    modes         for which kinds of artifact it is; a norm that is to be trained is not folded
    """

    name: str
    pattern: tuple[str, ...]
    rewrite: Callable[..., Rewrite]
    equation: str = "fold_output"
    restructures: bool = False
    clones: bool = False
    modes: tuple[Mode, ...] = ("folded",)

    @property
    def listed(self) -> bool:
        """Whether a list of names is enough to use it; the others need a run that shows how they are
        joined."""
        # The audit of a chain follows what a layer gives; of a norm in front it would believe the list.
        layer_first = "norm" not in self.pattern[0].split("|")
        chain = self.equation == "fold_output" and layer_first and not self.clones
        return self.equation == "none" or chain

    def matches(self, kinds: tuple[str, ...]) -> bool:
        """Whether the first members of a group, by their kinds, are what this rule fuses."""
        return len(kinds) >= len(self.pattern) and all(
            kind in alternatives.split("|") for kind, alternatives in zip(kinds, self.pattern, strict=False)
        )


_RULES: dict[str, Rule] = {}


def rule(
    *pattern: str,
    equation: str = "fold_output",
    restructures: bool = False,
    clones: bool = False,
    modes: tuple[Mode, ...] = ("folded",),
) -> Callable[[Callable[..., Rewrite]], Callable[..., Rewrite]]:
    """Makes the function below it the rule of its file."""
    if equation not in EQUATIONS:
        raise ValueError(f"{equation!r} is none of {EQUATIONS}")

    def register(function: Callable[..., Rewrite]) -> Callable[..., Rewrite]:
        _RULES[function.__name__] = Rule(
            function.__name__, pattern, function, equation, restructures, clones, modes
        )
        return function

    return register


def names() -> list[str]:
    """The names of all rules: the names of their files."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


def describe(name: str) -> str:
    """The docstring of a rule's file; raises KeyError for a rule that is not there."""
    if name not in names():
        raise KeyError(name)
    return ast.get_docstring(ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""


@cache
def all_rules(mode: Mode = "folded") -> tuple[Rule, ...]:
    """Every rule of a mode in the order they are tried: by equation, the longest pattern first, so that a
    group finds the rule that takes most of it. It does not depend on the order of imports."""
    for name in names():
        importlib.import_module(f"fusecli.rules.{name}")
    order = {name: number for number, name in enumerate(EQUATIONS)}
    return tuple(
        sorted(
            (each for each in _RULES.values() if mode in each.modes),
            key=lambda r: (order[r.equation], -len(r.pattern), r.name),
        )
    )
