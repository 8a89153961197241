"""Disks that are full, read-only or broken, under a real server.

The disks are small tmpfs mounts: for root at once, for others in a user namespace.
"""

from __future__ import annotations

import os
import poplib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.crash.scene import SCENES, SECRET, Place, Told, answer
from tests.crash.strace import Strace
from tests.end_to_end.harness import DEADLINE, ROOT, Twistd, environment, mail

COUNT = 6
HOST = os.uname().nodename.encode()
BODY = b"x" * 63 + b"\n"
MAILS = [mail(number, BODY * 300) for number in range(COUNT)]


def texts(client: poplib.POP3) -> list[list[bytes]]:
    return [client.retr(number + 1)[1] for number in range(client.stat()[0])]


def sent(*numbers: int) -> list[list[bytes]]:
    return [MAILS[number].split(b"\n")[1:-2] for number in numbers]


class DiskCase(SynchronousTestCase):
    def setUp(self) -> None:
        if os.geteuid() != 0:
            raise SkipTest("runs in a user namespace, by NamespaceTests")
        self.place = Place(self)
        self.spool = self.place.spool()
        self.put()

    def put(self, *numbers: int) -> None:
        self.spool.write_bytes(b"".join(MAILS[n] for n in numbers or range(COUNT)))
        self.spool.chmod(0o660)

    def holds(self, *numbers: int) -> None:
        self.assertTrue(self.spool.read_bytes() == b"".join(MAILS[n] for n in numbers))

    def mount(self, path: Path, options: str) -> None:
        """A tmpfs of its own there, with what lies there now."""
        aside = path.parent / f"{path.name}.aside"
        path.rename(aside)
        path.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "popdrop-test", path]
        subprocess.run(command, check=True, timeout=DEADLINE)
        self.addCleanup(subprocess.run, ["umount", "-l", path], check=True, timeout=DEADLINE)
        shutil.copytree(aside, path, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def remount(self, path: Path, options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", path]
        subprocess.run(command, check=True, timeout=DEADLINE)

    def fill(self, folder: Path) -> Path:
        """To the last octet; gives the file to remove."""
        filler = folder / "filler"
        with filler.open("ab", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue
        return filler

    def delete(self, server: Twistd, *numbers: int) -> bytes:
        """What QUIT is answered."""
        client = self.place.login(server)
        for number in numbers:
            client.dele(number + 1)
        return answer(client.quit)

    def refused(self, line: bytes, code: bytes) -> None:
        self.assertTrue(line.startswith(b"-ERR [" + code + b"] "), line)
        self.assertNotIn(b"internal error", line)

    def sees(self, server: Twistd, *numbers: int) -> None:
        client = self.place.login(server)
        self.assertTrue(texts(client) == sent(*numbers))
        client.quit()
        self.assertEqual(self.place.left() - {"filler"}, set())
        self.holds(*numbers)


class FullTests(DiskCase):
    """The spools' disk has not an octet left, and the state folder lies on the same."""

    def serve_full(self, *options: str) -> Twistd:
        folder = self.place.folder
        self.mount(folder.spools, "size=1m")
        (folder.spools / "state").mkdir(mode=0o700)
        (folder.spools / "state" / "accounts.db").write_bytes(folder.accounts.read_bytes())
        for name in ("accounts.db", "accounts.db.key"):
            shutil.copy(folder.state / name, folder.spools / "state" / name)
            (folder.spools / "state" / name).chmod(0o600)
        folder.state = folder.spools / "state"
        folder.accounts = folder.state / "accounts.db"
        server = self.place.serve(*options)
        self.put()
        self.delete(server)
        self.filler = self.fill(folder.spools)
        return server

    def sees(self, server: Twistd, *numbers: int) -> None:
        client = self.place.login(server)
        self.assertTrue(texts(client) == sent(*numbers))
        client.quit()
        self.holds(*numbers)

    def test_all(self) -> None:
        server = self.serve_full()
        self.assertTrue(self.delete(server, *range(COUNT)).startswith(b"+OK"))
        self.assertEqual(self.spool.read_bytes(), b"")

    def test_tail(self) -> None:
        server = self.serve_full()
        self.assertTrue(self.delete(server, 4, 5).startswith(b"+OK"))
        self.sees(server, 0, 1, 2, 3)

    def test_first(self) -> None:
        server = self.serve_full()
        before = self.place.facts()
        for _ in range(2):
            self.refused(self.delete(server, 0), b"SYS/TEMP")
            self.sees(server, *range(COUNT))
        self.filler.unlink()
        self.assertTrue(self.delete(server, 0).startswith(b"+OK"))
        self.sees(server, *range(1, COUNT))
        self.assertEqual(self.place.facts(), before)
        self.assertNotIn("Traceback", server.stop())

    def test_with_a_folder_elsewhere(self) -> None:
        """By `journal-dir=`; and a kill in the middle is recovered from there."""
        elsewhere = self.place.folder.path / "elsewhere"
        store = f"mbox:{self.place.folder.spools}/{{user}}"
        server = self.serve_full("--store", f"{store}:journal-dir={elsewhere}")
        self.assertTrue(self.delete(server, 0).startswith(b"+OK"))
        self.sees(server, *range(1, COUNT))
        self.assertEqual(os.listdir(elsewhere), [])
        client = self.place.login(server)
        client.dele(1)
        fault = "ftruncate:signal=KILL:when=1"
        strace = Strace(self.place.trace, server.process.pid, ["ftruncate"], fault)
        self.assertEqual(answer(client.quit), b"")
        strace.detach()
        server.stop()
        self.assertEqual(len(os.listdir(elsewhere)), 1)
        # Without the option, too: the folder is on record.
        again = self.place.serve()
        self.sees(again, *range(2, COUNT))
        self.assertEqual(os.listdir(elsewhere), [])

    def test_spools_only(self) -> None:
        """The state folder has space: nothing need be set."""
        self.mount(self.place.folder.spools, "size=1m")
        server = self.place.serve()
        self.fill(self.place.folder.spools)
        self.assertTrue(self.delete(server, 0, 2).startswith(b"+OK"))
        self.sees(server, 1, 3, 4, 5)

    def test_no_file_can_be_made(self) -> None:
        """Not even the dot-lock: mail can be fetched, and all that is deleted is still there."""
        spools = self.place.folder.spools
        self.mount(spools, "nr_inodes=10")
        server = self.place.serve()
        self.fill_inodes(spools)
        client = self.place.login(server)
        self.assertTrue(texts(client) == sent(*range(COUNT)))
        client.dele(1)
        self.refused(answer(client.quit), b"SYS/TEMP")
        self.holds(*range(COUNT))
        for path in spools.glob("file-*"):
            path.unlink()
        self.assertTrue(self.delete(server, 0).startswith(b"+OK"))
        self.sees(server, *range(1, COUNT))

    def fill_inodes(self, folder: Path) -> None:
        try:
            for number in range(1000):
                (folder / f"file-{number}").touch()
        except OSError:
            return
        self.fail("a disk without end")

    def test_state_folder(self) -> None:
        """No lock of a session can be made there: a clear answer, and nothing else is hurt."""
        state = self.place.folder.state
        self.mount(state, "nr_inodes=16")
        server = self.place.serve()
        carol = self.place.login(server, "carol")
        self.fill_inodes(state)
        client = server.client()
        self.refused(answer(lambda: client.apop("bob", SECRET)), b"SYS/TEMP")
        client.close()
        self.assertEqual(len(carol.retr(1)[1]), 6)
        for path in state.glob("file-*"):
            path.unlink()
        self.sees(server, *range(COUNT))
        self.assertNotIn("Traceback", server.stop())

    def test_state_folder_at_the_start(self) -> None:
        """One line that says where there is no space."""
        state = self.place.folder.state
        self.mount(state, "size=256k")
        self.fill(state)
        said = self.assertRaises(AssertionError, Twistd, self, self.place.folder).args[0]
        self.assertNotIn("Traceback", said)
        self.assertIn(str(state), said)
        self.assertIn("disk is full", said)


class LimitTests(DiskCase):
    def test_file_size(self) -> None:
        """RLIMIT_FSIZE: SIGXFSZ is ignored, the journal cannot be written, nothing is lost."""
        server = self.place.serve()
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (50_000, limits[1]))
        self.refused(self.delete(server, 0), b"SYS/TEMP")
        self.sees(server, *range(COUNT))
        self.assertTrue(self.delete(server, 5).startswith(b"+OK"))
        self.sees(server, *range(COUNT - 1))
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        self.assertTrue(self.delete(server, 0).startswith(b"+OK"))
        self.sees(server, *range(1, COUNT - 1))
        self.assertNotIn("Traceback", server.stop())

    def test_read_only(self) -> None:
        spools = self.place.folder.spools
        self.mount(spools, "size=1m")
        self.remount(spools, "ro")
        server = self.place.serve()
        client = self.place.login(server)
        self.assertTrue(texts(client) == sent(*range(COUNT)))
        client.dele(1)
        self.refused(answer(client.quit), b"SYS/PERM")
        self.sees(server, *range(COUNT))
        self.remount(spools, "rw")
        self.assertTrue(self.delete(server, 0).startswith(b"+OK"))
        self.sees(server, *range(1, COUNT))
        self.assertNotIn("Traceback", server.stop())


class BrokenTests(DiskCase):
    """One call fails, by strace."""

    READS: ClassVar[list[str]] = ["pread64", "preadv2"]

    def faulty(self, server: Twistd, names: list[str], fault: str, thread: int = 0) -> Strace:
        return Strace(
            self.place.trace, server.process.pid, names, f"{','.join(names)}:{fault}", thread
        )

    def test_reading_one_message(self) -> None:
        server = self.place.serve()
        for error in ("EIO", "ESTALE"):
            self.put()
            client = self.place.login(server)
            for command in ("RETR 2", "TOP 2 1", "UIDL"):
                strace = self.faulty(server, self.READS, f"error={error}")
                said = answer(partial(client._shortcmd, command))  # type: ignore[attr-defined]
                self.assertIn("(INJECTED)", strace.detach())
                self.refused(said, b"SYS/TEMP")
                self.assertTrue(client.retr(1)[1] == sent(0)[0])
                self.assertTrue(client.retr(2)[1] == sent(1)[0])
            self.assertEqual(len(client.uidl()[1]), COUNT)
            client.quit()
        self.holds(*range(COUNT))
        self.assertNotIn("Traceback", server.stop())

    def test_in_the_middle_of_a_message(self) -> None:
        """What has begun as a message must not look like the end of one."""
        server = self.place.serve()
        self.spool.write_bytes(mail(0, BODY * 40_000))
        for when in (2, 4):
            client = self.place.login(server)
            strace = self.faulty(server, self.READS, f"error=EIO:when={when}+")
            failure = self.assertRaises((poplib.error_proto, OSError), client.retr, 1)
            self.assertIn("(INJECTED)", strace.detach())
            self.assertNotIn(b"+OK", str(failure).encode())
            client.close()
        client = self.place.login(server)
        self.assertEqual(len(client.retr(1)[1]), 40_005)
        client.quit()

    def test_no_lock_daemon(self) -> None:
        """ENOLCK, as on NFS without one: the log says what to do."""
        server = self.place.serve()
        thread = self.place.thread(server)
        client = server.client()
        # The first lock is the session's, in the state folder.
        strace = self.faulty(server, ["fcntl"], "error=ENOLCK:when=2+", thread)
        said = answer(lambda: client.apop("bob", SECRET))
        strace.detach()
        self.refused(said, b"SYS/TEMP")
        self.assertIn(b"fcntl", said)
        client.close()
        client = self.place.login(server)
        client.dele(1)
        strace = self.faulty(server, ["fcntl"], "error=ENOLCK", thread)
        said = answer(client.quit)
        strace.detach()
        self.refused(said, b"SYS/TEMP")
        self.holds(*range(COUNT))
        log = server.stop()
        self.assertEqual(log.count("locks=dot"), 2, log)
        self.assertNotIn("Traceback", log)


class ShortTests(SynchronousTestCase):
    """Every write to a file does half of what it was asked to, by a library in front of libc."""

    def setUp(self) -> None:
        self.place = Place(self)
        compiler = shutil.which("gcc")
        if compiler is None:
            raise SkipTest("needs the Debian packages gcc and libc6-dev")
        library = self.place.folder.path / "short.so"
        source = Path(__file__).with_name("short.c")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, source],
            check=True,
            timeout=DEADLINE,
        )
        self.server = self.place.serve(preload=library)

    def test_every_scene(self) -> None:
        for scene in SCENES:
            told = Told(self.place, scene, self.server)
            strace = Strace(self.place.trace, self.server.process.pid, ["pwrite64"])
            said = told.quit()
            short = re.findall(r"(\d+), \d+\) = (\d+)", strace.detach())
            self.assertTrue(said.startswith(b"+OK"), said)
            self.assertEqual(told.check(self.server, said), "after", scene.name)
            if len(scene.deleted) < COUNT:
                self.assertGreater(len(short), 10, scene.name)
        self.assertNotIn("Traceback", self.server.stop())

    def test_dot_lock(self) -> None:
        """Half a process number would be that of another process: none is better."""
        scene = SCENES[0]
        told = Told(self.place, scene, self.server)
        lock = Path(f"{self.place.spool()}.lock")
        # Stopped when it holds the locks.
        names = ["rename", "write"]
        fault = "rename:signal=STOP:when=1"
        strace = Strace(self.place.trace, self.server.process.pid, names, fault)
        told.client._putcmd("QUIT")  # type: ignore[attr-defined]
        while "SIGSTOP" not in self.place.trace.read_text("utf-8", "replace"):
            self.assertIsNone(self.server.process.poll())
            time.sleep(0.01)
        content = lock.read_bytes()
        self.server.process.send_signal(signal.SIGCONT)
        self.assertTrue(told.client._getline()[0].startswith(b"+OK"))  # type: ignore[attr-defined]
        strace.detach()
        self.assertIn(content, (b"", b"%d\n%s\n" % (self.server.process.pid, HOST)))


class NamespaceTests(SynchronousTestCase):
    def test_as_another(self) -> None:
        """Who is not root becomes so in a namespace of his own, and runs all of the above."""
        if os.geteuid() == 0:
            return
        inside = ["unshare", "--user", "--map-root-user", "--mount"]
        if subprocess.run([*inside, "true"], check=False, timeout=DEADLINE).returncode:
            raise SkipTest(
                "needs root, or user namespaces (sysctl kernel.unprivileged_userns_clone)"
            )
        done = subprocess.run(
            [*inside, sys.executable, "-m", "twisted.trial", "--temp-directory=trial", __name__],
            cwd=ROOT,
            env=environment(Path.home()),
            capture_output=True,
            text=True,
            timeout=10 * DEADLINE,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
