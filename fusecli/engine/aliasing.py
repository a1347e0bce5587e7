"""Memory after the fold: a module that becomes an identity gives the very memory that it takes.

Before, the two were apart, and a write to one of them was not seen in the other. So it is not asked which op
wrote, or through which view: only whether one of the two gets a new value while the other is still read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from math import inf

from fusecli.errors import NotFoldable
from fusecli.graph.dataflow import Call, Recording, described


@dataclass(frozen=True)
class Link:
    """One call of a module that becomes an identity.

    takes, gives  the storages that will be one
    since         the op call from which on they are
    """

    path: str
    takes: int
    gives: int
    since: int


def links_of(recording: Recording, path: str) -> Iterator[Link]:
    """The calls of a module as links; where it gives what it takes already, nothing changes.

    Of a norm with submodules these stay: they will be given what the norm takes.
    """
    for visit in recording.visits_of(path):
        inner = recording.visits_in(visit)
        gives, since = (inner[0].takes, inner[0].calls.start) if inner else (visit.gives, visit.calls.stop)
        for one in visit.takes:
            for other in gives:
                storages = recording.values[one].storage, recording.values[other].storage
                if storages[0] != storages[1]:
                    yield Link(path, *storages, since)


class Aliases:
    """The links of one run. `links` are all that may be asked for: of any module that may become an
    identity."""

    def __init__(self, recording: Recording, paths: Iterable[str]) -> None:
        self._recording = recording
        self._links = {path: list(links_of(recording, path)) for path in dict.fromkeys(paths)}
        self._at: dict[int, list[Link]] = {}
        for link in (link for links in self._links.values() for link in links):
            self._at.setdefault(link.takes, []).append(link)
            self._at.setdefault(link.gives, []).append(link)

    def require_apart(self, path: str, gone: Callable[[str], bool]) -> None:
        """Guard: nothing changes if the module at `path` becomes an identity beside those that are `gone`.

        Raises NotFoldable with the writer as evidence.
        """
        for link in self._links.get(path, ()):
            before = self._one_memory(link.takes, link, gone)
            after = self._one_memory(link.gives, link, gone)
            absent = {path} | {other.path for at in before | after for other in self._at[at]}
            absent = {other for other in absent if other == path or gone(other)}
            for written, read, words in (
                (before, after, f"what {path} takes is written to in place, and would be what it gives"),
                (after, before, f"what {path} gives is written to in place, and would be what it takes"),
            ):
                if (writer := self._seen(link.since, written, read, absent)) is not None:
                    raise NotFoldable(
                        "multiple-consumers",
                        words,
                        evidence=described(self._recording, [writer]),
                        remedy="leave it: the other readers would see what is written",
                    )

    def _one_memory(self, storage: int, but: Link, gone: Callable[[str], bool]) -> frozenset[int]:
        """The storages that are one with this, by the modules that are gone, `but` left out."""
        found, waiting = {storage}, [storage]
        while waiting:
            for link in self._at.get(waiting.pop(), ()):
                if link is but or not (gone(link.path) or link.path == but.path):
                    continue
                fresh = {link.takes, link.gives} - found
                found |= fresh
                waiting += fresh
        return frozenset(found)

    def _seen(
        self, since: int, written: Collection[int], read: Collection[int], absent: Collection[str]
    ) -> Call | None:
        """A call from `since` on that writes to one memory while the other is still read."""
        touches = self._recording.touches
        until: float = -1
        for storage in read:
            for reader in touches.reads.get(storage, ()):
                if not self._is_gone(reader, absent):
                    # What has left torch is read at any time.
                    until = max(until, inf if reader.lends else reader.number)
            if storage in touches.lasting:
                until = inf
        for storage in written:
            for writer in touches.writes.get(storage, ()):
                if writer.lends and until >= since:
                    return writer
                if since <= writer.number <= until and not self._is_gone(writer, absent):
                    return writer
        return None

    def _is_gone(self, call: Call, absent: Collection[str]) -> bool:
        """Whether a call is a part of a module that becomes an identity, its submodules left out."""
        return bool(call.visits) and self._recording.visits[call.visits[-1]].path in absent
