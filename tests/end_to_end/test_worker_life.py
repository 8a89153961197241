"""`--workers`: who starts them and ends them, what systemd is told, and counts and lines of all."""

from __future__ import annotations

import contextlib
import json
import os
import poplib
import re
import select
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from twisted.internet.address import IPv4Address

from popdrop.throttle import Shared
from tests.end_to_end.harness import DEADLINE, Twistd, mail
from tests.end_to_end.test_server import Wire
from tests.end_to_end.test_workers import SERVES, WorkerCase, children, ends

HERE = IPv4Address("TCP", "127.0.0.1", 1)


class Systemd:
    """The other end of NOTIFY_SOCKET, and who has sent what."""

    def __init__(self, case: WorkerCase) -> None:
        self.path = str(case.folder.path / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        case.addCleanup(self._socket.close)
        self._socket.settimeout(DEADLINE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self.path)
        self.senders: set[int] = set()

    def next(self) -> bytes:
        """One datagram."""
        room = socket.CMSG_SPACE(struct.calcsize("3i"))
        words, controls, _, _ = self._socket.recvmsg(200, room)
        self.senders.add(struct.unpack("3i", controls[0][2])[0])
        return words

    def word(self) -> bytes:
        """The next that is no sign of life."""
        while (words := self.next()) == b"WATCHDOG=1":
            pass
        return words

    def waiting(self) -> list[bytes]:
        """All that has come by now."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self.next())
        return found


class NotifyTests(WorkerCase):
    """`Type=notify` with `NotifyAccess=main`: what others than the main process send is ignored."""

    def begin(self, watchdog: float, *options: str) -> Twistd:
        self.systemd = Systemd(self)
        variables = {
            "NOTIFY_SOCKET": self.systemd.path,
            "WATCHDOG_USEC": str(int(watchdog * 1e6)),
        }
        server = self.serve(*options, variables=variables)
        # Signs of life come before it, but nothing else.
        self.assertEqual(self.systemd.word(), b"READY=1")
        return server

    def test_life(self) -> None:
        server = self.begin(1.0)
        # Not before all of them serve.
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{number}").quit()
        self.assertEqual(self.systemd.next(), b"WATCHDOG=1")
        server.process.send_signal(signal.SIGHUP)
        self.assertEqual(self.systemd.word().split(b"\n")[0], b"RELOADING=1")
        self.assertEqual(self.systemd.word(), b"READY=1")
        watches = [self.watch(pid) for pid in children(server.process.pid)]
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(self.systemd.word(), b"STOPPING=1")
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
        for watch in watches:
            self.assertTrue(ends(watch))
        self.assertNotIn(b"STOPPING=1", self.systemd.waiting())
        self.assertEqual(self.systemd.senders, {server.process.pid})

    def test_no_sign_of_life_without_workers(self) -> None:
        """They end at once again and again: later each time, and systemd hears nothing."""
        server = self.begin(2.0)
        accounts, hidden = self.folder.accounts, self.folder.state / "hidden"
        accounts.rename(hidden)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        pauses: dict[str, list[str]] = {"0": [], "1": []}
        quiet = False
        while min(map(len, pauses.values())) < 6:
            number, pause = server.wait_for(
                r"worker (\d) pid .* is started in ([0-9.]+) s"
            ).groups()
            pauses[number].append(pause)
            if min(map(len, pauses.values())) and not quiet:
                quiet = True
                self.systemd.waiting()  # what was sent before the end of the last
        for each in pauses.values():
            self.assertEqual(each[:6], ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2"])
        # By now it is due three times.
        self.assertEqual(self.systemd.waiting(), [])
        self.assertIn("accounts.db", "\n".join(server.log))
        # A client waits in the socket meanwhile.
        early = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
        self.addCleanup(early.close)
        hidden.rename(accounts)
        server.wait_for(SERVES)
        self.assertTrue(early.recv(512).startswith(b"+OK"))
        self.assertEqual(self.systemd.next(), b"WATCHDOG=1")

    def test_a_worker_that_hangs(self) -> None:
        server = self.begin(10.0)
        one, two = sorted(self.pids)
        kept = self.login_at(two, "bob")
        os.kill(one, signal.SIGSTOP)
        server.wait_for(rf"worker \d pid {one} gives no sign of life, and is killed")
        new = int(server.wait_for(SERVES)[1])
        self.assertEqual(kept.stat()[0], 3)
        self.pids = {two, new}
        self.login_at(new, "user1").quit()
        # There was one that served all the time.
        self.assertIn(b"WATCHDOG=1", self.systemd.waiting())


class CountTests(WorkerCase):
    def test_failures_at_both(self) -> None:
        server = self.serve("--throttle", "memory")
        for entry in os.scandir(f"/proc/{server.process.pid}/fd"):
            if "popdrop-throttle" in os.readlink(entry.path):
                table = os.open(entry.path, os.O_RDWR)
                break
        else:
            self.fail("the parent has no table")
        shared = Shared.attach(table)
        self.addCleanup(shared.close)
        for number, pid in enumerate(sorted(self.pids), 1):
            self.assertRaises(poplib.error_proto, self.wrong_at, pid, f"wrong {number}")
            self.assertEqual(shared.delay(HERE, b"bob"), number)
        # The same wrong password at the other one is known there.
        self.assertRaises(poplib.error_proto, self.wrong_at, min(self.pids), "wrong 2")
        self.assertEqual(shared.delay(HERE, b"bob"), 2)

    def wrong_at(self, pid: int, words: str) -> None:
        client = self.client_at(pid)
        client.user("bob")
        client.pass_(words)

    def test_a_killed_workers_connections_count_no_more(self) -> None:
        server = self.serve("--throttle", "memory:per-address=2")
        one, two = sorted(self.pids)
        first, second = self.client_at(one), self.client_at(two)
        self.assertRaises(poplib.error_proto, server.client)
        os.kill(one, signal.SIGKILL)
        new = int(server.wait_for(SERVES)[1])
        self.pids = {two, new}
        self.assertRaises((poplib.error_proto, ConnectionResetError), first.noop)
        self.assertEqual(len(self.client_at(new).welcome.split(b"<")), 2)
        self.assertRaises(poplib.error_proto, server.client)
        second.close()


class LineTests(WorkerCase):
    sessions = 60

    def test_none_is_mixed_with_another(self) -> None:
        """One file, one descriptor and the log of all, while sessions run at both at once."""
        path = self.folder.path / "sessions"
        logs = (f"json:{path}", "json:fd=1", "plain")
        server = self.serve(*(word for log in logs for word in ("--session-log", log)))

        # A user for each thread, so that none finds his maildrop in use.
        def sessions(thread: int) -> None:
            for _ in range(self.sessions // 6):
                client = server.client()
                client.user(f"user{thread}")
                client.pass_("hunter2")
                client.quit()

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(sessions, range(6)))
        for pid in self.pids:
            self.login_at(pid, "user7").quit()
        lines = server.stop().splitlines()
        total = self.sessions + len(self.pids)
        in_file = [json.loads(line) for line in path.read_text().splitlines()]
        on_descriptor = [json.loads(line) for line in lines if line.startswith("{")]
        in_log = [line for line in lines if re.search(r'#info\] login user="user\d"', line)]
        for rows in (in_file, on_descriptor):
            self.assertEqual(sum(row["event"] == "login" for row in rows), total)
            self.assertEqual(sum(row["event"] == "end" for row in rows), total)
        self.assertEqual(len(in_log), total)
        # And no line of the log is anything else than one of them or begins without a time.
        for line in lines:
            self.assertRegex(line, r"\A(\{.*\}|\d{4}-\d\d-\d\dT[0-9:+-]+ \[.*)\Z")


class SignalTests(WorkerCase):
    def test_interrupt(self) -> None:
        """^C at the terminal: workers, in sessions of their own, are told by the parent."""
        server = self.serve()
        self.stops(server, partial(os.killpg, server.process.pid), signal.SIGINT)

    def test_hangup_of_a_worker_and_of_all(self) -> None:
        """A service manager may signal all processes at once: `systemctl kill -s HUP`."""
        server = self.serve()
        for pid in (*self.pids, server.process.pid):
            os.kill(pid, signal.SIGHUP)
        for _ in range(1 + self.workers):
            server.wait_for("opening the session logs anew")
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{number}").quit()
        self.assertEqual(children(server.process.pid), self.pids)

    def test_all_are_ended_at_once(self) -> None:
        """systemd's `KillMode=control-group` says SIGTERM to all: no new worker is started."""
        server = self.serve()
        watches = [self.watch(pid) for pid in self.pids]
        for pid in (server.process.pid, *self.pids):
            os.kill(pid, signal.SIGTERM)
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
        for watch in watches:
            self.assertTrue(ends(watch))
        self.assertNotIn("Traceback", server.stop())

    def test_a_second_signal_ends_the_grace(self) -> None:
        """As with one process; and the signal that says stop to all at once is no second one."""
        body = (b"y" * 76 + b"\n") * 200_000
        self.folder.spool("bob", mail(1, body))
        server = self.serve("--grace", str(10 * DEADLINE))
        watches = [self.watch(pid) for pid in self.pids]
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"USER bob\r\nPASS hunter2\r\nRETR 1\r\n")
        for _ in range(3):
            self.assertTrue(wire.line().startswith(b"+OK"))
        for pid in (server.process.pid, *self.pids):
            os.kill(pid, signal.SIGTERM)
        server.wait_for("Received SIGTERM|shutting down")
        for pid in self.pids:
            # A worker without a session may have ended by now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while wire.line() != b"\r\n":
            pass
        for _ in range(100_000):
            self.assertEqual(wire.line(), b"y" * 76 + b"\r\n")
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)
        for watch in watches:
            self.assertTrue(ends(watch))
        self.assertNotIn(b"\r\n.\r\n", wire.rest())

    def test_nothing_is_left_of_a_killed_parent(self) -> None:
        """Nor are its port and its spools taken: another serves at once."""
        server = self.serve()
        watches = [self.watch(pid) for pid in self.pids]
        self.login_at(min(self.pids), "bob")
        server.kill()
        for watch in watches:
            self.assertTrue(ends(watch))
        self.serve(listen=(f"tcp:{server.port}:interface=127.0.0.1",))
        self.assertEqual(self.login("bob").stat()[0], 3)
        self.assertEqual([p.name for p in Path(self.folder.spools).glob("*.lock")], [])
