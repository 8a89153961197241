"""`popdrop.stores.mbox.recent`, alone and under `MboxStore`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from array import array

from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import TemporaryFailure
from popdrop.listing import Listing
from popdrop.stores.mbox import drop, kinds
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.recent import Photograph, Recent
from popdrop.stores.mbox.scan import Spans
from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner
from tests.end_to_end.harness import mail

KEY = (1, 2, 3, 4, 5)
OTHER = (1, 2, 3, 4, 6)


def photograph(messages: int, key: tuple[int, int, int, int, int] = KEY) -> Photograph:
    return Photograph(key, Spans(starts=array("Q", range(messages))), Listing(()))


class RecentTests(SynchronousTestCase):
    def test_same_facts_only(self) -> None:
        recent = Recent()
        recent.put("a", photograph(2))
        self.assertIsNotNone(recent.get("a", KEY))
        self.assertIsNone(recent.get("b", KEY))
        self.assertIsNone(recent.get("a", OTHER))
        self.assertIsNone(recent.get("a", KEY), "a changed one is forgotten")

    def test_bounds(self) -> None:
        recent = Recent(messages=10, spools=3)
        recent.put("a", photograph(4))
        recent.put("b", photograph(4))
        self.assertIsNotNone(recent.get("a", KEY))
        recent.put("c", photograph(4))
        self.assertIsNone(recent.get("b", KEY), "the one not asked for longest goes first")
        self.assertIsNotNone(recent.get("a", KEY))
        recent.put("huge", photograph(11))
        self.assertIsNone(recent.get("huge", KEY))
        for name in "defg":
            recent.put(name, photograph(0))
        self.assertIsNone(recent.get("d", KEY))
        self.assertIsNotNone(recent.get("g", KEY))


class StoreTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "bob")
        self.store = MboxStore(self.folder + "/{user}", self.folder)
        self.scans = 0
        original = kinds.Scanner

        def counting(*args: object, **kwargs: object) -> object:
            self.scans += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]

        self.patch(kinds, "Scanner", counting)

    def write(self, octets: bytes, age: float) -> None:
        with open(self.path, "r+b" if os.path.exists(self.path) else "wb") as file:
            file.truncate(0)
            file.write(octets)
        os.chmod(self.path, 0o600)
        os.utime(self.path, (time.time() - age,) * 2)
        # A ctime cannot be set back: the store's clock goes on instead, and stands there, however
        # long the rest takes.
        self.moment = time.time_ns() + int(age * 10**9)
        self.patch(drop, "clock_ns", lambda: self.moment)

    def visit(self) -> tuple[int, list[bytes]]:
        maildrop = self.store.open(Owner("bob"))
        try:
            maildrop.identify()
            listing = maildrop.listing
            return len(listing), [listing.uid(i) for i in range(len(listing))]
        finally:
            maildrop.release()

    def test_an_unchanged_spool_is_not_read_again(self) -> None:
        self.write(mail(1) + mail(2), age=100)
        first = self.visit()
        self.assertEqual(self.scans, 1)
        self.assertEqual(self.visit(), first)
        self.assertEqual(self.scans, 1)

    def test_nor_is_it_locked(self) -> None:
        """A deliverer at work on an unchanged spool does not keep a client out."""
        self.write(mail(1), age=100)
        self.visit()
        with open(self.path + ".lock", "x") as lock:
            lock.write("1\n")
        self.assertEqual(self.visit()[0], 1)

    def test_any_change_shows(self) -> None:
        """Appended, rewritten in place to the same length and mtime, replaced."""
        self.write(mail(1) + mail(2), age=100)
        first = self.visit()
        with open(self.path, "ab") as file:
            file.write(mail(3))
        self.assertEqual(self.visit()[0], 3)
        self.write(mail(1) + mail(2), age=100)
        self.assertEqual(self.visit(), first)
        before = os.stat(self.path)
        with open(self.path, "r+b") as file:
            file.write(mail(1) + mail(7))
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(os.stat(self.path).st_size, before.st_size)
        self.assertNotEqual(self.visit(), first, "ctime tells")
        self.write(mail(1) + mail(2), age=100)
        first = self.visit()
        os.rename(self.path, self.path + ".old")
        self.write(mail(4) + mail(5), age=100)
        self.assertNotEqual(self.visit(), first)

    def test_an_old_mtime_is_no_proof(self) -> None:
        """A mail reader may put it back after it wrote; the ctime tells when it did."""
        self.write(mail(1) + mail(2), age=0)
        os.utime(self.path, (time.time() - 1000,) * 2)
        self.visit()
        self.visit()
        self.assertGreaterEqual(self.scans, 2)

    def test_mail_that_came_in_a_session_is_seen_by_the_next(self) -> None:
        """Even if the session's ids were made after it came and long after it was written."""
        for separator in (b"", b"\n"):
            self.write(mail(1) + mail(2), age=100)
            maildrop = self.store.open(Owner("bob"))
            with open(self.path, "ab") as file:
                file.write(separator + mail(3))
            self.patch(drop, "clock_ns", lambda: time.time_ns() + 10**12)
            maildrop.identify()
            self.assertEqual(len(maildrop.listing), 2)
            maildrop.commit({0, 1})
            maildrop.release()
            self.assertEqual(self.visit()[0], 1)

    def test_a_fresh_spool_is_not_believed(self) -> None:
        """Within two seconds of a write another may leave the same times."""
        self.write(mail(1), age=0)
        self.visit()
        self.visit()
        self.assertGreaterEqual(self.scans, 2)

    def test_a_spool_that_settles_in_a_session_is_kept(self) -> None:
        """Mail that came a moment before a login costs one reading, not two."""
        for identify in (True, False):
            self.write(mail(1) + mail(2), age=1)
            self.scans = 0
            maildrop = self.store.open(Owner("bob"))
            self.patch(drop, "clock_ns", lambda: time.time_ns() + 10**11)
            if identify:
                maildrop.identify()
            maildrop.release()
            self.assertEqual(self.visit()[0], 2)
            self.assertEqual(self.scans, 1)

    def test_but_not_if_it_was_written_meanwhile(self) -> None:
        self.write(mail(1) + mail(2), age=1)
        maildrop = self.store.open(Owner("bob"))
        with open(self.path, "ab") as file:
            file.write(mail(3))
        self.patch(drop, "clock_ns", lambda: time.time_ns() + 10**11)
        maildrop.release()
        self.assertEqual(self.visit()[0], 3)

    def test_an_update_that_failed_is_not_forgotten(self) -> None:
        """A journal that waits is seen by the next login, though the spool is as it was."""
        self.write(mail(1) + mail(2) + mail(3), age=100)
        self.visit()
        files = Files()

        def fail(*args: object) -> int:
            raise OSError(5, "why")

        whole = self.store.journals
        self.store.journals = Journals(self.folder, files)
        maildrop = self.store.open(Owner("bob"))
        files.ftruncate = fail  # type: ignore[method-assign, assignment]
        self.assertRaises(TemporaryFailure, maildrop.commit, {0})
        maildrop.release()
        self.store.journals = whole
        self.assertEqual(self.visit()[0], 2)
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), mail(2) + mail(3))

    def test_deleting_from_a_recalled_photograph(self) -> None:
        self.write(mail(1) + mail(2) + mail(3), age=100)
        self.visit()
        maildrop = self.store.open(Owner("bob"))
        with open(self.path, "ab") as file:
            file.write(mail(4))
        maildrop.commit({0, 2})
        maildrop.release()
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), mail(2) + mail(4))
