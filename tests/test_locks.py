"""Session locks, spool locks, and whose dot-lock may be broken."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import Busy
from popdrop.stores.mbox import locks
from popdrop.stores.mbox.locks import (
    DotLock,
    NoDotLock,
    NoFcntlLock,
    SessionLock,
    SpoolLocks,
    is_stale,
    sweep,
)

BOTH = ("fcntl", "dot")

HOLDER = """
import fcntl, sys
spool = open(sys.argv[1], "r+b")
fcntl.lockf(spool, getattr(fcntl, sys.argv[2]) | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def posix_locked(path: str) -> bool:
    """Whether another process would find the file locked by fcntl."""
    code = (
        "import fcntl, sys\n"
        "try: fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(7)\n"
    )
    return subprocess.run([sys.executable, "-c", code, path]).returncode == 7


def dead_pid() -> int:
    """A PID that no process has any more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


class SpoolCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = os.path.realpath(self.mktemp())
        os.mkdir(self.folder)
        self.spool = os.path.join(self.folder, "bob")
        with open(self.spool, "wb"):
            pass
        self.dot = self.spool + ".lock"

    def opened(self, flags: int = os.O_RDWR) -> int:
        fd = os.open(self.spool, flags)
        self.addCleanup(os.close, fd)
        return fd

    def locks(self, kinds: tuple[str, ...] = BOTH, write: bool = True) -> SpoolLocks:
        return SpoolLocks(self.opened(), self.spool, kinds, write)

    def hold(self, kind: str = "LOCK_EX") -> Callable[[], None]:
        """Let another process hold the fcntl lock; returns what ends it."""
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, self.spool, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout
        self.assertEqual(child.stdout.readline(), b"held\n")

        def end() -> None:
            child.communicate()

        self.addCleanup(lambda: child.poll() is None and end())
        return end

    def write_dot(self, content: bytes, age: float = 0.0) -> None:
        with open(self.dot, "wb") as lock:
            lock.write(content)
        made = os.stat(self.dot).st_mtime - age
        os.utime(self.dot, (made, made))


class SessionLockTests(SpoolCase):
    def session(self, spool: str | None = None) -> SessionLock:
        lock = SessionLock(self.folder, spool or self.spool)
        self.addCleanup(lock.release)
        return lock

    def test_one_at_a_time(self) -> None:
        first, second = self.session(), self.session()
        first.take()
        self.assertEqual(self.assertRaises(Busy, second.take).lock, "session")
        second.release()
        self.assertRaises(Busy, second.take)
        first.release()
        second.take()
        first.release()
        self.assertRaises(Busy, self.session().take)

    def test_other_spools_are_free(self) -> None:
        self.session().take()
        self.session(self.spool + "by").take()

    def test_one_spool_under_two_paths(self) -> None:
        """The folder's symbolic links are resolved; the user's name is not what counts."""
        link = self.mktemp()
        os.symlink(self.folder, link)
        self.session().take()
        self.assertRaises(Busy, self.session(os.path.join(link, "bob")).take)

    def test_over_processes(self) -> None:
        """The lock is on a file, not only in a table, and the file stays and is private."""
        before = set(os.listdir(self.folder))
        lock = self.session()
        lock.take()
        (name,) = set(os.listdir(self.folder)) - before
        path = os.path.join(self.folder, name)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertTrue(posix_locked(path))
        lock.release()
        self.assertFalse(posix_locked(path))
        self.assertTrue(os.path.exists(path))

    def test_lock_file_removed(self) -> None:
        """Within this process the table holds even when somebody tidies the folder up."""
        before = set(os.listdir(self.folder))
        self.session().take()
        (name,) = set(os.listdir(self.folder)) - before
        os.unlink(os.path.join(self.folder, name))
        self.assertRaises(Busy, self.session().take)

    def test_no_folder(self) -> None:
        """A failure leaves nothing held."""
        lock = SessionLock(os.path.join(self.folder, "none"), self.spool)
        self.assertRaises(FileNotFoundError, lock.take)
        self.assertRaises(FileNotFoundError, lock.take)


class SpoolLocksTests(SpoolCase):
    def test_both(self) -> None:
        """Held inside, gone outside; the dot-lock says whose it is."""
        with self.locks() as held:
            self.assertTrue(posix_locked(self.spool))
            with open(self.dot, "rb") as lock:
                self.assertEqual(
                    lock.read(), b"%d\n%s\n" % (os.getpid(), os.uname().nodename.encode())
                )
            self.assertTrue(held.held())
        self.assertFalse(posix_locked(self.spool))
        self.assertEqual(os.listdir(self.folder), ["bob"])

    def test_one_kind_only(self) -> None:
        with self.locks(("fcntl",)) as held:
            self.assertTrue(posix_locked(self.spool))
            self.assertFalse(os.path.exists(self.dot))
            self.assertTrue(held.held())
        with self.locks(("dot",)):
            self.assertFalse(posix_locked(self.spool))
            self.assertTrue(os.path.exists(self.dot))

    def test_without_fcntl_the_spool_is_opened_anew(self) -> None:
        """Under the lock: at an open NFS looks whether the file has changed."""
        seen = []
        real = os.open

        def watching(path: str, *rest: int, **more: int) -> int:
            if path == self.spool:
                seen.append(os.path.exists(self.dot))
            return real(path, *rest, **more)

        for kinds, opened in ((("dot",), [True]), (BOTH, []), (("fcntl",), [])):
            held = self.locks(kinds)
            self.patch(os, "open", watching)
            with held:
                self.assertEqual(seen, opened, kinds)
            self.patch(os, "open", real)
            seen.clear()
        held = self.locks(("dot",))
        os.unlink(self.spool)
        with held:
            self.assertEqual(os.listdir(self.folder), ["bob.lock"])

    def test_a_file_system_without_fcntl_locks(self) -> None:
        """ENOLCK is told apart; other errors and the dot-lock are not touched by it."""
        for code, kind in ((errno.ENOLCK, NoFcntlLock), (errno.EIO, OSError)):

            def refuse(*_: object, code: int = code) -> int:
                raise OSError(code, os.strerror(code))

            self.patch(fcntl, "fcntl", refuse)
            error = self.assertRaises(OSError, self.locks().__enter__)
            self.assertIs(type(error), kind)
            self.assertEqual((error.errno, os.listdir(self.folder)), (code, ["bob"]))

    def test_error_inside(self) -> None:
        def fail() -> None:
            with self.locks():
                raise ZeroDivisionError

        self.assertRaises(ZeroDivisionError, fail)
        self.assertFalse(posix_locked(self.spool))
        self.assertFalse(os.path.exists(self.dot))

    def test_two_descriptors_of_one_process(self) -> None:
        """Unlike POSIX locks, ours exclude each other in a process, and outlive a close."""
        with self.locks(("fcntl",)):
            os.close(os.open(self.spool, os.O_RDWR))
            self.assertEqual(
                self.assertRaises(Busy, self.locks(("fcntl",)).__enter__).lock, "spool"
            )
            self.assertTrue(posix_locked(self.spool))

    def test_busy_fcntl(self) -> None:
        end = self.hold()
        self.assertRaises(Busy, self.locks().__enter__)
        self.assertFalse(os.path.exists(self.dot))
        end()
        with self.locks():
            pass

    def test_busy_dot_lock_gives_up_fcntl(self) -> None:
        """The second one busy: the first is not kept (Debian Policy 11.6)."""
        self.write_dot(b"%d\n" % os.getppid())
        self.assertEqual(self.assertRaises(Busy, self.locks().__enter__).lock, "spool")
        self.assertFalse(posix_locked(self.spool))
        with open(self.dot, "rb") as lock:
            self.assertEqual(lock.read(), b"%d\n" % os.getppid())

    def test_read_only_descriptor(self) -> None:
        """It takes a read lock: readers go together, writers are kept out."""
        fd = self.opened(os.O_RDONLY)
        end = self.hold("LOCK_EX")
        self.assertRaises(Busy, SpoolLocks(fd, self.spool, BOTH, False).__enter__)
        end()
        reader = os.open(self.spool, os.O_RDONLY)
        self.addCleanup(os.close, reader)
        fcntl.fcntl(reader, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
        with SpoolLocks(fd, self.spool, BOTH, False):
            self.assertTrue(posix_locked(self.spool))

    def test_dot_lock_that_cannot_be_made(self) -> None:
        """An error of its own, and the fcntl lock is given up."""
        lock = SpoolLocks(self.opened(), os.path.join(self.folder, "none", "bob"), BOTH, True)
        error = self.assertRaises(NoDotLock, lock.__enter__)
        self.assertEqual(error.errno, errno.ENOENT)
        self.assertFalse(posix_locked(self.spool))

    def test_refresh(self) -> None:
        """The dot-lock is touched, but not at each call."""
        with self.locks() as held:
            os.utime(self.dot, (1000, 1000))
            held.refresh()
            self.assertEqual(os.stat(self.dot).st_mtime, 1000)
            self.patch(locks, "TOUCH_EVERY", 0.0)
            held.refresh()
            self.assertGreater(os.stat(self.dot).st_mtime, 10**9)

    def test_only_our_own_is_removed(self) -> None:
        """A dot-lock that another made after removing ours stays."""
        with self.locks() as held:
            os.unlink(self.dot)
            self.assertFalse(held.held())
            self.write_dot(b"1\n")
            self.assertFalse(held.held())
        with open(self.dot, "rb") as lock:
            self.assertEqual(lock.read(), b"1\n")

    def test_without_tmpfile(self) -> None:
        """File systems without O_TMPFILE: a temporary name and a link, nothing left over."""
        real = os.open

        def no_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not here")
            return real(path, flags, mode)

        self.patch(locks.os, "open", no_tmpfile)
        with self.locks() as held:
            self.assertTrue(held.held())
            self.assertEqual(sorted(os.listdir(self.folder)), ["bob", "bob.lock"])
            self.assertEqual(os.stat(self.dot).st_nlink, 1)
            self.assertRaises(Busy, self.locks(("dot",)).__enter__)
            self.assertEqual(sorted(os.listdir(self.folder)), ["bob", "bob.lock"])
        self.assertEqual(os.listdir(self.folder), ["bob"])

    def test_full_disk(self) -> None:
        """A lock without content is a lock too: mail can be deleted on a full disk."""

        def full(fd: int, octets: bytes) -> int:
            raise OSError(errno.ENOSPC, "full")

        self.patch(locks.os, "write", full)
        with self.locks() as held:
            self.assertTrue(held.held())
            self.assertEqual(os.stat(self.dot).st_size, 0)


class StaleTests(SpoolCase):
    HOST = os.uname().nodename.encode()

    def test_rules(self) -> None:
        """PID dead on this host: at once. No PID, or of another host: after five minutes."""
        now, dead, alive = 2e9, dead_pid(), os.getppid()
        self.patch(locks, "_boot_time", lambda: now - 1000)
        for content, age, stale in (
            (b"%d\n" % dead, 0, True),
            (b"%d" % dead, 0, True),
            (b" %d\n" % dead, 0, True),
            (b"%d\n%s\n" % (dead, self.HOST), 0, True),
            (b"%d:%s\n" % (dead, self.HOST), 0, True),
            (b"%d\n%s\n" % (alive, self.HOST), 0, False),
            (b"%d\n%s\n" % (alive, self.HOST), 900, False),
            (b"%d:%s" % (alive, self.HOST), 900, False),
            (b"%d\n%s\n" % (alive, self.HOST), 1100, True),  # from before the last boot
            (b"%d\nelsewhere\n" % dead, 299, False),
            (b"%d:elsewhere\n" % dead, 299, False),
            (b"%d\nelsewhere\n" % dead, 301, True),
            (b"", 299, False),
            (b"", 301, True),
            (b"0", 299, False),  # procmail's
            (b"0", 301, True),
            (b"-1\n", 299, False),
            (b"words", 299, False),
            (b"\0" * 20, 299, False),
            (b"\0" * 20, 301, True),
            (b"9999999999\n", 0, True),
            (b"", -1000, False),  # the clock went back
        ):
            self.assertEqual(is_stale(content, now - age, now), stale, (content, age))

    def test_young_system(self) -> None:
        """A clock set after boot makes a new lock look older than boot: not broken."""
        self.patch(locks, "_boot_time", lambda: 2e9)
        self.assertFalse(is_stale(b"%d\n" % os.getppid(), 2e9 - 100, 2e9 + 100))

    def test_boot_time(self) -> None:
        """Of this machine: before now, after the epoch."""
        self.assertTrue(10**9 < locks._boot_time() < os.stat(self.spool).st_mtime + 1)

    def test_dead_holder(self) -> None:
        """Its lock is broken, and ours made in its place."""
        for kinds in (BOTH, ("dot",)):
            self.write_dot(b"%d\n" % dead_pid())
            with self.locks(kinds) as held:
                self.assertTrue(held.held())
            self.assertFalse(os.path.exists(self.dot))

    def test_only_while_holding_fcntl(self) -> None:
        """Nobody else may be at it: with the fcntl lock busy a stale lock is left alone."""
        self.write_dot(b"%d\n" % dead_pid())
        end = self.hold()
        for kinds in (BOTH, ("dot",)):
            self.assertRaises(Busy, self.locks(kinds).__enter__)
            self.assertTrue(os.path.exists(self.dot))
        end()
        with self.locks(("dot",)):
            self.assertFalse(posix_locked(self.spool))

    def test_lock_without_pid(self) -> None:
        for content in (b"", b"0", b"\0\0"):
            self.write_dot(content, age=200)
            self.assertRaises(Busy, self.locks().__enter__)
            self.write_dot(content, age=400)
            with self.locks():
                pass

    def test_former_life(self) -> None:
        """With our own PID and host, but not made by this process: left by one before us."""
        self.write_dot(b"%d\n%s\n" % (os.getpid(), self.HOST))
        with self.locks():
            self.assertRaises(Busy, SpoolLocks(self.opened(), self.spool, ("dot",), True).__enter__)

    def test_planted_files(self) -> None:
        """Symbolic links and the like are not followed, not broken, not written (CVE-2010-2024)."""
        victim = os.path.join(self.folder, "victim")
        with open(victim, "wb") as file:
            file.write(b"%d\n" % dead_pid())
        before = os.stat(victim)
        for plant in (
            lambda: os.symlink(victim, self.dot),
            lambda: os.mkfifo(self.dot),
            lambda: os.mkdir(self.dot),
        ):
            plant()
            self.assertRaises(Busy, self.locks().__enter__)
            self.assertTrue(os.path.lexists(self.dot))
            (os.rmdir if os.path.isdir(self.dot) else os.unlink)(self.dot)
        after = os.stat(victim)
        self.assertEqual(
            (before.st_size, before.st_mtime_ns, before.st_nlink),
            (after.st_size, after.st_mtime_ns, after.st_nlink),
        )

    def test_lock_that_went_away(self) -> None:
        """Gone between the try and the look: one more try."""
        lock = DotLock(self.spool)
        self.assertTrue(lock.break_stale())


class SweepTests(SpoolCase):
    def test_sweep(self) -> None:
        """Only old regular files with our mark in their name."""
        keep = [".bob.other", "bob.popdrop-lock-1", ".bob.popdrop-lock-young"]
        for name in [*keep, ".bob.popdrop-lock-00ff", ".eve.popdrop-lock-01"]:
            path = os.path.join(self.folder, name)
            with open(path, "wb"):
                pass
            if "young" not in name:
                os.utime(path, (1000, 1000))
        os.symlink("bob", os.path.join(self.folder, ".link.popdrop-lock-02"))
        self.assertEqual(sweep(self.folder), 2)
        self.assertEqual(
            sorted(os.listdir(self.folder)), sorted([*keep, "bob", ".link.popdrop-lock-02"])
        )

    def test_what_a_killed_taker_leaves(self) -> None:
        """Its temporary is found by its name."""
        lock = DotLock(self.spool)
        path = lock._temporary + "00"
        with open(path, "wb"):
            pass
        os.utime(path, (1000, 1000))
        self.assertEqual(sweep(self.folder), 1)
