"""The kinds of mbox, and the few questions that others have about each. Pure.

A kind is what the administrator said a file is. Only `auto` looks, and only at the first octets:
MMDF or From_ lines (decision 15). Whether `>From ` lines are un-quoted is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from popdrop.stores.mbox.lengths import LengthScanner
from popdrop.stores.mbox.mmdf import SEPARATOR, MmdfScanner
from popdrop.stores.mbox.scan import FROM_LINE, LONGEST_FROM, NotAnMbox, Scanner
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.uidl import STRIPPED, MessageHash

LOOK_AHEAD: Final = LONGEST_FROM
"""Octets from a message's start that tell whether one begins there."""

LOOK_BACK: Final = 7
"""Octets before a place that tell whether a message may begin there."""

_EMPTY_LINE: Final = re.compile(rb"\r?\n")
_CLOSING: Final = re.compile(rb"(?:\r?\n)?(?:\x01{4}\r?\n(?=\x01{4}\r?\n))?")
_AFTER_EMPTY_LINE: Final = re.compile(rb"(?:\A|\n)\r?\n\Z")
_AFTER_SEPARATOR: Final = re.compile(rb"(?:\A|\n)\x01{4}\r?\n\Z")
_SEPARATOR_LINE: Final = b"\x01\x01\x01\x01\n"


def is_mmdf(octets: bytes) -> bool:
    """Whether they begin with a line of four ^A."""
    return SEPARATOR.match(octets) is not None


class Scans(Protocol):
    """What every scanner does; see `scan.Scanner`."""

    def feed(self, block: bytes) -> None:
        """Take the next octets of the file. Raises `NotAnMbox`."""

    def close(self) -> Spans:
        """No more octets. Raises `NotAnMbox`."""


class AutoScanner:
    """For files of which it is not known whether they are MMDF: two scanners, and one gives up."""

    def __init__(self, *scanners: Scanner) -> None:
        self._scanners = list(scanners)
        self._wanted = " or ".join(each.wanted for each in scanners)

    def feed(self, block: bytes) -> None:
        """As `Scanner.feed`."""
        if len(self._scanners) == 1:
            self._scanners[0].feed(block)
            return
        for scanner in list(self._scanners):
            try:
                scanner.feed(block)
            except NotAnMbox as fault:
                self._give_up(scanner, fault)

    def close(self) -> Spans:
        """As `Scanner.close`."""
        try:
            # Where two are left, they have seen nothing but empty lines, or half a line.
            return self._scanners[0].close()
        except NotAnMbox as fault:
            raise NotAnMbox(fault.line, fault.offset, self._wanted) from None

    def _give_up(self, scanner: Scanner, fault: NotAnMbox) -> None:
        self._scanners.remove(scanner)
        if not self._scanners:
            raise NotAnMbox(fault.line, fault.offset, self._wanted) from None


@dataclass(frozen=True, slots=True)
class Form:
    """What is to be known of one kind of mbox.

    `unquote`     whether `>From `, `>>From ` lose one `>` when they are sent
    `lengths`     whether Content-Length is believed where it is true
    `from_lines`  whether files may begin with a From_ line
    `mmdf`        whether files may begin with a line of four ^A
    """

    name: str
    unquote: bool = False
    lengths: bool = False
    from_lines: bool = True
    mmdf: bool = False

    def scanner(self, *, strip: frozenset[bytes] = STRIPPED, hide: bool = True) -> Scans:
        """What finds the messages of a file, or of a part that begins with a message.

        `strip` are the fields that are not sent; `hide` looks for the c-client pseudo message.
        """
        scanners: list[Scanner] = []
        if self.lengths:
            scanners.append(LengthScanner(strip=strip, hide=hide))
        elif self.from_lines:
            scanners.append(Scanner(unquote=self.unquote, strip=strip, hide=hide))
        if self.mmdf:
            scanners.append(MmdfScanner(strip=strip, hide=hide))
        return scanners[0] if len(scanners) == 1 else AutoScanner(*scanners)

    def begins(self, octets: bytes) -> bool:
        """Whether a message begins with these `LOOK_AHEAD` octets, or fewer at the file's end."""
        return (self.from_lines and FROM_LINE.match(octets) is not None) or (
            self.mmdf and is_mmdf(octets)
        )

    def may_begin(self, before: bytes) -> bool:
        """Whether a message may begin behind these `LOOK_BACK` octets; fewer are a file's first."""
        if not before:
            return True
        if self.lengths or self.mmdf:
            return before.endswith(b"\n")
        return self.is_over(before)

    def is_over(self, before: bytes) -> bool:
        """Whether a separator ends these `LOOK_BACK` octets, or fewer at the file's start.

        What begins as a message behind it is one, but for a Content-Length over it.
        """
        return (
            not before
            or _AFTER_EMPTY_LINE.search(before) is not None
            or (self.mmdf and _AFTER_SEPARATOR.search(before) is not None)
        )

    def gap(self, octets: bytes) -> int:
        """How many of these octets, which came behind the last message, end that one.

        Deliverers may write an empty line first, and MMDF messages have a closing line.
        """
        gap = (_CLOSING if self.mmdf else _EMPTY_LINE).match(octets)
        return gap.end() if gap else 0

    def between(self, before: bytes, message: bytes) -> bytes:
        """What is to be written behind the last `LOOK_BACK` octets of a file before `message`."""
        if not before:
            return b""
        line_end = b"" if before.endswith(b"\n") else b"\n"
        if self.mmdf and is_mmdf(message):
            return b"" if _AFTER_SEPARATOR.search(before) else line_end + _SEPARATOR_LINE
        return b"" if _AFTER_EMPTY_LINE.search(before) else line_end + b"\n"

    def digest(self, blocks: Iterable[bytes]) -> bytes:
        """What a message's unique-id is made of (`MessageHash`), 16 octets.

        `blocks` are its octets from its start on, without the separator behind it; the first of
        them holds at least `LOOK_AHEAD` octets. A line of ^A is no part of the message.
        """
        message: MessageHash | None = None
        for block in blocks:
            octets = block
            if message is None:
                opening = SEPARATOR.match(block) if self.mmdf else None
                if opening:
                    octets = block[opening.end() :]
                from_line = opening is None or FROM_LINE.match(octets) is not None
                message = MessageHash(from_line=from_line)
            message.update(octets)
        return (message or MessageHash()).digest()


FORMS: Final = {
    form.name: form
    for form in (
        Form("mboxrd", unquote=True),
        Form("mboxo"),
        Form("mboxcl", lengths=True),
        Form("mboxcl2", lengths=True),
        Form("mmdf", from_lines=False, mmdf=True),
        Form("auto", lengths=True, mmdf=True),
    )
}
"""The kinds by name. What `auto` meets may have been written unquoted, so nothing is un-quoted."""
