"""The mbox store: what it refuses, what it serves, and that it loses and doubles no mail."""

from __future__ import annotations

import contextlib  # not `suppress`: trial reads a module attribute of that name
import errno
import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.errors import (
    Busy,
    ConfigError,
    NoSuchOwner,
    PermanentFailure,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IBlockingMaildrop, IStoreFactory
from popdrop.stores.mbox import drop as drop_module
from popdrop.stores.mbox import identity as identity_module
from popdrop.stores.mbox import locks as locks_module
from popdrop.stores.mbox import spool as spool_module
from popdrop.stores.mbox.drop import _NO_SPANS, CORRUPT, MboxDrop, plan
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.store import MboxFactory, MboxStore
from popdrop.stores.template import Template
from popdrop.testing import StoreContract, as_sent
from popdrop.values import Owner
from tests import oracle_mbox
from tests.descriptors import descriptors
from tests.test_scan import FROM, make_spool, mboxes, spans_of

BOB = Owner("bob")


def message(number: int, body: bytes = b"body\n") -> bytes:
    """One message of a spool, From_ line and separator in."""
    return FROM + b"Subject: %d\n\n%s\n" % (number, body)


def as_read(octets: bytes) -> list[bytes]:
    return [m.sent for m in oracle_mbox.read(octets)]


class MboxCase(SynchronousTestCase):
    options: dict[str, object] = {}

    def setUp(self) -> None:
        self.folder = os.path.realpath(self.mktemp())
        self.state = os.path.join(self.folder, "state")
        self.path = os.path.join(self.folder, "mail", "bob")
        os.makedirs(os.path.dirname(self.path))
        self.store = self.make(**self.options)

    def make(self, **options: object) -> MboxStore:
        template = os.path.join(self.folder, "mail", "{user}")
        return MboxStore(template, self.state, **options)  # type: ignore[arg-type]

    def write(self, octets: bytes, settled: bool = True) -> bytes:
        """Make or overwrite the spool; `settled`: long ago."""
        with open(self.path, "wb") as spool:
            spool.write(octets)
        if settled:
            self.age()
        return octets

    def age(self) -> None:
        """Let it be long since anything was written. (A ctime cannot be set back.)"""
        long_ago = time.time() - 1000
        os.utime(self.path, (long_ago, long_ago))
        self.patch(drop_module, "clock_ns", lambda: time.time_ns() + 1000 * 10**9)

    def append(self, octets: bytes) -> None:
        with open(self.path, "ab") as spool:
            spool.write(octets)

    def spool(self) -> bytes:
        with open(self.path, "rb") as spool:
            return spool.read()

    def opened(self, store: MboxStore | None = None) -> MboxDrop:
        drop = (store or self.store).open(BOB)
        self.addCleanup(drop.release)
        return drop

    def refused(self, kind: type[PopdropError], store: MboxStore | None = None) -> PopdropError:
        """The login fails, says so in a text of ours, and holds nothing."""
        error = self.assertRaises(kind, (store or self.store).open, BOB)
        self.assertNotIn(self.folder, error.text)
        again = self.assertRaises(kind, (store or self.store).open, BOB)
        self.assertEqual(again.detail, error.detail)
        return error

    def uids(self, drop: MboxDrop) -> list[bytes]:
        drop.identify()
        return [drop.listing.uid(index) for index in range(len(drop.listing))]

    def no_litter(self) -> None:
        """No lock and no temporary is left in the spool folder."""
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ["bob"])


class Contract(StoreContract, MboxCase):
    def setUp(self) -> None:
        MboxCase.setUp(self)

    def make_store(self) -> MboxStore:
        for name in os.listdir(os.path.dirname(self.path)):
            os.unlink(os.path.join(os.path.dirname(self.path), name))
        return self.make()

    def deliver(self, message: bytes) -> None:
        self.append(FROM + message + b"\n")


class SettledContract(Contract):
    """The same where the file's times prove that nothing was written."""

    def opened(self, owner: Owner | None = None) -> MboxDrop:  # type: ignore[override]
        if owner is None and os.path.exists(self.path):
            self.age()
        return StoreContract.opened(self, owner)  # type: ignore[return-value]


class OpenTests(MboxCase):
    def test_missing_and_empty(self) -> None:
        for octets in (None, b"", b"\n\r\n"):
            if octets is not None:
                self.write(octets)
            drop = self.opened()
            self.assertEqual((len(drop.listing), drop.listing.octets), (0, 0))
            drop.identify()
            self.assertEqual(list(drop.listing.uid_rows(())), [])
            drop.commit([])
            self.assertRaises(IndexError, drop.commit, [0])
            drop.release()
        self.assertEqual(self.spool(), b"\n\r\n")

    def test_missing_folder(self) -> None:
        """A mount that is missing is no empty maildrop: clients would forget what they saw."""
        os.rmdir(os.path.dirname(self.path))
        self.refused(TemporaryFailure)

    def test_what_is_no_plain_file(self) -> None:
        """Symbolic link, FIFO, directory, socket, device, hard link: `[SYS/PERM]`."""
        other = os.path.join(self.folder, "other")
        with open(other, "wb") as file:
            file.write(message(1))

        def listen() -> None:
            place = os.open(os.path.dirname(self.path), os.O_PATH)
            self.addCleanup(os.close, place)
            with socket.socket(socket.AF_UNIX) as unix:
                unix.bind(f"/proc/self/fd/{place}/bob")

        plants: list[tuple[Callable[[], object], str]] = [
            (lambda: os.symlink(other, self.path), "symbolic link"),
            (lambda: os.symlink("none", self.path), "symbolic link"),
            (lambda: os.mkfifo(self.path), "FIFO"),
            (lambda: os.mkdir(self.path), "directory"),
            (listen, "socket"),
            (lambda: os.link(other, self.path), "2 links"),
        ]
        for plant, fact in plants:
            plant()
            error = self.refused(PermanentFailure)
            self.assertIn(fact, error.detail)
            self.assertIn(self.path, error.detail)
            (os.rmdir if fact == "directory" else os.unlink)(self.path)
        with open(other, "rb") as file:
            self.assertEqual(file.read(), message(1))

    def test_swapped_for_a_link(self) -> None:
        """A symbolic link that comes between the look and the open is not followed."""
        self.write(message(1))
        real = os.lstat(self.path)
        os.unlink(self.path)
        os.symlink("/dev/null", self.path)
        self.patch(spool_module.os, "lstat", lambda path: real)
        error = self.assertRaises(PermanentFailure, self.store.open, BOB)
        self.assertIn("ELOOP", error.detail)

    def test_owner(self) -> None:
        """The user's own, ours, or the one named by `owner`; any other is another's mail."""
        self.write(message(1))
        uid = os.stat(self.path).st_uid
        self.store.open(BOB).release()
        self.patch(drop_module.os, "geteuid", lambda: uid + 1)
        error = self.refused(PermanentFailure)
        self.assertIn(f"belongs to uid {uid}, not {uid + 1}", error.detail)
        self.refused(PermanentFailure, self.make(owner=str(uid + 2)))
        self.make(owner=str(uid)).open(BOB).release()
        self.make(owner="any").open(BOB).release()
        self.store.open(Owner("bob", uid=uid)).release()
        error = self.assertRaises(PermanentFailure, self.store.open, Owner("bob", uid=uid + 2))
        self.assertIn(f"not {uid + 1} or {uid + 2}", error.detail)

    def test_corrupt(self) -> None:
        """qpopper's words to the client, the place to the log."""
        for octets, place in (
            (b"Subject: x\n\n", "line 1, offset 0"),
            (b"\n\r\nFrom nobody\n", "line 3, offset 3"),
            (b"\x01\x01\x01\x01\n" + FROM, "line 1, offset 0"),
        ):
            self.write(octets)
            error = self.refused(PermanentFailure)
            self.assertEqual(error.text, CORRUPT)
            self.assertIn(place, error.detail)
            self.assertEqual(self.spool(), octets)

    def test_limits(self) -> None:
        self.write(message(1) + message(2))
        size = len(self.spool())
        for options in ({"max_messages": 1}, {"max_octets": size - 1}):
            self.refused(PermanentFailure, self.make(**options))
        self.make(max_messages=2, max_octets=size).open(BOB).release()

    def test_spool_is_busy(self) -> None:
        """One try, no waiting; nothing stays held."""
        self.write(message(1))
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertEqual(self.assertRaises(Busy, self.store.open, BOB).lock, "spool")
            self.assertEqual(self.assertRaises(Busy, self.store.open, BOB).lock, "spool")
        self.store.open(BOB).release()
        self.no_litter()

    def test_replaced_while_it_is_opened(self) -> None:
        """Tried again with the new file, under whose lock the old one is not read."""
        self.write(message(1))
        real = os.open

        def swap(path: str, flags: int, *rest: int) -> int:
            fd = real(path, flags, *rest)
            if path == self.path:
                os.rename(self.path, self.path + ".old")
                self.write(message(2))
            return fd

        self.patch(spool_module.os, "open", swap)
        self.assertEqual(self.assertRaises(Busy, self.store.open, BOB).lock, "spool")

    def test_session_lock_by_spool(self) -> None:
        """Two owners whose template gives one file are one maildrop."""
        self.write(message(1))
        store = MboxStore("{home}/bob", self.state)
        store.open(Owner("bob", home=os.path.dirname(self.path))).release()
        self.opened()
        link = os.path.join(self.folder, "link")
        os.symlink(os.path.dirname(self.path), link)
        busy = self.assertRaises(Busy, store.open, Owner("Bob", home=link))
        self.assertEqual(busy.lock, "session")

    def test_state_folder(self) -> None:
        """Made when it is needed, for us alone."""
        self.opened()
        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(self.state, "locks")).st_mode), 0o700)

    def test_descriptors_are_let_go(self) -> None:
        """After a session and after a refusal alike."""
        self.write(message(1))
        before = descriptors()
        for _ in range(3):
            drop = self.store.open(BOB)
            self.uids(drop)
            drop.commit([0])
            drop.release()
            self.write(message(1))
            self.assertRaises(PermanentFailure, self.make(max_octets=1).open, BOB)
        self.assertLessEqual(descriptors(), before)

    def test_system_errors(self) -> None:
        """What passes is temporary, what lasts is permanent; the reason is for the log alone."""
        self.write(message(1))
        for number, kind in (
            (errno.EIO, TemporaryFailure),
            (errno.ESTALE, TemporaryFailure),
            (errno.EMFILE, TemporaryFailure),
            (errno.ENAMETOOLONG, PermanentFailure),
        ):

            def fail(*_: object, number: int = number) -> bytes:
                raise OSError(number, "why", "where")

            with self.patch_context(spool_module.os, "pread", fail):
                error = self.refused(kind)
            self.assertIn(errno.errorcode[number], error.detail)

    def patch_context(self, where: object, name: str, value: object) -> _Patched:
        return _Patched(where, name, value)


class _Patched:
    def __init__(self, where: object, name: str, value: object) -> None:
        self.where, self.name, self.value = where, name, value

    def __enter__(self) -> None:
        self.real = getattr(self.where, self.name)
        setattr(self.where, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.where, self.name, self.real)


class ReadTests(MboxCase):
    def test_as_the_slow_reader(self) -> None:
        """A large spool: sizes, octets as sent and ids."""
        octets = self.write(make_spool(random.Random(3), 150))
        wanted = oracle_mbox.read(octets)
        drop = self.opened()
        self.assertTrue(verifyObject(IBlockingMaildrop, drop))
        self.assertEqual(len(drop.listing), 150)
        for index, one in enumerate(wanted):
            self.assertEqual(as_sent(drop.source(index)), one.sent)
            self.assertEqual(drop.listing.size(index), len(one.sent))
        self.assertEqual(self.uids(drop), [one.uid for one in wanted])
        self.no_litter()

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(octets=mboxes)
    def test_any_octets(self, octets: bytes) -> None:
        """What is sent is as many octets as were listed, and the file stays as it is."""
        octets = FROM + octets
        self.write(octets)
        drop = self.opened()
        sent = [as_sent(drop.source(index)) for index in range(len(drop.listing))]
        sizes = [drop.listing.size(index) for index in range(len(drop.listing))]
        drop.release()
        self.assertEqual(sizes, [len(one) for one in sent])
        self.assertEqual(sent, as_read(octets))
        self.assertEqual(self.spool(), octets)

    def test_mboxo(self) -> None:
        """`>From ` stays as it is."""
        self.write(message(1, b">From a\n"))
        for kind, text in (("mboxo", b">From a\r\n"), ("mboxrd", b"\r\nFrom a\r\n")):
            drop = self.opened(self.make(kind=kind))
            self.assertIn(text, as_sent(drop.source(0)))
            self.assertEqual(drop.listing.size(0), len(as_sent(drop.source(0))))
            drop.release()

    def test_strip_headers(self) -> None:
        self.write(FROM + b"Status: RO\nA: b\nX-UIDL: abc\n\nx\n\n")
        for strip, head in ((True, b"A: b\r\nX-UIDL"), (False, b"Status: RO\r\nA: b\r\nX-UIDL")):
            drop = self.opened(self.make(strip_headers=strip))
            self.assertTrue(as_sent(drop.source(0)).startswith(head))
            self.assertEqual(drop.listing.size(0), len(as_sent(drop.source(0))))
            drop.release()

    def test_bare_cr(self) -> None:
        """Data, or a blank; octets and ids are the same (decision 32)."""
        self.write(message(1, b"a\rb\r\nc\r\r\n"))
        kept = self.opened()
        kept.identify()
        self.assertTrue(as_sent(kept.source(0)).endswith(b"a\rb\r\nc\r\r\n"))
        kept.release()
        spaced = self.opened(self.make(bare_cr="space"))
        spaced.identify()
        self.assertTrue(as_sent(spaced.source(0)).endswith(b"a b\r\nc \r\n"))
        self.assertEqual(spaced.listing.size(0), kept.listing.size(0))
        self.assertEqual(spaced.listing.uid(0), kept.listing.uid(0))

    def test_unchanged(self) -> None:
        """Any touch of the file puts messages in doubt; a look vouches for one and those behind."""
        self.write(message(1) + message(2))
        drop = self.opened()
        first, second = drop.source(0), drop.source(1)
        self.assertTrue(first.unchanged())
        self.append(message(3))
        self.assertFalse(first.unchanged())
        second.verify()
        self.assertTrue(second.unchanged())
        self.assertFalse(first.unchanged())
        first.verify()
        self.assertTrue(first.unchanged())
        self.assertTrue(second.unchanged())
        drop.release()
        self.assertFalse(first.unchanged())

    def test_verify_finds_changes(self) -> None:
        """Each kind of change; the one message that is as it was is still served."""
        octets = message(1) + message(2) + message(3)
        changes = {
            "content": octets.replace(b"Subject: 2", b"Subject: X"),
            "From_ line": message(1) + message(2).replace(b"bob@", b"bab@") + message(3),
            "separator before": message(1)[:-1] + b"x" + message(2) + message(3),
            "separator behind": message(1) + message(2)[:-1] + b"x" + message(3),
            "next From_ line": message(1) + message(2) + b"f" + message(3)[1:],
            "moved": message(9) + octets,
            "moved by an octet": b"\n" + octets,
            "cut off": message(1),
        }
        for what, changed in changes.items():
            self.write(octets)
            drop = self.opened()
            source = drop.source(1)
            self.write(changed)
            self.assertFalse(source.unchanged(), what)
            self.assertRaises(TemporaryFailure, source.verify)
            self.assertFalse(source.unchanged(), what)
            drop.release()

    def test_verify_with_known_ids(self) -> None:
        """A body of the same length is told from the old one when its hash is known."""
        self.write(message(1, b"body\n"))
        drop = self.opened()
        self.uids(drop)
        self.write(message(1, b"BODY\n"))
        self.assertRaises(TemporaryFailure, drop.source(0).verify)

    def test_a_look_at_a_young_file(self) -> None:
        """What another program writes right behind the look must show: in coarse times, too."""
        first, second = message(1), message(2)
        self.assertEqual(len(first), len(second))
        for tick, start in ((10**9, 100 * 10**9), (4 * 10**6, 100 * 10**9 + 8 * 10**6)):
            with self.subTest(tick=tick):
                clock = self.slow_times(tick, start)
                self.write(first + second, settled=False)
                drop = self.opened()
                source = drop.source(0)
                self.assertFalse(source.unchanged())
                source.verify()
                self.assertTrue(source.unchanged())
                self.assertLess(clock.now, start + 3 * 10**9)
                with open(self.path, "r+b") as spool:
                    spool.write(second + first)
                clock.written = clock.now
                self.assertFalse(source.unchanged())
                drop.release()

    def test_a_look_that_came_too_late(self) -> None:
        """Written again between the wait and the lock, so that one more write might not show."""
        first, second = message(1), message(2)
        clock = self.slow_times(4 * 10**6, 100 * 10**9 + 8 * 10**6)
        self.write(first + second, settled=False)
        drop = self.opened()
        source = drop.source(0)
        wanted = first[len(FROM) :]
        assert source.read is not None
        take = locks_module.SpoolLocks.__enter__

        def late(locks: locks_module.SpoolLocks) -> locks_module.SpoolLocks:
            clock.written = clock.now
            return take(locks)

        self.patch(locks_module.SpoolLocks, "__enter__", late)
        self.assertEqual(source.read(source.offset, source.length) + b"\n", wanted)
        with open(self.path, "r+b") as spool:
            spool.write(second + first)
        clock.written = clock.now
        self.assertFalse(source.unchanged())
        self.assertRaises(TemporaryFailure, source.read, source.offset, source.length)

    def test_read_under_the_locks(self) -> None:
        """What is asked for of a message that is as it was, and nothing of one that is not."""
        self.write(message(1, b"abcdefgh\n") + message(2))
        source = self.opened().source(0)
        assert source.read is not None
        self.append(message(3))
        body = source.offset + source.length - 9
        self.assertEqual(source.read(body + 2, 3), b"cde")
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertEqual(self.assertRaises(Busy, source.read, body, 1).lock, "spool")
        self.write(message(4, b"abcdefgh\n") + message(2))
        self.assertRaises(TemporaryFailure, source.read, body, 3)
        self.no_litter()

    def test_a_writer_that_takes_no_lock(self) -> None:
        """It writes between the look and the read: never are octets sent that it has put there."""
        octets = message(1, b"good\n")
        self.write(octets + message(2))
        drop = self.opened()
        source = drop.source(0)
        read = source.read
        assert read is not None
        real = spool_module.Spool.read
        writes: list[bytes] = []

        def spoilt(spool: spool_module.Spool, start: int, stop: int) -> bytes:
            if start == source.offset and writes:
                self.write(writes.pop(0), settled=False)
            return real(spool, start, stop)

        self.patch(spool_module.Spool, "read", spoilt)
        writes.append(octets + message(2) + message(3))
        self.assertEqual(read(source.offset, source.length), octets[len(FROM) : -1])
        self.assertEqual(writes, [])
        writes.append(message(1, b"evil\n") + message(2) + message(4) * 2)
        drop.identify()
        self.assertRaises(TemporaryFailure, read, source.offset, source.length)
        self.assertEqual(writes, [])

    def test_written_all_the_time_without_a_lock(self) -> None:
        """An end comes to it."""
        self.write(message(1))
        source = self.opened().source(0)
        assert source.read is not None
        real = spool_module.Spool.read

        def spoilt(spool: spool_module.Spool, start: int, stop: int) -> bytes:
            if start == source.offset:
                self.append(message(2))
            return real(spool, start, stop)

        self.patch(spool_module.Spool, "read", spoilt)
        self.append(message(2))
        error = self.assertRaises(TemporaryFailure, source.read, source.offset, source.length)
        self.assertIn("no lock", error.detail)
        self.no_litter()

    def test_a_file_from_the_future(self) -> None:
        """Its times tell nothing, so nobody waits for them."""
        clock = self.slow_times(1, 100 * 10**9 + 1)
        clock.written += 3600 * 10**9
        self.write(message(1), settled=False)
        source = self.opened().source(0)
        source.verify()
        self.assertTrue(source.unchanged())
        self.assertEqual(clock.now, 100 * 10**9 + 1)

    def slow_times(self, tick: int, start: int) -> SimpleNamespace:
        """A clock of which file times show only each `tick` ns; who sleeps sets it forward."""
        clock = SimpleNamespace(now=start, written=start)
        real = os.fstat

        def stat_(spool: spool_module.Spool) -> SimpleNamespace:
            found = real(spool.fd)
            facts = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
            shown = clock.written // tick * tick
            return SimpleNamespace(**facts | {"st_mtime_ns": shown, "st_ctime_ns": shown})

        def sleep(seconds: float) -> None:
            clock.now += round(seconds * 10**9)

        self.patch(spool_module.Spool, "stat", stat_)
        self.patch(drop_module, "clock_ns", lambda: clock.now)
        self.patch(time, "sleep", sleep)
        return clock

    def test_verify_is_under_the_locks(self) -> None:
        self.write(message(1))
        source = self.opened().source(0)
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertEqual(self.assertRaises(Busy, source.verify).lock, "spool")
        source.verify()
        self.no_litter()


class IdTests(MboxCase):
    def test_stable_when_spool_headers_change(self) -> None:
        """Another mail reader's Status, X-UID and the like (behaviour 10, 13)."""
        self.write(message(1) + message(2))
        before = self.uids(self.opened())
        self.opened_again(
            FROM + b"Subject: 1\nStatus: RO\nX-UID: 1\nX-Keywords: a\n\tb\n\nbody\n\n" + message(2)
        )
        self.assertEqual(self.uids(self.drop), before)
        self.opened_again(message(2))
        self.assertEqual(self.uids(self.drop), before[1:])

    def opened_again(self, octets: bytes) -> None:
        self.doCleanups()
        self.write(octets)
        self.drop = self.opened()

    def test_copies(self) -> None:
        """Identical copies differ by a number; the last one may lack its separator."""
        self.write(message(1) + message(2) + message(1) + message(1)[:-1])
        uids = self.uids(self.opened())
        self.assertEqual([uids[0] + b"-2", uids[0] + b"-3"], uids[2:])
        self.assertEqual(len({len(uid) for uid in uids[:2]} | {26}), 1)

    def test_mail_comes_meanwhile(self) -> None:
        """The ids are those of the photograph."""
        octets = self.write(message(1) + message(2))
        drop = self.opened()
        self.append(message(3))
        self.assertEqual(self.uids(drop), [m.uid for m in oracle_mbox.read(octets)])
        self.assertTrue(drop.source(0).unchanged())

    def test_fresh_spool(self) -> None:
        """Too young for its times to prove anything: looked at under the locks."""
        octets = self.write(message(1) + message(2), settled=False)
        self.assertEqual(self.uids(self.opened()), [m.uid for m in oracle_mbox.read(octets)])
        self.no_litter()

    def test_rewritten_meanwhile(self) -> None:
        """No id is better than one of other octets."""
        for changed in (message(2) + message(1), message(1), b"", b"x\n", b"\n" + message(1)):
            self.write(message(1) + message(2))
            drop = self.opened()
            self.write(changed)
            self.assertRaises(TemporaryFailure, drop.identify)
            self.assertFalse(drop.listing.identified)
            drop.release()

    def test_changed_while_it_is_hashed(self) -> None:
        self.write(message(1) + message(2))
        drop = self.opened()
        real = identity_module.digest_of

        def digest(*args: object) -> bytes:
            self.write(message(1) + message(3))
            return real(*args)  # type: ignore[arg-type]

        self.patch(identity_module, "digest_of", digest)
        self.assertRaises(TemporaryFailure, drop.identify)

    def test_busy(self) -> None:
        self.write(message(1), settled=False)
        drop = self.opened()
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertRaises(Busy, drop.identify)
        drop.identify()


class CommitTests(MboxCase):
    def delete(self, deleted: Collection[int], **options: object) -> None:
        drop = self.make(**options).open(BOB)
        try:
            drop.commit(deleted)
        finally:
            drop.release()

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(octets=mboxes, seed=st.integers(0, 2**32), settled=st.booleans())
    def test_kept_octets_are_as_they_were(self, octets: bytes, seed: int, settled: bool) -> None:
        """Any spool, any set: what is left are the other messages' octets, in order."""
        octets = FROM + octets
        chance = random.Random(seed)
        spans = spans_of(octets)
        rows = [i for i in range(len(spans)) if chance.random() < 0.5]
        self.write(octets, settled=settled)
        self.delete(rows)
        begin = spans.starts[0] if len(spans) else len(octets)
        wanted = octets[:begin] + b"".join(
            octets[spans.starts[i] : spans.stop(i)] for i in range(len(spans)) if i not in rows
        )
        self.assertEqual(self.spool(), wanted)
        self.no_litter()

    def test_in_place(self) -> None:
        """Inode, mode and owner stay; no second name, no leftover (I7)."""
        self.write(b"".join(message(i) for i in range(5)))
        os.chmod(self.path, 0o660)
        before = os.stat(self.path)
        self.delete([1, 3])
        after = os.stat(self.path)
        facts = ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink")
        self.assertEqual([getattr(before, f) for f in facts], [getattr(after, f) for f in facts])
        self.assertEqual(self.spool(), message(0) + message(2) + message(4))
        self.no_litter()

    def test_nothing_deleted(self) -> None:
        """No write and no lock."""
        self.write(message(1))
        before = os.stat(self.path)
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            pass
        drop = self.opened()
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            drop.commit([])
        self.assertEqual(os.stat(self.path).st_ctime_ns, before.st_ctime_ns)

    def test_all_deleted(self) -> None:
        """An empty file stays, the same one; leading empty lines go too."""
        self.write(b"\n\n" + message(1) + message(2))
        inode = os.stat(self.path).st_ino
        self.delete([0, 1])
        self.assertEqual(self.spool(), b"")
        self.assertEqual(os.stat(self.path).st_ino, inode)

    def test_pseudo_message_stays(self) -> None:
        """It is not counted and not deleted (behaviour 4)."""
        pseudo = (
            FROM + b"From: Mail System Internal Data <x@example.org>\n"
            b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n\ntext\n\n"
        )
        self.write(pseudo + message(1) + message(2))
        self.assertEqual(len(self.opened().listing), 2)
        self.doCleanups()
        self.delete([0])
        self.assertEqual(self.spool(), pseudo + message(2))
        self.delete([0])
        self.assertEqual(self.spool(), pseudo)

    def test_quoted_lines_stay_quoted(self) -> None:
        """Un-quoting is for the client only (behaviour 10, 11)."""
        kept = message(2, b">From here\n>>From there\n")
        self.write(message(1) + kept)
        self.delete([0])
        self.assertEqual(self.spool(), kept)

    def test_new_mail_is_kept(self) -> None:
        """Also behind a last message that had no separator: what was added goes with it."""
        for last, added in (
            (message(2), b""),
            (message(2), b"\n"),
            (message(2)[:-1], b""),
            (message(2)[:-1], b"\n"),
            (message(2)[:-1], b"\r\n"),
            (message(2)[:-2], b""),
        ):
            for settled in (True, False):
                self.write(message(1) + last, settled=settled)
                drop = self.opened()
                self.append(added + message(3))
                drop.commit([1])
                drop.release()
                self.assertEqual(self.spool(), message(1) + message(3))

    def test_busy_before_any_write(self) -> None:
        """Tried again later by those who can wait; then it works."""
        octets = self.write(message(1) + message(2))
        drop = self.opened()
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertEqual(self.assertRaises(Busy, drop.commit, [0]).lock, "spool")
        self.assertEqual(self.spool(), octets)
        drop.commit([0])
        self.assertEqual(self.spool(), message(2))

    def test_seams(self) -> None:
        """Where file times tell nothing (mmap), a From_ line must stand at each place still."""
        octets = message(1) + message(2) + message(3)
        place = len(message(1))
        for at, wrong in (
            (place - 1, b"x"),  # no empty line before what is deleted
            (place, b"f"),  # no From_ line there
            (place + len(message(2)), b"f"),  # nor at what is kept
        ):
            self.write(octets)
            drop = self.opened()
            changed = octets[:at] + wrong + octets[at + 1 :]
            self.write(changed)
            drop._key = spool_module.key_of(os.stat(self.path))
            self.assertRaises(TemporaryFailure, drop.commit, [1])
            self.assertEqual(self.spool(), changed)
            drop.release()

    def test_dot_lock_removed_by_another(self) -> None:
        """Then the lock is not held, and nothing is written (I8)."""
        octets = self.write(message(1) + message(2))
        drop = self.opened()
        real = drop._check_seams

        def steal(*args: object) -> None:
            os.unlink(self.path + ".lock")
            real(*args)  # type: ignore[arg-type]

        self.patch(drop, "_check_seams", steal)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        self.assertEqual(self.spool(), octets)

    def test_large_messages(self) -> None:
        """Kept messages of many sizes, moved by less than a block."""
        parts = [message(i, b"%d " % i * (i * 97 % 5000) + b"\n") for i in range(40)]
        self.write(b"".join(parts))
        self.delete([0, 1, 7, 8, 30, 39])
        kept = [part for i, part in enumerate(parts) if i not in (0, 1, 7, 8, 30, 39)]
        self.assertEqual(self.spool(), b"".join(kept))
        self.no_litter()

    def test_system_errors(self) -> None:
        """What fails is said; at the next login all of the deletion is done, or none of it."""
        octets = message(1) + message(2) + message(3)
        outcomes = set()
        for name in ("open", "pwrite", "fsync", "ftruncate", "rename", "unlink"):
            for number in (errno.EIO, errno.ENOSPC):
                files = Files()
                calls = iter([True])

                def fail(*args: object, name: str = name, number: int = number) -> object:
                    if name != "open" or str(args[0]).endswith(".new"):
                        raise OSError(number, "why")
                    return os.open(*args)  # type: ignore[arg-type]

                setattr(files, name, fail)
                self.write(octets)
                store = self.make()
                store.journals = Journals(self.state, files)
                drop = self.opened(store)
                with contextlib.suppress(TemporaryFailure):
                    drop.commit([0])
                    calls = iter(())
                drop.release()
                again = self.opened(self.make())
                self.assertIn(len(again.listing), (2, 3), (name, number))
                again.release()
                self.assertIn(self.spool(), (octets, message(2) + message(3)), (name, number))
                self.no_litter()
                outcomes.add((next(calls, False), len(self.spool())))
        self.assertGreater(len(outcomes), 1)

    def test_full_disk_is_no_bar_to_deleting_all(self) -> None:
        """Deleting everything, or a tail, needs no space (mbox-safety 1.3, 10)."""
        files = Files()

        def full(*args: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        files.pwrite = full  # type: ignore[method-assign, assignment]
        for rows, left in (([0, 1], b""), ([1], message(1))):
            self.write(message(1) + message(2))
            store = self.make()
            store.journals = Journals(self.state, files)
            drop = self.opened(store)
            drop.commit(rows)
            drop.release()
            self.assertEqual(self.spool(), left)

    def test_a_journal_of_a_crash_is_ended_at_the_start(self) -> None:
        """Without a login, where all spools lie in one folder."""
        octets = message(1) + message(2) + message(3)
        self.write(octets)
        files = Files()

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "why")

        files.ftruncate = fail  # type: ignore[method-assign, assignment]
        store = self.make()
        store.journals = Journals(self.state, files)
        drop = self.opened(store)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        drop.release()
        self.assertNotEqual(self.spool(), message(2) + message(3))
        self.append(message(4))
        self.make().tidy()
        self.assertEqual(self.spool(), message(2) + message(3) + message(4))
        self.no_litter()

    def test_a_missing_folder(self) -> None:
        """A wrong --store, or a mount that is not there, is told at the start and at each login."""
        store = self.make()
        os.rmdir(os.path.dirname(self.path))
        with capturedLogs() as events:
            store.tidy()
        wanted = "its folder is missing: make or mount it, or name another with --store"
        told = [event["what"] for event in events if "what" in event]
        self.assertEqual(told, [wanted])
        error = self.refused(TemporaryFailure, store)
        self.assertEqual(error.detail, f"{self.path}: {wanted}")
        os.mkdir(os.path.dirname(self.path))
        with capturedLogs() as events:
            store.tidy()
        self.assertEqual([event for event in events if "what" in event], [])

    def test_stale_locks_go_at_the_start(self) -> None:
        """Of a killed server: deliverers wait for them, and nobody may log in for hours."""
        self.write(message(1))
        gone = subprocess.Popen(["true"])
        gone.wait()
        folder, host = os.path.dirname(self.path), os.uname().nodename
        for name, pid in (("bob", gone.pid), ("carol", os.getppid()), ("dave", gone.pid)):
            with open(os.path.join(folder, f"{name}.lock"), "w") as lock:
                lock.write(f"{pid}\n{host}\n")
        with open(os.path.join(folder, "carol"), "xb"):
            pass
        self.make(locks="fcntl").tidy()
        self.assertEqual(len(os.listdir(folder)), 5)
        self.make().tidy()
        # Without a spool there is no other lock under which one might be broken.
        self.assertEqual(sorted(os.listdir(folder)), ["bob", "carol", "carol.lock", "dave.lock"])

    def test_a_stale_lock_whose_spool_is_in_use_stays(self) -> None:
        """Whoever holds the other lock is at work; the next spools are looked at all the same."""
        self.write(message(1))
        folder = os.path.dirname(self.path)
        gone = subprocess.Popen(["true"])
        gone.wait()
        for name in ("alice", "bob", "carol"):
            with open(os.path.join(folder, f"{name}.lock"), "w") as lock:
                lock.write(f"{gone.pid}\n{os.uname().nodename}\n")
            with open(os.path.join(folder, name), "ab"):
                pass
        code = (
            "import fcntl, sys; spool = open(sys.argv[1], 'r+'); fcntl.lockf(spool, fcntl.LOCK_EX)"
        )
        code += "; print(1, flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", code, self.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            self.make().tidy()
            left = sorted(name for name in os.listdir(folder) if name.endswith(".lock"))
            assert holder.stdin is not None
            holder.stdin.close()
        self.assertEqual(left, ["bob.lock"])

    def test_a_foreign_rewrite_meets_a_journal(self) -> None:
        """R4: never overwrite; what the spool lacks of the journal is appended, the rest not."""
        self.write(message(1) + message(2) + message(3))
        files = Files()

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "why")

        files.ftruncate = fail  # type: ignore[method-assign, assignment]
        store = self.make()
        store.journals = Journals(self.state, files)
        drop = self.opened(store)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        drop.release()
        os.rename(self.path, self.path + ".old")
        self.write(message(2) + message(9))
        os.unlink(self.path + ".old")
        drop = self.opened(self.make())
        self.assertEqual(self.spool(), message(2) + message(9) + message(3))
        self.assertEqual(len(drop.listing), 3)
        names = sorted(os.listdir(os.path.dirname(self.path)))
        self.assertEqual(len(names), 2)
        self.assertIn(".bob.popdrop.orphan-", names[0])


class TimesTests(MboxCase):
    """The shell's "you have new mail": atime before mtime."""

    def times(self, atime: int, deleted: list[int], late: bool) -> tuple[float, float]:
        self.write(message(1) + message(2))
        os.utime(self.path, (atime, 1_000_000_000))
        drop = self.opened()
        if late:
            self.append(message(3))
        drop.commit(deleted)
        drop.release()
        found = os.stat(self.path)
        self.assertGreater(found.st_mtime, 1_000_000_000)
        return found.st_atime, found.st_mtime

    def test_unread_mail_remains(self) -> None:
        atime, mtime = self.times(900_000_000, [0], late=False)
        self.assertLess(atime, mtime)

    def test_new_mail_came(self) -> None:
        for deleted in ([0], [0, 1]):
            atime, mtime = self.times(1_100_000_000, deleted, late=True)
            self.assertLess(atime, mtime)

    def test_all_was_read(self) -> None:
        atime, mtime = self.times(1_100_000_000, [0], late=False)
        self.assertGreaterEqual(atime, mtime)

    def test_nothing_remains(self) -> None:
        atime, mtime = self.times(900_000_000, [0, 1], late=False)
        self.assertGreaterEqual(atime, mtime)


class ChangedSpoolTests(MboxCase):
    """Another program was at the spool during the session (behaviour 10, 9)."""

    def commit(
        self, before: bytes, change: Callable[[], object], deleted: list[int], known: bool
    ) -> PopdropError | None:
        self.write(before)
        drop = self.opened()
        try:
            if known:
                drop.identify()
            change()
            drop.commit(deleted)
        except PopdropError as error:
            return error
        finally:
            drop.release()
            self.no_litter()
        return None

    def rewritten(self, before: bytes, after: bytes, deleted: list[int], known: bool) -> bytes:
        """What is left; `after` itself when the commit refused."""
        error = self.commit(before, lambda: self.write(after), deleted, known)
        if error:
            self.assertIsInstance(error, TemporaryFailure)
            self.assertEqual(self.spool(), after)
        else:
            self.assertNotEqual(self.spool(), after)
        return self.spool()

    def test_status_was_written(self) -> None:
        """A mail reader marked all as seen: each message is found in its new place."""
        seen = [FROM + b"Subject: %d\nStatus: RO\nX-UID: %d\n\nbody\n\n" % (i, i) for i in range(4)]
        before = b"".join(message(i) for i in range(4))
        for known in (False, True):
            left = self.rewritten(before, b"".join(seen), [0, 2], known)
            self.assertEqual(left, seen[1] + seen[3])

    def test_another_message_was_deleted(self) -> None:
        before = b"".join(message(i) for i in range(4))
        for known in (False, True):
            left = self.rewritten(before, message(1) + message(2) + message(3), [2], known)
            self.assertEqual(left, message(1) + message(3))

    def test_never_by_old_offset(self) -> None:
        """Messages of one size changed places."""
        for known in (False, True):
            left = self.rewritten(message(1) + message(2), message(2) + message(1), [0], known)
            self.assertEqual(left, message(2))

    def test_a_marked_message_is_gone(self) -> None:
        """All or nothing: the other marked one stays too."""
        before = message(1) + message(2) + message(3)
        after = message(1) + message(3)
        for known in (False, True):
            self.assertEqual(self.rewritten(before, after, [0, 1], known), after)

    def test_content_changed(self) -> None:
        before = message(1) + message(2)
        for known in (False, True):
            after = message(1) + message(2, b"body, signed\n")
            self.assertEqual(self.rewritten(before, after, [1], known), after)
        after = message(1) + message(2, b"BODY\n")
        self.assertEqual(self.rewritten(before, after, [1], True), after)

    def test_identical_copies(self) -> None:
        """Paired in order if there are as many as before and they are known to be equal."""
        before = message(1) + message(2) + message(1)
        after = message(3) + message(1) + message(2) + message(1)
        self.assertEqual(
            self.rewritten(before, after, [2], True), message(3) + message(1) + message(2)
        )
        self.assertEqual(
            self.rewritten(before, after, [0], True), message(3) + message(2) + message(1)
        )
        self.assertEqual(self.rewritten(before, after, [2], False), after)
        for other in (message(2) + message(1), message(2) + message(1) * 3):
            self.assertEqual(self.rewritten(before, other, [0], True), other)

    def test_identical_copies_in_an_unchanged_spool(self) -> None:
        """Just the one that was marked."""
        self.write(message(1) + message(2) + message(1))
        drop = self.opened()
        drop.commit([2])
        drop.release()
        self.assertEqual(self.spool(), message(1) + message(2))

    def test_cut_off(self) -> None:
        before = message(1) + message(2) + message(3)
        for known in (False, True):
            for after in (b"", message(1)[:-10], message(1) + message(2)[:20]):
                self.assertEqual(self.rewritten(before, after, [1], known), after)
        self.assertEqual(self.rewritten(before, message(1) + message(2), [0], False), message(2))

    def test_no_mbox_any_more(self) -> None:
        for after in (b"x\n", b"words " * 100):
            self.assertEqual(self.rewritten(message(1), after, [0], False), after)

    def test_replaced(self) -> None:
        """Another file at the path, even of the same octets, is not ours to write."""

        def replace() -> None:
            with open(self.path + ".new", "wb") as new:
                new.write(before)
            os.rename(self.path + ".new", self.path)

        before = message(1) + message(2)
        for known in (False, True):
            error = self.commit(before, replace, [0], known)
            self.assertIsInstance(error, TemporaryFailure)
            self.assertEqual(self.spool(), before)

    def test_removed(self) -> None:
        self.write(message(1))
        drop = self.opened()
        os.unlink(self.path)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        self.assertFalse(os.path.exists(self.path))

    def test_linked(self) -> None:
        """A second name came: deliverers would refuse the file, and so does a commit."""
        error = self.commit(
            message(1), lambda: os.link(self.path, os.path.join(self.folder, "x")), [0], False
        )
        self.assertIsInstance(error, TemporaryFailure)
        self.assertEqual(self.spool(), message(1))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        old=st.lists(st.integers(0, 5), min_size=1, max_size=8),
        new=st.lists(st.integers(0, 5), max_size=10),
        seed=st.integers(0, 2**32),
        known=st.booleans(),
    )
    def test_any_rewriting(self, old: list[int], new: list[int], seed: int, known: bool) -> None:
        """Whatever became of the spool: exactly the marked ones go, or nothing does.

        Messages of one number are byte-equal, so counting them tells all.
        """
        rows = random.Random(seed).sample(range(len(old)), random.Random(seed).randint(1, len(old)))
        after = b"".join(map(message, new))
        left = self.rewritten_any(b"".join(map(message, old)), after, rows, known)
        if left == after:
            return
        gone = Counter(new)
        gone.subtract(self.numbers(left))
        self.assertEqual(+gone, Counter(old[row] for row in rows))
        self.assertEqual(-gone, Counter())

    def numbers(self, octets: bytes) -> Counter[int]:
        return Counter(int(m.sent.split()[1]) for m in oracle_mbox.read(octets))

    def rewritten_any(self, before: bytes, after: bytes, rows: list[int], known: bool) -> bytes:
        error = self.commit(before, lambda: self.write(after), rows, known)
        if error:
            self.assertEqual(self.spool(), after)
        return self.spool()


class ReadOnlyTests(MboxCase):
    def readonly_open(self) -> Callable[..., int]:
        real = os.open

        def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
            if path == self.path and flags & os.O_RDWR:
                raise OSError(errno.EACCES, "no")
            return real(path, flags, *rest, **more)

        return refuse

    def test_spool_that_may_only_be_read(self) -> None:
        """Served; but to delete fails, and says that nothing was (rights, read-only mount)."""
        octets = self.write(message(1) + message(2))
        self.patch(spool_module.os, "open", self.readonly_open())
        with capturedLogs() as logs:
            drop = self.opened()
        self.assertEqual(as_sent(drop.source(1)), as_read(octets)[1])
        self.assertEqual(len(self.uids(drop)), 2)
        drop.commit([])
        error = self.assertRaises(PermanentFailure, drop.commit, [0])
        self.assertIn(self.path, error.detail)
        self.assertEqual(self.spool(), octets)
        self.assertEqual([event["reason"] for event in logs], [error.detail])

    def refuse_dot_lock(self, number: int) -> None:
        real = os.open

        def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(number, "no")
            return real(path, flags, *rest, **more)

        self.patch(locks_module.os, "open", refuse)
        self.patch(locks_module.dotlockfile, "PROGRAM", "/nonexistent/dotlockfile")

    def test_dot_lock_that_may_not_be_made(self) -> None:
        """Read-only, with the remedy in the log (decision 7); `locks=fcntl` is that remedy."""
        octets = self.write(message(1) + message(2))
        self.refuse_dot_lock(errno.EACCES)
        with capturedLogs() as logs:
            drop = self.opened()
        (event,) = logs
        self.assertIn("locks=fcntl", event["reason"])
        self.assertIn("mail", event["reason"])
        self.assertIn("/nonexistent/dotlockfile", event["reason"])
        self.assertEqual(as_sent(drop.source(0)), as_read(octets)[0])
        drop.source(0).verify()
        self.assertRaises(PermanentFailure, drop.commit, [0])
        self.assertEqual(self.spool(), octets)
        drop.release()
        drop = self.opened(self.make(locks="fcntl"))
        drop.commit([0])
        self.assertEqual(self.spool(), message(2))

    def test_full_disk(self) -> None:
        """Mail can be read; to delete may work later."""
        octets = self.write(message(1) + message(2))
        self.refuse_dot_lock(errno.ENOSPC)
        drop = self.opened()
        self.assertEqual(as_sent(drop.source(0)), as_read(octets)[0])
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        self.assertEqual(self.spool(), octets)

    def test_broken_folder(self) -> None:
        self.write(message(1))
        self.refuse_dot_lock(errno.EIO)
        self.refused(TemporaryFailure)


class PlanTests(SynchronousTestCase):
    def test_ranges(self) -> None:
        octets = b"".join(message(i) for i in range(5))
        spans = spans_of(octets)
        s, end = list(spans.starts), len(octets)
        for rows, size, wanted in (
            ([0, 1, 2, 3, 4], end, (0, [])),
            ([4], end, (s[4], [])),
            ([3, 4], end, (s[3], [])),
            ([0], end, (0, [(s[1], end)])),
            ([1, 2], end, (s[1], [(s[3], end)])),
            ([0, 2, 4], end, (0, [(s[1], s[2]), (s[3], s[4])])),
            ([4], end + 100, (s[4], [(end, end + 100)])),
            ([1], end + 100, (s[1], [(s[2], end + 100)])),
        ):
            self.assertEqual(plan(spans, rows, end, size), wanted)


class TemplateTests(SynchronousTestCase):
    def path(self, template: str, user: str = "bob", **more: str) -> str:
        return Template(template).path(Owner(user, **more))

    def test_fields(self) -> None:
        self.assertEqual(self.path("/var/mail/{user}"), "/var/mail/bob")
        self.assertEqual(
            self.path("/v/{domain}/{user}.mbox", domain="example.org"), "/v/example.org/bob.mbox"
        )
        self.assertEqual(self.path("{home}/mbox", home="/home/bob"), "/home/bob/mbox")

    def test_domains(self) -> None:
        """Two domains never share a path, whether the template has a place for them or not."""
        for template, user, domain, wanted in (
            ("/v/{user}", "bob@a.org", "a.org", "/v/bob@a.org"),
            ("/v/{domain}/{user}", "bob@a.org", "a.org", "/v/a.org/bob"),
            ("/v/{domain}/{user}", "bob@x@a.org", "a.org", "/v/a.org/bob@x"),
            ("/v/{domain}/{hash2}/{user}", "bob@a.org", "a.org", "/v/a.org/b/o/bob"),
            ("/v/{hash2}/{user}", "bob@a.org", "a.org", "/v/b/o/bob@a.org"),
        ):
            self.assertEqual(self.path(template, user, domain=domain), wanted)
        for user, domain in (
            ("@a.org", "a.org"),
            ("bob@.a", ".a"),
            ("bob@-a", "-a"),
            (".x@a", "a"),
        ):
            self.assertRaises(NoSuchOwner, self.path, "/v/{domain}/{user}", user, domain=domain)

    def test_hash_spool(self) -> None:
        """qpopper's two ways: sum of the first five octets modulo 26, and first two letters."""
        for user, one, two in (
            ("a", chr(97 + 97 % 26), "a/a"),
            ("bob", "v", "b/o"),
            ("postmaster", chr(97 + (112 + 111 + 115 + 116 + 109) % 26), "p/o"),
        ):
            self.assertEqual(self.path("/v/{hash1}/{user}", user), f"/v/{one}/{user}")
            self.assertEqual(self.path("/v/{hash2}/{user}", user), f"/v/{two}/{user}")

    def test_nothing_else_is_expanded(self) -> None:
        for user in ("{home}", "%u", "$HOME", "~root", "{user.uid}", "`id`"):
            self.assertEqual(self.path("/v/{user}", user), f"/v/{user}")

    def test_names_that_are_no_part_of_a_path(self) -> None:
        for user in ("", ".", "..", "a/b", "/", "a\0b"):
            for template in ("/v/{user}", "/v/{hash1}/{user}", "/v/{hash2}/{user}"):
                self.assertRaises(NoSuchOwner, self.path, template, user)
        self.assertRaises(NoSuchOwner, self.path, "/v/{domain}/{user}")
        self.assertRaises(NoSuchOwner, self.path, "/v/{domain}/{user}", domain="..")
        self.assertRaises(NoSuchOwner, self.path, "{home}/mbox")
        self.assertRaises(NoSuchOwner, self.path, "{home}/mbox", home="relative")

    def test_bad_templates(self) -> None:
        for template in (
            "",
            "mail/{user}",
            "/var/mail",
            "/var/mail/{name}",
            "/var/mail/{user",
            "/var/mail/user}",
            "/var/mail/{}{user}",
            "/var/mail/{user!r}",
            "/var/mail/{user}/",
            "/var/../{user}",
            "/var/{domain}",
        ):
            self.assertRaises(ConfigError, Template, template)


class FactoryTests(SynchronousTestCase):
    def make(self, *args: str, **kwargs: str) -> MboxStore:
        return MboxFactory().make(object(), "/nowhere", *args, **kwargs)

    def test_interface(self) -> None:
        self.assertTrue(verifyObject(IStoreFactory, MboxFactory()))
        self.assertEqual(MboxFactory.kind, "mbox")
        for keyword in MboxFactory.keywords:
            self.assertIn(f"{keyword}=", MboxFactory.help)

    def test_defaults(self) -> None:
        store = self.make("/var/mail/{user}")
        self.assertEqual((store.form.name, store.locks), ("mboxrd", ("fcntl", "dot")))
        self.assertIn(b"status", store.strip)
        self.assertEqual((store.max_messages, store.max_octets), (0, 0))

    def test_all(self) -> None:
        journals = os.path.abspath(self.mktemp())
        store = self.make(
            "/var/mail/{user}",
            **{
                "kind": "mboxo",
                "locks": "dot",
                "strip-headers": "no",
                "owner": "root",
                "max-messages": "5",
                "max-octets": "700",
                "journal-dir": journals,
            },
        )
        self.assertEqual(
            (store.form.name, store.locks, store.strip), ("mboxo", ("dot",), frozenset())
        )
        self.assertEqual((store.max_messages, store.max_octets), (5, 700))
        self.assertEqual(store.journals.folders[0], journals)
        self.assertEqual(store.folders, ((journals, True),))
        self.assertEqual(stat.S_IMODE(os.stat(journals).st_mode), 0o700)

    def test_the_order_of_locks_is_ours(self) -> None:
        self.assertEqual(self.make("/v/{user}", locks="dot,fcntl").locks, ("fcntl", "dot"))

    def test_mistakes(self) -> None:
        """One line that names the argument and what is allowed."""
        for args, kwargs, words in (
            ((), {}, "one path"),
            (("/a/{user}", "/b"), {}, "one path"),
            (("/a/{user}",), {"lock": "dot"}, "lock= is not known; there are kind, locks"),
            (
                ("/a/{user}",),
                {"kind": "MMDF"},
                "kind=MMDF: must be mboxrd, mboxo, mboxcl, mboxcl2, mmdf or auto",
            ),
            (("/a/{user}",), {"locks": "flock"}, "locks=flock: must be"),
            (("/a/{user}",), {"locks": ""}, "locks=: must be"),
            (("/a/{user}",), {"locks": "dot,dot"}, "locks=dot,dot: must be"),
            (("/a/{user}",), {"strip-headers": "1"}, "strip-headers=1: must be yes or no"),
            (("/a/{user}",), {"bare-cr": "drop"}, "bare-cr=drop: must be keep or space"),
            (("/a/{user}",), {"owner": "no such one"}, "owner=no such one"),
            (("/a/{user}",), {"max-messages": "-1"}, "max-messages=-1: must be a number"),
            (("/a/{user}",), {"max-octets": "1e9"}, "max-octets=1e9: must be a number"),
            (("/a/{user}",), {"journal-dir": "j"}, "journal-dir=j: must be a full path"),
            (("/a/{nobody}",), {}, "{nobody}"),
        ):
            error = self.assertRaises(ConfigError, self.make, *args, **kwargs)
            self.assertIn(words, str(error))
            self.assertNotIn("\n", str(error))


DELIVERER = """
import fcntl, os, random, sys, time
path, count, name, order = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
chance = random.Random(name)

def dot():
    try:
        fd = os.open(path + ".lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    os.write(fd, b"%d\\n" % os.getpid())
    os.close(fd)
    return True

def deliver(octets):
    while True:
        spool = open(path, "ab")
        try:
            fcntl.lockf(spool, fcntl.LOCK_EX if order == "waits" else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(chance.random() / 200)
            continue
        if not dot():
            spool.close()
            time.sleep(chance.random() / 200)
            continue
        break
    spool.write(octets)
    spool.flush()
    os.fsync(spool.fileno())
    os.unlink(path + ".lock")
    spool.close()

for number in range(count):
    body = b"line of text\\n>From quoted\\n" * chance.randrange(200)
    deliver(b"From a@example.org Wed Dec  2 05:53:22 1992\\nSubject: %s-%d\\n\\n%s\\n"
            % (name.encode(), number, body))
    time.sleep(chance.random() / 500)
"""


class EmptyTests(SynchronousTestCase):
    def test_what_all_empty_maildrops_share_cannot_grow(self) -> None:
        for column in _NO_SPANS.columns():
            self.assertRaises(BufferError, column.append, 1)
            self.assertRaises(BufferError, column.extend, [1])
        self.assertEqual(len(_NO_SPANS), 0)


class ConcurrencyTests(MboxCase):
    """Real deliverers at work while sessions come and go (I1, I6)."""

    PER_DELIVERER = 120

    def test_each_message_exactly_once(self) -> None:
        """Every delivery is seen by the sessions exactly once, or is still there at the end."""
        self.write(b"")
        deliverers = [
            subprocess.Popen(
                [sys.executable, "-c", DELIVERER, self.path, str(self.PER_DELIVERER), name, order]
            )
            for name, order in (("one", "waits"), ("two", "backs-out"))
        ]
        for deliverer in deliverers:
            self.addCleanup(lambda d=deliverer: d.poll() is None and d.kill())
        chance = random.Random(1)
        deleted: list[bytes] = []
        sessions = 0
        while any(d.poll() is None for d in deliverers) or sessions < 100:
            deleted += self.session(chance)
            sessions += 1
        self.assertEqual([d.returncode for d in deliverers], [0, 0])
        left = as_read(self.spool())
        subjects = Counter(octets.split(b"\r\n")[0] for octets in deleted + left)
        wanted = {
            b"Subject: %s-%d" % (name, number): 1
            for name in (b"one", b"two")
            for number in range(self.PER_DELIVERER)
        }
        self.assertEqual(subjects, wanted)
        self.assertTrue(deleted)
        self.no_litter()

    def session(self, chance: random.Random) -> list[bytes]:
        """Open, read some, delete those; what was deleted. Gives way where a lock is busy."""
        drop = self.patiently(lambda: self.store.open(BOB))
        try:
            if chance.random() < 0.3:
                self.patiently(drop.identify)
            rows = [i for i in range(len(drop.listing)) if chance.random() < 0.4]
            read = []
            for row in rows:
                source = drop.source(row)
                if not source.unchanged():
                    self.patiently(source.verify)
                read.append(as_sent(source))
                self.assertEqual(len(read[-1]), source.octets)
            if chance.random() < 0.2:
                return []
            self.patiently(lambda: drop.commit(rows))
            return read
        finally:
            drop.release()

    def patiently(self, work: Callable[[], object]) -> MboxDrop:
        while True:
            try:
                return work()  # type: ignore[return-value]
            except Busy as busy:
                self.assertEqual(busy.lock, "spool")
                time.sleep(0.001)
