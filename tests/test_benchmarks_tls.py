"""`benchmarks.tls`: its client against a scripted server, its sums, its large message."""

from __future__ import annotations

import argparse
import mailbox
import os
import socket
import ssl
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from benchmarks import tls, visitor
from benchmarks.__main__ import CLASSES
from benchmarks.corpus import write_message
from benchmarks.process import Failed, Machine, free_port, start, stop, wait_for_greeting
from benchmarks.secure import HERE, SERVERS, Secure
from benchmarks.visitor import NotResumed, Visitor, crowd
from tests.test_benchmarks import MESSAGES, PASSWORD, Handler, Maildrop, Server, running

V12, V13 = tls.VERSIONS["1.2"], tls.VERSIONS["1.3"]


class CapaHandler(Handler):
    """Answers CAPA, too."""

    def answer(
        self, drop: Maildrop, word: bytes, arguments: list[bytes], marked: set[int]
    ) -> bytes:
        if word == b"CAPA":
            return b"+OK\r\nUIDL\r\nTOP\r\n.\r\n"
        return super().answer(drop, word, arguments, marked)


class TlsServer(Server):
    """The scripted server behind TLS. It knows its tickets, or only those of each connection."""

    def __init__(self, drop: Maildrop, remembers: bool = True) -> None:
        super().__init__(drop)
        self.RequestHandlerClass = CapaHandler
        self.certificate = trustme.CA().issue_cert("localhost")
        self.remembers = remembers
        self.context = self.fresh()

    def fresh(self) -> ssl.SSLContext:
        """With a key for tickets of its own."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        return context

    def finish_request(self, request: object, client_address: object) -> None:
        """The handshake is the connection's own thread's."""
        assert isinstance(request, socket.socket)
        context = self.context if self.remembers else self.fresh()
        with context.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)  # type: ignore[arg-type]


class Scripted(Secure):
    """What a visitor wants to know of a server; its CPU is this process's."""

    pid = os.getpid()

    def __init__(self, port: int, tls_port: int, key: str = "popdrop") -> None:
        super().__init__(Path(), 0, PASSWORD)
        self.port, self.tls_port, self.key = port, tls_port, key


class VisitorTests(SynchronousTestCase):
    """The client."""

    def setUp(self) -> None:
        self.drop = Maildrop()

    def visit(self, version: ssl.TLSVersion, resume: bool, remembers: bool = True) -> int:
        """Three visits; how many of their handshakes the server took a ticket for."""
        server = TlsServer(self.drop, remembers)
        with running(server) as port:
            guest = Visitor(Scripted(0, port), "u", version, resume)
            crowd([(guest.visit() for _ in range(3))])
        return server.context.session_stats()["hits"]

    def test_whole_handshakes(self) -> None:
        """No ticket is used, and each visit is one of all four commands."""
        for version in (V12, V13):
            self.drop = Maildrop()
            self.assertEqual(self.visit(version, False), 0)
            self.assertEqual(self.drop.commands, [b"APOP", b"STAT", b"QUIT"] * 3)

    def test_resumed(self) -> None:
        """All visits but the first use the ticket of the one before."""
        for version in (V12, V13):
            self.assertEqual(self.visit(version, True), 2)

    def test_not_resumed(self) -> None:
        """A server that does not know the ticket is found out."""
        for version in (V12, V13):
            self.assertRaises(NotResumed, self.visit, version, True, False)

    def test_no_login(self) -> None:
        """A look is CAPA and QUIT, CAPA's list read whole."""
        with running(TlsServer(self.drop)) as port:
            crowd([iter([Visitor(Scripted(0, port), "u", V13).look_in()])])
        self.assertEqual(self.drop.commands, [b"CAPA", b"QUIT"])

    def test_many_at_once(self) -> None:
        """As many sessions as were asked for, those of one visitor one after another."""
        for version in (None, V12, V13):
            self.drop = Maildrop()
            self.drop.deletes = False
            with running(Server(self.drop)) as plain, running(TlsServer(self.drop)) as secure:
                server = Scripted(plain, secure)
                guests = [Visitor(server, "u", version, True) for _ in range(5)]
                crowd([map(Visitor.visit, [guest] * 3) for guest in guests])
            self.assertEqual(self.drop.commands.count(b"QUIT"), 15)
            self.assertEqual(self.drop.commands.count(b"STAT"), 15)

    def test_cipher(self) -> None:
        """The version that was asked for is what is spoken."""
        with running(TlsServer(self.drop)) as port:
            server = Scripted(0, port)
            self.assertStartsWith(Visitor(server, "", V13).cipher(), "TLS_")
            self.assertStartsWith(Visitor(server, "", V12).cipher(), "ECDHE-")

    def assertStartsWith(self, text: str, start: str) -> None:
        self.assertEqual(text[: len(start)], start)

    def test_fetch(self) -> None:
        """All octets that come are counted, with TLS and without."""
        self.drop.messages = MESSAGES * 2
        self.drop.deletes = False
        whole = [len(b"+OK\r\n" + message + b".\r\n") for message in self.drop.messages]
        with running(Server(self.drop)) as plain, running(TlsServer(self.drop)) as secure:
            server = Scripted(plain, secure)
            for version in (None, V12, V13):
                for count in (1, 2, len(whole)):
                    found = Visitor(server, "u", version).fetch(count)
                    self.assertEqual(found.octets, sum(whole[:count]))
                    self.assertGreater(found.seconds, 0)

    def test_wrong_password(self) -> None:
        """A refusal ends the run: there is no figure for a server that is quick and wrong."""
        with running(Server(self.drop)) as port:
            server = Scripted(port, 0)
            server.password = "wrong"
            self.assertRaises(Failed, crowd, [iter([Visitor(server, "u", None).visit()])])


class Answers:
    """In place of a socket: replies to RETR in reads of these sizes, no more than were asked."""

    def __init__(self, replies: list[bytes], sizes: list[int]) -> None:
        self.replies, self.sizes = replies, sizes
        self.asked = self.ended = self.most = 0
        self.waiting = b""

    def sendall(self, commands: bytes) -> None:
        for line in commands.splitlines(keepends=True):
            self.asked += 1
            assert line == b"RETR %d\r\n" % self.asked
            self.waiting += self.replies[self.asked - 1]
        self.most = max(self.most, self.asked - self.ended)

    def recv_into(self, room: memoryview) -> int:
        size = self.sizes.pop(0) if self.sizes else len(room)
        part = self.waiting[: min(size, len(room))]
        self.waiting = self.waiting[len(part) :]
        room[: len(part)] = part
        left = sum(map(len, self.replies[: self.asked])) - len(self.waiting)
        ends = accumulate(map(len, self.replies))
        self.ended = sum(end <= left for end in ends)
        return len(part)


replies = st.lists(
    st.lists(st.sampled_from([b"", b"..", b"text", b"x" * 9000]), max_size=5).map(
        lambda rows: b"+OK\r\n" + b"".join(row + b"\r\n" for row in rows) + b".\r\n"
    ),
    min_size=1,
    max_size=80,
)


class CannedTests(SynchronousTestCase):
    """Ready-made answers."""

    def test_all_ways(self) -> None:
        """Plain, whole and resumed, and a look; the server takes each ticket."""
        pem = Path(self.mktemp())
        certificate = trustme.CA().issue_cert("localhost")
        pem.write_bytes(certificate.private_key_and_cert_chain_pem.bytes())
        server = Scripted(free_port(), free_port())
        command = [sys.executable, "-m", "benchmarks.canned"]
        command += [str(server.port), str(server.tls_port), str(pem.resolve())]
        log = Path(self.mktemp())
        child = start(command, os.sched_getaffinity(0), log=log, cwd=HERE)
        self.addCleanup(stop, child)
        wait_for_greeting(child, server.port, log)
        for version in (None, V12, V13):
            visitor = Visitor(server, "u", version)
            crowd([iter([visitor.visit(), visitor.look_in(), visitor.visit()])])
            if version is not None:
                guest = Visitor(server, "u", version, resume=True)
                crowd([(guest.visit() for _ in range(3))])

    def test_no_mail(self) -> None:
        """What needs a maildrop is not asked of it, and no figure stands there."""
        asked: list[str] = []

        def measure(server: Secure) -> tuple[tuple[float, float], ...]:
            asked.append(server.key)
            return ((1.0, 0.0),)

        servers = [Scripted(0, 0), Scripted(0, 0, "canned-twisted")]
        servers[1].maildrops = False
        for mail, wanted in ((True, "-"), (False, "1.00")):
            (found,) = tls.take_turns(tls.Figure("x", measure, mail=mail), servers, 1)
            self.assertEqual(tls.cell(found["canned-twisted"]), wanted)
        self.assertEqual(asked, ["popdrop"] * 2 + ["popdrop", "canned-twisted"] * 2)


class RetrieveTests(SynchronousTestCase):
    """Ends of messages, wherever a read ends."""

    @settings(deadline=None, derandomize=True)
    @given(replies, st.lists(st.integers(1, 9), max_size=60))
    def test_many(self, messages: list[bytes], sizes: list[int]) -> None:
        """Every octet is taken, and never more than the window is in flight."""
        answers = Answers(messages, sizes)
        octets = visitor._retrieve(answers, len(messages))  # type: ignore[arg-type]
        self.assertEqual(octets, sum(map(len, messages)))
        self.assertEqual(answers.asked, len(messages))
        self.assertLessEqual(answers.most, visitor.IN_FLIGHT)

    @settings(deadline=None, derandomize=True)
    @given(replies, st.lists(st.integers(1, 9), max_size=60))
    def test_one(self, messages: list[bytes], sizes: list[int]) -> None:
        """The same of one message."""
        answers = Answers(messages[:1], sizes)
        octets = visitor._retrieve_one(answers)  # type: ignore[arg-type]
        self.assertEqual(octets, len(messages[0]))

    def test_closed(self) -> None:
        """An end of the connection within a message is no end of the message."""
        cut = [b"+OK\r\ntext\r\n"]
        self.assertRaises(Failed, visitor._retrieve, Answers(cut, []), 1)
        self.assertRaises(Failed, visitor._retrieve_one, Answers(cut, []))


class TableTests(SynchronousTestCase):
    """Runs by turns, and the ratios."""

    def turns(self, told: dict[str, list[object]]) -> tuple[list[tls.Found], list[str]]:
        """Two runs after the first, of two rows; and the servers in the order of their turns."""
        order = []

        def measure(server: Secure) -> tuple[tls.Measured, ...]:
            order.append(server.key)
            value = told[server.key].pop(0)
            if isinstance(value, Exception):
                raise value
            assert isinstance(value, float)
            return (value, 0.5), (value * 2, 0.0)

        figure = tls.Figure("T", measure, more=(("twice", True),))
        return tls.take_turns(figure, [Scripted(0, 0, key) for key in told], 2), order

    def test_turns(self) -> None:
        """The first run of each is not counted."""
        rows, order = self.turns({"popdrop": [9.0, 1.0, 2.0], "dovecot-tuned": [9.0, 3.0, 4.0]})
        self.assertEqual(order, ["popdrop", "dovecot-tuned"] * 3)
        self.assertEqual(rows[0]["popdrop"], [(1.0, 0.5), (2.0, 0.5)])
        self.assertEqual(rows[1]["dovecot-tuned"], [(6.0, 0.0), (8.0, 0.0)])

    def test_without_figure(self) -> None:
        """A server that does not resume, or fails, has no more turns; the other goes on."""
        for error, word in ((NotResumed("x"), "not resumed"), (OSError("x"), "failed")):
            with redirect_stdout(StringIO()) as notes:
                rows, order = self.turns({"popdrop": [1.0] * 3, "dovecot-tuned": [1.0, error]})
            self.assertEqual("T: x" in notes.getvalue(), word == "failed")
            self.assertEqual(order.count("dovecot-tuned"), 2)
            self.assertEqual(rows[0]["dovecot-tuned"], word)
            self.assertEqual(len(rows[0]["popdrop"]), 2)

    def line(self, ours: list[float], base: list[float], less: bool, share: float = 0.5) -> str:
        figure = tls.Figure("T", lambda server: (), less, (0.5, 0.6))
        found = {
            "popdrop": [(value, share) for value in ours],
            "dovecot-tuned": [(value, 0.1) for value in base],
        }
        (line,) = tls.lines(figure, [found], list(found))
        return " ".join(line.split())

    def test_ratios(self) -> None:
        """Of the medians, then of the best, which are the least or the most."""
        ours, base = [4.0, 1.0, 5.0], [8.0, 10.0, 90.0]
        self.assertEqual(self.line(ours, base, True), "T 4.00 10.0 0.40 0.12 at most 0.50-0.60 met")
        self.assertEqual(
            self.line(ours, base, False), "T 4.00 10.0 0.40 0.06 at least 0.50-0.60 missed"
        )

    def test_verdicts(self) -> None:
        """Within the range it is neither met nor missed."""
        for value, less, more in ((5.0, "met", "between"), (6.1, "missed", "met")):
            self.assertEqual(self.line([value], [10.0], True).split()[-1], less)
            self.assertEqual(self.line([value], [10.0], False).split()[-1], more)
        self.assertEqual(self.line([5.5], [10.0], True).split()[-1], "between")
        self.assertEqual(self.line([4.9], [10.0], False).split()[-1], "missed")

    def test_bound(self) -> None:
        """A figure that is the client's is marked."""
        self.assertIn(" 500* ", self.line([500.0], [100.0], False, share=0.91))
        self.assertNotIn("*", self.line([500.0], [100.0], False, share=0.9))

    def test_alone(self) -> None:
        """Without the peer there is no ratio and no verdict."""
        self.assertEqual(self.line([0.25], [], True), "T 0.250 - - - at most 0.50-0.60")

    def test_rows(self) -> None:
        """What the same runs have told stands under it; a share of the client's has no ratio."""
        figure = tls.Figure("T", lambda server: (), False, more=(("cost", True), ("share", False)))
        costs = {"popdrop": [(1.0, 0.0), (3.0, 0.0)], "dovecot-tuned": [(4.0, 0.0), (8.0, 0.0)]}
        text = tls.lines(figure, [{"popdrop": "failed"}, costs, costs], list(costs))
        self.assertEqual(
            [line.split() for line in text],
            [
                ["T", "failed", "-", "-", "-", "-"],
                ["cost", "2.00", "6.00", "0.33", "0.25"],
                ["share", "2.00", "6.00"],
            ],
        )

    def test_load(self) -> None:
        """What this process and the servers use is not others'."""
        busy = [100.0]
        cpu = {1: 10.0, 2: 20.0}
        own = [1.0]
        clock = [1000.0]
        self.patch(tls, "tree_cpu", lambda pid: cpu[pid])
        self.patch(tls.Machine, "now", lambda: Machine(busy[0], 0.0))
        self.patch(
            tls, "time", SimpleNamespace(process_time=lambda: own[0], monotonic=lambda: clock[0])
        )
        servers = [Scripted(0, 0), Scripted(0, 0)]
        for pid, server in enumerate(servers, 1):
            server.pid = pid
        load = tls.Load(servers)
        cpu[1], cpu[2], own[0], busy[0], clock[0] = 12.0, 21.0, 2.0, 107.0, 1010.0
        self.assertAlmostEqual(load.others(), 0.3)
        busy[0] = 101.0
        self.assertEqual(load.others(), 0.0)


class LargeTests(SynchronousTestCase):
    """The message of `retr-big`."""

    @settings(deadline=None, max_examples=12, derandomize=True)
    @given(st.integers(1_000, 3_000_000))
    def test_one_message(self, octets: int) -> None:
        """The standard library finds one mail of this size, whose attachment it can decode."""
        path = Path(self.mktemp())
        total = write_message(path, octets)
        self.assertEqual(path.stat().st_size, total)
        self.assertIn(total - octets, range(77))
        box = mailbox.mbox(path)
        self.addCleanup(box.close)
        (mail,) = box
        self.assertTrue(path.read_bytes().endswith(b"\n\n"))
        rows = mail.get_payload().splitlines()
        self.assertEqual({len(row) for row in rows}, {76})
        self.assertEqual(len(mail.get_payload(decode=True)), 57 * len(rows))


class OptionsTests(SynchronousTestCase):
    """The command line."""

    def test_peers(self) -> None:
        """Those with TLS, by their keys in the other tables."""
        self.assertEqual(tls._known(",".join(SERVERS)), list(SERVERS))
        self.assertRaises(argparse.ArgumentTypeError, tls._known, "popdrop,canned")
        for key, kind in SERVERS.items():
            if kind.maildrops:
                self.assertIn(CLASSES[key], kind.__mro__)
