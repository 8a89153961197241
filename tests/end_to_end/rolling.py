"""Servers that follow one another under load, on sockets that stay: who loses what?

    python -m tests.end_to_end.rolling                    # 50 restarts, about two minutes
    python -m tests.end_to_end.rolling --restarts 500

Prints the counts, and fails where one is not zero that has to be. The suite runs a short form.

Mail is delivered to every maildrop all the time, by a program that takes fcntl and dot-lock. The
clients know mails by their unique-ids, as mail programs that leave mail on the server do: one is
fetched once, and marked again where a QUIT was not answered.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from hashlib import md5
from random import Random
from typing import Any

from popdrop import certs
from tests.end_to_end import deliverer
from tests.end_to_end.harness import DEADLINE, ROOT, Folder, mail
from tests.end_to_end.supervised import Door, Served
from tests.end_to_end.test_delivery import Delivering

SECRET = "a shared secret of theirs"
FAREWELL = b"-ERR [SYS/TEMP] server is shutting down\r\n"
BOXES = 6
"""Maildrops with a client and a deliverer each, every third over TLS. Every second client idles now
and then until the server ends it; the others see to it that there is always a session."""
SESSIONS = 20
"""Sessions of theirs that a server has served before it is told to stop."""
WAITERS = 20
"""Clients that connect while there is no server."""
ORDER_SECONDS = 0.1
"""Between two mails to a maildrop, so that deliveries and sessions meet and the disk keeps up."""
LARGE_LINES = 200_000
"""Lines of the mail that is being fetched at each stop: 16 MB, more than all buffers hold."""


@dataclass
class Counts:
    """What came of it. Those in `MUST_BE_NONE` are faults."""

    restarts: int = 0
    sessions: int = field(default=0, metadata={"help": "greeted"})
    finished: int = field(default=0, metadata={"help": "of these to their own QUIT, answered"})
    told: int = field(default=0, metadata={"help": "of these ended by the server's farewell"})
    in_flight: int = field(default=0, metadata={"help": "RETRs across a stop, whole"})
    waited: int = field(default=0, metadata={"help": "connected while there was no server"})
    delivered: int = field(default=0, metadata={"help": "mails"})
    fetched: int = field(default=0, metadata={"help": "of these, each once"})
    marked_again: int = field(default=0, metadata={"help": "marked in more than one session"})
    later: int = field(default=0, metadata={"help": "RETRs put off, as the spool changed"})
    refused: int = field(default=0, metadata={"help": "no connection"})
    ungreeted: int = field(default=0, metadata={"help": "closed or reset before a greeting"})
    unlucky: int = field(default=0, metadata={"help": "logins not let in, but for the farewell"})
    cut: int = field(default=0, metadata={"help": "ended without a word"})
    damaged: int = field(default=0, metadata={"help": "mails that are not what was delivered"})
    lost: int = field(default=0, metadata={"help": "mails neither fetched nor in the maildrop"})
    doubled: int = field(default=0, metadata={"help": "mails with two unique-ids"})
    back: int = field(default=0, metadata={"help": "mails that came back after a good QUIT"})
    complaints: int = field(default=0, metadata={"help": "tracebacks in logs"})

    def table(self) -> str:
        """A line for each."""
        rows = ((each.name, getattr(self, each.name), each.metadata) for each in fields(self))
        return "\n".join(f"{name:>13} {n:7}  {more.get('help', '')}" for name, n, more in rows)

    def faults(self) -> dict[str, int]:
        """Those that are not zero and have to be."""
        return {name: n for name in MUST_BE_NONE if (n := getattr(self, name))}


MUST_BE_NONE = (
    *("refused", "ungreeted", "unlucky", "cut", "later"),
    *("damaged", "lost", "doubled", "back", "complaints"),
)


class Ended(Exception):
    """The server has ended the session, with its farewell."""


class Cut(Exception):
    """The connection is gone, and nothing was said."""


class Client:
    """One session. Raises `ConnectionError` where there is none, else `Ended` and `Cut`."""

    def __init__(self, port: int, tls: ssl.SSLContext | None) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self._tls = tls
        self._file: Any = None

    def greeted(self) -> bytes:
        """The greeting, without which nothing has begun; b"": there was none."""
        try:
            if self._tls is not None:
                self.socket = self._tls.wrap_socket(self.socket, server_hostname="localhost")
            self._file = self.socket.makefile("rb")
            line = self._file.readline()
        except OSError:
            return b""
        assert isinstance(line, bytes)
        return line

    def line(self) -> bytes:
        try:
            line = self._file.readline()
        except OSError:
            line = b""
        if line == FAREWELL:
            raise Ended
        if not line.endswith(b"\r\n"):
            raise Cut
        assert isinstance(line, bytes)
        return line

    def ask(self, command: str) -> bytes:
        """The first line of the answer."""
        with suppress(OSError):  # what the server said before it closed can still be read
            self.socket.sendall(f"{command}\r\n".encode())
        return self.line()

    def answered(self, command: str) -> None:
        """A command that has to succeed."""
        answer = self.ask(command)
        if not answer.startswith(b"+OK"):
            raise AssertionError(f"{command}: {answer!r}")

    def rows(self) -> list[bytes]:
        """The rest of an answer of many lines."""
        rows = []
        while (line := self.line()) != b".\r\n":
            rows.append(line)
        return rows

    def login(self, name: str, greeting: bytes) -> bytes:
        """By APOP, which costs no time."""
        challenge = greeting[greeting.index(b"<") : greeting.index(b">") + 1]
        digest = md5(challenge + SECRET.encode(), usedforsecurity=False).hexdigest()
        return self.ask(f"APOP {name} {digest}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self.socket.close()


class Rolling:
    """All of it, for so many restarts."""

    def __init__(self, case: Any, restarts: int) -> None:
        self.case = case
        self.addCleanup = case.addCleanup
        self.restarts = restarts
        self.counts = Counts()
        self.changed = threading.Condition()
        self.finishing = False
        self.broken: list[BaseException] = []
        self.folder = Folder(case)
        certs.self_made(str(self.folder.state), "localhost")
        self.pem = f"{self.folder.state}/self-made.pem"
        self.door = Door(case, ("127.0.0.1", 0), ("127.0.0.1", 0))
        self.boxes = [Box(self, number) for number in range(BOXES)]
        for name in ("large", "marked"):
            self.folder.add(name, apop=SECRET)
        self.body = b"".join(b"%07d %s\n" % (n, b"x" * 70) for n in range(LARGE_LINES))
        self.folder.spool("large", mail(1, self.body))
        self.folder.spool("marked", mail(1) + mail(2))

    def count(self, name: str, more: int = 1) -> None:
        with self.changed:
            setattr(self.counts, name, getattr(self.counts, name) + more)
            self.changed.notify_all()

    def wait_for(self, enough: Callable[[], bool]) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.broken or enough(), DEADLINE)
            if self.broken:
                raise AssertionError("a client gave up") from self.broken[0]
            if not done:
                raise AssertionError(f"no progress:\n{self.counts.table()}")

    def connect(self, tls: bool) -> tuple[Client, bytes] | None:
        """A session with its greeting; all that goes wrong is counted."""
        context = ssl.create_default_context(cafile=self.pem) if tls else None
        try:
            client = Client(self.door.ports[tls], context)
        except OSError:
            self.count("refused")
            return None
        greeting = client.greeted()
        if not greeting.startswith(b"+OK "):
            self.count("ungreeted")
            client.close()
            return None
        self.count("sessions")
        return client, greeting

    def entered(self, name: str, tls: bool = False) -> Client | None:
        """A session that is logged in; `None`: the server stops."""
        begun = self.connect(tls)
        if begun is None:
            return None
        client, greeting = begun
        try:
            if client.login(name, greeting).startswith(b"+OK"):
                return client
            self.count("unlucky")
        except Ended:
            self.count("told")
        except Cut:
            self.count("cut")
        client.close()
        return None

    def served(self) -> Served:
        pem = self.pem
        return Served(
            self.case,
            self.folder,
            self.door,
            ("systemd:domain=INET:index=0", f"systemd:domain=INET:index=1:tls={pem}"),
            "--lock-timeout",
            "100",
        )

    def run(self) -> Counts:
        server = self.served()
        threads = [threading.Thread(target=box.run, daemon=True) for box in self.boxes]
        threads.append(threading.Thread(target=self.order, daemon=True))
        for thread in threads:
            thread.start()
        for _ in range(self.restarts):
            server = self.restart(server)
            self.count("restarts")
        with self.changed:
            self.finishing = True
        for thread in threads:
            thread.join(DEADLINE)
        self.wait_for(lambda: True)
        for box in self.boxes:
            box.account()
        self.said(server)
        return self.counts

    def order(self) -> None:
        """Have mail delivered to everybody, whatever the servers do."""
        while not self.finishing:
            for box in self.boxes:
                box.order()
            threading.Event().wait(ORDER_SECONDS)

    def restart(self, server: Served) -> Served:
        """One server ends, and another begins."""
        seen = self.counts.sessions
        self.wait_for(lambda: self.counts.sessions >= seen + SESSIONS)
        large, marked = self.entered("large"), self.entered("marked")
        assert large is not None and marked is not None
        head = large.ask("RETR 1")
        marked.answered("DELE 1")
        server.process.send_signal(signal.SIGTERM)
        try:
            # The farewell, and so the stop has begun, while there is more to come than is sent.
            marked.line()
        except Ended:
            self.count("told")
        octets = b"".join(large.rows())
        whole = head == b"+OK %d octets\r\n" % len(octets) and self.body in octets.replace(
            b"\r\n", b"\n"
        )
        self.count("in_flight" if whole else "damaged")
        try:
            large.line()
        except Ended:
            self.count("told")
        for each in (large, marked):
            each.close()
        server.process.wait(DEADLINE)
        self.said(server)
        waiters = [Client(self.door.ports[n % 2], None) for n in range(WAITERS)]
        following = self.served()
        for number, waiter in enumerate(waiters):
            waiter._tls = ssl.create_default_context(cafile=self.pem) if number % 2 else None
            if waiter.greeted().startswith(b"+OK ") and waiter.ask("QUIT").startswith(b"+OK "):
                self.count("waited")
            else:
                self.count("ungreeted")
            waiter.close()
        return following

    def said(self, server: Served) -> None:
        self.count("complaints", server.stop().count("Traceback"))


class Box:
    """A maildrop, its deliverer and its client."""

    def __init__(self, rolling: Rolling, number: int) -> None:
        self.rolling = rolling
        self.name = name = f"box{number}"
        self.tls = number % 3 == 2
        self.idles = number % 2 == 0
        rolling.folder.add(name, apop=SECRET)
        self.spool = rolling.folder.spool(name, b"")
        style = ("fcntl-dot", "dot-fcntl")[number % 2]
        program = str(ROOT / "tests" / "end_to_end" / "deliverer.py")
        words = [sys.executable, program, style, str(self.spool)]
        self.mails = Delivering(rolling, words, f"{name}.err")
        self.ordered = 0
        self.random = Random(name)
        self.kept: dict[bytes, int] = {}
        self.marked: set[bytes] = set()
        self.gone: set[bytes] = set()

    def order(self) -> None:
        if self.ordered - len(self.mails.numbers) < 5:
            self.mails.order(1)
            self.ordered += 1

    def run(self) -> None:
        try:
            while not self.rolling.finishing:
                self.session()
        except BaseException as error:
            with self.rolling.changed:
                self.rolling.broken.append(error)
                self.rolling.changed.notify_all()

    def session(self) -> int:
        """How many mails were there."""
        rolling = self.rolling
        client = rolling.entered(self.name, self.tls)
        if client is None:
            return 0
        there = 0
        try:
            there = self.fetch(client)
            if self.idles and self.random.random() < 0.1:
                self.wait_for_the_end(client)
            marked = self.there & self.marked
            answer = client.ask("QUIT")
            rolling.count("finished" if answer.startswith(b"+OK") else "unlucky")
            self.gone |= marked if answer.startswith(b"+OK") else set()
        except Ended:
            rolling.count("told")
        except Cut:
            rolling.count("cut")
        finally:
            client.close()
        return there

    def fetch(self, client: Client) -> int:
        """What is new, and mark all that has been fetched."""
        client.answered("UIDL")
        listed = [row.split() for row in client.rows()]
        self.there = {uid for _, uid in listed}
        self.rolling.count("back", len(self.there & self.gone))
        for number, uid in listed:
            if uid not in self.kept:
                answer = client.ask(f"RETR {int(number)}")
                if answer.startswith(b"-ERR [SYS/TEMP] "):
                    self.rolling.count("later")  # the spool changes faster than it can be read
                    continue
                rows = [row[1:] if row.startswith(b".") else row for row in client.rows()]
                text = b"".join(rows).replace(b"\r\n", b"\n")
                which = deliverer.number_of(text)
                if text != deliverer.text(which):
                    self.rolling.count("damaged")
                self.kept[uid] = which
                self.rolling.count("fetched")
            elif uid in self.marked:
                self.rolling.count("marked_again")
            client.answered(f"DELE {int(number)}")
            self.marked.add(uid)
        return len(listed)

    def wait_for_the_end(self, client: Client) -> None:
        """Idle as a client that looks for mail every minute; raises what it is told."""
        while not self.rolling.finishing:
            if select.select([client.socket], [], [], 0.05)[0]:
                client.line()

    def account(self) -> None:
        """At the end, when nobody restarts anything: empty the maildrop, and compare."""
        delivered = self.mails.finish()
        while self.session():
            pass
        left = self.spool.read_bytes()
        kept = list(self.kept.values())
        self.rolling.count("delivered", len(delivered))
        self.rolling.count("lost", len(set(delivered) - set(kept)))
        self.rolling.count("doubled", len(kept) - len(set(kept)))
        self.rolling.count("damaged", bool(left) + len(set(kept) - set(delivered)))


class Case:
    """What `Folder` and `Twistd` need of a test case."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def addCleanup(self, work: Callable[..., object], *arguments: object) -> None:
        self._stack.callback(work, *arguments)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.rolling")
    parser.add_argument("--restarts", type=int, default=50)
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        counts = Rolling(Case(stack), options.restarts).run()
    print(counts.table())
    faults = counts.faults()
    print(f"FAULTS: {faults}" if faults else "nothing was lost")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
