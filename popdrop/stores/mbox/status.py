"""Header fields of kept messages that change in an update. Pure: no file is touched here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

_STATUS: Final = re.compile(rb"\n(?i:Status):([^\n]*(?:\n[ \t][^\n]*)*)")
_READ: Final = b"Status: RO"
"""R: read; O: old, seen by a session before (c-client, qpopper, Dovecot)."""


class Edit(NamedTuple):
    """The octets from `start` to `stop` of a spool become `text`; 0-based offsets.

    `message` is where the From_ line of their message begins.
    """

    message: int
    start: int
    stop: int
    text: bytes


def may_insert(following: bytes) -> bool:
    """Whether a field may stand before these octets: a folded line would become part of it."""
    return not following.startswith((b" ", b"\t"))


def as_read(message: int, header: bytes, offset: int, line_end: bytes) -> Edit | None:
    """What marks a message as read, whose header stands at `offset`; `None` where it is marked.

    A field that is there is replaced. A new one comes first, as qpopper's do: there it cannot get
    between a field and its folded lines. `message` is the offset of the From_ line, `line_end`
    its line end.
    """
    found = _STATUS.search(b"\n" + header)
    if found:
        if b"R" in found[1]:
            return None
        text = _READ + b"\r" if found[1].endswith(b"\r") else _READ
        return Edit(message, offset + found.start(), offset + found.end() - 1, text)
    return Edit(message, offset, offset, _READ + line_end) if may_insert(header) else None


def edited(
    first: int, kept: Iterable[tuple[int, int]], edits: Iterable[Edit]
) -> tuple[int, list[tuple[int, int] | bytes]]:
    """A tail from `first` on of which `kept` stays, with `edits` made; its start, and its pieces.

    Edits come in the order of their offsets, and lie before `first` or within what is kept. The
    tail begins with a From_ line, as `first` does: recovery reads it as an mbox.
    """
    waiting = list(edits)
    ranges = list(kept)
    if waiting and waiting[0].message < first:
        ranges.insert(0, (waiting[0].message, first))
        first = waiting[0].message
    waiting.reverse()
    pieces: list[tuple[int, int] | bytes] = []
    for begin, stop in ranges:
        start = begin
        while waiting and waiting[-1].stop <= stop:
            edit = waiting.pop()
            if start < edit.start:
                pieces.append((start, edit.start))
            pieces.append(edit.text)
            start = edit.stop
        if start < stop:
            pieces.append((start, stop))
    return first, pieces


def length_of(pieces: Iterable[tuple[int, int] | bytes]) -> int:
    """Octets of all pieces."""
    return sum(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)
