"""Mends what an open and locked spool holds, one thing at a time; the caller looks in between.

What would be left is looked at before anything is written: no message may be lost by it, joined
with another one, or made text by a Content-Length that was not true before.
"""

from __future__ import annotations

import socket
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from popdrop.stores.mbox.check import SEPARATOR_LINE, TORN, Content
from popdrop.stores.mbox.findings import Read
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.locks import SpoolLocks
from popdrop.stores.mbox.marks import Range
from popdrop.stores.mbox.scan import BLOCK, LONGEST_FROM
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.mbox.spool import Spool

MARK: Final = b"X-Popdrop-Fsck"
"""The header field of a message that was made here: SHA-256 of the text it holds."""

_HEADER: Final = 1024


class Failed(Exception):
    """A spool could not be looked at, or not be mended; the text says why, and what to do."""


class Refused(Exception):
    """Something is not mended, since that might harm mail; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to be mended: `do` does it, `words` say what was done then.

    `do` may raise `OSError`, `Failed`, and what `Journal.replace_tail` does.
    """

    words: str
    do: Callable[[], None]


class Mender:
    """One spool, of which the session lock and both spool locks are held."""

    def __init__(self, files: Files, journals: Journals, spool: Spool, locks: SpoolLocks) -> None:
        self._files = files
        self._journal = journals.of(spool.path)
        self._spool = spool
        self._locks = locks
        self._read = reader(spool, locks)

    def next_step(self, content: Content) -> Step:
        """The next thing to be mended. Raises `Refused`, and `OSError`."""
        if content.refusal:
            raise Refused(content.refusal)
        if content.tail is not None:
            return self._without_tail(content, content.tail)
        if content.ending:
            return self._ended(content)
        if content.garbage and not self._is_wrapped(content):
            return self._with_garbage_behind(content)
        if content.garbage:
            return self._without_garbage(content)
        return self._without_gaps(content)

    def _spans(self, content: Content) -> Spans:
        """The messages, also one that is hidden; places count from the first."""
        if not content.spans.hidden:
            return content.spans
        scanner = content.form.scanner(hide=False)
        for block in self._read(content.first, content.size):
            scanner.feed(block)
        return scanner.close()

    def _without_tail(self, content: Content, tail: Range) -> Step:
        spans = self._spans(content)
        left = list(spans.starts)
        if content.form.mmdf and left and content.first + spans.offset(-1) == tail[0]:
            left.pop()  # it is made of these NULs
        self._check(content, [(content.first, tail[0])], (), left)
        return Step(f"cut off {_octets(tail)} NULs at the end", lambda: self._cut(content, [tail]))

    def _ended(self, content: Content) -> Step:
        spans = self._spans(content)
        left = list(spans.starts)
        last = self._spool.read(max(content.size - LONGEST_FROM, 0), content.size)
        torn = last.rpartition(b"\n")[2]
        # In MMDF files a line of ^A without its end may be all of the last message.
        if (
            content.form.mmdf
            and left
            and torn in TORN
            and content.first + spans.offset(-1) == content.size - len(torn)
        ):
            left.pop()
        # With its end, a torn line may begin a message.
        place = content.size - len(torn) - content.first
        added = [content.ending]
        self._check(content, [(content.first, content.size)], added, left, lambda at: at == place)
        return Step(
            "added what was missing at the end of the last message",
            lambda: self._append(content, iter([content.ending])),
        )

    def _with_garbage_behind(self, content: Content) -> Step:
        header = self._header(content)
        first, size = content.first, content.size

        def pieces() -> Iterator[bytes]:
            yield header
            yield from self._read(0, content.garbage)
            if content.form.mmdf:
                yield SEPARATOR_LINE

        left = [*self._spans(content).starts, size - first]
        self._check(content, [(first, size)], pieces(), left)
        return Step(
            f"appended the {content.garbage} octets before the first message, as a message of "
            "their own",
            lambda: self._append(content, pieces()),
        )

    def _without_garbage(self, content: Content) -> Step:
        # What is left is what was scanned.
        return Step(
            f"cut the {content.garbage} octets out of the spool's start",
            lambda: self._cut(content, [(0, content.first)]),
        )

    def _without_gaps(self, content: Content) -> Step:
        gaps, spans = content.gaps, self._spans(content)
        left = [content.first + start for start in spans.starts]
        if content.form.mmdf:
            # Such a message is these NULs and the hidden line of ^A, and what is behind that.
            gone = {start - content.first for start, _ in gaps}
            left = [each for i, each in enumerate(left) if spans.offset(i) not in gone]
        removed, done = 0, 0
        moved: list[int] = []
        begins: list[int] = []
        for start, stop in [*gaps, (content.size, content.size)]:
            place = bisect_left(left, start)
            moved += [each - removed for each in left[done:place]]
            done = place
            removed += stop - start
            begins.append(stop - removed)
        behind = set(begins[:-1])
        known = sorted(behind.union(moved))

        def is_parted(start: int) -> bool:
            """Whether it was in one message with a run of NULs, and is behind that."""
            return known[max(bisect_right(known, start) - 1, 0)] in behind

        # In MMDF files perhaps nothing is between the line that was hidden and the next.
        expected = moved if content.form.mmdf else known
        self._check(content, _around(gaps, 0, content.size), (), expected, is_parted)
        return Step(
            f"cut {len(gaps)} runs of NULs out, which stood between messages",
            lambda: self._cut(content, gaps),
        )

    def _check(
        self,
        content: Content,
        ranges: Iterable[Range],
        added: Iterable[bytes],
        left: list[int],
        may_begin: Callable[[int], bool] = lambda start: False,
    ) -> None:
        """Messages of these ranges, and of what is added, begin at `left`, or may where they do.

        Where messages begin at the same places, they hold the same. Raises `Refused`.
        """
        scanner = content.form.scanner(hide=False)
        for start, stop in ranges:
            for block in self._read(start, stop):
                scanner.feed(block)
        for block in added:
            scanner.feed(block)
        # It begins with a message, or holds none.
        spans = scanner.close()
        found = set(spans.starts)
        lost = sorted(set(left) - found)
        if not lost and all(map(may_begin, found.difference(left))):
            return
        if lost and content.form.lengths:
            number = bisect_right(spans.starts, lost[0]) - content.spans.hidden
            if number > 0:
                raise Refused(
                    f"a Content-Length that is not true now, that of message {number}, would hide "
                    "messages behind it: if they are its text, mend the place with an editor, else "
                    "take that field out; then run this again"
                )
        raise Refused(
            "other messages would change by it: look at the place with an editor, and whether "
            "--kind is right"
        )

    def _cut(self, content: Content, cuts: list[Range]) -> None:
        locks = self._locks
        kept = _around(cuts, cuts[0][0], content.size)
        self._journal.replace_tail(
            self._spool.fd, cuts[0][0], kept, content.size, locks.refresh, locks.held
        )

    def _append(self, content: Content, pieces: Iterator[bytes]) -> None:
        """As deliverers do: what cannot be written whole is taken back."""
        files, size = self._files, content.size
        if files.fstat(self._spool.fd).st_size != size or not self._locks.held():
            raise Failed(f"{self._spool.path}: was changed, or its locks were lost: try again")
        offset = size
        # In between, too, the spool ends as it should behind a message: should we be killed here,
        # mail that is delivered before the next try is still a message of its own.
        guard = b"\n" + SEPARATOR_LINE if content.form.mmdf else b"\n\n"

        def write(octets: bytes) -> None:
            rest, place = memoryview(octets), offset
            while rest:
                written = files.pwrite(self._spool.fd, rest, place)
                place += written
                rest = rest[written:]
            self._locks.refresh()

        try:
            last = next(pieces)
            for piece in pieces:
                if len(piece) < len(guard):
                    last += piece  # by itself it would not cover the guard before it
                    continue
                write(last + guard)
                offset += len(last)
                last = piece
            write(last)
            files.fsync(self._spool.fd)
        except OSError:
            with suppress(OSError):
                files.ftruncate(self._spool.fd, size)
            raise

    def _header(self, content: Content) -> bytes:
        """What begins a message that holds all that stands before the first one."""
        now = time.gmtime()
        host = socket.gethostname().encode("ascii", "replace").replace(b" ", b"-")
        line = SEPARATOR_LINE
        if not content.form.mmdf:
            line = b"From MAILER-DAEMON %s\n" % time.asctime(now).encode("ascii")
        return line + (
            b"From: Mail system <MAILER-DAEMON@%s>\n"
            b"Date: %s\n"
            b"Subject: Text found before the first message of this mailbox\n"
            b"%s: %s\n\n"
            % (
                host,
                time.strftime("%a, %d %b %Y %H:%M:%S +0000", now).encode("ascii"),
                MARK,
                _sum(self._read(0, content.garbage)),
            )
        )

    def _is_wrapped(self, content: Content) -> bool:
        """Whether a message already holds what is before the first one, and nothing else.

        Mail may have come behind it since the run that wrapped it was killed.
        """
        mark = b"\n%s: %s\n\n" % (MARK, _sum(self._read(0, content.garbage)))
        spans = content.spans
        for index in reversed(range(len(spans))):
            start = content.first + spans.starts[index]
            # An empty line at its end is one of the text's, a line of ^A is not.
            stop = content.first + (
                spans.content_end(index) if content.form.mmdf else spans.stop(index)
            )
            found = self._spool.read(start, start + _HEADER).find(mark)
            body = start + found + len(mark)
            if found >= 0 and body + content.garbage == stop:
                return mark.split()[1] == _sum(self._read(body, stop))
        return False


def _around(cuts: list[Range], start: int, size: int) -> list[Range]:
    """What is left of the octets from `start` to `size` without `cuts`, which are ascending."""
    starts = [start, *(stop for _, stop in cuts)]
    stops = [*(begin for begin, _ in cuts), size]
    return [(a, b) for a, b in zip(starts, stops, strict=True) if a < b]


def reader(spool: Spool, locks: SpoolLocks) -> Read:
    """Reads a spool by blocks, and touches its dot-lock from time to time."""

    def read(start: int, stop: int) -> Iterator[bytes]:
        for block in spool.blocks(start, stop, BLOCK):
            yield block
            locks.refresh()

    return read


def _sum(blocks: Iterator[bytes]) -> bytes:
    digest = sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest().encode("ascii")


def _octets(place: Range) -> int:
    return place[1] - place[0]
