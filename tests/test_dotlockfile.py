"""Dot-locks through dotlockfile(1): the real one without root's rights, and stand-ins that fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable

from twisted.logger import capturedLogs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from popdrop.errors import Busy
from popdrop.stores.mbox import dotlockfile, locks
from popdrop.stores.mbox.locks import DotLock, NoDotLock, SpoolLocks
from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner
from tests.end_to_end.harness import mail
from tests.test_locks import BOTH, dead_pid


def without_rights(uid: int, gid: int, function: Callable[[], None]) -> str:
    """Call `function` in a child with these ids only; `done`, or a traceback of what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            function()
            said = "done"
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(writing, said.encode()[:60_000])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as lines:
        told = lines.read().decode()
    os.waitpid(child, 0)
    return told


class RealTests(SynchronousTestCase):
    """A spool of the server's own user, in a folder like Debian's /var/mail: 2775 root:mail."""

    def setUp(self) -> None:
        if not os.path.exists(dotlockfile.PROGRAM):
            raise SkipTest("needs Debian package liblockfile-bin")
        if os.geteuid() != 0:
            raise SkipTest("needs root's rights, to make a folder of group mail and give them up")
        account = pwd.getpwnam("backup")
        self.uid, self.gid = account.pw_uid, account.pw_gid
        # Not `mktemp`: the folders above that one may be root's alone.
        home = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, home, True)
        os.chmod(home, 0o711)
        self.folder = os.path.join(home, "mail")
        self.state = os.path.join(home, "state")
        os.mkdir(self.folder)
        os.mkdir(self.state, 0o700)
        os.chown(self.state, self.uid, self.gid)
        os.chown(self.folder, 0, grp.getgrnam("mail").gr_gid)
        os.chmod(self.folder, 0o2775)
        self.spool = os.path.join(self.folder, "bob")
        self.dot = self.spool + ".lock"
        self.octets = mail(1) + mail(2) + mail(3)
        with open(self.spool, "wb") as spool:
            spool.write(self.octets)
        os.chmod(self.spool, 0o600)
        os.chown(self.spool, self.uid, self.gid)

    def as_owner(self, function: Callable[[], None]) -> None:
        """The child is refused what only group mail may do, and says what else went wrong."""

        def child() -> None:
            self.assertRaises(PermissionError, os.open, self.dot, os.O_CREAT | os.O_WRONLY, 0o600)
            function()

        self.assertEqual(without_rights(self.uid, self.gid, child), "done")

    def locked(self, kinds: tuple[str, ...] = BOTH) -> SpoolLocks:
        fd = os.open(self.spool, os.O_RDWR)
        self.addCleanup(os.close, fd)
        return SpoolLocks(fd, self.spool, kinds, True)

    def content(self) -> bytes:
        with open(self.dot, "rb") as lock:
            return lock.read()

    def put(self, content: bytes) -> None:
        """Another user's dot-lock."""
        with open(self.dot, "wb") as lock:
            lock.write(content)

    def test_both(self) -> None:
        """Held inside, with our PID; another's try is refused; nothing is left."""

        def child() -> None:
            for kinds in (BOTH, ("dot",)):
                with self.locked(kinds) as held:
                    self.assertEqual(self.content(), b"%d\n" % os.getpid())
                    self.assertTrue(held.held())
                    self.assertEqual(is_locked(self.spool), "fcntl" in kinds)
                    self.assertRaises(Busy, self.locked(("dot",)).__enter__)
                    self.assertEqual(
                        subprocess.run([dotlockfile.PROGRAM, "-p", "-r", "0", self.dot]).returncode,
                        4,
                    )
                    self.assertTrue(held.held())
                self.assertFalse(is_locked(self.spool))
                self.assertEqual(os.listdir(self.folder), ["bob"])

        self.as_owner(child)

    def test_refresh(self) -> None:
        def child() -> None:
            with self.locked() as held:
                os.utime(self.dot, (1000, 1000))
                held.refresh()
                self.assertEqual(os.stat(self.dot).st_mtime, 1000)
                self.patch(locks, "TOUCH_EVERY", 0.0)
                held.refresh()
                self.assertGreater(os.stat(self.dot).st_mtime, 10**9)

        self.as_owner(child)

    def test_busy(self) -> None:
        """Another's lock that holds is left alone, and the fcntl lock given up."""
        self.put(b"%d\n" % os.getpid())

        def child() -> None:
            self.assertEqual(self.assertRaises(Busy, self.locked().__enter__).lock, "spool")
            self.assertFalse(is_locked(self.spool))

        self.as_owner(child)
        self.assertEqual(self.content(), b"%d\n" % os.getpid())

    def test_stale(self) -> None:
        """A dead process's, and one of a former life of ours with the same PID."""
        dead = dead_pid()
        for content in (b"%d\n" % dead, b"%d\n%s\n" % (dead, os.uname().nodename.encode())):
            self.put(content)
            self.as_owner(self.take_and_release)
            self.assertEqual(os.listdir(self.folder), ["bob"])

        def child() -> None:
            self.assertTrue(dotlockfile.make(self.dot))
            self.take_and_release()

        self.as_owner(child)
        self.assertEqual(os.listdir(self.folder), ["bob"])

    def take_and_release(self) -> None:
        with self.locked(("dot",)) as held:
            self.assertTrue(held.held())

    def test_stale_only_with_fcntl(self) -> None:
        """The program itself would not ask for the other lock (decision 9's order)."""
        self.put(b"%d\n" % dead_pid())

        def child() -> None:
            with self.locked(("fcntl",)):
                self.assertRaises(Busy, self.locked(("dot",)).__enter__)

        self.as_owner(child)
        self.assertTrue(os.path.exists(self.dot))

    def test_only_our_own_is_removed(self) -> None:
        def child() -> None:
            with self.locked() as held:
                dotlockfile.remove(self.dot)
                self.assertFalse(held.held())
                self.assertTrue(dotlockfile.make(self.dot))
                self.assertFalse(held.held())

        self.as_owner(child)
        self.assertTrue(os.path.exists(self.dot))

    def test_spool_of_another(self) -> None:
        """The program helps a spool's owner only; said in the words of the error."""
        os.chown(self.spool, 0, 0)
        os.chmod(self.spool, 0o666)

        def child() -> None:
            for _ in range(2):
                error = self.assertRaises(NoDotLock, self.locked().__enter__)
                self.assertEqual(error.errno, errno.EACCES)
                self.assertIn("owner", error.strerror)
                self.assertFalse(is_locked(self.spool))

        self.as_owner(child)
        self.put(b"%d\n" % dead_pid())
        self.as_owner(child)

    def test_maildrop(self) -> None:
        """Read and written as with rights of our own; the journal goes to the state folder."""

        def child() -> None:
            store = MboxStore(os.path.join(self.folder, "{user}"), self.state, owner="any")
            with capturedLogs() as logs:
                drop = store.open(Owner("bob", "", None, None))
                drop.commit([1])
                drop.release()
            self.assertEqual(logs, [])

        self.as_owner(child)
        with open(self.spool, "rb") as spool:
            self.assertEqual(spool.read(), mail(1) + mail(3))
        self.assertEqual(os.listdir(self.folder), ["bob"])


def is_locked(path: str) -> bool:
    """Whether another process would find it locked by fcntl.

    Unlike `test_locks.posix_locked` it starts no interpreter: that may be out of reach here.
    """
    child = os.fork()
    if child == 0:
        try:
            with open(path, "r+b") as spool:
                fcntl.lockf(spool, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(7)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class StandInTests(SynchronousTestCase):
    """What the program may answer besides, from a script in its place."""

    def setUp(self) -> None:
        self.folder = os.path.realpath(self.mktemp())
        os.mkdir(self.folder)
        self.spool = os.path.join(self.folder, "bob")
        self.dot = self.spool + ".lock"
        with open(self.spool, "wb"):
            pass
        self.program = os.path.realpath(self.mktemp())
        self.patch(dotlockfile, "PROGRAM", self.program)

    def answer(self, script: str) -> None:
        with open(self.program, "w") as program:
            program.write(f"#!/bin/sh\n{script}\n")
        os.chmod(self.program, 0o700)

    def refuse(self) -> None:
        """We have no right to make a dot-lock ourselves, nor to remove one."""

        def no(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        self.patch(DotLock, "_take_ourselves", no)
        real = os.unlink

        def unlink(path: str) -> None:
            if path == self.dot:
                no()
            real(path)

        self.patch(locks.os, "unlink", unlink)

    def test_call(self) -> None:
        """Its arguments, a fixed environment, our PID, a folder of everybody's, no input."""
        seen = os.path.join(self.folder, "seen")
        self.patch(os, "environ", {"MAIL": "/x", "LD_PRELOAD": "/x", "PATH": "/x"})
        self.answer(f'{{ echo "$*"; echo $PPID; pwd; cat; env; }} >{seen}')
        self.assertTrue(dotlockfile.make(self.dot))
        with open(seen) as lines:
            arguments, parent, folder, *environment = lines.read().splitlines()
        self.assertEqual(arguments, f"-l -p -r 0 {self.dot}")
        self.assertEqual((int(parent), folder), (os.getpid(), "/"))
        for name in ("MAIL", "LD_PRELOAD", "/x"):
            self.assertNotIn(name, "".join(environment))
        dotlockfile.remove(self.dot)
        with open(seen) as lines:
            self.assertEqual(lines.readline(), f"-u {self.dot}\n")

    def test_statuses(self) -> None:
        """Those of liblockfile: 4 is busy, 3 is no space, 2 is no right; others are no help."""
        for status, number, word in (
            (1, errno.EACCES, "status 1"),
            (2, errno.EACCES, "owner"),
            (3, errno.ENOSPC, "status 3"),
            (5, errno.EACCES, "status 5"),
            (8, errno.EACCES, "status 8"),
        ):
            self.answer(f"printf 'You\\033\\n' >&2; exit {status}")
            error = self.assertRaises(OSError, dotlockfile.make, self.dot)
            self.assertEqual(error.errno, number, status)
            self.assertIn(word, error.strerror)
            self.assertIn("You\\x1b", error.strerror)
            self.assertRaises(PermissionError, dotlockfile.remove, self.dot)
        self.answer("exit 4")
        self.assertFalse(dotlockfile.make(self.dot))
        self.answer("kill -9 $$")
        self.assertRaises(PermissionError, dotlockfile.make, self.dot)

    def test_hangs(self) -> None:
        self.patch(dotlockfile, "LIMIT", 0.01)
        self.answer("exec sleep 600")
        error = self.assertRaises(OSError, dotlockfile.make, self.dot)
        self.assertEqual(error.errno, errno.ETIMEDOUT)

    def test_hangs_and_does_not_listen(self) -> None:
        self.patch(dotlockfile, "LIMIT", 0.01)
        self.patch(dotlockfile, "_GRACE", 0.01)
        self.answer("trap '' TERM; exec sleep 600")
        error = self.assertRaises(OSError, dotlockfile.make, self.dot)
        self.assertEqual(error.errno, errno.ETIMEDOUT)

    def test_not_installed(self) -> None:
        self.refuse()
        for _ in range(2):
            error = self.assertRaises(PermissionError, DotLock(self.spool).take)
            self.assertIn(self.program, error.strerror)
            with open(self.dot, "w"):  # the second time with a lock of another's
                pass

    def test_not_asked_for_what_we_can_do(self) -> None:
        self.answer("exit 9")
        lock = DotLock(self.spool)
        self.assertTrue(lock.take())
        lock.release()
        self.assertFalse(os.path.exists(self.dot))

    def test_lock_of_another(self) -> None:
        """It says that the lock was made, but another's or none is there: not ours."""
        self.refuse()
        for script in (f"echo 1 >{self.dot}", "true"):
            self.answer(script)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.dot, self.dot + ".old")
            lock = DotLock(self.spool)
            self.assertFalse(lock.take())
            lock.release()
        self.assertFalse(os.path.exists(self.dot))

    def test_cannot_be_removed(self) -> None:
        """Logged; the next try takes it away, since we know that it is not held."""
        self.refuse()
        self.answer(f"case $1 in -l) echo $PPID >{self.dot};; *) exit 5;; esac")
        lock = DotLock(self.spool)
        self.assertTrue(lock.take())
        with capturedLogs() as logs:
            lock.release()
        (event,) = logs
        self.assertEqual(event["path"], self.dot)
        self.assertIn("status 5", event["why"])
        again = DotLock(self.spool)
        self.assertFalse(again.take())
        self.assertFalse(again.break_stale())
        self.answer(f"rm {self.dot}")
        self.assertTrue(again.break_stale())
        self.assertFalse(os.path.exists(self.dot))
