"""`python -m benchmarks.idle`: what a connection costs that does nothing, and 11,000 of them.

- Memory of the server for a connection before its login, logged in with an empty maildrop, both
  over TLS, and after LIST, UIDL and a RETR in one of `MESSAGES` messages: the resident and the
  proportional set (`smaps_rollup`, proc(5)) of its process with so many connections, less the same
  with `WARM` of them, divided. The kernel's own memory for a socket is not in it.
- 10,000 plain connections and 1,000 of TLS, held at once, and meanwhile the round trips of CAPA of
  another session: before, while they come, and while they stay.

The clients come from many addresses of 127.0.0.0/8, so that neither ports nor the throttle's limit
for one address matter. Their descriptors and the server's need a limit of open files (`ulimit -Hn`)
above 20,000; what cannot be had is cut down, and said.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import re
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.process import Failed, tree_cpu
from benchmarks.scene import serving
from benchmarks.secure import SecurePopdrop

WARM = 200
"""Connections that are there before the first measurement: all has been used once, and stays so."""
MESSAGES = 10
OF_ONE_ADDRESS = 40
"""Clients with one address; the throttle's default limit is 50."""
OPEN_FILES = 40_000
SPARE_FILES = 500
FILES_OF_A_LOGIN = 3
"""Socket, spool and session lock."""
PATIENCE = 120.0
"""Seconds after which a client gives up; no figure depends on it."""
PAUSE = 0.002
"""Seconds between two questions of the other session."""

_ADD_USERS = """\
import sys
from popdrop.accounts.database import AccountsDatabase
from popdrop.values import Secret
path, users = sys.argv[1], int(sys.argv[2])
AccountsDatabase.create(path)
database = AccountsDatabase(path)
secret = Secret(sys.stdin.buffer.read())
for number in range(users):
    database.add(b"u%d" % number, None, secret)
database.close()
"""


class IdlePopdrop(SecurePopdrop):
    """With limits above what is held here, and accounts of APOP alone, which are quickly made."""

    sort = "ECDSA P-256"

    def prepare(self, users: Sequence[str]) -> None:
        super().prepare([])
        subprocess.run(
            [
                sys.executable,
                "-c",
                _ADD_USERS,
                str(self.folder / "state/users.db"),
                str(len(users)),
            ],
            input=self.password.encode(),
            env=self._environment(),
            check=True,
        )
        self.more_options += ("--throttle", "memory:total=100000", "--login-timeout", "3600")
        self.more_options += ("--idle-timeout", "3600")


def memory(pid: int) -> tuple[int, int]:
    """Octets of the resident and the proportional set of a process."""
    found = {}
    for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()[1:]:
        name, octets = line.split()[:2]
        found[name] = int(octets) * 1024
    return found["Rss:"], found["Pss:"]


def answer(client: socket.socket) -> None:
    """Read a multi-line answer."""
    octets = b""
    while not octets.endswith(b"\r\n.\r\n"):
        more = client.recv(65_536)
        if not more or octets[:4] == b"-ERR":
            raise Failed("no answer")
        octets += more


class Crowd:
    """Clients that stay. `secure`: on the TLS port; `log_in`: each as a user of its own.

    `work`: each looks through its maildrop before it falls silent.
    """

    def __init__(
        self,
        server: IdlePopdrop,
        network: int,
        secure: bool = False,
        log_in: bool = False,
        work: bool = False,
    ) -> None:
        self._server = server
        self._network = network
        self._secure = secure
        self._log_in = log_in
        self._work = work
        self._clients: list[socket.socket] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def grow(self, count: int) -> None:
        """Until there are so many, one after the other."""
        while len(self._clients) < count:
            self._clients.append(self._come(len(self._clients)))

    def _come(self, number: int) -> socket.socket:
        block, low = divmod(number // OF_ONE_ADDRESS, 250)
        address = (f"127.{self._network}.{block}.{1 + low}", 0)
        port = self._server.tls_port if self._secure else self._server.port
        client: socket.socket = socket.create_connection(("127.0.0.1", port), PATIENCE, address)
        if self._secure:
            client = self._context.wrap_socket(client)
        challenge = re.search(rb"<[^>]+>", client.recv(512))
        if challenge is None:
            raise Failed(f"client {number} was not greeted")
        if self._log_in:
            digest = hashlib.md5(
                challenge[0] + self._server.password.encode(), usedforsecurity=False
            ).hexdigest()
            client.sendall(f"APOP u{number} {digest}\r\n".encode())
            if not client.recv(512).startswith(b"+OK"):
                raise Failed(f"client {number} could not log in")
        if self._work:
            for command in (b"LIST\r\n", b"UIDL\r\n", b"RETR 1\r\n"):
                client.sendall(command)
                answer(client)
        return client


def costs(count: int, secure: bool, log_in: bool, work: bool) -> str:
    """A line: memory of one of `count` connections."""
    users = [f"u{number}" for number in range(WARM + count)] if log_in else []
    with ExitStack() as stack:
        server = stack.enter_context(serving(users, IdlePopdrop))
        if work:
            small = server.folder / "small"
            small.write_bytes(b"".join(message(number) for number in range(MESSAGES)))
            for user in users:
                server.place(small, user)
        crowd = stack.enter_context(Crowd(server, 1, secure, log_in, work))
        crowd.grow(WARM)
        before = memory(server.pid)
        crowd.grow(WARM + count)
        after = memory(server.pid)
    rss, pss = ((late - early) / count / 1024 for early, late in zip(before, after, strict=True))
    kind = "logged in" if log_in else "before login"
    kind += f", {MESSAGES} messages, after LIST, UIDL, RETR" * work
    base = f"{before[0] / 2**20:.1f} MiB with {WARM}, {after[0] / 2**20:.1f} with {WARM + count}"
    where = "TLS" if secure else "plain"
    return f"{where}, {kind}: {rss:.2f} KiB RSS, {pss:.2f} KiB PSS each ({base})"


def message(number: int) -> bytes:
    """A short mail in a spool."""
    return (
        b"From alice@example.org Sun Nov 22 10:00:00 2026\nFrom: <alice@example.org>\n"
        b"Subject: mail %d\n\nA line of text.\n\n" % number
    )


def watch(port: int, control: Connection) -> None:
    """CAPA after CAPA until told to stop; at each word, what was seen since the one before."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.recv(512)
        seen: list[float] = []
        while True:
            began = time.perf_counter()
            client.sendall(b"CAPA\r\n")
            answer(client)
            seen.append((time.perf_counter() - began) * 1e3)
            if control.poll(PAUSE):
                control.send(seen)
                seen = []
                if control.recv() == "stop":
                    return


def _told(control: Connection, what: str, word: str = "") -> None:
    control.send(word)
    seen = sorted(control.recv())
    p99 = seen[len(seen) * 99 // 100]
    print(f"  {what}: median {seen[len(seen) // 2]:.2f} ms, p99 {p99:.2f}, max {seen[-1]:.2f}")


def hold(plain: int, secure: int) -> None:
    """All at once, with another session that goes on."""
    with ExitStack() as stack:
        server = stack.enter_context(serving([], IdlePopdrop))
        control, others = multiprocessing.Pipe()
        watcher = multiprocessing.Process(target=watch, args=(server.port, others), daemon=True)
        watcher.start()
        before = memory(server.pid)
        time.sleep(1)
        print(f"{plain} plain and {secure} TLS connections at once; answers to another's CAPA:")
        _told(control, "before")
        began, cpu = time.perf_counter(), tree_cpu(server.pid)
        for network, (number, is_secure) in enumerate(((plain, False), (secure, True)), 1):
            stack.enter_context(Crowd(server, network, is_secure)).grow(number)
        took = time.perf_counter() - began
        _told(control, f"while they come ({took:.1f} s)")
        cpu = tree_cpu(server.pid) - cpu
        began, idle = time.perf_counter(), tree_cpu(server.pid)
        time.sleep(3)
        _told(control, "while they stay", "stop")
        idle = (tree_cpu(server.pid) - idle) / (time.perf_counter() - began)
        after = memory(server.pid)
        print(
            f"  {before[0] / 2**20:.1f} MiB before, {after[0] / 2**20:.1f} with all;"
            f" {cpu:.1f} s CPU for their coming, {idle:.1%} of a core with the watcher alone"
        )
        watcher.join()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=__doc__)
    parser.add_argument("--count", type=int, default=5000, metavar="N", help="(%(default)s)")
    parser.add_argument("--tls", type=int, default=1000, metavar="N", help="(%(default)s)")
    parser.add_argument("--held", type=int, default=10_000, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--only", choices=("plain", "login", "work", "tls", "tls-login", "held"), help="(all)"
    )
    given = parser.parse_args(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, max(hard, OPEN_FILES)))
        hard = max(hard, OPEN_FILES)
    except ValueError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = hard - SPARE_FILES
    sessions = min(given.count, most // FILES_OF_A_LOGIN - WARM)
    kinds = {
        "plain": (min(given.count, most - WARM), False, False, False),
        "login": (sessions, False, True, False),
        "work": (sessions, False, True, True),
        "tls": (given.tls, True, False, False),
        "tls-login": (given.tls, True, True, False),
    }
    for name, of_what in kinds.items():
        if given.only in (None, name):
            print(costs(*of_what), flush=True)
    if given.only in (None, "held"):
        hold(min(given.held, most - given.tls), given.tls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
