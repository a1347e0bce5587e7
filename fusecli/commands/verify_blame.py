"""Checkpoint, artifact and the model's code do not belong together: which of the three is another one.

The manifest holds the digest of the checkpoint that the artifact was made from; where that is the digest of
the file at hand, it is the model's code that is not what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusecli.checkpoint import Checkpoint
from fusecli.errors import Problem, UsageError
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.pipeline import facts
from fusecli.rewrite import Manifest
from fusecli.source.source import Source

NO_RELEASE = "do not release this artifact; fuse the checkpoint again"
_SAME_FILE = "same checkpoint (its sha256 matches the manifest's)"
_GIVE_IT = "give the checkpoint that the artifact was made from"
_GIVE_CODE = "verify with the code and the arguments that it was fused with, or fuse again with these"


def telling_which(
    error: UsageError, checkpoint: Checkpoint, artifact: Checkpoint, manifest: Manifest
) -> UsageError:
    """The error, behind which of the three is another one: of checkpoint, artifact and the model's code,
    the digest in the manifest knows the checkpoint."""
    if not {problem.where for problem in error.problems} & {str(checkpoint.path), str(artifact.path)}:
        return error  # the factory, or what it is called with
    what, fix = _another_file(checkpoint, manifest), _GIVE_IT
    if not what:
        what, fix = f"{_SAME_FILE}; the model's code is not the one it was fused with", _GIVE_CODE
    return UsageError(Problem(what, str(checkpoint.path), fix), *error.problems)


def _another_file(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """That this is another checkpoint than the manifest names; "" where it is that one."""
    own, noted = checkpoint.sha256(), manifest.input_sha256
    if own == noted:
        return ""
    digests = f"sha256 {own[:12]}..., not {noted[:12]}..."
    return f"this is not the checkpoint that the artifact was made from: {digests}"


def misfit(source: Source, manifest: Manifest) -> tuple[str, str]:
    """Why the groups of the manifest cannot be fused here, and what to do."""
    if another := _another_file(source.checkpoint, manifest):
        return f"{another}; the manifest's groups cannot be fused on it", _GIVE_IT
    if source.build is None:
        return f"{_SAME_FILE}; the manifest names groups that cannot be fused on it", NO_RELEASE
    return f"{_SAME_FILE}; the model's code differs: the manifest's groups cannot be fused in it", _GIVE_CODE


def blamed(outcome: Outcome, source: Source, manifest: Manifest, unlike: Sequence[str]) -> Outcome:
    """A difference, behind what it may come from: another checkpoint, or another model than was fused."""
    if another := _another_file(source.checkpoint, manifest):
        return replace(outcome, problems=(another,), next_step=f"{_GIVE_IT}; else {NO_RELEASE}")
    if unlike and source.build is not None:
        problem = (
            f"{_SAME_FILE}; the manifest speaks of another model: its code differs, or the manifest does"
        )
        return replace(outcome, problems=(problem,), next_step=f"{_GIVE_CODE}; else {NO_RELEASE}")
    return outcome


def mismatches(source: Source, manifest: Manifest) -> list[LedgerEntry]:
    checkpoint, adapter = source.checkpoint, source.adapter
    found = facts.other_file_ledger(checkpoint.path, checkpoint.sha256(), manifest.input_sha256, "artifact")
    if adapter is not None:
        found += facts.other_file_ledger(adapter.path, adapter.sha256, manifest.adapter_sha256, "artifact")
    return found
