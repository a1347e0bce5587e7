"""What a project says in its pyproject.toml of the code that may run, and who has said that it is trusted.

A project may be a download, and then its own word is worth nothing: on a terminal a person is asked once, and
the answer is kept by the path of the file and the list in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fusecli.errors import Problem, UsageError
from fusecli.plain import visible

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, as a package
    import tomli as tomllib

SWITCH = "FUSECLI_PROJECT_CONSENT"
# So many names are shown of a list; a longer one is no question that a person can answer by reading.
_SHOWN = 8


@dataclass(frozen=True)
class Project:
    """The pyproject.toml that speaks for the working folder.

    words  its `[tool.fusecli] allow-code`
    void   why it does not count: others could have written it. It has not been read then
    """

    file: Path
    words: tuple[str, ...] = ()
    void: str = ""

    @property
    def name(self) -> str:
        """Its path as a person in the working folder would write it."""
        return os.path.relpath(self.file)

    @property
    def question(self) -> str:
        more = f" and {len(self.words) - _SHOWN} more" if len(self.words) > _SHOWN else ""
        named = ", ".join(self.words[:_SHOWN]) + more
        if self.file.parent == Path.cwd().resolve():
            return f"pyproject.toml here lets fusecli run {visible(named)}; do you trust this folder?"
        folder = visible(str(self.file.parent))
        return f"{visible(self.name)} lets fusecli run {visible(named)}; do you trust {folder}?"


def project_of(folder: Path) -> Project | None:
    """The nearest pyproject.toml between `folder` and the root of its repository, in `folder` alone where
    there is no repository; None where there is none, or the environment does not want any.

    Raises UsageError where it cannot be read.
    """
    if _switch() == "0":
        return None
    found = next((p / "pyproject.toml" for p in _places(folder.resolve()) if _there(p)), None)
    if found is None:
        return None
    if void := _void(found):
        return Project(found, void=void)
    return Project(found, tuple(_allowed_code(found)))


def trusted_by_environment() -> bool:
    """Whether the environment answers for a person that every project is trusted."""
    return _switch() == "1"


def remembered(project: Project) -> bool:
    """Whether a person has said yes to this file with this very list."""
    try:
        place = _place(project)
        return not _void(place) and place.read_bytes() == _record(project)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


def remember(project: Project) -> str:
    """Keeps a yes; what went wrong, or ""."""
    try:
        place = _place(project)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_record(project))
            temporary.replace(place)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _switch() -> str:
    said = os.environ.get(SWITCH, "").strip()
    if said not in ("", "0", "1"):
        fix = "0: no pyproject.toml counts; 1: it counts, and nobody is asked"
        raise UsageError(Problem(f"'{said}' is neither 0 nor 1", SWITCH, fix))
    return said


def _places(folder: Path) -> Iterable[Path]:
    """Where the file may lie, the nearest first."""
    upwards = [folder, *folder.parents]
    root = next((number for number, place in enumerate(upwards) if os.path.lexists(place / ".git")), 0)
    return upwards[: root + 1]


def _there(folder: Path) -> bool:
    return os.path.isfile(folder / "pyproject.toml")  # noqa: PTH113  (False for what may not be looked at)


def _void(file: Path) -> str:
    """Why somebody else could have written the file; "" where nobody could."""
    for place in dict.fromkeys((file.parent, file.resolve().parent, file)):
        kind = "folder" if place != file else "file"
        facts = place.stat()
        if not hasattr(os, "geteuid"):
            continue  # permission bits and owners of such a system say nothing
        if facts.st_uid not in (0, os.geteuid()):
            return f"its {kind} belongs to another user (uid {facts.st_uid})"
        if facts.st_mode & stat.S_IWOTH or (facts.st_mode & stat.S_IWGRP and not _only_mine(facts.st_gid)):
            return f"others can write to its {kind}" if kind == "folder" else "others can write to it"
    return ""


def _only_mine(group: int) -> bool:
    """Whether the group is the user's private one: many systems make files writable by it."""
    import grp
    import pwd

    try:
        mine, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:  # a number without a name
        return False
    return entry.gr_name in (mine, "root") and set(entry.gr_mem) <= {mine, "root"}


def _allowed_code(file: Path) -> list[str]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("fusecli", {})
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UsageError(Problem(f"cannot be read: {error}", str(file))) from error
    words = table.get("allow-code", []) if isinstance(table, dict) else []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(Problem("[tool.fusecli] allow-code is a list of names", str(file)))
    return words


def _place(project: Project) -> Path:
    """The file that stands for a yes: another list is another file, so it is asked for again."""
    named = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative one would lie in the very folder that is judged.
    config = Path(named) if Path(named).is_absolute() else Path.home() / ".config"
    return config / "fusecli" / "trusted" / f"{hashlib.sha256(_record(project)).hexdigest()}.json"


def _record(project: Project) -> bytes:
    said = {"project": str(project.file), "allow-code": list(project.words)}
    return (json.dumps(said, indent=2) + "\n").encode()
