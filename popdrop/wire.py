"""Octets of the wire: the line splitter, and stored messages on their way out.

Pure: no input or output here. `Lines` cuts what a client sends; `Outgoing` turns stored octets into
octets as sent. Both give the same result however their input is cut.
"""

from __future__ import annotations

import enum
import re
from functools import lru_cache
from typing import Final

from popdrop import search

COMMAND_LIMIT: Final = 255
"""Octets of a command line with its CRLF (RFC 2449 section 4)."""

SASL_LIMIT: Final = 12_288
"""Octets of a SASL continuation line with its CRLF (RFC 5034 section 4 after RFC 4422).

Of an AUTH command, too. The RFC holds it to 255 and has clients send a longer response in a line of
its own, but mpop 1.4.18 sends the tokens of OAUTHBEARER and XOAUTH2 with the command.
"""

ENDLESS_LIMIT: Final = 65_536
"""A line longer than this, in octets, is no POP3: the connection is closed."""

_AUTH: Final = b"AUTH "


class Overlong(enum.Enum):
    """What `Lines.next` gives in place of a line that is too long."""

    LINE = "the line was over the limit; it has been thrown away to its end"
    ENDLESS = "the line was over ENDLESS_LIMIT; nothing more is to be read"


class Lines:
    """Cuts a stream into lines. CRLF and bare LF end a line; a bare CR is like any character.

    An over-long line is thrown away as it arrives, so that memory stays at one read.
    """

    __slots__ = ("_buffer", "_dropped", "_position", "limit")

    def __init__(self) -> None:
        self._buffer = b""
        self._position = 0
        self._dropped = 0
        self.limit = COMMAND_LIMIT

    def __len__(self) -> int:
        """Octets that wait to be cut."""
        return len(self._buffer) - self._position

    def feed(self, data: bytes) -> None:
        """Take what was read from the network."""
        if self._position == len(self._buffer):
            self._buffer = data
        else:
            self._buffer = self._buffer[self._position :] + data
        self._position = 0

    def clear(self) -> None:
        """Forget what waits, for instance plaintext behind STLS."""
        self._buffer, self._position, self._dropped = b"", 0, 0

    def next(self) -> bytes | Overlong | None:
        """The next line without its end, `None` if no whole line waits."""
        end = self._buffer.find(b"\n", self._position)
        if end < 0:
            return self._shed()
        line = self._buffer[self._position : end]
        self._position = end + 1
        if line.endswith(b"\r"):
            line = line[:-1]
        dropped, self._dropped = self._dropped, 0
        length = dropped + len(line)
        if length > self.limit - 2 and (dropped or length > self._allowed(line) - 2):
            return Overlong.ENDLESS if length > ENDLESS_LIMIT else Overlong.LINE
        return line

    def _shed(self) -> Overlong | None:
        if self._position:
            # Nothing of the read stays, up to 64 KiB, but the beginning of a line.
            self._buffer, self._position = self._buffer[self._position :], 0
        waiting = len(self._buffer)
        is_over = waiting > self.limit
        if is_over and not self._dropped:
            begin = self._buffer[: len(_AUTH)]
            is_over = waiting > self._allowed(begin)
        if self._dropped or is_over:
            # The last octet may be the CR of the line's end, which does not count.
            keep = 1 if self._buffer.endswith(b"\r") else 0
            self._dropped += waiting - keep
            self._buffer = self._buffer[waiting - keep :]
            if self._dropped > ENDLESS_LIMIT:
                return Overlong.ENDLESS
        return None

    def _allowed(self, begin: bytes) -> int:
        """The limit of a line that begins so."""
        return max(self.limit, SASL_LIMIT) if begin[: len(_AUTH)].upper() == _AUTH else self.limit


_CONTROL = re.compile(rb"[\x00-\x1f\x7f]").search


def has_control(line: bytes) -> bool:
    """Whether a command holds NUL or another control character."""
    return _CONTROL(line) is not None


def number(word: bytes) -> int | None:
    """A decimal number of 1 to 10 ASCII digits, else `None`.

    `int` alone would take signs, blanks, underscores and other scripts' digits.
    """
    return int(word) if word.isdigit() and len(word) <= 10 else None


_find: Final = search.IN_USE.find
_FEW: Final = 16
"""Lines that are changed one by one. More, and all that are left are changed by one call: it goes
through the message twice, but a mail full of them is no burden."""
_QUOTED = re.compile(rb"\n>(?=>*From )")  # without a group: a mail full of them is no burden
_QUOTED_FIRST = re.compile(rb">(>*From )").match
_QUOTED_TAIL = re.compile(rb"(?:\A|\n)(>+(?:F(?:r(?:o(?:m)?)?)?)?)\Z")
_LONGEST_FIELD_NAME: Final = 64
"""Octets of a header line after which its field name is known for certain."""


@lru_cache(maxsize=16)
def _fields(names: frozenset[bytes]) -> re.Pattern[bytes]:
    """Whole header fields of these names, folded lines included, each with the LF before it."""
    alternatives = b"|".join(sorted(re.escape(name) for name in names))
    # A look at the initial first: six times as fast where most fields are others.
    initials = re.escape(bytes({name[0] for name in names}))
    return re.compile(rb"(?i)\n(?=[%s])(?:%s):.*(?:\n[ \t].*)*" % (initials, alternatives))


_FOLDED = re.compile(rb"(?:[ \t].*(?:\n|\Z))*").match


def _dotted(data: bytes) -> bytes:
    """Lines that begin with a dot get another one; the first line does not."""
    place = _find(data, b"\n.", 0, len(data))
    if place < 0:
        return data
    parts: list[bytes] = []
    start = 0
    while place >= 0 and len(parts) < _FEW:
        parts.append(data[start : place + 2])
        start = place + 1
        place = _find(data, b"\n.", start, len(data))
    rest = data[start:]
    parts.append(rest if place < 0 else rest.replace(b"\n.", b"\n.."))
    return b"".join(parts)


def _unquoted(message: bytes) -> bytes:
    """Lines `>From `, `>>From ` of a whole message lose one `>`."""
    place = _find(message, b">From ", 0, len(message))
    if place < 0:
        return message
    parts: list[bytes] = []
    start = 0
    for _ in range(_FEW):
        line = message.rfind(b"\n", 0, place) + 1
        if not message[line:place].strip(b">"):
            parts.append(message[start:line])
            start = line + 1
        place = _find(message, b">From ", place + 1, len(message))
        if place < 0:
            break
    rest = message[start:]
    parts.append(rest if place < 0 else _QUOTED.sub(b"\n", rest))
    return b"".join(parts)


def as_stored(message: bytes, unquote: bool = False, spaced: bool = False) -> bytes:
    """What `Outgoing.whole` makes of a message of which no line is left out, in fewer steps."""
    if b"\r" in message:
        message = message.replace(b"\r\n", b"\n")
        if spaced:
            message = message.replace(b"\r", b" ")
    if unquote:
        message = _unquoted(message)
    if message[:1] == b".":
        message = b"." + message
    message = _dotted(message)
    end = b"\n.\n" if message[-1:] not in (b"", b"\n") else b".\n"
    return (message + end).replace(b"\n", b"\r\n")


class Outgoing:
    """One message from stored octets to octets as sent, by blocks of any size.

    In this order: CRLF to LF, header fields in `strip` dropped, `>From ` lines un-quoted one level
    (`unquote`, mboxrd), the body cut to `lines` lines (TOP), dot-stuffed, LF to CRLF; at the end a
    missing line end is added, then `.` CRLF. A bare CR is data (RFC 1939 section 3), or sent as a
    blank (`spaced`).
    """

    __slots__ = (
        "_body_lines",
        "_cr",
        "_in_header",
        "_line_start",
        "_midline",
        "_partial",
        "_quote",
        "_quote_start",
        "_skipping",
        "_spaced",
        "_strip",
        "_unquote",
        "finished",
    )

    def __init__(
        self,
        strip: frozenset[bytes] = frozenset(),
        unquote: bool = False,
        lines: int | None = None,
        spaced: bool = False,
    ) -> None:
        self._spaced = spaced
        self._strip = _fields(strip) if strip else None
        self._unquote = unquote
        self._body_lines = lines
        self._in_header = bool(strip) or lines is not None
        self._cr = False
        self._quote = b""
        self._quote_start = True
        self._partial = b""
        self._midline = False
        self._skipping = False
        self._line_start = True
        self.finished = False
        """Whether TOP has all its lines: nothing more need be read."""

    def feed(self, stored: bytes) -> bytes:
        """The next stored octets; returns what can be sent of them."""
        if self._cr:
            stored = b"\r" + stored
            self._cr = False
        if b"\r" in stored:
            if stored.endswith(b"\r"):
                self._cr = True
                stored = stored[:-1]
            stored = stored.replace(b"\r\n", b"\n")
            if self._spaced:
                stored = stored.replace(b"\r", b" ")
        if self._unquote:
            stored = self._unquoted(stored)
        if self._in_header or self._body_lines is not None:
            stored = self._selected(stored)
        return self._stuffed(stored)

    def end(self) -> bytes:
        """What is left when all stored octets have been fed, with the terminating line."""
        rest = b""
        if self._unquote:
            rest, self._quote = self._quote, b""
        if self._cr:
            rest += b" " if self._spaced else b"\r"
        out = self._stuffed(self._selected(rest))
        if self._in_header and self._partial and not self.finished:
            out += self._stuffed(self._stripped(self._partial))
        return out + (b".\r\n" if self._line_start else b"\r\n.\r\n")

    def whole(self, stored: bytes) -> bytes:
        """A message that is in memory as a whole."""
        out = self.feed(stored)
        return out + self.end()

    def _unquoted(self, data: bytes) -> bytes:
        if self._quote:
            data = self._quote + data
            self._quote, self._quote_start = b"", True
        if not data:
            return data
        tail = None
        if data[-1] in b">From":
            tail = _QUOTED_TAIL.search(data, max(data.rfind(b"\n"), 0))
        if tail and (tail.start() < tail.start(1) or self._quote_start):
            # Any `>` of the run may be the one to go: hold one back, so the rest need not wait.
            held = b">" + tail[1].lstrip(b">")
            data = data[: len(data) - len(held)]
            starts = len(tail[1]) == len(held)
        else:
            held, starts = b"", False
        if b">From " in data:
            if self._quote_start:
                first = _QUOTED_FIRST(data)
                if first:
                    data = data[1:]
            data = _QUOTED.sub(b"\n", data)
        if data or not starts:
            self._quote_start = data.endswith(b"\n")
        self._quote = held
        return data

    def _selected(self, data: bytes) -> bytes:
        if self.finished:
            return b""
        if self._in_header:
            return self._header(data)
        return data if self._body_lines is None else self._cut(data)

    def _header(self, data: bytes) -> bytes:
        out = b""
        if self._midline:
            end = data.find(b"\n") + 1
            if not self._skipping:
                out = data[:end] if end else data
            if not end:
                return out
            data = data[end:]
            self._midline = False
        data = self._partial + data
        self._partial = b""
        end = 0 if data.startswith(b"\n") else data.find(b"\n\n") + 1
        if end or data.startswith(b"\n"):
            self._in_header = False
            out += self._stripped(data[:end]) + b"\n"
            return out + self._selected_body(data[end + 1 :])
        end = data.rfind(b"\n") + 1
        out += self._stripped(data[:end])
        tail = data[end:]
        if len(tail) <= _LONGEST_FIELD_NAME:
            self._partial = tail
            return out
        self._midline = True
        if tail[:1] not in (b" ", b"\t"):
            self._skipping = bool(self._strip and self._strip.match(b"\n" + tail))
        return out if self._skipping else out + tail

    def _selected_body(self, body: bytes) -> bytes:
        return body if self._body_lines is None else self._cut(body)

    def _stripped(self, header: bytes) -> bytes:
        if self._strip is None or not header:
            return header
        if self._skipping:
            folded = _FOLDED(header)
            header = header[folded.end() :] if folded else header
            if not header:
                return header
        text = b"\n" + header
        kept: list[bytes] = []
        position = 0
        for field in self._strip.finditer(text):
            kept.append(text[position : field.start()])
            position = field.end()
        self._skipping = position + text.endswith(b"\n") == len(text) and position > 0
        if not position:
            return header
        kept.append(text[position:])
        return b"".join(kept)[1:]

    def _cut(self, body: bytes) -> bytes:
        wanted = self._body_lines or 0
        count = body.count(b"\n")
        if count < wanted:
            self._body_lines = wanted - count
            return body
        self.finished = True
        rest = body.split(b"\n", wanted)[-1] if wanted else body
        return body[: len(body) - len(rest)]

    def _stuffed(self, data: bytes) -> bytes:
        if not data:
            return b""
        first = self._line_start and data[0] == 0x2E
        self._line_start = data[-1] == 0x0A
        data = _dotted(data).replace(b"\n", b"\r\n")
        return b"." + data if first else data
