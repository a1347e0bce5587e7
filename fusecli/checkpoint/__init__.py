"""Files: checkpoints opened lazily and safely, artifacts written atomically and deterministically."""

from __future__ import annotations

from fusecli.checkpoint.digest import sha256_file
from fusecli.checkpoint.extra_state import fits_in_text, in_text, is_plain
from fusecli.checkpoint.opening import AVERAGED, Checkpoint, open_checkpoint
from fusecli.checkpoint.prefixes import strip_prefixes
from fusecli.checkpoint.staging import Staged, check_target, staged
from fusecli.checkpoint.stored import StoredTensor, find_ties, store
from fusecli.checkpoint.writer import write_pt, write_safetensors

__all__ = [
    "AVERAGED",
    "Checkpoint",
    "Staged",
    "StoredTensor",
    "check_target",
    "find_ties",
    "fits_in_text",
    "in_text",
    "is_plain",
    "open_checkpoint",
    "sha256_file",
    "staged",
    "store",
    "strip_prefixes",
    "write_pt",
    "write_safetensors",
]
