"""A POP3 client that speaks TLS: the sessions and downloads of `python -m benchmarks.tls`.

It does not verify certificates.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import time
from dataclasses import dataclass

from benchmarks.process import Failed, tree_cpu
from benchmarks.secure import Secure

IN_FLIGHT = 32
PATIENCE = 60.0
"""Seconds after which a client gives up; no figure depends on it."""
RECORD = 16_384
"""Octets of a TLS record at most: what one read gives (RFC 8446 section 5.1)."""
END = b"\r\n.\r\n"
"""How a reply of several lines ends; dot-stuffing keeps it from standing elsewhere."""


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

    def connect(self) -> socket.socket:
        """A connection, its handshake done. Raises `NotResumed`."""
        port = self._server.port if self._context is None else self._server.tls_port
        raw = socket.create_connection(("127.0.0.1", port), PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is None:
            return raw
        session = self._session if self._resume else None
        client = self._context.wrap_socket(raw, server_hostname="localhost", session=session)
        if session is not None and not client.session_reused:
            client.close()
            raise NotResumed("no ticket was taken")
        return client

    def cipher(self) -> str:
        """What the server chooses; empty without TLS."""
        with self.connect() as client:
            chosen = client.cipher() if isinstance(client, ssl.SSLSocket) else None
            self._reply(client)
            self._leave(client)
        return chosen[0] if chosen is not None else ""

    def log_in(self, client: socket.socket) -> None:
        """APOP, the greeting read first."""
        challenge = re.search(rb"<[^>]+>", self._reply(client))
        if challenge is None:
            raise Failed("the greeting holds no challenge")
        secret = challenge[0] + self._server.password.encode()
        digest = hashlib.md5(secret, usedforsecurity=False).hexdigest()
        self._ask(client, f"APOP {self._user} {digest}".encode())
        if isinstance(client, ssl.SSLSocket):
            # With TLS 1.3 the ticket comes behind the handshake, before the first reply is read.
            self._session = client.session

    def visit(self) -> None:
        """connect, APOP, STAT, QUIT. Raises `NotResumed`, `Failed`."""
        with self.connect() as client:
            self.log_in(client)
            self._ask(client, b"STAT")
            self._leave(client)

    def look_in(self) -> None:
        """connect, CAPA, QUIT: no login."""
        with self.connect() as client:
            self._reply(client)
            self._ask(client, b"CAPA", END)
            self._leave(client)

    def _ask(self, client: socket.socket, command: bytes, end: bytes = b"\r\n") -> bytes:
        client.sendall(command + b"\r\n")
        return self._reply(client, end)

    def _reply(self, client: socket.socket, end: bytes = b"\r\n") -> bytes:
        text = b""
        while not text.endswith(end):
            got = client.recv(4096)
            text += got
            if not got or not text.startswith(b"+OK"[: len(text)]):
                raise Failed("a command failed")
        return text

    def _leave(self, client: socket.socket) -> None:
        """QUIT, and wait until the server has closed."""
        self._ask(client, b"QUIT")
        while client.recv(512):
            pass

    def fetch(self, count: int) -> Transfer:
        """RETR of the first `count` messages, `IN_FLIGHT` at a time, from the first command sent.

        Login and QUIT, which a server may write the spool at, are not in the figures.
        """
        with self.connect() as client:
            self.log_in(client)
            began, cpu, own = time.perf_counter(), tree_cpu(self._server.pid), time.process_time()
            octets = _retrieve_one(client) if count == 1 else _retrieve(client, count)
            took, used = time.perf_counter() - began, time.process_time() - own
            cpu = tree_cpu(self._server.pid) - cpu
            self._leave(client)
        return Transfer(octets, took, cpu, used)


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
