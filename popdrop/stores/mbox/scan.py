"""Octets of an mbox file to the places and sizes of its messages. Pure: no file is touched here.

* A From_ line counts at the start of the file (leading empty lines are skipped) or after an empty
  line, and only with one of c-client's date forms.
* The empty line before a From_ line, or at the end of the file, separates and is no part of the
  message: so sizes and ids stay the same when mail is appended.
* LF and CRLF end a line, a bare CR is data. The header ends at the first empty line.
* As sent: header fields in `strip` are left out, lines `>From `, `>>From ` lose one `>` (mboxrd),
  each line ends with CRLF, also the last one.

All searching is done in C and by blocks, never line by line in Python.

`Scanner` is for mboxrd and mboxo; `lengths` and `mmdf` make others of it, `kinds` chooses.
"""

from __future__ import annotations

import re
from typing import Final
from zlib import crc32

from popdrop import search
from popdrop.stores.mbox.spans import FIELDS, QUOTED, Spans
from popdrop.stores.uidl import EMPTY_LINE, FIELD, FIELD_OR_END, STRIPPED, HeaderCut, as_sent

BLOCK: Final = 256 * 1024
"""Octets to read at a time: one search of them holds the interpreter for about 0.2 ms."""

LONGEST_FROM: Final = 4500
"""No From_ line is longer, in octets with its line end: the pattern below sees to it."""

LONGEST_TAIL: Final = 8192
"""Octets of an unfinished line that wait for the rest. A longer line cannot be a From_ line."""

# c-client's forms (its unix.h): `Wed Dec  2 05:53 1992`, with or without seconds, a zone word or
# numeric zone before or after the year, and each with ` remote from host`. As there, the sender
# may hold anything. Zone words of more than three letters (CEST) are taken too.
_ZONE: Final = rb"(?: [A-Za-z]{1,5}(?: DST)?| [+-]\d{4})?"
DATED: Final = (
    rb"(?:[^\n]{0,4000} )?[A-Za-z\x80-\xff]{3} [A-Za-z\x80-\xff]{3} [ \d]?\d [ \d]\d:\d\d(?::\d\d)?"
    + _ZONE
    + rb" \d{4}"
    + _ZONE
    + rb"(?: {1,8}remote from [^ \n]{1,255})?\r?\n"
)
FROM_LINE: Final = re.compile(rb"From " + DATED)
"""A From_ line with its line end."""

_BOUNDARY: Final = re.compile(rb"From (?:(?<=\n\nFrom )|(?<=\n\r\nFrom ))" + DATED)
"""The same, if an empty line is before it."""

FROM: Final = b"From "
"""What From_ lines and quoted ones are found by, in one search."""

_QUOTE_RUN: Final = re.compile(rb">+((?:F(?:r(?:om?)?)?)?)")
EMPTY_LINES: Final = re.compile(rb"(?:\r?\n)*")
"""Any number of them, also none."""

# The message that c-client puts first for data of its own. qpopper, whose marks these are, hides
# it when two of the three are there.
_PSEUDO_MARKS: Final = (
    re.compile(
        rb"(?i:\nSubject:)[^\n]{0,80}"
        rb"(?:DO NOT DELETE|DON'T DELETE THIS MESSAGE|FOLDER INTERNAL DATA)"
    ),
    re.compile(rb"(?i)\nX-IMAP:"),
    re.compile(rb"(?i)\nFrom:[ \t]{0,8}Mail System Internal Data"),
)

CONTEXT: Final = 4
"""Octets before the next one that decide what may stand there: at most two line ends count."""

_LF: Final = 0x0A
_CR: Final = 0x0D
_QUOTE: Final = 0x3E

_NOWHERE: Final = b"xxxx"
_LINE_START: Final = b"xxx\n"


class NotAnMbox(ValueError):
    """The first octets, behind empty lines, are not what begins a message.

    `line` is 1-based, `offset` in octets and 0-based, `wanted` what should stand there.
    """

    def __init__(self, line: int, offset: int, wanted: str = "From_ line") -> None:
        super().__init__(f"no {wanted} at line {line}, offset {offset}")
        self.line = line
        self.offset = offset


def empty_line_before(buffer: bytes, end: int) -> int:
    """The octets of the empty line that ends at `end`, 0 if there is none."""
    if buffer.endswith(b"\n\n", 0, end):
        return 1
    return 2 if buffer.endswith(b"\n\r\n", 0, end) else 0


class Scanner:
    """Takes an mbox file by blocks of any size and gives its `Spans`.

    `hide` looks for the c-client pseudo message; a part of a file is scanned without.
    """

    wanted = "From_ line"
    """What a file of this kind begins with, for the log."""
    _first_line = FROM_LINE

    def __init__(
        self, *, unquote: bool = True, strip: frozenset[bytes] = STRIPPED, hide: bool = True
    ) -> None:
        self._spans = Spans()
        self._strip = strip
        self._unquote = unquote
        self._count = search.IN_USE.count
        self._places = search.IN_USE.places
        self._hide = hide
        self._buffer = _NOWHERE
        self._base = -CONTEXT
        self._at_start = True
        self._skipped_lines = 0
        self._has_cr = False
        # Of the message in progress:
        self._start = self._content = self._body = 0
        self._octets = 0
        self._check = 0
        self._marks: set[int] = set()
        self._in_header = False
        self._quoted = False
        self._cut: HeaderCut | None = None

    def feed(self, block: bytes) -> None:
        """Take the next octets of the file. Raises `NotAnMbox`."""
        buffer = self._buffer + block
        done = CONTEXT
        self._has_cr = b"\r" in buffer
        if self._at_start:
            done = self._find_first(buffer)
            if self._at_start:
                self._keep(buffer, done)
                return
        end = buffer.rfind(b"\n", done) + 1
        if end:
            self._lines(buffer, done, end)
            done = end
        if len(buffer) - done > LONGEST_TAIL:
            self._part_of_line(buffer, done)
        else:
            self._keep(buffer, done)

    def close(self) -> Spans:
        """No more octets. Raises `NotAnMbox`."""
        buffer = self._buffer
        self._spans.end = self._base + len(buffer)
        if self._at_start:
            if len(buffer) > CONTEXT:
                raise NotAnMbox(self._skipped_lines + 1, self._base + CONTEXT, self.wanted)
            return self._spans
        self._has_cr = b"\r" in buffer
        self._lines(buffer, CONTEXT, len(buffer))
        self._end(buffer)
        return self._spans

    def _end(self, buffer: bytes) -> None:
        """The file ends with `buffer`, all of which has been taken."""
        missing = 0 if buffer.endswith(b"\n") else self._end_line()
        self._finish(self._spans.end, empty_line_before(buffer, len(buffer)), missing)

    def _end_line(self) -> int:
        """How many octets the body of the message in progress lacks at its end.

        The last line counts as ended by LF, which the next deliverer will add: sizes, checks and
        ids stay the same then.
        """
        cut = self._cut if self._in_header else None
        if not (cut and cut.in_unsent_field):
            self._octets += 2
        if not self._in_header:
            return 1
        if not (cut and cut.in_spool_field):
            self._check = crc32(b"\n", self._check)
        return 0

    def _keep(self, buffer: bytes, done: int) -> None:
        self._buffer = buffer[done - CONTEXT :]
        self._base += done - CONTEXT

    def _find_first(self, buffer: bytes) -> int:
        """Skip empty lines and begin the first message; how far that came."""
        done = CONTEXT
        empty = EMPTY_LINES.match(buffer, done)
        if empty:
            self._skipped_lines += buffer.count(b"\n", done, empty.end())
            done = empty.end()
        first = self._first_line.match(buffer, done)
        if first:
            self._at_start = False
            self._begin(first)
            return first.end()
        if b"\n" in buffer[done:] or len(buffer) - done > LONGEST_FROM:
            raise NotAnMbox(self._skipped_lines + 1, self._base + done, self.wanted)
        return done

    def _part_of_line(self, buffer: bytes, done: int) -> None:
        """Take a line that is too long to wait for, all but what is needed to go on."""
        run = _QUOTE_RUN.fullmatch(buffer, done) if buffer[done - 1] == _LF else None
        if run:
            # Any `>` of the run may be the one to go: the last one stands for the line's start.
            end = run.start(1) - 1
            self._piece(buffer, done, end)
            self._buffer = _LINE_START + buffer[end:]
            self._base += end - CONTEXT
        else:
            # The last octet may be the CR of the line's end.
            end = len(buffer) - 1
            self._lines(buffer, done, end)
            self._keep(buffer, end)

    def _lines(self, buffer: bytes, done: int, end: int) -> None:
        """Take `buffer[done:end]`: whole lines, or a part of a long one."""
        line: re.Match[bytes] | None = None
        quoted, last = 0, done
        for place in self._places(buffer, FROM, done, end):
            if place < done:
                continue  # It is within the From_ line.
            before = buffer[place - 1]
            if before == _LF:
                following = _BOUNDARY.match(buffer, place, end)
                if following:
                    separator = 2 if buffer[place - 2] == _CR else 1
                    if line:
                        self._whole(buffer, line, place, separator, quoted)
                    else:
                        self._piece(buffer, done, place, quoted)
                        self._finish(self._base + place, separator)
                    line = following
                    done, quoted = line.end(), 0
            elif before == _QUOTE and self._unquote:
                if buffer[place - 2] == _LF:
                    quoted += 1
                elif buffer[place - 2] == _QUOTE:
                    # The run of them cannot reach over the place before.
                    run = buffer[max(last, done) - 1 : place]
                    quoted += run.rstrip(b">").endswith(b"\n")
            last = place
        if line:
            self._begin(line)
        self._piece(buffer, done, end, quoted)

    def _whole(
        self, buffer: bytes, line: re.Match[bytes], end: int, separator: int, quoted: int
    ) -> None:
        """A message that lies in `buffer` with its From_ line and separator, and is not the first.

        As `_begin`, `_piece` and `_finish`, in fewer steps: this is done for most of a file.
        """
        start, content = line.span()
        count = self._count
        octets = end - content + count(buffer, b"\n", content, end) - quoted - 2
        if self._has_cr:
            octets -= count(buffer, b"\r\n", content, end)
        header = self._whole_header(buffer, line, end)
        assert header, "the separator ends a header, too"
        body, check, unsent, _ = header
        length = end - separator - content
        spans = self._spans
        spans.starts.append(self._base + start)
        spans.heads.append(content - start)
        spans.lengths.append(length)
        spans.sizes.append(octets - unsent)
        spans.altered.append((FIELDS if unsent else 0) | (QUOTED if quoted else 0))
        spans.checks.append(crc32(b"%d" % (content + length - body), check))

    def _whole_header(
        self, buffer: bytes, line: re.Match[bytes], end: int
    ) -> tuple[int, int, int, bool] | None:
        """Four facts of the header behind a From_ line, `None` if it does not end before `end`.

        Where it ends, the check of line and header, the octets that are not sent, and whether
        there are spool headers.
        """
        start, content = line.span()
        done = start
        check = unsent = 0
        for found in FIELD_OR_END.finditer(buffer, content - 1, end):
            place = found.start()
            name = found[1]
            if not name:
                check = crc32(buffer[done : place + 1], check)
                return place + 1, check, unsent, done > start
            check = crc32(buffer[done:place], check)
            done = found.end()
            if name.lower() in self._strip:
                unsent += as_sent(buffer[place + 1 : done + 1])
        return None

    def _begin(self, line: re.Match[bytes]) -> None:
        self._start = self._base + line.start()
        self._content = self._body = self._base + line.end()
        self._octets = 0
        self._check = crc32(line[0])
        self._in_header = True
        self._quoted = False
        self._cut = None

    def _piece(self, buffer: bytes, start: int, end: int, quoted: int = 0) -> None:
        """Octets of the message in progress, all of them in it; `quoted` lines are among them."""
        if start == end:
            return
        self._octets += end - start + self._count(buffer, b"\n", start, end) - quoted
        if self._has_cr:
            self._octets -= self._count(buffer, b"\r\n", start, end)
        if quoted:
            self._quoted = True
        if self._in_header:
            self._header(buffer, start, end)

    def _header(self, buffer: bytes, start: int, end: int) -> None:
        before = start - 1
        if self._has_cr:
            empty = EMPTY_LINE.search(buffer, before, end)
            stop = empty.start() + 1 if empty else 0
        else:
            stop = buffer.find(b"\n\n", before, end) + 1
        if stop:
            self._in_header = False
        else:
            stop = end
        piece = buffer[start:stop]
        if self._cut or self._in_header or FIELD.search(buffer, before, stop - 1):
            self._cut = self._cut or HeaderCut(self._strip)
            piece = self._cut.cut(piece)
        self._check = crc32(piece, self._check)
        self._body = self._base + stop
        if self._hide:
            for number, mark in enumerate(_PSEUDO_MARKS):
                if mark.search(buffer, before, stop):
                    self._marks.add(number)

    def _finish(self, end: int, separator: int, missing: int = 0) -> None:
        """The message in progress and its separator, in octets, end at offset `end`.

        `missing` is 1 if the body lacks its last LF.
        """
        spans = self._spans
        if self._hide:
            self._hide = False
            if len(self._marks) > 1:
                spans.hidden = True
                return
        content_end = end - separator
        spans.starts.append(self._start)
        spans.heads.append(self._content - self._start)
        spans.lengths.append(content_end - self._content)
        unsent = self._cut.unsent if self._cut else 0
        spans.sizes.append(self._octets - (2 if separator else 0) - unsent)
        spans.altered.append((FIELDS if unsent else 0) | (QUOTED if self._quoted else 0))
        spans.checks.append(crc32(b"%d" % (content_end + missing - self._body), self._check))
