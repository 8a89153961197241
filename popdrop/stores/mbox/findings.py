"""What can be said of a spool: kinds of findings, and the findings of one file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple

Read = Callable[[int, int], Iterator[bytes]]
"""The octets from one offset to another, in blocks; fewer where the file ends before."""

Watch = Callable[[str, int], None]
"""Called with what is being done, and with the octets that it has just taken."""


def unwatched(doing: str, octets: int) -> None:
    """A `Watch` that does nothing."""


MOST: Final = 20
"""Findings of one kind that are given one by one; the rest of them is counted."""

LARGE: Final = 51_200_000
"""Octets of a message that is worth a word: Postfix lets a whole mailbox grow to no more."""


class Severity(Enum):
    """How bad a finding is."""

    ERROR = "error"
    """The server refuses the maildrop, or the spool cannot be mended by `popdrop fsck`."""
    WARNING = "warning"
    """Something is to be done: by `popdrop fsck --repair`, or by somebody who looks."""
    NOTE = "note"
    """Nothing is to be done, as far as can be told. A spool with nothing but notes is clean."""


class Kind(NamedTuple):
    """A kind of finding: how bad it is, and whether `repair` mends it."""

    severity: Severity
    mendable: bool
    meaning: str


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

KINDS: Final = {
    "unsafe": Kind(_E, False, "not a plain file, more than one link, or the wrong owner"),
    "unreadable": Kind(_E, False, "the spool cannot be opened or read"),
    "garbage": Kind(_E, True, "text before the first message: the file is no mbox"),
    "nul-gap": Kind(_W, True, "NULs between two messages or behind the last, left by a crash"),
    "no-newline": Kind(_W, True, "the last line has no line end"),
    "no-separator": Kind(
        _W, True, "no empty line behind the last message, or in MMDF files no line of ^A"
    ),
    "nul": Kind(_N, False, "NULs within a message"),
    "run-together": Kind(
        _N,
        False,
        "a From_ line with no empty line before it; in MMDF files one in the text, or "
        "a line of ^A that does not begin its line",
    ),
    "undated": Kind(_N, False, "a line that begins as a From_ line does, but has no valid date"),
    "one-line": Kind(
        _N, False, "MMDF: one line of ^A between two messages, where there should be two"
    ),
    "length": Kind(_N, False, "a Content-Length that is not true, so it is not believed"),
    "no-header": Kind(_N, False, "a message that does not begin with a header field"),
    "cut-header": Kind(_N, False, "a message whose header is not ended by an empty line"),
    "large": Kind(_N, False, f"a message of more than {LARGE} octets"),
    "duplicate": Kind(_N, False, "a message that is equal to an earlier one"),
    "pseudo": Kind(_N, False, "the hidden message that UW-IMAP keeps its own data in"),
    "mode": Kind(_N, False, "others than owner and group may read or write the spool"),
    "owner": Kind(_N, False, "the spool is named for one account and belongs to another"),
    "lock-stale": Kind(_W, True, "a dot-lock whose process is gone"),
    "lock-held": Kind(_N, False, "a dot-lock that somebody holds"),
    "lock-odd": Kind(_E, False, "what lies at the dot-lock's name is no lock"),
    "lock-none": Kind(_N, False, "the spool was read without a dot-lock"),
    "lock-temporary": Kind(_W, True, "a dot-lock in the making, of a killed process"),
    "index": Kind(_W, True, "an index that is damaged, or does not agree with the spool"),
    "journal": Kind(_W, True, "an unfinished update"),
    "journal-foreign": Kind(_E, False, "a journal that is not of this server"),
    "orphan": Kind(_W, False, "a journal that was kept aside for somebody to look at"),
}
"""Every kind of finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is to be said. `line` is 1-based, `offset` in octets and 0-based.

    `path` is the file that is meant, empty for the spool itself. `text` holds nothing out of the
    mail.
    """

    kind: str
    text: str
    offset: int | None = None
    line: int | None = None
    path: str = ""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.kind].severity

    @property
    def mendable(self) -> bool:
        """Whether `repair` mends it."""
        return KINDS[self.kind].mendable


def printable(path: str) -> str:
    """A path as it may be printed: no control characters, nothing that is no UTF-8."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class Findings:
    """Findings of one file; of each kind the first `MOST`, and the number of the others."""

    def __init__(self) -> None:
        self._listed: list[Finding] = []
        self._seen: Counter[str] = Counter()

    def add(self, kind: str, text: str, offset: int) -> None:
        """Take one more."""
        self._seen[kind] += 1
        if self._seen[kind] <= MOST:
            self._listed.append(Finding(kind, text, offset))

    def all(self, read: Read) -> list[Finding]:
        """All of them in the order of the file, with their lines."""
        listed = sorted(self._listed, key=lambda each: each.offset or 0)
        lines = line_numbers(read, [each.offset or 0 for each in listed])
        found = [replace(each, line=line) for each, line in zip(listed, lines, strict=True)]
        for kind, count in self._seen.items():
            if count > MOST:
                found.append(Finding(kind, f"and {count - MOST} more of this kind"))
        return found


def line_numbers(read: Read, offsets: Iterable[int]) -> Iterator[int]:
    """The 1-based lines in which these offsets lie; they are in ascending order."""
    line, position = 1, 0
    for offset in offsets:
        for block in read(position, offset):
            line += block.count(b"\n")
        position = offset
        yield line
