"""Makes an identity of a module that does nothing at inference.

What it fuses   Dropout, DropPath, an average pooling of single elements, or any module that a run has seen to
                give what it takes; each in a group of its own, only with --remove-idle
Equation        none: y = x
Exact when      every recorded call gave the very tensor that it took, and the module holds no tensors
Refuses when    it never ran, holds tensors or has hooks, or gave anything else
Before          drop
After           Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("nothing", equation="none")
def idle(module: Member) -> Rewrite:
    return module.leaves()
