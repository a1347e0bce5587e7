"""YAML text -> tree of nodes, from the parser's event stream.

Composing YAML the usual way expands aliases, recurses without limit and turns `1.10` into a number
before anybody can ask for its text. The events come before all of that: an alias is refused where it
stands, nesting is counted, and scalars stay text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from fusecli.errors import UsageError
from fusecli.spec.nodes import Finding, Node, Place, Plain, in_order
from fusecli.spec.wording import escaped, shown

DEEPEST = 20
_TOO_DEEP = (f"this is nested deeper than {DEEPEST} levels", "a spec needs five at most")

# libyaml is ten times faster; a PyYAML built without it reads the same language.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_tree(text: str, label: str) -> tuple[Node, list[Finding]]:
    """The top mapping of the document, and what is wrong with the text so far.

    Raises UsageError where there is no tree to go on with: syntax errors, an empty file, a second
    document, nesting deeper than 20, a top level that is not a mapping.
    """
    reading = _Reading(label)
    try:
        node = reading.document(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        reading.findings.append(_syntax(error, label))
    except _UnreadableError as stop:
        reading.findings.append(stop.finding)
    else:
        return node, reading.findings
    raise UsageError(*in_order(reading.findings))


class _UnreadableError(Exception):
    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


class _Reading:
    """One pass over the events; problems that leave a tree to go on with are collected."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.findings: list[Finding] = []

    def document(self, events: Iterator[yaml.Event]) -> Node:
        next(events)
        if not isinstance(next(events), yaml.DocumentStartEvent):
            raise self._stop(
                Place(1, 1, self.label), "the file is empty", "a spec is a mapping: groups: [...]"
            )
        first = next(events)
        node = self.node(first, events, depth=1)
        next(events)
        after = next(events)
        if isinstance(after, yaml.DocumentStartEvent):
            raise self._stop(self._place(after), "a second document begins here", "one file is one spec")
        if not isinstance(node.content, dict):
            fix = "a spec is a mapping: groups: [[conv1, bn1], ...]"
            raise self._stop(self._place(first), "the top level is not a mapping", fix)
        return node

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            fix = "put it in quotes if it is a pattern, else write the value out"
            self.findings.append(
                Finding(
                    place, f"{shown(f'*{event.anchor}')} is a YAML alias, which a spec does not have", fix
                )
            )
            return Node(None, place)
        self._refuse_decoration(event, place)
        if isinstance(event, yaml.ScalarEvent):
            return Node(event.value if event.style in {"'", '"', "|", ">"} else Plain(event.value), place)
        if depth > DEEPEST:
            raise self._stop(place, *_TOO_DEEP)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(list(self._items(events, depth)), place)
        return Node(self._entries(events, depth), place)

    def _items(self, events: Iterator[yaml.Event], depth: int) -> Iterator[Node]:
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            yield self.node(event, events, depth + 1)

    def _entries(self, events: Iterator[yaml.Event], depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self.node(event, events, depth + 1)
            value = self.node(next(events), events, depth + 1)
            if self._is_key(key, entries):
                entries[str(key.content)] = Node(value.content, value.place, key.place)
        return entries

    def _is_key(self, key: Node, entries: dict[str, Node]) -> bool:
        if not isinstance(key.content, str):
            # An alias has been reported already.
            if key.content is not None:
                self.findings.append(Finding(key.place, "a key must be text", "put it in quotes"))
            return False
        if isinstance(key.content, Plain) and key.content == "<<":
            self.findings.append(Finding(key.place, "merge keys ('<<') are refused", "write the values out"))
            return False
        if str(key.content) in entries:
            first = entries[str(key.content)].key_place
            what = f"key {shown(key.content)} is written twice; the first is at {first}"
            self.findings.append(Finding(key.place, what, "keep one"))
            return False
        return True

    def _refuse_decoration(self, event: yaml.Event, place: Place) -> None:
        if (tag := getattr(event, "tag", None)) is not None:
            what = f"the YAML tag {shown(tag)} is refused"
            self.findings.append(Finding(place, what, "remove it; put text that begins with '!' in quotes"))
        if (anchor := getattr(event, "anchor", None)) is not None:
            what = f"the YAML anchor {shown(f'&{anchor}')} is refused"
            self.findings.append(Finding(place, what, "write the values out"))

    def _place(self, event: yaml.Event) -> Place:
        return _marked(event.start_mark, self.label)

    def _stop(self, place: Place, what: str, fix: str) -> _UnreadableError:
        return _UnreadableError(Finding(place, what, fix))


def _syntax(error: yaml.YAMLError, label: str) -> Finding:
    problem = str(getattr(error, "problem", None) or error)
    context = str(getattr(error, "context", None) or "")
    place = _marked(getattr(error, "problem_mark", None), label)
    if "nesting depth" in problem:  # libyaml reads ahead, and has come to a limit of its own
        return Finding(place, *_TOO_DEEP)
    if "alias" in context:
        return Finding(place, "a '*' begins a YAML alias here", 'put patterns in quotes: "*.bn"')
    if "mapping values are not allowed" in problem:
        fix = "check the indentation, quote text that contains ': '"
        return Finding(place, "this ':' makes a key where none can stand", fix)
    if "flow" in context or "quoted" in context:
        # Where it begins is closer to the mistake than the line on which the parser gave up.
        place = _marked(getattr(error, "context_mark", None), label)
        end = "quote has no end" if "quoted" in context else "bracket has no end, or a comma is missing in it"
        return Finding(place, f"this {end}", "close it")
    what = f"this is not YAML: {escaped(' '.join(filter(None, [problem, context])))}"
    return Finding(place, what, "check the indentation, the brackets and the quotes around this place")


def _marked(mark: Any, label: str) -> Place:
    return Place(mark.line + 1, mark.column + 1, label) if mark else Place(1, 1, label)
