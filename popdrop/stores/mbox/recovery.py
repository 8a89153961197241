"""What the journal's recovery has to know of mbox: which messages are where, which are lacking.

Messages are told apart by the hash that their unique-ids are made of, so a Status field that
another program has changed meanwhile makes no difference (decision 5).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from popdrop.stores.mbox.scan import BLOCK, FROM_LINE, LONGEST_FROM, NotAnMbox, Scanner
from popdrop.stores.uidl import MessageHash

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
    """`journal.Format` for mbox files of any kind."""

    def arrived(self, fd: int, start: int, kept: Kept, refresh: Refresh) -> bool:
        """Whether only mail that is not in `kept` stands from `start` to the end of the spool."""
        size = os.fstat(fd).st_size
        if start == size:
            return True
        if FROM_LINE.match(os.pread(fd, LONGEST_FROM, start)) is None:
            return False
        if start and not _ends_with_empty_line(os.pread(fd, min(3, start), max(start - 3, 0))):
            return False
        ours = _messages(_of_kept(kept, refresh), 0, kept.length)
        known = {message.digest for message in ours}
        there = _messages(_of_file(fd, refresh), start, size)
        return all(message.digest not in known for message in there)

    def missing(self, fd: int, kept: Kept, refresh: Refresh) -> tuple[bytes, list[tuple[int, int]]]:
        """The messages of `kept` that the spool lacks, and what is to be written before them.

        A spool that is no mbox lacks none that could be put there: the journal is kept aside.
        """
        size = os.fstat(fd).st_size
        try:
            spool = _messages(_of_file(fd, refresh), 0, size)
            there = Counter(message.digest for message in spool)
            wanted = _messages(_of_kept(kept, refresh), 0, kept.length)
        except NotAnMbox:
            return b"", []
        lacking = []
        for message in wanted:
            if there[message.digest]:
                there[message.digest] -= 1
            else:
                lacking.append((message.start, message.stop))
        return _separator(os.pread(fd, 3, max(size - 3, 0))), lacking


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


def _messages(read: Read, start: int, stop: int) -> list[_Message]:
    """Raises `NotAnMbox`."""
    scanner = Scanner(unquote=False, strip=frozenset(), hide=False)
    for block in read(start, stop):
        scanner.feed(block)
    spans = scanner.close()
    found = []
    for index in range(len(spans)):
        message = MessageHash()
        for block in read(start + spans.starts[index], start + spans.content_end(index)):
            message.update(block)
        where = start + spans.starts[index]
        found.append(_Message(where, start + spans.stop(index), message.digest()))
    return found


def _ends_with_empty_line(octets: bytes) -> bool:
    return octets.endswith((b"\n\n", b"\n\r\n"))


def _separator(end: bytes) -> bytes:
    """What must stand between the spool's last octets and a From_ line."""
    if not end or _ends_with_empty_line(end):
        return b""
    return b"\n" if end.endswith(b"\n") else b"\n\n"
