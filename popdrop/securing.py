"""TLS from the first octet on: Twisted's, without what a short session has no use for.

Left out are the turn of the reactor that it waits for to gather small writes (`POP3Protocol`
gathers them itself), a look at whether the handshake can go on before anything of it has come, the
interfaces of the transport below and a register of connections, which nobody asks for, and the
reading of an end that we have said ourselves. They were a third of what Twisted adds to OpenSSL.
"""

from __future__ import annotations

from typing import Any, Final, cast

from OpenSSL.SSL import Error as TLSError
from OpenSSL.SSL import WantReadError, ZeroReturnError
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from popdrop.certs import Certificates

RECORD: Final = 16_384
"""Octets of mail that a record of TLS holds at most (RFC 8446 section 5.1)."""
HEADER: Final = 5
"""Octets of a record before what it holds: its type, a version and its length."""
LONGEST: Final = RECORD + 2048
"""Octets of a record behind its header, encrypted (RFC 5246 section 6.2.3; less in TLS 1.3)."""
SEALED: Final = 2 * RECORD
"""Octets to ask OpenSSL for behind each: the record, and what else it may have to say."""


class Records:
    """Counts records of TLS (RFC 8446 section 5.1) by their lengths, which are not encrypted."""

    __slots__ = ("_missing",)

    def __init__(self) -> None:
        self._missing: int | None = 0

    def feed(self, data: bytes) -> int | None:
        """How many records end in these octets, which follow those before; `None`: not known.

        Known no more once a header was cut in two, which hardly ever happens, or says what none may
        say: OpenSSL will refuse that, and does so before all of it has come.
        """
        place, size = self._missing, len(data)
        if place is None:
            return None
        ended = 1 if 0 < place <= size else 0
        while place + HEADER <= size:
            length = data[place + 3] << 8 | data[place + 4]
            if length > LONGEST:
                self._missing = None
                return None
            place += HEADER + length
            ended += place <= size
        self._missing = place - size if place >= size else None
        return None if self._missing is None else ended


class PromptTLS(TLSMemoryBIOProtocol):
    """One connection. To the protocol behind it is its transport."""

    factory: TLSFactory
    transport: Any
    wrappedProtocol: Any

    def makeConnection(self, transport: Any) -> None:
        """As `IProtocol.makeConnection`. The handshake begins with the client's first octets."""
        self._tlsConnection = self.factory.certificates.serverConnectionForTLS(self)
        self._tlsConnection.set_accept_state()
        self._appSendBuffer: list[bytes] = []
        self.connected = 1
        self.transport = transport
        self._records = Records()
        self._whole: int | None = None
        self.wrappedProtocol.makeConnection(self)

    def dataReceived(self, data: bytes) -> None:
        """As `IProtocol.dataReceived`."""
        self._whole = self._records.feed(data)
        super().dataReceived(data)  # type: ignore[no-untyped-call]

    def _flushReceiveBIO(self) -> None:
        """As Twisted's, but all that came goes to the protocol by one call.

        So commands before what is no TLS are done, but not answered: there is nobody to answer.
        Where each record that came has given octets of the client's, none is left and OpenSSL has
        nothing to say: it is not asked whether that is so. To be told twice by an exception was a
        tenth of RETR over TLS, 32 in flight.
        """
        whole, self._whole = self._whole, None
        received: list[bytes] = []
        ended = False
        failed = None
        while len(received) != whole and not self._lostTLSConnection:
            try:
                received.append(self._tlsConnection.recv(SEALED))
            except WantReadError:
                break
            except ZeroReturnError:
                ended = True
                break
            except TLSError:
                failed = Failure()  # type: ignore[no-untyped-call]
                break
        if received and not self._aborted:
            data = received[0] if len(received) == 1 else b"".join(received)
            ProtocolWrapper.dataReceived(self, data)  # type: ignore[no-untyped-call]
        if len(received) == whole or self._lostTLSConnection:
            return
        if ended:
            self._shutdownTLS()  # type: ignore[no-untyped-call]
        if ended or failed is not None:
            self._tlsShutdownFinished(failed)  # type: ignore[no-untyped-call]
        self._flushSendBIO()  # type: ignore[no-untyped-call]

    def write(self, data: bytes) -> None:
        """As `ITransport.write`."""
        if self._handshakeDone:
            super().write(data)  # type: ignore[no-untyped-call]
        elif data and not self.disconnecting:
            self._bufferedWrite(data)  # type: ignore[no-untyped-call]

    def write_last(self, data: bytes) -> None:
        """As `write`, but it goes out with what `loseConnection` says, which must come next."""
        waits = self._appSendBuffer or self.disconnecting or self._lostTLSConnection
        if waits or not self._handshakeDone or len(data) > RECORD:
            self.write(data)
            return
        try:
            # A client may want short records (RFC 6066 section 4): then this is the first of some.
            data = data[self._tlsConnection.send(data) :]
        except TLSError:
            pass  # It may have to wait for the client, or be an error: both are told again.
        if data:
            self.write(data)

    def _write(self, data: bytes) -> None:
        """As Twisted's, but a record is no copy first, and all go to the transport by one call.

        That saves a twentieth of RETR over TLS.
        """
        if self._lostTLSConnection:
            return
        rest = memoryview(data)
        records: list[bytes] = []
        failed = None
        try:
            while rest:
                rest = rest[self._tlsConnection.send(rest[:RECORD]) :]
                records.append(self._tlsConnection.bio_read(SEALED))
        except WantReadError:
            pass  # for the client's part of a renegotiation: what is left waits
        except TLSError:
            failed = Failure()  # type: ignore[no-untyped-call]
        if len(records) == 1:
            self.transport.write(records[0])
        elif records:
            self.transport.writeSequence(records)
        if failed is not None:
            self._tlsShutdownFinished(failed)  # type: ignore[no-untyped-call]
        elif rest:
            self._bufferedWrite(bytes(rest))  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """As `IProtocol.connectionLost`. TLS that was cut short is no news where we had closed."""
        if not (self._lostTLSConnection or self.disconnecting):
            self._whole = None
            self._tlsConnection.bio_shutdown()
            self._flushReceiveBIO()
        self._lostTLSConnection = True
        reason, self._reason = self._reason or reason, None
        self.connected = 0
        wrapped, self.wrappedProtocol = self.wrappedProtocol, None
        wrapped.connectionLost(reason)
        self._tlsConnection = None  # type: ignore[assignment]


class TLSFactory(TLSMemoryBIOFactory):
    """As Twisted's, but the wrapped factory may refuse a connection by `None`."""

    protocol = PromptTLS

    def __init__(
        self, certificates: Certificates, wrapped: IProtocolFactory, clock: IReactorTime
    ) -> None:
        super().__init__(certificates, False, wrapped, clock=clock)
        self.certificates = certificates

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """The protocol of a new connection."""
        inner: IProtocol | None = self.wrappedFactory.buildProtocol(cast(IAddress, addr))
        return None if inner is None else PromptTLS(self, inner)  # type: ignore[no-untyped-call]
