"""A blocking store as an `IStore`: its calls in threads, its waits on reactor timers.

Calls for one drop are strictly one after another. A call that has begun runs to its end, since a
thread cannot be interrupted; `release` queues behind it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from itertools import count
from random import SystemRandom
from typing import Any, Final, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.errors import Busy, InUse, PopdropError, TemporaryFailure
from popdrop.hot import AT_ONCE, Window
from popdrop.interfaces import (
    IBlockingMaildrop,
    IBlockingStore,
    IBlocks,
    IMaildrop,
    IStore,
)
from popdrop.listing import Listing
from popdrop.threads import Pool
from popdrop.values import Owner, Source
from popdrop.wire import Outgoing, as_stored

T = TypeVar("T")

log = Logger()
_random = SystemRandom()

HOT_LIMIT: Final = 65_536
"""Stored octets of a message that is answered in the reactor if its pages are in memory."""
BLOCK: Final = 65_536
"""Stored octets read in the reactor at a time: about 0.1 ms of work."""
_window: Final = Window()
"""Where the reactor reads to, for one maildrop after the other."""
COLD_BLOCK: Final = 262_144
"""Stored octets read by a thread at a time, so that a hop (28 us) is small beside it."""
TRIES: Final = 5
"""Reads of a block while the file changes under them, of a store that has no `Source.read`."""
SESSION_WAIT: Final = 2.0
"""Seconds to wait for another session of the same maildrop to let go."""
NOT_READ: Final = "message could not be read, try again later"
LOCK_TIMEOUT: Final = 30.0
"""Seconds to wait for a deliverer or a mail reader, `--lock-timeout`."""


def _shielded(inner: Deferred[T], orphan: Callable[[T], object]) -> Deferred[T]:
    """A Deferred that may be cancelled without touching `inner`; a late result is an orphan."""
    outer: Deferred[Any] = Deferred()

    def done(result: Any) -> None:
        if not outer.called:
            outer.callback(result)
        elif not isinstance(result, Failure):
            orphan(result)

    inner.addBoth(done)
    return outer


async def _noted(done: Deferred[None]) -> None:
    """Nothing that the client asked for has failed where a mark could not be made."""
    try:
        await done
    except PopdropError as error:
        log.warn("not marked as read: {detail}", detail=error.detail or error.text)


@implementer(IStore)
class InThreads:
    """`IStore` over an `IBlockingStore`. `lock_timeout` is in seconds."""

    def __init__(
        self,
        store: IBlockingStore,
        pool: Pool,
        clock: IReactorTime,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        self._store = store
        self._pool = pool
        self.clock = clock
        self.lock_timeout = lock_timeout

    def run(self, work: Callable[[], T], orphan: Callable[[T], object]) -> Deferred[T]:
        """Do `work` in a thread to its end, whether or not anybody still waits for it."""
        return _shielded(self._pool.run(work), orphan)

    async def pause(self, tries: int) -> None:
        """After `tries` tries of a lock: 5 to 20 ms at first, then longer, up to 125 to 500 ms.

        At random, so that two do not keep step (Debian Policy 11.6). Short at first, since a
        deliverer holds its locks for some milliseconds only.
        """
        longest = min(0.5, 0.01 * 2**tries)
        await deferLater(self.clock, _random.uniform(longest / 4, longest))

    async def open(self, owner: Owner) -> IMaildrop:
        """As `IStore.open`."""
        begun = self.clock.seconds()
        for tries in count(1):
            try:
                drop = await self.run(
                    lambda: self._store.open(owner),
                    lambda late: self._pool.run(late.release),
                )
            except Busy as busy:
                wait = min(SESSION_WAIT, self.lock_timeout)
                if busy.lock != "session":
                    wait = self.lock_timeout
                if self.clock.seconds() - begun >= wait:
                    raise InUse(
                        "maildrop is locked by another session or a mail program, try again later",
                        f"{busy.lock} lock busy",
                    ) from None
                await self.pause(tries)
            else:
                return ThreadedDrop(self, drop, self._pool)
        raise AssertionError("unreachable")


@implementer(IMaildrop)
class ThreadedDrop:
    """`IMaildrop` over an `IBlockingMaildrop`."""

    def __init__(self, store: InThreads, drop: IBlockingMaildrop, pool: Pool) -> None:
        self._store = store
        self._drop = drop
        self._pool = pool
        self._in_flight: Deferred[Any] | None = None
        self._released: Deferred[None] | None = None
        self._nowait = True
        self._following = 0

    @property
    def listing(self) -> Listing:
        """As `IMaildrop.listing`."""
        return self._drop.listing

    def call(self, work: Callable[[], T]) -> Deferred[T]:
        """Do `work` of the drop in a thread, behind nothing and before `release`."""
        return self._tracked(self._pool.run(work))

    def _tracked(self, inner: Deferred[T]) -> Deferred[T]:
        if self._in_flight is not None:
            raise RuntimeError("calls for one maildrop come one after another")
        self._in_flight = inner
        _window.forget(self)

        def landed(result: Any) -> Any:
            self._in_flight = None
            return result

        inner.addBoth(landed)
        return _shielded(inner, lambda late: None)

    async def _patiently(self, work: Callable[[], T], wanted: Callable[[], bool]) -> T:
        """Retry `work` while a lock is busy: up to the lock timeout, as long as it is wanted."""
        begun = self._store.clock.seconds()
        for tries in count(1):
            try:
                return await self._pool.run(work)
            except Busy as busy:
                late = self._store.clock.seconds() - begun >= self._store.lock_timeout
                if late or not wanted():
                    raise TemporaryFailure(
                        "maildrop is locked by a mail program, try again later",
                        f"{busy.lock} lock busy",
                    ) from None
                await self._store.pause(tries)
        raise AssertionError("unreachable")

    def patiently(self, work: Callable[[], T], *, to_the_end: bool = False) -> Deferred[T]:
        """As `call`, retried while a lock is busy. Raises `TemporaryFailure` in the end.

        It is given up once the maildrop is to be released, unless `to_the_end`.
        """
        return self._tracked(
            Deferred.fromCoroutine(
                self._patiently(work, lambda: to_the_end or self._released is None)
            )
        )

    def measure(self) -> Awaitable[None]:
        """As `IMaildrop.measure`."""
        return self.patiently(self._drop.measure)

    def identify(self) -> Awaitable[None]:
        """As `IMaildrop.identify`."""
        return self.patiently(self._drop.identify)

    @property
    def wants_seen(self) -> bool:
        """As `IMaildrop.wants_seen`."""
        return bool(getattr(self._drop, "wants_seen", False))

    def commit(self, deleted: Collection[int], seen: Collection[int] = ()) -> Awaitable[None]:
        """As `IMaildrop.commit`. Nothing deleted, and nothing to note: nothing is done."""
        if seen and self.wants_seen:
            done = self.patiently(lambda: self._drop.commit(deleted, seen), to_the_end=True)
            return done if deleted else _noted(done)
        if not deleted:
            return succeed(None)
        return self.patiently(lambda: self._drop.commit(deleted), to_the_end=True)

    def ready(self, index: int, lines: int | None, ahead: int = 0) -> bytes | None:
        """As `IMaildrop.ready`."""
        source = self._drop.source(index)
        wanted = source.length
        if wanted > HOT_LIMIT:
            if lines is None:
                return None
            wanted = HOT_LIMIT
        block = _window.get(self, source.offset, wanted)
        if block is None:
            # Who asks in another order is not read for in this one.
            goes_on = ahead and index == self._following
            reach = self._drop.reach(index, ahead, AT_ONCE) if goes_on else 0
            block = self.hot(source.fd, source.offset, wanted, reach)
            # Looked at behind the read: what was written before it would show.
            if block is None or len(block) < wanted or not source.unchanged():
                _window.forget(self)
                return None
        self._following = index + 1
        if lines is None and not source.strip:
            return as_stored(block, source.unquote, source.spaced)
        outgoing = Outgoing(source.strip, source.unquote, lines, source.spaced)
        out = outgoing.feed(block)
        if wanted == source.length or outgoing.finished:
            return out + outgoing.end()
        return None

    def hot(self, fd: int, offset: int, length: int, reach: int = 0) -> bytes | None:
        """What of `length` octets at `offset` is in memory, `None` if reading might wait.

        Of `reach` octets from there what lies behind is kept for the next calls of `ready`.
        """
        if not self._nowait:
            return None
        try:
            return _window.read(self, fd, offset, length, reach)
        except OSError as error:
            # Not every file system can say what is in memory (tmpfs on older kernels, NFS).
            self._nowait = error.errno == errno.EAGAIN
            return None

    async def fetch(self, index: int, lines: int | None) -> IBlocks:
        """As `IMaildrop.fetch`."""
        return MessageBlocks(self, self._drop.source(index), lines)

    def release(self) -> Deferred[None]:
        """As `IMaildrop.release`."""
        _window.forget(self)
        if self._released is None and self._in_flight is None and self._drop.quick_release:
            self._released = succeed(None)
            self._drop.release()
            return self._released
        if self._released is None:
            released: Deferred[None] = Deferred()
            self._released = released
            if self._in_flight is None:
                self._let_go(None)
            else:
                self._in_flight.addBoth(self._then_let_go)
        waiter: Deferred[None] = Deferred()

        def free(result: None) -> None:
            if not waiter.called:
                waiter.callback(None)

        self._released.addCallback(free)
        return waiter

    def _then_let_go(self, result: T) -> T:
        self._let_go(None)
        return result

    def _let_go(self, _: object) -> None:
        def gone(result: object) -> None:
            if isinstance(result, Failure):
                log.failure("releasing a maildrop failed", failure=result)
            if self._released is not None:
                self._released.callback(None)

        self._pool.run(self._drop.release).addBoth(gone)


@implementer(IBlocks)
class MessageBlocks:
    """One message on its way out. No block leaves before the file was looked at (decision 12)."""

    def __init__(self, drop: ThreadedDrop, source: Source, lines: int | None) -> None:
        self._drop = drop
        self._source = source
        self._outgoing = Outgoing(source.strip, source.unquote, lines, source.spaced)
        self._position = 0
        self._ended = False

    async def read(self) -> bytes:
        """As `IBlocks.read`. Raises `TemporaryFailure`."""
        while not self._ended:
            out = await self._next()
            if out:
                return out
        return b""

    async def _next(self) -> bytes:
        source = self._source
        left = source.length - self._position
        out = b""
        if left and not self._outgoing.finished:
            block = await self._block(source.offset + self._position, left)
            self._position += len(block)
            out = self._outgoing.feed(block)
        if self._position == source.length or self._outgoing.finished:
            self._ended = True
            out += self._outgoing.end()
        return out

    async def _block(self, offset: int, left: int) -> bytes:
        """Octets that are still those of the message: the file is looked at behind each read.

        Where it has changed, they are read again under the store's locks: without, a deliverer
        that waits for them would write between any look and the read that follows it.
        """
        source = self._source
        wanted = min(left, COLD_BLOCK)
        for _ in range(TRIES):
            block = self._drop.hot(source.fd, offset, min(left, BLOCK))
            try:
                if not block:
                    block = await self._drop.call(partial(os.pread, source.fd, wanted, offset))
                if block and source.unchanged():
                    return block
                if source.read is not None:
                    return await self._drop.patiently(partial(source.read, offset, wanted))
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, "?")
                raise TemporaryFailure(NOT_READ, f"{code} at offset {offset}") from error
            await self._drop.patiently(source.verify)
        raise TemporaryFailure(NOT_READ, "the file changes all the time")

    def close(self) -> None:
        """As `IBlocks.close`."""
        self._ended = True
