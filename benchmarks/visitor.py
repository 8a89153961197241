"""A POP3 client that speaks TLS: the sessions and downloads of `python -m benchmarks.tls`.

It does not verify certificates.
"""

from __future__ import annotations

import hashlib
import re
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.process import Failed, tree_cpu
from benchmarks.secure import Secure

IN_FLIGHT = 32
PATIENCE = 60.0
"""Seconds after which a client gives up; no figure depends on it."""
RECORD = 16_384
"""Octets of a TLS record at most: what one read gives (RFC 8446 section 5.1)."""
END = b"\r\n.\r\n"
"""How a reply of several lines ends; dot-stuffing keeps it from standing elsewhere."""


T = TypeVar("T")
Waiting = Generator[tuple[socket.socket, int], None, T]
"""Something that is done step by step; between two a socket is waited for, and the event of it."""


class NotResumed(Failed):
    """The server answered the ticket with a whole handshake, as it may (RFC 8446 section 2.2)."""


@dataclass(frozen=True)
class Transfer:
    """One download: octets as sent before encryption, and what it took."""

    octets: int
    seconds: float
    server: float
    """Processor seconds of the server."""
    client: float
    """Processor seconds of this process."""


class Visitor:
    """One client after another, with or without the ticket of the one before."""

    def __init__(
        self, server: Secure, user: str, version: ssl.TLSVersion | None, resume: bool = False
    ) -> None:
        self._server, self._user, self._resume = server, user, resume
        self._session: ssl.SSLSession | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if version else None
        if self._context is not None and version is not None:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
            self._context.minimum_version = self._context.maximum_version = version

    def connect(self) -> Waiting[socket.socket]:
        """A connection, its handshake done. Raises `NotResumed`."""
        port = self._server.port if self._context is None else self._server.tls_port
        raw = socket.socket()
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if raw.connect_ex(("127.0.0.1", port)):
            yield raw, selectors.EVENT_WRITE
        if self._context is None:
            return raw
        session = self._session if self._resume else None
        client = self._context.wrap_socket(
            raw, do_handshake_on_connect=False, server_hostname="localhost", session=session
        )
        yield from _when_ready(client, client.do_handshake)
        if session is not None and not client.session_reused:
            client.close()
            raise NotResumed("no ticket was taken")
        return client

    def cipher(self) -> str:
        """What the server chooses; empty without TLS."""
        with _now(self.connect()) as client:
            chosen = client.cipher() if isinstance(client, ssl.SSLSocket) else None
            _now(_reply(client))
            _now(_leave(client))
        return chosen[0] if chosen is not None else ""

    def log_in(self, client: socket.socket) -> Waiting[None]:
        """APOP, the greeting read first."""
        challenge = re.search(rb"<[^>]+>", (yield from _reply(client)))
        if challenge is None:
            raise Failed("the greeting holds no challenge")
        secret = challenge[0] + self._server.password.encode()
        digest = hashlib.md5(secret, usedforsecurity=False).hexdigest()
        yield from _ask(client, f"APOP {self._user} {digest}".encode())
        if isinstance(client, ssl.SSLSocket):
            # With TLS 1.3 the ticket comes behind the handshake, before the first reply is read.
            self._session = client.session

    def visit(self) -> Waiting[None]:
        """connect, APOP, STAT, QUIT. Raises `NotResumed`, `Failed`."""
        with (yield from self.connect()) as client:
            yield from self.log_in(client)
            yield from _ask(client, b"STAT")
            yield from _leave(client)

    def look_in(self) -> Waiting[None]:
        """connect, CAPA, QUIT: no login."""
        with (yield from self.connect()) as client:
            yield from _reply(client)
            yield from _ask(client, b"CAPA", END)
            yield from _leave(client)

    def fetch(self, count: int) -> Transfer:
        """RETR of the first `count` messages, `IN_FLIGHT` at a time, from the first command sent.

        Login and QUIT, which a server may write the spool at, are not in the figures.
        """
        with _now(self.connect()) as client:
            _now(self.log_in(client))
            client.settimeout(PATIENCE)
            began, cpu, own = time.perf_counter(), tree_cpu(self._server.pid), time.process_time()
            octets = _retrieve_one(client) if count == 1 else _retrieve(client, count)
            took, used = time.perf_counter() - began, time.process_time() - own
            cpu = tree_cpu(self._server.pid) - cpu
            _now(_leave(client))
        return Transfer(octets, took, cpu, used)


def crowd(sessions: Sequence[Iterator[Waiting[None]]]) -> None:
    """Do the sessions of all of these, those of one one after another, from this one thread.

    A thread for each would wait for the others' most of the time, and the server for them.
    """
    with selectors.DefaultSelector() as selector:
        for each in sessions:
            _go_on(selector, each, None, None)
        while selector.get_map():
            ready = selector.select(PATIENCE)
            if not ready:
                raise Failed("no answer")
            for key, _ in ready:
                _go_on(selector, *key.data, key)


def _go_on(
    selector: selectors.BaseSelector,
    sessions: Iterator[Waiting[None]],
    session: Waiting[None] | None,
    key: selectors.SelectorKey | None,
) -> None:
    """The next step of a session, or of the one behind it."""
    while True:
        try:
            wanted = None if session is None else next(session)
        except StopIteration:
            wanted = None
        if key is not None and (wanted is None or (key.fileobj, key.events) != wanted):
            # A socket that was closed, or has become one of TLS, is known by its number.
            selector.unregister(key.fd)
            key = None
        if wanted is not None:
            if key is None:
                selector.register(*wanted, (sessions, session))
            return
        session = next(sessions, None)
        if session is None:
            return


def _now(waiting: Waiting[T]) -> T:
    """Wait for all of it."""
    while True:
        try:
            client, event = next(waiting)
        except StopIteration as done:
            result: T = done.value
            return result
        with selectors.DefaultSelector() as selector:
            selector.register(client, event)
            if not selector.select(PATIENCE):
                raise Failed("no answer")


def _when_ready(client: socket.socket, call: Callable[[], T]) -> Waiting[T]:
    while True:
        try:
            return call()
        except (BlockingIOError, ssl.SSLWantReadError):
            yield client, selectors.EVENT_READ


def _ask(client: socket.socket, command: bytes, end: bytes = b"\r\n") -> Waiting[bytes]:
    client.sendall(command + b"\r\n")
    return (yield from _reply(client, end))


def _reply(client: socket.socket, end: bytes = b"\r\n") -> Waiting[bytes]:
    text = b""
    while not text.endswith(end):
        got = yield from _when_ready(client, lambda: client.recv(4096))
        text += got
        if not got or not text.startswith(b"+OK"[: len(text)]):
            raise Failed("a command failed")
    return text


def _leave(client: socket.socket) -> Waiting[None]:
    """QUIT, and wait until the server has closed."""
    yield from _ask(client, b"QUIT")
    while (yield from _when_ready(client, lambda: client.recv(512))):
        pass


def _commands(first: int, last: int) -> bytes:
    return b"".join(b"RETR %d\r\n" % number for number in range(first, last + 1))


def _receive(client: socket.socket, room: memoryview) -> int:
    got = client.recv_into(room)
    if not got:
        raise Failed("closed within a message")
    return got


def _retrieve(client: socket.socket, count: int) -> int:
    """How many octets came."""
    buffer = bytearray(len(END) - 1 + RECORD)
    room = memoryview(buffer)[len(END) - 1 :]
    asked = min(IN_FLIGHT, count)
    client.sendall(_commands(1, asked))
    octets = done = 0
    while done < count:
        got = _receive(client, room)
        octets += got
        # The last octets of the read before are in front: an end may be cut.
        ended = buffer.count(END, 0, len(END) - 1 + got)
        buffer[: len(END) - 1] = buffer[got : got + len(END) - 1]
        done += ended
        more = min(asked + ended, count)
        if more > asked:
            client.sendall(_commands(asked + 1, more))
            asked = more
    return octets


def _retrieve_one(client: socket.socket) -> int:
    """With one message, its end is the end of what came, and no octet has to be looked at."""
    buffer = bytearray(RECORD)
    client.sendall(_commands(1, 1))
    octets, tail = 0, b""
    while tail != END:
        got = _receive(client, memoryview(buffer))
        octets += got
        tail = (tail + buffer[max(got - len(END), 0) : got])[-len(END) :]
    return octets
