"""`open=helper`: the helper opens spools as their users, and passes the descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from popdrop.accounts import helperwire
from popdrop.accounts.helperclient import HelperProcess, SpoolRules
from popdrop.accounts.helperspools import RECENTLY, Met
from popdrop.accounts.helperwire import Kind, Malformed, Opened, Opening
from popdrop.accounts.spoolslot import CHANNELS, SpoolSlot
from popdrop.asowner import as_user
from popdrop.credentials import Cleartext
from popdrop.errors import ConfigError, PermanentFailure, TemporaryFailure
from popdrop.handing import OPENER, opener
from popdrop.stores.mbox.store import MboxFactory
from popdrop.values import Account
from tests.descriptors import descriptors, until_at_most
from tests.end_to_end.harness import DEADLINE
from tests.end_to_end.test_helper import stop
from tests.helper_backends import REGISTRY

ROOT = os.geteuid() == 0
UIDS = (70001, 70002, 70003) if ROOT else (os.geteuid(),) * 3
"""Without root's rights nobody can become another: then the checks are tried with ourselves."""


class WireTests(SynchronousTestCase):
    @settings(deadline=None, derandomize=True)
    @given(st.binary(min_size=1, max_size=64), st.integers(0, 2**64 - 1))
    def test_openings(self, name: bytes, number: int) -> None:
        record = helperwire.encode_opening(Opening(number, name))
        self.assertEqual(helperwire.decode_opening(record), Opening(number, name))
        # Neither is the other's: a login never carries a descriptor.
        self.assertRaises(Malformed, helperwire.decode_request, record)

    @settings(deadline=None, derandomize=True)
    @given(st.integers(0, 2**64 - 1), st.text(max_size=300))
    def test_opened(self, number: int, detail: str) -> None:
        for kind in (Kind.HANDED, Kind.MISSING):
            record = helperwire.encode_opened(Opened(kind, number))
            self.assertEqual(helperwire.decode_opened(record), Opened(kind, number))
        for kind in (Kind.TEMPORARY, Kind.PERMANENT):
            found = helperwire.decode_opened(helperwire.encode_opened(Opened(kind, number, detail)))
            assert isinstance(found, Opened)
            self.assertEqual((found.kind, found.number), (kind, number))
            self.assertTrue(found.detail.isascii() and len(found.detail) <= 200)

    @settings(deadline=None, derandomize=True)
    @given(st.binary(max_size=300))
    def test_garbage(self, record: bytes) -> None:
        for decode in (helperwire.decode_opening, helperwire.decode_opened):
            with contextlib.suppress(Malformed):
                decode(record)


class MetTests(SynchronousTestCase):
    def test_by_connection_name_and_time(self) -> None:
        now = [1000.0]
        met = Met(lambda: now[0])
        one, other = socket.socketpair()
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        met.note(one, Account(b"bob", uid=7, gid=8))
        met.note(one, Account(b"off", uid=7, disabled=True))
        found = met.find(one, b"bob")
        assert found is not None
        self.assertEqual(found[1:], (7, 8))
        for slot, name in ((other, b"bob"), (one, b"Bob"), (one, b"off")):
            self.assertIsNone(met.find(slot, name))
        now[0] += RECENTLY
        self.assertIsNone(met.find(one, b"bob"))

    def test_memory_is_bounded(self) -> None:
        met = Met(lambda: 0.0)
        one, other = socket.socketpair()
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        for number in range(25_000):
            met.note(one, Account(b"u%d" % number))
        self.assertIsNone(met.find(one, b"u0"))
        self.assertIsNotNone(met.find(one, b"u24999"))
        self.assertLessEqual(len(met._guests), 10_000)


class RightsTests(SynchronousTestCase):
    def test_of_one_thread(self) -> None:
        """While one thread has the rights of a user, another has still those of the process."""
        folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, folder)
        folder.chmod(0o711)
        secret = folder / "secret"
        secret.write_text("of ours")
        secret.chmod(0o600)
        outcome: list[str] = []

        def look() -> None:
            with as_user(UIDS[0], os.getegid() if not ROOT else UIDS[0]):
                inside.set()
                done.wait(DEADLINE)
                try:
                    outcome.append(secret.read_text())
                except PermissionError:
                    outcome.append("refused")
            outcome.append(secret.read_text())

        inside, done = threading.Event(), threading.Event()
        thread = threading.Thread(target=look)
        thread.start()
        inside.wait(DEADLINE)
        self.assertEqual(secret.read_text(), "of ours")
        done.set()
        thread.join(DEADLINE)
        self.assertEqual(outcome, ["refused" if ROOT else "of ours", "of ours"])

    def test_an_id_that_there_is_not(self) -> None:
        """-1 only asks (setfsuid(2)): nothing may be done with the rights that are left."""
        inside = []
        with contextlib.suppress(PermissionError), as_user(2**32 - 1, 2**32 - 1):
            inside.append(1)
        self.assertEqual(inside, [])


class OptionTests(SynchronousTestCase):
    def test_wrong(self) -> None:
        folder = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, folder)
        path = f"{folder}/{{user}}"
        for words, text in (
            ({"open": "yes"}, "must be auto, direct, helper or helper-all"),
            ({"open": "helper", "owner": "any"}, "owner=any"),
        ):
            error = self.assertRaises(ConfigError, MboxFactory().make, None, folder, path, **words)
            self.assertIn(text, str(error))
        self.assertRaises(
            ConfigError, MboxFactory().make, None, folder, "{home}/mbox", open="helper"
        )


class OpenerTests(SynchronousTestCase):
    """Whose uid is taken, where the spools do not matter: there are none."""

    def test_ids_that_are_refused(self) -> None:
        folder = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o711)
        path = f"{folder}/{{user}}"
        for owner, name, uid in (
            (None, b"root", None),
            (None, b"bob", 0),
            ("0", b"bob", None),
            ("root", b"bob", UIDS[0]),
            (None, b"bob", 10),
            (None, b"no-such-account-here", None),
            # A login of digits is no uid.
            (None, str(UIDS[0]).encode(), None),
            ("no-such-account-here", b"bob", UIDS[0]),
        ):
            with self.assertRaises(PermanentFailure, msg=f"{owner} {name!r} {uid}"):
                opener(path, owner, 11)(name, uid, None)
        for owner, name, uid in ((None, b"bob", UIDS[0]), (str(UIDS[0]), b"bob", None)):
            if uid or ROOT:
                self.assertIsNone(opener(path, owner, 11)(name, uid, None))

    def test_links_below_the_folder_of_the_template(self) -> None:
        """Group mail may put them there; above it they are the administrator's."""
        home = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, home)
        home.chmod(0o711)
        for folder in ("real", "real/bob", "private"):
            (home / folder).mkdir(mode=0o711)
        (home / "mail").symlink_to("real")
        for folder, words in (("real/bob", b"mail"), ("private", b"no mail")):
            path = home / folder / "mbox"
            path.write_bytes(words)
            path.chmod(0o600)
            if ROOT:
                os.chown(path, UIDS[0], UIDS[0])
        handed = opener(f"{home}/mail/{{user}}/mbox", None, 11)
        before = descriptors()
        fd = handed(b"bob", UIDS[0], None)
        assert fd is not None
        self.assertEqual(os.pread(fd, 100, 0), b"mail")
        os.close(fd)
        (home / "real" / "bob" / "mbox").unlink()
        self.assertIsNone(handed(b"bob", UIDS[0], None))
        (home / "real" / "bob").rmdir()
        self.assertRaises(TemporaryFailure, handed, b"bob", UIDS[0], None)
        (home / "real" / "bob").symlink_to(home / "private")
        error = self.assertRaises(PermanentFailure, handed, b"bob", UIDS[0], None)
        self.assertIn("ENOTDIR", error.detail)
        self.assertLessEqual(descriptors(), before)


class ProcessCase(TestCase):
    timeout = DEADLINE

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.folder.chmod(0o711)
        self.names = [b"u%d" % uid for uid in UIDS]
        for name, uid in zip(self.names, UIDS, strict=True):
            self.spool(name, uid)

    def spool(self, name: bytes, uid: int) -> Path:
        path = self.folder / os.fsdecode(name)
        path.write_bytes(b"of " + name)
        path.chmod(0o600)
        if ROOT:
            os.chown(path, uid, uid)
        return path

    def start(self, anybody: bool = False, slots: int = 1) -> HelperProcess:
        process = HelperProcess(["numbered:"], registry=REGISTRY, slots=slots)
        process.spool_rules = SpoolRules(OPENER, f"{self.folder}/{{user}}", None, 11, anybody)
        process.start(os.geteuid(), os.getegid())
        process.attach(reactor)
        self.addCleanup(process.stop, reactor)
        self.process = process
        return process

    @property
    def slot(self) -> SpoolSlot:
        current = self.process.current
        assert current is not None and current.spools is not None
        return current.spools

    @property
    def helper(self) -> int:
        current = self.process.current
        assert current is not None
        return current.hello.pid

    async def login(self, name: bytes) -> None:
        await self.process.checkers()[0].requestAvatarId(Cleartext(name, name[::-1]))

    def open(self, name: bytes) -> Deferred[int | None]:
        return deferToThread(self.process.open_spool, name)

    async def content(self, name: bytes) -> bytes:
        fd = await self.open(name)
        assert fd is not None
        try:
            self.assertFalse(os.get_inheritable(fd))
            os.pwrite(fd, b"OF", 0)
            os.pwrite(fd, b"of", 0)
            return os.pread(fd, 100, 0)
        finally:
            os.close(fd)

    async def fails(self, name: bytes, kind: type[Exception]) -> Any:
        try:
            await self.open(name)
        except kind as error:
            return error
        raise AssertionError(f"{name!r} was opened")


class OpenTests(ProcessCase):
    async def test_spools_of_three_users(self) -> None:
        self.start()
        for name in self.names:
            await self.login(name)
        for name in self.names * 2:
            self.assertEqual(await self.content(name), b"of " + name)

    async def test_only_whose_login_was_verified(self) -> None:
        """A server that was taken over asks for everybody; it is given who has just logged in."""
        self.start()
        self.spool(b"u75000", 75000 if ROOT else UIDS[0])
        await self.login(self.names[0])
        with contextlib.suppress(Exception):
            await self.process.checkers()[0].requestAvatarId(Cleartext(b"u75000", b"wrong"))
        error = await self.fails(b"u75000", TemporaryFailure)
        self.assertEqual(error.detail, "this helper has not verified that login")
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])

    async def test_only_over_the_connection_of_the_login(self) -> None:
        process = self.start(slots=2)
        await self.login(self.names[0])
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])
        process.current = process.slots[1]
        await self.fails(self.names[0], TemporaryFailure)
        process.attach(reactor)
        await self.login(self.names[0])
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])

    async def test_names_that_are_no_names(self) -> None:
        """Nothing that is sent becomes a path of the sender's choice."""
        self.start(anybody=True)
        (self.folder / "sub").mkdir()
        for name in (b"../etc/passwd", b"sub/x", b".", b"..", b".u70001.lock", b"u70001.lock"):
            await self.fails(name, PermanentFailure)
        for name in (b"", b"x" * 65):
            await self.fails(name, PermanentFailure)
        error = await self.fails(b"no-such-account-here", PermanentFailure)
        self.assertEqual(error.detail, "there is no system account of that name")

    async def test_missing(self) -> None:
        self.start()
        (self.folder / os.fsdecode(self.names[0])).unlink()
        await self.login(self.names[0])
        self.assertIsNone(await self.open(self.names[0]))

    async def test_what_is_no_spool_of_his(self) -> None:
        self.start()
        name = self.names[0]
        path, other = self.folder / os.fsdecode(name), self.folder / "other"
        await self.login(name)
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        self.spool(b"other", UIDS[1])
        cases = [
            (lambda: path.symlink_to(other), "is a symbolic link"),
            (lambda: os.link(other, path), "has 2 links"),
            (lambda: os.mkfifo(path), "is a FIFO"),
            (lambda: path.mkdir(), "is a directory"),
            (lambda: path.symlink_to(self.folder), "is a symbolic link"),
        ]
        if ROOT:
            cases.append((lambda: self.spool(name, UIDS[1]) and None, "belongs to uid 70002, not"))
            cases.append((lambda: self.spool(name, 0) and None, "belongs to uid 0, not"))
        for make, words in cases:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
            make()
            error = await self.fails(name, PermanentFailure)
            self.assertIn(words, error.detail)
        self.assertEqual(other.read_bytes(), b"of other")

    async def test_a_folder_that_the_user_may_not_enter(self) -> None:
        """It is opened with the user's rights, and with none of root's."""
        self.start()
        self.folder.chmod(0o000)
        await self.login(self.names[0])
        if ROOT:
            self.assertTrue(Path(self.folder, os.fsdecode(self.names[0])).exists())
        error = await self.fails(self.names[0], PermanentFailure)
        self.assertIn("EACCES", error.detail)
        self.folder.chmod(0o711)

    async def test_readable_only(self) -> None:
        self.start()
        (self.folder / os.fsdecode(self.names[0])).chmod(0o400)
        await self.login(self.names[0])
        fd = await self.open(self.names[0])
        assert fd is not None
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        os.close(fd)
        self.assertEqual(mode, os.O_RDONLY)

    async def test_no_descriptor_is_left(self) -> None:
        self.start()
        for name in self.names:
            await self.login(name)
        await self.content(self.names[0])
        await deferToThread(lambda: None)
        ours, theirs = descriptors(), descriptors(self.helper) if ROOT else 0
        for number in range(60):
            await self.content(self.names[number % 3])
            await self.fails(b"u71234", TemporaryFailure)
        await until_at_most(ours)
        if ROOT:
            await until_at_most(theirs, self.helper)

    async def test_locks_are_not_shared_with_the_helper(self) -> None:
        """An OFD lock ends with the last copy: the helper keeps none."""
        self.start()
        await self.login(self.names[0])
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        for _ in range(2):
            fd = await self.open(self.names[0])
            assert fd is not None
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
            other = os.open(self.folder / os.fsdecode(self.names[0]), os.O_RDWR)
            self.assertRaises(OSError, fcntl.fcntl, other, fcntl.F_OFD_SETLK, lock)
            os.close(fd)
            while True:  # it may be about to close its copy
                try:
                    fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
                except BlockingIOError:
                    await deferLater(reactor, 0.001)
                else:
                    break
            os.close(other)


class EndingTests(ProcessCase):
    async def sent(self) -> None:
        """Until a request lies in a socket, unread (unix(7): SIOCOUTQ)."""

        def unread(channel: socket.socket) -> int:
            answer = fcntl.ioctl(channel, termios.TIOCOUTQ, b"\0\0\0\0")
            return int.from_bytes(answer, "little")

        while not any(map(unread, self.slot._all)):
            await deferLater(reactor, 0.01)

    async def test_killed_in_the_middle(self) -> None:
        process = self.start()
        before = self.helper
        await self.login(self.names[0])
        await self.content(self.names[0])
        stop(before)
        waiting = self.open(self.names[0])
        await self.sent()
        os.kill(before, signal.SIGKILL)
        try:
            await waiting
        except TemporaryFailure as error:
            self.assertEqual(error.detail, "the helper ended: signal 9")
        else:
            raise AssertionError("a dead helper has opened it")
        await self.login(self.names[0])
        self.assertNotEqual(self.helper, before)
        self.assertTrue(process.started)
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])

    async def test_a_new_helper_has_verified_nobody(self) -> None:
        self.start()
        before = self.helper
        await self.login(self.names[0])
        os.kill(before, signal.SIGKILL)
        while self.helper == before:
            await deferLater(reactor, 0.01)
        error = await self.fails(self.names[0], TemporaryFailure)
        self.assertEqual(error.detail, "this helper has not verified that login")
        await self.login(self.names[0])
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])

    async def test_no_answer_in_time(self) -> None:
        """What comes too late is nobody else's spool, and is closed."""
        self.start(anybody=True)
        for name in self.names:
            await self.login(name)
        await self.content(self.names[0])
        ours = descriptors()
        stop(self.helper)
        self.slot.patience = 0.05
        for _ in range(2 * CHANNELS):
            error = await self.fails(self.names[0], TemporaryFailure)
            self.assertEqual(error.detail, "the helper gave no answer within 0.05 s")
        os.kill(self.helper, signal.SIGCONT)
        self.slot.patience = DEADLINE
        for name in self.names[1:] * CHANNELS:
            self.assertEqual(await self.content(name), b"of " + name)
        await until_at_most(ours)

    async def test_a_message_that_is_none(self) -> None:
        """It ends that connection for good, and no other."""
        self.start()
        await self.login(self.names[0])
        channels = list(self.slot._all)
        request = helperwire.Request(Kind.PASSWORD, 0, 7, b"u1", helperwire.Secret(b"1u"))
        for channel, record in (
            (channels[0], b"garbage"),
            (channels[1], bytes(helperwire.encode_request(request))),
            (channels[2], bytes(5000)),
        ):
            channel.send(record)
            ended = select.poll()
            ended.register(channel, select.POLLHUP)
            self.assertTrue(await deferToThread(ended.poll, DEADLINE * 1000))
        for _ in range(3):
            await self.fails(self.names[0], TemporaryFailure)
        self.assertEqual(await self.content(self.names[0]), b"of " + self.names[0])
        channels[3].send(b"more")
        ended = select.poll()
        ended.register(channels[3], select.POLLHUP)
        self.assertTrue(await deferToThread(ended.poll, DEADLINE * 1000))
        await self.fails(self.names[0], TemporaryFailure)
        error = await self.fails(self.names[0], TemporaryFailure)
        self.assertEqual(error.detail, "the helper is gone")

    async def test_descriptors_cannot_be_pushed_in(self) -> None:
        self.start()
        await self.login(self.names[0])
        await self.content(self.names[0])
        theirs = descriptors(self.helper) if ROOT else 0
        record = helperwire.encode_opening(Opening(1, b"u71234"))
        for channel in self.slot._all:
            socket.send_fds(channel, [record], [0, 1])
            ended = select.poll()
            ended.register(channel, select.POLLIN)
            self.assertTrue(await deferToThread(ended.poll, DEADLINE * 1000))
        if ROOT:
            # A connection over which descriptors come is shut, and it was one of the helper's.
            await until_at_most(theirs, self.helper)

    async def test_the_end(self) -> None:
        """A stop wakes who waits, and leaves no descriptor."""
        await deferToThread(lambda: None)  # the reactor has opened what it needs
        before = descriptors()
        process = self.start(anybody=True)
        await self.login(self.names[0])
        stop(self.helper)
        waiting = self.open(self.names[0])
        await self.sent()
        slot, helper = self.slot, self.helper
        slot.close()
        try:
            await waiting
        except TemporaryFailure:
            pass
        else:
            raise AssertionError("it was opened")
        os.kill(helper, signal.SIGCONT)
        await process.stop(reactor)
        slot.close()
        self.assertRaises(TemporaryFailure, slot.open, self.names[0])
        await until_at_most(before)
