"""Sockets that another program has opened.

The connection that inetd, tcpserver and systemd's `Accept=yes` hand on as standard input: where it
is a TCP socket it becomes a connection like any other, with the client's own address, and with
STLS. Anything else, as the pipes of sslserver, is served as standard input and output.

And the Unix socket that systemd listens on, which has to outlive the server.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from typing import Any, Final, cast

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.internet.unix import Port
from twisted.logger import Logger
from zope.interface import implementer

from popdrop.values import normalised

log = Logger()

STANDARD_INPUT: Final = 0
BACKLOG: Final = 1024
"""Connections that may wait for `accept` (the kernel's `net.core.somaxconn` cuts it).

Twisted's 50 is too few when all clients come back at once, or wait for a server that starts anew.
"""


def family(number: int = STANDARD_INPUT) -> socket.AddressFamily | None:
    """The family of the TCP connection that the descriptor is, `None` if it is none."""
    try:
        duplicate = socket.socket(fileno=os.dup(number))
    except OSError:
        return None
    with duplicate:
        if duplicate.type != socket.SOCK_STREAM:
            return None
        try:
            duplicate.getpeername()
        except OSError:
            return None
        known = (socket.AF_INET, socket.AF_INET6)
        return socket.AddressFamily(duplicate.family) if duplicate.family in known else None


def is_local(number: int = STANDARD_INPUT) -> bool:
    """Whether only this machine can reach the socket that the descriptor is; pipes count."""
    try:
        duplicate = socket.socket(fileno=os.dup(number))
    except OSError:
        return True
    with duplicate:
        name = duplicate.getsockname()
    if not isinstance(name, tuple):
        return True
    try:
        return ip_address(normalised(name[0])).is_loopback
    except ValueError:
        return False


class _Only(Factory):
    """Makes the protocol of the one connection. One that is refused ends the start."""

    noisy = False

    def __init__(self, inner: IProtocolFactory) -> None:
        self._inner = inner

    def buildProtocol(self, addr: IAddress | None) -> Any:
        made: Any = self._inner.buildProtocol(cast("IAddress", addr))
        if made is None:
            raise RuntimeError("this client may not connect")
        return made


@implementer(IStreamServerEndpoint)
class InheritedConnection:
    """One connection that is there already. Its deferred has the connection in place of a port."""

    def __init__(self, reactor: object, of: socket.AddressFamily) -> None:
        self._reactor: Any = reactor
        self._family = of

    def listen(self, factory: IProtocolFactory) -> Deferred[Any]:
        """Serve it, by a duplicate of the descriptor."""
        return defer.execute(self._listen, factory)

    def _listen(self, factory: IProtocolFactory) -> Any:
        only = _Only(factory)
        made = self._reactor.adoptStreamConnection(STANDARD_INPUT, self._family, only)
        # Nothing else may read from the client, or write to it: a warning of Python's, say.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (STANDARD_INPUT, 1):
            os.dup2(nowhere, number)
        os.close(nowhere)
        return made


class _AdoptedPort(Port):
    """A Unix socket of systemd's, whose path, mode and life are systemd's.

    Twisted takes it for one of its own: it would let everybody write to it, and at the end shut
    it down and take its path away, so that no server after this one could be reached.
    """

    _shouldShutdown = False

    def __init__(self, path: bytes, factory: IProtocolFactory, reactor: object) -> None:
        super().__init__(path, factory, BACKLOG, reactor=reactor)
        # A name that is not in the file system has neither mode nor path.
        self._bindPath = b"\0" + self._bindPath

    def _logConnectionLostMsg(self) -> None:
        # Twisted's line would hold that octet, and grep(1) take the log for no text.
        log.info("(UNIX Port {path} Closed)", path=os.fsdecode(self._bindPath[1:]))


@implementer(IStreamServerEndpoint)
class AdoptedUnixSocket:
    """The listening Unix socket `number`, which is this endpoint's from now on."""

    def __init__(self, reactor: object, number: int) -> None:
        self._reactor = reactor
        self._number = number

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Serve it. Once."""
        return defer.execute(self._listen, factory)

    def _listen(self, factory: IProtocolFactory) -> IListeningPort:
        os.set_blocking(self._number, False)
        port: Any = _AdoptedPort._fromListeningDescriptor(  # type: ignore[no-untyped-call]
            self._reactor, self._number, factory
        )
        os.close(self._number)
        port.startListening()
        return cast("IListeningPort", port)
