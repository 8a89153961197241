"""Every way to log in, as data: by name, what a client sends and where the answer is.

A mechanism that the server learns is one more function in `MECHANISMS`; the tests of
`tests/end_to_end/test_enumeration.py` and `python -m benchmarks.enumeration` take them from here.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import lru_cache
from secrets import token_hex
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


def login(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """AUTH LOGIN, as clients do it that know nothing better."""
    return [client.ask(b"AUTH LOGIN"), client.ask(b64encode(name)), client.ask(b64encode(secret))]


def cram_md5(client: Client, name: bytes, secret: bytes) -> list[bytes]:
    """AUTH CRAM-MD5 (RFC 2195), with the secret of APOP."""
    challenge = client.ask(b"AUTH CRAM-MD5")
    digest = hmac.new(secret, b64decode(challenge[2:]), "md5").hexdigest()
    return [challenge, client.ask(b64encode(name + b" " + digest.encode("ascii")))]


@lru_cache
def _salted(algorithm: str, secret: bytes, salt: bytes, iterations: int) -> bytes:
    # Remembered, so that the client's own work is in no figure.
    return hashlib.pbkdf2_hmac(algorithm, secret, salt, iterations)


def _scram(mechanism: bytes, algorithm: str) -> Mechanism:
    def exchange(client: Client, name: bytes, secret: bytes) -> list[bytes]:
        first = b"n=" + name + b",r=" + token_hex(16).encode("ascii")
        challenge = client.ask(b"AUTH " + mechanism + b" " + b64encode(b"n,," + first))
        if not challenge.startswith(b"+ "):
            return [challenge]
        server_first = b64decode(challenge[2:])
        fields = dict(each.split(b"=", 1) for each in server_first.split(b","))
        salted = _salted(algorithm, secret, b64decode(fields[b"s"]), int(fields[b"i"]))
        client_key = hmac.digest(salted, b"Client Key", algorithm)
        bare = b"c=biws,r=" + fields[b"r"]
        signature = hmac.digest(
            hashlib.new(algorithm, client_key, usedforsecurity=False).digest(),
            b",".join((first, server_first, bare)),
            algorithm,
        )
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        answers = [challenge, client.ask(b64encode(bare + b",p=" + b64encode(proof)))]
        if answers[-1].startswith(b"+ "):
            answers.append(client.ask(b""))
        return answers

    return exchange


Mechanism = Callable[[Client, bytes, bytes], list[bytes]]
"""From a client, a name and a secret to all lines that the server answers with."""

MECHANISMS: Final[dict[str, Mechanism]] = {
    "USER": user_pass,
    "APOP": apop,
    "PLAIN": plain,
    "PLAIN in two": plain_in_two,
    "LOGIN": login,
    "CRAM-MD5": cram_md5,
    "SCRAM-SHA-1": _scram(b"SCRAM-SHA-1", "sha1"),
    "SCRAM-SHA-256": _scram(b"SCRAM-SHA-256", "sha256"),
}

CLEARTEXT: Final = frozenset({"USER", "PLAIN", "PLAIN in two", "LOGIN"})
"""Those that send the secret itself."""
AT_ONCE: Final = frozenset({"USER", "APOP", "PLAIN"})
"""Those of which a client may send all without waiting for an answer."""
