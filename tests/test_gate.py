"""The gate before the greeting: names, files, and what a refused connection gets."""

from __future__ import annotations

import contextlib
import socket
import ssl
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.names import client, common, dns
from twisted.names.error import DNSNameError, DNSServerError
from twisted.names.server import DNSServerFactory
from twisted.trial.unittest import SynchronousTestCase, TestCase

from popdrop import certs, listeners
from popdrop import factory as factory_module
from popdrop.errors import ConfigError
from popdrop.ops import names as names_module
from popdrop.ops.access import Unnamed
from popdrop.ops.gate import Gate
from popdrop.ops.names import AT_ONCE, KEPT_SECONDS, LIMIT, Names, hosts_names
from popdrop.values import PeerFacts
from tests.doubles import Server

POINTERS = {
    "7.2.0.192.in-addr.arpa": "mail.Example.org",
    "8.2.0.192.in-addr.arpa": "liar.example.org",
    "9.2.0.192.in-addr.arpa": "lost.example.org",
    "10.2.0.192.in-addr.arpa": "192.0.2.10",
    "7." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa": "six.example.org",
}
ADDRESSES = {
    "mail.example.org": ["198.51.100.1", "192.0.2.7"],
    "liar.example.org": ["198.51.100.1"],
    "six.example.org": ["2001:db8::7"],
}

POINTERS_BACK = {"mail.example.org": "192.0.2.7", "liar.example.org": "192.0.2.8"}


def answer(records: list[Any]) -> Any:
    return [dns.RRHeader("x", record.TYPE, payload=record) for record in records], [], []


class Resolver:
    """DNS without a network."""

    def __init__(self, held: bool = False) -> None:
        self.asked: list[str] = []
        self.held: list[Deferred[Any]] = []
        self.holds = held

    def lookupPointer(self, name: str) -> Deferred[Any]:
        self.asked.append(name)
        if self.holds:
            self.held.append(Deferred())
            return self.held[-1]
        if name not in POINTERS:
            return fail(DNSNameError())
        cname = dns.Record_CNAME("elsewhere.example.org")
        return succeed(answer([cname, dns.Record_PTR(POINTERS[name])]))

    def lookupAddress(self, name: str) -> Deferred[Any]:
        found = [a for a in ADDRESSES.get(name, []) if ":" not in a]
        return succeed(answer([dns.Record_A(a) for a in found])) if found else fail(DNSNameError())

    def lookupIPV6Address(self, name: str) -> Deferred[Any]:
        return succeed(answer([dns.Record_AAAA(a) for a in ADDRESSES[name] if ":" in a]))


class NamesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.resolver = Resolver()
        self.names = Names(self.clock, lambda: self.resolver)  # type: ignore[arg-type]

    def name(self, address: str) -> Any:
        return self.successResultOf(self.names.of(address))

    def test_verified(self) -> None:
        self.assertEqual(self.name("192.0.2.7"), "mail.example.org")
        self.assertEqual(self.name("2001:db8::7"), "six.example.org")

    def test_not_verified(self) -> None:
        for address in ("192.0.2.8", "192.0.2.9", "192.0.2.10"):
            self.assertIs(self.name(address), Unnamed.PARANOID, address)

    def test_none(self) -> None:
        self.assertIs(self.name("198.51.100.9"), Unnamed.UNKNOWN)

    def test_kept_for_a_while(self) -> None:
        self.name("192.0.2.7")
        self.clock.advance(KEPT_SECONDS - 0.1)
        self.name("192.0.2.7")
        self.assertEqual(len(self.resolver.asked), 1)
        self.clock.advance(0.2)
        self.name("192.0.2.7")
        self.assertEqual(len(self.resolver.asked), 2)

    def test_kept_number(self) -> None:
        self.patch(names_module, "KEPT", 2)
        for last in (7, 8, 9, 7):
            self.name(f"192.0.2.{last}")
        self.assertEqual(len(self.resolver.asked), 4)
        self.name("192.0.2.9")
        self.assertEqual(len(self.resolver.asked), 4)

    def test_time_limit(self) -> None:
        self.resolver.holds = True
        first, second = self.names.of("192.0.2.7"), self.names.of("192.0.2.7")
        self.clock.advance(LIMIT - 0.1)
        self.assertNoResult(first)
        self.clock.advance(0.2)
        self.assertIs(self.successResultOf(first), Unnamed.UNKNOWN)
        self.assertIs(self.successResultOf(second), Unnamed.UNKNOWN)
        self.assertEqual(len(self.resolver.asked), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_broken(self) -> None:
        self.patch(self.resolver, "lookupPointer", lambda name: fail(DNSServerError()))
        self.assertIs(self.name("192.0.2.7"), Unnamed.UNKNOWN)
        names = Names(self.clock, lambda: 1 / 0)  # type: ignore[arg-type]
        self.assertIs(self.successResultOf(names.of("192.0.2.7")), Unnamed.UNKNOWN)

    def test_crowd(self) -> None:
        self.resolver.holds = True
        waiting = [self.names.of(f"10.0.{n // 256}.{n % 256}") for n in range(AT_ONCE)]
        self.assertIs(self.name("192.0.2.7"), Unnamed.UNKNOWN)
        self.clock.advance(LIMIT)
        for each in waiting:
            self.successResultOf(each)
        self.resolver.holds = False
        self.assertEqual(self.name("192.0.2.7"), "mail.example.org")

    def test_one_goes(self) -> None:
        self.resolver.holds = True
        gone, stays = self.names.of("192.0.2.7"), self.names.of("192.0.2.7")
        gone.addErrback(lambda _: None)
        gone.cancel()
        self.resolver.held[0].callback(answer([dns.Record_PTR("mail.example.org")]))
        self.assertEqual(self.successResultOf(stays), "mail.example.org")

    def test_hosts(self) -> None:
        text = "127.0.0.1 localhost x\n#192.0.2.1 a\n::1 ip6-localhost # b\n127.0.0.1 y\n1.2.3.4\n"
        self.assertEqual(hosts_names(text), {"127.0.0.1": "localhost", "::1": "ip6-localhost"})
        self.names.hosts = hosts_names("192.0.2.7 here\n")
        self.assertEqual(self.name("192.0.2.7"), "here")
        self.assertEqual(self.resolver.asked, [])


class RealDNSTests(TestCase):
    """twisted.names' client and server, over UDP on loopback."""

    def authority(self) -> Any:
        authority: Any = common.ResolverBase()
        records = {
            b"7.2.0.192.in-addr.arpa": dns.Record_PTR("mail.example.org"),
            b"mail.example.org": dns.Record_A("192.0.2.7"),
            b"8.2.0.192.in-addr.arpa": dns.Record_PTR("mail.example.org"),
        }

        def lookup(name: bytes, cls: int, kind: int, timeout: object) -> Deferred[Any]:
            record = records.get(name.lower())
            if record is None or kind != record.TYPE:
                return fail(DNSNameError())
            return succeed(([dns.RRHeader(name, kind, payload=record)], [], []))

        authority._lookup = lookup
        return authority

    async def ask(self) -> None:
        from twisted.internet import reactor

        factory: Any = DNSServerFactory(clients=[self.authority()])  # type: ignore[no-untyped-call]
        protocol: Any = dns.DNSDatagramProtocol(factory)  # type: ignore[no-untyped-call]
        port = reactor.listenUDP(0, protocol, "127.0.0.1")  # type: ignore[attr-defined]
        resolver: Any = client.Resolver(servers=[("127.0.0.1", port.getHost().port)])  # type: ignore[no-untyped-call]
        names = Names(reactor, lambda: resolver)  # type: ignore[arg-type]
        try:
            self.assertEqual(await names.of("192.0.2.7"), "mail.example.org")
            self.assertIs(await names.of("192.0.2.8"), Unnamed.PARANOID)
            self.assertIs(await names.of("192.0.2.9"), Unnamed.UNKNOWN)
        finally:
            await port.stopListening()

    def test_asked(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.ask())


class GateCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.resolver = Resolver()
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.allow, self.deny, self.hosts = (self.folder / n for n in ("allow", "deny", "hosts"))

    def gate(self, allow: str = "", deny: str = "", **more: Any) -> Gate:
        self.allow.write_text(allow)
        self.deny.write_text(deny)
        return Gate(
            self.clock,  # type: ignore[arg-type]
            files=(str(self.allow), str(self.deny)),
            make_resolver=lambda: self.resolver,
            hosts=str(self.hosts),
            **more,
        )


class GateTests(GateCase):
    def test_networks_and_files(self) -> None:
        gate = self.gate(deny="popdrop: 192.0.2.7\n", allowed=(ip_network("192.0.2.0/24"),))
        for address, admitted in (("192.0.2.6", True), ("192.0.2.7", False), ("192.0.3.1", False)):
            self.assertIs(gate.admits(address), admitted, address)
        self.assertIs(gate.admits(None), False)

    def test_names(self) -> None:
        gate = self.gate("popdrop: .example.org 10.\n", "ALL: ALL\n")
        self.assertIs(gate.admits("10.0.0.1"), True)
        self.assertEqual(self.resolver.asked, [])
        for address, admitted in (("192.0.2.7", True), ("192.0.2.8", False), ("192.0.2.99", False)):
            waiting = gate.admits(address)
            assert isinstance(waiting, Deferred)
            self.assertIs(self.successResultOf(waiting), admitted, address)

    def test_no_files(self) -> None:
        gate = Gate(self.clock, files=("/nonexistent/a", "/nonexistent/d"))  # type: ignore[arg-type]
        self.assertIs(gate.admits("192.0.2.7"), True)

    def test_changed(self) -> None:
        gate = self.gate(deny="popdrop: 192.0.2.7\n")
        self.deny.write_text("popdrop: 192.0.2.77\n")
        self.assertIs(gate.admits("192.0.2.7"), False)
        gate.refresh()
        self.assertIs(gate.admits("192.0.2.7"), True)
        self.deny.unlink()
        gate.refresh()
        self.assertIs(gate.admits("192.0.2.77"), True)

    def test_hosts_changed(self) -> None:
        gate = self.gate(deny="popdrop: LOCAL\n")
        self.hosts.write_text("192.0.2.1 desk\n")
        gate.refresh()
        self.assertIs(self.successResultOf(gate.admits("192.0.2.1")), False)  # type: ignore[arg-type]

    def test_broken_change(self) -> None:
        gate = self.gate(deny="popdrop: 192.0.2.7\n")
        self.deny.write_text("# x\npopdrop: bob@host\n")
        lines = self.log_of(gate.refresh)
        self.assertEqual(len(lines), 1)
        self.assertIn(f"the old access rules stay: {self.deny} line 2: bob@host", lines[0])
        self.assertEqual(self.log_of(gate.refresh), [])
        self.assertIs(gate.admits("192.0.2.7"), False)

    def test_unreadable(self) -> None:
        self.gate()
        self.allow.unlink()
        self.allow.mkdir()
        with self.assertRaises(ConfigError) as caught:
            Gate(self.clock, files=(str(self.allow), str(self.deny)))  # type: ignore[arg-type]
        self.assertIn(str(self.allow), str(caught.exception))

    def test_warned(self) -> None:
        lines = self.log_of(lambda: self.gate(deny="popdrop: 192.0.2.7: spawn (x)\n"))
        self.assertEqual(len(lines), 1)
        self.assertIn(f"{self.deny} line 1: spawn", lines[0])

    def test_told(self) -> None:
        gate = self.gate(deny="popdrop: 192.0.2.7\n")
        lines = self.log_of(lambda: gate.admits("192.0.2.7"))
        self.assertEqual(lines, [f"192.0.2.7 refused by {self.deny} line 1"])

    def log_of(self, call: Any) -> list[str]:
        from twisted.logger import formatEvent, globalLogPublisher

        lines: list[str] = []

        def observer(event: Any) -> None:
            if str(event.get("log_namespace", "")).startswith("popdrop"):
                lines.append(formatEvent(event))

        globalLogPublisher.addObserver(observer)
        try:
            call()
        finally:
            globalLogPublisher.removeObserver(observer)
        return lines


class ConnectionTests(GateCase):
    """Through the protocol: nothing is said to whoever is refused."""

    def server(self, allow: str = "", deny: str = "", throttle: str = "off") -> Server:
        return Server(gate=self.gate(allow, deny), clock=self.clock, throttle=throttle)

    def test_refused_at_once(self) -> None:
        server = self.server(deny="popdrop: 192.0.2.7\n")
        self.assertIsNone(server.factory.buildProtocol(IPv4Address("TCP", "192.0.2.7", 1)))
        self.assertIsNone(server.factory.buildProtocol(IPv4Address("TCP", "::ffff:192.0.2.7", 1)))
        _, transport = server.connect("192.0.2.8")
        self.assertTrue(transport.value().startswith(b"+OK"))

    def test_name_admitted(self) -> None:
        self.resolver.holds = True
        server = self.server("popdrop: .example.org\n", "ALL: ALL\n")
        protocol, transport = server.connect("192.0.2.7")
        protocol.dataReceived(b"NOOP\r\nCAPA\r\n")
        self.assertEqual(transport.value(), b"")
        self.resolver.held[0].callback(answer([dns.Record_PTR("mail.example.org")]))
        said = transport.value()
        self.assertTrue(said.startswith(b"+OK"))
        self.assertIn(b"\r\n-ERR", said)
        self.assertTrue(said.endswith(b"\r\n.\r\n"))

    def test_name_refused(self) -> None:
        self.resolver.holds = True
        server = self.server("popdrop: .example.org\n", "ALL: ALL\n", "memory:per-address=1")
        protocol, transport = server.connect("192.0.2.8")
        self.resolver.held[0].callback(answer([dns.Record_PTR("liar.example.org")]))
        self.assertEqual((transport.value(), transport.disconnecting), (b"", True))
        protocol.connectionLost()
        self.assertEqual(server.records.records, [])
        # It has not stayed in the count.
        self.resolver.holds = False
        _, again = server.connect("192.0.2.8")
        self.assertEqual(again.value(), b"")
        self.assertTrue(again.disconnecting)

    def test_counted_while_asked(self) -> None:
        self.resolver.holds = True
        server = self.server("popdrop: .example.org\n", "ALL: ALL\n", "memory:per-address=1")
        first, _ = server.connect("192.0.2.7")
        _, second = server.connect("192.0.2.7")
        self.assertIn(b"too many connections", second.value())
        first.connectionLost()
        _, third = server.connect("192.0.2.7")
        self.assertFalse(third.disconnecting)

    def test_gone_while_asked(self) -> None:
        self.resolver.holds = True
        server = self.server("popdrop: .example.org\n")
        protocol, transport = server.connect("192.0.2.7")
        protocol.connectionLost()
        self.resolver.held[0].callback(answer([dns.Record_PTR("mail.example.org")]))
        self.assertEqual(transport.value(), b"")
        self.assertEqual(server.factory.protocols, set())

    def test_resolver_hangs(self) -> None:
        self.resolver.holds = True
        server = self.server(deny="popdrop: .example.org\n")
        _, transport = server.connect("192.0.2.7")
        self.clock.advance(LIMIT + 0.1)
        self.assertTrue(transport.value().startswith(b"+OK"))

    def test_tls(self) -> None:
        """The handshake waits, and a refused client gets none of it."""
        self.resolver.holds = True
        server = self.server("popdrop: .example.org\n", "ALL: ALL\n")
        server.factory.implicit_tls = True
        _, good = server.connect("192.0.2.7")
        _, bad = server.connect("192.0.2.8")
        self.assertEqual((good.producerState, bad.producerState), ("paused", "paused"))
        self.resolver.held[0].callback(answer([dns.Record_PTR("mail.example.org")]))
        self.resolver.held[1].callback(answer([dns.Record_PTR("liar.example.org")]))
        self.assertEqual(good.producerState, "producing")
        self.assertTrue(good.value().startswith(b"+OK"))
        self.assertEqual((bad.value(), bad.producerState), (b"", "paused"))
        self.assertTrue(bad.disconnected or bad.disconnecting)

    def test_behind_a_proxy(self) -> None:
        """The address is asked when it is known, before any command is answered."""
        server = self.server("popdrop: 10. .example.org\n", "ALL: ALL\n")
        server.factory.trusted_address = False
        for address, word, admitted in (
            ("10.0.0.1", b"\r\n.\r\n", True),
            ("192.0.2.7", b"\r\n.\r\n", True),
            ("192.0.2.8", b"", False),
        ):
            protocol, transport = server.connect(address)
            transport.clear()
            protocol.dataReceived(b"CAPA\r\n")
            self.assertEqual(transport.disconnecting, not admitted, address)
            self.assertTrue(transport.value().endswith(word))
            self.assertEqual(transport.value() != b"", admitted)
            protocol.connectionLost()


class TLSTests(GateCase, TestCase):
    """A real TLS client whose name comes late."""

    def hear(self, port: int) -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port), timeout=120) as raw:
            try:
                with context.wrap_socket(raw) as connection:
                    return connection.recv(3)
            except (ssl.SSLError, OSError) as error:
                return type(error).__name__.encode()

    async def late(self, pointer: str) -> bytes:
        from twisted.internet import reactor

        self.resolver.holds = True
        self.hosts.write_text("")
        server = Server(gate=self.gate("popdrop: .example.org\n", "ALL: ALL\n"), clock=self.clock)
        server.factory.implicit_tls = True
        pem = certs.self_made(str(self.folder), "localhost")
        listener = listeners.from_spec(
            reactor, f"tls:{pem}:0:interface=127.0.0.1", certs.Keyring(None)
        )
        port: Any = await listeners.listen(listener, server.factory)
        address = POINTERS_BACK[pointer]
        self.patch(factory_module, "peer_facts", lambda addr: PeerFacts(address))
        heard = deferToThread(self.hear, port.getHost().port)
        while not self.resolver.held:
            await deferLater(reactor, 0.01)  # type: ignore[arg-type]
        # What the client begins its handshake with stays unread.
        (protocol,) = server.factory.protocols
        waiting = protocol.transport.transport.socket
        while True:  # until trial's time limit
            await deferLater(reactor, 0.01)  # type: ignore[arg-type]
            with contextlib.suppress(BlockingIOError):
                self.assertEqual(waiting.recv(1, socket.MSG_PEEK), b"\x16")
                break
        for _ in range(3):
            await deferLater(reactor, 0)  # type: ignore[arg-type]
        self.assertEqual(waiting.recv(1, socket.MSG_PEEK), b"\x16")
        self.resolver.held[0].callback(answer([dns.Record_PTR(pointer)]))
        said = await heard
        await port.stopListening()
        while server.factory.protocols:
            await deferLater(reactor, 0.01)  # type: ignore[arg-type]
        return said

    async def both(self) -> None:
        self.assertEqual(await self.late("mail.example.org"), b"+OK")
        self.resolver.held.clear()
        self.assertNotEqual((await self.late("liar.example.org"))[:3], b"+OK")

    def test_late_names(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.both())
