"""Look-up tables for Postfix: may this client relay?

`Socketmap` speaks socketmap_table(5), `TcpTable` tcp_table(5). Whoever is on this machine may ask.
So one question of a connection is worked on at a time, in a turn of the reactor of its own, nothing
more is read meanwhile, and what Postfix would not say ends the connection.

Twisted's own server for the second (`twisted.protocols.postfix`) takes keys as they came, `%20` and
all, breaks off at octets that are not ASCII, sends the text of exceptions, and answers in the order
in which look-ups end.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.errors import TemporaryFailure

log = Logger()

REQUEST_OCTETS: Final = 1024
"""Of a request at most. A host name has 255."""
IDLE_SECONDS: Final = 600
"""Until a silent connection is closed: as Twisted's server for the same. Postfix leaves earlier."""
CONNECTIONS: Final = 500
"""At once. Postfix runs 100 processes at most unless it is told otherwise, each with one."""

_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,3}):").match


class BadRequest(Exception):
    """What comes is no request."""


@implementer(IPushProducer)
class Asked(Protocol, TimeoutMixin):
    """One connection of an MTA's."""

    factory: Tables
    transport: Any
    FOUND: ClassVar[bytes]
    NOT_FOUND: ClassVar[bytes]
    NOT_NOW: ClassVar[bytes]
    BAD: ClassVar[bytes]

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answering = self._choked = self._gone = False
        self._drained: Deferred[None] | None = None

    def connectionMade(self) -> None:
        """Begin the count of silence."""
        self.factory.connections.add(self)
        self.transport.registerProducer(self, True)
        self.setTimeout(IDLE_SECONDS)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Nobody waits for answers any more."""
        self.setTimeout(None)  # type: ignore[no-untyped-call]
        self.factory.connections.discard(self)
        self._gone = True
        self._buffer.clear()
        self.resumeProducing()

    def timeoutConnection(self) -> None:
        """What is not read will not be read."""
        self.transport.abortConnection()

    def callLater(self, period: float, call: Callable[[], None]) -> Any:
        """For the time limit."""
        return self.factory.clock.callLater(period, call)

    def dataReceived(self, data: bytes) -> None:
        """One read of 64 KiB at most beyond what is worked on."""
        self._buffer += data
        if not self._answering:
            self._answering = True
            self.transport.pauseProducing()
            Deferred.fromCoroutine(self._answer()).addErrback(self._failed)

    async def _answer(self) -> None:
        try:
            while (key := self.request(self._buffer)) is not None:
                self.resetTimeout()  # type: ignore[no-untyped-call]
                await self._reply(key)
        except BadRequest:
            if not self._gone:
                self.transport.write(self.BAD)
                self.transport.unregisterProducer()
                self.transport.loseConnection()
            return
        self._answering = False
        if not self._gone:
            self.transport.resumeProducing()

    async def _reply(self, key: bytes) -> None:
        # Whatever is asked: others have their turn first.
        await deferLater(self.factory.clock, 0)
        try:
            reply = self.FOUND if await self.factory.look(key) else self.NOT_FOUND
        except TemporaryFailure:
            reply = self.NOT_NOW
        if not self._gone:
            self.transport.write(reply)
        while self._choked:
            self._drained = Deferred()
            await self._drained

    def _failed(self, failure: Failure) -> None:
        log.failure("a look-up for the MTA failed", failure=failure)
        self.transport.abortConnection()

    def request(self, buffer: bytearray) -> bytes | None:
        """Take the key of a request off `buffer`; `None`: more must come. Raises `BadRequest`."""
        raise NotImplementedError

    # Answers that are not read

    def pauseProducing(self) -> None:
        """The transport holds as much as it likes to."""
        self._choked = True

    def resumeProducing(self) -> None:
        """There is room again, or nobody is left to wait for."""
        self._choked = False
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)

    def stopProducing(self) -> None:
        """The connection is gone; `connectionLost` does the rest."""


class Socketmap(Asked):
    """`NAME KEY` in a netstring. Any name will do: there is one table."""

    FOUND = b"5:OK OK,"
    NOT_FOUND = b"9:NOTFOUND ,"
    NOT_NOW = b"20:TEMP try again later,"
    BAD = b"16:PERM bad request,"

    def request(self, buffer: bytearray) -> bytes | None:
        """As `Asked.request`."""
        match = _LENGTH(buffer)
        if match is None:
            if len(buffer) > 4 or not (buffer.isdigit() or not buffer):
                raise BadRequest
            return None
        length, start = int(match[1]), match.end()
        if length > REQUEST_OCTETS:
            raise BadRequest
        if len(buffer) <= start + length:
            return None
        _, blank, key = bytes(buffer[start : start + length]).partition(b" ")
        if not blank or buffer[start + length] != 0x2C:
            raise BadRequest
        del buffer[: start + length + 1]
        return key


class TcpTable(Asked):
    """`get KEY`, a line each, `%XX` for what is no plain character."""

    FOUND = b"200 OK\n"
    NOT_FOUND = b"500 not%20found\n"
    NOT_NOW = b"400 try%20again%20later\n"
    BAD = b"400 bad%20request\n"

    def request(self, buffer: bytearray) -> bytes | None:
        """As `Asked.request`."""
        end = buffer.find(b"\n", 0, REQUEST_OCTETS + 1)
        if end < 0:
            if len(buffer) > REQUEST_OCTETS:
                raise BadRequest
            return None
        word, _, key = bytes(buffer[:end]).partition(b" ")
        if word != b"get" or not key:
            raise BadRequest
        del buffer[: end + 1]
        return unquote_to_bytes(key)


class Tables(ServerFactory):
    """All connections of one table; `look` says whether a key is in it.

    `look` raises `TemporaryFailure` when it cannot tell.
    """

    noisy = False

    def __init__(
        self, kind: type[Asked], look: Callable[[bytes], Awaitable[bool]], clock: IReactorTime
    ) -> None:
        self.protocol = cast("Any", kind)
        self.look = look
        self.clock = clock
        self.connections: set[Asked] = set()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """`None`, and so a closed connection, when there are too many."""
        if len(self.connections) >= CONNECTIONS:
            return None
        return super().buildProtocol(addr)

    def close(self) -> None:
        """Break all connections off."""
        for each in list(self.connections):
            each.transport.abortConnection()
