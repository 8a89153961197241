"""The relay window in the reactor: logins that open it, and the MTA's questions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.interfaces import IRelayWindow
from popdrop.ops import maps, relay
from popdrop.ops.grants import Grant, Grants
from popdrop.options import Options
from popdrop.policy import Policy, networks
from popdrop.values import Account, PeerFacts, Scope
from tests import doubles
from tests.doubles import Server

PEER = IPv4Address("TCP", "127.0.0.1", 40000)


class Transport(doubles.Transport):
    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True


class Threads:
    """A pool whose work is done when the test says so."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.at_once = True

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        if self.at_once:
            return maybeDeferred(work, *args)
        done: Deferred[Any] = Deferred()
        self.work.append(lambda: maybeDeferred(work, *args).chainDeferred(done))
        return done

    def go(self) -> None:
        work, self.work = self.work, []
        for each in work:
            each()


class WindowCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder, 0o700)
        self.clock = Clock()
        self.clock.advance(1_000_000)
        self.threads = Threads()
        self.said: list[str] = []
        for name in ("warn", "error", "info"):
            self.patch(relay.log, name, lambda text, **f: self.said.append(text.format(**f)))
        self.patch(relay.Complaint, "say", lambda _, text, **f: self.said.append(text.format(**f)))

    def window(self, publish: Any = None, **words: Any) -> relay.RelayWindow:
        grants = Grants(self.folder, publish, self.clock.seconds)
        self.addCleanup(grants.close)
        pool: Any = self.threads
        return relay.RelayWindow(
            self.clock, pool, grants, 120.0, proxies=networks("", "203.0.113.0/24"), **words
        )


class LoginTests(WindowCase):
    """Through the protocol: when it is opened, and what the client sees of it."""

    def setUp(self) -> None:
        super().setUp()
        self.server = Server(policy=Policy(cleartext="always", hostname="mail.example.org"))
        self.relay = self.window()
        self.server.factory.relay = self.relay

    def login(self, peer: str = "192.0.2.7") -> Any:
        _, transport = self.server.connect(peer)
        protocol = transport.producer  # type: ignore[attr-defined]
        transport.clear()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        return protocol, transport

    def may(self, address: str) -> bool:
        return self.successResultOf(Deferred.fromCoroutine(self.relay.look(address.encode())))

    def test_interface(self) -> None:
        self.assertTrue(verifyObject(IRelayWindow, self.relay))

    def test_known_before_the_client_is_told(self) -> None:
        self.threads.at_once = False
        protocol, transport = self.login()
        self.assertTrue(transport.value().endswith(b"+OK Password required for bob.\r\n"))
        protocol.dataReceived(b"STAT\r\n")
        self.threads.go()
        self.threads.at_once = True
        self.assertTrue(transport.value().endswith(b"+OK 2 25\r\n"), transport.value())
        self.assertTrue(self.may("192.0.2.7"))
        self.assertFalse(self.may("192.0.2.8"))
        self.clock.advance(120)
        self.assertFalse(self.may("192.0.2.7"))

    def test_a_failed_login_opens_nothing(self) -> None:
        self.login()
        _, other = self.server.connect("192.0.2.9")
        other.producer.dataReceived(b"USER bob\r\nPASS wrong\r\n")  # type: ignore[attr-defined]
        _, held = self.server.connect("192.0.2.10")
        held.producer.dataReceived(b"USER bob\r\nPASS secret\r\n")  # type: ignore[attr-defined]
        self.assertIn(b"[IN-USE]", held.value())
        self.assertEqual([self.may(f"192.0.2.{n}") for n in (7, 9, 10)], [True, False, False])

    def test_a_read_only_login_opens_nothing(self) -> None:
        """Decision 28: the password of a program that only looks is no right to send mail."""
        account = Account(b"bob", app=Scope(read_only=True))
        self.server.checker.accounts[b"bob"] = account
        _, transport = self.login()
        self.assertIn(b"+OK bob has", transport.value())
        self.assertEqual(self.relay._grants.all() if os.listdir(self.folder) else [], [])

    def test_nobody_in_particular(self) -> None:
        for peer in ("127.0.0.1", "203.0.113.5"):
            _, transport = self.login(peer)
            self.assertIn(b"+OK bob has", transport.value())
            transport.producer.dataReceived(b"QUIT\r\n")
            self.assertFalse(os.listdir(self.folder))

    def test_a_broken_database_lets_clients_in_all_the_same(self) -> None:
        os.chmod(self.folder, 0o777)
        _, transport = self.login()
        self.assertIn(b"+OK bob has", transport.value())
        self.assertIn("group or others may write", self.said[0])
        failure = self.failureResultOf(Deferred.fromCoroutine(self.relay.look(b"192.0.2.7")))
        self.assertIsInstance(failure.value, TemporaryFailure)

    def test_a_client_that_goes_meanwhile(self) -> None:
        """It is logged as logged in and gone; its maildrop is free again."""
        self.threads.at_once = False
        protocol, _ = self.login()
        protocol.connectionLost(Failure(ConnectionDone()))
        self.threads.go()
        self.threads.at_once = True
        self.assertFalse(self.server.store.held)
        self.assertEqual([each.event for each in self.server.records.records], ["login", "end"])
        self.assertTrue(self.may("192.0.2.7"))

    def test_nothing_else_changes(self) -> None:
        """A-55: the same octets with and without, whatever is said."""
        words = "CAPA,USER bob,PASS secret,STAT,LIST,RETR 1,DELE 1,RSET,QUIT,"
        said = words.replace(",", "\r\n").encode()
        answers = []
        for window in (None, self.relay):
            self.server.factory.relay = window
            _, transport = self.server.connect("192.0.2.7")
            transport.clear()
            transport.producer.dataReceived(said)  # type: ignore[attr-defined]
            answers.append(transport.value())
        self.assertEqual(answers[0], answers[1])
        self.assertIn(b"signing off", answers[0])


class TogetherTests(WindowCase):
    def test_what_comes_meanwhile_is_written_together(self) -> None:
        window = self.window()
        written: list[list[str]] = []
        add = window._grants.add

        def counted(grants: list[Grant]) -> None:
            written.append([grant.client for grant in grants])
            add(grants)

        self.patch(window._grants, "add", counted)
        self.threads.at_once = False
        waits = [window.open_for(PeerFacts(f"192.0.2.{n}"), b"bob") for n in range(1, 6)]
        waits.append(window.open_for(PeerFacts("192.0.2.5"), b"alice"))
        self.threads.go()
        self.assertTrue(waits[0] is not None and waits[0].called)
        self.assertFalse(waits[1] is not None and waits[1].called)
        self.threads.go()
        self.assertTrue(all(each is not None and each.called for each in waits))
        self.assertEqual(
            written, [["192.0.2.1"], ["192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"]]
        )
        self.assertEqual(window._grants.all()[4].account, b"alice")

    def test_after_a_failure_the_next_are_written(self) -> None:
        window = self.window()
        os.chmod(self.folder, 0o777)
        first = window.open_for(PeerFacts("192.0.2.1"), b"bob")
        assert first is not None
        self.successResultOf(first)
        os.chmod(self.folder, 0o700)
        window.open_for(PeerFacts("192.0.2.2"), b"bob")
        self.assertEqual([grant.client for grant in window._grants.all()], ["192.0.2.2"])

    def test_expired_by_the_one_that_leads(self) -> None:
        told: list[list[str]] = []
        window = self.window(lambda grants: told.append([grant.client for grant in grants]))
        other = self.window(leads=False)
        window.start()
        other.start()
        self.assertEqual(told, [[]])  # a file of before the start is not trusted
        other.open_for(PeerFacts("192.0.2.1"), b"bob")
        self.clock.advance(119)
        self.assertEqual(told, [[]])
        self.clock.pump([relay.EXPIRE_SECONDS])
        self.assertEqual(told, [[], []])
        self.successResultOf(window.close_doors())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_the_file(self) -> None:
        """Written with each login; what cannot be written is said once, and done later."""
        path = os.path.join(self.folder, "out", "relay")
        window = self.window(relay.EximFile(path))
        for _ in range(2):
            window.open_for(PeerFacts("192.0.2.1"), b"bob")
        self.assertEqual(len(self.said), 1)
        self.assertIn("No such file or directory; name a file in a folder", self.said[0])
        self.assertEqual([grant.client for grant in window._grants.all()], ["192.0.2.1"])
        os.mkdir(os.path.dirname(path))
        window.open_for(PeerFacts("192.0.2.2"), b"bob")
        with open(path) as file:
            rows = file.read().splitlines()[1:]
        self.assertEqual(rows, ["192.0.2.1: 1000120", "192.0.2.2: 1000120"])
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o644)
        self.assertEqual(os.listdir(os.path.dirname(path)), ["relay"])


class TableCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.asked: list[bytes] = []
        self.answers: list[Deferred[bool]] = []
        self.known = {b"192.0.2.7", b"2001:db8::7", b"a b"}

    async def look(self, key: bytes) -> bool:
        self.asked.append(key)
        if self.answers:
            return await self.answers.pop(0)
        return key in self.known

    async def broken(self, key: bytes) -> bool:
        raise TemporaryFailure("out of order", "not for the wire")

    def connect(
        self, kind: type[maps.Socketmap] | type[maps.TcpTable], look: Any = None
    ) -> tuple[Any, Transport]:
        self.tables = maps.Tables(kind, look or self.look)
        protocol = self.tables.buildProtocol(PEER)
        self.patch(protocol, "callLater", Clock().callLater)
        transport = Transport()
        protocol.makeConnection(transport)
        return protocol, transport


class TableTests(TableCase):
    def test_socketmap(self) -> None:
        protocol, transport = self.connect(maps.Socketmap)
        for key, answer in (
            (b"192.0.2.7", b"5:OK OK,"),
            (b"2001:db8::7", b"5:OK OK,"),
            (b"192.0.2.8", b"9:NOTFOUND ,"),
            (b"", b"9:NOTFOUND ,"),
            (b"\xff\xfe", b"9:NOTFOUND ,"),
        ):
            request = b"popdrop " + key
            transport.clear()
            protocol.dataReceived(b"%d:%b," % (len(request), request))
            self.assertEqual(transport.value(), answer)
        transport.clear()
        protocol.dataReceived(b"7:popdrop,")
        self.assertEqual(transport.value()[3:8], b"PERM ")

    def test_tcp_table(self) -> None:
        protocol, transport = self.connect(maps.TcpTable)
        for request, answer in (
            (b"get 192.0.2.7", b"200 OK\n"),
            (b"get 192.0.2.8", b"500 not%20found\n"),
            (b"get a%20b", b"200 OK\n"),
            (b"get %32001%3adb8::7", b"200 OK\n"),
            (b"get \xff%fe%", b"500 not%20found\n"),
        ):
            transport.clear()
            protocol.dataReceived(request + b"\n")
            self.assertEqual(transport.value(), answer, request)
        for request in (b"put 192.0.2.9 OK", b"get", b"get ", b"", b"\xff\xff", b"GET 192.0.2.7"):
            transport.clear()
            protocol.dataReceived(request + b"\n")
            self.assertEqual(transport.value()[:4], b"400 ", request)
        self.assertFalse(transport.disconnecting)

    def test_one_octet_at_a_time(self) -> None:
        for kind, request, answer in (
            (maps.Socketmap, b"17:popdrop 192.0.2.7,", b"5:OK OK,"),
            (maps.TcpTable, b"get 192.0.2.7\n", b"200 OK\n"),
        ):
            protocol, transport = self.connect(kind)
            for octet in request:
                self.assertEqual(transport.value(), b"")
                protocol.dataReceived(bytes([octet]))
            self.assertEqual(transport.value(), answer)

    def test_trouble_is_no_answer(self) -> None:
        """Never yes, never no, and nothing of why."""
        protocol, transport = self.connect(maps.Socketmap, self.broken)
        protocol.dataReceived(b"17:popdrop 192.0.2.7,")
        self.assertEqual(transport.value(), b"20:TEMP try again later,")
        protocol, transport = self.connect(maps.TcpTable, self.broken)
        protocol.dataReceived(b"get 192.0.2.7\n")
        self.assertEqual(transport.value(), b"400 try%20again%20later\n")

    def test_answers_in_the_order_of_the_questions(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.TcpTable)
        protocol.dataReceived(b"get x\nget 192.0.2.7\nput\nget 192.0.2.8\n")
        self.assertEqual((transport.value(), self.asked), (b"", [b"x"]))
        slow.callback(False)
        codes = [line[:3] for line in transport.value().splitlines()]
        self.assertEqual(codes, [b"500", b"200", b"400", b"500"])

    def test_an_internal_error_closes(self) -> None:
        async def bad(key: bytes) -> bool:
            raise RuntimeError("not for the wire")

        protocol, transport = self.connect(maps.TcpTable, bad)
        protocol.dataReceived(b"get 192.0.2.7\n")
        self.assertEqual(transport.value(), b"")
        self.assertTrue(transport.aborted)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)


class BoundTests(TableCase):
    def test_long_requests_close(self) -> None:
        protocol, transport = self.connect(maps.Socketmap)
        protocol.dataReceived(b"99999:")
        self.assertTrue(transport.disconnecting)
        protocol, transport = self.connect(maps.TcpTable)
        protocol.dataReceived(b"g" * (maps.REQUEST_OCTETS + 1))
        self.assertTrue(transport.disconnecting)

    def test_read_no_faster_than_answered(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.TcpTable)
        protocol.dataReceived(b"get x\n" * (maps.WAITING // 2))
        self.assertEqual(transport.producerState, "producing")
        protocol.dataReceived(b"get x\n" * maps.WAITING)
        self.assertEqual(transport.producerState, "paused")
        slow.callback(False)
        self.assertEqual(transport.producerState, "producing")
        self.assertEqual(transport.value().count(b"500"), maps.WAITING * 3 // 2)

    def test_answers_that_nobody_reads(self) -> None:
        protocol, transport = self.connect(maps.TcpTable)
        protocol.pauseProducing()
        protocol.dataReceived(b"get 192.0.2.7\n" * 1000)
        self.assertEqual(transport.value(), b"200 OK\n")
        self.assertEqual(transport.producerState, "paused")
        protocol.resumeProducing()
        self.assertEqual(transport.value(), b"200 OK\n" * 1000)

    def test_gone_meanwhile(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.TcpTable)
        protocol.dataReceived(b"get x\nget 192.0.2.7\n")
        protocol.connectionLost(Failure(ConnectionDone()))
        slow.callback(True)
        self.assertEqual((transport.value(), self.asked), (b"", [b"x"]))
        self.assertEqual(self.tables.connections, set())

    def test_so_many_connections(self) -> None:
        self.patch(maps, "CONNECTIONS", 2)
        first, _ = self.connect(maps.TcpTable)
        second: Any = self.tables.buildProtocol(PEER)
        self.patch(second, "callLater", Clock().callLater)
        second.makeConnection(Transport())
        self.assertIsNone(self.tables.buildProtocol(PEER))
        first.connectionLost(Failure(ConnectionDone()))
        self.assertIsNotNone(self.tables.buildProtocol(PEER))

    def test_silence(self) -> None:
        clock = Clock()
        self.tables = maps.Tables(maps.Socketmap, self.look)
        protocol = self.tables.buildProtocol(PEER)
        self.patch(protocol, "callLater", clock.callLater)
        transport = Transport()
        protocol.makeConnection(transport)
        clock.advance(maps.IDLE_SECONDS - 1)
        protocol.dataReceived(b"17:popdrop 192.0.2.7,")
        clock.advance(maps.IDLE_SECONDS - 1)
        self.assertFalse(transport.aborted)
        clock.advance(1)
        self.assertTrue(transport.aborted)


class OptionTests(SynchronousTestCase):
    def refused(self, *words: str) -> str:
        options = Options()
        options.parseOptions(words)
        folder = self.mktemp()
        return str(
            self.assertRaises(
                ConfigError, relay.from_options, options, None, None, folder, (), True
            )
        )

    def test_refused(self) -> None:
        for text, word in (
            ("nonsense:x", "socketmap:unix:/run/popdrop/relay"),
            ("socketmap", "socketmap:unix:/run/popdrop/relay"),
            ("file:", "file:/run/popdrop/relay.exim"),
            ("socketmap:tcp:10110", ":interface=127.0.0.1"),
            ("socketmap:tcp:10110:interface=0.0.0.0", "others could reach it"),
            ("socketmap:tcp:10110:interface=192.0.2.1", "others could reach it"),
            ("socketmap:tcp:10110:interface=nonsense", "others could reach it"),
            ("tcp-table:tcp6:10110", ":interface=\\:\\:1"),
            ("tcp-table:tls:x.pem:10110", "use unix:PATH"),
            ("tcp-table:systemd:domain=INET:index=0", "use unix:PATH"),
            ("tcp-table:tcp:x:interface=127.0.0.1", "not a number"),
            ("tcp-table:", "socketmap:unix:/run/popdrop/relay"),
        ):
            said = self.refused("--relay", text)
            self.assertIn(f"--relay {text}", said)
            self.assertIn(word, said)
        said = self.refused("--relay", "file:a", "--relay", "file:b")
        self.assertIn("--relay file:b: there is a file already", said)
        said = self.refused("--relay", "socketmap:unix:a", "--listen", "stdio:")
        self.assertIn("--relay file:/run/popdrop/relay.exim", said)

    def test_words(self) -> None:
        for words in (
            ["--relay-minutes", "2"],
            ["--relay-ipv6", "64"],
            ["--relay", "file:a", "--relay-minutes", "0"],
            ["--relay", "file:a", "--relay-minutes", "1441"],
            ["--relay", "file:a", "--relay-minutes", "two"],
            ["--relay", "file:a", "--relay-ipv6", "48"],
        ):
            failure = self.assertRaises(SystemExit, Options().parseOptions, words)
            self.assertIn(words[-2], str(failure))
