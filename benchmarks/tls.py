"""`python -m benchmarks.tls`: what TLS costs the server, with RSA-2048 and with ECDSA P-256.

- `session-tls`: processor time of connect, handshake, APOP, STAT, QUIT on the TLS port, without
  tickets; `session-tls-resumed`: the same by the ticket of the client's last session;
  `session-plain`: the same without TLS.
- `retr-32-tls`: RETR of a spool with 32 in flight, octets as sent before encryption.

The client is Python on the other core; it prints its own share of that core, since what it cannot
take the server cannot send. It does not verify certificates.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from statistics import median

from benchmarks import tools
from benchmarks.peers import Popdrop
from benchmarks.process import Failed, free_port, tree_cpu
from benchmarks.scene import serving

KEYS = {
    "RSA-2048": ("rsa:2048",),
    "ECDSA P-256": ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
}
AT_ONCE = 8
IN_FLIGHT = 32
MESSAGES = 10
PATIENCE = 60.0
"""Seconds after which a client gives up; no figure depends on it."""
RECORD = 16_384
"""Octets of a TLS record at most: what one read gives (RFC 8446 section 5.1)."""
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class SecurePopdrop(Popdrop):
    """Also listens on a TLS port, with a certificate of this sort of key."""

    sort = ""
    tls_port = 0

    def prepare(self, users: Sequence[str]) -> None:
        super().prepare(users)
        self.tls_port = free_port()
        pem = self.folder / "state" / "tls.pem"
        command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", "90"]
        command += ["-newkey", *KEYS[self.sort], "-keyout", str(pem), "-out", str(pem) + ".crt"]
        subprocess.run(command, check=True, capture_output=True)
        pem.write_bytes(pem.read_bytes() + Path(f"{pem}.crt").read_bytes())
        self.more_options = ("--listen", f"tls:{pem}:{self.tls_port}:interface=127.0.0.1")


class Visitor:
    """One client after another, with or without the ticket of the one before."""

    def __init__(
        self, server: SecurePopdrop, user: str, version: ssl.TLSVersion | None, resume: bool
    ) -> None:
        self._server, self._user, self._resume = server, user, resume
        self._session: ssl.SSLSession | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if version else None
        if self._context is not None and version is not None:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
            self._context.minimum_version = self._context.maximum_version = version

    def connect(self) -> socket.socket:
        """A connection, its handshake done."""
        port = self._server.port if self._context is None else self._server.tls_port
        raw = socket.create_connection(("127.0.0.1", port), PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is None:
            return raw
        client = self._context.wrap_socket(
            raw, server_hostname="localhost", session=self._session if self._resume else None
        )
        if self._session is not None and client.session_reused is not self._resume:
            raise Failed("a session was resumed that should not be, or not")
        return client

    def log_in(self, client: socket.socket) -> None:
        """APOP, the greeting read first."""
        challenge = re.search(rb"<[^>]+>", client.recv(512))
        if challenge is None:
            raise Failed("the greeting holds no challenge")
        digest = hashlib.md5(
            challenge[0] + self._server.password.encode(), usedforsecurity=False
        ).hexdigest()
        client.sendall(f"APOP {self._user} {digest}\r\n".encode())
        self._expect(client)
        if isinstance(client, ssl.SSLSocket):
            self._session = client.session

    def visit(self, _: object = None) -> None:
        """connect, APOP, STAT, QUIT."""
        with self.connect() as client:
            self.log_in(client)
            for command in (b"STAT\r\n", b"QUIT\r\n"):
                client.sendall(command)
                self._expect(client)
            while client.recv(512):
                pass

    def _expect(self, client: socket.socket) -> None:
        if not client.recv(512).startswith(b"+OK"):
            raise Failed("a command failed")

    def fetch(self, count: int) -> int:
        """RETR of the first `count` messages, `IN_FLIGHT` at a time; how many octets came."""
        buffer = bytearray(4 + RECORD)
        with self.connect() as client:
            self.log_in(client)
            asked = min(IN_FLIGHT, count)
            client.sendall(b"".join(b"RETR %d\r\n" % number for number in range(1, asked + 1)))
            octets = done = 0
            room = memoryview(buffer)[4:]
            while done < count:
                got = client.recv_into(room)
                if not got:
                    raise Failed("closed within a message")
                octets += got
                # The last four octets of the read before are in front: an end may be cut.
                ended = buffer.count(b"\r\n.\r\n", 0, 4 + got)
                buffer[:4] = buffer[got : got + 4]
                done += ended
                more = range(asked + 1, min(asked + ended, count) + 1)
                if more:
                    client.sendall(b"".join(b"RETR %d\r\n" % number for number in more))
                    asked += len(more)
        return octets


def sessions(
    server: SecurePopdrop, version: ssl.TLSVersion | None, resume: bool, count: int
) -> float:
    """Milliseconds of the server's processor time of one session, `AT_ONCE` at a time."""
    visitors = [Visitor(server, f"s{number}", version, resume) for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        each = count // AT_ONCE

        def work(visitor: Visitor, times: int) -> None:
            for _ in range(times):
                visitor.visit()

        list(pool.map(work, visitors, repeat(1)))
        began = tree_cpu(server.pid)
        list(pool.map(work, visitors, repeat(each)))
    return (tree_cpu(server.pid) - began) * 1e3 / (each * AT_ONCE)


def fetched(
    server: SecurePopdrop, version: ssl.TLSVersion | None, count: int
) -> tuple[float, float, float]:
    """MB/s, the server's processor seconds per GB, and the client's share of its core."""
    visitor = Visitor(server, "drop", version, False)
    began, cpu, own = time.perf_counter(), tree_cpu(server.pid), time.process_time()
    octets = visitor.fetch(count)
    took = time.perf_counter() - began
    used = tree_cpu(server.pid) - cpu
    return octets / 1e6 / took, used * 1e9 / octets, (time.process_time() - own) / took


def _row(title: str, measure: Callable[[], float], runs: int) -> None:
    figures = [measure() for _ in range(runs)]
    print(f"  {title}: {median(figures):.3f} ms CPU a session ({min(figures):.3f} at best)")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tls", description=__doc__)
    parser.add_argument("--sessions", type=int, default=800, metavar="N", help="(%(default)s)")
    parser.add_argument("--messages", type=int, default=10_000, metavar="N", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="(%(default)s)")
    given = parser.parse_args(argv)
    small, _ = tools.spool(messages=MESSAGES)
    drop, _ = tools.spool(messages=given.messages)
    users = [f"s{number}" for number in range(AT_ONCE)]
    for sort in KEYS:
        kind = type("Server", (SecurePopdrop,), {"sort": sort})
        with serving([*users, "drop"], kind) as server:
            for user in users:
                server.place(small, user)
            server.place(drop, "drop")
            print(sort)
            _row("session-plain", lambda: sessions(server, None, False, given.sessions), given.runs)
            for name, version in VERSIONS.items():
                for resume in (False, True):
                    _row(
                        f"session-tls{'-resumed' * resume}, TLS {name}",
                        lambda: sessions(server, version, resume, given.sessions),  # noqa: B023
                        given.runs,
                    )
            for title, tls in (("retr-32 (this client)", None), ("retr-32-tls", VERSIONS["1.3"])):
                fetched(server, tls, given.messages)
                rates = [fetched(server, tls, given.messages) for _ in range(given.runs)]
                speed, cost, share = (median(column) for column in zip(*rates, strict=True))
                print(f"  {title}: {speed:.0f} MB/s, {cost:.2f} CPU s/GB; client {share:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
