"""The PROXY protocol, versions 1 and 2, believed from named networks only.

Source: "The PROXY protocol", https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt. The
protocol behind is made when the header is complete: from its first moment it sees the client's
address, and its greeting comes after the header.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, NamedTuple, cast

from twisted.internet import address
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IHalfCloseableProtocol,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer

from popdrop.policy import is_in
from popdrop.sending import prompt
from popdrop.values import Network, normalised

__all__ = ["BadHeader", "Header", "ProxiedEndpoint", "ProxiedFactory", "ProxiedPort", "read_header"]

log = Logger()

HEADER_SECONDS: Final = 5.0
"""A header comes with the proxy's connect: the specification wants three seconds at least."""
LINE_OCTETS: Final = 107
"""The longest header of version 1, with its CRLF (section 2.1)."""
SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
STOP_SECONDS: Final = 1.0
"""How long a server that stops waits for headers: a proxy sends its own at once."""
STOP_STEP: Final = 0.02
"""Seconds between two looks at whether all have come."""
FIXED_OCTETS: Final = 16
"""Of a header of version 2, before addresses and the rest, at most 65,535 octets (section 2.2)."""
UNKNOWN: Final = address.UNIXAddress(None)
"""A peer that the proxy names no address for, as in its own checks."""


class BadHeader(Exception):
    """What came is no PROXY header, or one that names no stream over IP."""


class Header(NamedTuple):
    """One header: octets it took, and whom it names; `None` where it names nobody."""

    size: int
    source: IAddress | None = None
    destination: IAddress | None = None


def read_header(data: bytes) -> Header | None:
    """The header that `data` begins with, `None` while more must come. Raises `BadHeader`."""
    if data.startswith(SIGNATURE[: len(data)]):
        return _binary(data) if len(data) >= FIXED_OCTETS else None
    if data.startswith(b"PROXY "[: len(data)]):
        return _line(data)
    raise BadHeader


def _line(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, LINE_OCTETS)
    if end < 0:
        if len(data) >= LINE_OCTETS:
            raise BadHeader
        return None
    try:
        words = data[:end].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise BadHeader from None
    if words[1] == "UNKNOWN":
        return Header(end + 2)
    version = {"TCP4": 4, "TCP6": 6}.get(words[1])
    if version is None or len(words) != 6:
        raise BadHeader
    ends = [_made(words[2], words[4], version), _made(words[3], words[5], version)]
    return Header(end + 2, *ends)


def _made(host: str, port: str, version: int) -> IAddress:
    try:
        known = ip_address(host)
    except ValueError:
        raise BadHeader from None
    digits = port.isascii() and port.isdigit() and len(port) < 6
    if known.version != version or "%" in host or not digits or int(port) > 65_535:
        raise BadHeader
    return _address(known, int(port))


def _address(known: IPv4Address | IPv6Address, port: int) -> IAddress:
    kind = address.IPv4Address if known.version == 4 else address.IPv6Address
    return kind("TCP", str(known), port)


def _binary(data: bytes) -> Header | None:
    command, family, length = struct.unpack_from("!BBH", data, len(SIGNATURE))
    if command not in (0x20, 0x21):
        raise BadHeader
    size = FIXED_OCTETS + length
    if len(data) < size:
        return None
    # LOCAL: the proxy itself. Nothing and a Unix socket have no address.
    if command == 0x20 or family in (0x00, 0x31):
        return Header(size)
    octets = {0x11: 4, 0x21: 16}.get(family)
    if octets is None or length < 2 * octets + 4:
        raise BadHeader
    source, destination, ours, theirs = struct.unpack_from(
        f"!{octets}s{octets}sHH", data, FIXED_OCTETS
    )
    kind = IPv4Address if octets == 4 else IPv6Address
    return Header(size, _address(kind(source), ours), _address(kind(destination), theirs))


class _Waiting(Protocol):
    """Stands where the wrapped protocol will be, until the header is complete."""

    def dataReceived(self, data: bytes) -> None:
        raise AssertionError("nothing comes here")


class Proxied(ProtocolWrapper):
    """One connection through a proxy. To the protocol behind it is its transport."""

    factory: ProxiedFactory
    transport: Any
    wrappedProtocol: Any

    def __init__(self, factory: ProxiedFactory) -> None:
        super().__init__(factory, cast(IProtocol, _Waiting()))
        self._begin = bytearray()
        self._header: Header | None = None
        self._timer: IDelayedCall | None = None
        self._paused = False
        self._rest = b""

    def makeConnection(self, transport: Any) -> None:
        super().makeConnection(transport)  # type: ignore[no-untyped-call]
        self._timer = self.factory.clock.callLater(HEADER_SECONDS, self._refuse, "no PROXY header")

    def getPeer(self) -> IAddress:
        """The client."""
        return (self._header and self._header.source) or UNKNOWN

    def getHost(self) -> IAddress:
        """Where the client has connected to."""
        known = self._header and self._header.destination
        return known or cast(IAddress, self.transport.getHost())

    def _refuse(self, why: str) -> None:
        peer = getattr(self.transport.getPeer(), "host", None) or "a local program"
        log.info("{why} from {peer}: closed", why=why, peer=peer)
        self.give_up()

    @property
    def waits(self) -> bool:
        """Whether the header has not come yet."""
        return self._header is None and self._timer is not None

    def give_up(self) -> None:
        """Close without a header."""
        self._stop_waiting()
        self.transport.abortConnection()

    def _stop_waiting(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def dataReceived(self, data: bytes) -> None:
        """The header first, then what belongs to the protocol behind."""
        if self._header is not None:
            self.wrappedProtocol.dataReceived(data)
            return
        if self._timer is None:
            return  # refused
        self._begin += data
        try:
            header = read_header(bytes(self._begin))
        except BadHeader:
            self._refuse("no PROXY header")
            return
        if header is None:
            return
        self._stop_waiting()
        self._header = header
        self._rest = bytes(self._begin[header.size :])
        self._begin.clear()
        inner = self.factory.wrappedFactory.buildProtocol(self.getPeer())
        if inner is None:
            self.transport.abortConnection()
            return
        self.wrappedProtocol = inner
        if IHalfCloseableProtocol.providedBy(inner):
            alsoProvides(self, IHalfCloseableProtocol)
        inner.makeConnection(self)
        self._deliver()

    def _deliver(self) -> None:
        """What came with the header, once it is wanted."""
        if self._rest and not self._paused and self.wrappedProtocol is not None:
            rest, self._rest = self._rest, b""
            self.wrappedProtocol.dataReceived(rest)

    def pauseProducing(self) -> None:
        """Hand nothing on, not even what came with the header."""
        self._paused = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Go on."""
        self._paused = False
        self._deliver()
        if not self._paused:
            self.transport.resumeProducing()

    def readConnectionLost(self) -> None:
        """The client sends no more."""
        self.wrappedProtocol.readConnectionLost()

    def writeConnectionLost(self) -> None:
        """The client reads no more."""
        self.wrappedProtocol.writeConnectionLost()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Told to the protocol behind, where there is one."""
        self._stop_waiting()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class ProxiedFactory(WrappingFactory[Proxied]):
    """Connections of `wrapped`, each with a PROXY header before it.

    TCP peers outside of the networks `trusted` are closed at once (CWE-290: anybody could say he
    comes from anywhere). What comes through a Unix socket is trusted: its mode says who may.
    """

    protocol = Proxied
    noisy = False

    def __init__(
        self, wrapped: IProtocolFactory, trusted: tuple[Network, ...], clock: IReactorTime
    ) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.trusted = trusted
        self.clock = clock

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """`None` for a peer that is no proxy of ours."""
        host = getattr(addr, "host", None)
        if host is not None and not is_in(normalised(host), self.trusted):
            log.warn("{peer} is not in --trusted-proxies: closed", peer=host)
            return None
        return self.protocol(self)

    def waiting(self) -> list[Proxied]:
        """The connections without a header as yet."""
        return [each for each in self.protocols if each.waits]


@implementer(IListeningPort)
class ProxiedPort:
    """The port of a `ProxiedFactory`."""

    def __init__(self, plain: Any, factory: ProxiedFactory) -> None:
        self.plain: Any = prompt(plain)
        self._factory = factory

    @property
    def socket(self) -> Any:
        """The listening socket, where there is one."""
        return getattr(self.plain, "socket", None)

    def fileno(self) -> int:
        """Of the listening socket."""
        return int(self.plain.fileno())

    def stopReading(self) -> None:
        """Let others accept."""
        self.plain.stopReading()

    def startListening(self) -> None:
        """As the plain port does."""
        self.plain.startListening()

    def getHost(self) -> IAddress:
        """Where it listens."""
        return cast(IAddress, self.plain.getHost())

    def stopListening(self) -> Deferred[None]:
        """Take no more connections. Fires when all that were taken have brought their headers.

        So that those clients are greeted as well. Who has brought none within `STOP_SECONDS` is
        closed.
        """
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        clock = self._factory.clock
        end = clock.seconds() + STOP_SECONDS
        await maybeDeferred(self.plain.stopListening)
        while waiting := self._factory.waiting():
            if clock.seconds() >= end:
                for each in waiting:
                    each.give_up()
                return
            await deferLater(clock, STOP_STEP)


@implementer(IStreamServerEndpoint)
class ProxiedEndpoint:
    """`plain`, with a PROXY header before all else."""

    def __init__(
        self, plain: IStreamServerEndpoint, trusted: tuple[Network, ...], clock: IReactorTime
    ) -> None:
        self.plain = plain
        self._trusted = trusted
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """As `plain` does."""
        proxied = ProxiedFactory(factory, self._trusted, self._clock)

        def with_headers(port: IListeningPort) -> IListeningPort:
            return cast(IListeningPort, ProxiedPort(port, proxied))

        listening = self.plain.listen(cast(IProtocolFactory, proxied))
        return listening.addCallback(with_headers)
