"""`update-status=yes`: Status fields of what was retrieved, and that nothing else changes."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Collection

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import Busy, ConfigError, PermanentFailure, TemporaryFailure
from popdrop.stores.mbox import locks as locks_module
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.kinds import FORMS, LOOK_BACK
from popdrop.stores.mbox.status import Edit, as_read, edited
from popdrop.stores.mbox.store import MboxFactory
from tests import oracle_mbox
from tests.test_kinds import PSEUDO, SEP, anything, kinds
from tests.test_mbox_drop import BOB, MboxCase, message
from tests.test_mbox_kinds import cl2, mmdf
from tests.test_mbox_uidl import BASE, numbered
from tests.test_scan import FROM, mboxes


def read(octets: bytes) -> bytes:
    """A message with a field put in first."""
    return octets.replace(b"\n", b"\nStatus: RO\n", 1)


class EditTests(SynchronousTestCase):
    def test_as_read(self) -> None:
        for header, wanted in (
            (b"A: b\n", b"Status: RO\nA: b\n"),
            (b"", b"Status: RO\n"),
            (b"A: b\nStatus: O\nC: d\n", b"A: b\nStatus: RO\nC: d\n"),
            (b"status:\nC: d\n", b"Status: RO\nC: d\n"),
            (b"A: b\r\nSTATUS: O\r\nC: d\r\n", b"A: b\r\nStatus: RO\r\nC: d\r\n"),
            (b"A: b\nStatus: U\n\tfolded\n", b"A: b\nStatus: RO\n"),
            (b"A: b\nStatus: O", b"A: b\nStatus: RO"),
            (b"X-Status: R\n", b"Status: RO\nX-Status: R\n"),
            (b"A: b\n Status: RO\n", b"Status: RO\nA: b\n Status: RO\n"),
            (b"Status: RO\n", None),
            (b"Status: R\nA: b\n", None),
            (b"\tfolded\n", None),
            (b" folded\n", None),
        ):
            for offset in (0, 77):
                edit = as_read(0, header, offset, b"\n")
                if edit is None:
                    self.assertIsNone(wanted, header)
                    continue
                start, stop = edit.start - offset, edit.stop - offset
                self.assertEqual(header[:start] + edit.text + header[stop:], wanted)
        self.assertEqual(as_read(3, b"A: b\r\n", 5, b"\r\n"), Edit(3, 5, 5, b"Status: RO\r\n"))

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.binary(min_size=20, max_size=80), st.integers(0, 2**32))
    def test_edited(self, octets: bytes, seed: int) -> None:
        """The same as octet by octet."""
        chance = random.Random(seed)
        first, a, b, c, d = sorted(chance.sample(range(len(octets) + 1), 5))
        kept = chance.choice([[(a, d)], [(a, b), (c, d)], []])
        texts = {}
        spots = [*range(chance.randint(0, first), first, 5)]
        for start, stop in kept:
            spots += range(start, stop, chance.randint(1, 9))
        edits = []
        for spot in sorted(chance.sample(spots, min(len(spots), 4))):
            message = max(0, spot - 3)
            edits.append(Edit(message, spot, spot + chance.randint(0, 1), b"<%d>" % spot))
            texts[spot] = edits[-1]
        stays = {*range(first), *(i for start, stop in kept for i in range(start, stop))}
        wanted = b""
        for i in sorted(stays):
            edit = texts.get(i)
            wanted += edit.text if edit else b""
            if not edit or edit.stop == i:
                wanted += octets[i : i + 1]
        begin, pieces = edited(first, kept, edits)
        found = octets[:begin] + b"".join(
            piece if isinstance(piece, bytes) else octets[slice(*piece)] for piece in pieces
        )
        self.assertEqual(found, wanted)
        self.assertEqual(begin, min([first, *(edit.message for edit in edits[:1])]))


class StatusCase(MboxCase):
    options = {"update_status": True}

    def session(self, deleted: Collection[int], seen: Collection[int]) -> None:
        drop = self.store.open(BOB)
        try:
            drop.commit(deleted, seen)
        finally:
            drop.release()
        self.no_litter()


class StatusTests(StatusCase):
    def test_marked(self) -> None:
        """Those that were retrieved, in place; the others are left as they are."""
        self.write(message(1) + message(2) + message(3))
        inode = os.stat(self.path).st_ino
        self.session((), (1,))
        self.assertEqual(self.spool(), message(1) + read(message(2)) + message(3))
        self.session((), (1, 0))
        self.assertEqual(self.spool(), read(message(1)) + read(message(2)) + message(3))
        self.assertEqual(os.stat(self.path).st_ino, inode)

    def test_nothing_to_do(self) -> None:
        """No write, where it is marked already, or nothing was retrieved."""
        octets = self.write(read(message(1)) + message(2))
        before = os.stat(self.path)
        for deleted, seen in (((), ()), ((), (0,))):
            self.session(deleted, seen)
        self.assertEqual(self.spool(), octets)
        self.assertEqual(os.stat(self.path).st_mtime_ns, before.st_mtime_ns)

    def test_not_without_the_option(self) -> None:
        octets = self.write(message(1) + message(2))
        drop = self.opened(self.make())
        self.assertFalse(drop.wants_seen)
        drop.commit((), (0,))
        drop.commit((0,), (1,))
        self.assertEqual(self.spool(), octets[len(message(1)) :])

    def test_with_a_deletion(self) -> None:
        """In one update, whether or not the spool becomes shorter."""
        for deleted, seen, wanted in (
            ((1,), (0, 2), read(message(0)) + read(message(2)) + message(3)),
            ((0,), (1, 2, 3), b"".join(map(read, map(message, range(1, 4))))),
            ((3,), (0,), read(message(0)) + message(1) + message(2)),
            ((0, 2), (0, 3), message(1) + read(message(3))),
        ):
            self.write(b"".join(map(message, range(4))))
            self.session(deleted, seen)
            self.assertEqual(self.spool(), wanted)

    def test_with_the_base_of_uids(self) -> None:
        self.store = self.make(update_status=True, uidl="x-uid")
        self.write(numbered(1, BASE) + numbered(2) + message(3))
        self.session((0,), (1, 2))
        second = FROM + BASE + numbered(2)[len(FROM) :].replace(b"Status: O", b"Status: RO")
        self.assertEqual(self.spool(), second + read(message(3)))

    def test_new_mail(self) -> None:
        """That came during the session stays behind, unread."""
        self.write(message(1) + message(2))
        drop = self.opened()
        self.append(message(3))
        drop.commit((), (0, 1))
        found = os.stat(self.path)
        self.assertLess(found.st_atime_ns, found.st_mtime_ns)
        self.assertEqual(self.spool(), read(message(1)) + read(message(2)) + message(3))

    def test_rewritten_meanwhile(self) -> None:
        """A message that is not found again is not marked; a deletion is done all the same."""
        self.write(message(1) + message(2) + message(3))
        drop = self.opened()
        self.write(message(2) + message(9))
        drop.commit((1,), (0, 2))
        self.assertEqual(self.spool(), message(9))
        drop.release()
        self.write(message(1) + message(2))
        drop = self.opened()
        self.write(message(9) + message(2))
        drop.commit((), (1,))
        self.assertEqual(self.spool(), message(9) + read(message(2)))

    def test_with_an_index(self) -> None:
        """A large spool: the next session sees the new places, and the same ids and sizes."""
        mails = [message(number, b"body\n" * 20_000) for number in range(4)]
        self.write(b"".join(mails))

        def seen(deleted: Collection[int], read: Collection[int]) -> list[tuple[int, bytes]]:
            drop = self.make(**self.options).open(BOB)
            drop.identify()
            rows = [(drop.listing.size(i), drop.listing.uid(i)) for i in range(len(drop.listing))]
            drop.commit(deleted, read)
            drop.release()
            return rows

        wanted = seen((), ())
        self.assertEqual(seen((), (0, 2)), wanted)
        self.assertEqual(seen((1,), (3,)), wanted)
        del wanted[1]
        self.assertEqual(seen((), ()), wanted)
        self.assertEqual(self.spool(), b"".join(map(read, [mails[0], *mails[2:]])))

    def test_no_empty_line_at_the_end(self) -> None:
        """Mail that comes during a crash would not stand behind one: nothing grows then."""
        octets = self.write(message(1) + message(2)[:-1])
        self.session((), (0,))
        self.assertEqual(self.spool(), octets)
        self.session((0,), (1,))
        self.assertEqual(self.spool(), read(message(2)[:-1]))

    def test_refused(self) -> None:
        self.assertRaises(ConfigError, self.make, update_status=True, strip_headers=False)
        factory = MboxFactory()
        for text, wanted in (("yes", True), ("no", False)):
            keywords = {"update-status": text}
            store = factory.make(None, self.state, "/mail/{user}", **keywords)
            self.assertEqual(store.update_status, wanted)
        keywords = {"update-status": "maybe"}
        error = self.assertRaises(
            ConfigError, factory.make, None, self.state, "/mail/{user}", **keywords
        )
        self.assertIn("yes or no", str(error))
        self.write(message(1))
        drop = self.opened()
        self.assertRaises(IndexError, drop.commit, (), (1,))
        self.assertRaises(IndexError, drop.commit, (), (-1,))

    def test_busy_and_read_only(self) -> None:
        octets = self.write(message(1))
        drop = self.opened()
        with locks_module.SpoolLocks(-1, self.path, ("dot",), True):
            self.assertRaises(Busy, drop.commit, (), (0,))
        drop._read_only = "for a test"
        self.assertRaises(PermanentFailure, drop.commit, (), (0,))
        self.assertEqual(self.spool(), octets)

    def test_no_space(self) -> None:
        """The deletion is done without the marks; marks alone are an error, and no harm."""

        class Full(Files):
            """No file may be made, and none may grow."""

            @staticmethod
            def pwrite(fd: int, octets: bytes, offset: int) -> int:  # type: ignore[override]
                if offset + len(octets) > os.fstat(fd).st_size and path_of(fd) == self.path:
                    raise OSError(errno.ENOSPC, "no space")
                return os.pwrite(fd, octets, offset)

        def path_of(fd: int) -> str:
            return os.readlink(f"/proc/self/fd/{fd}")

        self.store.journals = Journals(self.state, Full())
        tiny = FROM + b"\n\n"
        octets = self.write(tiny + b"".join(map(message, range(20))))
        self.assertRaises(TemporaryFailure, self.session, (), range(3, 20))
        self.assertEqual(self.spool(), octets)
        self.session((0,), range(1, 20))
        self.assertEqual(self.spool(), octets[len(tiny) :])

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(octets=mboxes, seed=st.integers(0, 2**32), settled=st.booleans())
    def test_any_spool(self, octets: bytes, seed: int, settled: bool) -> None:
        """What is sent, sizes and ids stay, whatever the mail; no message is lost or doubled."""
        octets = FROM + octets
        chance = random.Random(seed)
        before = oracle_mbox.read(octets)
        rows = [i for i in range(len(before)) if chance.random() < 0.3]
        seen = [i for i in range(len(before)) if chance.random() < 0.5]
        self.write(octets, settled=settled)
        self.session(rows, seen)
        after = oracle_mbox.read(self.spool())
        left = [i for i in range(len(before)) if i not in rows]
        stays = [before[i] for i in left]
        self.assertEqual([each.sent for each in after], [each.sent for each in stays])
        self.assertEqual([each.uid for each in after], [each.uid for each in stays])
        for i, each in zip(left, after, strict=True):
            if i not in seen:
                self.assertEqual(each.stored, before[i].stored)


class KindsTests(StatusCase):
    """In spools of every kind."""

    SPOOLS = (
        ("mboxrd", [message(1), message(2), message(3)], message(4)),
        ("mboxo", [message(1), message(2), message(3)], message(4)),
        ("mboxcl", [cl2(1), cl2(2), cl2(3)], cl2(4)),
        ("mboxcl2", [cl2(1), cl2(2), cl2(3)], cl2(4)),
        ("auto", [cl2(1), cl2(2), cl2(3)], cl2(4)),
        ("auto", [mmdf(1), mmdf(2, FROM), mmdf(3)], mmdf(4)),
        ("mmdf", [mmdf(1), mmdf(2, FROM), mmdf(3)], mmdf(4)),
    )

    @staticmethod
    def marked(one: bytes) -> bytes:
        return one.replace(b"Subject", b"Status: RO\nSubject", 1)

    def seen(self, kind: str) -> list[tuple[int, bytes]]:
        """Sizes and ids as a session of a server without index gives them."""
        self.store = self.make(kind=kind, **self.options)
        drop = self.store.open(BOB)
        drop.identify()
        found = [(drop.listing.size(i), drop.listing.uid(i)) for i in range(len(drop.listing))]
        drop.release()
        return found

    def test_marked(self) -> None:
        """Nothing else changes: octets, sizes, ids, and what another reader finds."""
        for kind, (one, two, three), new in self.SPOOLS:
            for settled in (True, False):
                for deleted, read, more, wanted in (
                    ((), (1,), b"", one + self.marked(two) + three),
                    ((), (0, 1, 2), b"", b"".join(map(self.marked, (one, two, three)))),
                    ((), (0, 2), new, self.marked(one) + two + self.marked(three) + new),
                    ((0,), (1, 2), b"", self.marked(two) + self.marked(three)),
                    ((1,), (0,), new, self.marked(one) + three + new),
                    ((2,), (0,), b"", self.marked(one) + two),
                ):
                    self.write(one + two + three, settled=settled)
                    before = [row for i, row in enumerate(self.seen(kind)) if i not in deleted]
                    drop = self.store.open(BOB)
                    self.append(more)
                    drop.commit(deleted, read)
                    drop.release()
                    self.no_litter()
                    self.assertEqual(self.spool(), wanted, kind)
                    self.assertEqual(self.seen(kind)[: len(before)], before)
                    there = oracle_mbox.read(wanted, kind == "mboxrd", kind=kind)
                    uids = [uid for _, uid in before]
                    self.assertEqual([each.uid for each in there][: len(before)], uids)
                    self.assertEqual(len(there), len(before) + bool(more))

    def test_pseudo_message_stays(self) -> None:
        for kind, pseudo, one in (
            ("mmdf", SEP + PSEUDO + SEP, mmdf(1)),
            ("auto", SEP + PSEUDO + SEP, mmdf(1)),
            ("auto", PSEUDO, cl2(1)),
        ):
            self.store = self.make(kind=kind, **self.options)
            self.write(pseudo + one)
            self.session((), (0,))
            self.assertEqual(self.spool(), pseudo + self.marked(one))

    def test_mmdf_without_its_last_line(self) -> None:
        """Mail that comes during a crash would become part of the message: nothing grows then."""
        for kind in ("mmdf", "auto"):
            self.store = self.make(kind=kind, **self.options)
            octets = self.write(mmdf(1) + mmdf(2).replace(b"From you\n\n" + SEP, b"From you\n"))
            self.session((), (0,))
            self.assertEqual(self.spool(), octets)
            self.session((0,), (1,))
            self.assertEqual(self.spool(), self.marked(octets[len(mmdf(1)) :]))

    def test_a_length_that_a_field_would_make_true(self) -> None:
        """It would hide the message that was marked: that stays as it is, and the log says why."""
        first, kept, last = cl2(1, b"a\n"), cl2(2), cl2(3)
        reach = len(b"a\n\n" + kept + b"Status: RO\n")
        false = first.replace(b"Length: 2", b"Length: %d" % reach)
        octets = false + kept + last + cl2(4)
        for kind in ("mboxcl", "mboxcl2", "auto"):
            for settled in (True, False):
                self.store = self.make(kind=kind, **self.options)
                self.write(octets, settled=settled)
                with capturedLogs() as logs:
                    self.session((), (1,))
                self.assertIn("kind=mboxo", next(each for each in logs if "what" in each)["what"])
                self.assertEqual(self.spool(), octets)
                self.session((3,), (1,))
                self.assertEqual(self.spool(), false + kept + last)
                self.session((), (2, 0))
                self.assertEqual(self.spool(), self.marked(false) + kept + self.marked(last))

    def test_a_length_that_mail_made_true(self) -> None:
        """What is no message any more is not marked as one."""
        kept, new = cl2(2), cl2(3)
        reach = b"Length: %d" % (len(b"a\n\n") + len(kept + new))
        false = cl2(1, b"a\n").replace(b"Length: 2", reach)
        for settled in (True, False):
            self.store = self.make(kind="mboxcl2", **self.options)
            self.write(false + kept, settled=settled)
            drop = self.store.open(BOB)
            self.assertEqual(len(drop.listing), 2)
            self.append(new + cl2(4))
            drop.commit((), (1,))
            drop.release()
            self.assertEqual(self.spool(), false + kept + new + cl2(4))

    def test_a_file_that_is_none_any_more(self) -> None:
        self.store = self.make(kind="mboxcl2", **self.options)
        self.write(cl2(1))
        drop = self.opened()
        self.write(b"no mail\n")
        self.assertRaises(TemporaryFailure, drop.commit, (), (0,))
        self.assertEqual(self.spool(), b"no mail\n")

    def crash(self, kind: str, octets: bytes) -> None:
        """In the middle of a QUIT that marks all: room is made, nothing else can be written."""
        files = Files()
        written: list[int] = []

        def pwrite(fd: int, octets: bytes, offset: int) -> int:
            if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                written.append(offset)
            if len(written) > 1:
                raise OSError(errno.EIO, "why")
            return os.pwrite(fd, octets, offset)

        files.pwrite = pwrite  # type: ignore[method-assign, assignment]
        self.write(octets)
        store = self.make(kind=kind, **self.options)
        store.journals = Journals(self.state, files)
        drop = store.open(BOB)
        self.assertRaises(TemporaryFailure, drop.commit, (), (0, 1, 2))
        drop.release()
        self.assertEqual(self.spool()[: len(octets)], octets)
        self.assertEqual(self.spool()[len(octets) :].strip(b"\n"), b"")
        self.assertGreater(len(self.spool()), len(octets))

    def test_ended_after_a_crash(self) -> None:
        """Mail that came behind the room stays, and begins where mail of that kind may."""
        for kind, parts, new in self.SPOOLS:
            for more in (b"", new):
                self.crash(kind, b"".join(parts))
                self.append(more)
                wanted = b"".join(map(self.marked, parts)) + more
                before = len(oracle_mbox.read(wanted, kind=kind))
                self.assertEqual(len(self.seen(kind)), before)
                self.assertEqual(self.spool(), wanted, kind)
                self.no_litter()

    def test_rewritten_after_a_crash(self) -> None:
        """What another program's file lacks is appended, once, and whole."""
        folder = os.path.dirname(self.path)
        for kind, (one, two, three), new in self.SPOOLS:
            self.crash(kind, one + two + three)
            os.rename(self.path, self.path + ".old")
            self.write(self.marked(two) + new)
            os.unlink(self.path + ".old")
            self.assertEqual(len(self.seen(kind)), 4)
            wanted = self.marked(two) + new + self.marked(one) + self.marked(three)
            self.assertEqual(self.spool(), wanted, kind)
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))

    def same_but_base(self, found: bytes, before: bytes, ended: bytes, moved: bool) -> None:
        """The field of the base in front of it, perhaps with folded lines, or nothing."""
        for end in {b"", ended}:
            if found.endswith(before + end):
                put_in = found[: len(found) - len(before + end)]
                if not put_in or (moved and put_in.startswith(BASE)):
                    return
        self.fail(f"{found!r} was {before!r}")

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        octets=anything,
        kind=kinds,
        seed=st.integers(0, 2**32),
        settled=st.booleans(),
        based=st.booleans(),
        more=st.booleans(),
    )
    def test_any_spool(
        self, octets: bytes, kind: str, seed: int, settled: bool, based: bool, more: bool
    ) -> None:
        """With deletions, new mail, and a base that goes to the next message."""

        def read(octets: bytes) -> list[oracle_mbox.Message]:
            return oracle_mbox.read(octets, kind == "mboxrd", kind=kind)

        try:
            before = read(octets)
            if based and before:
                place = before[0].start + len(before[0].opening + before[0].from_line)
                octets = octets[:place] + BASE + octets[place:]
                before = read(octets)
        except oracle_mbox.Corrupt:
            return
        if any(b"FOLDER INTERNAL DATA" in each.stored for each in before):
            return  # hidden, once it is the first
        chance = random.Random(seed)
        rows = [i for i in range(len(before)) if chance.random() < 0.3]
        seen = [i for i in range(len(before)) if chance.random() < 0.5]
        self.store = self.make(kind=kind, uidl="x-uid" if based else "hash", **self.options)
        self.write(octets, settled=settled)
        drop = self.opened()
        if chance.random() < 0.5:
            drop.identify()
        new = b""
        if more and before:
            new = mmdf(9, FROM) if before[0].opening else cl2(9, b"new\n")
            new = FORMS[kind].between(octets[-LOOK_BACK:], new) + new
            self.append(new)
            # A delivery may make a false length true, or a CRLF of a last CR: its doing, not ours.
            if [each.sent for each in read(octets + new)[:-1]] != [each.sent for each in before]:
                return drop.release()
        try:
            drop.commit(rows, seen)
        except TemporaryFailure:
            self.assertEqual(self.spool(), octets + new)
            self.assertTrue(more or b"content-length:" in octets.lower())
            return
        finally:
            drop.release()
            self.no_litter()
        stays = [(i in seen, each) for i, each in enumerate(before) if i not in rows]
        after = read(self.spool())
        self.assertEqual(len(after), len(stays) + bool(new))
        for place, (each, (may_change, old)) in enumerate(zip(after, stays, strict=False)):
            self.assertEqual((each.uid, each.sent), (old.uid, old.sent))
            self.assertEqual((each.opening, each.from_line), (old.opening, old.from_line))
            if not may_change:
                ended = b"\n" if new and not old.stored.endswith(b"\n") else b""
                self.same_but_base(each.stored, old.stored, ended, 0 in rows and not place)
