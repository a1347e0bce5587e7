"""What a file is, decided by its content and never by its name."""

from __future__ import annotations

import stat
from enum import Enum
from pathlib import Path

from fusecli.checkpoint.foreign import name_foreign
from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, misused, unreadable

_HEAD = 1024
_SMALLEST = 10  # a safetensors file without tensors
# The integer 0x1950a86a20f9469cfc6c, as every pickle protocol writes it (LONG1, ten bytes, STOP).
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")


class Kind(str, Enum):
    """The formats that can be opened."""

    SAFETENSORS = "safetensors"
    SHARDS = "safetensors shards"
    ZIP = "zip pickle"
    LEGACY = "legacy pickle"
    PICKLE = "plain pickle"


def sniff(path: Path) -> Kind:
    """The kind of the file.

    Raises UsageError where there is no file to read, UnsafeError naming a file that is no checkpoint.
    """
    head, size = _read_head(path)
    if size < _SMALLEST:
        what = f"the file has only {size} bytes: it was cut off" if size else "the file is empty"
        raise unreadable(path, what, DOWNLOAD_AGAIN)
    if kind := _known(head):
        return kind
    if foreign := name_foreign(head):
        what, fix = foreign
        raise unreadable(path, f"the file {what}", fix)
    if head.lstrip()[:1] == b"{":
        return Kind.SHARDS
    if head[8:9] == b"{":
        return Kind.SAFETENSORS  # with an absurd header length; the reader says so
    return Kind.PICKLE  # protocols 0 and 1 have no magic; the scan tells them from noise


def _known(head: bytes) -> Kind | None:
    # First, because a header length of 640 begins like a pickle of protocol 2 (80 02).
    if head[5:9] == b"\0\0\0{":
        return Kind.SAFETENSORS
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Kind.ZIP
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return Kind.LEGACY if _LEGACY_MAGIC in head[:64] else Kind.PICKLE
    return None


def _read_head(path: Path) -> tuple[bytes, int]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file"
            raise misused(path, what, "give the checkpoint file itself")
        with path.open("rb") as file:
            return file.read(_HEAD), status.st_size
    except FileNotFoundError:
        raise misused(path, "there is no such file", "check the path") from None
    except OSError as error:
        raise misused(
            path, f"cannot be opened: {error.strerror}", "check the path and its permissions"
        ) from None
    except ValueError:
        raise misused(Path(repr(str(path))), "is not a valid path", "check the path") from None
