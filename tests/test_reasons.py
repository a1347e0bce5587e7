"""The list of reason codes is closed: every code in the package is explained, and no other can be raised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecli.errors import NotFoldable, require
from fusecli.reasons import FAMILIES, REASONS

PACKAGE = Path(__file__).parent.parent / "fusecli"
# Where the code stands in a call of each of them.
POSITIONS = {"require": 1, "NotFoldable": 0, "Refusal": 1, "Unfused": 2}
CODE = re.compile(r"[a-z]+(-[a-z]+)*")
SENTENCES = re.compile(r"['\"A-Z0-9].*[^.\s]\.", re.DOTALL)


def texts(node: ast.AST | None) -> Iterator[str]:
    """The texts that an expression can give: a literal, or either side of `"a" if x else "b"`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*texts(node.body), *texts(node.orelse))


def is_sentence(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or any(" " in text for text in texts(node))


def names_code(target: ast.expr) -> bool:
    """`code`, or `code, ...`, on the left of an assignment or a loop."""
    first = target.elts[0] if isinstance(target, ast.Tuple) else target
    return isinstance(first, ast.Name) and first.id == "code"


def codes_of_call(call: ast.Call) -> Iterator[str]:
    position = POSITIONS.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if position is None:
        return
    before = call.args[: position + 1]
    if len(before) > position and not any(isinstance(argument, ast.Starred) for argument in before):
        yield from texts(before[position])
    yield from (text for word in call.keywords if word.arg == "code" for text in texts(word.value))


def codes_in(source: str) -> set[str]:
    """Every reason code that a file writes as a literal."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += codes_of_call(node)
        elif isinstance(node, ast.Assign) and any(map(names_code, node.targets)):
            found += texts(node.value)
        elif isinstance(node, ast.For) and names_code(node.target) and isinstance(node.iter, ast.Tuple):
            found += [
                text for row in node.iter.elts if isinstance(row, ast.Tuple) for text in texts(row.elts[0])
            ]
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and is_sentence(node.elts[1]):
            # ("no-statistics", "the norm keeps ..."): the pair that a question about a norm is answered with
            found += [text for text in texts(node.elts[0]) if "-" in text and CODE.fullmatch(text)]
    return set(found)


@pytest.mark.parametrize(
    ("source", "codes"),
    [
        ("require(x, 'shape', 'they differ')", {"shape"}),
        ("require(x, code='shape', reason='they differ')", {"shape"}),
        ("raise NotFoldable('a-b' if x else 'c-d', why)", {"a-b", "c-d"}),
        ("Refusal(group, 'a-b', f'{x}')", {"a-b"}),
        ("Unfused(path, 'norm', 'a-b', 'it is so')", {"a-b"}),
        ("Unfused(path, 'norm', *pair)", set()),
        ("_PAIR = ('a-b', 'it is so')", {"a-b"}),
        ("def f(x):\n    return 'a-b', f'{x} is so'", {"a-b"}),
        ("code = 'a-b' if x else 'c-d'", {"a-b", "c-d"}),
        ("for code, left, right in (('a-b', 1, 2), ('shape', 3, 4)): pass", {"a-b", "shape"}),
        ("consent.require(reference, 'module')", set()),
        ("require(x, *(missing or ('', '')), remedy='leave it out')", set()),
    ],
)
def test_codes_are_found_in_every_form_they_are_written_in(source, codes):
    assert codes_in(source) == codes


FILES = {
    path.relative_to(PACKAGE): codes_in(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("path", [path for path, codes in FILES.items() if codes], ids=str)
def test_every_code_of_the_package_is_explained(path):
    assert FILES[path] - set(REASONS) == set()


def test_the_package_was_searched_where_codes_are():
    used = set().union(*FILES.values())
    # One from each form: a guard, a loop's table, an answer about a norm, an assignment, a plain pair.
    assert used >= {
        "overflow",
        "different-stride",
        "batch-dependent",
        "not-affine",
        "not-listed",
        "held-back",
    }


def test_another_code_cannot_be_raised():
    with pytest.raises(ValueError, match="'overflown' is not in the closed list"):
        NotFoldable("overflown", "too large")
    with pytest.raises(ValueError, match="closed list"):
        require(False, "", "no code")
    require(True, "", "a guard that holds has no code to look up")
    assert NotFoldable("overflow", "too large").code == "overflow"


def test_no_code_is_explained_twice():
    codes = [reason.code for reasons in FAMILIES.values() for reason in reasons]
    assert sorted(codes) == sorted(REASONS)
    assert all(CODE.fullmatch(code) for code in codes)
    assert all(reason.code == code for code, reason in REASONS.items())


@pytest.mark.parametrize("reason", REASONS.values(), ids=list(REASONS))
def test_texts_are_sentences(reason):
    for text in (reason.meaning, reason.why, reason.remedy):
        assert SENTENCES.fullmatch(text)
        # Literals joined without the space between them, or with two.
        assert not re.search(r"\s\s|\n|[;,:][A-Za-z]|[.][A-Z][a-z]* ", text.replace("nn.", ""))
    assert not re.search(r"\.\s", reason.meaning)  # one sentence


def test_errors_and_reasons_cost_nothing_to_import():
    heavy = "{'torch', 'numpy', 'pydantic', 'rich', 'typer', 'yaml'}"
    script = f"import sys, fusecli.errors; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
