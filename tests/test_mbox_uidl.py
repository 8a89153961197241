"""mbox spools whose ids another server has given out: read, kept over deletions, found again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterator
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.stores.mbox import identity as identity_module
from popdrop.stores.mbox.identity import LONGEST_HEADER
from popdrop.stores.mbox.store import MboxFactory
from tests import oracle_mbox
from tests.test_kinds import SEP
from tests.test_mbox_drop import BOB, MboxCase
from tests.test_scan import FROM, mboxes

PSEUDO = (
    FROM + b"Date: now\nFrom: Mail System Internal Data <MAILER-DAEMON@x>\n"
    b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n"
    b"X-IMAP: 1795355835 0000000009\nStatus: RO\n\nThis text is part of the internal format.\n\n"
)
BASE = b"X-IMAPbase: 1795355835 0000000009\n"


def mail(number: int, fields: bytes = b"", body: bytes = b"body\n") -> bytes:
    """Fields come behind the others, as Dovecot and c-client write them."""
    return FROM + b"Subject: %d\n%s\n%s\n" % (number, fields, body)


def numbered(uid: int, fields: bytes = b"") -> bytes:
    return mail(uid, fields + b"X-UID: %d                 \nStatus: O\n" % uid)


def dovecot(*uids: int) -> list[bytes]:
    """Their ids in Dovecot's default form."""
    return [b"%08x6b02f4bb" % uid for uid in uids]


class UidlCase(MboxCase):
    kind = "mboxrd"

    def session(self, deleted: Collection[int] = (), form: str = "x-uid") -> list[bytes]:
        """The ids of one session, which deletes some at its end."""
        drop = self.make(uidl=form, kind=self.kind).open(BOB)
        try:
            found = self.uids(drop)
            drop.commit(deleted)
        finally:
            drop.release()
        self.no_litter()
        return found

    def hashes(self) -> list[bytes]:
        return [each.uid for each in oracle_mbox.read(self.spool(), kind=self.kind)]


class XUidlTests(UidlCase):
    def test_reused(self) -> None:
        """qpopper's, where there are any; the other messages get their hash."""
        octets = [mail(1, b"X-UIDL: 0123456789abcdef0123456789abcdef\n"), mail(2)]
        self.write(b"".join([*octets, mail(3, b'X-UIDL: !!"#$%&()*+,-/0123\n')]))
        wanted = [b"0123456789abcdef0123456789abcdef", self.hashes()[1], b'!!"#$%&()*+,-/0123']
        for deleted in ((), (1,)):
            self.assertEqual(self.session(deleted, "x-uidl"), wanted)
        self.assertEqual(self.session((), "x-uidl"), [wanted[0], wanted[2]])
        self.assertEqual(self.session((), "hash"), self.hashes())

    def test_bodies_are_not_read(self) -> None:
        big = b"x" * 80 + b"\n"
        octets = [mail(i, b"X-UIDL: abcdefghijk%d\n" % i, big * 5000) for i in range(3)]
        self.write(b"".join(octets))
        self.patch(identity_module, "digest_of", lambda *_: self.fail("was hashed"))
        drop = self.opened(self.make(uidl="x-uidl"))
        read = []
        real = drop._spool.read

        def counted(start: int, stop: int) -> bytes:
            read.append(stop - start)
            return real(start, stop)

        self.patch(drop._spool, "read", counted)
        self.assertEqual(self.uids(drop), [b"abcdefghijk%d" % i for i in range(3)])
        self.assertLess(sum(read), 30_000)

    def test_long_headers(self) -> None:
        """Looked through up to 1 MiB."""
        field = b"X-UIDL: abcdefghijklm\n"
        for fill, reused in ((8000, True), (70_000, True), (LONGEST_HEADER * 2, False)):
            self.write(mail(1, b"X-A: b\n" * (fill // 7) + field))
            found = self.session((), "x-uidl")
            self.assertEqual(found, [b"abcdefghijklm"] if reused else self.hashes())

    def test_header_ends_at_the_empty_line(self) -> None:
        for octets in (
            mail(1, b"", b"X-UIDL: abcdefghijklm\n"),
            FROM + b"\nX-UIDL: abcdefghijklm\n\n",
            FROM + b"\r\nX-UIDL: abcdefghijklm\r\n\r\n",
            mail(1).replace(b"\n", b"\r\n") + mail(2, b"", b"X-UIDL: abcdefghijklm\n"),
        ):
            self.write(octets)
            self.assertEqual(self.session((), "x-uidl"), self.hashes())
        self.write(mail(1) + FROM + b"X-UIDL: abcdefghijklm")
        self.assertEqual(self.session((), "x-uidl"), [self.hashes()[0], b"abcdefghijklm"])

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(octets=mboxes)
    def test_any_octets(self, octets: bytes) -> None:
        """As many sound ids as messages, none twice, and the same at the next login."""
        self.write(FROM + octets)
        form = "x-uidl[1-70],x-uid"
        found = self.session((), form)
        self.assertEqual(len(found), len(oracle_mbox.read(FROM + octets)))
        self.assertEqual(len(set(found)), len(found))
        self.assertEqual(self.session((), form), found)


class XUidTests(UidlCase):
    def test_base_in_the_first_message(self) -> None:
        self.write(numbered(2, BASE) + numbered(4) + mail(5) + mail(6, b"X-UID: 10\n"))
        hashes = self.hashes()
        self.assertEqual(self.session(), dovecot(2, 4) + hashes[2:])

    def test_base_in_the_pseudo_message(self) -> None:
        for before in (b"", b"\n", b"\r\n\n"):
            self.write(before + PSEUDO + numbered(2) + numbered(4))
            self.assertEqual(self.session((0,)), dovecot(2, 4))
            self.assertEqual(self.session(), dovecot(4))
            self.assertEqual(self.spool(), before + PSEUDO + numbered(4))
        self.write(PSEUDO)
        self.assertEqual(self.session(), [])

    def test_no_base(self) -> None:
        self.write(numbered(1) + numbered(2, BASE))
        self.assertEqual(self.session(), self.hashes())

    def test_base_goes_on(self) -> None:
        """The message that holds it is deleted: the first that stays gets it (as Dovecot does)."""
        self.write(numbered(1, BASE) + numbered(2) + numbered(3) + mail(4))
        hashes = self.hashes()
        wanted = [*dovecot(1, 2, 3), hashes[3]]
        self.assertEqual(self.session((0, 2)), wanted)
        put_in = FROM + BASE + numbered(2)[len(FROM) :]
        self.assertEqual(self.spool(), put_in + mail(4))
        self.assertEqual(self.session((0,)), [wanted[1], wanted[3]])
        self.assertEqual(self.spool(), FROM + BASE + mail(4)[len(FROM) :])
        self.assertEqual(self.session((0,)), [wanted[3]])
        self.assertEqual(self.spool(), b"")

    def test_only_where_it_is_needed(self) -> None:
        """Else the octets of what stays are as they were."""
        octets = numbered(1, BASE) + numbered(2)
        for form in ("hash", "x-uidl"):
            self.write(octets)
            self.session((0,), form)
            self.assertEqual(self.spool(), numbered(2))
        self.write(octets)
        self.session((1,))
        self.assertEqual(self.spool(), numbered(1, BASE))

    def test_new_mail_gets_no_base(self) -> None:
        self.write(numbered(1, BASE) + numbered(2))
        drop = self.make(uidl="x-uid").open(BOB)
        self.append(mail(3))
        drop.commit([0, 1])
        drop.release()
        self.assertEqual(self.spool(), mail(3))

    def test_line_ends_and_folds(self) -> None:
        crlf = numbered(1, b"X-IMAPbase: 1795355835 9 a\n\tb\n").replace(b"\n", b"\r\n")
        self.write(crlf + numbered(2))
        self.assertEqual(self.session((0,)), dovecot(1, 2))
        field = b"X-IMAPbase: 1795355835 9 a\r\n\tb\r\n"
        self.assertEqual(self.spool(), FROM + field + numbered(2)[len(FROM) :])
        self.assertEqual(self.session(), dovecot(2))

    def test_not_before_a_folded_line(self) -> None:
        """It would take that line from the message, for clients and for its hash."""
        odd = FROM + b" folded: yes\nX-UID: 2\n\nbody\n\n"
        self.write(numbered(1, BASE) + odd)
        self.session((0,))
        self.assertEqual(self.spool(), odd)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(octets=mboxes, seed=st.integers(0, 2**32))
    def test_what_stays_is_the_same_mail(self, octets: bytes, seed: int) -> None:
        """With a base put in: what is sent, sizes, and hashes do not change."""
        octets = numbered(1, BASE) + FROM + octets
        chance = random.Random(seed)
        before = oracle_mbox.read(octets)
        rows = {0} | {i for i in range(len(before)) if chance.random() < 0.4}
        stays = [each for i, each in enumerate(before) if i not in rows]
        self.write(octets, settled=chance.random() < 0.5)
        self.session(rows)
        after = oracle_mbox.read(self.spool(), hide=False)
        self.assertEqual([m.sent for m in after], [m.sent for m in stays])
        self.assertEqual([m.digest for m in after], [m.digest for m in stays])
        self.assertLessEqual(self.spool().count(BASE), octets.count(BASE))


class KindsTests(UidlCase):
    """The same in MMDF spools, with From_ lines and without, and where lengths are believed."""

    INNER = b"body\n\n" + FROM + b"X-UIDL: of-no-message\nX-UID: 9\n\nmore\n"

    def mmdf(self, number: int, fields: bytes = b"", from_line: bytes = b"") -> bytes:
        return SEP + from_line + fields + b"Subject: %d\n\nbody\n\n" % number + SEP

    def cl2(self, number: int, fields: bytes = b"") -> bytes:
        length = b"Content-Length: %d\n" % len(self.INNER)
        return FROM + fields + length + b"Subject: %d\n\n%s\n" % (number, self.INNER)

    def each(self) -> Iterator[Callable[..., bytes]]:
        """Sets the kind; gives what makes its messages, with fields that come first."""
        for kind, make in (
            ("mmdf", self.mmdf),
            ("auto", self.mmdf),
            ("mmdf", partial(self.mmdf, from_line=FROM)),
            ("auto", self.cl2),
            ("mboxcl", self.cl2),
            ("mboxcl2", self.cl2),
        ):
            self.kind = kind
            yield make

    def test_x_uidl(self) -> None:
        for make in self.each():
            parts = [make(i, b"X-UIDL: abcdefghijk%d\n" % i) for i in range(3)]
            self.write(b"".join([*parts, make(3)]))
            wanted = [*(b"abcdefghijk%d" % i for i in range(3)), self.hashes()[3]]
            self.assertEqual(self.session((0, 2), "x-uidl"), wanted)
            self.assertEqual(self.spool(), parts[1] + make(3))
            self.assertEqual(self.session((), "x-uidl"), [wanted[1], wanted[3]])

    def test_x_uid(self) -> None:
        """The base goes on to the next message, before its other fields."""
        for make in self.each():
            uids = [b"X-UID: %d\n" % uid for uid in range(4)]
            self.write(make(1, BASE + uids[1]) + make(2, uids[2]) + make(3, uids[3]) + make(4))
            wanted = [*dovecot(1, 2, 3), self.hashes()[3]]
            self.assertEqual(self.session((0, 2)), wanted)
            self.assertEqual(self.spool(), make(2, BASE + uids[2]) + make(4))
            self.assertEqual(self.session((0,)), [wanted[1], wanted[3]])
            self.assertEqual(self.spool(), make(4, BASE))
            self.assertEqual(self.session((0,)), [wanted[3]])
            self.assertEqual(self.spool(), b"")

    def test_base_in_the_pseudo_message(self) -> None:
        for make in self.each():
            pseudo = PSEUDO
            if make != self.cl2:
                # c-client's has a From_ line; MMDF's own programs write none.
                without = SEP + PSEUDO[len(FROM) :] + SEP
                pseudo = without if make == self.mmdf else b"\n" + SEP + SEP + PSEUDO + SEP
            two = make(2, b"X-UID: 2\n")
            self.write(pseudo + make(1, b"X-UID: 1\n") + two)
            self.assertEqual(self.session((0,)), dovecot(1, 2))
            self.assertEqual(self.session(), dovecot(2))
            self.assertEqual(self.spool(), pseudo + two)

    def test_base_does_not_hide_the_next_message(self) -> None:
        """By c-client's own name for it, and another mark, that would be a pseudo message."""
        marked = mail(2, b"X-UID: 2\nFrom: Mail System Internal Data\n")
        self.write(numbered(1, BASE.replace(b"base", b"")) + marked)
        self.assertEqual(self.session((0,)), dovecot(1, 2))
        self.assertEqual(self.spool(), FROM + BASE + marked[len(FROM) :])
        self.assertEqual(self.session(), dovecot(2))

    def test_headers_end_with_the_message(self) -> None:
        """What stands in the next one is none of its fields."""
        self.kind = "mmdf"
        self.write(SEP + b"Subject: 1\n" + SEP + b"X-UIDL: abcdefghijklm\n" + SEP)
        self.assertEqual(self.session((), "x-uidl"), [self.hashes()[0], b"abcdefghijklm"])

    def test_another_kind_is_another_index(self) -> None:
        body = b"body\n" * 60_000
        mails = [mail(1, b"X-UIDL: abcdefghijklm\nContent-Length: 7\n", body), mail(2, b"", body)]
        self.write(b"".join(mails))
        for form in ("x-uidl", "hash"):
            for self.kind in ("mboxrd", "mboxcl", "mboxo", "auto"):
                reused = [b"abcdefghijklm"] if form == "x-uidl" else self.hashes()[:1]
                self.assertEqual(self.session((), form), [*reused, self.hashes()[1]])

    def test_found_again(self) -> None:
        """After another program's rewriting, by the reused ids."""
        for make in self.each():
            old = [make(i, b"X-UIDL: abcdefghijk%d\n" % i) for i in range(3)]
            new = [make(i, b"X-UIDL: abcdefghijk%d\nStatus: O\n" % i) for i in range(3)]
            self.write(b"".join(old))
            drop = self.make(uidl="x-uidl", kind=self.kind).open(BOB)
            drop.identify()
            self.write(b"".join(new[1:]))
            drop.commit([2])
            drop.release()
            self.assertEqual(self.spool(), new[1])


class IndexTests(UidlCase):
    """Spools that are large enough for an index."""

    def octets(self) -> list[bytes]:
        return [mail(i, b"X-UIDL: abcdefghijk%d\n" % i, b"body\n" * 40_000) for i in range(3)]

    def test_ids_go_on(self) -> None:
        """Mail that comes later has no id twice, whatever its header says."""
        self.write(b"".join(self.octets()))
        wanted = [b"abcdefghijk%d" % i for i in range(3)]
        self.assertEqual(self.session((), "x-uidl"), wanted)
        again = [mail(7, b"X-UIDL: abcdefghijk1\n"), mail(8, b"X-UIDL: another-of-them\n")]
        self.append(b"".join(again * 2))
        hashes = self.hashes()
        wanted += [hashes[3], b"another-of-them", hashes[5] + b"-2", hashes[6]]
        self.assertEqual(self.session((), "x-uidl"), wanted)
        self.assertEqual(self.session((1,), "x-uidl"), wanted)
        self.assertEqual(self.session((), "x-uidl"), [wanted[0], *wanted[2:]])

    def test_another_option_is_another_index(self) -> None:
        self.write(b"".join(self.octets()))
        for form in ("x-uidl", "hash", "x-uidl[1-5]", "x-uidl"):
            found = self.session((), form)
            same = form == "x-uidl"
            self.assertEqual(
                found, [b"abcdefghijk%d" % i for i in range(3)] if same else self.hashes()
            )

    def test_uids_are_of_the_old_server_only(self) -> None:
        """What is appended to a spool that has ids was not numbered by it."""
        body = b"body\n" * 60_000
        self.write(numbered(1, BASE) + numbered(2) + mail(3, b"", body))
        first = self.session()
        self.append(mail(4, b"X-UID: 5\n"))
        self.assertEqual(self.session(), [*first, self.hashes()[3]])

    def test_base_goes_on(self) -> None:
        """The index does not say where messages lay before a field was put in."""
        self.write(
            numbered(1, BASE) + b"".join(numbered(i) for i in range(2, 9)) + self.octets()[0] * 3
        )
        found = self.session((0, 3))
        left = [*found[1:3], *found[4:]]
        self.assertEqual(self.session((0,)), left)
        self.assertEqual(self.session(), left[1:])
        self.assertTrue(self.spool().startswith(FROM + BASE))


class FoundAgainTests(UidlCase):
    """Deleting by reused ids where another program has rewritten the spool meanwhile."""

    def rewritten(self, before: bytes, after: bytes, deleted: list[int], form: str) -> bytes:
        self.write(before)
        drop = self.make(uidl=form).open(BOB)
        try:
            drop.identify()
            self.write(after)
            drop.commit(deleted)
        except TemporaryFailure:
            self.assertEqual(self.spool(), after)
        else:
            self.assertNotEqual(self.spool(), after)
        finally:
            drop.release()
        self.no_litter()
        return self.spool()

    def old(self, number: int, status: bytes = b"") -> bytes:
        return mail(number, b"X-UIDL: abcdefghijk%d\n" % number + status)

    def test_status_was_written(self) -> None:
        seen = [self.old(number, b"Status: RO\n") for number in range(3)] + [mail(3)]
        before = b"".join([*map(self.old, range(3)), mail(3)])
        left = self.rewritten(before, b"".join(seen), [0, 2, 3], "x-uidl")
        self.assertEqual(left, seen[1])

    def test_another_was_deleted(self) -> None:
        before = b"".join(map(self.old, range(4)))
        after = self.old(1) + self.old(2) + self.old(3)
        left = self.rewritten(before, after, [2], "x-uidl")
        self.assertEqual(left, self.old(1) + self.old(3))

    def test_gone(self) -> None:
        """Also where only its field is gone: who took it may have changed more."""
        before = b"".join(map(self.old, range(3)))
        for after in (
            self.old(0) + self.old(2),
            self.old(0) + mail(1) + self.old(2),
            b"\n" + self.old(0) + mail(1, b"X-UIDL: anotherofthem\n") + self.old(2),
            b"\n" + before + self.old(1),
        ):
            self.assertEqual(self.rewritten(before, after, [1], "x-uidl"), after)

    def test_copies_with_ids_of_their_own(self) -> None:
        """Told apart by them, however they lie."""
        one = mail(1, b"X-UIDL: abcdefghijklm\n")
        two = mail(1, b"X-UIDL: nopqrstuvwxyz\n")
        left = self.rewritten(one + two, b"\n" + two + one, [0], "x-uidl")
        self.assertEqual(left, b"\n" + two)

    def test_copies_with_one_id(self) -> None:
        """The second has its hash for an id. Which is which cannot be told: nothing is deleted."""
        one = mail(1, b"X-UIDL: abcdefghijklm\n")
        after = b"\n" + one + one
        self.assertEqual(self.rewritten(one + one, after, [0], "x-uidl"), after)

    def test_by_uid(self) -> None:
        before = numbered(1, BASE) + numbered(2) + numbered(3)
        after = numbered(1, BASE + b"X-Keywords: a\n") + numbered(2) + numbered(3)
        left = self.rewritten(before, after, [1], "x-uid")
        self.assertEqual(left, numbered(1, BASE + b"X-Keywords: a\n") + numbered(3))


class OptionTests(MboxCase):
    def test_factory(self) -> None:
        store = MboxFactory().make(None, self.state, "/mail/{user}", uidl="x-uidl,hash")
        self.assertEqual(store.uidl.text, "x-uidl[11-32],hash")
        store = MboxFactory().make(None, self.state, "/mail/{user}")
        self.assertEqual(store.uidl.text, "hash")
        error = self.assertRaises(
            ConfigError, MboxFactory().make, None, self.state, "/mail/{user}", uidl="uid"
        )
        self.assertIn("uidl=uid", str(error))
        self.assertFalse(os.path.exists(self.state))
