"""What edits do to the names of tensors: the one place that knows old key -> new key."""

from __future__ import annotations

from collections.abc import Iterable

from fusecli.nn import is_source
from fusecli.rewrite.edits import Clone, Container, Edit, Identity, Opaque, Passed, Plain, Remainder, Zero


class KeyMap:
    """Old state-dict key -> new key, or None where the tensor is gone; the longest path that matches decides.

    A tensor below an opaque module keeps its key here: only the fuser knows which of them survive.
    """

    def __init__(self, edits: Iterable[Edit]) -> None:
        self._moves: dict[str, str | None] = {}
        self._plain: set[str] = set()
        for edit in edits:
            match edit:
                case Clone(path):
                    # The names of a layer's tensors are names of the norm's; its statistics are gone.
                    self._moves[path] = None
                    self._moves |= {key: key for key in (f"{path}.weight", f"{path}.bias")}
                case Identity(path) | Passed(path) | Zero(path):
                    self._moves[path] = None
                case Plain(path):
                    self._plain.add(path)
                case Remainder(path, _, members):
                    self._moves[path] = None
                    self._moves.update({f"{path}.{name}": f"{path}.{name}" for name in members})
                case Container(path, _, members):
                    self._moves.update({member: f"{path}.{i}" for i, member in enumerate(members)})
                case Opaque(path, members):
                    self._moves.update(dict.fromkeys(members))
                    self._moves[path] = path

    def __call__(self, key: str) -> str | None:
        if key in self._moves:
            return self._moves[key]
        path, rest = key, ""
        while path:
            path, _, name = path.rpartition(".")
            rest = f"{name}.{rest}" if rest else name
            if path in self._plain and is_source(rest):
                return None
            if path in self._moves:
                moved = self._moves[path]
                return None if moved is None else f"{moved}.{rest}"
        return key
