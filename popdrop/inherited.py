"""The connection that inetd, tcpserver and systemd's `Accept=yes` hand on as standard input.

Where it is a TCP socket it becomes a connection like any other: with the client's own address, and
with STLS. Anything else, as the pipes of sslserver, is served as standard input and output.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final, cast

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IProtocolFactory, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from zope.interface import implementer

STANDARD_INPUT: Final = 0


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
