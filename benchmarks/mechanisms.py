"""Every way to log in, as data: by name, what a client sends and where the answer is.

A mechanism that the server learns is one more function in `MECHANISMS`; the tests of
`tests/end_to_end/test_enumeration.py` and `python -m benchmarks.enumeration` take them from here.
"""

from __future__ import annotations

import hashlib
import re
import socket
from base64 import b64encode
from collections.abc import Callable
from typing import Final, Self

PATIENCE: Final = 60.0
"""Seconds after which a client gives up; no figure depends on it."""


class Client:
    """One connection. `greeting` is the server's, without CRLF."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self.greeting = self.line()

    def line(self) -> bytes:
        """The next line, without CRLF; empty where the server has closed."""
        return self._file.readline().rstrip(b"\r\n")

    def ask(self, command: bytes) -> bytes:
        """Send a line and read a line."""
        self.send(command)
        return self.line()

    def send(self, command: bytes) -> None:
        """Send a line."""
        self._socket.sendall(command + b"\r\n")

    def capa(self) -> list[bytes]:
        """CAPA (RFC 2449) and its lines, without the last."""
        lines = [self.ask(b"CAPA")]
        while (line := self.line()) not in (b".", b""):
            lines.append(line)
        return lines

    def close(self) -> None:
        """Go away without QUIT."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def user_pass(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """USER and PASS (RFC 1939 section 7)."""
    return [client.ask(b"USER " + name), client.ask(b"PASS " + secret)]


def apop(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """APOP (RFC 1939 section 7)."""
    found = re.search(rb"<[^>]+>", client.greeting)
    if found is None:
        raise ValueError("the greeting holds no challenge")
    digest = hashlib.md5(found[0] + secret, usedforsecurity=False).hexdigest()
    return [client.ask(b"APOP " + name + b" " + digest.encode("ascii"))]


def plain(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """AUTH PLAIN with an initial response (RFC 4616)."""
    return [client.ask(b"AUTH PLAIN " + b64encode(b"\0" + name + b"\0" + secret))]


def plain_in_two(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """AUTH PLAIN, the response on a line of its own (RFC 5034)."""
    return [client.ask(b"AUTH PLAIN"), client.ask(b64encode(b"\0" + name + b"\0" + secret))]


Mechanism = Callable[[Client, bytes, bytes], list[bytes]]
"""From a client, a name and a secret to all lines that the server answers with."""

MECHANISMS: Final[dict[str, Mechanism]] = {
    "USER": user_pass,
    "APOP": apop,
    "PLAIN": plain,
    "PLAIN in two": plain_in_two,
}
