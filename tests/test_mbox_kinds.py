"""Spools of every kind through the store: read, shortened, recovered; nothing else is touched."""

from __future__ import annotations

import contextlib  # not `suppress`: trial reads a module attribute of that name
import errno
import os
import random
import shutil

from hypothesis import given, settings
from hypothesis import strategies as st

from popdrop.errors import PermanentFailure, PopdropError, TemporaryFailure
from popdrop.stores.mbox.drop import CORRUPT, MboxDrop
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.kinds import FORMS, LOOK_BACK
from popdrop.stores.mbox.store import MboxStore
from popdrop.testing import StoreContract, as_sent
from popdrop.values import Owner
from tests import oracle_mbox, test_index, test_mbox_drop
from tests.test_kinds import PSEUDO, SEP, anything, kinds
from tests.test_mbox_drop import BOB, MboxCase
from tests.test_scan import FROM

INNER = b"body\n\n" + FROM + b"Subject: inside\n\nmore\n"


def mmdf(number: int, from_line: bytes = b"") -> bytes:
    """One message of an MMDF spool, with both lines of ^A."""
    return SEP + from_line + b"Subject: %d\n\n>From me\nFrom you\n\n" % number + SEP


def cl2(number: int, body: bytes = INNER) -> bytes:
    """One of an mboxcl2 spool, with the empty line behind it."""
    header = FROM + b"Subject: %d\nContent-Length: %d\n\n" % (number, len(body))
    return header + body + b"\n"


class KindCase(MboxCase):
    def opened_as(self, kind: str) -> MboxDrop:
        return self.opened(self.make(kind=kind))

    def sent(self, drop: MboxDrop) -> list[bytes]:
        sent = [as_sent(drop.source(index)) for index in range(len(drop.listing))]
        self.assertEqual([drop.listing.size(i) for i in range(len(sent))], [len(o) for o in sent])
        return sent

    def failing_to_truncate(self, kind: str) -> MboxStore:
        """A store whose updates stop where a crash could have stopped them."""
        files = Files()

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "why")

        files.ftruncate = fail  # type: ignore[method-assign, assignment]
        store = self.make(kind=kind)
        store.journals = Journals(self.state, files)
        return store


class MmdfContract(test_mbox_drop.Contract):
    """What holds for every store, over MMDF files."""

    def make(self, **options: object) -> MboxStore:
        return super().make(**{"kind": "mmdf", **options})

    def deliver(self, message: bytes) -> None:
        self.append(SEP + message + SEP)


class AutoMmdfContract(MmdfContract):
    def make(self, **options: object) -> MboxStore:
        return super().make(kind="auto")


class LengthContract(test_mbox_drop.Contract):
    """The same over files with Content-Length."""

    def make(self, **options: object) -> MboxStore:
        return super().make(**{"kind": "mboxcl2", **options})

    def deliver(self, message: bytes) -> None:
        header, empty_line, body = message.partition(b"\n\n")
        if empty_line:
            header += b"\nContent-Length: %d" % len(body)
        self.append(FROM + header + empty_line + body + b"\n")


class SettledMmdfContract(MmdfContract):
    def opened(self, owner: Owner | None = None) -> MboxDrop:  # type: ignore[override]
        if owner is None and os.path.exists(self.path):
            self.age()
        return StoreContract.opened(self, owner)  # type: ignore[return-value]


class ReadTests(KindCase):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds)
    def test_any_octets(self, octets: bytes, kind: str) -> None:
        """Listed, sent and identified as the slow reader says, or refused."""
        self.write(octets)
        try:
            wanted = oracle_mbox.read(octets, kind == "mboxrd", kind=kind)
        except oracle_mbox.Corrupt as bad:
            error = self.assertRaises(PermanentFailure, self.make(kind=kind).open, BOB)
            self.assertEqual(error.text, CORRUPT)
            self.assertIn(f"line {bad.line}, offset {bad.offset}", error.detail)
            return
        drop = self.opened_as(kind)
        self.assertEqual(self.sent(drop), [m.sent for m in wanted])
        uids = [uid.partition(b"-")[0] for uid in self.uids(drop)]
        self.assertEqual(uids, [m.uid for m in wanted])
        drop.release()
        self.assertEqual(self.spool(), octets)

    def test_un_quoting(self) -> None:
        """Only mboxrd. What `auto` finds does not change it."""
        for kind in FORMS:
            octets = FROM + b"Status: RO\nA: b\n\n>From a\n"
            self.write(SEP + octets + SEP if kind == "mmdf" else octets)
            drop = self.opened_as(kind)
            quote = b"" if kind == "mboxrd" else b">"
            self.assertEqual(self.sent(drop), [b"A: b\r\n\r\n" + quote + b"From a\r\n"])
            drop.release()
        self.write(mmdf(1))
        self.assertEqual(
            self.sent(self.opened_as("auto")),
            [b"Subject: 1\r\n\r\n>From me\r\nFrom you\r\n\r\n"],
        )

    def test_spool_headers_are_not_sent(self) -> None:
        for kind, octets in (
            ("mmdf", SEP + b"Status: RO\nX-UID: 4\n 5\nA: b\n\nx\n" + SEP),
            ("auto", SEP + FROM + b"A: b\nx-status: A\n\nx\n" + SEP),
            ("mboxcl2", FROM + b"Content-Length: 2\nA: b\nX-Keywords: c\n\nx\n\n"),
            ("mboxcl", FROM + b"Content-Length: 2\nA: b\nX-IMAPbase: 1 2\n\nx\n\n"),
        ):
            self.write(octets)
            drop = self.opened_as(kind)
            self.assertEqual(self.sent(drop), [b"A: b\r\n\r\nx\r\n"])
            drop.release()


class CommitTests(KindCase):
    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(
        octets=anything,
        kind=kinds,
        seed=st.integers(0, 2**32),
        settled=st.booleans(),
        known=st.booleans(),
        more=st.booleans(),
    )
    def test_kept_octets_are_as_they_were(
        self, octets: bytes, kind: str, seed: int, settled: bool, known: bool, more: bool
    ) -> None:
        """Any spool, any set, with a delivery in between: the rest stays octet for octet.

        Or nothing happens: where a length that was not true would come to be true.
        """
        try:
            messages = oracle_mbox.read(octets, kind == "mboxrd", kind=kind)
        except oracle_mbox.Corrupt:
            return
        chance = random.Random(seed)
        rows = [i for i in range(len(messages)) if chance.random() < 0.5]
        self.write(octets, settled=settled)
        drop = self.opened_as(kind)
        if known:
            drop.identify()
        new = b""
        if more and messages:
            is_mmdf = octets[messages[0].start] == 1
            new = mmdf(9, FROM) if is_mmdf else cl2(9, b"new\n")
            octets += FORMS[kind].between(octets[-LOOK_BACK:], new)
            self.append(octets[len(self.spool()) :] + new)
        now = octets + new
        hidden = len(oracle_mbox.read(octets, kind=kind, hide=False)) > len(messages)
        kept = self.without(octets, new, [m.start for m in messages], rows, hidden)
        try:
            drop.commit(rows)
        except TemporaryFailure:
            self.assertEqual(self.spool(), now)
            self.assertTrue(more or b"content-length:" in now.lower())
        else:
            self.assertEqual(self.spool(), kept)
            left = [m for i, m in enumerate(messages) if i not in rows]
            again = oracle_mbox.read(self.spool(), kind == "mboxrd", kind=kind)
            self.assertEqual([m.uid for m in again[: len(left)]], [m.uid for m in left])
            self.assertEqual(len(again), len(left) + bool(new))
        finally:
            drop.release()
        self.no_litter()

    def without(
        self, octets: bytes, new: bytes, starts: list[int], rows: list[int], hidden: bool
    ) -> bytes:
        stops = [*starts[1:], len(octets)]
        whole = octets + new
        begin = starts[0] if starts else len(whole)
        kept = whole[:begin] if len(rows) < len(starts) or not rows or new or hidden else b""
        kept += b"".join(whole[starts[i] : stops[i]] for i in range(len(starts)) if i not in rows)
        return kept + (whole[stops[-1] :] if starts else b"")

    def delete(self, kind: str, octets: bytes, rows: list[int], more: bytes = b"") -> bytes:
        """What is left, which is the same in every way to delete it."""
        left = set()
        for settled in (True, False):
            for known in (True, False):
                self.write(octets, settled=settled)
                drop = self.opened_as(kind)
                if known:
                    drop.identify()
                self.append(more)
                drop.commit(rows)
                drop.release()
                left.add(self.spool())
        self.assertEqual(len(left), 1)
        return left.pop()

    def test_mmdf(self) -> None:
        """A message goes with both its lines of ^A."""
        parts = [mmdf(1), mmdf(2, FROM), mmdf(3)]
        for kind in ("mmdf", "auto"):
            for row in range(3):
                for more in (b"", mmdf(4), b"\n" + mmdf(4)):
                    left = self.delete(kind, b"".join(parts), [row], more)
                    others = b"".join(part for n, part in enumerate(parts) if n != row)
                    self.assertEqual(left, others + (more.lstrip(b"\n") if row == 2 else more))
            self.assertEqual(self.delete(kind, b"".join(parts), [0, 1, 2]), b"")
            self.assertEqual(self.delete(kind, b"".join(parts), [0, 1, 2], mmdf(4)), mmdf(4))

    def test_mmdf_with_one_line_between(self) -> None:
        """That line is the opening one of the second message."""
        one, two = SEP + b"A: 1\n\nx\n", SEP + b"A: 2\n\nx\n"
        self.assertEqual(self.delete("mmdf", one + two + SEP, [0]), two + SEP)
        self.assertEqual(self.delete("mmdf", one + two + SEP, [1]), one)
        self.assertEqual(self.delete("mmdf", one + two + SEP, [1], mmdf(3)), one + mmdf(3))

    def test_mboxcl2(self) -> None:
        parts = [cl2(1), cl2(2), cl2(3)]
        for kind in ("mboxcl", "mboxcl2", "auto"):
            for row in range(3):
                for more in (b"", cl2(4)):
                    left = self.delete(kind, b"".join(parts), [row], more)
                    others = b"".join(part for n, part in enumerate(parts) if n != row)
                    self.assertEqual(left, others + more)

    def test_mboxcl2_without_empty_lines(self) -> None:
        """Where only lengths tell one message from the next."""
        parts = [cl2(number)[:-1] for number in range(4)]
        for row in range(3):
            left = self.delete("mboxcl2", b"".join(parts[:3]), [row], parts[3])
            self.assertEqual(left, b"".join(part for n, part in enumerate(parts) if n != row))

    def test_pseudo_message_stays(self) -> None:
        body = b"text\n\n" + FROM + b"x\n"
        lengthy = PSEUDO.partition(b"\n\n")[0] + b"\nContent-Length: %d\n\n" % len(body) + body
        for kind, pseudo, one, two in (
            ("mmdf", SEP + PSEUDO + SEP, mmdf(1), mmdf(2)),
            ("auto", SEP + PSEUDO + SEP, mmdf(1), mmdf(2)),
            ("auto", PSEUDO, cl2(1), cl2(2)),
            ("mboxcl2", lengthy + b"\n", cl2(1), cl2(2)),
        ):
            self.assertEqual(self.delete(kind, pseudo + one + two, [0]), pseudo + two)
            self.assertEqual(self.delete(kind, pseudo + one, [0]), pseudo)

    def test_a_false_length_that_would_become_true(self) -> None:
        """It would hide the messages within it: then nothing is deleted, and the log says why."""
        gone, kept, last = cl2(2, b"gone\n"), cl2(3), cl2(4)
        first = cl2(1, b"a\n")
        false = first.replace(b"Length: 2", b"Length: %d" % (len(b"a\n\n") + len(kept)))
        octets = false + gone + kept + last
        for kind in ("mboxcl", "mboxcl2", "auto"):
            for settled in (True, False):
                self.write(octets, settled=settled)
                drop = self.opened_as(kind)
                self.assertEqual(len(drop.listing), 4)
                error = self.assertRaises(TemporaryFailure, drop.commit, [1])
                self.assertIn("kind=mboxo", error.detail)
                self.assertEqual(self.spool(), octets)
                drop.commit([0, 1])
                drop.release()
                self.assertEqual(self.spool(), kept + last)

    def test_a_length_that_mail_made_true(self) -> None:
        """By what the spool holds now: what is no message any more is not deleted as one."""
        kept, new, next_new = cl2(2), cl2(3), cl2(4)
        first = cl2(1, b"a\n")
        reach = b"Length: %d" % (len(b"a\n\n") + len(kept + new))
        false = first.replace(b"Length: 2", reach)
        for settled in (True, False):
            for known in (True, False):
                self.write(false + kept, settled=settled)
                drop = self.opened_as("mboxcl2")
                self.assertEqual(len(drop.listing), 2)
                if known:
                    drop.identify()
                self.append(new + next_new)
                for row in (0, 1):
                    self.assertRaises(TemporaryFailure, drop.commit, [row])
                self.assertEqual(self.spool(), false + kept + new + next_new)
                drop.release()

    def test_a_false_length_is_no_bar(self) -> None:
        """What has nothing to do with it is deleted, also when new mail came."""
        false = cl2(1, b"a\n").replace(b"Length: 2", b"Length: 999999")
        for row, left in ((0, cl2(2)), (1, false)):
            self.assertEqual(self.delete("mboxcl2", false + cl2(2), [row], cl2(3)), left + cl2(3))

    def test_copies_and_new_mail(self) -> None:
        """Messages that nothing tells apart but their places are deleted by these."""
        copy = cl2(1)
        for kind in ("mboxcl2", "auto"):
            self.assertEqual(self.delete(kind, copy * 3, [1], cl2(2)), copy * 2 + cl2(2))
        self.assertEqual(self.delete("auto", mmdf(1) * 3, [1], mmdf(2)), mmdf(1) * 2 + mmdf(2))

    def test_changed_in_its_place(self) -> None:
        """Another header, or another body where ids are known: it is not the same message."""
        octets = cl2(1) + cl2(2)
        for known, old, new in ((False, b"Subject: 2", b"Subject: X"), (True, b"more", b"MORE")):
            changed = cl2(1) + cl2(2).replace(old, new)
            self.write(octets)
            drop = self.opened_as("mboxcl2")
            if known:
                drop.identify()
            self.write(changed)
            self.assertRaises(TemporaryFailure, drop.commit, [1])
            self.assertEqual(self.spool(), changed)
            drop.release()


class RecoveryTests(KindCase):
    """A crash in the middle, then whatever may have happened to the spool meanwhile."""

    SPOOLS = (
        ("mmdf", [mmdf(1), mmdf(2, FROM), mmdf(3)], mmdf(4)),
        ("auto", [mmdf(1), mmdf(2, FROM), mmdf(3)], mmdf(4)),
        ("auto", [cl2(1), cl2(2), cl2(3)], cl2(4)),
        ("mboxcl", [cl2(1), cl2(2), cl2(3)], cl2(4)),
        ("mboxcl2", [cl2(n)[:-1] for n in (1, 2, 3)], cl2(4)),
    )

    def crash(self, kind: str, parts: list[bytes]) -> None:
        self.write(b"".join(parts))
        drop = self.failing_to_truncate(kind).open(BOB)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        drop.release()

    def test_finished(self) -> None:
        for kind, parts, new in self.SPOOLS:
            for more in (b"", new):
                self.crash(kind, parts)
                self.append(more)
                self.make(kind=kind).tidy()
                self.assertEqual(self.spool(), parts[1] + parts[2] + more, kind)
                self.no_litter()

    def test_cut_and_then_mail(self) -> None:
        """The update had ended but for its journal (R3): what is behind it is new mail."""
        for kind, parts, new in self.SPOOLS:
            self.crash(kind, parts)
            with open(self.path, "r+b") as spool:
                spool.truncate(len(parts[1] + parts[2]))
            self.append(new)
            drop = self.opened_as(kind)
            self.assertEqual(len(drop.listing), 3)
            self.assertEqual(self.spool(), parts[1] + parts[2] + new, kind)
            drop.release()
            self.no_litter()

    def test_rewritten(self) -> None:
        """R4: what the spool lacks of the journal is appended, told by the same boundaries."""
        for kind, parts, new in self.SPOOLS:
            self.crash(kind, parts)
            os.rename(self.path, self.path + ".old")
            self.write(parts[1] + new)
            os.unlink(self.path + ".old")
            drop = self.opened_as(kind)
            self.assertEqual(self.spool(), parts[1] + new + parts[2], kind)
            self.assertEqual(len(drop.listing), 3)
            drop.release()
            self.clear()

    def test_rewritten_and_cut_short(self) -> None:
        """The last message there lacks its end: what is put back does not become part of it."""
        for kind, parts, new in self.SPOOLS:
            for end in (new.rstrip(b"\x01\n"), new.rstrip(b"\x01\n") + b"\n"):
                self.crash(kind, parts)
                os.rename(self.path, self.path + ".old")
                self.write(end)
                os.unlink(self.path + ".old")
                drop = self.opened_as(kind)
                left = self.spool()
                self.assertTrue(left.startswith(end))
                self.assertTrue(left.endswith(parts[1] + parts[2]), kind)
                self.assertEqual(len(drop.listing), 3, kind)
                drop.release()
                self.clear()

    def test_another_kind_of_file(self) -> None:
        """MMDF mail is not put into a file of From_ lines, nor the other way round."""
        for parts, other in (
            ([mmdf(1), mmdf(2)], cl2(4)),
            ([cl2(1), cl2(2)], mmdf(4)),
        ):
            self.crash("auto", parts)
            os.rename(self.path, self.path + ".old")
            self.write(other)
            os.unlink(self.path + ".old")
            drop = self.opened_as("auto")
            self.assertEqual(self.spool(), other)
            self.assertEqual(len(drop.listing), 1)
            drop.release()
            names = [n for n in os.listdir(os.path.dirname(self.path)) if "orphan" in n]
            self.assertEqual(len(names), 1)
            self.clear()

    def clear(self) -> None:
        folder = os.path.dirname(self.path)
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))


class IndexTests(test_index.IndexCase):
    """Nobody can tell whether there was an index, whatever was appended."""

    kind = "mboxrd"

    def make(self, **options: object) -> MboxStore:
        return super().make(**{"kind": self.kind, **options})

    def fresh(self) -> MboxStore:
        state = os.path.join(self.folder, "other")
        shutil.rmtree(state, ignore_errors=True)
        return MboxStore(os.path.join(self.folder, "mail", "{user}"), state, self.kind)

    def grown(self, kind: str, octets: bytes, more: bytes) -> None:
        self.kind = kind
        self.write(octets)
        self.visit(uidl=True)
        self.append(more)
        self.store = self.make()
        self.assertEqual(self.seen(self.store), self.seen(self.fresh()))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds, more=anything, seed=st.integers(0, 2**32))
    def test_any_growth(self, octets: bytes, kind: str, more: bytes, seed: int) -> None:
        """What was appended is part of the same octets, or begins anew."""
        with contextlib.suppress(PopdropError):
            cut = random.Random(seed).randrange(len(octets) + 1)
            self.grown(kind, octets[:cut], octets[cut:])
        with contextlib.suppress(PopdropError):
            self.grown(kind, octets, more)

    def test_a_length_that_mail_makes_true(self) -> None:
        kept, new = cl2(2), cl2(3)
        first = cl2(1, b"a\n")
        reach = b"Length: %d" % (len(b"a\n\n") + len(kept + new))
        false = first.replace(b"Length: 2", reach)
        for kind in ("mboxcl", "mboxcl2", "auto"):
            self.grown(kind, false + kept, new + cl2(4))
            drop = self.make().open(BOB)
            self.assertEqual(len(drop.listing), 2)
            drop.release()

    def test_true_lengths_are_not_scanned_again(self) -> None:
        """A spool that has grown is worth its index also where lengths are believed."""
        for kind, one in (("mboxcl2", cl2), ("auto", cl2), ("auto", mmdf), ("mmdf", mmdf)):
            old = b"".join(one(number) for number in range(20))
            self.grown(kind, old, one(20))
            self.visit(uidl=True)
            self.append(one(21))
            drop = self.make().open(BOB)
            self.assertEqual((drop._proven, len(drop.listing)), (21, 22))
            drop.release()
