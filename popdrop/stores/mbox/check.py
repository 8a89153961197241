"""What is wrong with an mbox file: findings, by one look at its octets. Nothing is changed here.

The octets come from a `Read`, so that a plain file, an open spool and a test are one. What lies
beside a spool, `beside` looks at; what can be mended, `repair` mends.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from popdrop.stores.mbox.findings import LARGE, Finding, Findings, Read, Watch
from popdrop.stores.mbox.kinds import FORMS, LOOK_AHEAD, Form, Scans, is_mmdf
from popdrop.stores.mbox.lengths import LengthScanner
from popdrop.stores.mbox.marks import AFTER_EMPTY_LINE, BEFORE, Marks, Range
from popdrop.stores.mbox.mmdf import MmdfScanner
from popdrop.stores.mbox.scan import BLOCK, EMPTY_LINES, FROM_LINE, NotAnMbox, Scanner
from popdrop.stores.mbox.spans import REFUSED, Spans
from popdrop.stores.uidl import EMPTY_LINE, unique_ids

SEPARATOR_LINE: Final = b"\x01\x01\x01\x01\n"
"""What stands before and behind each message of an MMDF file."""

TORN: Final = (SEPARATOR_LINE[:-1], SEPARATOR_LINE[:-1] + b"\r")
"""The same without its end, or half of it."""

FIRST_BLOCK: Final = 4096
"""Octets of a header to read at a time: few headers are longer."""

_MMDF: Final = FORMS["mmdf"]
_LENGTHS: Final = FORMS["mboxcl2"]
_NEXT: Final = b"From a Thu Jan  1 00:00:00 1970\n\n"


@dataclass(slots=True)
class Content:
    """What a file holds, and what is wrong with it.

    `form`    how it was looked at; never `auto`
    `first`   where the first message begins, behind what is none
    `garbage` octets at the file's start that are no message
    `refusal` why that shall not be mended, and what is to be done; empty if it may
    `gaps`    runs of NUL between messages, in ascending order; `tail` is one at the file's end
    `ending`  what must be added for the last message to be complete
    `spans`   the messages; places in it count from `first`
    """

    size: int
    form: Form
    first: int = 0
    garbage: int = 0
    refusal: str = ""
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


def examine(read: Read, size: int, kind: str, watch: Watch) -> Content:
    """What a file of `size` octets and a kind of `FORMS` holds.

    Scanned as the store does with `strip-headers=yes`. Raises `OSError`, if it becomes shorter
    meanwhile.
    """
    text = _first_text(read, 0, size)
    form, is_certain = _form_of(read, size, FORMS[kind], text)
    said = Findings()
    marks = Marks(read, size, form.mmdf, said)
    content = Content(size, form)
    scanner = form.scanner()
    try:
        _feed(read, 0, size, "scanning", watch, marks, scanner)
        spans = scanner.close()
    except NotAnMbox:
        content.garbage, content.first = _first_message(marks)
        if content.garbage <= text:
            content.garbage = 0
        scanner = form.scanner()
        _feed(read, content.first, size, "scanning again", watch, scanner)
        spans = scanner.close()
    content.spans = spans
    if marks.doubtful and isinstance(scanner, LengthScanner):
        # What looks like a From_ line may be text by a length, as is known only now.
        said = Findings()
        is_text = partial(_is_text, content, scanner.believed)
        marks = Marks(read, size, False, said, is_text)
        _feed(read, 0, size, "scanning again", watch, marks)
    content.gaps, content.tail = marks.gaps, marks.tail
    if content.garbage:
        _garbage(content, read, FORMS[kind], text, is_certain, said)
    if spans.hidden:
        said.add("pseudo", "a message of UW-IMAP's own data is hidden here", content.first)
    if form.mmdf:
        _mmdf_ending(content, read, marks.behind, said)
    else:
        _ending(content, read, said)
    _messages(content, read, said, watch)
    content.findings = said.all(read)
    return content


def _first_text(read: Read, start: int, stop: int) -> int:
    """Where the first octet stands that is none of empty lines, or `stop`."""
    while start < stop:
        empty = EMPTY_LINES.match(b"".join(read(start, min(start + BLOCK, stop))))
        if not empty or not empty.end():
            return start
        start += empty.end()
    return stop


def _form_of(read: Read, size: int, form: Form, text: int) -> tuple[Form, bool]:
    """As what to look at a file whose first text is at `text`; whether that is certain.

    An `auto` file that begins with garbage is what its first message is.
    """
    if not (form.mmdf and form.from_lines):
        return form, True
    head = b"".join(read(text, min(text + LOOK_AHEAD, size)))
    if is_mmdf(head):
        return _MMDF, True
    if not head or FROM_LINE.match(head):
        return _LENGTHS, True
    both = (Marks(read, size, True, Findings()), Marks(read, size, False, Findings()))
    for block in read(0, size):
        for each in both:
            each.feed(block)
    found = []
    for marks in both:
        marks.close()
        found.append(_first_message(marks)[1])
    if found[0] == found[1]:
        return _LENGTHS, False
    return (_MMDF if found[0] < found[1] else _LENGTHS), True


def _feed(
    read: Read, start: int, stop: int, doing: str, watch: Watch, *takers: Marks | Scans
) -> None:
    """Give all these the octets; what finds that they are no mbox gets no more, and is told last.

    Raises `NotAnMbox`, and `OSError`.
    """
    fault: NotAnMbox | None = None
    left = list(takers)
    taken = start
    for block in read(start, stop):
        for each in list(left):
            try:
                each.feed(block)
            except NotAnMbox as its:
                fault = its
                left.remove(each)
        taken += len(block)
        watch(doing, len(block))
    if taken < stop:
        raise OSError("it became shorter while it was read")
    for each in left:
        if isinstance(each, Marks):
            each.close()
    if fault is not None:
        raise fault


def _first_message(marks: Marks) -> Range:
    """Where the first message begins that is not at the file's start, and where NULs before it."""
    starts: list[Range] = [(marks.boundary, marks.boundary), *marks.gaps[:1]]
    if marks.tail is not None:
        starts.append(marks.tail)
    return min(starts)


def _is_text(content: Content, believed: array[int], offset: int) -> bool:
    """Whether what stands there is text by a Content-Length, or begins a message by one."""
    place = offset - content.first
    index = bisect_right(content.spans.starts, place) - 1
    if index < 0:
        return False
    return content.spans.starts[index] == place or 0 < believed[index] <= place


def _garbage(
    content: Content, read: Read, form: Form, text: int, is_certain: bool, said: Findings
) -> None:
    words = f"{content.garbage} octets before the first message"
    if content.first == content.size:
        words = "there is none in the whole file"
    wanted = [Scanner.wanted] * form.from_lines + [MmdfScanner.wanted] * form.mmdf
    said.add("garbage", f"no {' or '.join(wanted)}: {words}", text)
    head = b"".join(read(text, min(text + LOOK_AHEAD, content.size)))
    if not is_certain:
        content.refusal = (
            "nothing in it begins a message, so it is not known how one would have to: run this "
            "with the kind that is delivered to it, --kind mmdf or --kind mboxcl2"
        )
    elif is_mmdf(head):
        content.refusal = (
            "it begins with a line of four ^A, as MMDF files do: run this with --kind mmdf, or "
            "take that line out with an editor"
        )
    elif form.mmdf and FROM_LINE.match(head):
        content.refusal = (
            "it begins with a From_ line, as files of other kinds do: run this with the right "
            "--kind, or put a line of four ^A before that line with an editor"
        )


def _ending(content: Content, read: Read, said: Findings) -> None:
    """What lacks behind the last message of a file of From_ lines."""
    has_text = content.messages or content.spans.hidden or content.garbage
    if content.tail is not None or not has_text:
        return
    last = b"".join(read(max(content.size - BEFORE, 0), content.size))
    if AFTER_EMPTY_LINE.search(last):
        return
    if content.form.lengths and _is_ended_by_length(content, read):
        return
    offset = content.size - 1
    if not last.endswith(b"\n"):
        content.ending = b"\n\n"
        said.add("no-newline", "the last line has no line end", offset)
    else:
        content.ending = b"\r\n" if last.endswith(b"\r\n") else b"\n"
        said.add("no-separator", "no empty line behind the last message", offset)


def _is_ended_by_length(content: Content, read: Read) -> bool:
    """Whether a message that comes directly behind the last one would be seen."""
    start = content.first + (content.spans.starts[-1] if content.messages else 0)
    scanner = content.form.scanner(hide=False)
    for block in read(start, content.size):
        scanner.feed(block)
    scanner.feed(_NEXT)
    return list(scanner.close().starts) == [0, content.size - start]


def _mmdf_ending(content: Content, read: Read, behind: int, said: Findings) -> None:
    """What lacks behind the last message; `behind` is where the last line of ^A ends, or 0."""
    size = content.size
    if content.tail is not None or _first_text(read, behind, size) == size:
        return
    last = b"".join(read(max(size - BEFORE, behind), size))
    is_ended = last.endswith(b"\n")
    if not is_ended:
        content.ending = b"\n"
        said.add("no-newline", "the last line has no line end", size - 1)
    # Nothing is to be ended where there is no message: and a line of ^A without its end is one.
    if not behind or last.rpartition(b"\n")[2] in TORN:
        return
    line = SEPARATOR_LINE
    if last.endswith(b"\r\n"):
        line = line[:-1] + b"\r\n"
    content.ending += line
    if is_ended:
        said.add("no-separator", "no line of ^A behind the last message", size - 1)


_FIELD: Final = re.compile(rb">?[!-9;-~]+[ \t]*:|>From |\r?\n|\Z")


def _messages(content: Content, read: Read, said: Findings, watch: Watch) -> None:
    """What is to be said of single messages; `read` is asked for their headers again."""
    spans = content.spans
    # In MMDF files a run of NULs between messages looks like one itself.
    nuls = {start for start, _ in (*content.gaps, *([content.tail] if content.tail else ()))}
    for index in range(len(spans)):
        start = content.first + spans.starts[index]
        offset, stop = content.first + spans.offset(index), content.first + spans.content_end(index)
        if offset not in nuls:
            _header(read, offset, stop, partial(said.add, offset=start), f"message {index + 1}")
            if content.form.mmdf and index and spans.starts[index] == spans.content_end(index - 1):
                said.add("one-line", f"only one line of ^A before message {index + 1}", start)
        if spans.altered[index] & REFUSED:
            said.add("length", f"message {index + 1} has a Content-Length that is not true", start)
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
    start = content.first + content.spans.starts[index]
    stop = content.first + content.spans.content_end(index)
    behind = min(start + LOOK_AHEAD, stop)

    def blocks() -> Iterator[bytes]:
        yield b"".join(read(start, behind))
        yield from read(behind, stop)

    return content.form.digest(blocks())
