"""Ports and transports that differ from Twisted's where that serves clients better.

A transport of TCP sends at once what the kernel takes at once; a Unix socket is closed well also
where its path cannot be removed.
"""

from __future__ import annotations

import os
from typing import Any, Final

from twisted.internet import unix
from twisted.internet.interfaces import IListeningPort
from twisted.internet.tcp import Port, Server
from twisted.logger import Logger
from twisted.python.failure import Failure

log = Logger()

BULK: Final = 16_384
"""Octets from which a write goes Twisted's way, which gathers more of them for one send(2).

A full record of TLS is longer; a connection that fetches mail in bulk writes many in a turn.
"""


class PromptServer(Server):
    """Twisted's, but with nothing waiting to be sent `write` is send(2), not a turn of the reactor.

    Twisted asks epoll_ctl(2) to be told that the socket takes octets, is told, sends, and asks no
    longer: a tenth of the processor time of a short session. What the kernel does not take goes
    Twisted's way, and so does an error: it is the reactor that ends connections.
    """

    def write(self, data: bytes) -> None:
        """As `ITransport.write`."""
        waits = self.dataBuffer or self._tempDataBuffer or self.disconnecting or self.TLS
        open_for_us = self.connected and not self._writeDisconnected
        if open_for_us and not waits and 0 < len(data) < BULK:
            sent: Any = self.writeSomeData(data)
            if sent == len(data):
                return
            if isinstance(sent, int) and sent > 0:
                data = data[sent:]
        super().write(data)  # type: ignore[no-untyped-call]


class _UnixPort(unix.Port):
    """Twisted's stays open, and who waits for its end is told an error, if its path must stay."""

    def connectionLost(self, reason: Failure) -> None:
        """As Twisted's; a socket in a folder that is not the server's is left behind there."""
        try:
            super().connectionLost(reason)  # type: ignore[no-untyped-call]
        except OSError as error:
            path = os.fsdecode(self._bindPath)
            log.info("{path}: is left behind: {why}", path=path, why=error.strerror)
            Port.connectionLost(self, reason)  # type: ignore[no-untyped-call]


def prompt(port: IListeningPort) -> IListeningPort:
    """Have `port`, and the connections that it will accept, be of these kinds."""
    if isinstance(port, Port) and port.transport is Server:
        port.transport = PromptServer
    if type(port) is unix.Port:
        # The reactor makes it, and takes no other kind.
        port.__class__ = _UnixPort
    return port
