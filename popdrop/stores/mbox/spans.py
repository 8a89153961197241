"""`Spans`: where the messages of one mbox file lie."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

FIELDS: Final = 1
"""Header fields are left out."""
QUOTED: Final = 2
"""Quoting is undone."""
REFUSED: Final = 4
"""Content-Length was not believed."""


def octet_array() -> array[int]:
    """An empty array of offsets or counts of octets."""
    return array("Q")


@dataclass(slots=True)
class Spans:
    """Where the messages of one mbox file lie. 31 octets of memory a message.

    `starts`  offsets of the From_ lines, in octets; in MMDF files those of the lines of ^A
    `heads`   octets of each From_ line with its line end, and of that line of ^A
    `lengths` octets of each message as stored, behind its From_ line, without the separator
    `sizes`   octets of each as sent (RFC 1939 section 11)
    `checks`  CRC-32 of the From_ line, the header without spool headers, and the body's length
    `altered` how each is sent: 0 as it is stored, else the sum of `FIELDS` and `QUOTED`;
              `REFUSED` may be added
    `end`     octets scanned
    `hidden`  whether a c-client pseudo message stands before the first of these
    """

    starts: array[int] = field(default_factory=octet_array)
    heads: array[int] = field(default_factory=lambda: array("H"))
    lengths: array[int] = field(default_factory=octet_array)
    sizes: array[int] = field(default_factory=octet_array)
    checks: array[int] = field(default_factory=lambda: array("I"))
    altered: array[int] = field(default_factory=lambda: array("B"))
    end: int = 0
    hidden: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def columns(self) -> tuple[array[int], ...]:
        """All that there is for each message."""
        return (self.starts, self.heads, self.lengths, self.sizes, self.checks, self.altered)

    def extend(self, more: Spans, offset: int) -> None:
        """Add those of a part that was scanned by itself and begins at `offset`."""
        self.starts.extend(array("Q", [start + offset for start in more.starts]))
        for mine, added in zip(self.columns()[1:], more.columns()[1:], strict=True):
            mine.extend(added)
        self.end = offset + more.end

    def ends_with(self, part: Spans, first: int, start: int) -> bool:
        """Whether a scan from offset `start` on, where message `first` begins, gave the same."""
        return (
            part.end + start == self.end
            and (first > 0 or part.hidden == self.hidden)
            and array("Q", [each + start for each in part.starts]) == self.starts[first:]
            and all(
                theirs == mine[first:]
                for theirs, mine in zip(part.columns()[1:], self.columns()[1:], strict=True)
            )
        )

    def without(self, rows: Sequence[int], end: int) -> Spans:
        """Those that are left when `rows`, ascending, are cut out. `end` is where the last ends."""
        left = Spans(hidden=self.hidden)
        removed = position = 0
        for row in (*rows, len(self)):
            left.starts.extend(array("Q", [start - removed for start in self.starts[position:row]]))
            for kept, all_ in zip(left.columns()[1:], self.columns()[1:], strict=True):
                kept.extend(all_[position:row])
            if row < len(self):
                removed += (self.starts[row + 1] if row + 1 < len(self) else end) - self.starts[row]
            position = row + 1
        left.end = end - removed
        return left

    @property
    def last(self) -> int:
        """Where the last message begins; 0 where there is none."""
        return self.starts[-1] if len(self.starts) else 0

    def offset(self, index: int) -> int:
        """Where the octets behind the From_ line of message `index` (0-based) begin."""
        return self.starts[index] + self.heads[index]

    def content_end(self, index: int) -> int:
        """Behind the last octet of message `index`, its separator not counted."""
        return self.offset(index) + self.lengths[index]

    def stop(self, index: int) -> int:
        """Where the next message begins, or the end of what was scanned."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.end
