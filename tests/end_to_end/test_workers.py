"""`--workers`: several processes behind one socket, under a real `twistd`.

Over 400 lines, since what one process does has to be tried once more with several.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import poplib
import re
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from twisted.trial.unittest import SkipTest

from benchmarks.mechanisms import Client
from popdrop import certs
from tests.end_to_end import test_open_helper
from tests.end_to_end.harness import DEADLINE, ROOT, Folder, Twistd, environment, mail
from tests.end_to_end.test_helper import Helped, facts
from tests.end_to_end.test_server import TLS, ServerCase, Wire
from tests.end_to_end.test_throttle import TURNED_AWAY

SERVES = r"worker \d+ pid (\d+) serves"


def children(pid: int) -> set[int]:
    """Processes that `pid` has started and that have not been waited for (proc(5))."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ends(watch: int) -> bool:
    """Whether the process of a pidfd ends."""
    waiting = select.poll()
    waiting.register(watch, select.POLLIN)
    return bool(waiting.poll(DEADLINE * 1000))


def server_of(client: socket.socket, pids: set[int]) -> int:
    """Which of these processes has the other end of a TCP connection over loopback."""
    ours = client.getsockname()[1]
    inode = ""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].partition(":")[2], 16) == ours and fields[3] == "01":
            inode = fields[9]
    for pid in pids:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return pid
    raise AssertionError(f"{inode} is open in none of {pids}")


def nice(stat: Path) -> int:
    """Field 19 of stat (proc(5)) of a process or thread."""
    return int(stat.read_text().rpartition(")")[2].split()[16])


@contextlib.contextmanager
def alone(pid: int, pids: set[int]) -> Iterator[None]:
    """No other worker of `pids` runs."""
    others = pids - {pid}
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)


def client_at(server: Twistd, pid: int, pids: set[int]) -> poplib.POP3:
    """A connection to this worker of `pids`: no other runs when it comes."""
    with alone(pid, pids):
        client = server.client()
    if server_of(client.sock, pids) != pid:
        raise AssertionError(f"not at {pid}")
    return client


def shown(folder: Folder) -> list[str]:
    """Words before a command so that any user can run this Python, were it in root's home.

    A worker is started with the rights of `--uid`. Where a folder on the way is root's alone, the
    command sees another in its place that holds just what is needed: by a mount namespace.
    """
    hidden: dict[Path, list[Path]] = {}
    for path in {Path(each).resolve() for each in (sys.base_prefix, sys.prefix, ROOT)}:
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                hidden.setdefault(above, []).append(path)
                break
    if os.geteuid() or not hidden:
        return []
    lines = ["set -e"]
    places = itertools.count()
    for above, paths in hidden.items():
        kept = {path: folder.path / f"shown-{next(places)}" for path in paths}
        lines += [f"mkdir -p {place}; mount --bind {path} {place}" for path, place in kept.items()]
        lines += [f"mount -t tmpfs -o mode=755 none {above}"]
        lines += [f"mkdir -p {path}; mount --move {place} {path}" for path, place in kept.items()]
    return ["unshare", "-m", "sh", "-c", "; ".join([*lines, 'exec "$@"']), "sh"]


def may_run(folder: Folder) -> bool:
    """Whether another user can run this Python: not where no file system may be mounted."""
    if os.geteuid():
        return False
    words = ["setpriv", "--reuid=games", "--clear-groups", sys.executable, "-c", "import twisted"]
    done = subprocess.run(
        [*shown(folder), *words],
        cwd="/",
        env=environment(folder.path),
        stderr=subprocess.DEVNULL,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode == 0


class ShownHelped(Helped):
    def around(self) -> list[str]:
        return shown(self.folder) if self.dropped else []


class ShownServer(test_open_helper.Server):
    def around(self) -> list[str]:
        return shown(self.folder)


class WorkerCase(ServerCase):
    workers = 2

    def setUp(self) -> None:
        super().setUp()
        for number in range(8):
            self.folder.add(f"user{number}", password="hunter2")
            self.folder.spool(f"user{number}", mail(1) + mail(2))

    def serve(
        self,
        *options: str,
        listen: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
    ) -> Twistd:
        options = ("--workers", str(self.workers), *options)
        listen = listen or self.listen
        server = Twistd(self, self.folder, *options, listen=listen, variables=variables)
        self.server = server
        self.pids = {int(pid) for pid in re.findall(SERVES, "\n".join(server.log))}
        self.assertEqual(len(self.pids), self.workers)
        self.assertEqual(children(server.process.pid), self.pids)
        return server

    def watch(self, pid: int) -> int:
        watch = os.pidfd_open(pid)
        self.addCleanup(os.close, watch)
        return watch

    def login(self, name: str = "bob") -> poplib.POP3:
        return self.enter(self.server.client(), name)

    def enter(self, client: poplib.POP3, name: str) -> poplib.POP3:
        self.addCleanup(client.close)
        client.user(name)
        client.pass_("hunter2")
        return client

    def login_at(self, pid: int, name: str) -> poplib.POP3:
        """A session at this worker."""
        return self.enter(self.client_at(pid), name)

    def client_at(self, pid: int) -> poplib.POP3:
        client = client_at(self.server, pid, self.pids)
        self.addCleanup(client.close)
        return client

    def stops(self, server: Twistd, send: Callable[[int], None], number: signal.Signals) -> None:
        """At this signal idle clients of all workers are told, and all processes end."""
        watches = [self.watch(pid) for pid in self.pids]
        idle = [self.login_at(pid, f"user{n}") for n, pid in enumerate(self.pids)]
        send(number)
        for client in idle:
            failure = self.assertRaises(poplib.error_proto, client._getresp)
            self.assertIn(b"[SYS/TEMP]", failure.args[0])
        self.assertEqual(server.process.wait(DEADLINE), -number)
        for watch in watches:
            self.assertTrue(ends(watch))


def processors(pid: int) -> dict[str, set[int]]:
    """What each thread may run on, by its number."""
    return {thread: os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def listed(text: str) -> set[int]:
    """The processors of a list as 0-2,4 (cpuset(7), "List format")."""
    ranges = [each.partition("-") for each in text.split(",")]
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}


class Kept(Twistd):
    """On the first two processors at most, of those this process may run on."""

    allowed = sorted(os.sched_getaffinity(0))[:2]

    def around(self) -> list[str]:
        return ["taskset", "-c", ",".join(map(str, self.allowed))]


class ProcessorTests(WorkerCase):
    def _serve(self, *more: str) -> None:
        options = ("--workers", str(self.workers), *more)
        self.server = Kept(self, self.folder, *options)
        self.pids = children(self.server.process.pid)

    def test_one_each(self) -> None:
        """All that shares an interpreter's lock is on one; what makes hashes is on any."""
        self.workers = len(Kept.allowed)
        self._serve()
        found = []
        for number, pid in enumerate(self.pids):
            self.login_at(pid, f"user{number}")
            (own,) = os.sched_getaffinity(pid)
            found.append(own)
            usual = nice(Path(f"/proc/{pid}/stat"))
            nicer = 0
            for thread, some in processors(pid).items():
                hashes = nice(Path(f"/proc/{pid}/task/{thread}/stat")) > usual
                self.assertEqual(some, set(Kept.allowed) if hashes else {own})
                nicer += hashes
            self.assertTrue(nicer)
        self.assertEqual(sorted(found), Kept.allowed)
        self.assertEqual(os.sched_getaffinity(self.server.process.pid), set(Kept.allowed))

    def test_programs_that_verify_run_on_any(self) -> None:
        """And the threads that wait for them, which start them."""
        self.workers = len(Kept.allowed)
        seen = self.folder.path / "seen"
        seen.mkdir()
        program = self.folder.path / "checkpassword"
        words = "grep Cpus_allowed_list /proc/self/status"
        program.write_text(f"#!/bin/sh\n{words} >{seen}/$$ && {words} <&3 >/dev/null\nexit 1\n")
        program.chmod(0o755)
        self._serve("--auth", f"checkpassword:{program}")
        for pid in self.pids:
            client = self.client_at(pid)
            client.user("user0")
            self.assertRaises(poplib.error_proto, client.pass_, "hunter2")
        found = [each.read_text().split()[1] for each in seen.iterdir()]
        self.assertEqual(len(found), self.workers)
        for text in found:
            self.assertEqual(listed(text), set(Kept.allowed))

    def test_a_new_one_has_the_place_of_the_old(self) -> None:
        self.workers = len(Kept.allowed)
        self._serve()
        pid = self.pids.pop()
        place = os.sched_getaffinity(pid)
        os.kill(pid, signal.SIGKILL)
        self.server.wait_for(r"worker \d+ pid \d+ serves")
        (new,) = children(self.server.process.pid) - self.pids
        self.assertEqual(os.sched_getaffinity(new), place)

    def test_more_workers_than_processors(self) -> None:
        self.workers = len(Kept.allowed) + 1
        self._serve()
        for pid in self.pids:
            self.assertEqual(os.sched_getaffinity(pid), set(Kept.allowed))


class ServingTests(WorkerCase):
    def test_sessions_at_each(self) -> None:
        """And the parent serves nobody."""
        self.serve()
        clients = {pid: self.login_at(pid, f"user{n}") for n, pid in enumerate(self.pids)}
        for client in clients.values():
            self.assertEqual(client.stat()[0], 2)
            client.dele(1)
            client.quit()
        for number in range(self.workers):
            again = self.login(f"user{number}")
            self.assertEqual(again.stat()[0], 1)
        log = self.server.stop()
        # One stream: all sessions are in the log of the parent.
        for number in range(self.workers):
            self.assertRegex(log, rf"user{number}\b")
        self.assertEqual(self.server.process.returncode, -signal.SIGTERM)

    def test_a_maildrop_is_held_over_all(self) -> None:
        self.serve()
        one, two = sorted(self.pids)
        first = self.login_at(one, "bob")
        failure = self.assertRaises(poplib.error_proto, self.login_at, two, "bob")
        self.assertTrue(failure.args[0].startswith(b"-ERR [IN-USE]"), failure)
        first.quit()
        self.assertEqual(self.login_at(two, "bob").stat()[0], 3)

    def test_sessions_of_a_user_over_all(self) -> None:
        self.serve("--throttle", "memory:per-user=1")
        one, two = sorted(self.pids)
        first = self.login_at(one, "bob")
        failure = self.assertRaises(poplib.error_proto, self.login_at, two, "bob")
        self.assertIn(b"too many connections of this user", failure.args[0])
        first.quit()

    def test_takeover_over_all(self) -> None:
        self.serve("--takeover", "0.001")
        one, two = sorted(self.pids)
        first = self.login_at(one, "bob")
        second = self.login_at(two, "bob")
        self.assertEqual(second.stat()[0], 3)
        failure = self.assertRaises(poplib.error_proto, first._getresp)
        self.assertIn(b"another session of yours took over", failure.args[0])

    def test_connections_over_all(self) -> None:
        server = self.serve("--throttle", "memory:per-address=2")
        one, two = sorted(self.pids)
        with contextlib.ExitStack() as stack:
            for other in (one, two):
                os.kill(other, signal.SIGSTOP)
                client = stack.enter_context(Client(server.port))
                self.assertTrue(client.greeting.startswith(b"+OK"), client.greeting)
                os.kill(other, signal.SIGCONT)
            for other in (one, two):
                os.kill(other, signal.SIGSTOP)
                with Client(server.port) as client:
                    self.assertEqual(client.greeting, TURNED_AWAY)
                os.kill(other, signal.SIGCONT)

    def test_each_kind_of_listener(self) -> None:
        path = self.folder.path / "pop3.sock"
        listen = ("tcp:0:interface=127.0.0.1", "tcp6:0:interface=\\:\\:1", TLS)
        # Of a Unix socket there is no port to be told.
        server = self.serve(
            "--listen",
            f"unix:{path}:mode=600",
            listen=tuple(text.format(state=self.folder.state) for text in listen),
        )
        plain = Wire(self, server.ports[0])
        self.assertTrue(plain.line().startswith(b"+OK"))
        plain.send(b"STLS\r\n")
        self.assertTrue(plain.line().startswith(b"+OK"))
        plain.start_tls(self.trusting())
        with socket.create_connection(("::1", server.ports[1]), DEADLINE) as six:
            self.assertTrue(six.recv(512).startswith(b"+OK"))
        secure = poplib.POP3_SSL(
            "localhost", server.ports[2], context=self.trusting(), timeout=DEADLINE
        )
        secure.user("bob")
        self.assertTrue(secure.pass_("hunter2").startswith(b"+OK"))
        secure.quit()
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as local:
                local.settimeout(DEADLINE)
                local.connect(str(path))
                self.assertTrue(local.recv(512).startswith(b"+OK"))
            # The path is the parent's: a worker that ends neither removes it nor changes its mode.
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
            os.kill(min(self.pids), signal.SIGTERM)
            self.pids = {max(self.pids), int(server.wait_for(SERVES)[1])}
        server.stop()
        self.assertFalse(path.exists())

    def test_behind_a_proxy(self) -> None:
        """With a PROXY header before all else, TLS included; the client's address counts."""
        pem = f"{self.folder.state}/self-made.pem"
        certs.self_made(str(self.folder.state), "localhost")
        server = self.serve(
            *("--trusted-proxies", "127.0.0.1", "--throttle", "memory:per-address=1"),
            listen=(
                "haproxy:tcp:0:interface=127.0.0.1",
                f"haproxy:tls:{pem}:0:interface=127.0.0.1",
            ),
        )
        one, two = sorted(self.pids)
        plain, secure = server.ports
        with alone(one, self.pids):
            held = self.proxied(plain, "192.0.2.7")
            self.assertTrue(held.line().startswith(b"+OK"))
        with alone(two, self.pids):
            self.assertEqual(self.proxied(plain, "192.0.2.7").line().rstrip(), TURNED_AWAY)
            other = self.proxied(secure, "192.0.2.8")
            other.start_tls(self.trusting())
            self.assertTrue(other.line().startswith(b"+OK"))
            other.send(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
            other.rest()
            self.assertIn("192.0.2.8", server.wait_for('login user="bob"').string)

    def proxied(self, port: int, address: str) -> Wire:
        wire = Wire(self, port)
        wire.send(f"PROXY TCP4 {address} 192.0.2.1 40000 110\r\n".encode())
        return wire


class EndTests(WorkerCase):
    def test_a_worker_is_killed(self) -> None:
        """Its clients are cut off, all others go on, and a new one serves."""
        server = self.serve()
        one, two = sorted(self.pids)
        lost, kept = self.login_at(one, "bob"), self.login_at(two, "user1")
        lost.dele(1)
        os.kill(one, signal.SIGKILL)
        self.assertRaises((poplib.error_proto, ConnectionResetError), lost.noop)
        self.assertEqual(kept.stat()[0], 2)
        server.wait_for(rf"worker \d pid {one} ended \(signal 9\); a new one is started in 0.1 s")
        new = int(server.wait_for(SERVES)[1])
        self.pids = {two, new}
        self.assertEqual(children(server.process.pid), self.pids)
        # Nothing was deleted without QUIT, and the maildrop is free.
        again = self.login_at(new, "bob")
        self.assertEqual(again.stat()[0], 3)
        kept.quit()

    def test_the_parent_is_killed(self) -> None:
        server = self.serve()
        watches = [self.watch(pid) for pid in self.pids]
        client = self.login()
        server.kill()
        for watch in watches:
            self.assertTrue(ends(watch))
        self.assertRaises((poplib.error_proto, ConnectionResetError), client.noop)

    def test_a_stop(self) -> None:
        """Idle clients are told, and nothing is left."""
        server = self.serve()
        self.stops(server, server.process.send_signal, signal.SIGTERM)
        self.assertNotIn("Traceback", server.stop())

    def test_a_transfer_in_progress_ends_at_a_stop(self) -> None:
        # More than the sockets' buffers take, so that it is in progress for sure.
        self.folder.spool(
            "bob", mail(1, b"x" * 76 + b"\n") + mail(2, (b"y" * 76 + b"\n") * 200_000)
        )
        server = self.serve("--grace", str(DEADLINE))
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"USER bob\r\nPASS hunter2\r\n")
        wire.line()
        self.assertTrue(wire.line().startswith(b"+OK"))
        wire.send(b"RETR 2\r\n")
        self.assertTrue(wire.line().startswith(b"+OK"))
        server.process.send_signal(signal.SIGTERM)
        rest = wire.lines()
        self.assertEqual(sum(row == b"y" * 76 + b"\r\n" for row in rest), 200_000)
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)

    def test_hangup_opens_the_logs_of_all_anew(self) -> None:
        path = self.folder.path / "sessions"
        server = self.serve("--session-log", f"plain:{path}")
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{number}").quit()
        path.rename(self.folder.path / "rotated")
        server.process.send_signal(signal.SIGHUP)
        for _ in range(1 + self.workers):
            server.wait_for("opening the session logs anew")
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{4 + number}").quit()
        server.stop()
        new = path.read_text()
        for number in range(self.workers):
            self.assertIn(f"user{4 + number}", new)
            self.assertNotIn(f"user{number}", new)

    def test_session_log_on_a_descriptor(self) -> None:
        """Standard output is that of the command, not a worker's own."""
        server = self.serve("--session-log", "plain:fd=1")
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{number}").quit()
        log = server.stop()
        for number in range(self.workers):
            self.assertRegex(log, rf'(?m)^login user="user{number}"')

    def test_deletions_while_workers_are_killed(self) -> None:
        """Whenever it comes: each mail is there or has been deleted by a QUIT, none by half."""
        server = self.serve()
        names = [f"user{number}" for number in range(8)]
        body = b"z" * 70 + b"\n"
        for name in names:
            whole = b"".join(mail(n, body * 2000) for n in range(6))
            self.folder.spool(name, whole)
        for number, name in enumerate(names):
            client = self.login(name)
            pid = server_of(client.sock, self.pids)
            for place in (1, 3, 5):
                client.dele(place)
            # Pipelined, so that the kill may come before, in or after the commit.
            client.sock.sendall(b"NOOP\r\n" * number * 3 + b"QUIT\r\n")
            os.kill(pid, signal.SIGKILL)
            new = int(server.wait_for(SERVES)[1])
            self.pids = (self.pids - {pid}) | {new}
        for name in names:
            client = self.login(name)
            subjects = []
            for place in range(1, client.stat()[0] + 1):
                lines = client.retr(place)[1]
                self.assertEqual(lines.count(body.rstrip()), 2000)
                subjects += [line for line in lines if line.startswith(b"Subject: ")]
            client.quit()
            kept = {len(subjects): subjects}
            every = [b"Subject: mail %d" % number for number in range(6)]
            self.assertIn(kept, [{6: every}, {3: every[1::2]}])


class StartTests(WorkerCase):
    def test_what_cannot_be_shared(self) -> None:
        for options, words in (
            (("--listen", "stdio:"), "--listen stdio:: processes of --workers cannot share it"),
            (("--demo",), "--demo serves from one process"),
        ):
            done = self.run_to_its_end("-n", "popdrop", "--workers", "2", *options)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn(words, done.stdout)

    def run_to_its_end(self, *words: str) -> subprocess.CompletedProcess[str]:
        code = "from twisted.scripts.twistd import run; run()"
        return subprocess.run(
            [sys.executable, "-c", code, "--pidfile", f"{self.folder.path}/pid", *words],
            cwd=self.folder.path,
            env=environment(self.folder.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
        )

    def test_a_daemon(self) -> None:
        """Ready when the command returns; log, stop and end as with one process."""
        log, path = self.folder.path / "log", self.folder.path / "pop3.sock"
        done = self.run_to_its_end(
            *("--logfile", str(log), "popdrop", "--workers", "2"),
            *("--state-dir", "state", "--store", f"mbox:{self.folder.spools}/{{user}}"),
            *("--auth", f"accounts:{self.folder.accounts}", "--listen", f"unix:{path}"),
        )
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        pid = int((self.folder.path / "pid").read_text())
        watches = [self.watch(each) for each in (pid, *children(pid))]
        self.addCleanup(signal.pidfd_send_signal, watches[0], signal.SIGKILL)
        self.assertEqual(len(watches), 3)
        with socket.socket(socket.AF_UNIX) as local:
            local.settimeout(DEADLINE)
            local.connect(str(path))
            with local.makefile("rb") as file:
                self.assertTrue(file.readline().startswith(b"+OK"))
                local.sendall(b"QUIT\r\n")
                file.read()
        os.kill(pid, signal.SIGTERM)
        for watch in watches:
            self.assertTrue(ends(watch))
        self._cleanups.pop()  # the process is gone
        self.assertEqual(len(re.findall(SERVES, log.read_text())), 2)


class RightsTests(WorkerCase):
    """Started as root with `--uid`, where there are such rights; else with what there is."""

    def start(self, *options: str) -> ShownHelped:
        words = self.folder.path / "words"
        if not words.exists():
            words.write_text("hunter2\n")
            words.chmod(0o600)
        options = ("--workers", "2", "--auth", f"helper:reads:{words}", *options)
        drop = may_run(self.folder)
        self.server = server = ShownHelped(self, self.folder, *options, drop=drop)
        self.pids = {int(pid) for pid in re.findall(SERVES, "\n".join(server.log))}
        self.assertEqual(len(self.pids), 2)
        return server

    def uids(self, pid: int) -> set[int]:
        found = facts(pid)
        return set(map(int, found["Uid"])) | set(map(int, found["Gid"]))

    def test_rights_of_workers(self) -> None:
        """The first ones and later ones have those of the user, and the helper's answers."""
        server = self.start()
        dropped = server.dropped or (os.geteuid(), os.getegid())
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{number}").quit()
        gone = min(self.pids)
        os.kill(gone, signal.SIGKILL)
        self.pids = {max(self.pids), int(server.wait_for(SERVES)[1])}
        for number, pid in enumerate(sorted(self.pids)):
            self.assertEqual(self.uids(pid), set(dropped))
            self.login_at(pid, f"user{2 + number}").quit()
            if server.dropped is not None:
                self.assertEqual(facts(pid)["CapEff"], ["0" * 16])
                self.assertEqual(facts(pid)["Groups"], [str(dropped[1])])
                # What may not be looked into belongs to root in /proc (prctl(2), PR_SET_DUMPABLE).
                self.assertEqual(os.stat(f"/proc/{pid}/environ").st_uid, 0)
        os.kill(server.helper, signal.SIGKILL)
        for _ in self.pids:
            server.wait_for(r"helper pid \d+ serves")
        for number, pid in enumerate(sorted(self.pids)):
            self.login_at(pid, f"user{4 + number}").quit()

    def test_a_key_of_roots(self) -> None:
        """Workers could not read it: the start fails, and says what to do."""
        self.start().stop()
        pem = self.folder.state / "self-made.pem"
        self.assertTrue(pem.exists())
        if self.server.dropped is None:
            return  # nobody has fewer rights at work than at the start
        other = Folder(self).path / "pem"
        other.write_bytes(pem.read_bytes())
        other.chmod(0o600)
        failure = self.assertRaises(AssertionError, self.start, "--starttls", str(other))
        self.assertIn(f"popdrop: --starttls {other}: {other} may not be read", str(failure))


class SpoolsTests(test_open_helper.OpenHelperTests):
    """`open=helper`: all that holds with one process, and spools of others at each worker."""

    kind = ShownServer

    def serve(self, *options: str, opening: str = "helper") -> test_open_helper.Server | None:
        if test_open_helper.ROOT and not may_run(self.folder):
            raise SkipTest("needs a Python that others may run: the Debian package python3")
        return super().serve("--workers", "2", *(options or self.helped), opening=opening)

    def test_at_each(self) -> None:
        """A worker, too, that has taken the place of one that was killed."""
        first, second, third = test_open_helper.UIDS
        paths = [self.spool(f"u{uid}", uid, mail(1) + mail(2)) for uid in (first, second, third)]
        server = self.serve()
        if server is None:
            return
        pids = {int(pid) for pid in re.findall(SERVES, "\n".join(server.log))}
        one, two = sorted(pids)
        for pid in pids:
            uids = set(map(int, facts(pid)["Uid"]))
            self.assertEqual(uids & {0, first, second, third}, set())
        held = self.enter(client_at(server, one, pids), f"u{first}")
        kept = self.enter(client_at(server, two, pids), f"u{second}")
        self.assertIn(b"[IN-USE]", self.fails(client_at(server, two, pids), f"u{first}"))
        held.dele(1)
        os.kill(one, signal.SIGKILL)
        new = int(server.wait_for(SERVES)[1])
        pids = {two, new}
        for uid, path in ((third, paths[2]), (first, paths[0])):
            client = self.enter(client_at(server, new, pids), f"u{uid}")
            self.assertEqual(client.stat()[0], 2)
            client.dele(1)
            client.quit()
            self.assertEqual(path.read_bytes(), mail(2))
        kept.dele(2)
        kept.quit()
        self.assertEqual(paths[1].read_bytes(), mail(1))
        # In good order, too: what the one shuts is still the next one's.
        os.kill(new, signal.SIGTERM)
        again = int(server.wait_for(SERVES)[1])
        client = self.enter(client_at(server, again, {two, again}), f"u{third}")
        self.assertEqual(client.stat()[0], 1)

    def enter(self, client: poplib.POP3, name: str) -> poplib.POP3:
        self.addCleanup(client.close)
        client.user(name)
        client.pass_(name[::-1])
        return client

    def fails(self, client: poplib.POP3, name: str) -> bytes:
        failure = self.assertRaises(poplib.error_proto, self.enter, client, name)
        return bytes(failure.args[0])
