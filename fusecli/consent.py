"""Whose Python code may run: nothing that a file names is imported without the user's word.

The word is a package ("myproj", which covers "myproj.models") or a file ("net.py"), given by --allow-code,
by FUSECLI_ALLOW_CODE, by `[tool.fusecli] allow-code` of the nearest pyproject.toml, or at a prompt.
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
from pathlib import Path
from typing import Any

from fusecli.blame import described_with_place
from fusecli.errors import Problem, UnsafeError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, as a package
    import tomli as tomllib

ENVIRONMENT = "FUSECLI_ALLOW_CODE"


@dataclass
class Consent:
    """What may be imported; `ask` is called once for each new package or file, None: nobody is there to ask.

    words  what was allowed for this one run, by flag or answer: the same command needs them again
    """

    packages: set[str] = field(default_factory=set)
    files: set[Path] = field(default_factory=set)
    ask: Callable[[str], bool] | None = None
    words: list[str] = field(default_factory=list)

    @classmethod
    def gather(cls, flags: Iterable[str] = (), ask: Callable[[str], bool] | None = None) -> Consent:
        """The flags, the environment and the project's own word, together. Paths are relative to the folder
        the command runs in, those of pyproject.toml to its own folder."""
        consent = cls(ask=ask, words=list(flags))
        if lost := [word for word in consent.words if _is_file(word) and not Path(word).is_file()]:
            raise UsageError(
                *(Problem("there is no such file to allow", word, "check the path") for word in lost)
            )
        consent._add(consent.words, Path.cwd())
        consent._add(filter(None, re.split(f"[,{os.pathsep}]", os.environ.get(ENVIRONMENT, ""))), Path.cwd())
        project = next((f for f in (p / "pyproject.toml" for p in _upwards(Path.cwd())) if f.is_file()), None)
        if project is not None:
            consent._add(_project_word(project), project.parent)
        return consent

    def _add(self, words: Iterable[str], folder: Path) -> None:
        for word in words:
            if _is_file(word):
                self.files.add((folder / word).resolve())
            else:
                self.packages.add(word)

    def require(self, reference: str, code: str | Path) -> None:
        """Raises UnsafeError unless the package or file `code`, which `reference` needs, may be imported."""
        if code in self.files if isinstance(code, Path) else self._covers(code):
            return
        name = _shortest(code) if isinstance(code, Path) else code.partition(".")[0]
        if self.ask is not None and self.ask(name):
            self._add([name], Path.cwd())
            self.words.append(name)
            return
        kind = "file" if isinstance(code, Path) else "package"
        raise UnsafeError(
            Problem(
                f"it would run Python code of the {kind} {name}, which nobody has allowed",
                reference,
                f"if you trust that code, add --allow-code {name}",
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
        if needed & self.packages:
            _see(Path.cwd())
        path, lent = [*sys.path], {}
        try:
            for file in sorted(self.files):
                if file.stem in needed and file.is_file():
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

    def _covers(self, module: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in self.packages)


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


def _upwards(folder: Path) -> list[Path]:
    return [folder, *folder.parents]


def _project_word(project: Path) -> list[str]:
    try:
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("tool", {}).get("fusecli", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UsageError(Problem(f"cannot be read: {error}", str(project))) from error
    words = table.get("allow-code", []) if isinstance(table, dict) else []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(Problem("[tool.fusecli] allow-code is a list of names", str(project)))
    return words
