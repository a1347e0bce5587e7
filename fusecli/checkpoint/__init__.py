"""Files: checkpoints opened lazily and safely, artifacts written atomically and deterministically."""

from __future__ import annotations

from fusecli.checkpoint.digest import sha256_file
from fusecli.checkpoint.opening import AVERAGED, Checkpoint, open_checkpoint
from fusecli.checkpoint.staging import Staged, check_target, staged
from fusecli.checkpoint.stored import StoredTensor
from fusecli.checkpoint.writer import write_pt, write_safetensors

__all__ = [
    "AVERAGED",
    "Checkpoint",
    "Staged",
    "StoredTensor",
    "check_target",
    "open_checkpoint",
    "sha256_file",
    "staged",
    "write_pt",
    "write_safetensors",
]
