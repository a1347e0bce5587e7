"""Groups as the entries of a spec: what repeats becomes a pattern, if that stands for these and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

from fusecli.errors import UsageError
from fusecli.spec.wildcards import bind_lists

_PLAIN = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_NUMBERS = re.compile(r"(\d+)")
_WIDTH = 76

Names = tuple[str, ...]


def entries(groups: Sequence[Names], names: Collection[str]) -> Iterator[list[str]]:
    """The entries of `groups`, each as its lines; `names` are all modules that a pattern could match.

    A pattern has a * for each number in the path that its names share, and a number where a * would match
    too much.
    """
    families: dict[Names, list[Names]] = {}
    for group in groups:
        if any("*" in name for name in group):
            yield [f"  # a name with a * is taken for a pattern: [{', '.join(map(scalar, group))}]"]
            continue
        families.setdefault(_pattern(group, _holes(group)), []).append(group)
    for family in families.values():
        for pattern, members in _covering(family, _holes(family[0]), names):
            yield _entry(pattern, f"  # {len(members)}" if len(members) > 1 else "")


def scalar(text: str) -> str:
    """A name as YAML reads it back; what JSON writes in quotes, YAML reads."""
    if _PLAIN.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # YAML takes some of these for line breaks and refuses others; a terminal may obey them.
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)


def _holes(group: Names) -> tuple[int, ...]:
    """Which numbers of the path that all names share could be a *, counted from the left."""
    return tuple(range(len(_NUMBERS.findall(".".join(_shared(group))))))


def _shared(group: Names) -> list[str]:
    paths = [name.split(".")[:-1] for name in group]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _pattern(group: Names, holes: Collection[int]) -> Names:
    prefix = ".".join(_shared(group))
    pieces = _NUMBERS.split(prefix)  # text, number, text, number, ..., text
    for number in holes:
        pieces[2 * number + 1] = "*"
    return tuple("".join(pieces) + name[len(prefix) :] for name in group)


def _covering(
    family: list[Names], holes: tuple[int, ...], names: Collection[str]
) -> Iterator[tuple[Names, list[Names]]]:
    """Patterns that together stand for the family, each with what it stands for."""
    pattern = _pattern(family[0], holes)
    if len(family) == 1:
        yield family[0], family
    elif _binds(pattern, family, names):
        yield pattern, family
    else:
        values = [[_numbers(group)[hole] for group in family] for hole in holes]
        if not values:
            yield from ((group, [group]) for group in family)
            return
        # Where a * has to go, the one that stands for the fewest numbers.
        hole = min(range(len(holes)), key=lambda i: len(set(values[i])))
        rest = holes[:hole] + holes[hole + 1 :]
        for number in dict.fromkeys(values[hole]):
            part = [group for group, own in zip(family, values[hole], strict=True) if own == number]
            yield from _covering(part, rest, names)


def _numbers(group: Names) -> list[str]:
    return _NUMBERS.findall(".".join(_shared(group)))


def _binds(pattern: Names, family: Sequence[Names], names: Collection[str]) -> bool:
    try:
        return {group.modules for group in bind_lists([list(pattern)], names)} == set(family)
    except UsageError:  # a name that the pattern language cannot say, such as one with a * of its own
        return False


def _entry(group: Names, remark: str) -> list[str]:
    words = [scalar(name) for name in group]
    line = f"  - [{', '.join(words)}]{remark}"
    if len(line) <= _WIDTH:
        return [line]
    first, *others = words
    opening = f"  - [{first},"
    # A comment that a narrow page breaks is no comment any more.
    lines = [opening + (remark if len(opening + remark) <= _WIDTH else "")]
    lines += [f"     {word}," for word in others[:-1]]
    return [*lines, f"     {others[-1]}]"]
