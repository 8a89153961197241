"""A slow reader of mbox octets, line by line, that says what the fast one must find.

Written from the rules alone; it shares nothing with `popdrop.stores.mbox.scan` but the names of
header fields.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from base64 import b32encode
from dataclasses import dataclass

SPOOL_HEADERS = (
    b"status x-status x-keywords x-uid x-uidl x-imap x-imapbase content-length lines".split()
)
NOT_SENT = [name for name in SPOOL_HEADERS if name not in (b"x-uidl", b"lines")]


class Corrupt(Exception):
    def __init__(self, line: int, offset: int) -> None:
        super().__init__(line, offset)
        self.line, self.offset = line, offset


@dataclass
class Message:
    """`stored` is without From_ line and separator; `immutable` is what an id is made of.

    `opening` is the line of four ^A before an MMDF message, `from_line` may be empty then.
    """

    start: int
    opening: bytes
    from_line: bytes
    stored: bytes
    sent: bytes
    immutable: bytes
    check: int

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.immutable).digest()[:16]

    @property
    def uid(self) -> bytes:
        return b32encode(self.digest)[:26].lower()


def lines_of(octets: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in octets.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def _digits(word: bytes, count: int) -> bool:
    return len(word) == count and all(0x30 <= c <= 0x39 for c in word)


def _name(word: bytes) -> bool:
    return len(word) == 3 and all(c > 127 or chr(c).isalpha() for c in word)


def _zones(words: list[bytes]) -> list[int]:
    """How many words a zone may take here: none is always possible."""
    found = [0]
    if words:
        word = words[0]
        if word[:1] in (b"+", b"-") and _digits(word[1:], 4):
            found.append(1)
        if 1 <= len(word) <= 5 and all(c < 128 and chr(c).isalpha() for c in word):
            found.append(1)
            if words[1:2] == [b"DST"]:
                found.append(2)
    return found


def _clock(word: bytes) -> bool:
    parts = word.split(b":")
    return len(parts) in (2, 3) and all(_digits(part, 2) for part in parts)


def _end(words: list[bytes]) -> bool:
    """Zone?, year, zone?, remote from host?"""
    for before in _zones(words):
        rest = words[before:]
        if not rest or not _digits(rest[0], 4):
            continue
        for after in _zones(rest[1:]):
            tail = rest[1 + after :]
            if not tail:
                return True
            blanks = 0
            while blanks < len(tail) and tail[blanks] == b"":
                blanks += 1
            tail = tail[blanks:]
            if blanks < 8 and tail[:2] == [b"remote", b"from"] and len(tail) == 3:
                return 1 <= len(tail[2]) <= 255
    return False


def _date(words: list[bytes]) -> bool:
    if len(words) < 5 or not _name(words[0]) or not _name(words[1]):
        return False
    rest = words[2:]
    if rest[0] == b"" and _digits(rest[1], 1):
        rest = rest[2:]
    elif _digits(rest[0], 1) or _digits(rest[0], 2):
        rest = rest[1:]
    else:
        return False
    if rest[:1] == [b""]:  # the hour is padded with a blank
        rest = [b"0" + rest[1], *rest[2:]] if len(rest) > 1 else []
    return bool(rest) and _clock(rest[0]) and _end(rest[1:])


def is_from_line(line: bytes) -> bool:
    if not line.startswith(b"From ") or not line.endswith(b"\n"):
        return False
    line = line[5:-1]
    line = line[:-1] if line.endswith(b"\r") else line
    words = line.split(b" ")
    for place in range(len(words)):
        sender = b" ".join(words[:place])
        if len(sender) <= 4000 and _date(words[place:]):
            return True
    return False


def _empty(line: bytes) -> bool:
    return line in (b"\n", b"\r\n")


def _without(lines: list[bytes], names: list[bytes]) -> list[bytes]:
    """The lines of a message without these header fields; the first line is no From_ line."""
    kept, dropping = [], False
    for number, line in enumerate(lines):
        if _empty(line):
            return kept + lines[number:]
        if line[:1] not in (b" ", b"\t"):
            name, colon, _ = line.partition(b":")
            dropping = bool(colon) and name.lower() in names
        elif number == 0:
            dropping = False
        if not dropping:
            kept.append(line)
    return kept


def _as_sent(lines: list[bytes], unquote: bool) -> bytes:
    sent = []
    for line in lines:
        if unquote and re.match(rb">+From ", line):
            line = line[1:]
        if line.endswith(b"\r\n"):
            line = line[:-2]
        elif line.endswith(b"\n"):
            line = line[:-1]
        sent.append(line + b"\r\n")
    return b"".join(sent)


def _is_pseudo(lines: list[bytes]) -> bool:
    marks = set()
    for line in lines:
        if _empty(line):
            break
        name, colon, value = line.partition(b":")
        name = name.lower() if colon else b""
        if name == b"subject":
            for words in (b"DO NOT DELETE", b"DON'T DELETE THIS MESSAGE", b"FOLDER INTERNAL DATA"):
                if 0 <= value.find(words) <= 80:
                    marks.add(name)
        elif name == b"x-imap":
            marks.add(name)
        elif name == b"from":
            blanks = len(value) - len(value.lstrip(b" \t"))
            if blanks <= 8 and value[blanks:].lower().startswith(b"mail system internal data"):
                marks.add(name)
    return len(marks) > 1


def read(
    octets: bytes,
    unquote: bool = True,
    strip: bool = True,
    hide: bool = True,
    kind: str = "mboxrd",
) -> list[Message]:
    """`unquote` is for mboxrd and mboxo, which differ in nothing else."""
    lines = lines_of(octets)
    number = 0
    while number < len(lines) and _empty(lines[number]):
        number += 1
    if number == len(lines):
        return []
    first = lines[number]
    if kind in ("mmdf", "auto") and is_separator(first):
        messages = _read_mmdf(lines, number, strip)
    elif kind != "mmdf" and is_from_line(first):
        messages = _read_from(octets, lines, number, unquote, strip, kind)
    else:
        raise Corrupt(number + 1, len(b"".join(lines[:number])))
    if hide and messages and _is_pseudo(lines_of(messages[0].stored)):
        del messages[0]
    return messages


def is_separator(line: bytes) -> bool:
    return line in (b"\x01\x01\x01\x01\n", b"\x01\x01\x01\x01\r\n")


def _read_mmdf(lines: list[bytes], number: int, strip: bool) -> list[Message]:
    """All that stands between two separators is a message, if it is more than empty lines."""
    places = [place for place in range(number, len(lines)) if is_separator(lines[place])]
    messages = []
    for place, stop in zip(places, [*places[1:], len(lines)], strict=True):
        content = lines[place + 1 : stop]
        from_line = content.pop(0) if content and is_from_line(content[0]) else b""
        if from_line or not all(_empty(line) for line in content):
            start = len(b"".join(lines[:place]))
            messages.append(_message(start, lines[place], from_line, content, False, strip))
    return messages


def _read_from(
    octets: bytes, lines: list[bytes], number: int, unquote: bool, strip: bool, kind: str
) -> list[Message]:
    believes = kind not in ("mboxrd", "mboxo")
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    messages = []
    place = number
    while place < len(lines):
        stop = _by_length(octets, lines, offsets, place) if believes else None
        if stop is None:
            stop = place + 1
            while stop < len(lines) and not (_empty(lines[stop - 1]) and is_from_line(lines[stop])):
                stop += 1
        content = lines[place + 1 : stop]
        if content and _empty(content[-1]):
            content.pop()
        messages.append(
            _message(offsets[place], b"", lines[place], content, unquote and not believes, strip)
        )
        place = stop
    return messages


def _by_length(octets: bytes, lines: list[bytes], offsets: list[int], place: int) -> int | None:
    """Where the message whose From_ line is `place` ends, by a Content-Length to be believed."""
    end = place + 1
    while end < len(lines) and not _empty(lines[end]):
        end += 1
    if end == len(lines):
        return None
    fields = [n for n in range(place + 1, end) if lines[n].lower().startswith(b"content-length:")]
    if len(fields) != 1 or lines[fields[0] + 1][:1] in (b" ", b"\t"):
        return None
    value = re.fullmatch(rb"[ \t]*([0-9]{1,18})[ \t]*\r?\n", lines[fields[0]][15:])
    if value is None:
        return None
    target = offsets[end + 1] + int(value[1])
    for stop in range(end + 1, len(lines) + 1):
        gap = offsets[stop] - target
        if 0 <= gap <= 4 and re.fullmatch(rb"(\r?\n){0,2}", octets[target : offsets[stop]]):
            if stop == len(lines):
                return stop
            if is_from_line(lines[stop]) and not _in_a_header(lines, stop):
                return stop
    return None


def _in_a_header(lines: list[bytes], place: int) -> bool:
    """Whether a From_ line stands before this one with no empty line between them."""
    place -= 1
    while place >= 0 and not _empty(lines[place]):
        if is_from_line(lines[place]):
            return True
        place -= 1
    return False


def _message(
    start: int, opening: bytes, from_line: bytes, content: list[bytes], unquote: bool, strip: bool
) -> Message:
    header = 0
    while header < len(content) and not _empty(content[header]):
        header += 1
    # A last line without its end counts as one with LF, which the next deliverer will add.
    ended = [line if line.endswith(b"\n") else line + b"\n" for line in content]
    immutable = from_line + b"".join(_without(ended, SPOOL_HEADERS))
    fixed = from_line + b"".join(_without(ended[:header], SPOOL_HEADERS))
    body = b"%d" % len(b"".join(ended[header:]))
    sent = _without(content, NOT_SENT) if strip else content
    return Message(
        start,
        opening,
        from_line,
        b"".join(content),
        _as_sent(sent, unquote),
        immutable,
        zlib.crc32(fixed + body),
    )
