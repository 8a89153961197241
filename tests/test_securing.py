"""`popdrop.securing`, with Python's own client on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, cycle, pairwise
from typing import Any, TypeVar
from unittest import SkipTest

from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from popdrop.certs import Certificates
from popdrop.securing import RECORD, PromptTLS, Records, TLSFactory
from tests.test_certs import TIMEOUT, certbot, client_context

BULK = 4_000_000
T = TypeVar("T")


class Speaker(Protocol):
    """Does what its factory's `greet` and `answer` say; tells of the end."""

    def connectionMade(self) -> None:
        self.paused: list[bool] = []
        self.transport.registerProducer(self, True)
        self.factory.greet(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.answer(self, data)

    def pauseProducing(self) -> None:
        self.paused.append(True)

    def resumeProducing(self) -> None:
        self.paused.append(False)

    def stopProducing(self) -> None:
        pass

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.callback(reason.value)


def in_pieces(
    raw: socket.socket,
    version: ssl.TLSVersion,
    lines: Sequence[bytes],
    sizes: Iterator[int],
    back: int | None = None,
) -> bytes:
    """Send each line as a record, and the records in pieces of these octets; what came back.

    So many octets are waited for, or as many as went out and the greeting.
    """
    context = client_context()
    context.minimum_version = context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="a.example")

    def done(work: Callable[[], T]) -> T:
        while True:
            try:
                result = work()
            except ssl.SSLWantReadError:
                if outgoing.pending:
                    raw.sendall(outgoing.read())
                incoming.write(raw.recv(65536))
            else:
                return result

    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    done(client.do_handshake)
    for line in lines:
        client.write(line)
    with contextlib.suppress(ssl.SSLWantReadError):
        if back is not None:
            client.unwrap()
    data = outgoing.read()
    while data:
        size = next(sizes)
        raw.sendall(data[:size])
        data = data[size:]
    wanted = len(b"+OK\r\n") + sum(map(len, lines)) if back is None else back
    came = b""
    while len(came) < wanted:
        came += done(lambda: client.read(65536))
    if back is None:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.unwrap()
        raw.sendall(outgoing.read())
    while raw.recv(65536):
        pass
    return came


class SecuringTests(TestCase):
    def setUp(self) -> None:
        folder = self.mktemp()
        certbot(os.path.join(folder, "a"), "a.example")
        self.factory: Any = ServerFactory.forProtocol(Speaker)
        self.factory.greet = lambda speaker: speaker.transport.write(b"+OK\r\n")
        self.factory.answer = lambda speaker, data: speaker.transport.write(data)
        self.factory.lost = Deferred()
        wrapped = TLSFactory(Certificates(folder), self.factory, reactor)
        port: Any = reactor.listenTCP(0, wrapped, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.address = ("127.0.0.1", port.getHost().port)

    def raw(self) -> socket.socket:
        client = socket.create_connection(self.address, TIMEOUT)
        self.addCleanup(client.close)
        return client

    def client(self) -> ssl.SSLSocket:
        client = client_context().wrap_socket(self.raw(), server_hostname="a.example")
        self.addCleanup(client.close)
        return client

    async def reason(self) -> BaseException:
        value: BaseException = await self.factory.lost
        return value

    async def test_what_is_written_before_the_handshake_comes_in_order(self) -> None:
        def greet(speaker: Speaker) -> None:
            for part in (b"one ", b"", b"two ", b"three\r\n"):
                speaker.transport.write(part)

        def talk() -> bytes:
            with self.client() as client, client.makefile("rwb") as lines:
                greeting = lines.readline()
                lines.write(b"more\r\n")
                lines.flush()
                return greeting + lines.readline()

        self.factory.greet = greet
        self.assertEqual(await deferToThread(talk), b"one two three\r\nmore\r\n")

    async def test_nothing_is_written_behind_the_end(self) -> None:
        """The client is told of the end, by TLS."""

        def answer(speaker: Speaker, data: bytes) -> None:
            speaker.transport.write(b"bye\r\n")
            speaker.transport.unregisterProducer()
            speaker.transport.loseConnection()
            speaker.transport.write(b"never\r\n")

        def talk() -> bytes:
            with self.client() as client:
                client.sendall(b"QUIT\r\n")
                said = b""
                while octets := client.recv(100):
                    said += octets
                client.unwrap()  # would fail without the server's own
                return said

        self.factory.answer = answer
        self.assertEqual(await deferToThread(talk), b"+OK\r\nbye\r\n")
        self.assertIsInstance(await self.reason(), ConnectionDone)

    async def test_long_writes(self) -> None:
        """In whole records and in order, whatever the length is."""
        sizes = (1, RECORD - 1, RECORD, RECORD + 1, 5 * RECORD, 100_003)
        parts = [os.urandom(size) for size in sizes]
        whole = b"".join(parts)

        def answer(speaker: Speaker, data: bytes) -> None:
            for part in parts:
                speaker.transport.write(part)

        def talk() -> bytes:
            with self.client() as client, client.makefile("rwb") as lines:
                lines.readline()
                lines.write(b"more\r\n")
                lines.flush()
                return lines.read(len(whole))

        self.factory.answer = answer
        self.assertTrue(await deferToThread(talk) == whole)

    async def test_records_in_any_pieces(self) -> None:
        """One at a time, many at once, and cut anywhere; all is there, and nothing twice."""
        lines = [b"%d %s\r\n" % (number, b"x" * (number * 37 % 300)) for number in range(40)]
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for sizes in ([1], [3], [10_000], [5, 2, 400, 1], [97, 1000]):
                with self.subTest(version=version, sizes=sizes):
                    self.factory.lost = Deferred()
                    talk = partial(in_pieces, self.raw(), version, lines, cycle(sizes))
                    self.assertEqual(await deferToThread(talk), b"+OK\r\n" + b"".join(lines))
                    self.assertIsInstance(await self.reason(), ConnectionDone)

    async def test_all_of_one_read_comes_at_once(self) -> None:
        """And what a client says with its end is heard."""
        heard: list[bytes] = []
        self.factory.answer = lambda speaker, data: heard.append(data)
        lines = [b"RETR %d\r\n" % number for number in range(20)]
        talk = partial(in_pieces, self.raw(), ssl.TLSVersion.TLSv1_3, lines, cycle([4000]), 0)
        await deferToThread(talk)
        self.assertIsInstance(await self.reason(), ConnectionDone)
        self.assertEqual(b"".join(heard), b"".join(lines))
        self.assertLessEqual(len(heard), 2)

    def s_client(self, *options: str) -> Any:
        """`openssl s_client`, which can what Python's client cannot."""
        where = "{}:{}".format(*self.address)
        command = ["openssl", "s_client", "-connect", where, *options]
        try:
            child = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1)
        except FileNotFoundError:
            raise SkipTest("openssl is not installed") from None
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        return child

    async def test_short_records(self) -> None:
        """A client may want them (RFC 6066 section 4): the last reply is whole all the same."""
        last = b"".join(b"+OK %d\r\n" % number for number in range(1000))

        def answer(speaker: Any, data: bytes) -> None:
            speaker.transport.write_last(last)
            speaker.transport.unregisterProducer()
            speaker.transport.loseConnection()

        self.factory.answer = answer
        for version in ("-tls1_2", "-tls1_3"):
            self.factory.lost = Deferred()
            child = self.s_client("-quiet", "-maxfraglen", "512", version)

            def talk(child: Any = child) -> bytes:
                child.stdin.write(b"QUIT\n")
                child.stdin.flush()
                said: bytes = child.stdout.read()
                return said

            self.assertEqual(await deferToThread(talk), b"+OK\r\n" + last)
            await self.reason()

    async def test_what_is_no_record_behind_the_handshake(self) -> None:
        """It ends the connection at once: nobody waits for 64 KiB that a wrong length promises."""

        def talk() -> None:
            client = self.client()
            client.recv(100)
            raw = socket.socket(fileno=client.detach())
            self.addCleanup(raw.close)
            raw.settimeout(TIMEOUT)
            raw.sendall(b"\x17\x03\x03\xff\xff" + bytes(95))
            with contextlib.suppress(ConnectionError):
                while raw.recv(1000):
                    pass

        await deferToThread(talk)
        self.assertIsInstance(await self.reason(), SSL.Error)

    async def test_new_keys(self) -> None:
        """KeyUpdate (RFC 8446 section 4.6.3) holds no octets, and wants an answer."""
        child = self.s_client("-brief")

        def talk() -> list[bytes]:
            stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
            told = [stdout.readline()]
            # Alone on a line: K wants the server to change its keys, too.
            for line in (b"one", b"K", b"two", b"k", b"three", b"K", b"four"):
                stdin.write(line + b"\n")
                stdin.flush()
                if len(line) > 1:
                    told.append(stdout.readline())
                else:
                    while stderr.readline() != b"KEYUPDATE\n":
                        pass
            return told

        told = await deferToThread(talk)
        self.assertEqual(told, [b"+OK\r\n", b"one\n", b"two\n", b"three\n", b"four\n"])

    async def test_a_client_that_leaves_behind_our_end(self) -> None:
        """Without its own, as most do: the session has ended well."""

        def answer(speaker: Speaker, data: bytes) -> None:
            speaker.transport.unregisterProducer()
            speaker.transport.loseConnection()

        def talk() -> None:
            client = self.client()
            client.sendall(b"QUIT\r\n")
            while client.recv(100):
                pass
            socket.socket(fileno=client.detach()).close()

        self.factory.answer = answer
        await deferToThread(talk)
        self.assertIsInstance(await self.reason(), ConnectionDone)

    async def test_a_client_that_is_cut_off(self) -> None:
        """No end of TLS is an end of the connection, not one of TLS."""

        def talk() -> None:
            client = self.client()
            client.recv(100)
            socket.socket(fileno=client.detach()).close()

        await deferToThread(talk)
        self.assertIsInstance(await self.reason(), ConnectionLost)

    async def test_what_is_no_handshake(self) -> None:
        def talk() -> bytes:
            with contextlib.suppress(ConnectionResetError), self.raw() as client:
                client.sendall(b"USER bob\r\nPASS secret\r\n")
                return client.recv(100)
            return b""

        alert = await deferToThread(talk)
        self.assertTrue(alert.startswith(b"\x15") or not alert, alert)
        self.assertIsInstance(await self.reason(), SSL.Error)

    async def test_one_that_never_speaks(self) -> None:
        """What was written for it is dropped with it."""
        await deferToThread(lambda: self.raw().close())
        self.assertIsInstance(await self.reason(), ConnectionLost | ConnectionDone)

    async def test_abort_before_the_handshake(self) -> None:
        self.factory.greet = lambda speaker: speaker.transport.abortConnection()

        def talk() -> bytes:
            # It may come before the client knows that it is connected.
            with contextlib.suppress(ConnectionResetError), self.raw() as client:
                return client.recv(100)
            return b""

        self.assertEqual(await deferToThread(talk), b"")
        await self.reason()

    async def test_bulk(self) -> None:
        """A transport that is full says so, and when it has room; all octets come."""
        octets = bytes(range(256)) * (BULK // 256)
        speakers = []

        def answer(speaker: Speaker, data: bytes) -> None:
            speakers.append(speaker)
            speaker.transport.write(octets)

        def talk() -> bytes:
            with self.client() as client, client.makefile("rb") as lines:
                lines.readline()
                client.sendall(b"RETR 1\r\n")
                return lines.read(len(octets))

        self.factory.answer = answer
        self.assertTrue(await deferToThread(talk) == octets)
        self.assertIn(True, speakers[0].paused)
        self.assertFalse(speakers[0].paused[-1])
        await self.reason()


def record(length: int, kind: int = 23) -> bytes:
    return bytes((kind, 3, 3)) + length.to_bytes(2, "big") + bytes(length)


class RecordsTests(SynchronousTestCase):
    """Lengths as in RFC 8446 section 5.1: two octets, the fourth and fifth of a record."""

    def test_whole_ones(self) -> None:
        records = Records()
        self.assertEqual(records.feed(record(1)), 1)
        self.assertEqual(records.feed(record(0) + record(16_640) + record(256)), 3)

    def test_one_in_parts(self) -> None:
        records = Records()
        data = record(300) + record(10)
        self.assertEqual(records.feed(data[:5]), 0)
        self.assertEqual(records.feed(data[5:100]), 0)
        self.assertEqual(records.feed(data[100:310]), 1)
        self.assertEqual(records.feed(data[310:]), 1)
        self.assertEqual(records.feed(record(2)), 1)

    def test_a_header_in_parts(self) -> None:
        for cut in range(1, 5):
            records = Records()
            self.assertIsNone(records.feed(record(8) + record(8)[:cut]))
            self.assertIsNone(records.feed(record(8)[cut:]))
            self.assertIsNone(records.feed(record(8)))

    def test_longer_than_any_may_be(self) -> None:
        """16,384 octets and 2,048 for what encryption adds (RFC 5246 section 6.2.3)."""
        self.assertEqual(Records().feed(record(18_432)), 1)
        self.assertEqual(Records().feed(record(18_432)[:100]), 0)
        self.assertIsNone(Records().feed(record(18_433)[:100]))

    @given(st.lists(st.integers(0, 40), max_size=6), st.lists(st.integers(1, 60), max_size=12))
    def test_any_cuts(self, lengths: list[int], cuts: list[int]) -> None:
        """Where it tells, it is the number of ends that have been passed."""
        data = b"".join(map(record, lengths))
        ends = {*accumulate(5 + length for length in lengths)}
        begins = {0, *ends}
        records, place = Records(), 0
        known = True
        for cut in [*cuts, len(data)]:
            piece = data[place : place + cut]
            if not piece:
                break
            stop = place + len(piece)
            # A header lies across this cut if a record began less than five octets before it.
            known = known and not any(stop - 5 < begin < stop for begin in begins - {len(data)})
            passed = sum(place < end <= stop for end in ends)
            self.assertEqual(records.feed(piece), passed if known else None)
            place = stop


class Sealing:
    """An OpenSSL that takes so many records, each sealed by brackets, and then no more."""

    most = RECORD

    def __init__(self, takes: int, then: SSL.Error) -> None:
        self.takes, self.then = takes, then
        self.sealed = b""

    def send(self, octets: bytes) -> int:
        if not self.takes:
            raise self.then
        self.takes -= 1
        taken = octets[: self.most]
        self.sealed += b"[%b]" % taken
        return len(taken)

    def bio_read(self, size: int) -> bytes:
        out, self.sealed = self.sealed[:size], self.sealed[size:]
        if not out:
            raise SSL.WantReadError
        return out


class WritingTests(SynchronousTestCase):
    """What becomes of a write that OpenSSL takes in part."""

    def setUp(self) -> None:
        self.transport = StringTransport()
        self.tls = PromptTLS(ServerFactory(), Protocol())  # type: ignore[no-untyped-call]
        self.tls.transport = self.transport
        self.tls._appSendBuffer = []
        self.tls._handshakeDone = True
        self.octets = os.urandom(3 * RECORD + 5)

    def write(self, takes: int, then: SSL.Error) -> Sealing:
        connection = Sealing(takes, then)
        self.tls._tlsConnection = connection  # type: ignore[assignment]
        self.tls.write(self.octets)
        return connection

    def sealed(self, *cuts: int) -> bytes:
        return b"".join(b"[%b]" % self.octets[a:b] for a, b in pairwise(cuts))

    def test_what_waits_goes_out_later_in_order(self) -> None:
        """A record that waits for the client is neither lost nor sent twice."""
        for takes in range(5):
            self.transport.clear()
            connection = self.write(takes, SSL.WantReadError())
            cuts = [0, RECORD, 2 * RECORD, 3 * RECORD, len(self.octets)]
            self.assertEqual(self.transport.value(), self.sealed(*cuts[: takes + 1]))
            connection.takes = 9
            self.tls._unbufferPendingWrites()  # type: ignore[no-untyped-call]
            self.assertEqual(self.transport.value(), self.sealed(*cuts))
            self.assertEqual(self.tls._appSendBuffer, [])

    def end(self, takes: int, then: SSL.Error, most: int = RECORD) -> list[bytes]:
        """What the transport gets, write by write, for last words and the end."""
        connection: Any = Sealing(takes, then)
        connection.most = most

        def shutdown() -> bool:
            connection.sealed += b"[end]"
            return False

        connection.shutdown = shutdown
        self.tls._tlsConnection = connection
        self.tls.connected = 1
        written: list[bytes] = []
        self.patch(self.transport, "write", written.append)
        self.patch(self.transport, "writeSequence", written.extend)
        self.tls.write_last(b"+OK bye\r\n")
        self.tls.loseConnection()  # type: ignore[no-untyped-call]
        connection.takes = 9
        if self.tls._appSendBuffer:
            self.tls._unbufferPendingWrites()  # type: ignore[no-untyped-call]
        return written

    def test_last_words_go_out_with_the_end(self) -> None:
        self.assertEqual(self.end(9, SSL.WantReadError()), [b"[+OK bye\r\n][end]"])

    def test_last_words_in_short_records(self) -> None:
        """As a client may want them (RFC 6066 section 4)."""
        said = b"".join(self.end(9, SSL.WantReadError(), 4))
        self.assertEqual(said, b"[+OK ][bye\r][\n][end]")

    def test_last_words_that_wait(self) -> None:
        """For the client's part of a renegotiation; the end waits for them."""
        self.assertEqual(self.end(0, SSL.WantReadError()), [b"[+OK bye\r\n]", b"[end]"])

    def test_last_words_and_an_error(self) -> None:
        self.assertNotIn(b"bye", b"".join(self.end(0, SSL.Error([("", "", "wrong")]))))
        self.assertTrue(self.tls._lostTLSConnection)
        self.assertTrue(self.transport.disconnecting)

    def test_an_error_ends_it(self) -> None:
        """What was sealed before is sent, and nothing behind it."""
        self.write(2, SSL.Error([("", "", "wrong")]))
        self.assertEqual(self.transport.value(), self.sealed(0, RECORD, 2 * RECORD))
        self.assertTrue(self.transport.disconnecting)
        self.tls.write(b"more")
        self.assertEqual(self.transport.value(), self.sealed(0, RECORD, 2 * RECORD))
