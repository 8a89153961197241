"""`popdrop.listing`: rows of LIST and UIDL, and sums without rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop import listing as module
from popdrop.listing import Ids, Listing

_id = st.binary(min_size=1, max_size=3) | st.just(b"x" * 26)
_rows = st.lists(st.tuples(st.integers(0, 2**40), _id), max_size=12)


class ListingTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=300)
    @given(_rows, st.sets(st.integers(0, 12)), st.integers(1, 5))
    def test_rows(self, rows: list[tuple[int, bytes]], deleted: set[int], block: int) -> None:
        """In blocks of any size, with ids of one length or of several."""
        self.patch(module, "ROWS_PER_BLOCK", block)
        sizes, ids = [size for size, _ in rows], [each for _, each in rows]
        left = [i for i in range(len(rows)) if i not in deleted]
        listing = Listing(sizes, ids)
        self.assertEqual(
            b"".join(listing.size_rows(deleted)),
            b"".join(b"%d %d\r\n" % (i + 1, sizes[i]) for i in left),
        )
        self.assertEqual(
            b"".join(listing.uid_rows(deleted)),
            b"".join(b"%d %s\r\n" % (i + 1, ids[i]) for i in left),
        )
        self.assertEqual([listing.uid(i) for i in range(len(rows))], ids)
        self.assertEqual(list(listing.ids), ids)
        self.assertEqual((len(listing), listing.octets), (len(rows), sum(sizes)))

    @settings(deadline=None)
    @given(st.lists(_id, max_size=9), st.lists(_id, max_size=9), st.sets(st.integers(0, 9)))
    def test_ids(self, first: list[bytes], more: list[bytes], rows: set[int]) -> None:
        both = Ids.of(first).followed_by(Ids.of(more))
        self.assertEqual(both, Ids.of(first + more))
        left = [each for i, each in enumerate(first) if i not in rows]
        self.assertEqual(list(Ids.of(first).without(rows)), left)

    def test_only_the_sums(self) -> None:
        listing = Listing.promised(3, 700)
        self.assertEqual((len(listing), listing.octets), (3, 700))
        self.assertFalse(listing.measured or listing.identified)
        self.assertRaises(LookupError, listing.size, 0)
        self.assertRaises(LookupError, listing.uid, 0)
        self.assertRaises(LookupError, list, listing.size_rows(()))
        self.assertRaises(LookupError, listing.with_ids, [b"a", b"b", b"c"])

    def test_as_many_ids_as_sizes(self) -> None:
        self.assertRaises(ValueError, Listing, [1, 2], [b"a"])
