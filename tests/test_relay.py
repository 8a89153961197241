"""The relay window in the reactor: logins that open it, and the MTA's questions."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
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
from popdrop.ops.grants import Grant, Grants, Rules
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
        rules = Rules(120.0, proxies=networks("", "203.0.113.0/24"))
        grants = Grants(self.folder, rules, publish, self.clock.seconds)
        self.addCleanup(grants.close)
        pool: Any = self.threads
        return relay.RelayWindow(self.clock, pool, grants, **words)


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

    def test_after_a_failure_all_are_written(self) -> None:
        """The login does not wait for it; with the next login, or by themselves."""
        window = self.window()
        for number in (1, 3):
            os.chmod(self.folder, 0o777)
            first = window.open_for(PeerFacts(f"192.0.2.{number}"), b"bob")
            assert first is not None
            self.successResultOf(first)
            self.clock.advance(relay.AGAIN_SECONDS)
            os.chmod(self.folder, 0o700)
            if number == 1:
                window.open_for(PeerFacts("192.0.2.2"), b"bob")
            else:
                self.clock.advance(relay.AGAIN_SECONDS)
        found = [grant.client for grant in window._grants.all()]
        self.assertEqual(found, ["192.0.2.1", "192.0.2.2", "192.0.2.3"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_those_that_wait_are_bounded(self) -> None:
        """While a write takes its time, too; who logs in again is the last again."""
        self.patch(relay, "MOST_WAITING", 2)
        window = self.window()
        self.threads.at_once = False
        for number in (1, 2, 3, 2, 4):
            window.open_for(PeerFacts(f"192.0.2.{number}"), b"bob")
            self.assertLessEqual(len(window._next), 2)
        self.threads.go()
        self.threads.go()
        found = [grant.client for grant in window._grants.all()]
        self.assertEqual(found, ["192.0.2.1", "192.0.2.2", "192.0.2.4"])

    def test_logins_while_the_server_stops(self) -> None:
        """Those of the grace are remembered, too, and wait no longer than others."""
        window = self.window()
        self.threads.at_once = False
        first = window.open_for(PeerFacts("192.0.2.1"), b"bob")
        self.successResultOf(window.close_doors())
        second = window.open_for(PeerFacts("192.0.2.2"), b"bob")
        self.threads.go()
        self.threads.go()
        self.assertTrue(first is not None and first.called)
        self.assertTrue(second is not None and second.called)
        self.assertEqual(len(window._grants.all()), 2)

    def test_a_disk_that_does_not_answer(self) -> None:
        """Logins wait for it for a while, and then no more; it is done when it answers."""
        window = self.window()
        self.threads.at_once = False
        first = window.open_for(PeerFacts("192.0.2.1"), b"bob")
        assert first is not None
        self.clock.advance(relay.PATIENCE)
        self.successResultOf(first)
        self.clock.advance(0.1)
        self.assertIsNone(window.open_for(PeerFacts("192.0.2.2"), b"bob"))
        self.threads.go()
        self.threads.go()
        self.assertEqual(len(window._grants.all()), 2)

    def test_a_pool_that_makes_no_thread(self) -> None:
        window = self.window()

        def run(*words: object) -> None:
            raise RuntimeError("can't start new thread")

        patch = self.patch(self.threads, "run", run)
        first = window.open_for(PeerFacts("192.0.2.1"), b"bob")
        assert first is not None
        self.successResultOf(first)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        patch.restore()
        self.clock.advance(relay.AGAIN_SECONDS)
        self.assertEqual(len(window._grants.all()), 1)

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


class Turns(Clock):
    """Calls what is due by the turn, as the reactor does: what is new has to wait for the next."""

    def turn(self) -> None:
        for call in [each for each in self.calls if each.getTime() <= self.seconds()]:
            self.calls.remove(call)
            call.called = 1
            call.func(*call.args, **call.kw)


class StartTests(WindowCase):
    def test_a_full_disk(self) -> None:
        """Refuses nobody: it is said, and made good when there is room."""

        def full(*words: object) -> None:
            raise OSError(28, "No space left on device")

        path = os.path.join(self.folder, "relay")
        file = relay.EximFile(path)
        window = self.window(file, file=file)
        patch = self.patch(relay.wholefile, "put", full)
        window.start()
        self.assertIn("No space left on device; make room", self.said[0])
        patch.restore()
        window.open_for(PeerFacts("192.0.2.1"), b"bob")
        with open(path) as written:
            self.assertIn("192.0.2.1", written.read())

    def test_a_full_disk_under_the_database(self) -> None:
        def full(*words: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        window = self.window()
        self.patch(Grants, "_forget", full)
        window.start()
        self.assertIn("database or disk is full", self.said[0])

    def test_what_only_an_administrator_can_mend(self) -> None:
        file = relay.EximFile(os.path.join(self.folder, "none", "relay"))
        failure = self.assertRaises(ConfigError, self.window(file, file=file).start)
        self.assertIn("name a file in a folder", str(failure))
        os.chmod(self.folder, 0o777)
        failure = self.assertRaises(ConfigError, self.window().start)
        self.assertIn("--relay: ", str(failure))
        self.assertIn("chmod go-w", str(failure))


class TableCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
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

    def connect(self, kind: type[maps.Asked], look: Any = None) -> tuple[Any, Transport]:
        self.tables = maps.Tables(kind, look or self.look, self.clock)  # type: ignore[arg-type]
        return self.another()

    def another(self) -> tuple[Any, Transport]:
        protocol = self.tables.buildProtocol(PEER)
        transport = Transport()
        protocol.makeConnection(transport)
        return protocol, transport

    def say(self, protocol: Any, octets: bytes, turns: int = 10) -> bytes:
        """What is answered within so many turns of the reactor."""
        protocol.transport.clear()
        protocol.dataReceived(octets)
        self.clock.pump([0] * turns)
        value = protocol.transport.value()
        assert isinstance(value, bytes)
        return value


class TableTests(TableCase):
    def test_socketmap(self) -> None:
        protocol, transport = self.connect(maps.Socketmap)
        for key, answer in (
            (b"192.0.2.7", b"5:OK OK,"),
            (b"2001:db8::7", b"5:OK OK,"),
            (b"192.0.2.8", b"9:NOTFOUND ,"),
            (b"", b"9:NOTFOUND ,"),
            (b"x" * 1000, b"9:NOTFOUND ,"),
            (b"\xff\xfe", b"9:NOTFOUND ,"),
        ):
            request = b"popdrop " + key
            self.assertEqual(self.say(protocol, b"%d:%b," % (len(request), request)), answer)
        self.assertFalse(transport.disconnecting)

    def test_tcp_table(self) -> None:
        protocol, transport = self.connect(maps.TcpTable)
        for request, answer in (
            (b"get 192.0.2.7", b"200 OK\n"),
            (b"get 192.0.2.8", b"500 not%20found\n"),
            (b"get a%20b", b"200 OK\n"),
            (b"get %32001%3adb8::7", b"200 OK\n"),
            (b"get \xff%fe%", b"500 not%20found\n"),
        ):
            self.assertEqual(self.say(protocol, request + b"\n"), answer, request)
        self.assertFalse(transport.disconnecting)

    def test_what_postfix_would_not_say(self) -> None:
        """It is told so, and the connection ends; what was asked before is answered."""
        for kind, good, answer, bad in (
            (
                maps.Socketmap,
                b"17:popdrop 192.0.2.7,",
                b"5:OK OK,",
                (b"7:popdrop,", b"0:,", b":,", b"01:x,", b"x", b"9:popdrop x;", b"99999", b"1025:"),
            ),
            (
                maps.TcpTable,
                b"get 192.0.2.7\n",
                b"200 OK\n",
                (b"put 192.0.2.9 OK\n", b"get\n", b"get \n", b"\n", b"\xff\n", b"GET x\n"),
            ),
        ):
            for request in (*bad, b"g" * (maps.REQUEST_OCTETS + 1)):
                protocol, transport = self.connect(kind)
                said = self.say(protocol, good + request + good)
                self.assertEqual(said, answer + kind.BAD, request)
                self.assertTrue(transport.disconnecting)

    def test_lengths_are_true(self) -> None:
        for kind in (maps.Socketmap.FOUND, maps.Socketmap.NOT_FOUND, maps.Socketmap.NOT_NOW):
            length, _, rest = kind.partition(b":")
            self.assertEqual(int(length), len(rest) - 1, kind)
            self.assertTrue(rest.endswith(b","))
        length, _, rest = maps.Socketmap.BAD.partition(b":")
        self.assertEqual(int(length), len(rest) - 1)

    def test_one_octet_at_a_time(self) -> None:
        for kind, request, answer in (
            (maps.Socketmap, b"17:popdrop 192.0.2.7,", b"5:OK OK,"),
            (maps.TcpTable, b"get 192.0.2.7\n", b"200 OK\n"),
        ):
            protocol, _ = self.connect(kind)
            for octet in request[:-1]:
                self.assertEqual(self.say(protocol, bytes([octet])), b"")
            self.assertEqual(self.say(protocol, request[-1:]), answer)

    @given(st.lists(st.binary(max_size=20), max_size=5), st.integers(1, 30))
    def test_any_keys_in_any_pieces(self, keys: list[bytes], size: int) -> None:
        """What is asked is what was said, whatever the octets and wherever the reads end."""
        for kind in (maps.Socketmap, maps.TcpTable):
            self.asked.clear()
            socketmap = kind is maps.Socketmap
            keys = [key for key in keys if key or socketmap]
            requests = [
                b"%d:m %b," % (2 + len(key), key)
                if socketmap
                else b"get %b\n" % b"".join(b"%%%02x" % octet for octet in key)
                for key in keys
            ]
            whole = b"".join(requests)
            protocol, transport = self.connect(kind)
            for start in range(0, len(whole), size):
                protocol.dataReceived(whole[start : start + size])
            self.clock.pump([0] * 10)
            self.assertEqual(self.asked, keys)
            self.assertFalse(transport.disconnecting)

    def test_trouble_is_no_answer(self) -> None:
        """Never yes, never no, and nothing of why."""
        protocol, _ = self.connect(maps.Socketmap, self.broken)
        said = self.say(protocol, b"17:popdrop 192.0.2.7,")
        self.assertEqual(said, b"20:TEMP try again later,")
        protocol, _ = self.connect(maps.TcpTable, self.broken)
        self.assertEqual(self.say(protocol, b"get 192.0.2.7\n"), b"400 try%20again%20later\n")

    def test_answers_in_the_order_of_the_questions(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.TcpTable)
        self.assertEqual(self.say(protocol, b"get x\nget 192.0.2.7\nget 192.0.2.8\n"), b"")
        self.assertEqual(self.asked, [b"x"])
        slow.callback(False)
        self.clock.pump([0] * 10)
        codes = [line[:3] for line in transport.value().splitlines()]
        self.assertEqual(codes, [b"500", b"200", b"500"])

    def test_an_internal_error_closes(self) -> None:
        async def bad(key: bytes) -> bool:
            raise RuntimeError("not for the wire")

        protocol, transport = self.connect(maps.TcpTable, bad)
        self.assertEqual(self.say(protocol, b"get 192.0.2.7\n"), b"")
        self.assertTrue(transport.aborted)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)


class BoundTests(TableCase):
    def test_a_question_a_turn(self) -> None:
        """However many come at once: others have their turn between two of them."""
        self.clock = turns = Turns()
        first, transport = self.connect(maps.TcpTable)
        second, _ = self.another()
        first.dataReceived(b"get x\n" * 1000)
        second.dataReceived(b"get y\n")
        self.assertEqual(self.asked, [])
        turns.turn()
        self.assertEqual(self.asked, [b"x", b"y"])
        turns.turn()
        self.assertEqual(self.asked, [b"x", b"y", b"x"])
        self.assertEqual(transport.producerState, "paused")
        for _ in range(998):
            turns.turn()
        self.assertEqual(transport.producerState, "producing")
        self.assertEqual(transport.value().count(b"500"), 1000)

    def test_not_read_from_while_it_waits(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.Socketmap)
        self.say(protocol, b"3:m x,")
        self.assertEqual(transport.producerState, "paused")
        slow.callback(False)
        self.assertEqual(transport.producerState, "producing")

    def test_answers_that_nobody_reads(self) -> None:
        protocol, transport = self.connect(maps.TcpTable)
        protocol.pauseProducing()
        self.assertEqual(self.say(protocol, b"get 192.0.2.7\n" * 9), b"200 OK\n")
        self.assertEqual(transport.producerState, "paused")
        protocol.resumeProducing()
        self.clock.pump([0] * 10)
        self.assertEqual(transport.value(), b"200 OK\n" * 9)

    def test_gone_meanwhile(self) -> None:
        slow: Deferred[bool] = Deferred()
        self.answers = [slow]
        protocol, transport = self.connect(maps.TcpTable)
        self.say(protocol, b"get x\nget 192.0.2.7\n")
        protocol.connectionLost(Failure(ConnectionDone()))
        slow.callback(True)
        self.clock.pump([0] * 10)
        self.assertEqual((transport.value(), self.asked), (b"", [b"x"]))
        self.assertEqual(self.tables.connections, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_so_many_connections(self) -> None:
        self.patch(maps, "CONNECTIONS", 2)
        first, _ = self.connect(maps.TcpTable)
        self.another()
        self.assertIsNone(self.tables.buildProtocol(PEER))
        first.connectionLost(Failure(ConnectionDone()))
        self.assertIsNotNone(self.tables.buildProtocol(PEER))

    def test_silence(self) -> None:
        protocol, transport = self.connect(maps.Socketmap)
        self.clock.advance(maps.IDLE_SECONDS - 1)
        self.assertEqual(self.say(protocol, b"17:popdrop 192.0.2.7,"), b"5:OK OK,")
        self.clock.advance(maps.IDLE_SECONDS - 1)
        self.assertFalse(transport.aborted)
        self.clock.advance(1)
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
