"""What the journal's recovery has to know of mbox: which messages are where, which are lacking.

Messages are told apart by the hash that their unique-ids are made of, so a Status field that
another program has changed meanwhile makes no difference (decision 5).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from popdrop.stores.mbox.kinds import LOOK_AHEAD, LOOK_BACK, Form, is_mmdf
from popdrop.stores.mbox.scan import BLOCK, NotAnMbox

Read = Callable[[int, int], Iterator[bytes]]
Refresh = Callable[[], None]


class Kept(Protocol):
    """The octets that a journal holds."""

    length: int

    def blocks(self, start: int, stop: int, size: int = ...) -> Iterator[bytes]:
        """The octets from `start` to `stop`, 0-based, in blocks."""


class _Message(NamedTuple):
    """From `start` to `stop`, separator included, in octets."""

    start: int
    stop: int
    digest: bytes


class MboxForm:
    """`journal.Format` for mbox files of one kind: their messages are those of the sessions."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def arrived(self, fd: int, start: int, kept: Kept, refresh: Refresh) -> bool:
        """Whether only mail that is not in `kept` stands from `start` to the end of the spool."""
        size = os.fstat(fd).st_size
        if start == size:
            return True
        if not self._form.begins(os.pread(fd, LOOK_AHEAD, start)):
            return False
        if not self._form.may_begin(_before(fd, start)):
            return False
        ours = self._messages(_of_kept(kept, refresh), 0, kept.length)
        known = {message.digest for message in ours}
        there = self._messages(_of_file(fd, refresh), start, size)
        return all(message.digest not in known for message in there)

    def missing(self, fd: int, kept: Kept, refresh: Refresh) -> tuple[bytes, list[tuple[int, int]]]:
        """The messages of `kept` that the spool lacks, and what is to be written before them.

        A spool that is no mbox, or MMDF now and was not then, lacks none that could be put there:
        the journal is kept aside.
        """
        size = os.fstat(fd).st_size
        try:
            found = self._messages(_of_file(fd, refresh), 0, size)
            wanted = self._messages(_of_kept(kept, refresh), 0, kept.length)
        except NotAnMbox:
            return b"", []
        there = Counter(message.digest for message in found)
        lacking = []
        for message in wanted:
            if there[message.digest]:
                there[message.digest] -= 1
            else:
                lacking.append((message.start, message.stop))
        if not lacking:
            return b"", []
        start = lacking[0][0]
        first = b"".join(kept.blocks(start, min(start + LOOK_AHEAD, kept.length)))
        if found and is_mmdf(first) != is_mmdf(os.pread(fd, LOOK_AHEAD, found[0].start)):
            return b"", []
        return self._form.between(_before(fd, size), first), lacking

    def _messages(self, read: Read, start: int, stop: int) -> list[_Message]:
        """Raises `NotAnMbox`."""
        scanner = self._form.scanner(strip=frozenset(), hide=False)
        for block in read(start, stop):
            scanner.feed(block)
        spans = scanner.close()
        found = []
        for index in range(len(spans)):
            where = start + spans.starts[index]
            digest = self._form.digest(read(where, start + spans.content_end(index)))
            found.append(_Message(where, start + spans.stop(index), digest))
        return found


def _before(fd: int, offset: int) -> bytes:
    """What may tell whether a message begins at `offset`."""
    start = max(offset - LOOK_BACK, 0)
    return os.pread(fd, offset - start, start)


def _of_file(fd: int, refresh: Refresh) -> Read:
    def read(start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            refresh()
            block = os.pread(fd, min(BLOCK, stop - start), start)
            if not block:
                return
            yield block
            start += len(block)

    return read


def _of_kept(kept: Kept, refresh: Refresh) -> Read:
    def read(start: int, stop: int) -> Iterator[bytes]:
        for block in kept.blocks(start, stop, BLOCK):
            refresh()
            yield block

    return read
