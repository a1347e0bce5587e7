"""The layers of the package: imports point down only, and neighbours do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fusecli"
LAYERS = (
    {"reasons"},
    {"errors", "plain", "bisect"},
    {"outcome"},
    {"contents", "picture", "blame"},
    {"project"},
    {"spec", "algebra", "nn", "consent", "sample"},
    {"rewrite", "graph", "checkpoint", "qat"},
    {"rules", "proof", "report", "artifact", "int8", "interop"},
    {"engine"},
    {"source"},
    {"pipeline"},
    {"commands"},
    {"api"},
    {"cli"},
)
TORCHLESS = {"report", "spec", "cli", "outcome", "reasons", "errors", "contents", "picture"}
TORCHLESS |= {"project", "consent", "blame"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
FILES = sorted(PACKAGE.rglob("*.py"))
# The way to torch.ao and back, which imports it when it is called.
ADAPTER = PACKAGE / "interop" / "torch_ao.py"


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported, with its line: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from fusecli import rules` names the part of the package after the `import`.
            own = node.module == "fusecli"
            yield from (
                (f"{node.module}.{alias.name}" if own else str(node.module), node.lineno)
                for alias in node.names
            )


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(source: str, owner: str) -> list[str]:
    """Imports of a file that belongs to `owner` which do not point down."""
    found = []
    for name, line in imports(ast.parse(source)):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "fusecli" and target != owner and not LEVEL[target] < LEVEL[owner]:
            found.append(f"line {line}: {owner} imports {target}")
    return found


def test_every_part_of_the_package_has_a_layer():
    parts = {part(path) for path in FILES} - {"__init__"}
    assert parts == set(LEVEL)
    assert len(LEVEL) == sum(map(len, LAYERS))  # and no more than one


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if part(path) == "__init__":
        return  # the front door: it names the API, and imports it only when it is used
    assert wrong_imports(path.read_text(encoding="utf-8"), part(path)) == []


def test_a_wrong_import_is_seen():
    assert wrong_imports("from fusecli.engine import plan", "rules") == ["line 1: rules imports engine"]
    assert wrong_imports("import fusecli.graph.kinds", "rewrite") == ["line 1: rewrite imports graph"]
    assert wrong_imports("def f():\n    from fusecli import api", "pipeline") == [
        "line 2: pipeline imports api"
    ]
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fusecli.report import as_json"
    assert wrong_imports(hidden, "outcome") == ["line 3: outcome imports report"]


def files_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each module the others that it imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for name, source in sources.items():
        named = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        # `from fusecli.pipeline import facts` is an import of that file, and of the package's own too.
        found[name] = {other for other in named if other in sources and other != name}
    return found


def circle(imported: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first of them at the end again; [] where there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (walk(other, [*way, name]) for other in sorted(imported[name]))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(imported))), [])


def test_no_file_imports_itself_through_others():
    sources = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        # A package's own file gathers what is in it: its files name it for that, and it is none of them.
        if parts[-1] != "__init__":
            sources[".".join(parts)] = path.read_text(encoding="utf-8")
    assert " -> ".join(circle(files_of(sources))) == ""


def test_a_circle_is_seen():
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import A"
    sources = {
        "p.a": "from p import b",
        "p.b": "def f():\n    import p.c",
        "p.c": hidden,
        "p.d": "import p.a",
    }
    assert circle(files_of(sources)) == ["p.a", "p.b", "p.c", "p.a"]
    assert circle(files_of({**sources, "p.c": ""})) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_needs_what_torch_removes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    removed = [name for name, _ in imports(tree) if name.startswith(("torch.ao", "torch.quantization"))]
    assert removed == (["torch.ao.nn.intrinsic"] if path == ADAPTER else [])


def test_the_adapter_imports_torch_ao_when_it_is_called():
    tree = ast.parse(ADAPTER.read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not [name for node in at_once for name, _ in imports(node) if name.startswith("torch.ao")]


def test_report_spec_and_cli_need_no_torch_to_be_imported():
    for path in FILES:
        if part(path) in TORCHLESS:
            found = [name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))]
            assert not [name for name in found if name.partition(".")[0] == "torch"], path


def test_names_say_something():
    assert not [path for path in FILES if VAGUE & set(path.relative_to(PACKAGE).with_suffix("").parts)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_uses_a_deprecated_quantized_dtype(path):
    named = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not named & {"qint8", "quint8", "qint32", "quint4x2"}


STEPS = [path for path in FILES if part(path) in ("source", "pipeline")]


def unfrozen(source: str) -> list[str]:
    """The dataclasses that can be changed after they were made."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            named = decorator.func if isinstance(decorator, ast.Call) else decorator
            keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
            frozen = any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in keywords)
            if ast.unparse(named) == "dataclass" and not frozen:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", STEPS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_the_steps_exchange_is_frozen(path):
    assert unfrozen(path.read_text(encoding="utf-8")) == []


def test_a_value_that_can_be_changed_is_seen():
    assert unfrozen("@dataclass\nclass A: ...\n@dataclass(frozen=True)\nclass B: ...") == ["A"]
    assert unfrozen("@dataclass(kw_only=True)\nclass A: ...") == ["A"]


def test_a_step_fits_on_a_screen():
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in [*STEPS, *(path for path in FILES if part(path) in ("commands", "api"))]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []
    assert len((PACKAGE / "api.py").read_text(encoding="utf-8").splitlines()) <= 200
