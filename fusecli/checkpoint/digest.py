"""The sha256 of a file, streamed: it identifies inputs and artifacts in the manifest and the report."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK = 1 << 22


def sha256_file(path: str | Path) -> str:
    """The hex sha256 of the file's bytes.

    hashlib releases the GIL for every chunk of this size, so a caller may hash in a thread while it works.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
