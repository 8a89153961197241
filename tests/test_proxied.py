"""PROXY headers: what is read from them, and what is refused. HAProxy itself: end_to_end."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from popdrop.proxied import (
    HEADER_SECONDS,
    STOP_SECONDS,
    BadHeader,
    ProxiedFactory,
    ProxiedPort,
    read_header,
)

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
"""As the specification prints it (section 2.2)."""
FOUR = IPv4Address("TCP", "192.0.2.7", 40112), IPv4Address("TCP", "198.51.100.1", 995)
SIX = IPv6Address("TCP", "2001:db8::7", 40112), IPv6Address("TCP", "2001:db8::1", 110)


def second(command: int, family: int, rest: bytes) -> bytes:
    """A header of version 2."""
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(rest)) + rest


def addresses(source: Any, destination: Any) -> bytes:
    family = socket.AF_INET if isinstance(source, IPv4Address) else socket.AF_INET6
    packed = socket.inet_pton(family, source.host) + socket.inet_pton(family, destination.host)
    return packed + struct.pack("!HH", source.port, destination.port)


GOOD = (
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 40112 995\r\n", FOUR),
    (b"PROXY TCP6 2001:db8::7 2001:DB8:0::1 40112 110\r\n", SIX),
    (b"PROXY UNKNOWN\r\n", (None, None)),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", (None, None)),
    (second(0x21, 0x11, addresses(*FOUR)), FOUR),
    (second(0x21, 0x21, addresses(*SIX)), SIX),
    (second(0x21, 0x11, addresses(*FOUR) + b"\x04\x00\x01x"), FOUR),  # a TLV behind
    (second(0x20, 0x00, b""), (None, None)),  # LOCAL
    (second(0x20, 0x11, addresses(*FOUR)), (None, None)),
    (second(0x21, 0x00, b"whatever"), (None, None)),  # UNSPEC
    (second(0x21, 0x31, bytes(216)), (None, None)),  # a Unix socket
)

BAD = (
    b"USER bob\r\n",
    b"proxy TCP4 192.0.2.7 198.51.100.1 40112 995\r\n",
    b"PROXY\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 40112\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 40112 995 1\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 40112 65536\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 +1 995\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 1_0 995\r\n",
    b"PROXY TCP4 192.0.2.777 198.51.100.1 40112 995\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 40112 110\r\n",
    b"PROXY TCP6 192.0.2.7 198.51.100.1 40112 995\r\n",
    b"PROXY TCP6 fe80::1%eth0 2001:db8::1 40112 110\r\n",
    b"PROXY TCP5 192.0.2.7 198.51.100.1 40112 995\r\n",
    b"PROXY TCP4 mail.example.org 198.51.100.1 40112 995\r\n",
    b"PROXY TCP4 \xd9\xa3 198.51.100.1 40112 995\r\n",
    b"PROXY UNKNOWN" + b" " * 100,
    second(0x31, 0x11, addresses(*FOUR)),  # version 3
    second(0x22, 0x11, addresses(*FOUR)),  # no such command
    second(0x21, 0x12, addresses(*FOUR)),  # datagrams
    second(0x21, 0x41, addresses(*FOUR)),
    second(0x21, 0x11, addresses(*FOUR)[:-1]),
    second(0x21, 0x21, addresses(*FOUR)),
)


class HeaderTests(SynchronousTestCase):
    def test_good(self) -> None:
        for octets, wanted in GOOD:
            for rest in (b"", b"USER bob\r\n", b"\r\n", b"\x16\x03\x01"):
                found = read_header(octets + rest)
                assert found is not None, octets
                self.assertEqual((found.source, found.destination), wanted, octets)
                self.assertEqual(found.size, len(octets))

    def test_in_pieces(self) -> None:
        """Of every header every beginning is one."""
        for octets, _ in GOOD:
            for size in range(1, len(octets)):
                self.assertIsNone(read_header(octets[:size]), octets[:size])

    def test_bad(self) -> None:
        for octets in BAD:
            self.assertRaises(BadHeader, read_header, octets)

    @settings(deadline=None, derandomize=True)
    @given(st.sampled_from([octets for octets, _ in GOOD]), st.data())
    def test_nothing_else_is_raised(self, octets: bytes, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(octets) - 1))
        changed = octets[:at] + data.draw(st.binary(max_size=3)) + octets[at + 1 :]
        try:
            found = read_header(changed)
        except BadHeader:
            return
        if found is not None:
            self.assertLessEqual(found.size, len(changed))


@implementer(IHalfCloseableProtocol)
class Inner(Protocol):
    def __init__(self, seen: list[object]) -> None:
        self.seen = seen

    def connectionMade(self) -> None:
        self.seen.append(self.transport.getPeer())
        self.transport.write(b"+OK\r\n")

    def dataReceived(self, data: bytes) -> None:
        self.seen.append(data)

    def readConnectionLost(self) -> None:
        self.seen.append("half")

    def writeConnectionLost(self) -> None:
        self.seen.append("deaf")

    def connectionLost(self, reason: Any = None) -> None:
        self.seen.append("lost")


class _Plain:
    """A port that stops at once."""

    stopped = False

    def stopListening(self) -> None:
        self.stopped = True


class ConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.seen: list[Any] = []
        self.clock = Clock()
        inner = Factory()
        inner.buildProtocol = self.build  # type: ignore[method-assign]
        self.refused = False
        self.factory = ProxiedFactory(inner, (ip_network("127.0.0.0/8"),), self.clock)

    def build(self, peer: Any) -> Inner | None:
        self.seen.append(peer)
        return None if self.refused else Inner(self.seen)

    def connect(self) -> tuple[Any, StringTransport]:
        proxy = IPv4Address("TCP", "127.0.0.1", 5)
        protocol = self.factory.buildProtocol(proxy)
        transport = StringTransport(peerAddress=proxy)
        protocol.makeConnection(transport)
        return protocol, transport

    def test_who_is_trusted(self) -> None:
        for host, trusted in (("127.0.0.9", True), ("192.0.2.1", False)):
            built = self.factory.buildProtocol(IPv4Address("TCP", host, 5))
            self.assertEqual(built is not None, trusted, host)
        for host, trusted in (("::ffff:127.0.0.1", True), ("::1", False)):
            built = self.factory.buildProtocol(IPv6Address("TCP", host, 5))
            self.assertEqual(built is not None, trusted, host)
        self.assertIsNotNone(self.factory.buildProtocol(UNIXAddress(None)))
        self.assertEqual(self.seen, [])

    def test_nothing_before_the_header(self) -> None:
        """Octet by octet; then the client's address is there from the first moment."""
        protocol, transport = self.connect()
        octets = GOOD[0][0]
        for number in range(len(octets)):
            self.assertEqual((self.seen, transport.value()), ([], b""))
            protocol.dataReceived(octets[number : number + 1])
        self.assertEqual(self.seen, [FOUR[0], FOUR[0]])
        self.assertEqual(transport.value(), b"+OK\r\n")
        self.assertEqual(protocol.getHost(), FOUR[1])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        protocol.dataReceived(b"CAPA\r\n")
        protocol.connectionLost(None)
        self.assertEqual(self.seen[2:], [b"CAPA\r\n", "lost"])

    def test_what_comes_with_the_header(self) -> None:
        protocol, _ = self.connect()
        protocol.dataReceived(GOOD[4][0] + b"CAPA\r\n")
        self.assertEqual(self.seen[2:], [b"CAPA\r\n"])

    def test_what_comes_with_the_header_can_wait(self) -> None:
        """As TLS does where the access rules ask for a name first."""
        protocol, transport = self.connect()
        made = Inner.connectionMade
        self.patch(Inner, "connectionMade", lambda i: (made(i), i.transport.pauseProducing()))
        protocol.dataReceived(GOOD[4][0] + b"CAPA\r\n")
        self.assertEqual((self.seen[2:], transport.producerState), ([], "paused"))
        protocol.resumeProducing()
        self.assertEqual((self.seen[2:], transport.producerState), ([b"CAPA\r\n"], "producing"))

    def test_half_closed(self) -> None:
        """The client's end of input reaches the protocol behind, once there is one."""
        protocol, _ = self.connect()
        self.assertFalse(IHalfCloseableProtocol.providedBy(protocol))
        protocol.dataReceived(GOOD[0][0])
        IHalfCloseableProtocol(protocol).readConnectionLost()
        IHalfCloseableProtocol(protocol).writeConnectionLost()
        self.assertEqual(self.seen[2:], ["half", "deaf"])

    def test_another_header_is_data(self) -> None:
        """Nobody behind the proxy can change who he is."""
        protocol, _ = self.connect()
        protocol.dataReceived(GOOD[0][0] + GOOD[1][0])
        self.assertEqual(protocol.getPeer(), FOUR[0])
        self.assertEqual(self.seen[2:], [GOOD[1][0]])

    def test_no_address(self) -> None:
        """A proxy's own check has none, not even the proxy's: it is not local."""
        protocol, _ = self.connect()
        protocol.dataReceived(GOOD[7][0])
        self.assertEqual(self.seen, [UNIXAddress(None)] * 2)

    def test_no_header(self) -> None:
        protocol, transport = self.connect()
        protocol.dataReceived(b"USER bob\r\n")
        protocol.dataReceived(GOOD[0][0])
        self.assertTrue(transport.disconnected)
        self.assertEqual((self.seen, transport.value()), ([], b""))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_header_that_never_comes(self) -> None:
        protocol, transport = self.connect()
        self.clock.advance(HEADER_SECONDS - 0.1)
        self.assertFalse(transport.disconnected)
        protocol.dataReceived(b"PROXY TCP4")
        self.clock.advance(0.1)
        self.assertTrue(transport.disconnected)
        protocol.connectionLost(None)
        self.assertEqual(self.seen, [])

    def test_gone_before_the_header(self) -> None:
        protocol, _ = self.connect()
        protocol.connectionLost(None)
        self.assertEqual((self.seen, self.clock.getDelayedCalls()), ([], []))

    def test_refused_behind(self) -> None:
        self.refused = True
        protocol, transport = self.connect()
        protocol.dataReceived(GOOD[0][0])
        self.assertTrue(transport.disconnected)

    def test_a_stop_waits_for_headers(self) -> None:
        """A second: who has connected before the stop is greeted, if his proxy does its part."""
        plain = _Plain()
        port = ProxiedPort(plain, self.factory)
        late, in_time = self.connect()
        silent, never = self.connect()
        silent.dataReceived(GOOD[0][0][:5])
        stopped = port.stopListening()
        self.assertEqual((plain.stopped, never.disconnected), (True, False))
        self.clock.advance(STOP_SECONDS / 2)
        late.dataReceived(GOOD[0][0])
        self.assertEqual(in_time.value(), b"+OK\r\n")
        self.assertNoResult(stopped)
        self.clock.pump([STOP_SECONDS / 2, 0])
        self.successResultOf(stopped)
        self.assertEqual((in_time.disconnected, never.disconnected), (False, True))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_stop_with_nobody_waiting_takes_no_time(self) -> None:
        served, _ = self.connect()
        served.dataReceived(GOOD[0][0])
        self.successResultOf(ProxiedPort(_Plain(), self.factory).stopListening())
