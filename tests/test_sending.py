"""What `PromptServer` sends, and when, through real sockets."""

from __future__ import annotations

import socket
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.tcp import Server
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from popdrop.sending import PromptServer, prompt

reactor: Any = installed


@implementer(IPushProducer)
class Wire(Protocol):
    """Tells when the connection came and went, and whether the transport is full."""

    transport: Any
    full = False

    def __init__(self) -> None:
        self.made: Deferred[Wire] = Deferred()
        self.lost: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.made.callback(self)

    def connectionLost(self, reason: object = None) -> None:
        self.lost.callback(None)

    def pauseProducing(self) -> None:
        self.full = True

    def resumeProducing(self) -> None:
        self.full = False

    def stopProducing(self) -> None:
        self.full = True


class SendingTests(TestCase):
    async def connect(self) -> tuple[Wire, socket.socket]:
        wire = Wire()
        factory = Factory()
        factory.buildProtocol = lambda addr: wire  # type: ignore[method-assign]
        port = prompt(reactor.listenTCP(0, factory, interface="127.0.0.1"))
        self.addCleanup(port.stopListening)
        client = socket.create_connection(("127.0.0.1", port.getHost().port), timeout=60)
        self.addCleanup(client.close)
        await wire.made
        self.assertIs(type(wire.transport), PromptServer)
        return wire, client

    def all_of(self, client: socket.socket) -> bytes:
        octets = bytearray()
        while block := client.recv(1 << 20):
            octets += block
        return bytes(octets)

    async def test_at_once(self) -> None:
        """Before the reactor has its turn."""
        wire, client = await self.connect()
        wire.transport.write(b"+OK ready\r\n")
        self.assertEqual(client.recv(100), b"+OK ready\r\n")

    async def test_what_the_kernel_does_not_take(self) -> None:
        """More than fits, with small writes before and behind: all of it, in order."""
        wire, client = await self.connect()
        wire.transport.registerProducer(wire, True)
        blocks = [b"%d" % (number % 10) * (1 + number * 4099) for number in range(64)]
        for block in blocks:
            wire.transport.write(block)
        self.assertTrue(wire.full)
        wire.transport.unregisterProducer()
        wire.transport.write(b"last")
        wire.transport.loseConnection()
        self.assertEqual(await deferToThread(self.all_of, client), b"".join(blocks) + b"last")
        await wire.lost

    async def test_after_the_farewell(self) -> None:
        wire, client = await self.connect()
        wire.transport.write(b"one ")
        wire.transport.loseConnection()
        wire.transport.write(b"two")
        self.assertEqual(await deferToThread(self.all_of, client), b"one two")
        await wire.lost

    async def test_half_closed(self) -> None:
        """Nothing is sent behind the end of the output."""
        wire, client = await self.connect()
        wire.transport.write(b"one")
        wire.transport.loseWriteConnection()
        self.assertEqual(await deferToThread(self.all_of, client), b"one")
        wire.transport.write(b"two")
        client.close()
        await wire.lost

    async def test_a_client_that_is_gone(self) -> None:
        """The error is the reactor's to find; `write` itself closes nothing."""
        wire, client = await self.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        wire.transport.write(b"into the void")
        self.assertFalse(wire.lost.called)
        await wire.lost
        wire.transport.write(b"later")

    def test_others_are_left_as_they_are(self) -> None:
        class Own(Server):
            pass

        port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        port.transport = Own
        self.assertIs(prompt(port).transport, Own)  # type: ignore[attr-defined]


class Taking(PromptServer):
    """A kernel that takes as many octets as it is told to."""

    TLS = False

    def __init__(self, takes: list[int]) -> None:
        self.taken = b""
        self._takes = takes
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataBuffer: list[bytes] = []
        self._tempDataLen = 0
        self.connected = True
        self.asked = False

    def writeSomeData(self, data: bytes) -> Any:
        number = self._takes.pop(0) if self._takes else len(data)
        if number < 0:
            return CONNECTION_LOST
        self.taken += bytes(data[:number])
        return min(number, len(data))

    def startWriting(self) -> None:
        self.asked = True

    def stopWriting(self) -> None:
        self.asked = False


class OrderTests(SynchronousTestCase):
    @given(
        st.lists(st.one_of(st.none(), st.binary(max_size=9)), max_size=20),
        st.lists(st.integers(0, 9), max_size=20),
    )
    def test_each_octet_once_and_in_order(
        self, steps: list[bytes | None], takes: list[int]
    ) -> None:
        """`None` is a turn in which the reactor finds the socket writable."""
        server = Taking(takes)
        written = b""
        for step in steps:
            if step is None:
                if server.asked:
                    server.doWrite()
            else:
                server.write(step)
                written += step
        waiting = server.dataBuffer[server.offset :] + b"".join(server._tempDataBuffer)
        self.assertEqual(server.taken + waiting, written)
        self.assertEqual(server.asked, bool(waiting))

    def test_an_error(self) -> None:
        server = Taking([-1])
        server.write(b"lost")
        self.assertTrue(server.asked)
        self.assertEqual(server.doWrite(), None)
        self.assertEqual(server.taken, b"lost")
