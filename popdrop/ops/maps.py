"""Look-up tables for Postfix: may this client relay?

`Socketmap` speaks socketmap_table(5), `TcpTable` tcp_table(5). Both answer in the order of the
questions and read no faster than they answer. Twisted's own server for the second
(`twisted.protocols.postfix`) takes keys as they came, `%20` and all, breaks off at octets that are
not ASCII, sends the text of exceptions, and answers in the order in which look-ups end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver, NetstringReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.errors import TemporaryFailure

log = Logger()

REQUEST_OCTETS: Final = 1024
"""Of a request at most. A host name has 255."""
WAITING: Final = 32
"""Questions that wait before no more are read. Postfix asks one at a time."""
IDLE_SECONDS: Final = 600
"""Until a silent connection is closed: as Twisted's server for the same. Postfix leaves earlier."""
CONNECTIONS: Final = 1000
"""At once. Postfix runs 100 processes at most unless it is told otherwise, each with one."""


@implementer(IPushProducer)
class _Asked(Protocol, TimeoutMixin):
    """One connection of an MTA's."""

    factory: Tables
    transport: Any
    FOUND: ClassVar[bytes]
    NOT_FOUND: ClassVar[bytes]
    NOT_NOW: ClassVar[bytes]
    BAD: ClassVar[bytes]

    def connectionMade(self) -> None:
        """Begin the count of silence."""
        self._waiting: deque[bytes | None] = deque()
        self._answering = self._choked = self._gone = False
        self._drained: Deferred[None] | None = None
        self.factory.connections.add(self)
        self.transport.registerProducer(self, True)
        self.setTimeout(IDLE_SECONDS)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Nobody waits for answers any more."""
        self.setTimeout(None)  # type: ignore[no-untyped-call]
        self.factory.connections.discard(self)
        self._gone = True
        self._waiting.clear()
        self.resumeProducing()

    def timeoutConnection(self) -> None:
        """What is not read will not be read."""
        self.transport.abortConnection()

    def asked(self, key: bytes | None) -> None:
        """Answer when all before it have been; `None`: it was no question."""
        self.resetTimeout()  # type: ignore[no-untyped-call]
        self._waiting.append(key)
        if len(self._waiting) == WAITING:
            self.transport.pauseProducing()
        if not self._answering:
            self._answering = True
            Deferred.fromCoroutine(self._answer()).addErrback(self._failed)

    async def _answer(self) -> None:
        while self._waiting:
            key = self._waiting.popleft()
            reply = self.BAD if key is None else await self._look(key)
            if not self._gone:
                self.reply(reply)
            while self._choked:
                self._drained = Deferred()
                await self._drained
        self._answering = False
        if not self._gone:
            self.transport.resumeProducing()

    async def _look(self, key: bytes) -> bytes:
        try:
            return self.FOUND if await self.factory.look(key) else self.NOT_FOUND
        except TemporaryFailure:
            return self.NOT_NOW

    def _failed(self, failure: Failure) -> None:
        log.failure("a look-up for the MTA failed", failure=failure)
        self.transport.abortConnection()

    def reply(self, octets: bytes) -> None:
        """Send an answer."""
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


class Socketmap(_Asked, NetstringReceiver):
    """`NAME KEY` in a netstring. Any name will do: there is one table."""

    FOUND = b"OK OK"
    NOT_FOUND = b"NOTFOUND "
    NOT_NOW = b"TEMP try again later"
    BAD = b"PERM a request is a name, a blank and a key"
    MAX_LENGTH = REQUEST_OCTETS

    def stringReceived(self, string: bytes) -> None:
        """A request."""
        _, blank, key = string.partition(b" ")
        self.asked(key if blank else None)

    def reply(self, octets: bytes) -> None:
        """See the base class."""
        self.sendString(octets)  # type: ignore[no-untyped-call]


class TcpTable(_Asked, LineOnlyReceiver):
    """`get KEY`, a line each, `%XX` for what is no plain character."""

    FOUND = b"200 OK"
    NOT_FOUND = b"500 not%20found"
    NOT_NOW = b"400 try%20again%20later"
    BAD = b"400 a%20request%20is%20get,%20a%20blank%20and%20a%20key"
    MAX_LENGTH = REQUEST_OCTETS
    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        """A request."""
        word, _, key = line.partition(b" ")
        self.asked(unquote_to_bytes(key) if word == b"get" and key else None)

    def reply(self, octets: bytes) -> None:
        """See the base class."""
        self.sendLine(octets)  # type: ignore[no-untyped-call]


class Tables(ServerFactory):
    """All connections of one table; `look` says whether a key is in it.

    `look` raises `TemporaryFailure` when it cannot tell.
    """

    noisy = False

    def __init__(
        self, kind: Callable[[], _Asked], look: Callable[[bytes], Awaitable[bool]]
    ) -> None:
        self.protocol = cast("Any", kind)
        self.look = look
        self.connections: set[_Asked] = set()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """`None`, and so a closed connection, when there are too many."""
        if len(self.connections) >= CONNECTIONS:
            return None
        return super().buildProtocol(addr)

    def close(self) -> None:
        """Break all connections off."""
        for each in list(self.connections):
            each.transport.abortConnection()
