"""The sidecar index: it saves reading, and nobody can tell but by the time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs

from popdrop.errors import TemporaryFailure
from popdrop.stores.mbox import drop as drop_module
from popdrop.stores.mbox import index as index_module
from popdrop.stores.mbox.store import MboxStore
from popdrop.testing import as_sent
from tests.test_mbox_drop import BOB, MboxCase, message


class IndexCase(MboxCase):
    """Spools of any size are worth an index; `eager` messages are read at login."""

    eager = 0

    def setUp(self) -> None:
        super().setUp()
        self.patch(drop_module, "SMALLEST", 0)
        self.patch(drop_module, "EAGER", self.eager)
        self.now = 0
        # File times have ticks of some milliseconds: the clock says that they are long past.
        self.patch(drop_module, "clock_ns", lambda: time.time_ns() + self.now)
        self.settle()

    def settle(self) -> None:
        """From now on all that was written counts as written long ago."""
        self.now = 3600 * 10**9

    def begin(self, count: int = 20) -> bytes:
        octets = b"".join(message(i, b"body %d\n" % i) for i in range(count))
        self.write(octets)
        self.visit(uidl=True)
        return octets

    def visit(self, *, uidl: bool = False, deleted: tuple[int, ...] = ()) -> None:
        """A session by a server that has just been started."""
        self.store = self.make()
        drop = self.store.open(BOB)
        with contextlib.ExitStack() as stack:
            stack.callback(drop.release)
            if uidl:
                drop.identify()
            drop.commit(deleted)

    def index_path(self) -> str:
        folder = os.path.join(self.state, "index")
        names = os.listdir(folder)
        self.assertEqual(len(names), 1, names)
        return os.path.join(folder, names[0])

    def index(self) -> bytes:
        with open(self.index_path(), "rb") as file:
            return file.read()

    def seen(self, store: MboxStore) -> tuple[object, ...]:
        """All that a client can see."""
        drop = store.open(BOB)
        try:
            count, octets = len(drop.listing), drop.listing.octets
            if not drop.listing.measured:
                drop.measure()
            sizes = [drop.listing.size(i) for i in range(count)]
            drop.identify()
            ids = [drop.listing.uid(i) for i in range(count)]
            sent = []
            for i in range(count):
                source = drop.source(i)
                if not source.unchanged():
                    source.verify()
                sent.append(as_sent(drop.source(i)))
            return count, octets, sizes, ids, sent
        finally:
            drop.release()

    def fresh(self) -> MboxStore:
        """A store that has never seen the spool."""
        state = os.path.join(self.folder, "other")
        shutil.rmtree(state, ignore_errors=True)
        return MboxStore(os.path.join(self.folder, "mail", "{user}"), state)

    def same_as_fresh(self) -> None:
        self.assertEqual(self.seen(self.make()), self.seen(self.fresh()))

    def read_octets(self) -> list[int]:
        """From now on, how many octets of spools are read at a time."""
        counts: list[int] = []
        real = os.pread

        def pread(fd: int, length: int, offset: int) -> bytes:
            octets = real(fd, length, offset)
            if os.readlink(f"/proc/self/fd/{fd}") == self.path:
                counts.append(len(octets))
            return octets

        self.patch(os, "pread", pread)
        return counts


class LoginTests(IndexCase):
    def test_an_unchanged_spool_is_not_read(self) -> None:
        """Only its last octets; neither is it locked."""
        octets = self.begin(1000)
        self.assertGreater(len(octets), 10 * index_module.TAIL)
        counts = self.read_octets()
        open(self.path + ".lock", "x").close()
        drop = self.make().open(BOB)
        os.unlink(self.path + ".lock")
        self.assertEqual(counts, [index_module.TAIL])
        self.assertEqual(len(drop.listing), 1000)
        self.assertFalse(drop.listing.measured)
        drop.identify()
        self.assertTrue(drop.listing.measured and drop.listing.identified)
        self.assertEqual(counts, [index_module.TAIL])
        drop.release()
        self.same_as_fresh()

    def test_nor_is_all_of_the_index(self) -> None:
        self.begin(1000)
        taken: list[int] = []
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], at: int) -> int:
            taken.extend(map(len, buffers))
            return real(fd, buffers, at)

        self.patch(os, "preadv", preadv)
        drop = self.make().open(BOB)
        self.assertEqual(taken, [])
        drop.measure()
        self.assertEqual(sum(taken), 35 * 1000 + len(drop.listing.ids.text))
        drop.release()

    def test_of_one_that_has_grown_only_the_new_is_scanned(self) -> None:
        self.begin(1000)
        new = message(2001) + message(2002)
        self.append(new)
        counts = self.read_octets()
        drop = self.make().open(BOB)
        self.assertEqual(len(drop.listing), 1002)
        self.assertLess(sum(counts), 3 * index_module.TAIL + len(new))
        drop.identify()
        self.assertLess(sum(counts), 4 * index_module.TAIL + 2 * len(new))
        drop.release()
        self.same_as_fresh()

    def test_again_and_again(self) -> None:
        self.begin(5)
        for number in range(4):
            self.append(message(100 + number))
            self.visit(uidl=number % 2 == 0)
            self.same_as_fresh()

    def test_after_deleting_only_the_end_is_read(self) -> None:
        self.begin(1000)
        self.visit(uidl=True, deleted=tuple(range(0, 1000, 10)))
        counts = self.read_octets()
        drop = self.make().open(BOB)
        self.assertEqual(len(drop.listing), 900)
        drop.identify()
        self.assertLess(sum(counts), 2 * index_module.TAIL)
        drop.release()
        self.same_as_fresh()

    def test_mail_that_came_while_deleting(self) -> None:
        self.begin(10)
        drop = self.make().open(BOB)
        drop.identify()
        self.append(message(77))
        drop.commit([0, 4])
        drop.release()
        self.same_as_fresh()

    def test_copies_keep_their_numbers(self) -> None:
        """Decision 14: while there is an index."""
        self.write(message(1) * 3)
        self.visit(uidl=True)
        ids = self.seen(self.make())[3]
        self.visit(uidl=True, deleted=(0,))
        self.assertEqual(self.seen(self.make())[3], ids[1:])  # type: ignore[index]
        self.append(message(1))
        again = self.seen(self.make())[3]
        self.assertEqual(again, [*ids[1:], ids[0]])  # type: ignore[index]

    def test_small_spools_have_none(self) -> None:
        self.patch(drop_module, "SMALLEST", index_module.SMALLEST)
        self.begin(20)
        self.assertFalse(os.path.exists(os.path.join(self.state, "index")))

    def test_release_in_the_reactor_writes_none(self) -> None:
        self.begin(20)
        drop = self.make().open(BOB)
        self.assertTrue(drop.quick_release)
        self.append(message(3))
        drop.release()
        drop = self.make().open(BOB)
        drop.identify()
        self.assertFalse(drop.quick_release)
        drop.release()

    def test_limits_hold(self) -> None:
        self.begin(20)
        for limits in ({"max_messages": 19}, {"max_octets": 100}):
            with self.subTest(limits):
                self.assertRaises(drop_module.PermanentFailure, self.make(**limits).open, BOB)

    def test_other_options_are_another_index(self) -> None:
        """Sizes depend on what is not sent."""
        self.write(message(1).replace(b"\n\n", b"\nStatus: RO\n\n", 1))
        self.visit(uidl=True)
        plain = self.make(strip_headers=False).open(BOB)
        size = len(as_sent(plain.source(0)))
        self.assertEqual(plain.listing.octets, size)
        plain.release()


class EagerTests(IndexCase):
    """Where all is read at once."""

    eager = 10_000

    def test_an_unchanged_spool_is_not_read(self) -> None:
        self.begin(1000)
        counts = self.read_octets()
        drop = self.make().open(BOB)
        self.assertTrue(drop.listing.measured and drop.listing.identified)
        self.assertEqual(counts, [index_module.TAIL])
        drop.release()

    def test_one_that_has_grown(self) -> None:
        self.begin(10)
        for number in range(3):
            self.append(message(100 + number))
            self.visit(uidl=number == 1)
            self.same_as_fresh()


class TrustTests(IndexCase):
    """What an index says is believed only where it must be true."""

    def damaged(self, octets: bytes) -> None:
        path = self.index_path()
        with open(path, "wb") as file:
            file.write(octets)
        with capturedLogs() as logs:
            self.same_as_fresh()
        lines = [e for e in logs if "anew" in str(e.get("log_format"))]
        self.assertEqual(len(lines), 1, logs)

    def test_each_damage_is_found(self) -> None:
        """A flipped bit anywhere, and any shorter file: scanned anew, one line in the log."""
        self.begin(6)
        whole = self.index()
        places = random.Random(5)
        for position in [*range(0, 240, 9), *places.sample(range(len(whole)), 40)]:
            with self.subTest(position=position):
                broken = bytearray(whole)
                broken[position] ^= 1 << places.randrange(8)
                self.damaged(bytes(broken))
        for length in (0, 1, 100, 231, 232, 300, len(whole) - 1):
            with self.subTest(length=length):
                self.damaged(whole[:length])

    def test_another_version_is_made_anew(self) -> None:
        self.begin(6)
        self.patch(index_module, "VERSION", index_module.VERSION + 1)
        self.visit()
        newer = self.index()
        self.patch(index_module, "VERSION", index_module.VERSION - 1)
        self.damaged(newer)

    def test_it_may_go_at_any_time(self) -> None:
        """Between login and the first question, too."""
        self.begin(6)
        expected = self.seen(self.fresh())
        drop = self.make().open(BOB)
        os.unlink(self.index_path())
        drop.identify()
        self.assertEqual([drop.listing.uid(i) for i in range(6)], expected[3])
        self.assertEqual([as_sent(drop.source(i)) for i in range(6)], expected[4])
        drop.release()
        self.same_as_fresh()

    def test_and_then_the_spool_may_be_another(self) -> None:
        self.begin(6)
        drop = self.make().open(BOB)
        os.unlink(self.index_path())
        self.write(message(1) * 3)
        self.assertRaises(TemporaryFailure, drop.measure)
        drop.release()

    def test_what_was_rewritten_is_scanned(self) -> None:
        """Grown, shrunk, of the same size; the last octets the same or not."""
        octets = self.begin(6)
        first = octets[: octets.index(b"From ", 5)]
        changes = {
            "first gone": octets[len(first) :],
            "first gone and as much came": octets[len(first) :] + message(7, b"body 0\n"),
            "first twice": first + octets,
            "other": octets.replace(b"body 3", b"BODY 3"),
            "last": octets.replace(b"body 5", b"BODY 5"),
            "empty": b"",
            "cut in the middle": octets[:-20],
        }
        for name, changed in changes.items():
            with self.subTest(name):
                self.write(octets)
                self.visit(uidl=True)
                self.write(changed)
                self.same_as_fresh()

    def test_no_octets_of_another_message(self) -> None:
        """A spool with a period: an old part that was shifted has the same end."""
        same = message(1, b"x" * 4096 + b"\n")
        other = message(2, b"y" * 4096 + b"\n")
        self.assertEqual(len(same), len(other))
        self.write(other + same * 5)
        self.visit(uidl=True)
        self.write(same * 7)  # `other` was deleted, two more came
        drop = self.make().open(BOB)
        drop.identify()
        source = drop.source(0)
        self.assertFalse(source.unchanged())
        self.assertRaises(TemporaryFailure, source.verify)
        self.assertRaises(TemporaryFailure, drop.commit, [0])
        drop.release()
        self.assertEqual(self.spool(), same * 7)
        self.same_as_fresh()  # and from then on it is not believed any more

    def test_messages_of_one_length(self) -> None:
        """Whose ends are equal, too: a mail reader removed as much as came."""
        nightly = [message(100 + i, b"x" * 5000 + b"\n") for i in range(9)]
        self.assertEqual(len({len(each) for each in nightly}), 1)
        for name, kept in {"as many": nightly[1:4], "and one more": nightly[1:5]}.items():
            for uidl in (False, True):
                with self.subTest(name, uidl=uidl):
                    self.write(b"".join(nightly[:3]))
                    self.visit(uidl=uidl)
                    self.write(b"".join(kept))
                    self.same_as_fresh()

    def test_messages_of_one_length_within_a_session(self) -> None:
        """What a session leaves is no better known than what it has seen."""
        nightly = [message(100 + i) for i in range(9)]
        self.write(b"".join(nightly[:4]))
        drop = self.make().open(BOB)
        drop.identify()
        self.write(b"".join(nightly[i] for i in (0, 1, 3, 4, 5)))
        drop.commit([0])
        drop.release()
        self.assertEqual(self.spool(), b"".join(nightly[i] for i in (1, 3, 4, 5)))
        self.same_as_fresh()

    def test_ids_of_what_was_rewritten(self) -> None:
        """Refused in this session, as `no octets of another message`, and not for ever."""
        same, other = message(1, b"x" * 4096 + b"\n"), message(2, b"y" * 4096 + b"\n")
        self.write(other + same * 5)
        self.visit()
        self.write(same * 6)
        drop = self.make().open(BOB)
        self.assertRaises(TemporaryFailure, drop.identify)
        drop.release()
        self.same_as_fresh()

    def test_one_look_speaks_for_what_is_as_well_known(self) -> None:
        """Old mail behind which some came is compared first, 1 MiB at a time; the new was seen."""
        self.patch(drop_module, "VERIFIED_AT_ONCE", 2 * len(message(0, b"body 0\n")))
        self.begin(6)
        self.append(message(8) + message(9))
        drop = self.make().open(BOB)
        drop.measure()
        spans = drop._spans

        def reached(index: int, count: int = 9) -> list[int]:
            stop = drop.source(index).offset + drop.reach(index, count, 1 << 20)
            ends = [spans.stop(row) for row in range(len(spans))]
            self.assertIn(stop, ends)
            return [ends.index(stop), drop.source(index).unchanged()]

        self.assertEqual(reached(2), [5, False])
        self.assertEqual(reached(6), [7, True])
        self.assertEqual(reached(6, 0), [6, True])
        drop.source(2).verify()
        self.assertEqual(reached(1), [1, False])
        self.assertEqual(reached(2), [3, True])
        self.assertEqual(reached(2, 1), [3, True])
        self.assertEqual(reached(4), [5, False])
        # Changed by nobody yet: all that was looked at is in one and the same state.
        drop.source(4).verify()
        self.assertEqual(reached(4), [7, True])
        drop.release()

    def test_what_is_out_of_reach_is_not_looked_at(self) -> None:
        """A client may have thousands of commands wait: that must not cost thousands of looks."""
        octets = message(0, b"x" * 70_000 + b"\n") + b"".join(map(message, range(1, 600)))
        self.write(octets)
        self.visit()
        self.append(message(8))
        drop = self.make().open(BOB)
        drop.measure()
        drop.source(599).verify()
        looks: list[int] = []
        expected = drop._expected

        def counted(index: int) -> object:
            looks.append(index)
            return expected(index)

        self.patch(drop, "_expected", counted)
        size = len(message(1))
        drop.reach(0, 8000, 70_000)
        self.assertLessEqual(len(looks), 2)
        looks.clear()
        drop.reach(1, 8000, 10 * size)
        self.assertLessEqual(len(looks), 12)
        looks.clear()
        drop.reach(1, 8000, 300 * size)
        self.assertGreater(len(looks), 250)
        drop.release()

    def test_written_a_moment_ago(self) -> None:
        """What would not show in the file's times is looked at again."""
        self.begin(6)
        self.now = 0
        self.append(message(9))
        self.visit(uidl=True)
        self.same_as_fresh()

    def test_a_folder_that_cannot_be_written(self) -> None:
        """Said in the log; nobody's login fails."""
        self.write(message(1) * 2)
        os.makedirs(self.state, exist_ok=True)
        with open(os.path.join(self.state, "index"), "x"):
            pass
        with capturedLogs() as logs:
            self.visit(uidl=True)
        self.assertTrue([e for e in logs if "cannot be written" in str(e.get("log_format"))])

    def test_a_file_from_before_1970(self) -> None:
        """As broken tools leave them: it has an index like any other."""
        for time_ns in (-1, -(10**18)):
            with self.subTest(time_ns=time_ns):
                self.write(message(1) + message(2))
                os.utime(self.path, ns=(time_ns, time_ns))
                self.visit(uidl=True)
                drop = self.make().open(BOB)
                self.assertFalse(drop.listing.measured)
                drop.release()
                self.same_as_fresh()

    def test_the_maildrop_is_free_again_whatever_fails(self) -> None:
        """A user must not be locked out because of an index."""
        self.write(message(1) * 2)
        drop = self.store.open(BOB)
        drop.identify()

        def broken(*args: object) -> None:
            raise RuntimeError

        self.patch(index_module.Index, "save", broken)
        drop.release()
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.store.open(BOB).release()

    def test_leftovers_are_swept(self) -> None:
        self.begin(2)
        path = self.index_path()
        with open(path + ".new-0123", "x"):
            pass
        self.make().tidy()
        self.assertEqual(os.listdir(os.path.dirname(path)), [os.path.basename(path)])


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3)),
        st.tuples(st.just("no separator"), st.integers(0, 3)),
        st.tuples(st.just("uidl"), st.just(0)),
        st.tuples(st.just("stat"), st.just(0)),
        st.tuples(st.just("delete"), st.integers(0, 63)),
        st.tuples(st.just("foreign"), st.integers(0, 63)),
        st.tuples(st.just("young"), st.just(0)),
        st.tuples(st.just("lose"), st.just(0)),
    ),
    max_size=8,
)


class PropertyTests(IndexCase):
    @settings(deadline=None, max_examples=60)
    @given(_steps)
    def test_nobody_can_tell(self, steps: list[tuple[str, int]]) -> None:
        """Whatever was done before: the same sizes, ids and octets as without an index."""
        shutil.rmtree(self.state, ignore_errors=True)
        self.settle()
        self.write(message(0) + message(1) + message(1))
        for what, number in steps:
            if what == "append":
                self.append(message(number))
            elif what == "no separator":
                self.append(message(number)[:-1])
            elif what == "delete":
                count = len(self.seen(self.make())[2])  # type: ignore[arg-type]
                self.visit(uidl=True, deleted=tuple(i for i in range(count) if number >> i & 1))
            elif what == "foreign":
                kept = [m for i, m in enumerate(self.messages()) if number >> i & 1]
                self.write(b"".join(kept))
            elif what == "young":
                self.now = 0
            elif what == "lose":
                shutil.rmtree(os.path.join(self.state, "index"), ignore_errors=True)
            else:
                self.visit(uidl=what == "uidl")
        known, fresh = self.seen(self.make()), self.seen(self.fresh())
        self.assertEqual(known[:3], fresh[:3])
        self.assertEqual(known[4], fresh[4])
        # Numbers of copies depend on what was there before; all else of the ids does not.
        self.assertEqual([i[:26] for i in known[3]], [i[:26] for i in fresh[3]])  # type: ignore
        self.assertEqual(len(set(known[3])), known[0])  # type: ignore[arg-type]

    def messages(self) -> list[bytes]:
        octets = self.spool()
        parts = octets.split(b"\n\nFrom ")
        return [(b"From " if i else b"") + part + b"\n\n" for i, part in enumerate(parts) if part]
