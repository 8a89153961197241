"""What is wrong with an mbox file: findings, by one look at its octets. Nothing is changed here.

The octets come from a `Read`, so that a plain file, an open spool and a test are one. What lies
beside a spool, `beside` looks at; what can be mended, `repair` mends.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from popdrop.stores.mbox.findings import LARGE, Finding, Findings, Read, Watch
from popdrop.stores.mbox.kinds import FORMS, Scans
from popdrop.stores.mbox.scan import BLOCK, FROM_LINE, LONGEST_FROM, NotAnMbox
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.uidl import EMPTY_LINE, STRIPPED, MessageHash, unique_ids

Range = tuple[int, int]
"""Offsets of the first octet and of the one behind the last, 0-based."""

Ids = Callable[[], list[bytes]]

KIND_NAMES: Final = tuple(
    name for name, form in FORMS.items() if not form.lengths and not form.mmdf
)
"""The kinds of mbox that can be looked at."""

FIRST_BLOCK: Final = 4096
"""Octets of a header to read at a time: few headers are longer."""


@dataclass(slots=True)
class Content:
    """What a file holds, and what is wrong with it.

    `first`   where the first message begins, behind what is none
    `garbage` octets at the file's start that are no message
    `gaps`    runs of NUL between messages, in ascending order; `tail` is one at the file's end
    `ending`  what must be added for the last message to be complete
    `spans`   the messages; places in it count from `first`
    """

    size: int
    first: int = 0
    garbage: int = 0
    gaps: list[Range] = field(default_factory=list)
    tail: Range | None = None
    ending: bytes = b""
    spans: Spans = field(default_factory=Spans)
    findings: list[Finding] = field(default_factory=list)

    @property
    def messages(self) -> int:
        """How many messages there are, a hidden one not counted."""
        return len(self.spans)

    def ids(self, read: Read) -> list[bytes]:
        """The unique-ids of all messages, in order. Reads all of them."""
        digests = (_digest(self, read, index) for index in range(len(self.spans)))
        return list(unique_ids(digests))


def scanner_of(kind: str) -> Scans:
    """As the store scans with `strip-headers=yes`. `kind` is one of `KIND_NAMES`."""
    return FORMS[kind].scanner(strip=STRIPPED)


def examine(read: Read, size: int, kind: str, watch: Watch) -> Content:
    """What a file of `size` octets holds. Raises `OSError`, if it becomes shorter meanwhile."""
    said = Findings()
    marks = _Marks(read, size, said)
    content = Content(size)
    scanner: Scans | None = scanner_of(kind)
    taken = 0
    for block in read(0, size):
        marks.feed(block)
        if scanner is not None:
            try:
                scanner.feed(block)
            except NotAnMbox:
                scanner = None
        taken += len(block)
        watch("scanning", len(block))
    if taken < size:
        raise OSError("it became shorter while it was read")
    marks.close()
    content.gaps, content.tail = marks.gaps, marks.tail
    try:
        spans = None if scanner is None else scanner.close()
    except NotAnMbox:
        spans = None
    if spans is None:
        spans = _behind_garbage(content, read, kind, marks, said, watch)
    content.spans = spans
    if spans.hidden:
        said.add("pseudo", "a message of UW-IMAP's own data is hidden here", content.first)
    _ending(content, read, said)
    _messages(content, read, said, watch)
    content.findings = said.all(read)
    return content


_SEPARATOR: Final = re.compile(rb"(?:\A|\n)\r?\n\Z")
_FROM: Final = re.compile(rb"From ")
_NULS: Final = re.compile(rb"\0+")
_BEFORE: Final = 3
_DIRECTLY_BEHIND: Final = b"\r\n >\t"


class _Marks:
    """Looks, by blocks, for runs of NUL and for all that resembles a From_ line."""

    def __init__(self, read: Read, size: int, said: Findings) -> None:
        self._read = read
        self._size = size
        self._said = said
        self._buffer = b""
        self._base = 0
        self._looked = 0
        self._run: Range | None = None
        self._taken = 0
        self.boundary = size
        """Where the first From_ line behind an empty line stands, not counting the first octets."""
        self.gaps: list[Range] = []
        self.tail: Range | None = None

    def feed(self, block: bytes) -> None:
        self._nuls(block)
        self._taken += len(block)
        self._buffer += block
        if len(self._buffer) > 2 * LONGEST_FROM:
            self._look(len(self._buffer) - LONGEST_FROM)

    def close(self) -> None:
        if self._run is not None:
            self._end_run()
        self._look(len(self._buffer))

    def _look(self, stop: int) -> None:
        """Look at what begins before `stop` in the buffer, and keep the rest."""
        buffer, base = self._buffer, self._base
        position = self._looked - base
        while found := _FROM.search(buffer, position, stop + 4):
            start = found.start()
            end = buffer.find(b"\n", start, start + LONGEST_FROM) + 1
            self._resembles(buffer, start, base + start, end > 0)
            # One look a line: a longer part of it cannot be dated if this one is not.
            position = max(end, start + len(found[0]))
        self._looked = base + max(position, stop)
        keep = max(stop - _BEFORE, 0)
        self._buffer, self._base = buffer[keep:], base + keep

    def _resembles(self, buffer: bytes, start: int, offset: int, ended: bool) -> None:
        before = buffer[max(start - _BEFORE, 0) : start]
        separated = not before or _SEPARATOR.search(before) is not None
        line_start = separated or before.endswith(b"\n")
        if not line_start and before[-1] in _DIRECTLY_BEHIND:
            return
        # A line without its end in the buffer is too long for a date.
        dated = ended and FROM_LINE.match(buffer, start) is not None
        if separated and dated:
            if self.boundary == self._size and offset:
                self.boundary = offset
        elif separated:
            text = "begins as a From_ line does, but has no valid date: it is taken for text"
            self._said.add("undated", text, offset)
        elif dated and not self._is_behind_gap(offset):
            where = "no empty line before" if line_start else "other text directly before"
            text = f"a From_ line with {where} it: two messages may have run together"
            self._said.add("run-together", text, offset)

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
        before = self._octets(max(start - _BEFORE, 0), start)
        if not before or _SEPARATOR.search(before):
            if stop == self._size:
                self.tail = (start, stop)
                self._said.add("nul-gap", f"{count} behind the last message", start)
                return
            behind = self._octets(stop, stop + LONGEST_FROM)
            if FROM_LINE.match(behind):
                self.gaps.append((start, stop))
                self._said.add("nul-gap", f"{count} before a message", start)
                return
        self._said.add("nul", f"{count} in the text", start)

    def _octets(self, start: int, stop: int) -> bytes:
        return b"".join(self._read(start, stop))


def _behind_garbage(
    content: Content, read: Read, kind: str, marks: _Marks, said: Findings, watch: Watch
) -> Spans:
    """Find where the first message is, in a file that does not begin with one."""
    starts: list[tuple[int, int]] = [(marks.boundary, marks.boundary), *marks.gaps[:1]]
    if marks.tail is not None:
        starts.append(marks.tail)
    content.garbage, content.first = min(starts)
    fault = _text_in(read, content.garbage)
    if fault is None:
        content.garbage = 0
    else:
        words = f"{content.garbage} octets before the first message"
        if content.first == content.size:
            words = "there is none in the whole file"
        said.add("garbage", f"no From_ line: {words}", fault.offset)
    scanner = scanner_of(kind)
    for block in read(content.first, content.size):
        scanner.feed(block)
        watch("scanning again", len(block))
    return scanner.close()


def _text_in(read: Read, stop: int) -> NotAnMbox | None:
    """Where text begins in the octets up to `stop`; `None` if they are empty lines and no more."""
    scanner = scanner_of(KIND_NAMES[0])
    try:
        for block in read(0, stop):
            scanner.feed(block)
        scanner.close()
    except NotAnMbox as fault:
        return fault
    return None


def _ending(content: Content, read: Read, said: Findings) -> None:
    has_text = content.messages or content.spans.hidden or content.garbage
    if content.tail is not None or not has_text:
        return
    last = b"".join(read(max(content.size - _BEFORE, 0), content.size))
    if _SEPARATOR.search(last):
        return
    offset = content.size - 1
    if not last.endswith(b"\n"):
        content.ending = b"\n\n"
        said.add("no-newline", "the last line has no line end", offset)
    else:
        content.ending = b"\r\n" if last.endswith(b"\r\n") else b"\n"
        said.add("no-separator", "no empty line behind the last message", offset)


_FIELD: Final = re.compile(rb">?[!-9;-~]+[ \t]*:|>From |\r?\n|\Z")


def _messages(content: Content, read: Read, said: Findings, watch: Watch) -> None:
    """What is to be said of single messages; `read` is asked for their headers again."""
    spans = content.spans
    for index in range(len(spans)):
        start = content.first + spans.starts[index]
        offset, stop = content.first + spans.offset(index), content.first + spans.content_end(index)
        _header(read, offset, stop, partial(said.add, offset=start), f"message {index + 1}")
        if spans.lengths[index] > LARGE:
            text = f"message {index + 1} has {spans.lengths[index]} octets"
            said.add("large", text, start)
    for index, earlier in _copies(content, read, watch):
        text = f"message {index + 1} is equal to message {earlier + 1}"
        said.add("duplicate", text, content.first + spans.starts[index])


def _header(read: Read, start: int, stop: int, add: Callable[[str, str], None], name: str) -> None:
    text = b"".join(read(start, min(start + FIRST_BLOCK, stop)))
    if not _FIELD.match(text):
        add("no-header", f"{name} does not begin with a header field")
    before = b"\n" + text
    position = start + len(text)
    while not EMPTY_LINE.search(before):
        if position >= stop:
            add("cut-header", f"no empty line ends the header of {name}")
            return
        block = b"".join(read(position, min(position + BLOCK, stop)))
        position += len(block) or stop
        before = before[-2:] + block


def _copies(content: Content, read: Read, watch: Watch) -> Iterator[tuple[int, int]]:
    """Messages that are equal to an earlier one, and which that is; 0-based."""
    spans = content.spans
    # The checks differ for nearly all: only where they do not, the octets are hashed.
    count = Counter(spans.checks)
    known: dict[int, list[int]] = defaultdict(list)
    for index, check in enumerate(spans.checks):
        if count[check] > 1:
            known[check].append(index)
    found = []
    for alike in known.values():
        earlier: dict[bytes, int] = {}
        for index in alike:
            digest = _digest(content, read, index)
            watch("comparing", spans.lengths[index])
            if digest in earlier:
                found.append((index, earlier[digest]))
            else:
                earlier[digest] = index
    yield from sorted(found)


def _digest(content: Content, read: Read, index: int) -> bytes:
    message = MessageHash()
    start = content.first + content.spans.starts[index]
    for block in read(start, content.first + content.spans.content_end(index)):
        message.update(block)
    return message.digest()
