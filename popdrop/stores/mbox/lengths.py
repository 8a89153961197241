"""mbox files whose messages may say by Content-Length where they end (mboxcl, mboxcl2). Pure.

What a header says is believed if a From_ line, or the end of the file, stands at its end: right
there, or behind the line end and the empty line that deliverers write before it (mutt and Dovecot
want just one line end there). Then From_ lines within the length are text. A length that is not
believed changes nothing: the message ends at the next From_ line behind an empty line.

A scanner cannot look ahead or go back, so the file is taken in parts, from one From_ line to the
next, as if no length were true, and each part keeps what it would be as a message and what as
text of the one before. When all parts are known, lengths are looked at in order and parts joined.

Believed are one field of 1 to 18 digits, not folded; two of them are none. A From_ line directly
behind another line than an empty one counts only at the end of such a length, and only as the
first From_ line of its paragraph: behind another one it would stand in that one's header.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final
from zlib import crc32

from popdrop.stores.mbox.scan import CONTEXT, FROM, FROM_LINE, Scanner, empty_line_before
from popdrop.stores.mbox.spans import FIELDS, REFUSED, Spans, octet_array
from popdrop.stores.uidl import STRIPPED

_LENGTH: Final = re.compile(rb"(?i)\nContent-Length:([^\n]*)")
_NUMBER: Final = re.compile(rb"[ \t]*(\d{1,18})[ \t]*\r?")
_LINE_ENDS: Final = re.compile(rb"(?:\r?\n){0,2}\Z")
_LF: Final = 0x0A
_CR: Final = 0x0D


@dataclass(slots=True)
class _Parts:
    """What stands between From_ lines: 58 octets of memory each.

    `octets` are as sent, with spool headers, without the From_ line, which `own` counts.
    `target` is where the Content-Length of the header ends, 0 for none; `reach` how many octets
    before the end of the part are line ends that one may leave out.
    """

    starts: array[int] = field(default_factory=octet_array)
    ends: array[int] = field(default_factory=octet_array)
    bodies: array[int] = field(default_factory=octet_array)
    octets: array[int] = field(default_factory=octet_array)
    unsent: array[int] = field(default_factory=octet_array)
    targets: array[int] = field(default_factory=octet_array)
    checks: array[int] = field(default_factory=lambda: array("I"))
    heads: array[int] = field(default_factory=lambda: array("H"))
    own: array[int] = field(default_factory=lambda: array("H"))
    separators: array[int] = field(default_factory=lambda: array("B"))
    reaches: array[int] = field(default_factory=lambda: array("B"))


class LengthScanner(Scanner):
    """As `Scanner`, but Content-Length is believed where it is true. Nothing is un-quoted.

    Needs 58 octets of memory for each From_ line until the file ends.
    """

    def __init__(self, *, strip: frozenset[bytes] = STRIPPED, hide: bool = True) -> None:
        super().__init__(unquote=False, strip=strip, hide=hide)
        self.believed = octet_array()
        """For each message where the body begins whose length was believed, else 0."""
        self._parts = _Parts()
        self._reach = 0
        self._hidden = False
        self._lacks = self._lacks_as_text = 0
        # Of the part in progress:
        self._own = 0
        self._unsent = 0
        self._fields = 0
        self._length = -1
        self._may_fold = False
        self._target = 0

    def close(self) -> Spans:
        """As `Scanner.close`."""
        spans = super().close()
        if not self._at_start:
            self._join()
        return spans

    def _begin(self, line: re.Match[bytes]) -> None:
        super()._begin(line)
        self._own = len(line[0]) + (not line[0].endswith(b"\r\n"))
        self._fields = self._target = self._unsent = 0
        self._length = -1
        self._may_fold = False

    def _lines(self, buffer: bytes, done: int, end: int) -> None:
        line: re.Match[bytes] | None = None
        for place in self._places(buffer, FROM, done, end):
            following = FROM_LINE.match(buffer, place, end) if buffer[place - 1] == _LF else None
            if not following:
                continue
            if not (line and self._whole_part(buffer, line, place)):
                if line:
                    self._begin(line)
                    line = None
                self._piece(buffer, done, place)
                done = place
                if self._in_header:
                    continue
            self._reach = _reach(buffer, place)
            self._finish(self._base + place, empty_line_before(buffer, place))
            line = following
            done = line.end()
        if line:
            self._begin(line)
        self._piece(buffer, done, end)

    def _whole_part(self, buffer: bytes, line: re.Match[bytes], end: int) -> bool:
        """As `_begin` and `_piece`, if there is more than a header before `end`."""
        header = self._whole_header(buffer, line, end)
        if not header:
            return False
        self._begin(line)
        body, self._check, self._unsent, has_fields = header
        content = line.end()
        self._octets = end - content + self._count(buffer, b"\n", content, end)
        if self._has_cr:
            self._octets -= self._count(buffer, b"\r\n", content, end)
        self._body = self._base + body
        self._in_header = False
        if has_fields:
            self._look_for_length(buffer, content, body)
            self._aim(buffer)
        return True

    def _header(self, buffer: bytes, start: int, end: int) -> None:
        super()._header(buffer, start, end)
        self._look_for_length(buffer, start, self._body - self._base)
        if not self._in_header:
            self._aim(buffer)

    def _aim(self, buffer: bytes) -> None:
        """The header has ended: where its Content-Length does."""
        if self._fields == 1 and self._length >= 0:
            empty_line = 2 if buffer[self._body - self._base] == _CR else 1
            self._target = self._body + empty_line + self._length

    def _look_for_length(self, buffer: bytes, start: int, stop: int) -> None:
        if self._may_fold and buffer[start] in b" \t":
            self._length = -1
        self._may_fold = False
        for found in _LENGTH.finditer(buffer, start - 1, stop):
            self._fields += 1
            end = found.end()
            ended = end < stop and buffer[end] == _LF
            number = _NUMBER.fullmatch(found[1]) if ended else None
            folded = end + 1 < stop and buffer[end + 1] in b" \t"
            self._length = int(number[1]) if number and not folded else -1
            self._may_fold = end + 1 == stop

    def _finish(self, end: int, separator: int, missing: int = 0) -> None:
        if self._hide:
            self._hide = False
            self._hidden = len(self._marks) > 1
        parts = self._parts
        parts.starts.append(self._start)
        parts.ends.append(end)
        parts.bodies.append(self._body)
        parts.octets.append(self._octets)
        parts.unsent.append(self._cut.unsent if self._cut else self._unsent)
        parts.targets.append(self._target)
        parts.checks.append(self._check)
        parts.heads.append(self._content - self._start)
        parts.own.append(self._own)
        parts.separators.append(separator)
        parts.reaches.append(self._reach)

    def _end(self, buffer: bytes) -> None:
        octets = self._octets
        unsent = 0
        if not buffer.endswith(b"\n"):
            self._lacks = self._end_line()
            self._lacks_as_text = 1
            unsent = octets + 2 - self._octets
            self._octets = octets + 2
        self._reach = _reach(buffer, len(buffer))
        self._finish(self._spans.end, empty_line_before(buffer, len(buffer)))
        self._parts.unsent[-1] += unsent

    def _join(self) -> None:
        """Make messages of the parts."""
        first = 0
        while first < len(self._parts.starts):
            last, believed = self._last_part(first)
            if first == 0 and self._hidden:
                self._spans.hidden = True
            else:
                self._add(first, last, self._parts.targets[first] > 0 and not believed)
                self.believed.append(self._parts.bodies[first] if believed else 0)
            first = last + 1

    def _last_part(self, first: int) -> tuple[int, bool]:
        """The last part of the message that begins with `first`; whether its length says so."""
        parts = self._parts
        target = parts.targets[first]
        if target:
            last = bisect_left(parts.ends, target, first)
            if last < len(parts.ends) and parts.ends[last] - parts.reaches[last] <= target:
                return last, True
        last = first
        while last + 1 < len(parts.ends) and not parts.separators[last]:
            last += 1
        return last, False

    def _add(self, first: int, last: int, refused: bool) -> None:
        spans, parts = self._spans, self._parts
        start, head = parts.starts[first], parts.heads[first]
        separator, unsent = parts.separators[last], parts.unsent[first]
        content_end = parts.ends[last] - separator
        octets = sum(parts.octets[first : last + 1]) + sum(parts.own[first + 1 : last + 1])
        lacks = 0
        if last + 1 == len(parts.ends):
            lacks = self._lacks if first == last else self._lacks_as_text
        body = content_end + lacks - parts.bodies[first]
        spans.starts.append(start)
        spans.heads.append(head)
        spans.lengths.append(content_end - start - head)
        spans.sizes.append(octets - (2 if separator else 0) - unsent)
        spans.altered.append((FIELDS if unsent else 0) | (REFUSED if refused else 0))
        spans.checks.append(crc32(b"%d" % body, parts.checks[first]))


def _reach(buffer: bytes, end: int) -> int:
    """The octets of up to two line ends before `end`."""
    found = _LINE_ENDS.search(buffer, end - CONTEXT, end)
    return end - found.start() if found else 0
