"""`fusecli inspect`."""

from __future__ import annotations

from fusecli.cli import options


def inspect(checkpoint: options.Checkpoint, debug: options.Debug = False) -> None:
    """Show what is in a checkpoint and what fusing it would take; nothing in it is executed."""
    raise NotImplementedError
