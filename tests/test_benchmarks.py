"""The benchmark's parts: the corpus, the load generator against a scripted server, the sums."""

from __future__ import annotations

import hashlib
import json
import mailbox
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from benchmarks import process, report, tls, tools, workers
from benchmarks.__main__ import _parser, _sizes
from benchmarks.bench import Bench, Figure, Sizes
from benchmarks.corpus import MEDIAN, Corpus, quote, write_spool
from benchmarks.generator import Run
from benchmarks.peers import Peer
from benchmarks.process import (
    Failed,
    NotApplicable,
    start,
    stop,
    tree_cpu,
    tree_memory,
    wait_for_port,
)
from benchmarks.scenarios import SCENARIOS, Scenario


class CorpusTests(SynchronousTestCase):
    """The spool that everything is measured with."""

    def spool(self, messages: int, seed: int = 1) -> bytes:
        path = Path(self.mktemp())
        write_spool(path, messages=messages, seed=seed)
        return path.read_bytes()

    def test_deterministic(self) -> None:
        """The same seed gives the same octets, another seed gives others."""
        self.assertEqual(self.spool(50), self.spool(50))
        self.assertNotEqual(self.spool(50), self.spool(50, seed=2))

    def test_prefix(self) -> None:
        """A longer spool begins with the shorter one."""
        self.assertTrue(self.spool(60).startswith(self.spool(40)))

    @settings(deadline=None, max_examples=10, derandomize=True)
    @given(st.integers(1, 40), st.integers(0, 10**6))
    def test_count_by_mailbox(self, messages: int, seed: int) -> None:
        """The standard library finds as many messages as were asked for."""
        path = Path(self.mktemp())
        self.assertEqual(write_spool(path, messages, seed=seed), (messages, path.stat().st_size))
        box = mailbox.mbox(path)
        self.addCleanup(box.close)
        self.assertEqual(len(box), messages)

    def test_from_lines(self) -> None:
        """Every line beginning with `From ` is a separator: behind an empty line, with a date."""
        spool = self.spool(300)
        found = list(re.finditer(rb"^From (\S+) (.+)$", spool, re.MULTILINE))
        self.assertEqual(len(found), 300)
        self.assertEqual(len(re.findall(rb"^From ", spool, re.MULTILINE)), 300)
        for match in found:
            time.strptime(match[2].decode(), "%a %b %d %H:%M:%S %Y")
            if match.start():
                self.assertEqual(spool[match.start() - 2 : match.start()], b"\n\n")

    def test_kinds(self) -> None:
        """All that makes a server work is there: dots, quotes, 8 bit, base64, long headers."""
        spool = self.spool(400)
        lines = spool.split(b"\n")
        self.assertTrue(any(line.startswith(b".") for line in lines))
        self.assertTrue(any(line.startswith(b">From ") for line in lines))
        self.assertTrue(any(line.startswith(b">>From ") for line in lines))
        self.assertTrue(any(max(line, default=0) > 127 for line in lines))
        base64 = [line for line in lines if re.fullmatch(rb"[A-Za-z0-9+/]{76}", line)]
        self.assertGreater(len(base64), 1000)
        self.assertLessEqual(max(map(len, lines)), 998)
        self.assertNotIn(b"\r", spool)
        ids = re.findall(rb"^Message-ID: (\S+)$", spool, re.MULTILINE)
        self.assertEqual(len(set(ids)), 400)

    def test_sizes(self) -> None:
        """The median is as documented, and the tail is long: the mean lies well above it."""
        sizes = [len(message) for message in islice(Corpus(), 3000)]
        self.assertLess(abs(median(sizes) - MEDIAN), 0.1 * MEDIAN)
        self.assertGreater(sum(sizes) / len(sizes), 1.2 * MEDIAN)

    def test_octets(self) -> None:
        """By size: the fewest messages that reach it."""
        path = Path(self.mktemp())
        count, total = write_spool(path, octets=500_000)
        sizes = [len(message) for message in islice(Corpus(), count)]
        self.assertEqual(total, sum(sizes))
        self.assertGreaterEqual(total, 500_000)
        self.assertLess(total - sizes[-1], 500_000)

    @settings(deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from([b"From ", b">From ", b">>From x", b"From", b"", b"> From "])))
    def test_quote(self, lines: list[bytes]) -> None:
        """No `From ` is left, and taking one `>` off each quoted line gives the mail back."""
        mail = b"".join(line + b"\n" for line in lines)
        quoted = quote(mail).split(b"\n")
        self.assertFalse(any(line.startswith(b"From ") for line in quoted))
        back = [
            line[1:] if line.lstrip(b">").startswith(b"From ") and line[:1] == b">" else line
            for line in quoted
        ]
        self.assertEqual(b"\n".join(back), mail)

    def test_place(self) -> None:
        """A spool is put there as a private file that nobody has touched for an hour."""
        source, target = Path(self.mktemp()), Path(self.mktemp())
        source.write_bytes(b"From a\n")
        target.write_bytes(b"something longer than that")
        tools.place(source, target, None)
        self.assertEqual(target.read_bytes(), b"From a\n")
        found = target.stat()
        self.assertEqual(found.st_mode & 0o777, 0o600)
        self.assertLess(found.st_mtime, source.stat().st_mtime - 3000)


MESSAGES = [
    b"Subject: one\r\n\r\n..stuffed\r\ntext\r\n",
    b"Subject: two\r\n\r\n..\r\n...\r\n",
    *(b"Subject: %d\r\n\r\n" % i + b"x" * 70 * i + b"\r\n" for i in range(3, 25)),
]
"""As they go over the wire, dot-stuffed."""

PASSWORD = "correct horse"
CHALLENGE = b"<17.4@example.org>"


def octets(message: bytes) -> int:
    """Octets with dot-stuffing undone."""
    return sum(len(line) - line.startswith(b".") for line in message.splitlines(keepends=True))


class Maildrop:
    """What the scripted server answers; a test bends one answer to see it found out."""

    def __init__(self) -> None:
        self.messages = list(MESSAGES)
        self.sizes = [octets(message) for message in MESSAGES]
        self.ids = [b"id%d" % i for i in range(len(MESSAGES))]
        self.top_lines = 0
        self.total_wrong = 0
        self.deletes = True
        self.pause = 0.0
        self.first_pause = 0.0
        self.appended = 0
        self.present: set[bytes] = set()
        self.twice: list[bytes] = []
        self.logins: list[bytes] = []
        self.commands: list[bytes] = []

    def rows(self, values: list[bytes]) -> bytes:
        listed = (b"%d %s\r\n" % (i + 1, value) for i, value in enumerate(values))
        return b"+OK\r\n" + b"".join(listed) + b".\r\n"

    def delete(self, marked: set[int]) -> None:
        if self.deletes:
            kept = [i for i in range(len(self.messages)) if i not in marked]
            self.messages = [self.messages[i] for i in kept]
            self.sizes = [self.sizes[i] + self.appended for i in kept]

    def enter(self, user: bytes) -> None:
        """A user logs in: the first one ever may be kept waiting, while others come and go."""
        if user in self.present:
            self.twice.append(user)
        self.present.add(user)
        self.logins.append(user)
        if len(self.logins) == 1:
            time.sleep(self.first_pause)


class Handler(socketserver.StreamRequestHandler):
    """One connection of the scripted server."""

    def handle(self) -> None:
        drop: Maildrop = self.server.drop  # type: ignore[attr-defined]
        self.wfile.write(b"+OK ready " + CHALLENGE + b"\r\n")
        marked: set[int] = set()
        user = b""
        for line in self.rfile:
            word, *arguments = line.split()
            drop.commands.append(word)
            if word in (b"APOP", b"USER"):
                user = arguments[0]
            if word == b"QUIT":
                drop.present.discard(user)
            self.wfile.write(self.answer(drop, word, arguments, marked))
            if word == b"QUIT":
                return

    def answer(
        self, drop: Maildrop, word: bytes, arguments: list[bytes], marked: set[int]
    ) -> bytes:
        if word == b"APOP":
            digest = hashlib.md5(CHALLENGE + PASSWORD.encode()).hexdigest().encode()
            drop.enter(arguments[0])
            return b"+OK\r\n" if arguments[1] == digest else b"-ERR wrong digest\r\n"
        if word == b"USER":
            drop.enter(arguments[0])
        if word == b"PASS" and b" ".join(arguments) != PASSWORD.encode():
            return b"-ERR wrong password\r\n"
        if word == b"STAT":
            total = sum(drop.sizes) + drop.total_wrong
            return b"+OK %d %d\r\n" % (len(drop.messages), total)
        if word == b"LIST":
            return drop.rows([b"%d" % size for size in drop.sizes])
        if word == b"UIDL":
            return drop.rows(drop.ids)
        if word == b"RETR":
            return b"+OK\r\n" + drop.messages[int(arguments[0]) - 1] + b".\r\n"
        if word == b"TOP":
            header, _, body = drop.messages[int(arguments[0]) - 1].partition(b"\r\n\r\n")
            lines = body.splitlines(keepends=True)[: drop.top_lines]
            return b"+OK\r\n" + header + b"\r\n\r\n" + b"".join(lines) + b".\r\n"
        if word == b"NOOP":
            time.sleep(drop.pause)
        if word == b"DELE":
            marked.add(int(arguments[0]) - 1)
        if word == b"QUIT":
            drop.delete(marked)
        return b"+OK\r\n"


class Server(socketserver.ThreadingTCPServer):
    """The scripted server, on a port that the system picks."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, drop: Maildrop) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.drop = drop

    def handle_error(self, request: object, client_address: object) -> None:
        """The generator hangs up when it finds a fault: nothing to tell."""


@contextmanager
def running(server: Server) -> Iterator[int]:
    """Its port."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@cache
def load_program(folder: str) -> Path:
    """The generator, compiled once for all tests of a run."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tools.compiled("load", Path(folder))


class LoadTests(SynchronousTestCase):
    """`load.c` counts right answers and finds out wrong ones."""

    folder: ClassVar[str | None] = None

    def setUp(self) -> None:
        cls = type(self)
        cls.folder = cls.folder or os.path.abspath(self.mktemp())
        try:
            self.program = str(load_program(cls.folder))
        except tools.Missing:
            raise SkipTest("cc is missing: install the Debian package gcc") from None
        self.drop = Maildrop()

    def run_load(self, scenario: str, *options: str) -> subprocess.CompletedProcess[str]:
        with running(Server(self.drop)) as port:
            return subprocess.run(
                [self.program, scenario, f"--port={port}", "--user=u", "--limit=60", *options],
                env={**os.environ, "POP_PASSWORD": PASSWORD},
                capture_output=True,
                text=True,
            )

    def measured(self, scenario: str, *options: str) -> dict[str, float]:
        ran = self.run_load(scenario, *options)
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        found: dict[str, float] = json.loads(ran.stdout)
        self.assertGreaterEqual(found["seconds"], 0)
        return found

    def refused(self, text: str, scenario: str, *options: str) -> None:
        ran = self.run_load(scenario, *options)
        self.assertEqual((ran.returncode, ran.stdout), (1, ""))
        self.assertIn(text, ran.stderr)

    def test_md5(self) -> None:
        """The digest is the standard library's at every length around the block's edges."""
        for length in (0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 121, 128, 1000):
            octets = bytes((7 * i + length) % 256 for i in range(length))
            ran = subprocess.run([self.program, "md5"], input=octets, capture_output=True)
            self.assertEqual(ran.stdout.decode().strip(), hashlib.md5(octets).hexdigest(), length)

    def test_sessions(self) -> None:
        """As many sessions as asked for, the users in turn, each from login to QUIT."""
        for auth in ("apop", "pass"):
            self.drop = Maildrop()
            options = ("--users=4", "--concurrency=3", "--count=20", f"--auth={auth}")
            found = self.measured("session", *options, f"--messages={len(MESSAGES)}")
            self.assertEqual(found["count"], 20)
            self.assertEqual(set(self.drop.logins), {b"u0", b"u1", b"u2", b"u3"})
            self.assertEqual(len(self.drop.logins), 20)
            self.assertEqual(self.drop.commands.count(b"STAT"), 20)
            self.assertEqual(self.drop.commands.count(b"QUIT"), 20)

    def test_no_user_twice(self) -> None:
        """While one session lasts, the others come round without its user."""
        self.drop.first_pause = 0.3
        found = self.measured("session", "--users=4", "--concurrency=3", "--count=40")
        self.assertEqual(found["count"], 40)
        self.assertEqual(self.drop.twice, [])
        self.assertEqual(set(self.drop.logins), {b"u0", b"u1", b"u2", b"u3"})

    def test_suffix(self) -> None:
        """What stands behind each name, whichever way of login it is."""
        for auth in ("apop", "pass"):
            options = ("--suffix=@d", f"--auth={auth}")
            self.drop = Maildrop()
            self.measured("session", "--users=2", "--count=2", *options)
            self.measured("list", *options)
            self.measured("open", "--probe-user=p", *options)
            names = [b"p@d", b"u0@d", b"u1@d", b"u@d", b"u@d"]
            self.assertEqual(sorted(self.drop.logins), names)

    def test_retr(self) -> None:
        """Every message comes in turn, one at a time or several in flight."""
        for window in (1, 2, 7, 100):
            found = self.measured("retr", f"--window={window}", f"--count={3 * len(MESSAGES)}")
            self.assertEqual(found["count"], 3 * len(MESSAGES))
            self.assertEqual(found["octets"], 3 * sum(map(octets, MESSAGES)))

    def test_top_list_uidl(self) -> None:
        """The other answers of several lines are counted too."""
        self.assertEqual(self.measured("top", "--count=50", "--window=8")["count"], 50)
        self.assertEqual(self.measured("list", "--count=5")["octets"], 5 * sum(self.drop.sizes))
        self.assertEqual(self.measured("uidl", "--count=5")["count"], 5)

    def test_delete(self) -> None:
        """Every tenth message is deleted, and the rest is looked at again."""
        self.assertEqual(self.measured("delete")["count"], len(MESSAGES) // 10)
        self.assertEqual(len(self.drop.messages), len(MESSAGES) - len(MESSAGES) // 10)
        self.assertNotIn(MESSAGES[9], self.drop.messages)

    def test_fields_added(self) -> None:
        """What is left may be longer only where the server is known to add header fields."""
        self.drop.appended = 20
        self.assertEqual(self.measured("delete", "--alters")["count"], len(MESSAGES) // 10)
        self.drop = Maildrop()
        self.drop.appended = 20
        ran = self.run_load("delete")
        self.assertEqual(ran.returncode, 1)
        self.assertIn("are left, not", ran.stderr)

    def test_octets_lost(self) -> None:
        """It may never be shorter."""
        self.drop.appended = -1
        ran = self.run_load("delete", "--alters")
        self.assertEqual(ran.returncode, 1)
        self.assertIn("are left, not", ran.stderr)

    def test_hold(self) -> None:
        """Ready is said only when the whole of LIST and UIDL has come."""
        found = self.measured("hold", f"--messages={len(MESSAGES)}")
        self.assertEqual(found["count"], len(MESSAGES))
        self.assertEqual(self.drop.commands[-3:], [b"LIST", b"UIDL", b"QUIT"])

    def test_hold_of_nothing(self) -> None:
        """An empty maildrop has answers of no rows."""
        self.drop.messages, self.drop.sizes, self.drop.ids = [], [], []
        self.assertEqual(self.measured("hold")["count"], 0)

    def test_open(self) -> None:
        """Both sessions log in, and every NOOP of the probe is answered and counted."""
        found = self.measured("open", "--probe-user=p")
        self.assertEqual(found["count"], len(MESSAGES))
        self.assertEqual(sorted(self.drop.logins), [b"p", b"u"])
        probes = sum(found[f"{phase}_probes"] for phase in ("idle", "open", "uidl"))
        self.assertEqual(self.drop.commands.count(b"NOOP"), probes)
        self.assertGreater(probes, 0)

    def test_open_of_slow_server(self) -> None:
        """A server that never catches up with the probe is waited for, answer by answer."""
        self.drop.pause = 0.002
        self.assertEqual(self.measured("open", "--probe-user=p")["count"], len(MESSAGES))

    def test_barriers(self) -> None:
        """With --sync it waits for an octet before its work and after its result."""
        with running(Server(self.drop)) as port:
            child = subprocess.Popen(
                [self.program, "list", f"--port={port}", "--user=u", "--sync", "--limit=60"],
                env={**os.environ, "POP_PASSWORD": PASSWORD},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            with child:
                assert child.stdin is not None and child.stdout is not None
                self.assertEqual(child.stdout.readline(), b"ready\n")
                self.assertNotIn(b"LIST", self.drop.commands)
                child.stdin.write(b"\n")
                child.stdin.flush()
                self.assertEqual(json.loads(child.stdout.readline())["count"], 1)
                self.assertNotIn(b"QUIT", self.drop.commands)
                child.stdin.write(b"\n")
            self.assertEqual(child.returncode, 0)

    def test_wrong_size(self) -> None:
        """A message that is not as long as LIST has said."""
        self.drop.sizes[4] += 1
        self.refused("message 5: LIST said", "retr", "--count=20")

    def test_wrong_sum(self) -> None:
        """LIST and STAT that do not agree."""
        self.drop.total_wrong = 1
        self.refused("LIST adds up to", "list")

    def test_not_stuffed(self) -> None:
        """A line with one dot at its start, which is not the end."""
        self.drop.messages[0] = MESSAGES[0].replace(b"..stuffed", b".stuffed")
        self.refused("begins with one dot", "retr", "--count=5")

    def test_bare_line_feed(self) -> None:
        """A line that does not end in CRLF."""
        self.drop.messages[0] = MESSAGES[0].replace(b"text\r\n", b"text\n")
        self.refused("does not end in CRLF", "retr", "--count=5")

    def test_body_in_top(self) -> None:
        """More than the header, where no line of the body was asked for."""
        self.drop.top_lines = 1
        self.refused("goes on behind the empty line", "top", "--count=5")

    def test_equal_ids(self) -> None:
        """Two messages with one unique-id."""
        self.drop.ids[3] = self.drop.ids[7]
        with_result = self.run_load("uidl")
        self.assertEqual(with_result.returncode, 1)
        self.assertIn("one unique-id", with_result.stderr)

    def test_rows_missing(self) -> None:
        """Fewer unique-ids than messages."""
        del self.drop.ids[5]
        self.refused("rows, STAT said", "uidl")

    def test_not_deleted(self) -> None:
        """A server that says +OK to QUIT and keeps everything."""
        self.drop.deletes = False
        ran = self.run_load("delete")
        self.assertEqual(ran.returncode, 1)
        self.assertIn("are left, not", ran.stderr)

    def test_wrong_count(self) -> None:
        """Another maildrop than the one that was meant."""
        self.refused("STAT says", "list", "--messages=7")

    def test_refused_login(self) -> None:
        """The server's own words, if it says -ERR."""
        with running(Server(self.drop)) as port:
            ran = subprocess.run(
                [self.program, "list", f"--port={port}", "--user=u", "--auth=pass"],
                env={**os.environ, "POP_PASSWORD": "wrong"},
                capture_output=True,
                text=True,
            )
        self.assertEqual(ran.returncode, 1)
        self.assertIn("-ERR wrong password", ran.stderr)


_BURN = "import time\nwhile time.process_time() < 0.3: pass"
_HOLD = "import sys\nheld = b'x' * int('{}')\nprint('held', flush=True)\nsys.stdin.read()"
_PARENT = (
    "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n"
    "print('done', flush=True)\nsys.stdin.read()"
)


class ProcessTests(SynchronousTestCase):
    """How the CPU of servers is counted."""

    def test_reaped_children_count(self) -> None:
        """What a child used that its parent has waited for is the parent's tree's."""
        core = min(os.sched_getaffinity(0))
        allowed = os.sched_getaffinity(0)
        child = start([sys.executable, "-c", _PARENT, _BURN], core, pipes=True)
        try:
            assert child.stdout is not None
            self.assertEqual(child.stdout.readline(), b"done\n")
            self.assertGreaterEqual(tree_cpu(child.pid), 0.28)
            self.assertEqual(os.sched_getaffinity(child.pid), {core})
            self.assertEqual(os.sched_getaffinity(0), allowed)
        finally:
            stop(child)
            for stream in (child.stdin, child.stdout, child.stderr):
                assert stream is not None
                stream.close()
        self.assertIsNotNone(child.returncode)

    def test_memory_of_descendants(self) -> None:
        """What a child holds is its parent's tree's; 4 MB of slack is for what may be paged."""
        core = min(os.sched_getaffinity(0))
        weights = []
        for size in ("0", "40000000"):
            child = start([sys.executable, "-c", _PARENT, _HOLD.format(size)], core, pipes=True)
            try:
                assert child.stdout is not None
                self.assertEqual(child.stdout.readline(), b"held\n")
                weights.append(tree_memory(child.pid))
            finally:
                stop(child)
                for stream in (child.stdin, child.stdout, child.stderr):
                    assert stream is not None
                    stream.close()
        self.assertLess(abs(weights[1] - weights[0] - 40_000_000), 4_000_000)

    def test_cores_of_a_child(self) -> None:
        """One, or several; and our own stay."""
        allowed = os.sched_getaffinity(0)
        one = min(allowed)
        for cores, wanted in ((one, {one}), (sorted(allowed), allowed)):
            code = "import os; print(*os.sched_getaffinity(0))"
            child = process.start([sys.executable, "-c", code], cores, pipes=True)
            told, _ = child.communicate()
            self.assertEqual(set(map(int, told.split())), wanted)
            self.assertEqual(os.sched_getaffinity(0), allowed)

    def test_port(self) -> None:
        """A port is waited for until nobody listens on it."""
        self.patch(process, "STOP_SECONDS", 0.0)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            self.assertRaises(Failed, wait_for_port, port)
        wait_for_port(port)


class WorkersTests(SynchronousTestCase):
    """`benchmarks.workers`: the client counted apart."""

    run_ = Run(count=900, octets=0, seconds=1.0, cpu=1.5, generator=0.3, others=0.2)

    def test_client_apart(self) -> None:
        """Half a core was not to be had: 900 sessions/s by 1.5 cores are 1200 by two."""
        rate = workers.Rate.of(self.run_, 2, shared=True)
        self.assertEqual((rate.measured, rate.apart, rate.ceiling), (900.0, 1200.0, 1200.0))
        self.assertAlmostEqual(rate.server, 1.5 / 900 * 1000)

    def test_idle_cores_do_not_flatter(self) -> None:
        """A server that does not use what is left is no faster for it."""
        lazy = replace(self.run_, cpu=0.75)
        self.assertEqual(workers.Rate.of(lazy, 2, shared=True).apart, 1200.0)
        self.assertEqual(workers.Rate.of(lazy, 2, shared=True).ceiling, 2400.0)

    def test_a_core_of_its_own(self) -> None:
        """Nothing is taken from it, and nothing is added."""
        alone = replace(self.run_, cpu=1.0)
        rate = workers.Rate.of(alone, 1, shared=False)
        self.assertEqual((rate.measured, rate.apart, rate.ceiling), (900.0, 900.0, 900.0))

    def test_nothing_left(self) -> None:
        for wrong in (replace(self.run_, others=1.7), replace(self.run_, cpu=0.0)):
            self.assertRaises(Failed, workers.Rate.of, wrong, 2, True)

    def test_table(self) -> None:
        kinds = (workers.OneProcess, workers.OneWorker, workers.TwoWorkers)
        one = replace(self.run_, cpu=1.0, others=0.0)
        rates = (
            workers.Rate.of(one, 1, False),
            workers.Rate.of(replace(one, count=600), 1, False),
            workers.Rate.of(self.run_, 2, True),
        )
        found = {kind.key: [rate] * 3 for kind, rate in zip(kinds, rates, strict=True)}
        found["workers"][0] = workers.Rate.of(replace(self.run_, cpu=1.2), 2, True)
        text = workers.table(kinds, found)
        self.assertIn(
            "workers / one: 1.33, with the client on the same cores 1.00; by CPU 1.33, in the best"
            " runs 1.67",
            text,
        )
        self.assertIn("workers / worker: 2.00", text)
        self.assertNotIn("measure again", text)
        found["one"] = [replace(rates[0], others=0.21)] * 3
        self.assertIn("measure again", workers.table(kinds, found))

    def test_what_the_machine_has_for_two(self) -> None:
        alone = [workers.Rate(1, 1, 1, ms, 0, 0) for ms in (0.6, 0.4, 0.5)]
        text = workers.ceiling(alone, [0.5, 0.7, 0.5])
        self.assertIn("by CPU 2.00, in the best runs 1.60", text)

    def test_middle_of_each_figure(self) -> None:
        rates = [workers.Rate(*([float(n)] * 5), float(-n)) for n in (5, 1, 2)]
        self.assertEqual(workers.middle(rates), workers.Rate(2.0, 2.0, 2.0, 2.0, 2.0, -2.0))


class TLSTests(SynchronousTestCase):
    def table(self, ours: list[float], base: list[float]) -> str:
        figure = tls.Figure("session", lambda server: (), target=(0.5, 0.5))
        found = {
            key: [(value, 0.0) for value in values]
            for key, values in ((tls.OURS, ours), (tls.BASE, base))
        }
        return "\n".join(tls.lines(figure, [found], [tls.OURS, tls.BASE]))

    def test_ratios(self) -> None:
        self.assertRegex(self.table([1.0, 3.0, 4.0], [5.0, 6.0, 7.0]), r" 0\.50 +0\.20 .* met$")
        self.assertRegex(self.table([4.0], [6.0]), r" 0\.67 +0\.67 .* missed$")

    def test_less_than_a_tick_of_the_clock(self) -> None:
        """So few sessions that the peer took no time at all: there is no ratio."""
        for base in ([0.0], [0.0, 0.3, 0.4]):
            self.assertRegex(self.table([0.2], base), r" - +- +at most 0\.50$")


class SpoolTests(SynchronousTestCase):
    """The spools that servers are given, and what comes to them later."""

    def setUp(self) -> None:
        self.patch(os, "environ", {**os.environ, "XDG_CACHE_HOME": os.path.abspath(self.mktemp())})

    def test_append(self) -> None:
        """Each message is found, whether the last one before had its empty line or not."""
        for end in (b"", b"\n"):
            path = Path(self.mktemp())
            path.write_bytes(b"From a Mon Jan  1 00:00:00 2024\nSubject: x\n\nbody\n" + end)
            tools.append(path, list(islice(Corpus(), 3)))
            self.assertEqual(len(re.findall(rb"(?:\A|\n\n)From ", path.read_bytes())), 4)
            self.assertNotIn(b"body\n\n\n", path.read_bytes())

    def test_append_to_nothing(self) -> None:
        """An empty spool holds then what was appended, and no more."""
        path = Path(self.mktemp())
        path.touch()
        messages = list(islice(Corpus(), 2))
        tools.append(path, messages)
        self.assertEqual(path.read_bytes(), b"".join(messages))

    def test_settled(self) -> None:
        """The last change lies as far back as was asked for."""
        path = Path(self.mktemp())
        path.touch()
        tools.let_settle(path, 0.1)
        self.assertGreaterEqual(time.time() - path.stat().st_ctime, 0.1)

    def test_arriving(self) -> None:
        """Every peer gets the same new messages; none was there before, none comes twice."""
        bench = Bench(NotImplemented, Sizes(1, 20, 1, 1, 1.0))
        later = bench.arriving(10, 30)
        first = bench.arriving(0, 20)
        self.assertEqual(first[10:], later[:10])
        self.assertEqual(len({*first, *later, *islice(Corpus(), 30)}), 60)

    def test_large(self) -> None:
        """The large spool has the messages that were asked for, or else the octets."""
        for options, messages in ((["--large-messages=7"], 7), (["--large-octets=1"], 1)):
            sizes = _sizes(_parser().parse_args(options))
            bench = Bench(NotImplemented, replace(sizes, messages=1))
            peer = Peer(Path(self.mktemp()), 0, "")
            peer.owner = None
            peer.spools.mkdir(parents=True)
            bench.place_large(peer, "u")
            self.assertEqual(bench.large_messages, messages)
            self.assertEqual(
                len(re.findall(rb"^From ", peer.spool("u").read_bytes(), re.M)), messages
            )

    def test_slow_peer(self) -> None:
        """It takes part in every run of small maildrops, and in one of the others."""
        peer = Peer(Path(self.mktemp()), 0, "")
        counts = {}
        for peer.slow in (False, True):
            for scenario in SCENARIOS:
                taken = sum(scenario.takes(peer, number) for number in range(3))
                counts.setdefault(scenario.key, []).append(taken)
        self.assertEqual(counts["session-pass"], [3, 3])
        self.assertEqual(counts["open"], [3, 1])
        self.assertEqual(counts["retr-1"], [3, 1])

    def test_after_open(self) -> None:
        """Nothing is said of a server that has not opened the large spool."""
        bench = Bench(NotImplemented, Sizes(1, 1, 1, 1, 1.0))
        peer = Peer(Path(self.mktemp()), 0, "")
        wanting = [scenario for scenario in SCENARIOS if scenario.after_open]
        self.assertEqual(
            [scenario.key for scenario in wanting], ["list", "uidl", "reopen", "memory", "grown"]
        )
        for scenario in wanting:
            self.assertRaises(NotApplicable, scenario.measure, bench, peer, 0)


class ReportTests(SynchronousTestCase):
    """The table's ratios and verdicts."""

    def row(self, figure: Figure, ours: list[float], base: list[float]) -> list[str]:
        folder = Path(self.mktemp())
        peers = []
        for key in ("popdrop", "dovecot-tuned"):
            peer = Peer(folder, 0, "")
            peer.key = peer.title = key
            peers.append(peer)
        scenario = Scenario("s", "S", lambda bench, peer, number: NotImplemented, (figure,))
        results = {
            ("s", "popdrop"): [Run(1, 0, x, 0, 0, 0) for x in ours],
            ("s", "dovecot-tuned"): [Run(1, 0, x, 0, 0, 0) for x in base],
        }
        last = report.table([scenario], peers, results).splitlines()[-1]
        return [cell.strip() for cell in last.strip("|").split("|")]

    def test_less_is_better(self) -> None:
        """Medians of both, their ratio, and the release's target first."""
        figure = Figure("T", lambda run: run.seconds, True, release=0.5, goal=0.25)
        row = self.row(figure, [9.0, 4.0, 1.0], [10.0, 10.0, 99.0])
        self.assertEqual(row, ["T (less)", "4.0", "10.0", "0.40", "0.50", "0.25", "release met"])

    def test_more_is_better(self) -> None:
        """Without a release target the goal is judged."""
        figure = Figure("T", lambda run: run.seconds, False, goal=1.5)
        row = self.row(figure, [12.0], [10.0])
        self.assertEqual(row, ["T (more)", "12.0", "10.0", "1.20", "-", "1.50", "goal missed"])

    def test_other_base(self) -> None:
        """The ratio may be to another figure of Dovecot's run; the cells stay as they are."""
        figure = Figure("T", lambda run: run.seconds, True, goal=0.5, base=lambda run: 2.0)
        row = self.row(figure, [4.0], [40.0])
        self.assertEqual(row[1:], ["4.0", "40.0", "2.00", "-", "0.50", "goal missed"])
        self.assertEqual(self.row(figure, [4.0], [])[1:4], ["4.0", "-", "-"])

    def test_not_measured(self) -> None:
        """A run without this figure has a dash."""
        figure = Figure("T", lambda run: float("nan"), True, goal=0.5)
        self.assertEqual(self.row(figure, [4.0], [1.0])[1:4], ["-", "-", "-"])

    def test_limit(self) -> None:
        """A bound is of Popdrop's own figure, whether there is a ratio or not."""
        figure = Figure("T", lambda run: run.seconds, True, limit=5.0)
        row = self.row(figure, [9.0, 5.0, 1.0], [50.0])
        self.assertEqual(row, ["T (less)", "5.0", "50.0", "0.10", "-", "at most 5", "limit met"])
        self.assertEqual(self.row(figure, [5.1], [])[-1], "limit missed")
        self.assertEqual(self.row(figure, [], [1.0])[-1], "-")

    def test_absent(self) -> None:
        """A server without runs has a dash, and there is no verdict."""
        figure = Figure("T", lambda run: run.seconds, True, release=0.5)
        self.assertEqual(self.row(figure, [], [1.0])[1:], ["-", "1.0", "-", "0.50", "-", "-"])
