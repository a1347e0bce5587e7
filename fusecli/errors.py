"""What the user did that cannot be done, and the exit code that says so.

A problem is *what*, *where*, *fix*. Commands render it without a traceback; anything that is
no FusecliError is a bug (exit 70) and is never dressed as the user's mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fusecli.reasons import REASONS


class ExitCode(IntEnum):
    """The exit codes of every command; `fusecli --help` prints the same list."""

    OK = 0
    DIFFERENT = 1
    USAGE = 2
    UNSAFE = 3
    REFUSED = 4
    NOTHING = 5
    INCONCLUSIVE = 6
    BUG = 70


@dataclass(frozen=True)
class Problem:
    """One mistake: `what` went wrong, `where` (file:line:column, path or name) and the `fix`."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        located = f"{self.where}: {self.what}" if self.where else self.what
        return f"{located}; {self.fix}" if self.fix else located


class FusecliError(Exception):
    """One or more problems, all reported at once, and the exit code they end in."""

    exit_code = ExitCode.BUG

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(FusecliError):
    """The command line, the spec or a name in it is wrong."""

    exit_code = ExitCode.USAGE


class UnsafeError(FusecliError):
    """The input cannot be read, or reading it would run somebody's code without consent."""

    exit_code = ExitCode.UNSAFE


class RefusedError(FusecliError):
    """A requested fusion is unsound or unsupported."""

    exit_code = ExitCode.REFUSED


class NotFoldable(Exception):
    """The way a guard says no: the engine answers with a Refusal, and no user sees it raised.

    `code` is one of fusecli.reasons; any other is a bug, and a ValueError.
    """

    def __init__(self, code: str, reason: str, *, evidence: tuple[str, ...] = (), remedy: str = "") -> None:
        if code not in REASONS:
            raise ValueError(f"{code!r} is not in the closed list of reason codes, fusecli/reasons.py")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.evidence = evidence
        self.remedy = remedy


def require(
    condition: bool, code: str, reason: str, *, evidence: tuple[str, ...] = (), remedy: str = ""
) -> None:
    """Guard of a rule or an equation: raises NotFoldable unless `condition` holds."""
    if not condition:
        raise NotFoldable(code, reason, evidence=evidence, remedy=remedy)
