"""`Listing`: sizes and ids of one maildrop, immutable, compact."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from struct import Struct

ROWS_PER_BLOCK = 1000
"""Rows of LIST or UIDL made at a time: about 12 to 33 KB, less than one transport buffer."""


@lru_cache(maxsize=16)
def _cutter(width: int, count: int) -> Struct:
    return Struct(f"{width}s" * count)


@dataclass(frozen=True, slots=True)
class Ids:
    """Unique-ids in one piece: `text` is all of them, `ends` where each one ends, in octets."""

    text: bytes
    ends: array[int]

    @classmethod
    def of(cls, ids: Iterable[bytes]) -> Ids:
        """These, in order."""
        text, ends = bytearray(), array("I")
        for each in ids:
            text += each
            ends.append(len(text))
        return cls(bytes(text), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self.ends:
            yield self.text[start:end]
            start = end

    def followed_by(self, more: Ids) -> Ids:
        """These and `more`."""
        length = len(self.text)
        ends = self.ends + array("I", [end + length for end in more.ends])
        return Ids(self.text + more.text, ends)

    def without(self, rows: Collection[int]) -> Ids:
        """All but those of messages `rows` (0-based)."""
        gone = frozenset(rows)
        return Ids.of([each for index, each in enumerate(self) if index not in gone])

    def some(self, start: int, stop: int) -> Sequence[bytes]:
        """The ids of messages `start` to `stop` (0-based, without `stop`)."""
        ends = self.ends[start:stop]
        begin = self.ends[start - 1] if start else 0
        if not ends:
            return ()
        width = ends[0] - begin
        # Most ids are of one length: cut all at once, that is a third less work for UIDL.
        if width and ends == array("I", range(begin + width, begin + width * len(ends) + 1, width)):
            return _cutter(width, len(ends)).unpack_from(self.text, begin)
        return [self.text[i:k] for i, k in pairwise((begin, *ends))]

    def row(self, index: int) -> bytes:
        """The id of message `index` (0-based)."""
        return self.text[self.ends[index - 1] if index else 0 : self.ends[index]]


class Listing:
    """What a maildrop held when it was photographed.

    Indexes are 0-based here; message-numbers on the wire are one more. Costs 8 octets a message
    for the size, and 4 and the id's own length once the ids are known: no object per message.
    """

    __slots__ = ("_count", "_ids", "_sizes", "octets")

    def __init__(self, sizes: Iterable[int], ids: Iterable[bytes] | Ids | None = None) -> None:
        self._sizes: array[int] | None = sizes if isinstance(sizes, array) else array("Q", sizes)
        self._count = len(self._sizes)
        self.octets = sum(self._sizes)
        self._ids = ids if isinstance(ids, Ids) or ids is None else Ids.of(ids)
        if self._ids is not None and len(self._ids) != self._count:
            raise ValueError("as many ids as sizes are needed")

    @classmethod
    def promised(cls, count: int, octets: int) -> Listing:
        """One of which only the sums are known yet."""
        listing = cls(())
        listing._sizes, listing._count, listing.octets = None, count, octets
        return listing

    def __len__(self) -> int:
        return self._count

    @property
    def measured(self) -> bool:
        """Whether the sizes are known, and not only their sum."""
        return self._sizes is not None

    def _known_sizes(self) -> array[int]:
        if self._sizes is None:
            raise LookupError("the sizes are not known yet")
        return self._sizes

    def size(self, index: int) -> int:
        """Octets as sent of message `index`: CRLF counted, final dot not (RFC 1939 section 11).

        Raises `LookupError` too early.
        """
        return self._known_sizes()[index]

    @property
    def identified(self) -> bool:
        """Whether the unique-ids are known yet."""
        return self._ids is not None

    @property
    def ids(self) -> Ids:
        """All unique-ids. Raises `LookupError` too early."""
        if self._ids is None:
            raise LookupError("the ids are not known yet")
        return self._ids

    def uid(self, index: int) -> bytes:
        """The unique-id of message `index` (RFC 1939 section 7). Raises `LookupError` too early."""
        return self.ids.row(index)

    def with_ids(self, ids: Iterable[bytes] | Ids) -> Listing:
        """The same listing with its unique-ids."""
        return Listing(self._known_sizes(), ids)

    def size_rows(self, deleted: Collection[int]) -> Iterator[bytes]:
        """LIST's scan listings of all but `deleted`, in blocks of rows with their line ends."""
        sizes = self._known_sizes()
        for start in range(0, len(sizes), ROWS_PER_BLOCK):
            numbers = range(start + 1, min(start + ROWS_PER_BLOCK, len(sizes)) + 1)
            rows = zip(numbers, sizes[start : start + ROWS_PER_BLOCK], strict=True)
            # Without the test for each row where none is deleted, as is usual: half the time.
            if deleted:
                yield b"".join([b"%d %d\r\n" % row for row in rows if row[0] - 1 not in deleted])
            else:
                yield b"".join([b"%d %d\r\n" % row for row in rows])

    def uid_rows(self, deleted: Collection[int]) -> Iterator[bytes]:
        """UIDL's unique-id listings, as `size_rows`."""
        for start in range(0, self._count, ROWS_PER_BLOCK):
            ids = self.ids.some(start, min(start + ROWS_PER_BLOCK, self._count))
            rows = enumerate(ids, start + 1)
            if deleted:
                yield b"".join([b"%d %b\r\n" % row for row in rows if row[0] - 1 not in deleted])
            else:
                yield b"".join([b"%d %b\r\n" % row for row in rows])
