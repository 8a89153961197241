"""Looks, by blocks, for runs of NUL and for all that resembles the start of a message.

For files of From_ lines and for MMDF files; the octets come from a `Read`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from popdrop.stores.mbox.findings import Findings, Read
from popdrop.stores.mbox.mmdf import SEPARATOR
from popdrop.stores.mbox.scan import EMPTY_LINES, FROM_LINE, LONGEST_FROM

Range = tuple[int, int]
"""Offsets of the first octet and of the one behind the last, 0-based."""

AFTER_EMPTY_LINE: Final = re.compile(rb"(?:\A|\n)\r?\n\Z")
"""At the end of what was read before a place: an empty line, or the one that begins a file."""

AFTER_SEPARATOR: Final = re.compile(rb"(?:\A|\n)\x01{4}\r?\n\Z")
"""The same for a line of four ^A."""

BEFORE: Final = 7
"""Octets to read before a place for these two."""

_FROM: Final = re.compile(rb"From ")
_FROM_OR_SEPARATOR: Final = re.compile(rb"From |\x01{4}\r?\n")
_NULS: Final = re.compile(rb"\0+")
_DIRECTLY_BEHIND: Final = b"\r\n >\t"


def _never(offset: int) -> bool:
    return False


class Marks:
    """Takes a file of `size` octets by blocks of any size, and says what it meets.

    `mmdf` tells MMDF files from those of From_ lines. What `is_text` knows to be none of this,
    by the offset, is passed over.
    """

    def __init__(
        self,
        read: Read,
        size: int,
        mmdf: bool,
        said: Findings,
        is_text: Callable[[int], bool] = _never,
    ) -> None:
        self._read = read
        self._size = size
        self._mmdf = mmdf
        self._tokens = _FROM_OR_SEPARATOR if mmdf else _FROM
        self._said = said
        self._is_text = is_text
        self._buffer = b""
        self._base = 0
        self._looked = 0
        self._run: Range | None = None
        self._taken = 0
        self.boundary = size
        """Where the first message begins that does not do so with the first octets."""
        self.behind = 0
        """Behind the last line of four ^A in an MMDF file, 0 if there is none."""
        self.gaps: list[Range] = []
        """Runs of NUL before a message, in ascending order."""
        self.tail: Range | None = None
        """A run of NUL behind the last message."""
        self.doubtful = False
        """Whether anything was found that a Content-Length might make text."""

    def feed(self, block: bytes) -> None:
        """Take the next octets."""
        self._nuls(block)
        self._taken += len(block)
        self._buffer += block
        if len(self._buffer) > 2 * LONGEST_FROM:
            self._look(len(self._buffer) - LONGEST_FROM)

    def close(self) -> None:
        """No more octets."""
        if self._run is not None:
            self._end_run()
        self._look(len(self._buffer))

    def _look(self, stop: int) -> None:
        """Look at what begins before `stop` in the buffer, and keep the rest."""
        buffer, base = self._buffer, self._base
        position = self._looked - base
        while (found := self._tokens.search(buffer, position)) and found.start() < stop:
            start = found.start()
            position = found.end()
            if found[0][0] == 1:
                self._separator(buffer, start, found.end())
                continue
            # One look a line: a longer part of it cannot be dated if this one is not.
            end = buffer.find(b"\n", start, start + LONGEST_FROM) + 1
            self._from(buffer, start, base + start, end > 0)
            position = max(end, position)
        self._looked = base + max(position, stop)
        keep = max(stop - BEFORE, 0)
        self._buffer, self._base = buffer[keep:], base + keep

    def _separator(self, buffer: bytes, start: int, end: int) -> None:
        offset = self._base + start
        if not offset or buffer[start - 1] == 0x0A:
            self.behind = self._base + end
            if self.boundary == self._size and offset:
                self.boundary = offset
        elif not self._is_behind_gap(offset):
            text = "a line of ^A with other text directly before it: it is taken for text"
            self._said.add("run-together", text, offset)

    def _from(self, buffer: bytes, start: int, offset: int, ended: bool) -> None:
        before = buffer[max(start - BEFORE, 0) : start]
        separated = not before or AFTER_EMPTY_LINE.search(before) is not None
        line_start = separated or before.endswith(b"\n")
        if not line_start and before[-1] in _DIRECTLY_BEHIND:
            return
        # A line without its end in the buffer is too long for a date.
        dated = ended and FROM_LINE.match(buffer, start) is not None
        if self._mmdf:
            if separated and dated and self.behind:
                text = "a From_ line in the text: it may be mail that was delivered as plain mbox"
                self._said.add("run-together", text, offset)
            return
        if separated and dated and self.boundary == self._size and offset:
            self.boundary = offset
        if separated == dated or self._is_text(offset):
            return
        if separated:
            text = "begins as a From_ line does, but has no valid date: it is taken for text"
            self._doubt("undated", text, offset)
        elif not self._is_behind_gap(offset):
            where = "no empty line before" if line_start else "other text directly before"
            text = f"a From_ line with {where} it: two messages may have run together"
            self._doubt("run-together", text, offset)

    def _doubt(self, kind: str, text: str, offset: int) -> None:
        self.doubtful = True
        self._said.add(kind, text, offset)

    def _is_behind_gap(self, offset: int) -> bool:
        position = bisect_left(self.gaps, (offset, 0))
        return position > 0 and self.gaps[position - 1][1] == offset

    def _nuls(self, block: bytes) -> None:
        base = self._taken
        if self._run is not None and block[:1] != b"\0":
            self._end_run()
        for found in _NULS.finditer(block) if b"\0" in block else ():
            start, stop = base + found.start(), base + found.end()
            if self._run is not None:
                start = self._run[0]
            self._run = (start, stop)
            if found.end() < len(block):
                self._end_run()

    def _end_run(self) -> None:
        assert self._run is not None
        (start, stop), self._run = self._run, None
        count = f"{stop - start} NUL{'s' * (stop - start > 1)}"
        before = self._octets(max(start - BEFORE, 0), start)
        if self._may_begin(before, start) and not self._is_text(start):
            if stop == self._size:
                self.tail = (start, stop)
                self._doubt("nul-gap", f"{count} behind the last message", start)
                return
            behind = self._octets(stop, stop + LONGEST_FROM)
            if (SEPARATOR if self._mmdf else FROM_LINE).match(behind):
                self.gaps.append((start, stop))
                self._doubt("nul-gap", f"{count} before a message", start)
                return
        self._said.add("nul", f"{count} in the text", start)

    def _may_begin(self, before: bytes, offset: int) -> bool:
        if not self._mmdf:
            return not before or AFTER_EMPTY_LINE.search(before) is not None
        if AFTER_SEPARATOR.search(before):
            return True
        return len(before) == offset and EMPTY_LINES.fullmatch(before) is not None

    def _octets(self, start: int, stop: int) -> bytes:
        return b"".join(self._read(start, stop))
