"""All long work under the spool locks touches the dot-lock in time, by a clock of the tests' own.

Reading and writing cost time on that clock, as on a slow disk: octets their share, each call a
seek. Between two touches of a dot-lock, and between the last one and its release, no more than
`LIMIT` may pass; liblockfile takes a lock without a process for stale after 300 seconds.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

from popdrop.errors import TemporaryFailure
from popdrop.stores.mbox import drop as drop_module
from popdrop.stores.mbox import locks as locks_module
from popdrop.stores.mbox.drop import MboxDrop
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.locks import STALE_AFTER, TOUCH_EVERY, DotLock
from popdrop.stores.uidlform import UidlForm
from tests.test_mbox_drop import MboxCase, message

LIMIT = 2 * TOUCH_EVERY
SEEK = 1.0
"""Seconds that each call costs."""
OCTET = 20.0 / (1 << 20)
"""Seconds that each octet costs, so that the largest blocks, of 1 MiB, take a third of a minute."""


class Clock:
    """Goes on by what is read and written; knows when dot-locks were taken, touched, let go."""

    def __init__(self) -> None:
        self.now = 10_000.0
        self.marks: list[list[float]] = []

    def monotonic(self) -> float:
        return self.now

    def spend(self, octets: int) -> None:
        self.now += SEEK + octets * OCTET

    def watch(self, lock: type[DotLock], patch: Callable[[object, str, object], object]) -> None:
        """Mark what is done to dot-locks."""
        keep, release, utime = lock._keep, lock.release, os.utime

        def marking_keep(self_: DotLock, fd: int, taken: bool) -> bool:
            if taken:
                self.marks.append([self.now])
            return keep(self_, fd, taken)

        def marking_release(self_: DotLock) -> None:
            if self_._fd >= 0:
                self.marks[-1].append(self.now)
            release(self_)

        def marking_utime(fd: int, *args: object, **more: object) -> None:
            if not args and not more:
                self.marks[-1].append(self.now)
            utime(fd, *args, **more)  # type: ignore[call-overload]

        patch(lock, "_keep", marking_keep)
        patch(lock, "release", marking_release)
        patch(os, "utime", marking_utime)


class SlowFiles(Files):
    """The journal's file calls on the same disk; the call named `failing` fails, once."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.failing = ""
        self.roomy = False
        """Whether room was made by the last write."""

    def pread(self, fd: int, count: int, offset: int) -> bytes:  # type: ignore[override]
        return os.pread(fd, count, offset)  # the slow one, see below

    def pwrite(self, fd: int, octets: bytes, offset: int) -> int:  # type: ignore[override]
        self.clock.spend(len(octets))
        if self.failing == "overwrite" and octets != b"\n" * len(octets) and self.roomy:
            self.failing = ""
            raise OSError(errno.EIO, "failed")
        self.roomy = octets == b"\n" * len(octets)
        return os.pwrite(fd, octets, offset)

    def ftruncate(self, fd: int, size: int) -> None:  # type: ignore[override]
        if self.failing == "ftruncate":
            self.failing = ""
            raise OSError(errno.EIO, "failed")
        os.ftruncate(fd, size)
        if self.failing == "fsync":
            self.failing = "now"

    def fsync(self, fd: int) -> None:  # type: ignore[override]
        if self.failing == "now":
            self.failing = ""
            raise OSError(errno.EIO, "failed")


class RefreshTests(MboxCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.files = SlowFiles(self.clock)
        self.store.journals = Journals(self.state, self.files)
        self.patch(
            locks_module, "time", SimpleNamespace(monotonic=self.clock.monotonic, time=time.time)
        )
        self.clock.watch(DotLock, self.patch)

        read = os.pread

        def pread(fd: int, count: int, offset: int) -> bytes:
            octets = read(fd, count, offset)
            self.clock.spend(len(octets))
            return octets

        self.patch(os, "pread", pread)

    def large(self) -> list[bytes]:
        """One message of 8 MiB among some of 400 kB."""
        sizes = [400_000] * 20
        sizes[10] = 8 << 20
        return [message(n, b"%076d\n" % n * (size // 77)) for n, size in enumerate(sizes)]

    def many(self) -> list[bytes]:
        return [message(n) for n in range(700)]

    def put(self, messages: list[bytes]) -> MboxDrop:
        self.write(b"".join(messages))
        return self.opened()

    def check(self, locks: int = 1) -> None:
        """So many dot-locks were held since the last check, the longest one for long."""
        self.assertEqual(len(self.clock.marks), locks)
        for marks in self.clock.marks:
            gaps = [after - before for before, after in pairwise(marks)]
            self.assertLess(max(gaps), LIMIT, [round(gap) for gap in gaps])
        self.assertGreater(max(m[-1] - m[0] for m in self.clock.marks), STALE_AFTER)
        self.clock.marks.clear()

    def test_open_identify_verify(self) -> None:
        drop = self.put(self.large())
        self.check()
        os.utime(self.path, ns=(0, 0))  # something changed: ids are made under the locks
        drop.identify()
        self.check()
        drop._verified.clear()
        drop.source(10).verify()
        self.check()

    def commit_after(self, messages: list[bytes], rows: list[int], identified: bool) -> None:
        drop = self.put(messages)
        if identified:
            drop.identify()
        self.clock.marks.clear()
        drop.commit(rows)
        self.check()
        drop.release()

    def test_commit(self) -> None:
        """Nothing else was written, or the file is too young to know."""
        for messages in (self.large(), self.many()):
            rows = list(range(0, len(messages), 2))
            self.commit_after(messages, rows, identified=False)
            self.patch(drop_module, "clock_ns", time.time_ns)
            self.write(b"", settled=False)
            for identified in (False, True):
                self.commit_after(messages, rows, identified)

    def test_commit_after_a_rewrite(self) -> None:
        """Another program has put Status fields in: messages are found again by their hashes."""
        for messages in (self.large(), self.many()):
            drop = self.put(messages)
            drop.identify()
            self.clock.marks.clear()
            changed = [m.replace(b"\nSubject", b"\nStatus: RO\nSubject", 1) for m in messages]
            self.write(b"".join(changed))
            drop.commit(range(0, len(messages), 2))
            self.check()
            drop.release()

    def test_ids_of_another_server(self) -> None:
        """Headers are read: many short ones, and one that does not end for long."""
        self.store.uidl = UidlForm("x-uidl,x-uid")
        base = b"X-IMAPbase: 1 999999\nX-UID: 1\n"
        huge = b"X-A: %070d\n" % 0 * (1 << 14)
        for messages in (
            self.many(),
            [message(n).replace(b"\n", b"\n" + huge, 1) for n in range(9)],
        ):
            messages[0] = messages[0].replace(b"\n", b"\n" + base, 1)
            drop = self.put(messages)
            os.utime(self.path, ns=(0, 0))
            self.clock.marks.clear()
            drop.identify()
            self.check()
            os.utime(self.path, ns=(1, 1))
            changed = [m.replace(b"\nSubject", b"\nStatus: RO\nSubject", 1) for m in messages]
            self.write(b"".join(changed))
            drop.commit(range(0, len(messages), 2))
            self.check()
            drop.release()

    def test_marks(self) -> None:
        """Status fields put in, with deletions and without, by every kind of look before."""
        self.store.update_status = True
        for kind in ("mboxrd", "mboxcl2"):
            self.store.form = FORMS[kind]
            for messages in (self.large(), self.many()):
                for deleted in ([], [5]):
                    for settled in (True, False):
                        drop = self.put(messages)
                        if not settled:
                            drop._settled = False
                        self.clock.marks.clear()
                        drop.commit(deleted, range(0, len(messages), 2))
                        self.check()
                        drop.release()
                        self.assertEqual(
                            self.spool().count(b"Status: RO"), (len(messages) + 1) // 2
                        )

    def crashed_while_growing(self, failing: str) -> list[bytes]:
        self.store.update_status = True
        messages = self.large()
        drop = self.put(messages)
        self.files.failing = failing
        self.assertRaises(TemporaryFailure, drop.commit, [], range(20))
        self.assertEqual(self.files.failing, "")
        drop.release()
        self.clock.marks.clear()
        return messages

    def test_recovery_of_marks(self) -> None:
        """Ended where room was made; taken back where it was not."""
        messages = self.crashed_while_growing("overwrite")
        new = message(200, (b"y" * 76 + b"\n") * (1 << 17))
        self.append(new)
        marked = [m.replace(b"\n", b"\nStatus: RO\n", 1) for m in messages]
        self.recover([*marked, new])

    def crashed(self, failing: str, row: int = 0) -> None:
        """A QUIT that deletes one of the large messages fails when its journal is there."""
        drop = self.put(self.large())
        self.files.failing = failing
        self.assertRaises(TemporaryFailure, drop.commit, [row])
        self.assertEqual(self.files.failing, "")
        drop.release()
        self.clock.marks.clear()

    def recover(self, left: list[bytes]) -> None:
        self.opened().release()
        self.check(locks=2)  # for the recovery, for the photograph
        self.assertTrue(self.spool() == b"".join(left))
        self.no_litter()

    def test_recovery(self) -> None:
        """Before the cut, and behind it; with much new mail and without."""
        left, new = self.large()[1:], [message(n + 100) for n in range(30)]
        new.append(message(200, (b"y" * 76 + b"\n") * (1 << 17)))
        for failing in ("ftruncate", "fsync"):
            for arrived in ([], new):
                self.crashed(failing)
                self.append(b"".join(arrived))
                self.recover(left + arrived)

    def test_recovery_after_a_torn_cut(self) -> None:
        """What was to be cut off, 8 MiB, came back from a power cut as NULs (decision 3)."""
        messages = self.large()
        self.crashed("ftruncate", 10)
        with open(self.path, "r+b") as spool:
            spool.seek(-len(messages[10]), os.SEEK_END)
            spool.write(bytes(len(messages[10])))
        self.recover(messages[:10] + messages[11:])

    def test_orphan(self) -> None:
        """The spool was rewritten meanwhile, or is gone: messages are looked for, or kept aside."""
        self.crashed("ftruncate")
        rest = self.large()[11:]
        self.write(b"".join(rest))
        self.opened().release()
        self.check(locks=2)
        self.crashed("ftruncate")
        os.unlink(self.path)
        self.opened().release()
        self.check()
