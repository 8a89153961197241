"""Mends what an open and locked spool holds, one thing at a time; the caller looks in between."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Final

from popdrop.stores.mbox.check import Content, Range
from popdrop.stores.mbox.findings import Read
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.locks import SpoolLocks
from popdrop.stores.mbox.scan import BLOCK
from popdrop.stores.mbox.spool import Spool

MARK: Final = b"X-Popdrop-Fsck"
"""The header field of a message that was made here: SHA-256 of the text it holds."""

_HEADER: Final = 1024
_GUARD: Final = b"\n\n"


class Failed(Exception):
    """A spool could not be looked at, or not be mended; the text says why, and what to do."""


class Mender:
    """One spool, of which the session lock and both spool locks are held.

    What is done to it may raise `OSError`, `Failed`, and what `Journal.replace_tail` does.
    """

    def __init__(self, files: Files, journals: Journals, spool: Spool, locks: SpoolLocks) -> None:
        self._files = files
        self._journal = journals.of(spool.path)
        self._spool = spool
        self._locks = locks
        self._read = reader(spool, locks)

    def mend_one(self, content: Content) -> str:
        """The next thing to be mended; what was done."""
        if content.tail is not None:
            self._cut(content, [content.tail])
            return f"cut off {_octets(content.tail)} NULs at the end"
        if content.ending:
            self._append(content.size, iter([content.ending]))
            return "added what was missing at the end of the last message"
        if content.garbage:
            octets = content.garbage
            if not self._is_wrapped(content):
                self._append(content.size, self._wrapped(octets))
                return (
                    f"appended the {octets} octets before the first message, as a message of "
                    "their own"
                )
            gaps = [each for each in content.gaps if each[0] >= content.first]
            self._cut(content, [(0, content.first), *gaps])
            runs = f", and {len(gaps)} runs of NULs between messages" if gaps else ""
            return f"cut the {octets} octets out of the spool's start{runs}"
        self._cut(content, content.gaps)
        return f"cut {len(content.gaps)} runs of NULs out, which stood between messages"

    def _cut(self, content: Content, cuts: list[Range]) -> None:
        ends = [start for start, _ in cuts[1:]] + [content.size]
        kept = [(start, stop) for (_, start), stop in zip(cuts, ends, strict=True) if start < stop]
        locks = self._locks
        self._journal.replace_tail(
            self._spool.fd, cuts[0][0], kept, content.size, locks.refresh, locks.held
        )

    def _append(self, size: int, pieces: Iterator[bytes]) -> None:
        """As deliverers do: what cannot be written whole is taken back."""
        files = self._files
        if files.fstat(self._spool.fd).st_size != size or not self._locks.held():
            raise Failed(f"{self._spool.path}: was changed, or its locks were lost: try again")
        offset = size

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
                # In between, too, the spool ends with an empty line: should we be killed here, mail
                # that is delivered before the next try is still a message of its own.
                write(last + _GUARD)
                offset += len(last)
                last = piece
            write(last)
            files.fsync(self._spool.fd)
        except OSError:
            with suppress(OSError):
                files.ftruncate(self._spool.fd, size)
            raise

    def _wrapped(self, octets: int) -> Iterator[bytes]:
        """A message that holds the first `octets` of the spool, which end with an empty line."""
        now = time.gmtime()
        host = socket.gethostname().encode("ascii", "replace").replace(b" ", b"-")
        yield (
            b"From MAILER-DAEMON %s\n"
            b"From: Mail system <MAILER-DAEMON@%s>\n"
            b"Date: %s\n"
            b"Subject: Text found before the first message of this mailbox\n"
            b"%s: %s\n\n"
            % (
                time.asctime(now).encode("ascii"),
                host,
                time.strftime("%a, %d %b %Y %H:%M:%S +0000", now).encode("ascii"),
                MARK,
                _sum(self._read(0, octets)),
            )
        )
        yield from self._read(0, octets)

    def _is_wrapped(self, content: Content) -> bool:
        """Whether a message already holds what is before the first one, and nothing else.

        Mail may have come behind it since the run that wrapped it was killed.
        """
        mark = b"\n%s: %s\n\n" % (MARK, _sum(self._read(0, content.garbage)))
        stop = content.size
        for place in reversed(content.spans.starts):
            start = content.first + place
            found = self._spool.read(start, start + _HEADER).find(mark)
            body = start + found + len(mark)
            if found >= 0 and body + content.garbage == stop:
                return mark.split()[1] == _sum(self._read(body, stop))
            stop = start
        return False


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
