"""MMDF files to the places and sizes of their messages. Pure.

Lines of four ^A stand around each message. What stands between two of them is a message, if it is
more than empty lines: so one that was lost between two messages, and one too many, do no harm
(c-client reads the former, too; qpopper counts pairs and goes astray). A From_ line right behind
such a line is not sent (c-client writes one, MMDF's own deliverer and qpopper do not). Nothing is
quoted, and Content-Length is not looked at.

A message goes with the last line of ^A before it, and all octets up to the one before the next
message: that is its own closing line, and whatever empty lines are there.
"""

from __future__ import annotations

import re
from typing import Final
from zlib import crc32

from popdrop.stores.mbox.scan import EMPTY_LINES, FROM_LINE, Scanner
from popdrop.stores.uidl import STRIPPED

SEPARATOR: Final = re.compile(rb"\x01{4}\r?\n")
"""The line before and behind each message, with its line end."""

_CONTROLS: Final = b"\n\x01\x01\x01\x01"


class MmdfScanner(Scanner):
    """As `Scanner`, for MMDF files. `Spans.heads` count the line of ^A and a From_ line."""

    wanted = "line of four ^A"
    _first_line = SEPARATOR

    def __init__(self, *, strip: frozenset[bytes] = STRIPPED, hide: bool = True) -> None:
        super().__init__(unquote=False, strip=strip, hide=hide)
        # Of what stands between two lines of ^A:
        self._is_opening = False
        self._is_message = False

    def _begin(self, line: re.Match[bytes]) -> None:
        super()._begin(line)
        self._check = 0
        self._is_opening = True
        self._is_message = False

    def _lines(self, buffer: bytes, done: int, end: int) -> None:
        for place in self._places(buffer, _CONTROLS, done - 1, end):
            line = SEPARATOR.match(buffer, place + 1, end)
            if line:
                self._take(buffer, done, line.start())
                self._finish(self._base + line.start(), 0)
                self._begin(line)
                done = line.end()
        self._take(buffer, done, end)

    def _take(self, buffer: bytes, start: int, end: int) -> None:
        if start == end:
            return
        if self._is_opening:
            self._is_opening = False
            line = FROM_LINE.match(buffer, start, end)
            if line:
                start = line.end()
                self._is_message = True
                self._content = self._body = self._base + start
                self._check = crc32(line[0])
        if not self._is_message:
            self._is_message = EMPTY_LINES.fullmatch(buffer, start, end) is None
        self._piece(buffer, start, end)

    def _finish(self, end: int, separator: int, missing: int = 0) -> None:
        if self._is_message:
            super()._finish(end, separator, missing)

    def _end(self, buffer: bytes) -> None:
        # An empty line at the end is a line of the message here.
        missing = 0 if buffer.endswith(b"\n") else self._end_line()
        self._finish(self._spans.end, 0, missing)
