"""Signals, and servers that follow one another on sockets that stay: nobody is turned away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import poplib
import re
import select
import signal
import socket
import ssl
import stat
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from popdrop import certs
from tests.end_to_end.harness import DEADLINE, Twistd, command, environment, mail
from tests.end_to_end.rolling import FAREWELL, Rolling
from tests.end_to_end.rolling import WAITERS as WAITERS_BETWEEN
from tests.end_to_end.supervised import Door, Served, backlog_limit
from tests.end_to_end.test_listeners import KindCase
from tests.end_to_end.test_server import TLS, ServerCase, Wire
from tests.test_listeners import has_ipv6

WAITERS = 100
"""Twice as many as Twisted lets wait at a Unix socket."""


class SuccessionTests(KindCase):
    """Each kind of socket that systemd hands on, with three servers one after another."""

    def connected(self, family: int, address: object) -> socket.socket:
        made = socket.socket(family)
        self.addCleanup(made.close)
        made.settimeout(DEADLINE)
        made.connect(address)  # type: ignore[arg-type]
        return made

    def greeted(self, connection: socket.socket, tls: bool) -> None:
        if tls:
            connection = self.trusting().wrap_socket(connection, server_hostname="localhost")
        with connection, connection.makefile("rb") as file:
            self.assertEqual(file.readline()[:4], b"+OK ")
            connection.sendall(b"QUIT\r\n")
            self.assertEqual(file.readline()[:4], b"+OK ")

    def follow(self, door: Door, listen: str, tls: bool = False) -> None:
        address, family = door.sockets[0].getsockname(), door.sockets[0].family
        address = address[:2] if isinstance(address, tuple) else address
        waiters: list[socket.socket] = []
        for generation in range(3):
            server = Served(self, self.folder, door, (listen,), "--cleartext", "always")
            for waiter in waiters:
                # They came when there was no server.
                self.greeted(waiter, tls)
            self.session(self.connected(family, address), self.trusting() if tls else None)
            said = server.stop()
            self.assertNotIn("Traceback", said)
            self.assertEqual(server.process.returncode, -signal.SIGTERM)
            if not generation:
                waiters = [self.connected(family, address) for _ in range(WAITERS)]
            else:
                waiters = []

    def test_inet(self) -> None:
        self.follow(Door(self, ("127.0.0.1", 0)), "systemd:domain=INET:index=0")

    def test_inet6(self) -> None:
        if has_ipv6():
            self.follow(Door(self, ("::1", 0)), "systemd:domain=INET6:name=pop3")

    def test_tls(self) -> None:
        door = Door(self, ("127.0.0.1", 0))
        self.follow(door, f"systemd:domain=INET:index=0:tls={self.pem}", tls=True)
        self.assertGreaterEqual(backlog_limit(door.sockets[0]), 128)

    def test_unix(self) -> None:
        """Its path and its mode are systemd's, and stay what they were."""
        path = str(self.folder.path / "pop3.socket")
        door = Door(self, path)
        before = os.stat(path)
        self.follow(door, "systemd:domain=UNIX:index=0")
        after = os.stat(path)
        self.assertEqual((after.st_ino, after.st_mode), (before.st_ino, before.st_mode))
        self.assertTrue(stat.S_ISSOCK(after.st_mode))


class RollingTests(SynchronousTestCase):
    """The short form of `tests.end_to_end.rolling`, which says what it does."""

    def test_no_client_and_no_mail_is_lost(self) -> None:
        counts = Rolling(self, restarts=2).run()
        self.assertEqual(counts.faults(), {}, counts.table())
        self.assertEqual(counts.finished + counts.told, counts.sessions)
        self.assertEqual((counts.in_flight, counts.waited), (2, 2 * WAITERS_BETWEEN))
        self.assertGreaterEqual(counts.told, 2 * counts.in_flight)
        self.assertGreaterEqual(counts.delivered, counts.fetched)
        self.assertGreater(counts.fetched, 0)


class DaemonTests(ServerCase):
    """`twistd popdrop` without `-n`, as an init script starts it and as one signals it."""

    def test_signals(self) -> None:
        folder = self.folder.path
        notices, pidfile, door = (folder / name for name in ("notices", "popdrop.pid", "door"))
        refused = folder / "refused"
        refused.write_text("")
        systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(systemd.close)
        systemd.settimeout(DEADLINE)
        systemd.bind(str(notices))
        before = everything(folder)
        words = command(
            self.folder,
            *("--nonauth-file", str(refused)),
            listen=("tcp:0:interface=127.0.0.1", f"unix:{door}"),
            daemon=("--pidfile", str(pidfile), "--logfile", str(folder / "log")),
        )
        words.remove("-n")
        # The one that is started ends as soon as its child serves.
        subprocess.run(
            words,
            cwd=folder,
            env=environment(folder) | {"NOTIFY_SOCKET": str(notices)},
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE,
            check=True,
        )
        pid = int(pidfile.read_text())
        alive = os.pidfd_open(pid)
        self.addCleanup(os.close, alive)
        self.addCleanup(kill, alive)
        self.assertEqual(os.getsid(pid), os.getpgid(pid), "no session of its own")
        self.assertEqual(systemd.recv(200), b"READY=1")
        found = re.search(r"POP3 on \S+ port (\d+)", (folder / "log").read_text())
        assert found
        port = int(found[1])
        beside = Wire(self, port)
        beside.send(b"USER bob\r\nPASS hunter2\r\nDELE 1\r\n")
        for _ in range(4):
            self.assertEqual(beside.line()[:3], b"+OK")

        refused.write_text("alice\n")
        os.kill(pid, signal.SIGHUP)
        self.assertEqual(systemd.recv(200)[:11], b"RELOADING=1")
        self.assertEqual(systemd.recv(200), b"READY=1")
        client = poplib.POP3("127.0.0.1", port, timeout=DEADLINE)
        self.assertRaises(poplib.error_proto, client.apop, "alice", "a shared secret of hers")
        client.close()

        os.kill(pid, signal.SIGTERM)
        self.assertEqual(systemd.recv(200), b"STOPPING=1")
        self.assertEqual(beside.rest(), FAREWELL)
        self.assertTrue(select.select([alive], [], [], DEADLINE)[0], "it does not end")
        self.assertNotIn("Traceback", (folder / "log").read_text())
        self.assertEqual(self.spool.read_bytes().count(b"Subject: mail"), 3)
        left = {name for name in everything(folder) - before if not name.startswith("state/")}
        self.assertEqual(left, {"log"})
        self.assertEqual(of_session(pid), [])


def everything(folder: Path) -> set[str]:
    """Names of all that is in a folder, and in those within."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kill(alive: int) -> None:
    """End the process of this descriptor, where it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(alive, signal.SIGKILL)


def of_session(session: int) -> list[int]:
    """PIDs of all processes of a session that have not ended: field 6 of proc_pid_stat(5)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(path.parent.name))
    return found


class StopTests(ServerCase):
    """SIGTERM and SIGINT: no new clients, idle ones are told, what is in progress ends."""

    def logged_in(self, server: Twistd, *commands: bytes) -> Wire:
        wire = Wire(self, server.port)
        wire.send(b"".join((b"USER bob\r\nPASS hunter2\r\n", *commands)))
        for _ in range(3):
            self.assertEqual(wire.line()[:3], b"+OK")
        return wire

    def stops(self, number: signal.Signals) -> None:
        body = b"".join(b"%07d %s\n" % (i, b"x" * 80) for i in range(150_000))
        self.folder.spool("bob", mail(1, body) + mail(2))
        server = self.serve()
        idle = Wire(self, server.port)
        idle.line()
        reading = self.logged_in(server, b"RETR 1\r\n")
        head = reading.line()
        self.assertEqual(head[:4], b"+OK ")
        server.process.send_signal(number)
        self.assertEqual(idle.rest(), FAREWELL)
        # All idle ones have been told: no new one comes in any more.
        self.assertRaises(
            ConnectionRefusedError, socket.create_connection, ("127.0.0.1", server.port)
        )
        received = b"".join(reading.lines())
        self.assertEqual(len(received), int(head.split()[1]) + len(b".\r\n"))
        self.assertEqual(reading.rest(), FAREWELL)
        server.process.wait(DEADLINE)
        said = server.stop()
        self.assertEqual(server.process.returncode, -number)
        self.assertIn("reason=shutdown", said)
        self.assertNotIn("Traceback", said)

    def test_sigterm(self) -> None:
        self.stops(signal.SIGTERM)

    def test_sigint(self) -> None:
        self.stops(signal.SIGINT)

    def stops_without(self, *options: str) -> None:
        """The path of a Unix socket is gone: as little to be removed as one in root's folder."""
        self.folder.spool("bob", mail(1, b"x" * 80 + b"\n") + mail(2))
        path = self.folder.path / "socket"
        given = [each.format(path=path) for each in options]
        server = self.serve(*given, listen=("tcp:0:interface=127.0.0.1",))
        reading = self.logged_in(server, b"RETR 1\r\n")
        reading.line()
        path.unlink()
        server.process.send_signal(signal.SIGTERM)
        reading.lines()
        self.assertEqual(reading.rest(), FAREWELL)
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
        said = server.stop()
        self.assertNotIn("Traceback", said)
        self.assertIn(f"{path}: is left behind: No such file", said)

    def test_a_socket_that_cannot_be_removed(self) -> None:
        self.stops_without("--listen", "unix:{path}")

    def test_a_socket_behind_a_proxy_that_cannot_be_removed(self) -> None:
        self.stops_without("--listen", "haproxy:unix:{path}")

    def test_a_socket_of_the_relay_window_that_cannot_be_removed(self) -> None:
        self.stops_without("--relay", "socketmap:unix:{path}")

    def test_a_deletion_is_awaited_beyond_the_grace(self) -> None:
        """And further signals change nothing."""
        server = self.serve("--hostname", "here.test", "--grace", "0", "--lock-timeout", "100")
        wire = self.logged_in(server, b"DELE 2\r\n")
        self.assertEqual(wire.line()[:3], b"+OK")
        with self.spool.open("r+b") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            wire.send(b"QUIT\r\n")
            idle = Wire(self, server.port)
            idle.line()
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(idle.rest(), FAREWELL)
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                server.process.send_signal(number)
            self.assertIsNone(server.process.poll())
            self.assertEqual(self.spool.read_bytes().count(b"Subject: mail"), 3)
        self.assertEqual(wire.line(), b"+OK Pop server at here.test signing off.\r\n")
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
        said = server.stop()
        self.assertEqual(self.spool.read_bytes(), mail(1) + mail(3))
        self.assertIn("asked to stop once more", said)
        self.assertNotIn("opening the session logs anew", said)
        self.assertNotIn("Traceback", said)

    def test_a_second_signal_ends_the_grace(self) -> None:
        body = b"x" * 80 + b"\n"
        self.folder.spool("bob", mail(1, body * 600_000))
        server = self.serve("--grace", "1000")
        unread = self.logged_in(server, b"RETR 1\r\n")
        self.assertEqual(unread.line()[:4], b"+OK ")
        idle = Wire(self, server.port)
        idle.line()
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(idle.rest(), FAREWELL)
        self.assertIsNone(server.process.poll())
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGINT)
        self.assertFalse(unread.rest().endswith(b"\r\n.\r\n"))
        self.assertNotIn("Traceback", server.stop())

    def test_a_handshake_in_progress_is_finished(self) -> None:
        """Its client was taken, so it is greeted, and told."""
        certs.self_made(str(self.folder.state), "localhost")
        server = self.serve(
            listen=("tcp:0:interface=127.0.0.1", TLS.format(state=self.folder.state))
        )
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
        self.assertRaises(ssl.SSLWantReadError, tls.do_handshake)
        with socket.create_connection(("127.0.0.1", server.ports[1]), DEADLINE) as connection:
            hello = outgoing.read()
            connection.sendall(hello[:100])
            idle = Wire(self, server.port)
            idle.line()
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(idle.rest(), FAREWELL)
            connection.sendall(hello[100:])
            told, more = b"", None
            while more != b"":
                octets = connection.recv(65_536)
                self.assertTrue(octets, told)
                incoming.write(octets)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while more := tls.read():
                        told += more
                connection.sendall(outgoing.read())
        self.assertRegex(told, rb"\A\+OK .*\r\n-ERR \[SYS/TEMP\] server is shutting down\r\n\Z")
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
