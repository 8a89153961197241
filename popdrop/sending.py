"""A transport of TCP that sends at once what the kernel takes at once."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.interfaces import IListeningPort
from twisted.internet.tcp import Port, Server

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


def prompt(port: IListeningPort) -> IListeningPort:
    """Have the connections that `port` will accept be of this kind, if it is a TCP port."""
    if isinstance(port, Port) and port.transport is Server:
        port.transport = PromptServer
    return port
