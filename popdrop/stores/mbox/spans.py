"""`Spans`: where the messages of one mbox file lie."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final

FIELDS: Final = 1
"""Header fields are left out."""
QUOTED: Final = 2
"""Quoting is undone."""


def _octets() -> array[int]:
    return array("Q")


@dataclass(slots=True)
class Spans:
    """Where the messages of one mbox file lie. 31 octets of memory a message.

    `starts`  offsets of the From_ lines, in octets
    `heads`   octets of each From_ line with its line end
    `lengths` octets of each message as stored, behind its From_ line, without the separator
    `sizes`   octets of each as sent (RFC 1939 section 11)
    `checks`  CRC-32 of the From_ line, the header without spool headers, and the body's length
    `altered` how each is sent: 0 as it is stored, else the sum of `FIELDS` and `QUOTED`
    `end`     octets scanned
    `hidden`  whether a c-client pseudo message stands before the first of these
    """

    starts: array[int] = field(default_factory=_octets)
    heads: array[int] = field(default_factory=lambda: array("H"))
    lengths: array[int] = field(default_factory=_octets)
    sizes: array[int] = field(default_factory=_octets)
    checks: array[int] = field(default_factory=lambda: array("I"))
    altered: array[int] = field(default_factory=lambda: array("B"))
    end: int = 0
    hidden: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def offset(self, index: int) -> int:
        """Where the octets behind the From_ line of message `index` (0-based) begin."""
        return self.starts[index] + self.heads[index]

    def content_end(self, index: int) -> int:
        """Behind the last octet of message `index`, its separator not counted."""
        return self.offset(index) + self.lengths[index]

    def stop(self, index: int) -> int:
        """Where the next From_ line begins, or the end of what was scanned."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.end
