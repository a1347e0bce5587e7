"""Files that are no checkpoint at all, named from their first bytes, with what to do about each."""

from __future__ import annotations

import re

from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN

_UNPACK = "unpack it first and give the file inside"
_EXPORT = "give the PyTorch checkpoint it was exported from"
_DOWNLOAD_LINK = "use the direct download link and fetch the file again"
_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "run 'git lfs pull' to fetch them"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras or TensorFlow weights)", _EXPORT),
    (b"\x1f\x8b", "is gzip-compressed", _UNPACK),
    (b"BZh", "is bzip2-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "is xz-compressed", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", _UNPACK),
    (b"\x93NUMPY", "is a NumPy array, not a state dict", "save a dict of tensors with torch.save"),
    (b"GGUF", "is a GGUF model", _EXPORT),
    (b"\x7fELF", "is a compiled program", "give the checkpoint it was built from"),
)
_HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml|!--)", re.IGNORECASE)
# ModelProto: field 1 (ir_version) as a small number, then field 2 (producer_name) as a string.
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x00-\x40]")
_TAR_ADVICE = "unpack it, or load it with the old torch that wrote it and save its state dict again"


def name_foreign(head: bytes) -> tuple[str, str] | None:
    """What the file is and how to go on; None when the first bytes (at least 512) say nothing."""
    for magic, what, fix in _MAGIC:
        if head.startswith(magic):
            return what, fix
    if _HTML.match(head):
        return "is an HTML or XML page, not a checkpoint: the download gave a web page", _DOWNLOAD_LINK
    if _ONNX.match(head):
        return "is an ONNX model", _EXPORT
    if head[257:262] == b"ustar" or head.startswith((b"sys_info\0", b"storages\0", b"pickle\0")):
        return "is a tar archive (torch before 0.2 wrote checkpoints so)", _TAR_ADVICE
    if not head.strip(b"\0"):
        return "begins with nothing but zero bytes", DOWNLOAD_AGAIN
    return None
