"""The zip archive that torch.save writes, checked member by member before torch opens it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, RESAVE, unreadable

_PICKLE_LIMIT = 100_000_000
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Archive:
    """The members of a torch zip below their common folder, with their sizes."""

    path: Path
    folder: str
    sizes: dict[str, int]

    def read_pickle(self) -> bytes:
        """The pickle that describes the tensors; their data are members of their own."""
        size = self.sizes["data.pkl"]
        if size > _PICKLE_LIMIT:
            raise unreadable(self.path, f"its pickle is oversized ({size:,} bytes)", RESAVE)
        with zipfile.ZipFile(self.path) as archive:
            try:
                return archive.read(f"{self.folder}/data.pkl")
            except (zipfile.BadZipFile, EOFError, OSError):
                raise unreadable(self.path, "the zip archive is damaged", DOWNLOAD_AGAIN) from None


def open_archive(path: Path) -> Archive:
    """The checked archive; UnsafeError if it is cut off, compressed, or no checkpoint of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError):
        raise unreadable(
            path, "the zip archive has no readable end: it was cut off", DOWNLOAD_AGAIN
        ) from None
    _refuse_others(path, [member.filename for member in members])
    _refuse_packed(path, members)
    folder = members[0].filename.split("/")[0]
    return Archive(path, folder, {m.filename.removeprefix(f"{folder}/"): m.file_size for m in members})


def _refuse_others(path: Path, names: list[str]) -> None:
    """Only an archive with data.pkl and without code is a checkpoint."""
    last = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in last:
        fix = "save its weights with torch.save(torch.jit.load(f).state_dict(), 'weights.pt')"
        raise unreadable(path, "is a TorchScript archive: a program, not a state dict", fix)
    if last & {"archive_format", "serialized_exported_program.json"} or _exported(last):
        fix = "save its weights with torch.save(torch.export.load(f).state_dict, 'weights.pt')"
        raise unreadable(path, "is a torch.export archive (.pt2), which only unpickling can open", fix)
    if any(name.endswith(".npy") for name in names):
        raise unreadable(path, "is a NumPy archive (.npz)", "save a dict of tensors with torch.save")
    if not names or f"{names[0].split('/')[0]}/data.pkl" not in names:
        what = "is a zip archive that torch.save did not write"
        raise unreadable(path, what, "unpack it and give the checkpoint inside")


def _exported(names: Iterable[str]) -> bool:
    return any(name.startswith("models/") and name.endswith(".json") for name in names)


def _refuse_packed(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Stored members only: they can be mapped, and no small file can unpack into a huge one."""
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            fix = "write it again with torch.save, which stores members as they are"
            raise unreadable(path, f"its zip member '{member.filename}' is compressed or encrypted", fix)
    size = path.stat().st_size
    if sum(member.file_size for member in members) > size:
        raise unreadable(path, f"its zip members claim more than the file's {size:,} bytes", DOWNLOAD_AGAIN)
