"""Whose Python code may run: nothing that a file names is imported without the user's word.

The word is a package ("myproj", which covers "myproj.models") or a file ("net.py"), given by --allow-code,
by FUSECLI_ALLOW_CODE, by `[tool.fusecli] allow-code` of the project's pyproject.toml (which a person is asked
about where one is there), or at a prompt.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from fusecli.blame import described_with_place
from fusecli.errors import Problem, UnsafeError, UsageError
from fusecli.outcome import LedgerEntry
from fusecli.project import SWITCH, Project, project_of, remember, remembered, trusted_by_environment

ENVIRONMENT = "FUSECLI_ALLOW_CODE"
_ANSWER = "the answer to a question"


@dataclass
class Consent:
    """What may be imported; `ask` is called once for each new package or file, None: nobody is there to ask.

    words    what was allowed for this one run, by flag or answer: the same command needs them again
    by       who has allowed each package or file
    project  what speaks for itself; `trust` asks a person whether to listen, None: nobody is there to ask
    ran      the code that was needed, and by whose word it may run
    """

    packages: set[str] = field(default_factory=set)
    files: set[Path] = field(default_factory=set)
    ask: Callable[[str], bool] | None = None
    words: list[str] = field(default_factory=list)
    by: dict[str | Path, str] = field(default_factory=dict)
    project: Project | None = None
    trust: Callable[[str], bool] | None = None
    ran: dict[str, str] = field(default_factory=dict)

    @classmethod
    def gather(
        cls,
        flags: Iterable[str] = (),
        ask: Callable[[str], bool] | None = None,
        trust: Callable[[str], bool] | None = None,
        *,
        by: str = "allow_code",
    ) -> Consent:
        """The flags (said `by`), the environment and the project's own word, together. Paths are relative to
        the folder the command runs in, those of pyproject.toml to its own folder."""
        here = Path.cwd()
        consent = cls(ask=ask, words=list(flags), project=project_of(here), trust=trust)
        if lost := [word for word in consent.words if _is_file(word) and not Path(word).is_file()]:
            raise UsageError(
                *(Problem("there is no such file to allow", word, "check the path") for word in lost)
            )
        environment = filter(None, re.split(f"[,{os.pathsep}]", os.environ.get(ENVIRONMENT, "")))
        consent._add(consent.words, here, by)
        consent._add(environment, here, ENVIRONMENT)
        return consent

    def _add(self, words: Iterable[str], folder: Path, by: str) -> None:
        for code in _code(words, folder):
            self.by.setdefault(code, by)
            if isinstance(code, Path):
                self.files.add(code)
            else:
                self.packages.add(code)

    def require(self, reference: str, code: str | Path) -> None:
        """Raises UnsafeError unless the package or file `code`, which `reference` needs, may be imported."""
        name = _shortest(code) if isinstance(code, Path) else code.partition(".")[0]
        by = self._allowed(code)
        if by is None:
            by = self._by_project(code)
        if by is None:  # and not where a person has just said no to the project that names it
            by = self._answered(name)
        if by:
            self.ran.setdefault(name, by)
            return
        kind = "file" if isinstance(code, Path) else "package"
        fix = f"if you trust that code, add --allow-code {name}"
        if self.project is not None and self.project.void:
            fix += f"; {self.project.name} does not count: {self.project.void}"
        raise UnsafeError(
            Problem(
                f"it would run Python code of the {kind} {name}, which nobody has allowed", reference, fix
            )
        )

    @contextmanager
    def lending(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, a pickle that names `names` ("net.Net", "myproj.models.Net") finds code that is allowed: a
        file under its own name, a package in the working folder. No other file of that folder is found.

        The very module that "net.py:Net" means elsewhere, so that a class is one class. Raises UsageError
        where importing it fails.
        """
        needed = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
        if [name for name in sorted(needed) if self._allows(name)]:
            _see(Path.cwd())
        path, lent = [*sys.path], {}
        try:
            for file in self._files():
                if file.stem in needed and file.is_file() and self._allows(file):
                    lent[file.stem] = (sys.modules.get(file.stem), _import_file(file, _shortest(file)))
            later, sys.path[:] = [*sys.path], path
            sys.modules.update({name: module for name, (_, module) in lent.items()})
            yield
            sys.path[:] = later  # what forward imports while it runs may lie beside its file
        finally:
            for name, (before, module) in lent.items():
                if before is not None:
                    sys.modules[name] = before
                elif sys.modules.get(name) is module:
                    del sys.modules[name]

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """The code that was needed, and by whose word it may run."""
        return tuple(LedgerEntry("consent", name, f"allowed by {by}") for name, by in self.ran.items())

    def _allowed(self, code: str | Path) -> str | None:
        """Who has allowed the code without being asked now; None: nobody."""
        found = _covering(code, self.files | self.packages)
        return None if found is None else self.by.get(found, "the caller")

    def _files(self) -> list[Path]:
        project = self.project
        named = _code(project.words, project.file.parent) if project is not None else set()
        return sorted(self.files | {code for code in named if isinstance(code, Path)})

    def _allows(self, code: str | Path) -> bool:
        """Whether the code may run by a word that was given before; notes by whose, if so."""
        if by := self._allowed(code) or self._by_project(code):
            self.ran.setdefault(_shortest(code) if isinstance(code, Path) else code, by)
        return bool(by)

    def _by_project(self, code: str | Path) -> str | None:
        """By whose word the project may allow the code; "": by nobody's. None: it does not name that code."""
        project = self.project
        if project is None or _covering(code, _code(project.words, project.file.parent)) is None:
            return None
        return self._trusted

    @cached_property
    def _trusted(self) -> str:
        """By whose word the project counts; "" where the person who is there says no, which holds for this
        one run. Asked when its word is first needed, and then never again."""
        project = self.project
        assert project is not None
        if trusted_by_environment():
            return f"{project.name} ({SWITCH}=1)"
        if self.trust is None:
            return f"{project.name} (there was nobody to ask)"
        if remembered(project):
            return f"{project.name} (trusted before)"
        if not self.trust(project.question):
            return ""
        trouble = remember(project)
        return f"{project.name} (trusted when asked{f'; not remembered: {trouble}' if trouble else ''})"

    def _answered(self, name: str) -> str:
        if self.ask is None or not self.ask(name):
            return ""
        self._add([name], Path.cwd(), _ANSWER)
        self.words.append(name)
        return _ANSWER


def _code(words: Iterable[str], folder: Path) -> set[str | Path]:
    """The packages and the files, relative to `folder`, that the words name."""
    return {(folder / word).resolve() if _is_file(word) else word for word in words}


def _covering(code: str | Path, allowed: Iterable[str | Path]) -> str | Path | None:
    """What of all that is allowed covers the file or the module `code`."""
    if isinstance(code, Path):
        return code if code in allowed else None
    names = (name for name in allowed if isinstance(name, str))
    return next((name for name in names if code == name or code.startswith(f"{name}.")), None)


def load_object(reference: str, consent: Consent, folder: Path | None = None) -> Any:
    """What "pkg.module:name" or "path/to/file.py:name" (relative to `folder`) refers to.

    Raises UnsafeError without consent, UsageError where there is no such thing or importing it fails.
    """
    source, _, name = reference.rpartition(":")
    folder = folder or Path.cwd()
    if _is_file(source):
        path = (folder / source).resolve()
        consent.require(reference, path)
        return _attribute(_import_file(path, reference), name, reference)
    consent.require(reference, source)
    return _attribute(_import_module(source, reference, folder), name, reference)


def load_class(name: str, consent: Consent, folder: Path | None = None) -> type:
    """The class of a dotted name in torch or an allowed package, or of "net.py:Class" in an allowed file.

    Raises what load_object does.
    """
    module, _, attribute = name.rpartition(".")
    if ":" in name:
        found = load_object(name, consent, folder)
    elif module.partition(".")[0] == "torch":
        found = _attribute(_import_module(module, name, folder or Path.cwd()), attribute, name)
    else:
        found = load_object(f"{module}:{attribute}", consent, folder)
    if not isinstance(found, type):
        raise UsageError(Problem(f"is a {type(found).__name__}, not a class", name))
    return found


def _import_module(name: str, reference: str, folder: Path) -> Any:
    # A console script does not see the folder it is run in; a project's own package lies there.
    _see(folder)
    _see(Path.cwd())
    return _importing(lambda: importlib.import_module(name), reference)


def _see(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_file(path: Path, reference: str) -> Any:
    if not path.is_file():
        raise UsageError(Problem(f"the file {_shortest(path)} does not exist", reference))
    name = f"fusecli_code_{abs(hash(path)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _see(path.parent)
    try:
        _importing(lambda: spec.loader.exec_module(module), reference)  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _importing(work: Callable[[], Any], reference: str) -> Any:
    try:
        return work()
    except Exception as error:  # whatever somebody's module does while it is imported
        raise UsageError(
            Problem(
                f"importing it failed: {described_with_place(error)}",
                reference,
                "check that it imports in this Python environment",
            )
        ) from error


def _attribute(module: Any, name: str, reference: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            fix = f"did you mean '{near[0]}'?" if near else "check the name"
            raise UsageError(Problem(f"there is no '{part}' in it", reference, fix))
        found = getattr(found, part)
    return found


def _is_file(word: str) -> bool:
    return word.endswith(".py") or "/" in word or os.sep in word


def _shortest(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
