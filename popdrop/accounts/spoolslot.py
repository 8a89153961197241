"""The network process's part of `open=helper`: asks the helper for descriptors of spools.

It blocks, for the threads of the store. Each call has a connection for itself as long as it takes,
so nothing has to be sorted; there are a few, and who finds none waits for one.
"""

from __future__ import annotations

import os
import queue
import secrets
import select
import socket
import threading
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from popdrop.accounts.helperwire import (
    LONGEST,
    Down,
    Kind,
    Malformed,
    Opened,
    Opening,
    decode_opened,
    encode_opening,
)
from popdrop.errors import PermanentFailure, TemporaryFailure

CHANNELS: Final = 4
"""Connections of one process. An opening takes well under a millisecond, but on a file server that
hangs; then other spools are still to be had."""
SECONDS: Final = 30.0
"""How long an opening may take, the wait for a connection included."""
NOT_NOW: Final = "maildrop cannot be opened now, try again later"
NEVER: Final = "maildrop cannot be opened"
_DESCRIPTORS: Final = 4
"""Room for more than the one that may come, so that all that come are seen and closed."""


class _Late(TemporaryFailure):
    """No answer in time."""


class SpoolSlot:
    """Connections to the helper over which it passes spools. May be used from any thread."""

    patience = SECONDS

    def __init__(self, channels: Iterable[socket.socket]) -> None:
        # By when an answer last failed to come: the one that hangs is tried last.
        self._idle: queue.PriorityQueue[tuple[float, int]] = queue.PriorityQueue()
        self._all = list(channels)
        self._left = len(self._all)
        self._guard = threading.Lock()
        self._closed = False
        # The end of one is what wakes threads up that wait. Not a shutdown of the channels: those
        # are the next worker's, too.
        self._end, self._until_end = socket.socketpair()
        for place, channel in enumerate(self._all):
            channel.setblocking(False)
            self._idle.put((0.0, place))

    def open(self, name: bytes) -> int | None:
        """A descriptor of the spool of `name`, `None` where there is no spool. Blocks.

        Raises `TemporaryFailure` and `PermanentFailure`.
        """
        until = time.monotonic() + self.patience
        try:
            _, place = self._idle.get(timeout=self.patience if self._left else 0.0)
        except queue.Empty:
            why = "the helper does not keep up" if self._left else "the helper is gone"
            raise TemporaryFailure(NOT_NOW, why) from None
        channel = self._all[place]
        doubt: float | None = 0.0
        try:
            descriptor, opened = self._ask(channel, name, until)
        except (OSError, EOFError, Malformed) as error:
            doubt = None  # nothing more is to be had from it
            raise TemporaryFailure(
                NOT_NOW, f"the helper has shut this way to spools ({type(error).__name__})"
            ) from None
        except _Late:
            doubt = time.monotonic()
            raise
        finally:
            self._give_back(doubt, place)
        if opened.kind is Kind.TEMPORARY:
            raise TemporaryFailure(NOT_NOW, opened.detail)
        if opened.kind is Kind.PERMANENT:
            raise PermanentFailure(NEVER, opened.detail)
        return descriptor

    def filenos(self) -> list[int]:
        """Of the channels, for a process that is to inherit them."""
        return [channel.fileno() for channel in self._all]

    def _give_back(self, doubt: float | None, place: int) -> None:
        with self._guard:
            if doubt is None or self._closed:
                self._let_go(place)
            else:
                self._idle.put((doubt, place))

    def _let_go(self, place: int) -> None:
        self._left -= 1
        self._all[place].close()
        if self._closed and not self._left:
            self._until_end.close()

    def _ask(self, channel: socket.socket, name: bytes, until: float) -> tuple[int | None, Opened]:
        """Raises `EOFError` or `OSError` where the connection is of no use any more."""
        if self._closed:
            raise EOFError
        # What came too late for another call, and the ends of helpers that nobody had asked.
        with suppress(BlockingIOError):
            while True:
                _close(_received(channel)[1])
        number = secrets.randbits(64)
        try:
            channel.sendmsg([encode_opening(Opening(number, name))], [], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise TemporaryFailure(NOT_NOW, "the helper does not read") from None
        except ValueError:
            raise PermanentFailure(NEVER, "a name that cannot be used") from None
        waiting = select.poll()
        waiting.register(channel, select.POLLIN)
        waiting.register(self._until_end, select.POLLIN)
        while waiting.poll(max(0.0, until - time.monotonic()) * 1000):
            if self._closed:
                raise EOFError
            try:
                record, descriptors = _received(channel)
            except BlockingIOError:
                continue
            try:
                opened = decode_opened(record)
                if isinstance(opened, Down):
                    why = f"the helper ended: {opened.reason}"
                    raise TemporaryFailure(NOT_NOW, why)
                if opened.number != number:
                    continue
                if len(descriptors) != (opened.kind is Kind.HANDED):
                    raise Malformed("not the descriptors that belong to it")
                return (descriptors.pop() if descriptors else None), opened
            finally:
                _close(descriptors)
        raise _Late(NOT_NOW, f"the helper gave no answer within {self.patience:g} s")

    def close(self) -> None:
        """Calls in progress fail, and those to come. Idempotent."""
        with self._guard:
            self._closed = True
            self._end.close()
            if not self._left:
                self._until_end.close()
            with suppress(queue.Empty):
                while True:
                    self._let_go(self._idle.get_nowait()[1])


def _received(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One record and its descriptors. Raises `EOFError`, `OSError`, `BlockingIOError`."""
    room = socket.CMSG_SPACE(_DESCRIPTORS * array("i").itemsize)
    record, controls, flags, _ = channel.recvmsg(LONGEST + 1, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, octets in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(octets[: len(octets) - len(octets) % descriptors.itemsize])
    if not record or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close(list(descriptors))
        raise EOFError
    return record, list(descriptors)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
