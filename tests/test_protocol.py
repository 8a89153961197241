"""`popdrop.protocol`: the shell, over transports and stores in memory."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import TemporaryFailure
from popdrop.factory import LOGINS_A_TURN, TURN_SECONDS
from popdrop.policy import Folding, Policy, Timing
from popdrop.protocol import CLOSE_GRACE, STOP_HANDSHAKE_GRACE, UNREAD_LIMIT, POP3Protocol
from popdrop.session import BAD_BEFORE_LOGIN
from popdrop.values import Account, Owner, Scope, Secret
from tests.doubles import Server, Transport


def lose(protocol: POP3Protocol) -> None:
    protocol.connectionLost(Failure(ConnectionDone()))


def full_after_each_write(protocol: POP3Protocol, transport: Transport) -> None:
    """A client that reads slowly: the transport is full until `resumeProducing`."""
    original = transport.write

    def write(data: bytes) -> None:
        original(data)
        protocol.pauseProducing()

    transport.write = write  # type: ignore[method-assign]


class WritingTests(SynchronousTestCase):
    def test_one_write_per_read(self) -> None:
        """However many commands a read holds (performance: one write per reply and read)."""
        protocol, transport = Server().logged_in()
        protocol.dataReceived(b"NOOP\r\nSTAT\r\nLIST\r\nFOO\r\nRETR 1\r\nTOP 2 0\r\nNOOP\r\n" * 3)
        self.assertEqual(len(transport.writes), 1)
        self.assertEqual(transport.value().count(b"+OK"), 18)

    def test_pipelining_across_login_and_quit(self) -> None:
        server = Server()
        protocol, transport = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\nSTAT\r\nDELE 1\r\nQUIT\r\nNOOP\r\n")
        lines = transport.value().split(b"\r\n")
        self.assertTrue(lines[2].startswith(b"+OK bob has 2"))
        self.assertEqual(lines[3:5], [b"+OK 2 25", b"+OK message 1 deleted"])
        self.assertEqual(lines[5], b"+OK Pop server at mail.example.org signing off.")
        self.assertEqual(lines[6:], [b""])
        self.assertTrue(transport.disconnecting)
        self.assertEqual(server.store.messages, [b"B: 2\n\n.\n"])

    def test_commands_wait_for_a_slow_login(self) -> None:
        server = Server()
        server.checker.answer = Deferred()
        protocol, transport = server.connect()
        transport.clear()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\nSTAT\r\n")
        self.assertEqual(transport.value(), b"+OK Password required for bob.\r\n")
        server.checker.answer.callback(None)
        self.assertTrue(transport.value().endswith(b"+OK 2 25\r\n"))

    def test_a_client_that_does_not_read_is_not_read_from(self) -> None:
        server = Server()
        protocol, transport = server.logged_in()
        protocol.pauseProducing()
        protocol.dataReceived(b"NOOP\r\n" * 100)
        self.assertEqual(transport.producerState, "producing")
        protocol.dataReceived(b"NOOP\r\n" * UNREAD_LIMIT)
        self.assertEqual(transport.producerState, "paused")
        self.assertEqual(transport.value(), b"")
        protocol.resumeProducing()
        server.clock.advance(0)
        self.assertEqual(transport.value(), b"+OK\r\n" * (100 + UNREAD_LIMIT))
        self.assertEqual(transport.producerState, "producing")

    def test_unread_messages_wait_in_the_store(self) -> None:
        """Ten RETRs of 200 KB behind a transport that is full after the first."""
        server = Server([b"x" * 99 + b"\n"] * 1)
        server.store.messages = [(b"x" * 99 + b"\n") * 2000]
        protocol, transport = server.logged_in()
        original = transport.write

        def write(data: bytes) -> None:
            original(data)
            if len(transport.value()) > 65536:
                protocol.pauseProducing()

        transport.write = write  # type: ignore[method-assign]
        protocol.dataReceived(b"RETR 1\r\n" * 10)
        self.assertLess(len(transport.value()), 300_000)
        seen = 0
        for _ in range(20):
            seen += len(transport.value())
            transport.clear()
            protocol.resumeProducing()
        one = len(b"+OK 202000 octets\r\n") + 202_000 + 3
        self.assertEqual(seen, 10 * one)

    def test_cold_messages_stop_when_the_transport_is_full(self) -> None:
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, transport = server.logged_in()
        protocol.pauseProducing()
        protocol.resumeProducing()
        full_after_each_write(protocol, transport)
        protocol.dataReceived(b"RETR 1\r\nNOOP\r\n")
        self.assertEqual(len(transport.writes), 1)
        while not transport.value().endswith(b".\r\n+OK\r\n"):
            before = len(transport.writes)
            protocol.resumeProducing()
            self.assertEqual(len(transport.writes), before + 1)
        self.assertEqual(len(transport.value()), len(b"+OK 1001 octets\r\n") + 1001 + 3 + 5)


class TurnTests(SynchronousTestCase):
    """No client has the reactor for itself, whatever it asks for in one read."""

    def turns(self, server: Server, protocol: POP3Protocol, octets: bytes) -> int:
        """How many times others get their turn before all of it is answered."""
        pauses: list[float] = []
        call_later = server.clock.callLater

        def counting(delay: float, *args: Any, **kwargs: Any) -> Any:
            if not delay:
                pauses.append(delay)
            return call_later(delay, *args, **kwargs)

        self.patch(server.clock, "callLater", counting)
        protocol.dataReceived(octets)
        server.clock.advance(0)
        return len(pauses)

    def test_many_lists(self) -> None:
        """2000 LISTs of a maildrop whose messages are all deleted: little output, much work."""
        server = Server([b"x\n"] * 3000)
        protocol, transport = server.logged_in()
        protocol.dataReceived(b"".join(b"DELE %d\r\n" % (n + 1) for n in range(3000)))
        server.clock.advance(0)
        transport.clear()
        self.assertGreater(self.turns(server, protocol, b"LIST\r\n" * 2000 + b"NOOP\r\n"), 50)
        self.assertTrue(transport.value().endswith(b".\r\n+OK\r\n"))
        self.assertEqual(transport.value().count(b"+OK 0 messages"), 2000)

    def test_many_tops(self) -> None:
        server = Server([b"A: 1\n\n" + b"x" * 60_000 + b"\n"])
        protocol, transport = server.logged_in()
        self.assertGreater(self.turns(server, protocol, b"TOP 1 0\r\n" * 1000 + b"NOOP\r\n"), 3)
        self.assertTrue(transport.value().endswith(b".\r\n+OK\r\n"))

    def test_a_transport_that_is_never_full(self) -> None:
        """As TLS behaves once its peer has closed: it takes all and sends nothing."""
        server = Server([b"x" * 70 + b"\n"])
        server.store.hot = False
        server.store.block = 1
        protocol, transport = server.logged_in()
        self.assertGreater(self.turns(server, protocol, b"RETR 1\r\n" * 30 + b"NOOP\r\n"), 5)
        self.assertTrue(transport.value().endswith(b".\r\n+OK\r\n"))

    def test_meanwhile_input_is_bounded(self) -> None:
        server = Server([b"x\n"] * 3000)
        protocol, transport = server.logged_in()
        protocol.dataReceived(b"LIST\r\n" * 2000)
        protocol.dataReceived(b"NOOP\r\n" * UNREAD_LIMIT)
        self.assertEqual(transport.producerState, "paused")
        lose(protocol)
        self.assertEqual([call for call in server.clock.getDelayedCalls() if call.active()], [])

    def test_half_of_a_long_response_is_waited_for(self) -> None:
        """A SASL line may be longer than what may wait unread: it is read to its end."""
        server = Server()
        server.checker.answer = Deferred()
        protocol, transport = server.connect()
        response = b64encode(b"\0bob\0" + b"x" * 6000)
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        protocol.dataReceived(b"AUTH PLAIN\r\n" + response[:5000])
        self.assertEqual(transport.producerState, "paused")
        answer, server.checker.answer = server.checker.answer, None
        answer.callback(None)
        self.assertEqual(transport.producerState, "producing")
        protocol.dataReceived(response[5000:] + b"\r\n")
        self.assertEqual(transport.value().count(b"-ERR [AUTH]"), 2)


class ProxyTests(SynchronousTestCase):
    """Behind a proxy the client's address comes with the first octets."""

    def connect(self, server: Server) -> tuple[POP3Protocol, Transport]:
        server.factory.trusted_address = False
        return server.connect("192.0.2.99")

    def arrive(self, protocol: POP3Protocol, transport: Transport, address: str) -> None:
        transport.peerAddr = IPv4Address("TCP", address, 4000)
        protocol.dataReceived(b"CAPA\r\n")

    def test_limits_are_by_the_clients_address(self) -> None:
        server = Server(throttle="memory:per-address=2")
        for number in range(5):
            protocol, transport = self.connect(server)
            self.arrive(protocol, transport, f"198.51.100.{number}")
            self.assertIn(b"+OK Capa", transport.value())
        protocols = [self.connect(server) for _ in range(3)]
        for protocol, transport in protocols:
            self.arrive(protocol, transport, "203.0.113.1")
        self.assertIn(b"-ERR [SYS/TEMP] too many", protocols[-1][1].value())
        for protocol in list(server.factory.protocols):
            lose(protocol)
        protocol, transport = self.connect(server)
        self.arrive(protocol, transport, "203.0.113.1")
        self.assertIn(b"+OK Capa", transport.value())

    def test_an_address_that_is_none_is_not_logged(self) -> None:
        server = Server()
        protocol, transport = self.connect(server)
        transport.peerAddr = IPv4Address("TCP", "1.1.1.1\x1b[2J\nroot", 4000)
        protocol.dataReceived(b"USER bob\r\nAPOP bob x\r\n")
        self.assertIsNone(server.records.records[-1].peer.address)


class LoginTests(SynchronousTestCase):
    def test_gone_while_the_checker_works(self) -> None:
        """The maildrop is not opened, or let go of (twisted.mail: the lock leaked)."""
        server = Server()
        server.checker.answer = Deferred()
        protocol, _ = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        lose(protocol)
        if not server.checker.answer.called:
            server.checker.answer.callback(None)
        self.assertTrue(all(drop.released for drop in server.store.opened))
        self.assertFalse(server.store.held)
        self.assertEqual(server.records.records[-1].reason, "abandoned")

    def test_gone_after_login(self) -> None:
        server = Server()
        protocol, _ = server.logged_in()
        protocol.dataReceived(b"DELE 1\r\nDELE 2\r\nQUI")
        lose(protocol)
        self.assertEqual(server.store.opened[0].released, 1)
        self.assertEqual(len(server.store.messages), 2)
        self.assertEqual(server.records.records[-1].event, "end")
        self.assertEqual(server.records.records[-1].tally.left, 2)

    def test_in_use_after_the_right_password_only(self) -> None:
        server = Server()
        server.logged_in()
        protocol, transport = server.connect()
        transport.clear()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\nUSER bob\r\nPASS secret\r\n")
        lines = transport.value().split(b"\r\n")
        self.assertEqual(lines[1], b"-ERR [AUTH] Authentication failed.")
        self.assertEqual(lines[3], b"-ERR [IN-USE] maildrop is locked")

    def test_delay_and_floor(self) -> None:
        """A failure is answered a second after it came; a success at once (decision 24)."""
        server = Server(throttle="memory")
        protocol, transport = server.connect()
        transport.clear()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\nNOOP\r\n")
        self.assertNotIn(b"-ERR", transport.value())
        server.clock.advance(0.9)
        self.assertNotIn(b"-ERR", transport.value())
        server.clock.advance(0.2)
        self.assertIn(
            b"-ERR [AUTH] Authentication failed.\r\n-ERR log in first\r\n", transport.value()
        )
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        self.assertIn(b"+OK bob has", transport.value())

    def test_hanging_up_before_the_answer_gains_no_time(self) -> None:
        """A guesser who does not wait for `-ERR` keeps his place until it would have come."""
        for checked in (True, False):
            server = Server(throttle="memory:per-address=1")
            protocol, _ = server.connect()
            if not checked:
                server.checker.answer = Deferred()
            protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
            lose(protocol)
            self.assertIn(b"too many connections", server.connect()[1].value())
            server.clock.advance(0.9)
            self.assertIn(b"too many connections", server.connect()[1].value())
            server.clock.advance(0.2)
            self.assertNotIn(b"too many connections", server.connect()[1].value())

    def test_an_answered_failure_and_a_success_keep_no_place(self) -> None:
        server = Server(throttle="memory:per-address=1")
        protocol, transport = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        server.clock.advance(1)
        self.assertIn(b"-ERR [AUTH]", transport.value())
        lose(protocol)
        protocol, transport = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        self.assertIn(b"+OK bob has", transport.value())
        lose(protocol)
        protocol, _ = server.connect()
        server.store.open_answer = Deferred()  # the credentials are good, a lock is held
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        lose(protocol)
        self.assertIn(b"+OK Popdrop", server.connect()[1].value())

    def test_a_stop_waits_for_no_place(self) -> None:
        server = Server(throttle="memory:per-address=1")
        protocol, _ = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        lose(protocol)
        self.successResultOf(Deferred.fromCoroutine(server.factory.stop(0)))
        self.assertEqual(server.clock.getDelayedCalls(), [])
        peer = protocol.transport.getPeer()
        self.assertTrue(server.factory.throttle.admit(peer))

    def test_spellings_of_one_name_are_one_user_to_the_throttle(self) -> None:
        """SASLprep drops a soft hyphen: such names are the same account."""
        server = Server(throttle="memory", policy=Policy(folding=Folding(True, True)))
        asked = []
        real = server.factory.throttle.attempt

        def attempt(peer: IAddress, user: bytes, proof: bytes | None) -> Any:
            asked.append((user, proof))
            return real(peer, user, proof)

        server.factory.throttle.attempt = attempt  # type: ignore[method-assign]
        for name in ("bob", "b\u00adob", "BOB", "\uff22ob", "bob\uff20example.org"):
            protocol, _ = server.connect()
            protocol.dataReceived(b"USER " + name.encode() + b"\r\nPASS wrong\r\n")
        self.assertEqual(len(set(asked)), 1, asked)
        self.assertEqual(asked[0][0], b"bob")

    def test_unknown_user_and_wrong_password_read_alike(self) -> None:
        answers = []
        for user in (b"bob", b"nobody"):
            protocol, transport = Server().connect()
            transport.clear()
            protocol.dataReceived(b"AUTH PLAIN " + b64encode(b"\0" + user + b"\0wrong") + b"\r\n")
            answers.append(transport.value())
        self.assertEqual(answers[0], answers[1])

    def test_account_rules(self) -> None:
        """Disabled, under the uid floor, with an APOP secret: one answer, the reason in the log."""
        for account, reason in (
            (Account(b"bob", disabled=True), "disabled"),
            (Account(b"bob", uid=0), "uid-floor"),
            (Account(b"bob", uid=10), "uid-floor"),
            (Account(b"bob", apop_secret=Secret(b"secret")), "apop-account"),
        ):
            server = Server()
            server.checker.accounts[b"bob"] = account
            protocol, transport = server.connect()
            transport.clear()
            protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
            self.assertTrue(
                transport.value().endswith(b"\r\n-ERR [AUTH] Authentication failed.\r\n")
            )
            self.assertEqual(server.records.records[-1].reason, reason)
            self.assertEqual(server.store.opened, [])

    def test_read_only_logins_delete_nothing(self) -> None:
        for account in (
            Account(b"bob", scope=Scope(read_only=True)),
            Account(b"bob", app=Scope(read_only=True)),
        ):
            server = Server()
            server.checker.accounts[b"bob"] = account
            protocol, transport = server.logged_in()
            transport.clear()
            protocol.dataReceived(b"DELE 1\r\nSTAT\r\nRETR 1\r\nDELE 99\r\n")
            self.assertIn(b"-ERR [SYS/PERM] this login may not delete\r\n+OK ", transport.value())
            self.assertIn(b"-ERR no such message\r\n", transport.value())
            protocol.dataReceived(b"QUIT\r\n")
            self.assertEqual(server.store.messages, server.store.opened[0].messages)
            self.assertFalse(server.store.opened[0].seen)

    def test_names_are_folded_but_logged_as_given(self) -> None:
        server = Server(policy=Policy(cleartext="always", folding=Folding(True, True)))
        protocol, transport = server.connect()
        protocol.dataReceived(b"USER BOB@example.org\r\nPASS secret\r\n")
        self.assertIn(b"message(s)", transport.value())
        self.assertEqual(server.store.owners[0].user, "bob")
        self.assertEqual(server.records.records[-1].user, b"BOB@example.org")

    def test_domains_come_to_the_store(self) -> None:
        server = Server()
        server.checker.accounts[b"bob@example.org"] = Account(b"bob@example.org")
        protocol, _ = server.connect()
        protocol.dataReceived(b"USER bob@example.org\r\nPASS secret\r\n")
        self.assertEqual(server.store.owners, [Owner("bob@example.org", "example.org")])

    def test_apop_accounts_may_be_allowed(self) -> None:
        for policy in (Policy(cleartext="always"), Policy(apop_users="allow")):
            server = Server(policy=policy)
            server.checker.accounts[b"bob"] = Account(b"bob", apop_secret=Secret(b"secret"))
            server.logged_in()

    def test_unspeakable_errors(self) -> None:
        """The text of an exception never goes on the wire; the log has it under a number."""
        server = Server()
        server.store.open_answer = Deferred()
        protocol, transport = server.connect()
        transport.clear()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        server.store.open_answer.errback(PermissionError(13, "/var/mail/bob"))
        self.assertRegex(
            transport.value(), rb"-ERR \[SYS/TEMP\] internal error, see log [0-9a-f]{8}\r\n\Z"
        )
        self.assertNotIn(b"var/mail", transport.value())
        self.assertEqual(len(self.flushLoggedErrors(PermissionError)), 1)

    def test_bad_names_reach_no_store(self) -> None:
        for name in (b"../x", b"a/b", b".", b"..", b"x" * 300, b"bob.lock", b"-x"):
            server = Server()
            server.checker.accounts[name] = Account(name)
            protocol, transport = server.connect()
            protocol.dataReceived(
                b"AUTH PLAIN\r\n" + b64encode(b"\0" + name + b"\0secret") + b"\r\n"
            )
            self.assertIn(b"-ERR [AUTH] Authentication failed.", transport.value(), name)
            self.assertEqual(server.store.owners, [], name)


class CrowdTests(SynchronousTestCase):
    """Logins that come at once begin some in each turn of the reactor, in order."""

    def crowd(self, server: Server, count: int) -> list[tuple[POP3Protocol, Transport]]:
        server.checker.answer = Deferred()  # nobody gets in yet
        connections = [server.connect() for _ in range(count)]
        for protocol, _ in connections:
            protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        return connections

    def test_some_in_each_turn(self) -> None:
        server = Server()
        self.crowd(server, LOGINS_A_TURN)
        self.assertEqual(server.checker.asked, LOGINS_A_TURN)
        # A Clock runs in one step what a reactor does in as many turns as were asked for.
        later: list[Callable[[], None]] = []
        self.patch(server.clock, "callLater", lambda seconds, work: later.append(work))
        factory = server.factory
        waiting = [factory.turn(0.0) for _ in range(LOGINS_A_TURN + 3)]
        begun: list[int] = []
        for number, each in enumerate(waiting):
            assert each is not None
            each.addCallback(lambda _, number=number: begun.append(number))
        for expected in (0, LOGINS_A_TURN, LOGINS_A_TURN + 3):
            self.assertEqual(begun, list(range(expected)))
            for work in later[:]:
                later.remove(work)
                work()
        self.assertEqual(later, [])

    def test_those_who_are_logged_in_do_not_wait(self) -> None:
        server = Server()
        inside, transport = server.logged_in()
        self.crowd(server, LOGINS_A_TURN + 1)
        inside.dataReceived(b"NOOP\r\n")
        self.assertEqual(transport.value(), b"+OK\r\n")

    def test_who_has_gone_meanwhile_is_passed_over(self) -> None:
        server = Server()
        connections = self.crowd(server, LOGINS_A_TURN + 5)
        for protocol, _ in connections[LOGINS_A_TURN:-1]:
            protocol.connectionLost(Failure(ConnectionDone()))
        server.clock.advance(0)
        self.assertEqual(server.checker.asked, LOGINS_A_TURN + 1)

    def test_one_after_another_nobody_waits(self) -> None:
        server = Server()
        for _ in range(3 * LOGINS_A_TURN):
            protocol, transport = server.connect()
            protocol.dataReceived(b"USER bob\r\nPASS secret\r\nQUIT\r\n")
            self.assertIn(b"signing off", transport.value())
            server.clock.advance(2 * TURN_SECONDS / LOGINS_A_TURN)


class LimitTests(SynchronousTestCase):
    def test_login_deadline(self) -> None:
        """Sixty seconds from connect, whatever is sent meanwhile (slowloris)."""
        server = Server()
        protocol, transport = server.connect()
        for _ in range(59):
            server.clock.advance(1)
            protocol.dataReceived(b"N")
        self.assertFalse(transport.disconnecting)
        server.clock.advance(1.1)
        self.assertTrue(transport.disconnecting)

    def test_write_timeout(self) -> None:
        """From the last progress on, whenever the client has stopped reading."""
        for when in (0, 3, 70, 301, 599):
            server = Server(timing=Timing(write=100))
            protocol, transport = server.logged_in()
            for _ in range(when):
                server.clock.advance(1)
            protocol.dataReceived(b"NOOP\r\n")
            protocol.pauseProducing()
            server.clock.pump([1] * 99)
            self.assertFalse(transport.disconnected, when)
            server.clock.pump([1] * 2)
            self.assertTrue(transport.disconnected, when)

    def test_idle_timeout(self) -> None:
        """Ten minutes without a command; nothing is answered and nothing deleted (RFC 1939 3)."""
        server = Server()
        protocol, transport = server.logged_in()
        protocol.dataReceived(b"DELE 1\r\n")
        transport.clear()
        server.clock.advance(500)
        protocol.dataReceived(b"NOOP\r\n")
        server.clock.advance(500)
        self.assertFalse(transport.disconnecting)
        server.clock.advance(101)
        self.assertTrue(transport.disconnecting)
        self.assertEqual(transport.value(), b"+OK\r\n")
        lose(protocol)
        self.assertEqual(server.records.records[-1].reason, "idle-timeout")
        self.assertEqual(len(server.store.messages), 2)

    def test_connections_of_a_user(self) -> None:
        """Those that wait for the maildrop count; wrong passwords and other users do not."""
        server = Server(throttle="memory:per-user=2")
        server.checker.accounts[b"alice"] = Account(b"alice")
        server.store.open_answer = Deferred()
        login = b"USER bob\r\nPASS secret\r\n"
        waiting = [server.connect() for _ in range(3)]
        for protocol, _ in waiting:
            protocol.dataReceived(login)
        self.assertEqual(
            [transport.value().splitlines()[2:] for _, transport in waiting],
            [[], [], [b"-ERR [SYS/TEMP] too many connections of this user, try again later"]],
        )
        for protocol, _ in waiting:
            lose(protocol)
        server.store.open_answer = None
        for name, password, answer in (
            (b"alice", b"secret", b"+OK alice"),
            (b"bob", b"wrong", b"-ERR [AUTH]"),
            (b"bob", b"wrong", b"-ERR [AUTH]"),
        ):
            protocol, transport = server.connect()
            protocol.dataReceived(b"USER %s\r\nPASS %s\r\n" % (name, password))
            server.clock.pump([1.0] * 30)
            self.assertIn(b"\r\n" + answer, transport.value())
            lose(protocol)
        for _ in range(3):
            protocol, transport = server.connect()
            protocol.dataReceived(login)
            self.assertIn(b"+OK bob has", transport.value())
            lose(protocol)

    def test_a_client_that_stops_reading_is_cut_off(self) -> None:
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, transport = server.logged_in()
        protocol.pauseProducing()
        protocol.dataReceived(b"RETR 1\r\n")
        server.clock.advance(200)
        protocol.resumeProducing()
        protocol.pauseProducing()
        server.clock.advance(299)
        self.assertFalse(transport.disconnected)
        for _ in range(4):
            server.clock.advance(300)
        self.assertTrue(transport.disconnected)

    def test_a_closing_that_the_client_ignores_is_ended(self) -> None:
        """Soon under TLS, where the peer must agree; else when its time would have been up."""
        for tls, patience in ((True, CLOSE_GRACE), (False, 60)):
            server = Server()
            server.factory.implicit_tls = tls
            protocol, transport = server.connect()
            protocol.dataReceived(b"QUIT\r\n")
            self.assertTrue(transport.disconnecting)
            server.clock.advance(patience - 1)
            self.assertFalse(transport.disconnected)
            server.clock.advance(2)
            self.assertTrue(transport.disconnected)

    def test_bad_commands_close(self) -> None:
        protocol, transport = Server().connect()
        protocol.dataReceived(b"FOO\r\n" * (BAD_BEFORE_LOGIN + 5))
        self.assertTrue(transport.value().endswith(b"-ERR too many bad commands\r\n"))
        self.assertEqual(transport.value().count(b"-ERR"), BAD_BEFORE_LOGIN)
        self.assertTrue(transport.disconnecting)

    def test_endless_line(self) -> None:
        protocol, transport = Server().connect()
        for _ in range(100):
            protocol.dataReceived(b"A" * 1024)
        self.assertTrue(transport.disconnecting)
        self.assertTrue(transport.value().endswith(b"-ERR line too long\r\n"))

    def test_tls_on_a_plain_port(self) -> None:
        server = Server()
        protocol, transport = server.connect()
        transport.clear()
        protocol.dataReceived(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        self.assertTrue(transport.disconnecting)
        self.assertEqual(transport.value(), b"")

    def test_http(self) -> None:
        protocol, transport = Server().connect()
        transport.clear()
        protocol.dataReceived(b"POST / HTTP/1.1\r\nUSER bob\r\n")
        self.assertTrue(transport.disconnecting)
        self.assertEqual(transport.value(), b"")

    def test_too_many_connections_under_tls(self) -> None:
        """Nothing can be said before the handshake: closed at once, so that none pile up."""
        server = Server(throttle="memory:per-address=1")
        server.factory.implicit_tls = True
        server.connect("192.0.2.1")
        _, transport = server.connect("192.0.2.1")
        self.assertTrue(transport.disconnected)
        self.assertEqual(transport.value(), b"")

    def test_too_many_connections(self) -> None:
        server = Server(throttle="memory:per-address=2")
        connections = [server.connect("192.0.2.1") for _ in range(3)]
        self.assertTrue(connections[1][1].value().startswith(b"+OK"))
        turned_away = connections[2][1]
        self.assertTrue(turned_away.value().startswith(b"-ERR [SYS/TEMP] too many connections"))
        self.assertTrue(turned_away.disconnecting)
        for protocol, _ in connections:
            lose(protocol)
        _, transport = server.connect("192.0.2.1")
        self.assertTrue(transport.value().startswith(b"+OK"))


class IdentifyTests(SynchronousTestCase):
    def test_gone_meanwhile(self) -> None:
        """A client that leaves during UIDL is no internal error."""
        server = Server()
        protocol, _ = server.logged_in()

        async def identify() -> None:
            await Deferred()

        server.store.opened[0].identify = identify  # type: ignore[method-assign]
        protocol.dataReceived(b"UIDL\r\n")
        lose(protocol)
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(server.store.opened[0].released, 1)


class MeasureTests(SynchronousTestCase):
    """A maildrop of which only the sums are known at login."""

    COMMANDS = (
        (b"LIST 2", b"RETR 1", b"UIDL", b"QUIT"),
        (b"DELE 1", b"DELE 1", b"LIST", b"STAT", b"RETR 2", b"QUIT"),
        (b"RETR 2", b"TOP 1 0", b"RSET", b"DELE 2", b"QUIT"),
        (b"UIDL 1", b"LIST", b"DELE 1", b"UIDL", b"QUIT"),
        (b"STAT", b"RETR 9", b"NOOP", b"DELE x", b"LIST 1 2", b"QUIT"),
    )

    def promising(self) -> Server:
        server = Server()
        server.store.promises = True
        return server

    def test_nobody_can_tell(self) -> None:
        """Pipelined or not; answered at once, or later."""
        for commands in self.COMMANDS:
            plain, expected = Server().logged_in()
            plain.dataReceived(b"".join(each + b"\r\n" for each in commands))
            for together in (False, True):
                for late in (False, True):
                    with self.subTest(commands, together=together, late=late):
                        server = self.promising()
                        protocol, transport = server.logged_in()
                        answer: Deferred[None] = Deferred()
                        if late:
                            server.store.opened[0].measure_answers = [answer]
                        lines = [each + b"\r\n" for each in commands]
                        for octets in [b"".join(lines)] if together else lines:
                            protocol.dataReceived(octets)
                        if late and not answer.called:
                            answer.callback(None)
                        self.assertEqual(transport.value(), expected.value())
                        self.assertTrue(transport.disconnecting)

    def test_it_fails_and_may_be_asked_again(self) -> None:
        """As while a deliverer holds the locks: this command is refused, and no other."""
        server = self.promising()
        protocol, transport = server.logged_in()
        server.store.opened[0].measure_answers = [
            fail(TemporaryFailure("try again later")),
            fail(TemporaryFailure("try again later")),
            fail(RuntimeError("not for the wire")),
        ]
        protocol.dataReceived(b"DELE 1\r\nSTAT\r\nRETR 1\r\nLIST 1\r\n")
        lines = transport.value().split(b"\r\n")
        self.assertEqual(lines[:3], [b"-ERR [SYS/TEMP] try again later", b"+OK 2 25", lines[0]])
        self.assertRegex(lines[3], rb"^-ERR \[SYS/TEMP\] internal error, see log [0-9a-f]{8}$")
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        transport.clear()
        protocol.dataReceived(b"DELE 2\r\nLIST\r\nQUIT\r\n")
        octets = server.store.opened[0].whole.size(0)
        self.assertTrue(
            transport.value().startswith(
                b"+OK message 2 deleted\r\n+OK 1 messages (%d octets)\r\n1 %d\r\n.\r\n+OK"
                % (octets, octets)
            ),
            transport.value(),
        )
        self.assertEqual(len(server.store.messages), 1)

    def test_gone_meanwhile(self) -> None:
        """A client that leaves is no internal error, and what it sent behind is not done."""
        server = self.promising()
        protocol, _ = server.logged_in()
        answer: Deferred[None] = Deferred()
        server.store.opened[0].measure_answers = [answer]
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        lose(protocol)
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(server.store.opened[0].released, 1)
        self.assertEqual(len(server.store.messages), 2)

    def test_no_takeover_meanwhile(self) -> None:
        server = self.promising()
        server.factory.takeover = 30
        first, _ = server.logged_in()
        answer: Deferred[None] = Deferred()
        server.store.opened[0].measure_answers = [answer]
        first.dataReceived(b"LIST 1\r\n")
        server.clock.advance(31)
        second, transport = server.connect()
        second.dataReceived(b"USER bob\r\nPASS secret\r\n")
        self.assertIn(b"-ERR [IN-USE]", transport.value())
        self.assertEqual(server.store.opened[0].released, 0)


class FetchTests(SynchronousTestCase):
    def test_error_before_the_first_block(self) -> None:
        server = Server()
        server.store.hot = False
        protocol, transport = server.logged_in()
        server.store.opened[0].fail_reads_after = 0
        server.store.opened[0].failure = TemporaryFailure("message could not be read")
        protocol.dataReceived(b"RETR 1\r\nNOOP\r\n")
        self.assertEqual(transport.value(), b"-ERR [SYS/TEMP] message could not be read\r\n+OK\r\n")
        self.assertEqual(protocol._session.tally.retr, 0)

    def test_error_after_the_first_block(self) -> None:
        """The connection is aborted: never a false end of a message."""
        for failure in (OSError(5, "x"), TemporaryFailure("changed")):
            server = Server([b"x" * 999 + b"\n"])
            server.store.hot = False
            protocol, transport = server.logged_in()
            server.store.opened[0].fail_reads_after = 3
            server.store.opened[0].failure = failure
            protocol.dataReceived(b"RETR 1\r\n")
            self.assertTrue(transport.disconnected)
            self.assertNotIn(b"\r\n.\r\n", transport.value())

    def test_gone_in_the_middle_of_a_message(self) -> None:
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, _transport = server.logged_in()
        held: list[Deferred[None]] = []

        def hold() -> Deferred[None]:
            held.append(Deferred())
            return held[-1]

        server.store.opened[0].hold_reads = hold
        protocol.dataReceived(b"RETR 1\r\n")
        held[0].callback(None)
        lose(protocol)
        self.assertEqual(server.store.opened[0].released, 1)
        self.assertFalse(server.factory.protocols)

    def test_half_close_is_answered(self) -> None:
        """A client that has shut its sending side down gets all answers it asked for."""
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, transport = server.logged_in()
        held: list[Deferred[None]] = []

        def hold() -> Deferred[None]:
            held.append(Deferred())
            return held[-1]

        server.store.opened[0].hold_reads = hold
        protocol.dataReceived(b"RETR 1\r\nNOOP\r\n")
        protocol.readConnectionLost()
        while held and not held[-1].called:
            held[-1].callback(None)
        self.assertTrue(transport.value().endswith(b".\r\n+OK\r\n"))
        self.assertTrue(transport.disconnecting)
        self.assertEqual(len(server.store.messages), 1)

    def test_quit_then_half_close(self) -> None:
        server = Server()
        protocol, transport = server.logged_in()
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        protocol.readConnectionLost()
        self.assertEqual(len(server.store.messages), 1)
        self.assertTrue(transport.value().endswith(b"signing off.\r\n"))


class CommitTests(SynchronousTestCase):
    def test_failure(self) -> None:
        server = Server()
        protocol, transport = server.logged_in()
        server.store.opened[0].commit_answer = Deferred()
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        self.assertNotIn(b"signing", transport.value())
        server.store.opened[0].commit_answer.errback(TemporaryFailure("disk is full"))
        self.assertTrue(transport.value().endswith(b"-ERR [SYS/TEMP] disk is full\r\n"))
        self.assertTrue(transport.disconnecting)
        lose(protocol)
        record = server.records.records[-1]
        self.assertEqual(
            (record.reason, record.tally.deleted, record.tally.left), ("commit-failed", 0, 2)
        )
        self.assertEqual(server.store.opened[0].released, 1)

    def test_what_was_retrieved(self) -> None:
        """Told to a maildrop that wants it, also where nothing is deleted; else QUIT is quick."""
        for wants, seen in ((False, None), (True, {0})):
            server = Server()
            protocol, transport = server.logged_in()
            drop = server.store.opened[0]
            drop.wants_seen = wants
            protocol.dataReceived(b"RETR 1\r\nQUIT\r\n")
            self.assertTrue(transport.value().endswith(b"signing off.\r\n"))
            self.assertEqual((drop.seen, drop.released), (seen, 1))
        for lost in (b"RETR 1\r\n", b"RETR 1\r\nQUI"):
            server = Server()
            protocol, transport = server.logged_in()
            drop = server.store.opened[0]
            drop.wants_seen = True
            protocol.dataReceived(lost)
            lose(protocol)
            self.assertEqual((drop.seen, drop.released), (None, 1))

    def test_client_gone_meanwhile(self) -> None:
        """A commit once begun runs to its end, then the maildrop is let go."""
        server = Server()
        protocol, _ = server.logged_in()
        drop = server.store.opened[0]
        drop.commit_answer = Deferred()
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        lose(protocol)
        self.assertEqual(drop.released, 0)
        self.assertTrue(server.factory.protocols)
        drop.commit_answer.callback(None)
        self.assertEqual(drop.released, 1)
        self.assertEqual(server.store.messages, [b"B: 2\n\n.\n"])
        self.assertFalse(server.factory.protocols)
        record = server.records.records[-1]
        self.assertEqual((record.event, record.reason, record.tally.deleted), ("end", "quit", 1))


class TakeoverTests(SynchronousTestCase):
    """A session that is idle for long yields to a new one of its user, if that is wanted."""

    def test_takeover(self) -> None:
        server = Server()
        server.factory.takeover = 30
        _, first = server.logged_in()
        server.clock.advance(31)
        protocol, second = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\nSTAT\r\n")
        self.assertEqual(first.value(), b"-ERR [SYS/TEMP] another session of yours took over\r\n")
        self.assertTrue(first.disconnecting)
        self.assertTrue(second.value().endswith(b"+OK 2 25\r\n"))
        self.assertEqual([drop.released for drop in server.store.opened], [1, 0])

    def test_a_busy_or_fresh_session_stays(self) -> None:
        for wanted, idle in ((30, 29), (0, 500)):
            server = Server()
            server.factory.takeover = wanted
            _, first = server.logged_in()
            server.clock.advance(idle)
            protocol, second = server.connect()
            protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
            self.assertIn(b"-ERR [IN-USE]", second.value())
            self.assertEqual(first.value(), b"")

    def test_a_wrong_password_ends_nobody(self) -> None:
        server = Server()
        server.factory.takeover = 30
        _, first = server.logged_in()
        server.clock.advance(31)
        protocol, _ = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        self.assertEqual(first.value(), b"")

    def test_holders_are_forgotten(self) -> None:
        server = Server()
        for ending in (b"QUIT\r\n", b""):
            protocol, _ = server.logged_in()
            self.assertEqual(list(server.factory.holders), [b"bob"])
            protocol.dataReceived(ending)
            lose(protocol)
            self.assertEqual(server.factory.holders, {})


class StopTests(SynchronousTestCase):
    def test_idle_sessions_are_told(self) -> None:
        server = Server()
        protocol, transport = server.logged_in()
        stopped = Deferred.fromCoroutine(server.factory.stop(30))
        self.assertIn(b"-ERR [SYS/TEMP] server is shutting down\r\n", transport.value())
        lose(protocol)
        server.clock.advance(1)
        self.successResultOf(stopped)
        self.assertEqual(len(server.store.messages), 2)

    def test_a_client_that_does_not_close_is_not_waited_for(self) -> None:
        """Some never answer the closing of TLS: the stop takes a second, not the whole grace."""
        server = Server()
        protocol, transport = server.logged_in()
        protocol.dataReceived(b"QUIT\r\n")
        stopped = Deferred.fromCoroutine(server.factory.stop(30))
        server.clock.pump([0.1] * 15)
        self.assertTrue(transport.disconnected)
        lose(protocol)
        server.clock.advance(1)
        self.successResultOf(stopped)

    def test_a_listing_in_progress_is_finished(self) -> None:
        """A client that reads slowly gets all rows before the farewell, which is none of them."""
        server = Server([b"x\n"] * 20_000)
        protocol, transport = server.logged_in()
        full_after_each_write(protocol, transport)
        protocol.dataReceived(b"LIST\r\n")
        stopped = Deferred.fromCoroutine(server.factory.stop(30))
        for _ in range(20):
            server.clock.advance(0.1)
            protocol.resumeProducing()
        rows = transport.value().split(b"\r\n")
        self.assertEqual(rows[-3:], [b".", b"-ERR [SYS/TEMP] server is shutting down", b""])
        self.assertEqual(len(rows), 1 + 20_000 + 3)
        lose(protocol)
        server.clock.advance(1)
        self.successResultOf(stopped)

    def test_a_commit_is_awaited_beyond_the_grace(self) -> None:
        server = Server()
        protocol, transport = server.logged_in()
        server.store.opened[0].commit_answer = Deferred()
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        stopped = Deferred.fromCoroutine(server.factory.stop(5))
        server.clock.pump([1] * 20)
        self.assertFalse(transport.disconnected)
        self.assertNoResult(stopped)
        server.store.opened[0].commit_answer.callback(None)
        self.assertIn(b"signing off", transport.value())
        lose(protocol)
        server.clock.advance(1)
        self.successResultOf(stopped)

    def test_a_transfer_ends_with_the_grace(self) -> None:
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, transport = server.logged_in()
        server.store.opened[0].hold_reads = Deferred
        protocol.dataReceived(b"RETR 1\r\n")
        Deferred.fromCoroutine(server.factory.stop(5))
        server.clock.pump([1] * 4)
        self.assertFalse(transport.disconnected)
        server.clock.pump([1] * 4)
        self.assertTrue(transport.disconnected)

    def test_a_second_signal_ends_the_grace(self) -> None:
        server = Server([b"x" * 999 + b"\n"])
        server.store.hot = False
        protocol, transport = server.logged_in()
        server.store.opened[0].hold_reads = Deferred
        protocol.dataReceived(b"RETR 1\r\n")
        Deferred.fromCoroutine(server.factory.stop(5))
        server.clock.advance(1)
        self.assertFalse(transport.disconnected)
        server.factory.hurry()
        server.clock.advance(1)
        self.assertTrue(transport.disconnected)

    def test_the_farewell_is_said_without_grace_too(self) -> None:
        server = Server()
        _, transport = server.logged_in()
        Deferred.fromCoroutine(server.factory.stop(0))
        self.assertEqual((transport.disconnecting, transport.disconnected), (True, False))
        self.assertTrue(transport.value().endswith(b" server is shutting down\r\n"))

    def test_half_open_handshakes_do_not_hold_up_a_stop(self) -> None:
        """TLS keeps the greeting until the handshake is done: seconds, not the whole grace."""
        server = Server()
        protocol, transport = server.connect()
        protocol.pauseProducing()
        Deferred.fromCoroutine(server.factory.stop(30))
        server.clock.pump([STOP_HANDSHAKE_GRACE / 2, STOP_HANDSHAKE_GRACE / 4])
        self.assertFalse(transport.disconnected)
        server.clock.pump([STOP_HANDSHAKE_GRACE / 4, 0.1])
        self.assertTrue(transport.disconnected)

    def test_no_connection_is_taken_any_more(self) -> None:
        server = Server()
        Deferred.fromCoroutine(server.factory.stop(5))
        _, transport = server.connect()
        self.assertEqual(transport.value(), b"-ERR [SYS/TEMP] server is shutting down\r\n")


class ChallengeTests(SynchronousTestCase):
    def test_form(self) -> None:
        """One msg-id of harmless characters, at least 128 random bits, never the same again."""
        server = Server()
        seen = set()
        for _ in range(200):
            challenge = server.factory.challenge()
            self.assertRegex(challenge, rb"\A<[A-Za-z0-9._+-]+@[A-Za-z0-9._+-]+>\Z")
            self.assertGreaterEqual(len(challenge.split(b".")[0]), 1 + 32)
            seen.add(challenge)
        self.assertEqual(len(seen), 200)


class RecordTests(SynchronousTestCase):
    def test_events(self) -> None:
        server = Server()
        protocol, _ = server.connect()
        protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\nRETR 1\r\nTOP 2 0\r\nDELE 1\r\nQUIT\r\n")
        lose(protocol)
        events = [(r.event, r.reason) for r in server.records.records]
        self.assertEqual(events, [("failure", "bad-credentials"), ("login", "ok"), ("end", "quit")])
        last = server.records.records[-1]
        self.assertEqual(last.mechanism, "USER")
        self.assertEqual(
            (last.user, last.peer.address, last.peer.local_port), (b"bob", "127.0.0.1", 110)
        )
        tally = last.tally
        self.assertEqual(tally.top_octets, len(b"B: 2\r\n\r\n.\r\n"))
        self.assertEqual((tally.retr, tally.retr_octets, tally.top, tally.deleted), (1, 14, 1, 1))

    def test_a_connection_without_a_command_is_no_event(self) -> None:
        server = Server()
        protocol, _ = server.connect()
        lose(protocol)
        self.assertEqual(server.records.records, [])

    def test_transports_without_tcp(self) -> None:
        """A Unix socket or standard input has neither TCP options nor an address."""
        server = Server()
        protocol = POP3Protocol()
        protocol.factory = server.factory
        transport = StringTransport()
        protocol.makeConnection(transport)
        protocol.dataReceived(b"QUIT\r\n")
        self.assertIn(b"signing off", transport.value())


__all__ = ["Transport"]
