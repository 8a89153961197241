"""Deliverers, kills and foreign locks around real sessions: no mail is lost or doubled.

Over 400 lines since all of it is about one spool and who else writes to it.
"""

from __future__ import annotations

import fcntl
import os
import poplib
import re
import select
import signal
import subprocess
import sys
import threading
import time
from hashlib import md5
from pathlib import Path
from random import Random
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end import deliverer
from tests.end_to_end.clients import need, private
from tests.end_to_end.harness import DEADLINE, ROOT, Folder, Twistd, environment, mail
from tests.end_to_end.test_server import Wire

SECRET = "a shared secret of his"
HUNDRED = 100


class SpoolCase(SynchronousTestCase):
    """`bob` and `carol` log in by APOP, which costs no time."""

    def setUp(self) -> None:
        self.folder = Folder(self)
        for name in ("bob", "carol"):
            self.folder.add(name, apop=SECRET)
        self.spool = self.folder.spools / "bob"

    def serve(self, *options: str) -> Twistd:
        return Twistd(self, self.folder, *options)

    def login(self, server: Twistd, name: str = "bob") -> poplib.POP3:
        client = server.client()
        self.addCleanup(client.close)
        client.apop(name, SECRET)
        return client

    def refusal(self, server: Twistd, name: str = "bob", secret: str = SECRET) -> bytes:
        """What a login that fails is answered."""
        client = server.client()
        failure = self.assertRaises(poplib.error_proto, client.apop, name, secret)
        client.close()
        line = failure.args[0]
        assert isinstance(line, bytes)
        return line

    def only(self, *names: str) -> None:
        """Nothing else is in the spool folder."""
        self.assertEqual(sorted(p.name for p in self.folder.spools.iterdir()), sorted(names))


def texts(client: poplib.POP3) -> list[bytes]:
    """All mails, LF line ends."""
    return [
        b"".join(line + b"\n" for line in client.retr(number + 1)[1])
        for number in range(client.stat()[0])
    ]


class Delivering:
    """A child that delivers mails and says the number of each on a line of its own."""

    def __init__(self, case: Any, command: list[str], errors_name: str = "deliverer.err") -> None:
        self._errors: Path = case.folder.path / errors_name
        with self._errors.open("wb") as errors:
            self._child = subprocess.Popen(
                command,
                cwd=case.folder.path,
                env=environment(case.folder.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        case.addCleanup(self._end)
        self.numbers: list[int] = []
        self._ordered = 0
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with self._more:
                self.numbers.append(int(line))
                self._more.notify()
        with self._more:
            self._ended = True
            self._more.notify()

    def order(self, count: int) -> None:
        """Let it deliver so many more."""
        assert self._child.stdin is not None
        self._child.stdin.write(b"." * count)
        self._child.stdin.flush()
        self._ordered += count

    def catch_up(self) -> None:
        """Wait until all that were ordered are delivered."""
        self.more_than(self._ordered - 1)

    def more_than(self, count: int) -> bool:
        """Wait until more than `count` mails are delivered; `False` if it has ended before."""
        with self._more:
            if not self._more.wait_for(lambda: self._ended or len(self.numbers) > count, DEADLINE):
                raise AssertionError("the deliverer hangs")
            return len(self.numbers) > count

    def finish(self) -> list[int]:
        """Tell it to end, and give the numbers of all it delivered."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        status = self._child.wait(DEADLINE)
        self._reader.join(DEADLINE)
        if status:
            raise AssertionError(f"deliverer ended with {status}: {self._errors.read_text()}")
        return self.numbers

    def _end(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        self._reader.join(DEADLINE)
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()


class ConcurrentDeliveryTests(SpoolCase):
    """Mail comes while sessions fetch and delete: each one is in exactly one place at the end."""

    def session(self, server: Twistd, random: Random, mails: Delivering, own: bool) -> list[int]:
        """Fetch and delete a random choice; the numbers of what is deleted now."""
        if own:
            mails.order(random.randint(0, 3))
        client = self.login(server)
        deleted = []
        count = client.stat()[0]
        # At least one, where there is one: a fast deliverer leaves time for a single session.
        chosen = random.randint(min(1, count), count)
        for place in random.sample(range(1, count + 1), chosen):
            octets = b"".join(line + b"\n" for line in client.retr(place)[1])
            number = deliverer.number_of(octets)
            self.assertEqual(octets, deliverer.text(number), number)
            client.dele(place)
            deleted.append(number)
        if own and random.random() < 0.5:
            # Something comes for certain between the last command and QUIT,
            mails.order(1)
            mails.catch_up()
        if own and random.random() < 0.3:
            # and something at the same time as QUIT.
            mails.order(1)
        self.assertTrue(client.quit().startswith(b"+OK"))
        return deleted

    def account_for(self, delivered: list[int], deleted: list[int]) -> None:
        """Every delivered mail is deleted once or in the spool once, undamaged, in order."""
        self.assertEqual(delivered, list(range(1, len(delivered) + 1)))
        self.assertEqual(len(set(deleted)), len(deleted), "fetched and deleted twice")
        self.assertEqual(set(deleted) - set(delivered), set())
        left = sorted(set(delivered) - set(deleted))
        expected = b"".join(map(deliverer.stored, left))
        # Not assertEqual: the spool may be large.
        self.assertTrue(self.spool.read_bytes() == expected, f"the spool does not hold {left}")
        self.only("bob")

    def hundred_sessions(self, style: str) -> None:
        self.folder.spool("bob", b"")
        inode = self.spool.stat().st_ino
        server = self.serve()
        program = str(ROOT / "tests" / "end_to_end" / "deliverer.py")
        mails = Delivering(self, [sys.executable, program, style, str(self.spool)])
        random = Random(style)
        deleted: list[int] = []
        for _ in range(HUNDRED):
            deleted += self.session(server, random, mails, own=True)
        delivered = mails.finish()
        self.assertGreaterEqual(len(delivered), HUNDRED)
        self.assertGreater(len(deleted), HUNDRED)
        self.account_for(delivered, deleted)
        self.assertEqual(self.spool.stat().st_ino, inode)
        self.assertNotIn("Traceback", server.stop())

    def test_fcntl_then_dot(self) -> None:
        self.hundred_sessions("fcntl-dot")

    def test_dot_then_fcntl(self) -> None:
        self.hundred_sessions("dot-fcntl")

    def with_a_real_one(self, deliver: str, separator: bool) -> None:
        """`deliver` is a line of shell that takes mail `$n` from a file of that name."""
        count = 40
        self.folder.spool("bob", b"")
        sources = self.folder.path / "sources"
        sources.mkdir()
        for number in range(1, count + 1):
            octets = deliverer.stored(number)
            (sources / str(number)).write_bytes(octets if separator else octets[:-1])
        server = self.serve()
        script = f"cd '{sources}' && for n in $(seq {count}); do {deliver} || exit 9; echo $n; done"
        mails = Delivering(self, ["/bin/sh", "-c", script])
        random = Random(deliver)
        deleted: list[int] = []
        seen = 0
        while mails.more_than(seen):
            seen = len(mails.numbers)
            deleted += self.session(server, random, mails, own=False)
        self.assertEqual(len(mails.finish()), count)
        self.assertGreater(len(deleted), 0)
        self.account_for(mails.numbers, deleted)

    def test_procmail(self) -> None:
        procmail = need("procmail", "procmail")
        rules = private(
            self.folder.path / "procmailrc",
            f"SHELL=/bin/sh\nUMASK=077\nLOCKSLEEP=1\nDEFAULT={self.spool}\n:0:\n$DEFAULT\n",
        )
        self.with_a_real_one(f"{procmail} -m {rules} < $n", separator=False)

    def test_dotlockfile(self) -> None:
        """A shell script's only lock is that of liblockfile."""
        command = need("dotlockfile", "liblockfile-bin")
        self.with_a_real_one(
            f"{command} -l -p -r -1 -i 1 '{self.spool}.lock' && cat $n >> '{self.spool}'"
            f" && {command} -u '{self.spool}.lock'",
            separator=True,
        )


class KillTests(SpoolCase):
    """`kill -9`, but not in the middle of a QUIT."""

    def test_in_the_middle_of_sessions(self) -> None:
        large = mail(2, b"x" * 70 + b"\n" * 20_000)
        octets = mail(1) + large + mail(3)
        self.folder.spool("bob", octets)
        self.folder.spool("carol", octets)
        server = self.serve()
        marked = self.login(server)
        for number in (1, 2, 3):
            marked.retr(number)
            marked.dele(number)
        reading = self.login(server, "carol")
        reading.dele(1)
        reading._shortcmd("RETR 2")  # type: ignore[attr-defined]
        server.kill()
        self.only("bob", "carol")
        for name in ("bob", "carol"):
            self.assertTrue((self.folder.spools / name).read_bytes() == octets, name)
        again = self.serve()
        for name in ("bob", "carol"):
            client = self.login(again, name)
            self.assertEqual(client.stat()[0], 3)
            client.dele(2)
            client.quit()
            left = (self.folder.spools / name).read_bytes()
            self.assertEqual(left, mail(1) + mail(3))
        self.only("bob", "carol")

    def test_while_it_holds_the_locks(self) -> None:
        """The dot-lock that is left does not outlive the next login."""
        octets = b"".join(mail(n, b"line\n" * 200_000) for n in range(40))
        self.folder.spool("bob", octets)
        lock = Path(f"{self.spool}.lock")
        server = self.serve("--lock-timeout", "1")
        end = time.monotonic() + DEADLINE
        while True:
            wire = Wire(self, server.port)
            challenge = re.search(rb"<.*>", wire.line())
            assert challenge
            wire.send(apop("bob", challenge[0]) + b"QUIT\r\n")
            while not lock.exists() and not select.select([wire.socket], [], [], 0)[0]:
                self.assertLess(time.monotonic(), end, "no dot-lock was seen")
            # Stopped, it cannot take it away between our look and the kill.
            os.kill(server.process.pid, signal.SIGSTOP)
            if lock.exists():
                break
            os.kill(server.process.pid, signal.SIGCONT)
            wire.rest()
        server.kill()
        self.assertTrue(lock.exists())
        client = self.login(self.serve("--lock-timeout", "1"))
        self.assertFalse(lock.exists())
        self.assertEqual(client.stat()[0], 40)
        client.quit()
        self.only("bob")
        self.assertTrue(self.spool.read_bytes() == octets)

    def test_a_dropped_session_deletes_nothing(self) -> None:
        """RST: after DELE, in the middle of a RETR, with a QUIT that has no line end."""
        octets = mail(1) + mail(2, b"x" * 70 + b"\n" * 300_000) + mail(3)
        self.folder.spool("bob", octets)
        server = self.serve()
        for last in (b"NOOP\r\n", b"RETR 2\r\n", b"RETR 2\r\nRETR 2\r\nQUIT", b"QUIT"):
            wire = Wire(self, server.port)
            challenge = re.search(rb"<.*>", wire.line())
            assert challenge
            wire.send(apop("bob", challenge[0]) + b"DELE 1\r\nDELE 3\r\n" + last)
            for _ in range(3):
                self.assertTrue(wire.line().startswith(b"+OK"))
            wire.reset()
            server.wait_for('end user="bob"')
            self.assertTrue(self.spool.read_bytes() == octets, last)
        client = self.login(server)
        self.assertEqual(client.stat()[0], 3)
        client.quit()
        self.only("bob")


def apop(name: str, challenge: bytes) -> bytes:
    """The command that logs in."""
    digest = md5(challenge + SECRET.encode(), usedforsecurity=False).hexdigest()
    return f"APOP {name} {digest}\r\n".encode()


class LockTests(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.octets = mail(1) + mail(2)
        self.folder.spool("bob", self.octets)
        self.folder.spool("carol", mail(3) + mail(4))

    def foreign_fcntl_lock(self) -> None:
        """Held by this process until the test ends, or `let_go`."""
        file = self.spool.open("r+b")
        self.addCleanup(file.close)
        fcntl.lockf(file, fcntl.LOCK_EX)
        self.let_go = file.close

    def foreign_dot_lock(self) -> None:
        lock = Path(f"{self.spool}.lock")
        self.assertTrue(deliverer.take_dot_lock(str(self.spool)))
        self.let_go = lock.unlink
        self.addCleanup(lock.unlink, missing_ok=True)

    def test_second_session(self) -> None:
        """It is told `[IN-USE]` only after the right secret; the first one is not disturbed."""
        server = self.serve()
        first = self.login(server)
        first.dele(1)
        wrong = self.refusal(server, secret="another secret")
        self.assertEqual(wrong, b"-ERR [AUTH] Authentication failed.")
        self.assertTrue(self.refusal(server).startswith(b"-ERR [IN-USE] "))
        first.noop()
        first.quit()
        second = self.login(server)
        self.assertEqual(texts(second), [mail(2).partition(b"\n")[2][:-1]])
        second.quit()
        self.only("bob", "carol")

    def others_are_served(self, server: Twistd) -> None:
        client = self.login(server, "carol")
        self.assertEqual(len(texts(client)), 2)
        client.dele(1)
        client.quit()
        self.assertEqual((self.folder.spools / "carol").read_bytes(), mail(4))

    def waits(self) -> None:
        """A login waits for the lock, others do not wait for that login."""
        server = self.serve("--lock-timeout", "100")
        wire = Wire(self, server.port)
        challenge = re.search(rb"<.*>", wire.line())
        assert challenge
        wire.send(apop("bob", challenge[0]))
        self.others_are_served(server)
        self.assertEqual(select.select([wire.socket], [], [], 0.2)[0], [])
        self.let_go()
        self.assertTrue(wire.line().startswith(b"+OK bob has 2 "))
        wire.send(b"QUIT\r\n")
        wire.rest()
        self.assertEqual(self.spool.read_bytes(), self.octets)
        self.only("bob", "carol")

    def test_waits_for_fcntl(self) -> None:
        self.foreign_fcntl_lock()
        self.waits()

    def test_waits_for_dot_lock(self) -> None:
        self.foreign_dot_lock()
        self.waits()

    def gives_up(self) -> None:
        server = self.serve("--lock-timeout", "1")
        self.assertTrue(self.refusal(server).startswith(b"-ERR [IN-USE] "))
        self.others_are_served(server)
        self.let_go()
        client = self.login(server)
        self.assertEqual(client.stat()[0], 2)
        client.quit()
        self.only("bob", "carol")

    def test_gives_up_fcntl(self) -> None:
        self.foreign_fcntl_lock()
        self.gives_up()

    def test_gives_up_dot_lock(self) -> None:
        """And leaves it where it is: its holder lives."""
        self.foreign_dot_lock()
        server = self.serve("--lock-timeout", "1")
        self.assertTrue(self.refusal(server).startswith(b"-ERR [IN-USE] "))
        self.only("bob", "bob.lock", "carol")
        server.stop()
        self.gives_up()

    def quit_under_a_lock(self, take: str) -> None:
        """`-ERR [SYS/TEMP]`, and nothing is deleted; reading was possible all the time."""
        server = self.serve("--lock-timeout", "1")
        client = self.login(server)
        getattr(self, take)()
        self.assertEqual(len(texts(client)), 2)
        client.dele(1)
        failure = self.assertRaises(poplib.error_proto, client.quit)
        self.assertTrue(failure.args[0].startswith(b"-ERR [SYS/TEMP] "), failure.args)
        self.let_go()
        self.assertEqual(self.spool.read_bytes(), self.octets)
        again = self.login(server)
        again.dele(1)
        again.quit()
        self.assertEqual(self.spool.read_bytes(), mail(2))
        self.only("bob", "carol")

    def test_quit_under_fcntl(self) -> None:
        self.quit_under_a_lock("foreign_fcntl_lock")

    def test_quit_under_dot_lock(self) -> None:
        self.quit_under_a_lock("foreign_dot_lock")


class BadSpoolTests(SpoolCase):
    """`[SYS/PERM]`, the facts in the log, none of them at the client's (behaviour 10.12)."""

    def refused(self, *facts: str) -> None:
        self.folder.spool("carol", mail(3))
        before = sorted(path.name for path in self.folder.spools.iterdir())
        server = self.serve()
        line = self.refusal(server)
        self.assertTrue(line.startswith(b"-ERR [SYS/PERM] "), line)
        for leak in (str(self.folder.path).encode(), b"bob", b"popdrop", b"offset", b"link"):
            self.assertNotIn(leak, line)
        self.assertNotRegex(line, rb"[0-9]")
        client = self.login(server, "carol")
        self.assertEqual(client.stat()[0], 1)
        client.quit()
        log = server.stop()
        told = [row for row in log.splitlines() if str(self.spool) in row]
        self.assertTrue(told, log)
        for fact in facts:
            self.assertIn(fact, told[-1])
        self.assertNotIn("Traceback", log)
        self.assertNotIn(SECRET, log)
        self.only(*before)

    def test_symbolic_link(self) -> None:
        target = self.folder.path / "elsewhere"
        target.write_bytes(mail(9))
        self.spool.symlink_to(target)
        self.refused("symbolic link")
        self.assertEqual(target.read_bytes(), mail(9))

    def test_second_link(self) -> None:
        self.folder.spool("bob", mail(9))
        os.link(self.spool, self.folder.path / "elsewhere")
        self.refused("2 links")

    def test_fifo(self) -> None:
        os.mkfifo(self.spool, 0o600)
        self.refused("FIFO")

    def test_directory(self) -> None:
        self.spool.mkdir()
        self.refused("directory")

    def test_corrupt(self) -> None:
        octets = b"\n\n\nReceived: from nowhere\n\nNo From_ line.\n" + mail(1)
        self.folder.spool("bob", octets)
        self.refused("line 4", "offset 3")
        self.assertEqual(self.spool.read_bytes(), octets)

    def test_corrupt_says_what_qpopper_says(self) -> None:
        self.folder.spool("bob", b"\0\0\0\0")
        self.assertEqual(
            self.refusal(self.serve()),
            b"-ERR [SYS/PERM] Unable to process From lines (envelopes), change recognition modes"
            b" or check for corrupted mail drop.",
        )
