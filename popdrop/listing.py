"""`Listing`: sizes and ids of one maildrop, immutable, compact."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate

ROWS_PER_BLOCK = 1000
"""Rows of LIST or UIDL made at a time: about 12 to 33 KB, less than one transport buffer."""


class Listing:
    """What a maildrop held when it was photographed.

    Indexes are 0-based here; message-numbers on the wire are one more. Costs 8 octets a message
    for the size, and 4 and the id's own length once the ids are known: no object per message.
    """

    __slots__ = ("_ends", "_ids", "_sizes", "octets")

    def __init__(self, sizes: Iterable[int], ids: Iterable[bytes] | None = None) -> None:
        self._sizes = sizes if isinstance(sizes, array) else array("Q", sizes)
        self.octets = sum(self._sizes)
        self._ids: bytes | None = None
        self._ends: array[int] | None = None
        if ids is not None:
            rows = list(ids)
            if len(rows) != len(self._sizes):
                raise ValueError("as many ids as sizes are needed")
            self._ids = b"".join(rows)
            self._ends = array("I", accumulate(map(len, rows)))

    def __len__(self) -> int:
        return len(self._sizes)

    def size(self, index: int) -> int:
        """Octets as sent of message `index`: CRLF counted, final dot not (RFC 1939 section 11)."""
        return self._sizes[index]

    @property
    def identified(self) -> bool:
        """Whether the unique-ids are known yet."""
        return self._ids is not None

    def uid(self, index: int) -> bytes:
        """The unique-id of message `index` (RFC 1939 section 7). Raises `LookupError` too early."""
        if self._ids is None or self._ends is None:
            raise LookupError("the ids are not known yet")
        start = self._ends[index - 1] if index else 0
        return self._ids[start : self._ends[index]]

    def with_ids(self, ids: Iterable[bytes]) -> Listing:
        """The same listing with its unique-ids."""
        return Listing(self._sizes, ids)

    def size_rows(self, deleted: Collection[int]) -> Iterator[bytes]:
        """LIST's scan listings of all but `deleted`, in blocks of rows with their line ends."""
        sizes = self._sizes
        for start in range(0, len(sizes), ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, len(sizes))
            yield b"".join(
                [b"%d %d\r\n" % (i + 1, sizes[i]) for i in range(start, stop) if i not in deleted]
            )

    def uid_rows(self, deleted: Collection[int]) -> Iterator[bytes]:
        """UIDL's unique-id listings, as `size_rows`."""
        for start in range(0, len(self._sizes), ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, len(self._sizes))
            yield b"".join(
                [
                    b"%d %s\r\n" % (i + 1, self.uid(i))
                    for i in range(start, stop)
                    if i not in deleted
                ]
            )
