"""`--listen` strings, and listening on loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from ipaddress import ip_network
from unittest import mock

from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.python.util import sibpath
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from popdrop import listeners
from popdrop.certs import Keyring, self_made
from popdrop.errors import ConfigError
from popdrop.inherited import AdoptedUnixSocket
from popdrop.listeners import Listener, from_spec, listen, normalised, peer_facts
from tests.end_to_end.harness import DEADLINE


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


class SpecTests(SynchronousTestCase):
    def setUp(self) -> None:
        folder = self.mktemp()
        os.makedirs(folder)
        self.pem = self_made(folder, "mail.example")
        self.keyring = Keyring()
        self.reactor = MemoryReactorClock()

    def parse(self, text: str) -> Listener:
        listener = from_spec(self.reactor, text, self.keyring, (ip_network("127.0.0.0/8"),))
        verifyObject(IStreamServerEndpoint, listener.endpoint)
        self.assertEqual(listener.text, text)
        return listener

    def listened(self, text: str) -> tuple[int, int, str]:
        """(port, backlog, interface) that the reactor is asked for."""
        self.successResultOf(listen(self.parse(text), Factory()))
        port, _, backlog, interface = self.reactor.tcpServers.pop()
        return port, backlog, interface

    def complaint(self, text: str, *parts: str) -> None:
        """One line, with the option as given, what is wrong and an example."""
        with self.assertRaises(ConfigError) as caught:
            from_spec(self.reactor, text, self.keyring)
        line = str(caught.exception)
        self.assertNotIn("\n", line)
        self.assertTrue(line.startswith(f"--listen {text}: "), line)
        for part in parts:
            self.assertIn(part, line)

    def test_tcp(self) -> None:
        self.assertEqual(self.listened("tcp:110"), (110, listeners.BACKLOG, ""))
        self.assertEqual(
            self.listened("tcp:1110:interface=127.0.0.1:backlog=7"), (1110, 7, "127.0.0.1")
        )
        self.assertEqual(self.listened("tcp:port=1110:interface=\\:\\:1")[2], "::1")
        self.assertEqual(self.listened("TCP:110")[0], 110)

    def test_tcp6(self) -> None:
        self.assertEqual(
            self.listened("tcp6:1110:interface=\\:\\:1"), (1110, listeners.BACKLOG, "::1")
        )

    def test_facts(self) -> None:
        tls, secret = f"tls:{self.pem}:995", f"ssl:995:privateKey={self.pem}"
        for text, scheme, implicit, trusted in (
            ("tcp:110", "tcp", False, True),
            ("tcp6:110", "tcp6", False, True),
            (tls, "tls", True, True),
            (secret, "ssl", True, True),
            ("unix:/run/pop3:mode=660", "unix", False, False),
            ("stdio:", "stdio", False, False),
            ("stdio", "stdio", False, False),
            ("haproxy:tcp:1110:interface=127.0.0.1", "haproxy", False, True),
            (f"haproxy:{tls}", "haproxy", True, True),
            (f"HAProxy:{secret}", "haproxy", True, True),
            ("haproxy:unix:/run/pop3", "haproxy", False, True),
        ):
            found = self.parse(text)
            self.assertEqual(
                (found.scheme, found.implicit_tls, found.trusted_address),
                (scheme, implicit, trusted),
                text,
            )

    def test_systemd(self) -> None:
        with mock.patch(
            "twisted.internet.endpoints._SystemdParser._sddaemon",
            mock.Mock(inheritedDescriptors=lambda: [3]),
        ):
            self.assertTrue(self.parse("systemd:domain=INET6:index=0").trusted_address)
            self.assertTrue(self.parse("systemd:INET:index=0").trusted_address)
            self.assertFalse(self.parse("systemd:domain=UNIX:index=0").trusted_address)
        self.complaint("systemd:domain=INET6:index=7", "systemd:domain=INET6:index=0", "--fdname")
        self.complaint("systemd:", "for example")

    def test_haproxy_names_its_proxies(self) -> None:
        """But for a Unix socket, whose mode says who may."""
        for text in ("haproxy:tcp:1110", f"haproxy:tls:{self.pem}:995"):
            self.complaint(text, "name the proxies, as --trusted-proxies 127.0.0.1,::1")
        from_spec(self.reactor, "haproxy:unix:/run/pop3", self.keyring)

    def test_mode_of_a_unix_socket(self) -> None:
        """Behind `haproxy:` everybody who may connect can name any address as his own."""
        rows = (
            ("unix:PATH", 0o666),
            ("unix:PATH:mode=600", 0o600),
            ("haproxy:unix:PATH", 0o660),
            ("haproxy:unix:PATH:lockfile=0", 0o660),
            ("haproxy:unix:PATH:backlog=7", 0o660),
            ("haproxy:unix:address=PATH", 0o660),
            ("haproxy:unix:PATH:mode=666", 0o666),
            ("haproxy:unix:PATH:600", 0o600),
            ("haproxy:unix:PATH:600:7", 0o600),
        )
        for number, (text, mode) in enumerate(rows):
            path = f"mode-{number}"  # the kernel takes but 107 octets
            found = from_spec(reactor, text.replace("PATH", path), self.keyring)
            port = self.successResultOf(listeners.listen(found, Factory()))
            try:
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), mode, text)
            finally:
                port.stopListening()

    def test_haproxy_before_what_cannot_be(self) -> None:
        self.complaint("haproxy:", "for example haproxy:tcp")
        self.complaint("haproxy:tpc:110", "tpc is no known kind")
        self.complaint("haproxy:tcp:eleven", "port eleven")
        self.complaint("haproxy:stdio:", "stdio: cannot be behind a proxy")
        self.complaint("haproxy:haproxy:tcp:110", "haproxy: cannot be behind a proxy")

    def test_systemd_with_tls(self) -> None:
        with mock.patch(
            "twisted.internet.endpoints._SystemdParser._sddaemon",
            mock.Mock(inheritedDescriptors=lambda: [3]),
        ):
            found = self.parse(f"systemd:domain=INET6:index=0:tls={self.pem}")
            self.assertTrue(found.implicit_tls)
            self.assertIs(found.certificates, self.keyring.get(self.pem))
            self.complaint("systemd:INET:index=0:tls=/nowhere/at/all", "/nowhere/at/all")

    def test_one_source_for_all(self) -> None:
        first = self.parse(f"tls:{self.pem}:995")
        again = self.parse(f"tls:path={self.pem}:port=9995:interface=127.0.0.1")
        self.assertIs(first.certificates, again.certificates)
        self.assertIs(self.keyring.get(self.pem), first.certificates)

    def test_tls(self) -> None:
        text = f"tls:{self.pem}:9995:interface=127.0.0.1:backlog=3"
        self.assertEqual(self.listened(text), (9995, 3, "127.0.0.1"))

    def test_ssl(self) -> None:
        text = f"ssl:995:privateKey={self.pem}:certKey={self.pem}:extraCertChain={self.pem}"
        self.assertEqual(self.listened(text), (995, listeners.BACKLOG, ""))

    def test_unknown(self) -> None:
        self.complaint("tpc:110", "tpc is no known kind", "tcp6", "haproxy", "systemd")
        self.complaint("110", "110 is no known kind")

    def test_ports(self) -> None:
        for port in ("65536", "-1", "+110", "1_0", "pop3", "", "1e3", "٣", "9" * 5000):
            self.complaint(f"tcp:{port}", "port", "tcp:1110:interface=127.0.0.1")
            self.complaint(f"tls:{self.pem}:{port}", "port", "tls:/etc/letsencrypt/live:995")
        self.complaint("tcp", "no port is named")
        self.complaint(f"tls:{self.pem}", "no port is named")
        self.complaint("tcp:110:backlog=many", "backlog many")

    def test_interfaces(self) -> None:
        self.complaint("tcp:110:interface=localhost", "interface=localhost is not an IP address")
        self.complaint("tcp6:110:interface=127.0.0.1", "is not an IPv6 address")
        self.complaint("tcp6:110:interface=::1", "a colon inside an argument is written \\:")

    def test_strange_words(self) -> None:
        self.complaint("tcp:110:intrface=127.0.0.1", "intrface= is unknown", "interface=")
        self.complaint("tcp:110:111", "a colon too many")
        self.complaint("ssl:995:privateKey=x:sslmethod=SSLv3_METHOD", "sslmethod= is unknown")

    def test_certificates(self) -> None:
        self.complaint("tls:/nowhere/at/all:995", "/nowhere/at/all", "name an existing one")
        self.complaint("tls:", "no certificate is named")
        self.complaint("ssl:995", "privateKey= is missing")
        self.complaint("ssl:995:privateKey=/nowhere/key.pem", "/nowhere/key.pem")

    def test_no_words_at_all(self) -> None:
        for text in ("", ":", "tcp:110:\\", "tcp=110"):
            with self.assertRaises(ConfigError) as caught:
                from_spec(self.reactor, text, self.keyring)
            self.assertIn("for example tcp:110", str(caught.exception))

    def test_no_reactor_is_imported(self) -> None:
        code = "import sys, popdrop.listeners; sys.exit('twisted.internet.reactor' in sys.modules)"
        root = os.path.dirname(os.path.dirname(sibpath(listeners.__file__, "popdrop")))
        done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
        self.assertEqual(done.returncode, 0)


class ErrorTests(SynchronousTestCase):
    def failing(self, error: Exception) -> str:
        def refuse(*args, **kwargs):
            raise error

        memory = MemoryReactorClock()
        memory.listenTCP = refuse
        listener = from_spec(memory, "tcp:110", Keyring())
        failure = self.failureResultOf(listen(listener, Factory()), ConfigError)
        return str(failure.value)

    def test_each_has_a_remedy(self) -> None:
        for number, remedy in (
            (errno.EACCES, "CAP_NET_BIND_SERVICE"),
            (errno.EADDRINUSE, "ss -ltnp"),
            (errno.EADDRNOTAVAIL, "ip addr"),
            (errno.EAFNOSUPPORT, "interface=0.0.0.0"),
        ):
            error = OSError(number, os.strerror(number))
            line = self.failing(CannotListenError("", 110, error))
            self.assertTrue(line.startswith("--listen tcp:110: cannot listen: "), line)
            self.assertIn(os.strerror(number), line)
            self.assertIn(remedy, line)

    def test_a_mistake_of_ours_stays_one(self) -> None:
        memory = MemoryReactorClock()
        memory.listenTCP = mock.Mock(side_effect=RuntimeError)
        listener = from_spec(memory, "tcp:110", Keyring())
        self.failureResultOf(listen(listener, Factory()), RuntimeError)


class AddressTests(SynchronousTestCase):
    def test_normalised(self) -> None:
        for host, expected in (
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::FFFF:c000:0201", "192.0.2.1"),
            ("0:0:0:0:0:ffff:192.0.2.1", "192.0.2.1"),
            ("2001:DB8::0:1", "2001:db8::1"),
            ("fe80::1%eth0", "fe80::1"),
            ("::1", "::1"),
            ("::192.0.2.1", "::c000:201"),
            ("", ""),
            ("mail.example", "mail.example"),
            ("no:address", "no:address"),
        ):
            self.assertEqual(normalised(host), expected)

    def test_peer_facts(self) -> None:
        local = IPv4Address("TCP", "192.0.2.9", 110)
        facts = peer_facts(IPv6Address("TCP", "::ffff:192.0.2.1", 4711), local)
        self.assertEqual(
            (facts.address, facts.port, facts.local_port, facts.address_trusted),
            ("192.0.2.1", 4711, 110, True),
        )
        self.assertFalse(peer_facts(local, local, trusted=False).address_trusted)

    def test_peer_without_address(self) -> None:
        facts = peer_facts(UNIXAddress("/run/pop3"))
        self.assertEqual((facts.address, facts.port, facts.local_port), (None, None, None))
        self.assertFalse(facts.address_trusted)


class Greeter(Protocol):
    """Says who it sees, and closes."""

    def connectionMade(self) -> None:
        facts = peer_facts(self.transport.getPeer(), self.transport.getHost())
        self.transport.write(f"+OK {facts.address}\r\n".encode())
        self.transport.loseConnection()


def ask(host: str, port: int, context: ssl.SSLContext | None = None) -> str:
    """The first line from there, in a thread."""
    with socket.create_connection((host, port), DEADLINE) as raw:
        if context is None:
            return raw.makefile("r").readline()
        with context.wrap_socket(raw, server_hostname="localhost") as client:
            return client.makefile("r").readline()


class SocketTests(TestCase):
    def setUp(self) -> None:
        self.six = has_ipv6()
        folder = self.mktemp()
        os.makedirs(folder)
        self.pem = self_made(folder, "localhost")
        self.context = ssl.create_default_context(cafile=self.pem)

    @inlineCallbacks
    def listen(self, text: str, factory: object | None = None):
        made = factory or Factory.forProtocol(Greeter)
        port = yield listen(from_spec(reactor, text, Keyring()), made)
        self.addCleanup(port.stopListening)
        return port.getHost().port

    @inlineCallbacks
    def test_tcp_and_tcp6_go_together_in_either_order(self):
        for first, second in (("tcp", "tcp6"), ("tcp6", "tcp")) if self.six else ():
            for _ in range(20):
                port = yield self.listen(f"{first}:0")
                with contextlib.suppress(ConfigError):  # another process has it in that family
                    yield self.listen(f"{second}:{port}")
                    break
            else:
                self.fail("no port is free in both families")
            self.assertEqual((yield deferToThread(ask, "127.0.0.1", port)), "+OK 127.0.0.1\n")
            self.assertEqual((yield deferToThread(ask, "::1", port)), "+OK ::1\n")

    @inlineCallbacks
    def test_tcp6_alone_is_ipv6_alone(self):
        if not self.six:
            return
        port = yield self.listen("tcp6:0")
        with self.assertRaises(ConnectionRefusedError):
            yield deferToThread(ask, "127.0.0.1", port)

    @inlineCallbacks
    def test_tls_serves_both_families(self):
        port = yield self.listen(f"tls:{self.pem}:0")
        for host in ("127.0.0.1", "::1") if self.six else ("127.0.0.1",):
            answer = yield deferToThread(ask, host, port, self.context)
            self.assertEqual(answer, f"+OK {host}\n")

    @inlineCallbacks
    def test_ssl(self):
        port = yield self.listen(f"ssl:0:privateKey={self.pem}:interface=127.0.0.1")
        answer = yield deferToThread(ask, "127.0.0.1", port, self.context)
        self.assertEqual(answer, "+OK 127.0.0.1\n")

    def short_path(self) -> str:
        """A Unix socket's path has at most 107 octets (unix(7))."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        return os.path.join(folder, "s")

    @inlineCallbacks
    def test_a_path_in_use(self):
        """By another server, or by what is no socket."""
        path = self.short_path()
        port = yield listen(from_spec(reactor, f"unix:{path}", Keyring()), Factory())
        self.addCleanup(port.stopListening)
        with open(path + ".file", "x"):
            pass
        for taken in (path, path + ".file"):
            with self.assertRaises(ConfigError) as caught:
                yield listen(from_spec(reactor, f"unix:{taken}", Keyring()), Factory())
            self.assertIn("ss -lxp", str(caught.exception))

    @inlineCallbacks
    def test_the_log_stays_text(self):
        """At the end of a socket of systemd's, too: grep(1) stops where a NUL is."""
        path = self.short_path()
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)
            made.listen()
            adopted = AdoptedUnixSocket(reactor, os.dup(made.fileno()))
            port = yield adopted.listen(Factory())
            with capturedLogs() as events:
                yield port.stopListening()
        said = " ".join(formatEvent(event) for event in events)
        self.assertIn(f"(UNIX Port {path} Closed)", said)
        self.assertNotIn("\0", said)

    @inlineCallbacks
    def test_a_port_in_use(self):
        kind = "tcp6" if self.six else "tcp"
        port = yield self.listen(f"{kind}:0")
        with self.assertRaises(ConfigError) as caught:
            yield self.listen(f"{kind}:{port}")
        self.assertIn("ss -ltnp", str(caught.exception))

    @inlineCallbacks
    def test_a_factory_may_refuse_under_tls(self):
        class Refusing(Factory):
            def buildProtocol(self, addr):
                return None

        port = yield self.listen(f"tls:{self.pem}:0", Refusing())
        with self.assertRaises(OSError):
            yield deferToThread(ask, "127.0.0.1", port, self.context)
        self.assertEqual(self.flushLoggedErrors(), [])

    @inlineCallbacks
    def test_half_open_handshakes_take_nobodys_place(self):
        """CVE-2014-3430: 300 clients that never begin their handshake."""
        gone = Deferred()
        lost = 0

        class Counting(Greeter):
            def connectionLost(self, reason):
                nonlocal lost
                lost += 1
                if lost == 301:
                    gone.callback(None)

        port = yield self.listen(f"tls:{self.pem}:0", Factory.forProtocol(Counting))

        def knock() -> list[socket.socket]:
            return [socket.create_connection(("127.0.0.1", port), DEADLINE) for _ in range(300)]

        idle = yield deferToThread(knock)
        answer = yield deferToThread(ask, "127.0.0.1", port, self.context)
        self.assertEqual(answer, "+OK 127.0.0.1\n")
        for each in idle:
            each.close()
        yield gone
        self.assertEqual(self.flushLoggedErrors(), [])
